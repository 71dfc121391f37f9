"""Sequences into microbatches, microbatches onto replicas.

Expert- and pipeline-parallel ranks meet in collectives inside every microbatch, so replicas walk through their microbatches in
lockstep: the same number on each, and the k-th of all replicas about equally long.

Longest-processing-time-first (Graham 1969): the longest sequence first, each into the emptiest of K microbatches, with K the first
multiple of the number of replicas at which none of several sequences exceeds the capacity. The microbatches, sorted by
tokens, are then dealt in rounds of one per replica, the longest of a round to the replica with the fewest tokens so far.

Invariants (tests/property/test_packing.py), with L the longest sequence:
- partition: every index exactly once;
- lockstep: every replica has the same number of microbatches; one is empty only if there are fewer sequences than microbatches
  in all, and its rank then computes a one-token segment that is masked out;
- capacity: no microbatch is above it, but one that holds a single longer sequence;
- balance: the tokens of two replicas differ by at most L, and so does the sum over k of the spread of the k-th microbatches
  (what lockstep waits for, per rank and step);
- deterministic: the result is a function of the arguments alone; equal lengths go by index.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int, replicas: int) -> list[list[list[int]]]:
    """[replica][microbatch] -> ascending indices into `lengths` (tokens, >= 1), longest microbatches first; `capacity` in tokens
    per microbatch. No sequences, no microbatches. Raises ValueError for a number below 1."""
    if capacity < 1 or replicas < 1 or min(lengths, default=1) < 1:
        raise ValueError(f"capacity={capacity}, replicas={replicas} and every length must be at least 1; got lengths {lengths}")
    halves = sum(length > capacity // 2 for length in lengths)  # no two of them share a microbatch
    full = -(-sum(min(length, capacity) for length in lengths) // capacity)
    count = _round_up(max(halves, full), replicas)
    while not _fits(bins := _longest_first(lengths, count), lengths, capacity):
        count += replicas

    def tokens(bin_: list[int]) -> int:
        return sum(lengths[index] for index in bin_)

    shares: list[list[list[int]]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    bins.sort(key=lambda bin_: (-tokens(bin_), bin_))
    for start in range(0, count, replicas):
        emptiest_first = sorted(range(replicas), key=lambda replica: loads[replica])
        for replica, bin_ in zip(emptiest_first, bins[start : start + replicas], strict=True):
            shares[replica].append(sorted(bin_))
            loads[replica] += tokens(bin_)
    return shares


def _longest_first(lengths: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, number = heapq.heappop(emptiest)
        bins[number].append(index)
        heapq.heappush(emptiest, (load + lengths[index], number))
    return bins


def _fits(bins: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> bool:
    return all(len(bin_) <= 1 or sum(lengths[index] for index in bin_) <= capacity for bin_ in bins)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
