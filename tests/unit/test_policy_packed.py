"""What a rank computes of a packed batch, and the way back, at every CP and TP."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch

from megatron_rl.algorithms.batch import LossOutput, PackedBatch, Support
from megatron_rl.algorithms.correction import Correction
from megatron_rl.algorithms.loss import policy_loss
from megatron_rl.algorithms.surrogates import Surrogate, SurrogateKind
from megatron_rl.policy.packed import RankInputs, rank_inputs

LAYOUTS = [(tp, cp) for tp in (1, 2, 3, 4) for cp in (1, 2, 3)]


def packed(lengths: list[int]) -> PackedBatch:
    """Tokens 1, 2, 3 ...: 0 is padding."""
    total = sum(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    tokens_T = torch.arange(1, total + 1)
    return PackedBatch(tokens_T, ends.to(torch.int32), torch.ones(total), {"value": tokens_T * 10.0})


def ranks_of(batch: PackedBatch, tp: int, cp: int) -> list[RankInputs]:
    return [rank_inputs(batch, tp=tp, cp=cp, cp_rank=rank) for rank in range(cp)]


def test_without_cp_the_rows_are_the_batch() -> None:
    batch = packed([3, 1, 2])
    inputs = rank_inputs(batch, tp=1, cp=1, cp_rank=0)
    assert inputs.input_ids_R.tolist() == [1, 2, 3, 4, 5, 6]
    assert inputs.successors_R.tolist() == [2, 3, 0, 0, 6, 0]
    assert inputs.segments.positions_R.tolist() == [0, 1, 2, 0, 0, 1]
    assert inputs.batch is batch
    assert inputs.tokens_of_rows(torch.tensor([0.2, 0.3, 9.0, 9.0, 0.6, 9.0])).tolist() == pytest.approx([0, 0.2, 0.3, 0, 0, 0.6])


def test_zig_zag_by_hand() -> None:
    """A segment of 6 over 2 ranks: 8 positions in 4 chunks of 2; rank 0 has chunks 0 and 3, rank 1 chunks 1 and 2."""
    first, second = ranks_of(packed([6]), tp=1, cp=2)
    assert first.input_ids_R.tolist() == [1, 2, 0, 0]
    assert second.input_ids_R.tolist() == [3, 4, 5, 6]
    assert first.segments.positions_R.tolist() == [0, 1, 6, 7]
    assert second.segments.positions_R.tolist() == [2, 3, 4, 5]
    assert first.batch.tokens_T.tolist() == [1, 2, 3]
    assert second.batch.tokens_T.tolist() == [4, 5, 6]
    assert first.segments.gathered_P.tolist() == [0, 1, 4, 5, 6, 7, 2, 3]


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_every_token_belongs_to_one_rank_and_keeps_its_fields(tp: int, cp: int) -> None:
    batch = packed([5, 1, 12, 2, 7])
    ranks = ranks_of(batch, tp, cp)
    assert sorted(token for inputs in ranks for token in inputs.batch.tokens_T.tolist()) == batch.tokens_T.tolist()
    for inputs in ranks:
        assert inputs.batch.tokens_T.equal(batch.tokens_T[inputs.tokens_N])
        assert inputs.batch.fields["value"].equal(inputs.batch.tokens_T * 10.0)
        assert inputs.batch.cu_seqlens[-1] == len(inputs.tokens_N)
        assert inputs.batch.segment_ids_T.equal(batch.segment_ids_T[inputs.tokens_N])


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_what_a_row_says_arrives_at_the_token_it_predicts(tp: int, cp: int) -> None:
    batch = packed([5, 1, 12, 2, 7])
    firsts = set(batch.tokens_T[batch.cu_seqlens[:-1].long()].tolist())
    for inputs in ranks_of(batch, tp, cp):
        said_N = inputs.tokens_of_rows(inputs.successors_R.float())
        expected = [0.0 if token in firsts else float(token) for token in inputs.batch.tokens_T.tolist()]
        assert said_N.tolist() == expected


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_a_support_lies_at_the_row_that_predicts_its_token_and_on_one_rank(tp: int, cp: int) -> None:
    """Token n has the ids n, n + 100, ..., one more than n % 3; the first of a segment and every fourth have none."""
    batch = packed([5, 1, 12, 2, 7])
    firsts = set(batch.tokens_T[batch.cu_seqlens[:-1].long()].tolist())
    sizes = [0 if token in firsts or token % 4 == 0 else 1 + token % 3 for token in batch.tokens_T.tolist()]
    tokens_K = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    ids_K = torch.tensor([token + 100 * i for token, size in zip(batch.tokens_T.tolist(), sizes, strict=True) for i in range(size)])
    ranks = ranks_of(replace(batch, support=Support(ids_K, tokens_K)), tp, cp)
    found = []
    for inputs in ranks:
        assert inputs.support is not None
        assert inputs.successors_R[inputs.support.rows_K].equal(inputs.support.ids_K % 100), "all at the row of their token"
        found += inputs.support.ids_K.tolist()
    assert sorted(found) == sorted(ids_K.tolist())
    assert all(inputs.support is None for inputs in ranks_of(batch, tp, cp))


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_rows_divide_by_tp_and_are_equal_on_all_cp_ranks(tp: int, cp: int) -> None:
    for lengths in ([1], [5, 1, 12], [3, 3, 3, 4]):
        rows = {len(inputs.input_ids_R) for inputs in ranks_of(packed(lengths), tp, cp)}
        assert len(rows) == 1 and rows.pop() % tp == 0


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_gathered_rows_are_the_segments(tp: int, cp: int) -> None:
    ranks = ranks_of(packed([5, 1, 12]), tp, cp)
    positions = torch.cat([inputs.segments.positions_R for inputs in ranks])[ranks[0].segments.gathered_P]
    assert positions.tolist() == [position for length in ranks[0].segments.lengths_S.tolist() for position in range(length)]


class Threads:
    """Ranks that are threads: `sum_of(rank)` is that rank's call of a sum over all."""

    def __init__(self, count: int) -> None:
        self.barrier, self.parts = Barrier(count), [torch.empty(0)] * count

    def sum_of(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def total(values: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = values
            self.barrier.wait(timeout=20)
            summed = torch.stack(self.parts).sum(0)
            self.barrier.wait(timeout=20)
            return summed

        return total


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo", "gmpo", "reinforce"])
def test_losses_of_the_cp_ranks_add_up_to_that_of_the_whole(kind: SurrogateKind, cp: int) -> None:
    batch = packed([5, 1, 12, 2, 30])
    random, total = torch.Generator().manual_seed(5), len(batch.tokens_T)
    new_T, stale_T, gap_T, advantages_T = torch.randn(4, total, generator=random)
    new_T.requires_grad_()
    old_T = (new_T + 0.1 * stale_T).detach()
    batch.fields.update(old_logprobs=old_T, engine_logprobs=old_T + 0.5 * gap_T, advantages=advantages_T)
    batch.fields.update(weight=torch.full((total,), 1 / total), age=torch.zeros(total))
    correction = Correction("icepop", sequence_band=(0.8, 1.25), off_policy_delta=0.02)
    loss = policy_loss(correction=correction, surrogate=Surrogate(kind, 0.02, 0.02))
    whole = loss(new_T, torch.zeros(total), batch)
    (gradient_T,) = torch.autograd.grad(whole.loss, new_T)
    assert 0 < whole.sums["policy/off_policy_masked"] < total / 2 and 0 < whole.sums["mismatch/masked"] < total

    threads = Threads(cp)

    def of_rank(rank: int) -> tuple[LossOutput, torch.Tensor]:
        part = rank_inputs(batch, tp=1, cp=cp, cp_rank=rank, over_cp=threads.sum_of(rank))
        output = loss(new_T[part.tokens_N], torch.zeros(len(part.tokens_N)), part.batch)
        return output, torch.autograd.grad(output.loss, new_T)[0]

    with ThreadPoolExecutor(cp) as pool:
        outputs, gradients = zip(*pool.map(of_rank, range(cp)), strict=True)
    torch.testing.assert_close(sum(gradients), gradient_T, atol=1e-6, rtol=0)
    for name, value in whole.sums.items():
        assert sum(output.sums[name].item() for output in outputs) == pytest.approx(value.item(), rel=1e-6, abs=1e-6), name
