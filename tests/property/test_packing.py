"""Microbatch packing: a hand-worked example, then every promise of the module for any lengths."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.scheduler.packing import pack

CASES = {
    "lengths": st.lists(st.integers(1, 60), max_size=60),
    "capacity": st.integers(1, 80),
    "replicas": st.integers(1, 6),
}


def tokens(lengths: list[int], microbatch: list[int]) -> int:
    return sum(lengths[index] for index in microbatch)


def test_by_hand() -> None:
    # 23 tokens at 10: three microbatches at least, four for two replicas. Longest first into the emptiest of four:
    # 7 | 6 | 4 | 3, then 2 to the 3 (5), 1 to the 4 (5). Sorted 7 6 5 5: (7, 6) go to replicas 0 and 1;
    # of the next two (index order breaks the tie) the first goes to replica 1, which has fewer tokens. Loads 12 and 11.
    assert pack([3, 7, 1, 4, 6, 2], capacity=10, replicas=2) == [[[1], [2, 3]], [[4], [0, 5]]]


def test_an_overlong_sequence_has_a_microbatch_of_its_own() -> None:
    assert pack([30, 4, 5], capacity=10, replicas=1) == [[[0], [1, 2]]]


def test_fewer_sequences_than_microbatches_leave_some_empty() -> None:
    assert pack([5, 5, 5], capacity=5, replicas=2) == [[[0], [2]], [[1], []]]
    assert pack([5], capacity=5, replicas=3) == [[[0]], [[]], [[]]]
    assert pack([], capacity=5, replicas=2) == [[], []]


@given(**CASES)
def test_partition(lengths: list[int], capacity: int, replicas: int) -> None:
    shares = pack(lengths, capacity, replicas)
    assert sorted(index for share in shares for microbatch in share for index in microbatch) == list(range(len(lengths)))


@given(**CASES)
def test_lockstep(lengths: list[int], capacity: int, replicas: int) -> None:
    shares = pack(lengths, capacity, replicas)
    counts = {len(share) for share in shares}
    assert len(shares) == replicas and len(counts) == 1
    empty = sum(not microbatch for share in shares for microbatch in share)
    assert empty == max(0, replicas * counts.pop() - len(lengths))


@given(**CASES)
def test_capacity(lengths: list[int], capacity: int, replicas: int) -> None:
    for share in pack(lengths, capacity, replicas):
        for microbatch in share:
            assert len(microbatch) <= 1 or tokens(lengths, microbatch) <= capacity


@given(**CASES)
def test_balance(lengths: list[int], capacity: int, replicas: int) -> None:
    shares = pack(lengths, capacity, replicas)
    longest = max(lengths, default=0)
    loads = [[tokens(lengths, microbatch) for microbatch in share] for share in shares]
    assert max(map(sum, loads)) - min(map(sum, loads)) <= longest
    assert sum(max(column) - min(column) for column in zip(*loads, strict=True)) <= longest


@given(**CASES)
def test_microbatches_are_as_few_as_first_fit_needs_or_nearly(lengths: list[int], capacity: int, replicas: int) -> None:
    """Longest-first into the emptiest spreads evenly, first-fit-decreasing fills up: at most a quarter more, and one round."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = next((i for i, load in enumerate(bins) if load + length <= capacity), None)
        if room is None:
            bins.append(length)
        else:
            bins[room] += length
    assert replicas * len(pack(lengths, capacity, replicas)[0]) <= 1.25 * len(bins) + 1 + 2 * (replicas - 1)


@pytest.mark.parametrize(("lengths", "capacity", "replicas"), [([1], 0, 1), ([1], 1, 0), ([3, 0], 5, 1)])
def test_numbers_below_one_are_refused(lengths: list[int], capacity: int, replicas: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pack(lengths, capacity, replicas)


def test_deterministic_whatever_the_hash_seed() -> None:
    program = "from megatron_rl.scheduler.packing import pack; print(pack([i * 7919 % 97 + 1 for i in range(200)], 256, 4))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, timeout=60
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


def test_the_scheduler_needs_no_torch() -> None:
    program = "import sys, megatron_rl.scheduler.c3po_pp, megatron_rl.scheduler.packing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
