"""Reading what a file's rows hold and turning text into ids: shared by prompts and documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1mega.data.tokenizer import Tokenizer
from r1mega.system.files import read_json_lines


def read_rows(path: str | None, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``FILE:LINE``, object) for every line; at least one."""
    if path is None:
        raise ValueError(f"data.source={source} needs data.path=FILE")
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file: correct data.path or data.eval_path")
    num_rows = 0
    for number, row in read_json_lines(Path(path)):
        num_rows += 1
        yield f"{path}:{number}", row
    if num_rows == 0:
        raise ValueError(f"{path} is empty: expected one JSON object per line")


def text_field(place: str, row: dict[str, Any], name: str) -> str:
    """The non-empty string under ``name``, or an error that names the file and line."""
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        return value
    got = repr(value) if name in row else f"the keys {sorted(row)}"
    raise ValueError(f"{place}: expected a non-empty string under {name!r}, got {got}")


def prompt_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What a prompt or document begins with: bos, where the tokenizer has one, and the text."""
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return (*begin, *tokenizer.encode(text))
