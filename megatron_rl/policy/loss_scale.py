"""The loss scale of fp16 training (arXiv 1710.03740): gradients are computed scaled, and unscaled in fp32 before they are clipped.

Megatron-Core gives each part of an optimizer a scale of its own, and scales the loss by that of the first
(optimizer/__init__.py:436, `ChainedOptimizer.get_loss_scale`). Under EP the experts are a part: once one part alone overflows,
gradients of the other would be unscaled by another number than they were scaled by. Here all parts have this one.

Invariants: one scale for all parameters on all ranks; an update with a gradient norm that is not finite halves it, and `window`
others in a row double it; a restored run goes on with the scale and its count.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler


class LossScale(DynamicGradScaler):
    def __init__(self, initial: float, window: int) -> None:
        super().__init__(
            initial_scale=initial, min_scale=1.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=window, hysteresis=1
        )

    def update(self, found_inf: bool) -> None:
        """Each part calls this with what it saw of its own gradients; `after` is told what all of them saw."""

    def after(self, overflow: bool) -> None:
        super().update(overflow)

    def state_dict(self) -> dict[str, Any]:
        return {name: value.item() if torch.is_tensor(value) else value for name, value in super().state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"scale": torch.tensor([state_dict["scale"]], dtype=torch.float)})
