"""Routing replay: routers take experts that were chosen before, by the engine (R3, arXiv 2510.11370) or by this policy when the
step began (R2, arXiv 2507.18071, section 5.3). Which experts a token goes to is then the same on both sides of the importance
ratio; how much each of them weighs stays this policy's own, with its gradient.

Each router of the decoder gets a `RouterReplay` of ours in the place that Megatron-Core keeps for one (moe/router.py:207). Its own
replays all rows or none, and tells microbatches apart by the order of calls alone; ours takes a record row by row, and looks at the
router's own choice as well: for rows without a record, and to count how often the two agree.

Invariants (tests/dist/test_routing_replay.py):
- a row with a record goes where the record says, in a recomputed forward pass as in the first; any other where its router says;
- a record holds whatever the layout: rows are followed to their CP rank and sequence-parallel share, layers to their stage;
- agreement is counted once for each row that is trained on, over all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.utils import unwrap_model

ReplayKind = Literal["off", "r2", "r3"]
ForwardPass = Literal["old", "new", "free"]  # of old log-probs, of the update, and any other: that one follows no record


class _Router(RouterReplay):
    """One router. `current`: the record of the microbatch that is computed now."""

    def __init__(self, layer: int, follows: bool, recomputed: bool) -> None:  # not one of Megatron's global instances
        self.layer, self._follows, self._recomputed = layer, follows, recomputed
        self.start()

    def start(self) -> None:
        self.current: torch.Tensor | None = None
        self.recording: dict[int, torch.Tensor] | None = None
        self.agreed: torch.Tensor | int = 0
        self.compared: torch.Tensor | int = 0
        self._again = deque[torch.Tensor | None]()  # of microbatches that the backward pass will compute again

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert default_compute_topk
        values_RK, own_RK = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        again = self._recomputed and torch.is_grad_enabled()  # the first pass of what is recomputed has no gradients
        record_RK = self._again.popleft() if again else self.current
        if self._recomputed and not again:
            self._again.append(record_RK)
        if self.recording is not None:
            self.recording[self.layer] = own_RK.to(torch.int16)
        if record_RK is None:
            return values_RK, own_RK
        record_RK = record_RK.long()
        known_R1 = record_RK[:, :1] >= 0
        if not again:
            self.agreed = self.agreed + ((record_RK[:, :, None] == own_RK[:, None, :]).any(-1) & known_R1).sum()
            self.compared = self.compared + known_R1.sum() * topk
        if not self._follows:
            return values_RK, own_RK
        chosen_RK = torch.where(known_R1, record_RK, own_RK)
        return scores.gather(1, chosen_RK), chosen_RK


class RoutingReplay:
    """All routers of this rank's chunks. With `off` they are compared with the engine's experts where these are at hand."""

    def __init__(
        self, chunks: Sequence[torch.nn.Module], kind: ReplayKind, moe_layers: int, first_dense: int, recomputed: bool
    ) -> None:
        self._kind, self._moe_layers, self._first_dense = kind, moe_layers, first_dense
        self._forward_pass: ForwardPass = "free"
        self._old: list[dict[int, torch.Tensor]] = []  # R2: of the last `old` pass, by microbatch
        self._routers: dict[int, list[_Router]] = {}  # by chunk
        for chunk in chunks:
            model: Any = unwrap_model(chunk)
            routers = self._routers[id(chunk)] = []
            for layer in model.decoder.layers:
                if (router := getattr(layer.mlp, "router", None)) is not None:
                    router.router_replay = _Router(layer.layer_number - 1 - first_dense, kind != "off", recomputed)
                    routers.append(router.router_replay)

    def start(self, forward_pass: ForwardPass, microbatches: int) -> None:
        self._forward_pass = forward_pass
        if self._kind == "r2" and forward_pass == "old":
            self._old = [{} for _ in range(microbatches)]
        for router in self._all:
            router.start()

    def enter(self, chunk: torch.nn.Module, microbatch: int, experts_LRK: torch.Tensor | None) -> None:
        """What `chunk` computes next. `experts_LRK`: the engine's for this rank's rows, over all MoE layers; -1 where unknown."""
        for router in self._routers[id(chunk)]:
            router.current = router.recording = None
            if self._forward_pass == "free":
                continue
            if self._kind != "r2":
                router.current = None if experts_LRK is None else experts_LRK[router.layer]
            elif self._forward_pass == "old":
                router.recording = self._old[microbatch]
            else:
                router.current = self._old[microbatch][router.layer]

    def agreement(self, device: torch.device) -> dict[str, float]:
        """*Collective* over all ranks: the share of the recorded choices that the routers would have made, too, since `start`; by
        the decoder's layer number, and their mean. Nothing where nothing is recorded."""
        counts = torch.zeros(2, self._moe_layers, dtype=torch.int64, device=device)
        for router in self._all:
            counts[:, router.layer] += torch.stack([torch.as_tensor(n, device=device) for n in (router.agreed, router.compared)])
        dist.all_reduce(counts)
        agreed, compared = counts.tolist()
        shares = {layer: a / c for layer, (a, c) in enumerate(zip(agreed, compared, strict=True)) if c}
        if not shares:
            return {}
        by_layer = {f"routing/agreement_layer_{layer + self._first_dense}": share for layer, share in shares.items()}
        return {"routing/agreement": sum(shares.values()) / len(shares)} | by_layer

    @property
    def _all(self) -> list[_Router]:
        return [router for routers in self._routers.values() for router in routers]
