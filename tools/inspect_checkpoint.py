"""Is a folder of weights whole, what does it hold, and is it the same as another?

    tools/inspect_checkpoint.py DIR [match=GLOB] [list=true] [verify=true] [json=false]
    tools/inspect_checkpoint.py DIR compare=OTHER [match=GLOB] [verify=true] [json=false]

DIR and OTHER are checkpoints, Hugging Face folders or torch_dist folders, in any layout. hf=FOLDER
names a folder with the config.json of torch_dist weights. json=true prints one object per line.
Exit status 0: whole, and equal bit for bit; 1 otherwise, with the first thing that is wrong.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from command_line import Bar, parse, run

from r1mega.config import schema
from r1mega.weights import comparison, inspection
from r1mega.weights.progress import Meter
from r1mega.weights.readers import Reader, check_folder, open_reader, read_network


@dataclass(frozen=True, kw_only=True)
class Options:
    match: str = "*"
    list: bool = True
    verify: bool = True
    compare: Path | None = None
    hf: Path | None = None
    json: bool = False


def main(arguments: Sequence[str]) -> None:
    (folder,), options = parse(arguments, ("DIR",), Options)
    torch.set_num_threads(1)  # the inspection has threads of its own
    if options.compare is not None:
        check_folder(options.compare)  # before hours of reading the other
    with Bar() as bar, ExitStack() as stack:
        network = read_network(folder, options.hf or options.compare)
        reader = stack.enter_context(open_reader(folder, network))
        num_bytes = _check(reader, network, options, bar)
        if options.compare is not None:
            network = read_network(options.compare, options.hf or folder)
            other = stack.enter_context(open_reader(options.compare, network))
            num_bytes += _check(other, network, options, bar)
            _compare(reader, other, options, Meter("compared", num_bytes, bar))
        elif options.list:
            meter = Meter("read", num_bytes, bar)
            names = [name for name in reader.tensors if fnmatchcase(name, options.match)]
            if not names:
                raise ValueError(f"no tensor has a name like {options.match}")
            for facts in inspection.describe(reader, names, progress=meter.advance):
                _show(facts, options)


def _check(reader: Reader, network: schema.Model, options: Options, bar: Bar) -> int:
    """The bytes of its tensors."""
    summary = inspection.summarize(reader, network)
    if options.verify:
        meter = Meter(f"verified {reader.folder.name}", summary.file_bytes, bar)
        inspection.check_whole(reader, network, progress=meter.advance)
    _show(summary, options)
    return summary.tensor_bytes


def _compare(reader: Reader, other: Reader, options: Options, meter: Meter) -> None:
    """Raises ValueError when anything differs."""
    names = comparison.names_of(reader, other, lambda name: fnmatchcase(name, options.match))
    differing = 0
    for difference in comparison.compare(reader, other, names, progress=meter.advance):
        if difference is not None:
            differing += 1
            _show(difference, options)
    if differing:
        raise ValueError(f"{differing} of {len(names)} tensors differ")
    if not options.json:
        print(f"{len(names)} tensors are equal bit for bit")


def _show(row: Any, options: Options) -> None:
    text = json.dumps({"row": type(row).__name__} | asdict(row)) if options.json else row
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(run(main, __doc__ or ""))
