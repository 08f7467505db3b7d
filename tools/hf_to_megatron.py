"""Turn a Hugging Face folder into a checkpoint that learners of any layout start from.

    tools/hf_to_megatron.py HF_DIR OUT_DIR [tp=1] [pp=1] [ep=1] [etp=1]

The checkpoint is cut for the layout named; pp alone spreads the layers as evenly as can be. Tensors
keep their dtypes, FP8 codes and scales included. Interrupted, the same command goes on.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from command_line import Bar, parse, run

from r1mega.weights.conversion.convert import hf_to_megatron


@dataclass(frozen=True, kw_only=True)
class Options:
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1


def main(arguments: Sequence[str]) -> None:
    (folder, out), options = parse(arguments, ("HF_DIR", "OUT_DIR"), Options)
    torch.set_num_threads(1)  # the converter has threads of its own
    with Bar() as bar:
        hf_to_megatron(folder, out, bar, **asdict(options))


if __name__ == "__main__":
    sys.exit(run(main, __doc__ or ""))
