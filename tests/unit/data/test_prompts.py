"""Prompts from every source, their order, and what bad files say."""

import json
import os
from pathlib import Path

import pytest

from r1mega.config.schema import Data
from r1mega.data.prompts import load_prompts, order
from r1mega.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
GSM8K = Path(os.environ.get("R1MEGA_DATA", ROOT.parent / "shared" / "data")) / "gsm8k"
TOKENIZER = load_tokenizer("arithmetic")


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_arithmetic_prompts_are_rendered_tokenized_and_disjoint() -> None:
    data = Data(template="brief", size=300, held_out=20, difficulty=4)
    prompts = load_prompts(data, TOKENIZER, seed=1)
    assert (len(prompts.train), len(prompts.held_out)) == (300, 20)
    first = prompts.train[0]
    assert first.text == f"User: {first.question} Assistant:"
    assert first.token_ids == (0, *TOKENIZER.encode(first.text))
    assert int(first.answer) == eval(first.question)
    held_out = {prompt.question for prompt in prompts.held_out}
    assert held_out.isdisjoint(prompt.question for prompt in prompts.train)
    assert len({p.uid for p in prompts.train + prompts.held_out}) == 320


def test_jsonl_holds_out_the_last_lines(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+1", "answer": str(n + 1)} for n in range(5)]
    path = write(tmp_path / "p.jsonl", *rows)
    prompts = load_prompts(
        Data(source="jsonl", path=path, held_out=2, template="none"), TOKENIZER, 1
    )
    assert [prompt.answer for prompt in prompts.train] == ["1", "2", "3"]
    assert [prompt.uid for prompt in prompts.held_out] == ["p.jsonl:4", "p.jsonl:5"]


def test_gsm8k_answers_follow_the_marks_without_commas(tmp_path: Path) -> None:
    row = {"question": "how many", "answer": "1000+72 = <<1000+72=1072>>1,072\n#### 1,072"}
    path = write(tmp_path / "train.jsonl", row)
    eval_path = write(tmp_path / "test.jsonl", row, row)
    data = Data(source="gsm8k", path=path, eval_path=eval_path, held_out=1)
    prompts = load_prompts(data, TOKENIZER, 1)
    assert [prompt.answer for prompt in prompts.train] == ["1072"]
    assert [prompt.uid for prompt in prompts.held_out] == ["test.jsonl:1"]


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the checkout")
def test_gsm8k_itself_has_numbers_for_answers() -> None:
    data = Data(
        source="gsm8k",
        path=str(GSM8K / "train.jsonl"),
        eval_path=str(GSM8K / "test.jsonl"),
        held_out=2000,
    )
    prompts = load_prompts(data, load_tokenizer("deepseek"), 1)
    assert (len(prompts.train), len(prompts.held_out)) == (7473, 1319)
    assert prompts.held_out[0].answer == "18"
    for prompt in prompts.train + prompts.held_out:
        float(prompt.answer)


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        ("jsonl", {"question": "1"}, r"p.jsonl:2: expected a non-empty string under 'prompt', got"),
        ("jsonl", {"prompt": "1", "answer": 2}, r":2: expected a non-empty string .*'answer', got"),
        ("gsm8k", {"question": "1", "answer": "72"}, r":2: expected an answer that ends in '####"),
        ("jsonl", [1], r":2: expected one JSON object per line, got"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, source: str, row: object, message: str) -> None:
    good = {"prompt": "1", "question": "1", "answer": "#### 1"}
    path = write(tmp_path / "p.jsonl", good, row)
    data = Data(source=source, path=path, held_out=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        load_prompts(data, TOKENIZER, 1)


def test_files_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl")
    short = write(tmp_path / "short.jsonl", {"prompt": "1", "answer": "1"})
    for data, message in [
        (Data(source="jsonl"), "needs data.path=FILE"),
        (Data(source="jsonl", path=str(tmp_path / "none")), "is not a file"),
        (Data(source="jsonl", path=empty), "is empty"),
        (Data(source="jsonl", path=short, held_out=1), "leave none to train on"),
        (Data(source="jsonl", path=short, held_out=0, max_prompt_tokens=9), "more than"),
        (Data(source="text", path=short), "holds documents, not prompts"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_prompts(data, TOKENIZER, 1)


def test_order_visits_every_prompt_once_an_epoch_and_reshuffles() -> None:
    two_epochs = order(10, 1, 0, 20)
    assert sorted(two_epochs[:10]) == sorted(two_epochs[10:]) == list(range(10))
    assert two_epochs[:10] != two_epochs[10:]
    assert order(10, 2, 0, 20) != two_epochs


def test_order_resumes_anywhere() -> None:
    whole = order(7, 3, 0, 40)
    assert [index for position in range(0, 40, 5) for index in order(7, 3, position, 5)] == whole
    assert order(7, 3, 13, 20) == whole[13:33]
