"""Documents of the sft stage as training sequences.

text documents and arithmetic ones train on every token; sft pairs on the response and its eos.
Prompt and response are tokenized apart, as a sampled response is appended to its prompt's tokens.
"""

from collections.abc import Iterator

from r1mega.config.schema import Data
from r1mega.data import arithmetic
from r1mega.data.rows import prompt_ids, read_rows, text_field
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer
from r1mega.records import Sequence


def load_documents(data: Data, tokenizer: Tokenizer, seed: int) -> list[Sequence]:
    """The documents of ``data.source``: arithmetic, text or sft."""
    match data.source:
        case "arithmetic":
            return list(_arithmetic(data, tokenizer, seed))
        case "text":
            return list(_texts(data, tokenizer))
        case "sft":
            return list(_pairs(data, tokenizer))
        case _:
            raise ValueError(
                f"data.source={data.source} holds prompts, not documents: "
                "use arithmetic, text or sft"
            )


def _arithmetic(data: Data, tokenizer: Tokenizer, seed: int) -> Iterator[Sequence]:
    pairs = arithmetic.documents(
        seed, data.size, data.difficulty, data.template, arithmetic.Mixture()
    )
    for index, (prompt, response) in enumerate(pairs):
        token_ids = (*prompt_ids(prompt, tokenizer), *_ended(response, tokenizer))
        yield Sequence(uid=f"arithmetic/{index}", token_ids=token_ids, start=1)


def _texts(data: Data, tokenizer: Tokenizer) -> Iterator[Sequence]:
    for place, row in read_rows(data.path, data.source):
        text = text_field(place, row, "text")
        token_ids = (*prompt_ids("", tokenizer), *_ended(text, tokenizer))
        yield Sequence(uid=place.rpartition("/")[2], token_ids=token_ids, start=1)


def _pairs(data: Data, tokenizer: Tokenizer) -> Iterator[Sequence]:
    for place, row in read_rows(data.path, data.source):
        prompt = prompt_ids(render(data.template, text_field(place, row, "prompt")), tokenizer)
        response = _ended(text_field(place, row, "response"), tokenizer)
        uid = place.rpartition("/")[2]
        yield Sequence(uid=uid, token_ids=(*prompt, *response), start=len(prompt))


def _ended(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return (*tokenizer.encode(text), tokenizer.eos_token_id)
