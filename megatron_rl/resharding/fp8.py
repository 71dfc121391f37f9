"""Which tensors of a push are sent in FP8, for engines that serve an FP8 checkpoint: as DeepSeek-V3 is published (arXiv 2412.19437,
section 3.3), projections in float8_e4m3fn with a float32 `<name>_scale_inv` per block of 128 x 128; embeddings, norms, routers,
biases, the output layer and a multi-token-prediction layer's `eh_proj` as they are.

Invariants: a tensor's form follows from its name and shape alone; a weight and its scales are neighbours in the same bucket.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_rl.types import Manifest, TensorSpec

BLOCK = 128
SCALE = "_scale_inv"
_PROJECTION = re.compile(
    r"\.layers\.\d+\..*\b(q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|query_key_value|dense"
    r"|gate_proj|up_proj|down_proj)\.weight$"
)


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and _PROJECTION.search(name) is not None


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in shape)


def quantized(manifest: Manifest) -> Manifest:
    """What is sent in its place."""
    return [[sent for spec in bucket for sent in _forms(spec)] for bucket in manifest]


def _forms(spec: TensorSpec) -> tuple[TensorSpec, ...]:
    if not is_quantized(spec.name, spec.shape):
        return (spec,)
    scales = TensorSpec(spec.name + SCALE, scale_shape(spec.shape), "float32")
    return TensorSpec(spec.name, spec.shape, "float8_e4m3fn"), scales
