"""Loss terms of the routers: their z-loss (ST-MoE, arXiv 2202.08906, eq. 5) and load balance (Switch, arXiv 2101.03961, eq. 4), as
Megatron-Core computes and differentiates them in its routers.

Megatron multiplies a microbatch's term by the rows of one of the router's ranks (moe/router.py:465, :497), since it divides all
gradients by the step's tokens in the end. Ours are divided by nothing; so the coefficients are, before each update, by the rows of
all microbatches and replicas. Rows of padding are rows here. A recomputed pass counts once; passes without gradients have no terms.

Invariants (tests/unit/test_policy_router_terms.py): what an update's loss gains is, summed over the MoE layers, `z_loss` times the
mean of logsumexp(logits)^2 over all rows of the step, and `load_balance` times the mean of experts * sum_i f_i P_i over its
microbatches, weighted by their rows; f and P are those of the logits alone, without expert bias, groups or replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.utils import unwrap_model


class RouterTerms:
    def __init__(self, chunks: Sequence[torch.nn.Module], z_loss: float, load_balance: float, moe_layers: int) -> None:
        self._z_loss, self._load_balance, self._moe_layers = z_loss, load_balance, moe_layers
        self._routers: list[Any] = []
        for chunk in chunks:
            model: Any = unwrap_model(chunk)
            self._routers += [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
        if load_balance:
            for router in self._routers:
                router.routing_type = "aux_loss"
        self._microbatches = 0

    def start(self, rows: Sequence[int], device: torch.device) -> None:
        """*Collective* over the replicas. `rows`: of this rank's microbatches, before sequence parallelism shares them."""
        self._microbatches = len(rows)
        total = torch.tensor(float(sum(rows)), dtype=torch.float64, device=device)
        dist.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
        share = mpu.get_tensor_and_context_parallel_group().size() / total.item()
        for router in self._routers:
            router.config.moe_z_loss_coeff = self._z_loss * share or None
            router.config.moe_aux_loss_coeff = self._load_balance * share
        get_moe_layer_wise_logging_tracker().clear()  # and not to 0: another policy of this process may have had fewer layers

    def metrics(self, device: torch.device) -> dict[str, float]:
        """*Collective* over all ranks: both terms without their coefficients, as means over layers, microbatches and replicas."""
        tracker, nothing = get_moe_layer_wise_logging_tracker(), {"values": torch.zeros((), device=device)}
        sums = torch.stack([tracker.get(name, nothing)["values"].sum() for name in ("z_loss", "load_balancing_loss")])
        sums /= self._microbatches * self._moe_layers
        dist.all_reduce(sums)
        ranks = mpu.get_tensor_and_context_parallel_group().size()  # each has a mean of the z-loss, and a share of the other
        z_loss, load_balance = (sums * mpu.get_pipeline_model_parallel_world_size() / dist.get_world_size()).tolist()
        found = {"router/z_loss": (self._z_loss, z_loss), "router/load_balance": (self._load_balance, load_balance * ranks)}
        return {name: value for name, (coefficient, value) in found.items() if coefficient}
