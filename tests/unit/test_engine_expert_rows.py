from __future__ import annotations

import base64

import numpy as np
import pytest

from megatron_rl.engine.expert_rows import expert_rows
from megatron_rl.types import RoutingShape

SHAPE = RoutingShape(layers=3, first_dense=1, top_k=2, experts=8)


def reported(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.astype(np.int32).tobytes()).decode()


@pytest.mark.parametrize("experts", [8, 256, 257])
def test_rows_leave_dense_layers_out(experts: int) -> None:
    shape = RoutingShape(3, 1, 2, experts)
    numbers = np.random.default_rng(0).random((7, 3, experts)).argsort(-1)[..., :2]
    rows = expert_rows(reported(numbers), shape, positions=7)
    assert len(rows) == 7 * shape.row_bytes and shape.itemsize == (1 if experts <= 256 else 2)
    assert (np.frombuffer(rows, f"<u{shape.itemsize}").reshape(7, 2, 2) == numbers[:, 1:]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (reported(np.zeros((4, 3, 2))), r"24 routed experts where \(positions, layers, top_k\) = \(5, 3, 2\)"),
        (reported(np.full((5, 3, 2), 8)), "routed experts from 8 to 8, of 8"),
        (reported(np.full((5, 3, 2), -1)), "routed experts from -1 to -1, of 8"),
        (reported(np.zeros((5, 3, 2))), "routed to an expert twice: does this engine record the routers of this model"),
        ("not base64", "base64|alphabet|character|padding"),
    ],
)
def test_what_cannot_be_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_rows(text, SHAPE, positions=5)
