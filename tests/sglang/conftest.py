"""Without SGLang's environment the tests of this folder are skipped."""

from pathlib import Path

import pytest

from tests.sglang.servers import PYTHON


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Called with every collected test, those of other folders included."""
    if PYTHON.exists():
        return
    skip = pytest.mark.skip(reason=f"there is no {PYTHON}: make sglang-env")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
