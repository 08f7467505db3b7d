"""r1mega trains reasoning models as DeepSeek-R1 was trained: GRPO on a mixture-of-experts base."""

__version__ = "0.1.0"
