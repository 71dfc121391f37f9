"""What a server reports as routed experts, as rows of a `types.RoutingShape`."""

from __future__ import annotations

import numpy as np
import pybase64  # as SGLang does: a long response has a hundred megabytes

from megatron_rl.types import RoutingShape


def expert_rows(reported: str, shape: RoutingShape, positions: int) -> bytes:
    """`reported`: base64 of int32 (positions, layers, top_k), dense layers included (SGLang, srt/state_capturer/base.py:175).
    Raises ValueError for what cannot be."""
    numbers = np.frombuffer(pybase64.b64decode(reported, validate=True), dtype=np.int32)
    expected = (positions, shape.layers, shape.top_k)
    if numbers.size != np.prod(expected):
        raise ValueError(f"{numbers.size} routed experts where (positions, layers, top_k) = {expected} were expected")
    rows = numbers.reshape(expected)[:, shape.first_dense :]
    if rows.size and not 0 <= rows.min() <= rows.max() < shape.experts:
        raise ValueError(f"routed experts from {rows.min()} to {rows.max()}, of {shape.experts}")
    if shape.top_k > 1 and (rows[..., 0] == rows[..., 1]).any():  # as where nothing was written
        raise ValueError("a position that was routed to an expert twice: does this engine record the routers of this model?")
    return rows.astype(f"<u{shape.itemsize}").tobytes()
