"""The shim patches only what exists, once, and says so when an upgrade took a name away."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    """Patches are process-wide, so each case has a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def test_tensors_stay_on_the_cpu_and_megatron_imports() -> None:
    out = python(
        "from r1mega.parallel.cpu_shim import install\n"
        "install(); install()\n"
        "import torch\n"
        "from megatron.core.models.gpt import GPTModel\n"
        "x = torch.zeros(1, device='cuda', pin_memory=True)\n"
        "print(x.device, torch.cuda.current_device())\n"
    )
    assert out.splitlines()[-1] == "cpu cpu"


@pytest.mark.parametrize("name", ["cuda.Stream", "as_tensor"])
def test_a_name_that_is_gone_is_named(name: str) -> None:
    out = python(
        f"import torch\ndel torch.{name}\nfrom r1mega.parallel.cpu_shim import install\ninstall()\n"
    )
    assert f"{name.split('.')[-1]}, which does not exist" in out
    assert "not the pinned one" in out
