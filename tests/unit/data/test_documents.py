"""Documents as training sequences: which tokens carry the loss."""

import json
from pathlib import Path

import pytest

from r1mega.config.schema import Data
from r1mega.data.documents import load_documents
from r1mega.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("arithmetic")
BOS, EOS = 0, 1


def test_sft_trains_on_the_response_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "1+2", "response": "<think>3</think>"}))
    data = Data(source="sft", path=str(path), template="brief")
    (sequence,) = load_documents(data, TOKENIZER, seed=1)
    prompt = (BOS, *TOKENIZER.encode("User: 1+2 Assistant:"))
    response = (*TOKENIZER.encode("<think>3</think>"), EOS)
    assert sequence.token_ids == prompt + response
    assert sequence.token_ids[sequence.start :] == response


def test_text_trains_on_everything(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "one and one"}) + "\n\n" + json.dumps({"text": "two"}))
    documents = load_documents(Data(source="text", path=str(path)), TOKENIZER, seed=1)
    assert [document.uid for document in documents] == ["text.jsonl:1", "text.jsonl:3"]
    assert documents[1].token_ids == (BOS, *TOKENIZER.encode("two"), EOS)
    assert documents[1].num_targets == 4


def test_arithmetic_corpus_repeats_by_seed_and_ends_every_document() -> None:
    data = Data(size=200, difficulty=5, template="brief")
    documents = load_documents(data, TOKENIZER, seed=1)
    assert documents == load_documents(data, TOKENIZER, seed=1)
    assert documents != load_documents(data, TOKENIZER, seed=2)
    for document in documents:
        assert document.start == 1
        assert (document.token_ids[0], document.token_ids[-1]) == (BOS, EOS)
        text = TOKENIZER.decode(document.token_ids)
        assert text.startswith("User: ") or "<" not in text


def test_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "1+2", "answer": "3"}))
    data = Data(source="sft", path=str(path))
    message = r"pairs.jsonl:1: expected a non-empty string under 'response', got the keys"
    with pytest.raises(ValueError, match=message):
        load_documents(data, TOKENIZER, 1)


def test_prompts_are_not_documents() -> None:
    with pytest.raises(ValueError, match="holds prompts, not documents"):
        load_documents(Data(source="jsonl", path="p.jsonl"), TOKENIZER, 1)
