"""How an SGLang server learns the key that it shall ask for without showing it to others.

Its command line is read by every user of the machine, and it logs its settings, the key among them.
So the key comes in a file for our eyes only, and the logger that lists settings says less.
"""

import json
import os
import shutil
from pathlib import Path

_KEY_FILE = "sglang.yaml"  # SGLang reads options from a file of this ending
_LOGGING_FILE = "logging.json"
_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "[%(asctime)s] %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
    "loggers": {"sglang.srt.entrypoints.engine": {"level": "WARNING"}},
}


def write(folder: Path, key: str) -> None:
    """Make ``folder`` and in it what ``arguments`` and ``environment`` name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    descriptor = os.open(folder / _KEY_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with open(descriptor, "w") as file:
        file.write(json.dumps({"api-key": key}))  # JSON is YAML
    (folder / _LOGGING_FILE).write_text(json.dumps(_LOGGING))


def arguments(folder: Path) -> list[str]:
    return ["--config", str((folder / _KEY_FILE).resolve())]


def environment(folder: Path) -> dict[str, str]:
    return {"SGLANG_LOGGING_CONFIG_PATH": str((folder / _LOGGING_FILE).resolve())}
