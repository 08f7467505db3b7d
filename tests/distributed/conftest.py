"""What tests of whole jobs share."""

from collections.abc import Iterator

import pytest

from tests.distributed.test_failures import Run
from tests.distributed.test_rl import r1mega


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """Whatever a test leaves is ended."""
    started: list[Run] = []
    yield started
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait(60)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights that know the format now and then, so that groups differ and gradients are real."""
    root = tmp_path_factory.mktemp("base")
    layers = ["configs/smoke/base.yaml", "name=base", "stage.steps=150", "data.size=9600"]
    done = r1mega("sft", *layers, f"run.root={root}")
    assert done.returncode == 0, done.stderr[-4000:]
    return f"model.init={root / 'base/checkpoints/step_000150'}"
