"""From groups of scored rollouts, or from SFT examples, to this replica's packed microbatches.

Invariants:
- the aggregation weights are fixed before packing, over all replicas: how sequences fall into microbatches never changes the loss;
- every replica gets the same number of microbatches, since expert- and pipeline-parallel ranks meet in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megatron_rl.algorithms.advantages import AdvantageMethod, group_advantages
from megatron_rl.algorithms.aggregation import AggregationMethod, token_weights
from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.scheduler.packing import pack
from megatron_rl.types import Group


@dataclass(frozen=True)
class TrainSequence:
    """A prompt with its response, and one value per response token for every field the loss reads."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    fields: dict[str, torch.Tensor]  # name -> (len(response),)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def usable_groups(groups: Sequence[Group], *, advantage: AdvantageMethod, zero_variance: str, exclude_failed: bool) -> list[Group]:
    """With `exclude_failed`, members without a judgement leave their group; with zero_variance="drop", groups leave whose
    advantages are all zero: they carry no gradient."""
    usable = []
    for group in groups:
        if exclude_failed:
            kept = [(r, s) for r, s in zip(group.rollouts, group.scores, strict=True) if s.is_judgement]
            if not kept:
                continue
            group = replace(group, rollouts=tuple(r for r, _ in kept), scores=tuple(s for _, s in kept))
        if zero_variance == "keep" or any(advantages(group, advantage)):
            usable.append(group)
    return usable


def advantages(group: Group, method: AdvantageMethod) -> list[float]:
    rewards_G = torch.tensor((*group.rewards, *group.earlier_rewards), dtype=torch.float32)
    values: list[float] = group_advantages(rewards_G, method)[: len(group.rewards)].tolist()
    return values


def rl_sequences(
    groups: Sequence[Group],
    version: int,
    *,
    advantage: AdvantageMethod,
    aggregation: AggregationMethod,
    train_token_budget: int | None,
) -> list[TrainSequence]:
    """Advantages over whole groups first, then the budget's truncation (C3PO, arXiv 2506.14731, section 3.2). `version` is that of
    the weights under training."""
    rollouts = [(rollout, index) for index, group in enumerate(groups) for rollout in group.rollouts]
    if not rollouts:
        return []
    values = [value for group in groups for value in advantages(group, advantage)]
    lengths, group_of = [len(rollout.tokens) for rollout, _ in rollouts], [index for _, index in rollouts]
    weights = token_weights(lengths, group_of, method=aggregation, budget=train_token_budget)
    sequences = []
    for (rollout, _), value, weight, kept in zip(rollouts, values, weights.weights, weights.keep_lengths, strict=True):
        if kept == 0:
            continue
        fields = {
            "advantages": torch.full((kept,), value),
            "engine_logprobs": torch.tensor(rollout.engine_logprobs[:kept]),
            "fresh": torch.tensor([float(v == version) for v in rollout.versions[:kept]]),
            "weight": torch.full((kept,), weight),
        }
        sequences.append(TrainSequence(rollout.prompt.tokens, rollout.tokens[:kept], fields))
    return sequences


class Example(Protocol):
    @property
    def prompt_tokens(self) -> tuple[int, ...]: ...

    @property
    def response_tokens(self) -> tuple[int, ...]: ...


def sft_sequences(examples: Sequence[Example]) -> list[TrainSequence]:
    """Every response token of the batch weighs the same."""
    share = 1.0 / sum(len(example.response_tokens) for example in examples)
    weights = [torch.full((len(example.response_tokens),), share) for example in examples]
    return [TrainSequence(e.prompt_tokens, e.response_tokens, {"weight": w}) for e, w in zip(examples, weights, strict=True)]


def microbatches(
    sequences: Sequence[TrainSequence], *, capacity: int, replicas: int, replica: int, device: torch.device
) -> list[PackedBatch]:
    """This replica's share. `sequences` must be the same list on every rank and not empty."""
    shares = pack([len(sequence) for sequence in sequences], capacity, replicas)
    names = tuple(sequences[0].fields)
    filler = TrainSequence((0,), (0,), {name: torch.zeros(1) for name in names})
    batches = []
    for indices in shares[replica]:
        members = [sequences[i] for i in indices]
        batches.append(_packed(members, mask=1.0, device=device) if members else _packed([filler], mask=0.0, device=device))
    return batches


def _packed(members: Sequence[TrainSequence], mask: float, device: torch.device) -> PackedBatch:
    lengths = torch.tensor([0, *(len(member) for member in members)])
    total = int(lengths.sum())
    response_at = torch.cat(
        [torch.arange(end - len(m.response), end) for m, end in zip(members, lengths.cumsum(0)[1:].tolist(), strict=True)]
    )

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(total).index_copy_(0, response_at, values).to(device)

    return PackedBatch(
        tokens_T=torch.tensor([token for m in members for token in (*m.prompt, *m.response)], device=device),
        cu_seqlens=lengths.cumsum(0).to(device=device, dtype=torch.int32),
        loss_mask_T=spread(torch.full((len(response_at),), mask)),
        fields={name: spread(torch.cat([m.fields[name] for m in members])) for name in members[0].fields},
    )
