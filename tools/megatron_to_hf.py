"""Turn a checkpoint, of a training run or converted, into a Hugging Face folder.

    tools/megatron_to_hf.py CKPT_DIR OUT_DIR [dtype=keep|bf16|fp8] [shard_gb=5]

keep: every tensor as it is. bf16 and fp8: as DeepSeek publishes checkpoints, fp8 with codes and
scales of blocks of 128 x 128. A Hugging Face folder as CKPT_DIR is taken too: with dtype its
weights are quantized or dequantized. Interrupted, the same command goes on.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from command_line import Bar, parse, run

from r1mega.weights.conversion.convert import GIGABYTE, megatron_to_hf
from r1mega.weights.streams import Precision


@dataclass(frozen=True, kw_only=True)
class Options:
    dtype: Precision = "keep"
    shard_gb: int = 5


def main(arguments: Sequence[str]) -> None:
    (folder, out), options = parse(arguments, ("CKPT_DIR", "OUT_DIR"), Options)
    torch.set_num_threads(1)  # the converter has threads of its own
    with Bar() as bar:
        shard_bytes = options.shard_gb * GIGABYTE
        megatron_to_hf(folder, out, bar, dtype=options.dtype, shard_bytes=shard_bytes)


if __name__ == "__main__":
    sys.exit(run(main, __doc__ or ""))
