"""What a response is worth: rules first, everything that can hang in killable workers."""

from r1mega.rewards.compose import check_errors, compose, reward_metrics

__all__ = ["check_errors", "compose", "reward_metrics"]
