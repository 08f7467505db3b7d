"""The command line: ``r1mega <verb> layer.yaml ... key=value ...``.

Nothing heavy is imported until a verb needs it: ``--help`` and a configuration error are instant.
A mistake in the configuration is one message on stderr and exit status 2, never a traceback.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from r1mega.config import Config, ConfigError, load
from r1mega.system.processes import SENTENCE

if TYPE_CHECKING:
    from r1mega.parallel.backend import Backend

Verb = Callable[[list[str]], int]

_RANK = "RANK"  # set by torch.distributed.run

logger = logging.getLogger(__name__)

_EPILOG = """\
layers, left to right over the defaults:
  configs/stage/r1_zero.yaml    a YAML file
  learner.lr=1e-6               one key

examples:
  r1mega show configs/stage/r1_zero.yaml configs/model/deepseek_v3.yaml
  r1mega rl configs/smoke/r1_zero.yaml seed=2 name=second
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the return value is the exit status."""
    arguments = _parser().parse_args(argv)
    _start_logging()
    verb: Verb = arguments.run
    try:
        return verb(arguments.layers)
    except ConfigError as error:
        sys.stderr.write(f"{SENTENCE}{error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if is_rank():  # a rank's log keeps the place, above the sentence
            logger.info("this rank ends", exc_info=True)
        sys.stderr.write(f"{SENTENCE}{error}\n")
        return 1


def is_rank() -> bool:
    """Whether torch.distributed.run started this process."""
    return _RANK in os.environ


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r1mega",
        description="Trains DeepSeek-R1: GRPO on a mixture-of-experts model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add(verbs, "show", _show, "print the resolved configuration and what follows from it")
    _add(verbs, "sft", _sft, "train on documents or on prompt and response pairs")
    _add(verbs, "rl", _rl, "train by GRPO on prompts with rule-based rewards")
    _add(verbs, "eval", _eval, "sample held-out prompts: pass@1, pass@k, cons@k")
    _add(verbs, "selftest", _selftest, "train in small: layout against one process, engine too")
    _add(verbs, "report", _report, "write runs/<name>/report.html")
    # What the launcher starts on every rank; without help, so that --help does not list it.
    workers = verbs.add_parser("worker").add_subparsers(metavar="VERB", required=True)
    _add(workers, "sft", _worker_sft, "one learner rank of sft")
    _add(workers, "rl", _worker_rl, "one learner rank of rl")
    _add(workers, "eval", _worker_eval, "one learner rank of eval")
    _add(workers, "selftest", _worker_selftest, "one learner rank of selftest")
    return parser


def _add(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Verb, about: str
) -> None:
    parser = verbs.add_parser(name, help=about, description=about)
    parser.add_argument("layers", nargs="*", metavar="LAYER", help="a YAML file or key=value")
    parser.set_defaults(run=run)


def _start_logging() -> None:
    """Once per process; torch.distributed.run sets RANK on the learner's ranks."""
    rank = os.environ.get(_RANK)
    who = "launcher" if rank is None else f"rank {rank}"
    form = f"%(asctime)s %(levelname).1s [{who}] %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S")
    if rank == "0":  # its log is a file, and its standard output what a person sees
        terminal = logging.StreamHandler(sys.stdout)
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter(form, "%H:%M:%S"))
        logging.getLogger("r1mega").addHandler(terminal)


def _load_for(verb: str, layers: list[str]) -> Config:
    """The verb on the command line decides the kind of the stage, not the file."""
    return load([*layers, f"stage.kind={verb}"])


def _show(layers: list[str]) -> int:
    config = load(layers)
    from r1mega.show import show

    show(config)
    return 0


def _sft(layers: list[str]) -> int:
    return _launch("sft", layers)


def _rl(layers: list[str]) -> int:
    return _launch("rl", layers)


def _eval(layers: list[str]) -> int:
    return _launch("eval", layers)


def _selftest(layers: list[str]) -> int:
    config = load(layers)
    from r1mega.cluster import selftest

    return selftest.run(config)


def _launch(verb: str, layers: list[str]) -> int:
    config = _load_for(verb, layers)
    from r1mega.cluster import job

    return job.run(verb, config, layers)


def _open_backend(config: Config) -> "Backend":
    """Before any stage is imported: on CPU this makes megatron.core importable."""
    from r1mega.parallel.backend import open_backend

    return open_backend(config.cluster.backend)


def _worker_sft(layers: list[str]) -> int:
    config = _load_for("sft", layers)
    backend = _open_backend(config)
    from r1mega.stages import sft

    return sft.main(config, backend)


def _worker_rl(layers: list[str]) -> int:
    config = _load_for("rl", layers)
    backend = _open_backend(config)
    from r1mega.stages import rl

    return rl.main(config, backend)


def _worker_eval(layers: list[str]) -> int:
    config = _load_for("eval", layers)
    backend = _open_backend(config)
    from r1mega.stages import evaluate

    return evaluate.main(config, backend)


def _worker_selftest(layers: list[str]) -> int:
    config = load(layers)
    backend = _open_backend(config)
    from r1mega.stages import selftest

    return selftest.main(config, backend)


def _report(layers: list[str]) -> int:
    config = load(layers)
    from r1mega.stages import report

    return report.main(config)
