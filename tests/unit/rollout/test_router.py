"""The command line of the router is one that the router itself accepts."""

import sys

import pytest

from r1mega.rollout.router import router_argv


def test_router_parses_its_command_line() -> None:
    launcher = pytest.importorskip("sglang_router.launch_router")
    argv = router_argv("127.0.0.1", 30123, metrics_port=30124, request_timeout_s=12.5)
    assert argv[:3] == [sys.executable, "-m", "r1mega.rollout.router_main"]
    parsed = launcher.parse_router_args(argv[3:])
    assert (parsed.host, parsed.port) == ("127.0.0.1", 30123)
    assert (parsed.policy, parsed.assignment_mode) == ("manual", "min_load")
    assert (parsed.prometheus_port, parsed.prometheus_host) == (30124, "127.0.0.1")
    assert parsed.request_timeout_secs == 13
    assert parsed.worker_urls == []
