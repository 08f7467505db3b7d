"""Conversation templates: how a question becomes the text a base model continues."""

from typing import Literal

Template = Literal["r1_zero", "brief", "none"]

R1_ZERO = (  # DeepSeek-R1 (arXiv 2501.12948), table 1, word for word
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)
BRIEF = "User: {question} Assistant:"


def render(template: Template, question: str) -> str:
    """The prompt text of a question. ``render("brief", "1+2")`` -> ``"User: 1+2 Assistant:"``"""
    match template:
        case "r1_zero":
            return R1_ZERO.replace("{question}", question)
        case "brief":
            return BRIEF.replace("{question}", question)
        case "none":
            return question
