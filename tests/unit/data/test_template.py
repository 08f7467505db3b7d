"""Templates, word for word."""

from r1mega.data.template import render


def test_brief_and_none() -> None:
    assert render("brief", "1+2") == "User: 1+2 Assistant:"
    assert render("none", "1+2") == "1+2"


def test_r1_zero_is_the_papers_and_leaves_braces_of_the_question_alone() -> None:
    text = render("r1_zero", "What is {x}")
    assert text.startswith("A conversation between User and Assistant. The user asks a question,")
    assert "first thinks about the reasoning process in the mind and then provides" in text
    assert text.endswith("<answer> answer here </answer>. User: What is {x}. Assistant:")
