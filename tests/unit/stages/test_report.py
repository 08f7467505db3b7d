"""A report of a run that is not there."""

from pathlib import Path

import pytest

from r1mega.config import load
from r1mega.stages import report


def test_a_run_that_is_not_there_is_a_sentence_and_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no metrics yet"):
        report.main(load([f"run.root={tmp_path}", "name=misspelt"]))
    assert list(tmp_path.iterdir()) == []
