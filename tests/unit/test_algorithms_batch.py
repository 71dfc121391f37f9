"""Sums over sequences, of whole ones and of ones that are split over ranks."""

from __future__ import annotations

import torch

from megatron_rl.algorithms.batch import PackedBatch


def packed(lengths: list[int], over_cp=None) -> PackedBatch:  # type: ignore[no-untyped-def]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    tokens_T = torch.zeros(int(ends[-1]), dtype=torch.long)
    return PackedBatch(tokens_T, ends.to(torch.int32), torch.ones(len(tokens_T)), **({"over_cp": over_cp} if over_cp else {}))


def test_segment_sums_by_hand() -> None:
    values_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    batch = packed([2, 0, 3])
    assert batch.segment_sums(values_T).tolist() == [3.0, 0.0, 12.0]
    assert batch.segment_sums(torch.stack([values_T, -values_T])).tolist() == [[3.0, 0.0, 12.0], [-3.0, 0.0, -12.0]]
    assert not batch.segment_sums(values_T).requires_grad


def test_sequence_means_by_hand() -> None:
    values_T, among_T = torch.tensor([1.0, 2.0, float("nan"), 4.0, 5.0, 9.0]), torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    assert packed([2, 3, 1]).sequence_means(values_T, among_T).tolist() == [1.5, 1.5, 4.5, 4.5, 4.5, 0.0]


def test_a_split_sequence_has_the_sums_of_the_whole_one() -> None:
    """Rank 0 has the tokens 1 2 | 5, rank 1 has 3 4 | none."""
    here, there = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([3.0, 4.0])
    elsewhere = packed([2, 0]).segment_sums(torch.stack([there, torch.ones(2)]))
    batch = packed([2, 1], over_cp=lambda values: values + elsewhere)
    assert batch.sequence_means(here, torch.ones(3, dtype=torch.bool)).tolist() == [2.5, 2.5, 5.0]
