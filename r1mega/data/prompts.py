"""Prompts of rl and eval: read or generated, rendered, tokenized, and ordered.

The order of training prompts is a pure function of (seed, position), so a resumed run continues
with exactly the prompts the interrupted one would have drawn.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from r1mega.config.schema import Data
from r1mega.data.arithmetic import problems
from r1mega.data.rows import prompt_ids, read_rows, text_field
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer
from r1mega.records import Prompt

Question = tuple[str, str, str]  # uid, question, answer


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Prompts to train on, and others to evaluate on; no question is in both."""

    train: list[Prompt]
    held_out: list[Prompt]


def load_prompts(data: Data, tokenizer: Tokenizer, seed: int) -> PromptSet:
    """The prompts of ``data.source``: arithmetic, gsm8k or jsonl."""
    if data.source == "arithmetic":
        train = _arithmetic(seed, data.size, data.difficulty, held_out=False)
        held_out = _arithmetic(seed, data.held_out, data.difficulty, held_out=True)
    elif data.source in ("gsm8k", "jsonl"):
        train, held_out = _read_both(data)
    else:
        raise ValueError(
            f"data.source={data.source} holds documents, not prompts: "
            "use arithmetic, gsm8k or jsonl"
        )

    def tokenize(questions: list[Question]) -> list[Prompt]:
        return [_prompt(question, data, tokenizer) for question in questions]

    return PromptSet(train=tokenize(train), held_out=tokenize(held_out))


def order(num_prompts: int, seed: int, position: int, count: int) -> list[int]:
    """Indices of the prompts at [position, position + count) of an endless, reshuffled stream."""
    if num_prompts < 1:
        raise ValueError("there are no training prompts to order")
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(position + len(indices), num_prompts)
        indices += _permutation(num_prompts, seed, epoch)[offset : offset + count - len(indices)]
    return indices


@lru_cache(maxsize=2)  # shuffling 64k documents takes longer than a small training step
def _permutation(num_prompts: int, seed: int, epoch: int) -> tuple[int, ...]:
    permutation = list(range(num_prompts))
    random.Random(f"epoch {seed} {epoch}").shuffle(permutation)
    return tuple(permutation)


def _arithmetic(seed: int, count: int, difficulty: int, *, held_out: bool) -> list[Question]:
    part = "held_out" if held_out else "train"
    drawn = problems(seed, count, difficulty, held_out=held_out)
    return [
        (f"arithmetic/{part}/{index}", problem.question, str(problem.answer))
        for index, problem in enumerate(drawn)
    ]


def _read_both(data: Data) -> tuple[list[Question], list[Question]]:
    """Held-out questions come from ``eval_path``, or are the last lines of ``path``."""
    questions = _read(data.source, data.path)
    if data.eval_path is not None:
        return questions, _read(data.source, data.eval_path)[: data.held_out]
    if len(questions) <= data.held_out:
        raise ValueError(
            f"{data.path} has {len(questions)} prompts and data.held_out={data.held_out} of them "
            "leave none to train on: lower data.held_out or set data.eval_path"
        )
    split = len(questions) - data.held_out
    return questions[:split], questions[split:]


def _read(source: str, path: str | None) -> list[Question]:
    parse = _parse_gsm8k if source == "gsm8k" else _parse_jsonl
    questions = []
    for place, row in read_rows(path, source):
        question, answer = parse(place, row)
        questions.append((place.rpartition("/")[2], question, answer))
    return questions


def _parse_gsm8k(place: str, row: dict[str, Any]) -> tuple[str, str]:
    """The final answer follows ``####``; thousands separators are dropped, as graders do."""
    question = text_field(place, row, "question")
    solution = text_field(place, row, "answer")
    found = re.search(r"####\s*(\S.*)\s*$", solution)
    if found is None:
        raise ValueError(
            f"{place}: expected an answer that ends in '#### NUMBER', got {solution[-60:]!r}"
        )
    return question, found.group(1).strip().replace(",", "")


def _parse_jsonl(place: str, row: dict[str, Any]) -> tuple[str, str]:
    return text_field(place, row, "prompt"), text_field(place, row, "answer")


def _prompt(question: Question, data: Data, tokenizer: Tokenizer) -> Prompt:
    uid, text, answer = question
    rendered = render(data.template, text)
    token_ids = prompt_ids(rendered, tokenizer)
    if len(token_ids) > data.max_prompt_tokens:
        raise ValueError(
            f"prompt {uid} has {len(token_ids)} tokens, more than "
            f"data.max_prompt_tokens={data.max_prompt_tokens}: raise it or drop the prompt"
        )
    return Prompt(uid=uid, text=rendered, token_ids=token_ids, question=text, answer=answer)
