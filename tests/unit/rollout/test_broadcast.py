"""What goes together in one call to the engines, and the FP8 form of a stream."""

import torch

from r1mega.rollout.broadcast import buckets, quantized
from r1mega.weights import fp8
from r1mega.weights.blocks import scale_name


def test_buckets_keep_order_and_size_and_the_last_is_marked() -> None:
    tensors = [(str(i), torch.zeros(size)) for i, size in enumerate([10, 10, 30, 5, 5, 5])]
    found = list(buckets(tensors, 80))
    assert [[name for name, _ in bucket] for bucket, _ in found] == [
        ["0", "1"],
        ["2"],  # larger than a bucket: alone
        ["3", "4", "5"],
    ]
    assert [is_last for _, is_last in found] == [False, False, True]
    assert list(buckets([], 80)) == []


def test_what_sglang_joins_within_a_call_is_never_split() -> None:
    """q_a_proj with kv_a_proj_with_mqa, and codes with their scales."""
    attention = "model.layers.1.self_attn."
    names = [
        attention + name for name in ("q_a_proj.weight", "q_b_proj.weight", "kv_a_proj.weight")
    ]
    names = ["model.layers.1.input_layernorm.weight", *names, "model.layers.1.mlp.up_proj.weight"]
    stream = quantized(((name, torch.randn(4, 4)) for name in names), set(names[1:]))
    found = [[name for name, _ in bucket] for bucket, _ in buckets(stream, 1)]
    pairs = [[name, scale_name(name)] for name in names[1:]]
    assert found == [names[:1], [*pairs[0], *pairs[1], *pairs[2]], pairs[3]]


def test_quantized_stream_has_codes_and_scales_in_place_of_weights() -> None:
    weight = torch.randn(130, 5)
    sent = dict(quantized(iter([("a.weight", weight), ("b.bias", weight[0])]), {"a.weight"}))
    assert list(sent) == ["a.weight", "a.weight_scale_inv", "b.bias"]
    codes, scales = sent["a.weight"], sent["a.weight_scale_inv"]
    assert codes is not None
    assert scales is not None
    assert (codes.dtype, scales.shape) == (torch.float8_e4m3fn, (2, 1))
    assert torch.equal(fp8.dequantize(codes, scales), fp8.dequantize(*fp8.quantize(weight)))
    elsewhere = dict(quantized(iter([("a.weight", None), ("b.bias", None)]), {"a.weight"}))
    assert elsewhere == dict.fromkeys(sent)
