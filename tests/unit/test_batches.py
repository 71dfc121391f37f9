"""Groups of rollouts to packed microbatches: what lands where, and that nothing depends on the split."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.loops.batches import (
    microbatches,
    places,
    recorded_fraction,
    replace_advantages,
    rl_sequences,
    rollout_advantages,
    sequence_kl,
    sft_sequences,
    usable_groups,
)
from megatron_rl.types import Group, Prompt, Rollout, RoutingShape, Score

CPU = torch.device("cpu")


def group(name: str, rewards: list[float], lengths: list[int], statuses: list[str] | None = None) -> Group:
    prompt = Prompt(name, name, (7, 8), "a", "exact")
    rollouts = tuple(
        Rollout(f"0:{name}#{i}", prompt, i, tuple(range(10, 10 + n)), tuple(-0.1 * t for t in range(n)), (0,) * n, "stop")
        for i, n in enumerate(lengths)
    )
    statuses = statuses or ["correct" if r else "wrong" for r in rewards]
    return Group(f"0:{name}", prompt, rollouts, tuple(Score(r, s) for r, s in zip(rewards, statuses, strict=True)))  # type: ignore[arg-type]


def test_groups_without_variance_are_left_out_only_when_dropped() -> None:
    groups = [group("even", [1, 1], [2, 2]), group("mixed", [1, 0], [2, 2])]
    assert [g.id for g in usable_groups(groups, advantage="grpo", zero_variance="drop", exclude_failed=True)] == ["0:mixed"]
    assert len(usable_groups(groups, advantage="grpo", zero_variance="keep", exclude_failed=True)) == 2


def test_only_what_teaches_nothing_under_the_method_is_dropped() -> None:
    groups = [group("right", [1, 1], [2, 2]), group("wrong", [0, 0], [2, 2]), group("mixed", [1, 0], [2, 2])]

    def left(advantage: str, zero_variance: str) -> list[str]:
        kept = usable_groups(groups, advantage=advantage, zero_variance=zero_variance, exclude_failed=True)  # type: ignore[arg-type]
        return [g.prompt.id for g in kept]

    assert left("grpo", "drop") == left("reinforce_pp_baseline", "resample") == ["mixed"]
    assert left("reinforce", "drop") == ["right", "mixed"]
    assert left("reinforce_pp", "drop") == left("grpo", "mask") == left("grpo", "keep") == ["right", "wrong", "mixed"]


def test_masked_groups_stay_in_every_divisor() -> None:
    groups = [group("even", [1, 1], [2, 2]), group("mixed", [1, 0], [2, 3])]
    for aggregation, budget in (("sequence", None), ("token", None), ("token_budget", 8), ("constant", None)):

        def sequences(zero_variance: str, aggregation=aggregation, budget=budget):  # type: ignore[no-untyped-def]
            settings = {"aggregation": aggregation, "train_token_budget": budget, "loss_constant": 16}
            return rl_sequences(groups, 0, advantage="grpo", zero_variance=zero_variance, **settings)

        masked, kept = sequences("mask"), sequences("keep")
        assert [s.rollout_id for s in masked] == ["0:mixed#0", "0:mixed#1"]
        for one, other in zip(masked, kept[2:], strict=True):
            assert one.fields["weight"].equal(other.fields["weight"]) and one.response == other.response
    assert not any(s.fields["advantages"].any() for s in kept[:2])


def test_members_without_a_judgement_leave_the_group() -> None:
    one = group("a", [1, 0, 0], [2, 3, 4], ["correct", "timeout", "wrong"])
    (left,) = usable_groups([one], advantage="grpo", zero_variance="drop", exclude_failed=True)
    assert [r.sample for r in left.rollouts] == [0, 2]
    assert usable_groups([group("b", [0], [2], ["error"])], advantage="grpo", zero_variance="keep", exclude_failed=True) == []


def test_every_field_belongs_to_its_response_token() -> None:
    sequences = rl_sequences([group("a", [1, 0], [2, 3])], 0, advantage="dr_grpo", aggregation="sequence", train_token_budget=None)
    (batch,) = microbatches(sequences, capacity=100, replicas=1, replica=0, device=CPU)
    first = batch.tokens_T.tolist().index(7)
    starts = batch.cu_seqlens.tolist()
    assert first == 0
    for begin, end in pairwise(starts):
        n = end - begin - 2
        assert batch.tokens_T[begin:end].tolist() == [7, 8, *range(10, 10 + n)]
        assert batch.loss_mask_T[begin:end].tolist() == [0, 0] + [1] * n
        assert batch.fields["engine_logprobs"][begin + 2 : end].tolist() == pytest.approx([-0.1 * t for t in range(n)])
        assert batch.fields["advantages"][begin:end].tolist() == [0, 0] + [0.5 if n == 2 else -0.5] * n
        assert batch.fields["weight"][begin:end].tolist() == pytest.approx([0, 0] + [1 / (1 * 2 * n)] * n)


def test_age_counts_versions_since_the_token_was_sampled() -> None:
    one = group("a", [1, 0], [3, 2])
    carried = replace(one, rollouts=(replace(one.rollouts[0], versions=(4, 5, 7)), replace(one.rollouts[1], versions=(7, 7))))
    first, second = rl_sequences([carried], 7, advantage="grpo", aggregation="token")
    assert first.fields["age"].tolist() == [3.0, 2.0, 0.0] and second.fields["age"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_kl_in_the_reward(replicas: int) -> None:
    """Summed over replicas, each sequence's KL is its own whatever the split, and enters the reward before the advantage."""
    groups = [group(f"g{i}", [1, 0], [1 + i, 4 - i]) for i in range(3)]
    sequences = rl_sequences(groups, 0, advantage="dr_grpo", aggregation="token")
    splits = [{"capacity": 12, "replicas": replicas, "replica": r} for r in range(replicas)]
    shares = [microbatches(sequences, **split, device=CPU) for split in splits]
    for batch in (batch for share in shares for batch in share):  # old - ref = 0.5 on responses, garbage on prompts
        garbage_T = torch.where(batch.loss_mask_T > 0, 0.0, torch.nan)
        batch.fields.update(old_logprobs=garbage_T - 1.0, ref_logprobs=garbage_T - 1.5)
    wheres = [places(sequences, **split) for split in splits]
    kl = sum(sequence_kl(share, where, "k1", 6) for share, where in zip(shares, wheres, strict=True))
    assert isinstance(kl, torch.Tensor) and kl.tolist() == pytest.approx([0.5 * len(s.response) for s in sequences])

    penalties = {s.rollout_id: 0.1 * value for s, value in zip(sequences, kl.tolist(), strict=True)}
    advantages = rollout_advantages(groups, "dr_grpo", penalties)
    # g0: lengths 1 and 4, rewards 1 - 0.05 and 0 - 0.2: half of their distance 1.15.
    assert (advantages["0:g0#0"], advantages["0:g0#1"]) == pytest.approx((0.575, -0.575))
    for share, where in zip(shares, wheres, strict=True):
        replace_advantages(share, where, [advantages[s.rollout_id] for s in sequences])
        for batch, indices in zip(share, where, strict=True):
            for index, (begin, end) in zip(indices, pairwise(batch.cu_seqlens.tolist()), strict=False):
                expected = advantages[sequences[index].rollout_id]
                assert batch.fields["advantages"][begin:end].tolist() == pytest.approx([expected] * (end - begin))


