"""Both built-in tokenizers: ids, round trips, and what they write."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from r1mega.data.tokenizer import load_tokenizer, save_tokenizer

RESPONSE = "User: 7+5-3 Assistant:<think>7+5=12\n12-3=9</think> <answer>9</answer>"


def test_arithmetic_has_64_tokens_and_keeps_single_digits() -> None:
    tokenizer = load_tokenizer("arithmetic")
    assert tokenizer.vocab_size == 64
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer.encode("128")) == 3
    assert len(tokenizer.encode("<think></think><answer>7</answer>")) == 5


def test_arithmetic_round_trip_drops_special_tokens_but_not_tags() -> None:
    tokenizer = load_tokenizer("arithmetic")
    ids = [0, *tokenizer.encode(RESPONSE), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == RESPONSE


def test_arithmetic_encodes_any_text_and_shows_what_it_does_not_know() -> None:
    tokenizer = load_tokenizer("arithmetic")
    assert tokenizer.decode(tokenizer.encode("7 {")) == "7 <unk>"


def test_concatenation_of_encodings_is_the_encoding_of_the_concatenation() -> None:
    tokenizer = load_tokenizer("arithmetic")
    assert tokenizer.encode("User: 1+2") + tokenizer.encode("<think>3") == tokenizer.encode(
        "User: 1+2<think>3"
    )


def test_deepseek_has_the_ids_of_the_published_vocabulary() -> None:
    tokenizer = load_tokenizer("deepseek")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.encode("<think></think>") == [128798, 128799]
    assert tokenizer.vocab_size <= 129280
    text = "<think>12 + 3 = 15\n</think> <answer>15</answer>"
    assert tokenizer.decode([*tokenizer.encode(text), 1]) == text


@pytest.mark.parametrize("name", ["arithmetic", "deepseek"])
def test_saved_tokenizer_is_the_same_here_and_in_transformers(name: str, tmp_path: Path) -> None:
    save_tokenizer(name, tmp_path)
    ids = load_tokenizer(name).encode(RESPONSE)
    assert load_tokenizer(str(tmp_path)).encode(RESPONSE) == ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(RESPONSE, add_special_tokens=False) == ids
    assert theirs.eos_token_id == 1


def test_unknown_name_says_what_is_known() -> None:
    with pytest.raises(ValueError, match="neither 'arithmetic' nor 'deepseek' nor a folder"):
        load_tokenizer("arithmetik")


def test_folder_without_end_token_is_refused(tmp_path: Path) -> None:
    save_tokenizer("arithmetic", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no eos_token"):
        load_tokenizer(str(tmp_path))
