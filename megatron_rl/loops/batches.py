"""From groups of scored rollouts, or from SFT examples, to this replica's packed microbatches.

Invariants (tests/unit/test_batches.py):
- the aggregation weights are fixed before packing, over all replicas: how sequences fall into microbatches never changes the loss;
- what leaves the update under zero_variance=mask leaves no divisor: the others weigh what they would weigh beside it;
- experts stay with the position that chose them, and supports with their token, whatever is cut from the end of a response;
- every replica gets the same number of microbatches, since expert- and pipeline-parallel ranks meet in each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch

from megatron_rl.algorithms.advantages import AdvantageMethod, step_advantages, teaches_nothing
from megatron_rl.algorithms.aggregation import AggregationMethod, token_weights
from megatron_rl.algorithms.batch import PackedBatch, Support
from megatron_rl.algorithms.kl import KlEstimator, kl_estimate
from megatron_rl.scheduler.packing import pack
from megatron_rl.types import Group, RoutingShape

NO_PENALTY: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class TrainSequence:
    """A prompt with its response, and one value per response token for every field the loss reads."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    fields: dict[str, torch.Tensor]  # name -> (len(response),)
    rollout_id: str = ""
    experts: bytes = b""  # rows of a RoutingShape, of the first so many positions
    support: tuple[bytes, ...] = ()  # of the first so many response tokens, as Rollout has it

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def usable_groups(groups: Sequence[Group], *, advantage: AdvantageMethod, zero_variance: str, exclude_failed: bool) -> list[Group]:
    """With `exclude_failed`, members without a judgement leave their group; with zero_variance="drop" or "resample", groups leave
    that teach nothing."""
    usable = []
    for group in groups:
        if exclude_failed:
            kept = [(r, s) for r, s in zip(group.rollouts, group.scores, strict=True) if s.is_judgement]
            if not kept:
                continue
            group = replace(group, rollouts=tuple(r for r, _ in kept), scores=tuple(s for _, s in kept))
        if zero_variance in ("keep", "mask") or not teaches_nothing(_rewards(group, NO_PENALTY), advantage):
            usable.append(group)
    return usable


def rollout_advantages(
    groups: Sequence[Group], method: AdvantageMethod, penalties: Mapping[str, float] = NO_PENALTY
) -> dict[str, float]:
    """By rollout id; `penalties`, by rollout id too, are subtracted from the rewards first."""
    values: dict[str, float] = {}
    per_group = step_advantages([_rewards(group, penalties) for group in groups], method)
    for group, advantages_G in zip(groups, per_group, strict=True):
        values |= zip((rollout.id for rollout in group.rollouts), advantages_G.tolist(), strict=False)
    return values


def _rewards(group: Group, penalties: Mapping[str, float]) -> torch.Tensor:
    own = [reward - penalties.get(rollout.id, 0.0) for rollout, reward in zip(group.rollouts, group.rewards, strict=True)]
    return torch.tensor([*own, *group.earlier_rewards], dtype=torch.float32)