def with_experts(original: Group, shape: RoutingShape, rows: list[int]) -> Group:
    """Of so many positions of each member: the numbers count on from 0 through a sequence."""
    numbers = [range(n * shape.row_bytes // shape.itemsize) for n in rows]
    experts = [b"".join((number % shape.experts).to_bytes(shape.itemsize, "little") for number in each) for each in numbers]
    return replace(original, rollouts=tuple(replace(r, experts=e) for r, e in zip(original.rollouts, experts, strict=True)))


@pytest.mark.parametrize("experts", [200, 300])
def test_experts_stay_with_the_position_that_chose_them(experts: int) -> None:
    shape = RoutingShape(layers=3, first_dense=1, top_k=2, experts=experts)
    recorded = with_experts(group("g", [1, 0], [3, 2]), shape, rows=[4, 0])  # prompts of 2: the last token chose nothing
    sequences = rl_sequences([recorded], 0, advantage="grpo", aggregation="token_budget", train_token_budget=4)
    (batch,) = microbatches(sequences, capacity=64, replicas=1, replica=0, device=CPU, routing=shape)
    assert batch.experts_TLK is not None and batch.experts_TLK.shape == (len(batch.tokens_T), 2, 2)
    of_first = batch.segment_ids_T == int(len(sequences[0]) != batch.cu_seqlens[1])
    assert batch.experts_TLK[of_first][:4].flatten().tolist() == list(range(16))
    assert (batch.experts_TLK[of_first][4:] == -1).all() and (batch.experts_TLK[~of_first] == -1).all()


def test_experts_of_tokens_that_the_budget_cut_are_cut() -> None:
    shape = RoutingShape(layers=1, first_dense=0, top_k=1, experts=200)
    sequences = rl_sequences(
        [with_experts(group("g", [1, 0], [3, 9]), shape, rows=[4, 10])],
        0,
        advantage="grpo",
        aggregation="token_budget",
        train_token_budget=5,
    )
    assert [len(sequence.response) for sequence in sequences] == [3, 2]
    for sequence in sequences:
        (batch,) = microbatches([sequence], capacity=64, replicas=1, replica=0, device=CPU, routing=shape)
        assert batch.experts_TLK is not None
        assert batch.experts_TLK.flatten().tolist() == list(range(4)) + ([-1] if len(sequence.response) == 3 else [])


def test_tokens_that_no_recorded_position_predicts_weigh_nothing_if_so_wanted() -> None:
    shape = RoutingShape(layers=1, first_dense=0, top_k=1, experts=200)
    recorded = with_experts(group("g", [1, 0, 0], [3, 3, 3]), shape, rows=[4, 2, 0])
    weights = [
        [
            sequence.fields["weight"].bool().tolist()
            for sequence in rl_sequences([recorded], 0, advantage="grpo", aggregation="token", recorded=r)
        ]
        for r in (None, shape)
    ]
    assert recorded_fraction(rl_sequences([recorded], 0, advantage="grpo", aggregation="token"), shape) == 4 / 9
    assert weights == [[[True] * 3] * 3, [[True] * 3, [True, False, False], [False] * 3]]


def supports_in(batch: PackedBatch) -> list[list[int]]:
    """Of every token."""
    if batch.support is None:
        return [[] for _ in batch.tokens_T]
    return [batch.support.ids_K[batch.support.tokens_K == token].tolist() for token in range(len(batch.tokens_T))]


@given(data=st.data())
def test_supports_stay_with_their_token_however_they_are_packed_and_cut(data: st.DataObject) -> None:
    """Of the first so many tokens of a response, some of them empty."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    ids = st.lists(st.integers(0, 200_000), max_size=3).map(lambda ids: array("i", ids).tobytes())
    one = group("g", [float(i % 2) for i in range(len(lengths))], lengths)
    rollouts = tuple(replace(r, support=tuple(data.draw(st.lists(ids, max_size=len(r.tokens))))) for r in one.rollouts)
    budget = data.draw(st.integers(1, sum(lengths)))
    sequences = rl_sequences(
        [replace(one, rollouts=rollouts)], 0, advantage="reinforce", aggregation="token_budget", train_token_budget=budget
    )
    replicas, capacity = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    support_of = {rollout.id: [list(array("i", ids)) for ids in rollout.support] for rollout in rollouts}
    for replica in range(replicas):
        split = {"capacity": capacity, "replicas": replicas, "replica": replica}
        batches = microbatches(sequences, **split, device=CPU)
        for batch, indices in zip(batches, places(sequences, **split), strict=True):
            expected: list[list[int]] = []
            for sequence in (sequences[i] for i in indices):
                known = support_of[sequence.rollout_id][: len(sequence.response)]
                expected += [[]] * len(sequence.prompt) + known + [[]] * (len(sequence.response) - len(known))
            assert supports_in(batch) == (expected or [[], []]), "a filler has none"
            assert (batch.support is None) == (not any(expected))


def test_a_token_budget_cuts_after_the_advantages() -> None:
    sequences = rl_sequences([group("a", [1, 0], [2, 3])], 0, advantage="dr_grpo", aggregation="token_budget", train_token_budget=4)
    assert [len(s.response) for s in sequences] == [2, 2]
    assert [s.fields["advantages"][0].item() for s in sequences] == [0.5, -0.5]
    assert all(s.fields["weight"].tolist() == [0.25, 0.25] for s in sequences)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("capacity", [8, 20, 1000])
def test_all_replicas_together_hold_every_token_once(replicas: int, capacity: int) -> None:
    groups = [group(f"g{i}", [1, 0], [1 + i, 9 - i]) for i in range(5)]
    sequences = rl_sequences(groups, 0, advantage="grpo", aggregation="token", train_token_budget=None)
    shares = [microbatches(sequences, capacity=capacity, replicas=replicas, replica=r, device=CPU) for r in range(replicas)]
    assert len({len(share) for share in shares}) == 1
    masked = sum(int(batch.loss_mask_T.sum()) for share in shares for batch in share)
    weight = sum(float(batch.fields["weight"].sum()) for share in shares for batch in share)
    assert masked == sum(len(s.response) for s in sequences)
    assert weight == pytest.approx(1.0)


def test_fewer_sequences_than_replicas_are_filled_up_with_masked_ones() -> None:
    sequences = rl_sequences([group("a", [1], [3])], 0, advantage="reinforce", aggregation="token", train_token_budget=None)
    shares = [microbatches(sequences, capacity=100, replicas=2, replica=r, device=CPU) for r in range(2)]
    assert sorted(int(share[0].loss_mask_T.sum()) for share in shares) == [0, 3]


def test_sft_weighs_every_response_token_the_same() -> None:
    class Example:
        prompt_tokens, response_tokens = (1,), (2, 3, 4)

    sequences = sft_sequences([Example(), Example()])
    assert all(s.fields["weight"].tolist() == pytest.approx([1 / 6] * 3) for s in sequences)
