"""What a weight sync of DeepSeek-V3 671B moves, how evenly, and how long that takes to plan.

Learners of 256 ranks to one and several engines, as they are deployed: experts on ranks of their
own or cut over all, attention in parallel over data, 32 ways, FP8, and engines of unequal size.
Every plan is proved. ``over_minimum`` is bytes sent over bytes that the engines hold;
``over_bound`` is the most that a rank sends over the least that this could be, ``over_mean`` over
the mean of its pipeline stage, where the replicas are, both the worst of all cases.

NeMo-RL publishes 69.95 GiB per rank for pp 16, ep 16 -> tp 32 (docs/guides/
checkpoint-engine-refit.md): a 32nd of the experts and everything else whole. That load is computed
here from the table of names, and put beside what a rank of 32 has to get. Times are CPU seconds of
one core, the median; prints one JSON line.
"""

import json
import time
from itertools import product
from math import prod
from pathlib import Path
from statistics import median

from r1mega.config.load import load
from r1mega.config.schema import Model
from r1mega.parallel.layout import Layout
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.names import hf_shapes
from r1mega.weights.proof import prove
from r1mega.weights.reshard import Plan, plan
from r1mega.weights.sharing import Demand, Stretch, peak_bound

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = {"world": 256, "pp": 16, "layers_in_first_stage": 3, "layers_in_last_stage": 2}
LEARNERS = {f"tp{tp}_pp16_ep16": Layout(tp=tp, ep=16, **STAGES) for tp in (1, 8)}
EXPERTS, CUT = EngineLayout(tp=16, ep=16), EngineLayout(tp=16)
WIDE = EngineLayout(tp=32, ep=32)
ENGINES = {
    "tp16_ep16": [EXPERTS],
    "16_of_tp16_ep16": [EXPERTS] * 16,
    "tp16": [CUT],
    "16_of_tp16": [CUT] * 16,
    "tp32_ep32": [WIDE],
    "4_of_dp16": [EngineLayout(tp=16, ep=16, dp=16, dense_replicated=True, dp_head=True)] * 4,
    "4_of_fp8": [EngineLayout(tp=16, ep=16, quantized=True)] * 4,
    "unequal": [EXPERTS, EngineLayout(tp=8, ep=8), WIDE],
}
REPEATS = 3
PUBLISHED_GIB = 69.95


def main() -> None:
    model = load([str(CONFIGS / "model/deepseek_v3.yaml"), "stage.kind=sft"]).model
    result: dict[str, object] = {"benchmark": "reshard_plan"}
    over_minimum, over_bound, over_mean, proofs = [], [], [], []
    for (learner, layout), (name, engines) in product(LEARNERS.items(), ENGINES.items()):
        seconds = []
        for _ in range(REPEATS):
            started = time.process_time()
            made = plan(model, layout, engines)
            seconds.append(time.process_time() - started)
        result[f"{learner}_to_{name}_s"] = round(median(seconds), 3)
        started = time.process_time()
        prove(made)
        proofs.append(time.process_time() - started)
        over_minimum.append(made.bytes / made.minimum_bytes)
        over_bound.append(max(made.sent_bytes) / peak_bound(demands(made)))
        over_mean.append(max(stage_peaks(made)))
    result |= {
        "slowest_proof_s": round(max(proofs), 2),
        "over_minimum": max(over_minimum),
        "over_bound": round(max(over_bound), 4),
        "over_mean": round(max(over_mean), 4),
    }
    print(json.dumps(result | beside_nemo_rl(model)))


def demands(made: Plan) -> list[Demand]:
    return [
        Demand(
            flow.sources,
            tuple(
                Stretch(len(flow.names) * len(route.targets), route.num_bytes)
                for route in flow.routes
            ),
        )
        for flow in made.flows
    ]


def stage_peaks(made: Plan) -> list[float]:
    """Per pipeline stage, the most that a rank sends over the mean."""
    size = made.learner.world // made.learner.pp
    stages = [made.sent_bytes[first : first + size] for first in range(0, made.learner.world, size)]
    return [max(stage) * size / sum(stage) for stage in stages]


def beside_nemo_rl(model: Model) -> dict[str, float]:
    """Both in GiB of bf16 that one of 32 ranks receives."""
    made = plan(model, LEARNERS["tp1_pp16_ep16"], [WIDE])
    shapes = hf_shapes(model)
    experts = sum(2 * prod(shapes[name]) for name in shapes if ".mlp.experts." in name)
    everything = sum(2 * prod(shape) for shape in shapes.values())
    theirs = (everything - experts + experts / 32) / 2**30
    ours = made.bytes / 32 / 2**30
    return {
        "nemo_rl_published_gib": PUBLISHED_GIB,
        "nemo_rl_computed_gib": round(theirs, 2),
        "r1mega_gib": round(ours, 2),
        "r1mega_over_nemo_rl": round(ours / theirs, 3),
    }


if __name__ == "__main__":
    main()
