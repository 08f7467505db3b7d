"""Take weights from, or give them to, Megatron's own distributed checkpoints ("torch_dist").

    tools/torch_dist.py import SOURCE OUT_DIR [hf=HF_DIR] [tp=1] [pp=1] [ep=1] [etp=1]
    tools/torch_dist.py export SOURCE OUT_DIR [spec=te|local]

import: SOURCE holds .metadata and *.distcp, HF_DIR its network's config.json and tokenizer; OUT_DIR
becomes a checkpoint cut for the layout named. export: SOURCE is a checkpoint or a Hugging
Face folder; spec names the layer spec of the GPTModel that is to load OUT_DIR: TransformerEngine's
or the local one. Weights only: optimizer state and generator states are not carried.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from command_line import Bar, parse, run

from r1mega.weights.checkpoints.checkpoint import COMPANIONS
from r1mega.weights.conversion.convert import smallest_layout, write_checkpoint
from r1mega.weights.conversion.hf_folder import read_companions
from r1mega.weights.inspection import summarize
from r1mega.weights.progress import Meter
from r1mega.weights.readers import open_reader, read_network
from r1mega.weights.torch_dist.export import export


@dataclass(frozen=True, kw_only=True)
class Import:
    hf: Path | None = None
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1


@dataclass(frozen=True, kw_only=True)
class Export:
    spec: Literal["te", "local"] = "te"


def main(arguments: Sequence[str]) -> None:
    verbs = {"import": (_import, Import), "export": (_export, Export)}
    if arguments[0] not in verbs:
        raise ValueError(f"expected import or export, got {arguments[0]}")
    work, options_of = verbs[arguments[0]]
    (source, out), options = parse(arguments[1:], ("SOURCE", "OUT_DIR"), options_of)
    torch.set_num_threads(1)  # the converter has threads of its own
    with Bar() as bar:
        work(source, out, options, bar)


def _import(source: Path, out: Path, options: Import, bar: Bar) -> None:
    model = read_network(source, options.hf)
    layout = smallest_layout(model, tp=options.tp, pp=options.pp, ep=options.ep, etp=options.etp)
    companions = _companions(options.hf or source)
    with open_reader(source, model) as reader:
        write_checkpoint(reader, model, layout, out, companions, bar)


def _export(source: Path, out: Path, options: Export, bar: Bar) -> None:
    model = read_network(source)
    fused = options.spec == "te"
    companions = _companions(source)
    with open_reader(source, model) as reader:
        meter = Meter("exported", summarize(reader, model).tensor_bytes, bar)
        export(reader, model, out, fused_norms=fused, companions=companions, progress=meter.advance)


def _companions(folder: Path) -> dict[str, bytes]:
    own = folder / COMPANIONS
    return read_companions(own if own.is_dir() else folder)


if __name__ == "__main__":
    sys.exit(run(main, __doc__ or ""))
