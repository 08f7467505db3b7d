"""Networks and layouts to draw from: all three families, cut in every way that they allow."""

from hypothesis import strategies as st

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.holders import ranks_for
from r1mega.weights.names import Spec

V3 = schema.Model(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
MODELS = {
    "v3": V3,
    "v3 without q-LoRA": schema.Model(q_lora_rank=None, n_routed_experts=4, n_shared_experts=2),
    "v3 with mtp": schema.Model(n_routed_experts=4, num_nextn_predict_layers=2),
    "llama": schema.Model(architecture="llama", num_key_value_heads=2, attention_bias=True),
    "qwen2 tied": schema.Model(
        architecture="qwen2", num_key_value_heads=2, tie_word_embeddings=True, vocab_size=100
    ),
}


@st.composite
def learners(draw: st.DrawFn, model: schema.Model) -> Layout:
    """Any layout of at most 16 ranks that cuts the network evenly."""
    dense = model.architecture != "deepseek_v3"
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    ep, etp = (1, 1) if dense else draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]))
    stages: dict[str, int | None] = {}
    if pp == 2:
        stages = draw(st.sampled_from([{}, {"vpp": 2}, {"layers_in_first_stage": 1}]))
    replicas = draw(st.sampled_from([1, 2]))
    world = ranks_for(tp=tp, pp=pp, ep=ep, etp=etp) * replicas
    return Layout(world=world, tp=tp, pp=pp, ep=ep, etp=etp, **stages)


@st.composite
def engine_layouts(draw: st.DrawFn, model: schema.Model) -> EngineLayout:
    tp = draw(st.sampled_from([1, 2, 4]))
    if model.architecture != "deepseek_v3":
        return EngineLayout(tp=tp, fused=tp > 1 or draw(st.booleans()))
    divisors = st.sampled_from([n for n in (1, 2, 4) if tp % n == 0])
    return EngineLayout(
        tp=tp,
        ep=draw(divisors),
        dp=draw(divisors),
        dense_replicated=draw(st.booleans()),
        shared_replicated=draw(st.booleans()),
        dp_head=draw(st.booleans()),
    )


def spec_of(model: schema.Model) -> Spec:
    return Spec(mtp=model.num_nextn_predict_layers > 0)
