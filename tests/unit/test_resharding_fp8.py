"""Which tensors of a push are FP8, held against what DeepSeek-V3's and Ling's checkpoints have."""

from __future__ import annotations

import pytest
import torch
from megatron_rl_kernels.fp8 import BLOCK as KERNEL_BLOCK
from megatron_rl_kernels.fp8 import quantize
from tiny_families import TINY, tiny_model

from megatron_rl.resharding.families import names_of
from megatron_rl.resharding.fp8 import BLOCK, is_quantized, quantized, scale_shape
from megatron_rl.types import TensorSpec

KEPT = ("embed", "lm_head", "shared_head", "eh_proj", "mlp.gate.", "norm", "bias")


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_projection_and_nothing_else(family: str) -> None:
    shapes = names_of(tiny_model(family)).hf_shapes
    for name, shape in shapes.items():
        assert is_quantized(name, shape) == (not any(part in name for part in KEPT)), name


def test_the_manifest_has_scales_beside_their_weights() -> None:
    weight, norm = "model.layers.3.self_attn.kv_a_proj_with_mqa.weight", "model.layers.3.input_layernorm.weight"
    sent = quantized([[TensorSpec(norm, (7168,), "bfloat16")], [TensorSpec(weight, (576, 7168), "bfloat16")]])
    assert sent == [
        [TensorSpec(norm, (7168,), "bfloat16")],
        [TensorSpec(weight, (576, 7168), "float8_e4m3fn"), TensorSpec(weight + "_scale_inv", (5, 56), "float32")],
    ]


@pytest.mark.parametrize("shape", [(128, 128), (129, 1), (300, 257)])
def test_shapes_are_the_kernels(shape: tuple[int, int]) -> None:
    assert BLOCK == KERNEL_BLOCK
    weights, scales = quantize(torch.ones(shape))
    assert tuple(weights.shape) == shape and tuple(scales.shape) == scale_shape(shape)
