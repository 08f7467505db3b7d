"""What microbatches report, added up over microbatches and ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from r1mega.learner.pipeline import LossOutput
from r1mega.parallel.collectives import gather_records
from r1mega.parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class Totals:
    """Numbers by metric name: some are to be added, of the others the largest counts."""

    sums: dict[str, float]
    maxima: dict[str, float]


def reduce_outputs(
    outputs: list[LossOutput], counted: dict[str, float], groups: Groups, device: torch.device
) -> dict[str, float]:
    """All metrics on every rank, added in rank order; the batch's loss is ``loss``. Collective.

    ``outputs`` count once per replica, ``counted`` are further sums that every rank has a part in.
    """
    reported = [_totals(output) for output in outputs] if groups.reports_losses else []
    mine = _add_up([*reported, Totals(counted, {})])
    total = _add_up(gather_records(mine, Totals, group=groups.world, device=device))
    return total.sums | total.maxima


def _totals(output: LossOutput) -> Totals:
    sums = {"loss": output.loss} | output.sums
    return Totals(
        {name: value.item() for name, value in sums.items()},
        {name: value.item() for name, value in output.maxima.items()},
    )


def _add_up(parts: Iterable[Totals]) -> Totals:
    total = Totals({}, {})
    for part in parts:
        for name, value in part.sums.items():
            total.sums[name] = total.sums.get(name, 0.0) + value
        for name, value in part.maxima.items():
            total.maxima[name] = max(total.maxima.get(name, value), value)
    return total