def rl_sequences(
    groups: Sequence[Group],
    version: int,
    *,
    advantage: AdvantageMethod,
    aggregation: AggregationMethod,
    train_token_budget: int | None = None,
    loss_constant: int | None = None,
    zero_variance: str = "keep",
    recorded: RoutingShape | None = None,
) -> list[TrainSequence]:
    """Advantages over whole groups first, then the budget's truncation (C3PO, arXiv 2506.14731, section 3.2). `version` is that of
    the weights under training. With zero_variance="mask", groups that teach nothing count in every divisor and have no sequence:
    neither policy gradient nor KL nor entropy, and no forward pass. With `recorded`, tokens whose log-prob comes from a position
    without recorded experts weigh nothing."""
    rollouts = [(rollout, index) for index, group in enumerate(groups) for rollout in group.rollouts]
    if not rollouts:
        return []
    lengths, group_of = [len(rollout.tokens) for rollout, _ in rollouts], [index for _, index in rollouts]
    weights = token_weights(lengths, group_of, aggregation, train_token_budget, loss_constant)
    advantages = rollout_advantages(groups, advantage)
    masked = {i for i, g in enumerate(groups) if zero_variance == "mask" and teaches_nothing(_rewards(g, NO_PENALTY), advantage)}
    sequences = []
    for (rollout, index), weight, kept in zip(rollouts, weights.weights, weights.keep_lengths, strict=True):
        if kept == 0 or index in masked:
            continue
        fields = {
            "advantages": torch.full((kept,), advantages[rollout.id]),
            "engine_logprobs": torch.tensor(rollout.engine_logprobs[:kept]),
            "age": torch.tensor([float(version - v) for v in rollout.versions[:kept]]),
            "weight": torch.full((kept,), weight),
        }
        prompt = rollout.prompt.tokens
        if recorded:
            fields["weight"][max(0, len(rollout.experts) // recorded.row_bytes + 1 - len(prompt)) :] = 0.0
        sequences.append(TrainSequence(prompt, rollout.tokens[:kept], fields, rollout.id, rollout.experts, rollout.support[:kept]))
    return sequences


def recorded_fraction(sequences: Sequence[TrainSequence], routing: RoutingShape) -> float:
    """The share of response tokens whose log-prob comes from a position with recorded experts."""
    rows = [len(sequence.experts) // routing.row_bytes + 1 - len(sequence.prompt) for sequence in sequences]
    known = sum(min(max(0, n), len(sequence.response)) for n, sequence in zip(rows, sequences, strict=True))
    return known / sum(len(sequence.response) for sequence in sequences)


def sequence_kl(
    share: Sequence[PackedBatch], places: Sequence[Sequence[int]], estimator: KlEstimator, sequences: int
) -> torch.Tensor:
    """KL(old || ref) of each of the step's `sequences`, summed over its response tokens; 0 for those of other replicas."""
    sums = torch.zeros(sequences, device=share[0].tokens_T.device)
    for batch, indices in zip(share, places, strict=True):
        kl_T = kl_estimate(estimator, batch.fields["old_logprobs"], batch.fields["ref_logprobs"])
        sums_S = batch.segment_sums(torch.where(batch.loss_mask_T > 0, kl_T, 0.0))
        sums[list(indices)] = sums_S[: len(indices)]  # a filler is at no place
    return sums


def replace_advantages(share: Sequence[PackedBatch], places: Sequence[Sequence[int]], advantages: Sequence[float]) -> None:
    """`advantages` of each of the step's sequences, into the microbatches that hold them."""
    for batch, indices in zip(share, places, strict=True):
        values_S = torch.tensor([advantages[index] for index in indices] or [0.0], device=batch.tokens_T.device)
        batch.fields["advantages"] = values_S[batch.segment_ids_T]


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


def places(sequences: Sequence[TrainSequence], *, capacity: int, replicas: int, replica: int) -> list[list[int]]:
    """Which sequences each of this replica's microbatches holds. `sequences` must be the same list on every rank and not empty."""
    return pack([len(sequence) for sequence in sequences], capacity, replicas)[replica]


def microbatches(
    sequences: Sequence[TrainSequence],
    *,
    capacity: int,
    replicas: int,
    replica: int,
    device: torch.device,
    routing: RoutingShape | None = None,
) -> list[PackedBatch]:
    """This replica's share, as `places` says; with `routing`, and the sequences' experts in that form."""
    filler = TrainSequence((0,), (0,), {name: torch.zeros(1) for name in sequences[0].fields})
    batches = []
    for indices in places(sequences, capacity=capacity, replicas=replicas, replica=replica):
        members = [sequences[i] for i in indices]
        batch = _packed(members, mask=1.0, device=device) if members else _packed([filler], mask=0.0, device=device)
        if routing:
            batch = replace(batch, experts_TLK=_experts(members or [filler], routing).to(device))
        batches.append(batch)
    return batches


def _experts(members: Sequence[TrainSequence], routing: RoutingShape) -> torch.Tensor:
    experts_TLK = torch.full((sum(map(len, members)), routing.moe_layers, routing.top_k), -1, dtype=torch.int16)
    start = 0
    for member in members:
        rows = len(member.experts) // routing.row_bytes
        if rows:
            dtype = torch.uint8 if routing.itemsize == 1 else torch.int16
            numbers = torch.frombuffer(bytearray(member.experts), dtype=dtype).view(rows, routing.moe_layers, routing.top_k)
            kept = min(rows, len(member))
            experts_TLK[start : start + kept] = numbers[:kept]
        start += len(member)
    return experts_TLK


def _support(members: Sequence[TrainSequence]) -> Support | None:
    ids_of_tokens: list[bytes] = []
    for member in members:
        unknown = len(member.response) - len(member.support)
        ids_of_tokens += [b""] * len(member.prompt) + list(member.support) + [b""] * unknown
    joined = bytearray().join(ids_of_tokens)
    if not joined:
        return None
    sizes_T = torch.tensor([len(ids) for ids in ids_of_tokens]) // 4
    return Support(torch.frombuffer(joined, dtype=torch.int32).long(), torch.arange(len(sizes_T)).repeat_interleave(sizes_T))


def _packed(members: Sequence[TrainSequence], mask: float, device: torch.device) -> PackedBatch:
    lengths = torch.tensor([0, *(len(member) for member in members)])
    total = int(lengths.sum())
    response_at = torch.cat(
        [torch.arange(end - len(m.response), end) for m, end in zip(members, lengths.cumsum(0)[1:].tolist(), strict=True)]
    )

    support = _support(members)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(total).index_copy_(0, response_at, values).to(device)

    return PackedBatch(
        tokens_T=torch.tensor([token for m in members for token in (*m.prompt, *m.response)], device=device),
        cu_seqlens=lengths.cumsum(0).to(device=device, dtype=torch.int32),
        loss_mask_T=spread(torch.full((len(response_at),), mask)),
        fields={name: spread(torch.cat([m.fields[name] for m in members])) for name in members[0].fields},
        support=support and support.to(device),
    )
