"""The hash behind seeded draws, and the seeds of requests."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_rl.engine.cpu_determinism import murmur_hash32
from megatron_rl.types import GenerateRequest, SamplingParams

ALL = 2**32 - 1


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, as published, in plain integers."""

    def rotated(word: int, bits: int) -> int:
        return (word << bits | word >> 32 - bits) & ALL

    def scrambled(word: int) -> int:
        return rotated(word * 0xCC9E2D51 & ALL, 15) * 0x1B873593 & ALL

    h, whole = 0, len(data) // 4 * 4
    for start in range(0, whole, 4):
        h = rotated(h ^ scrambled(int.from_bytes(data[start : start + 4], "little")), 13) * 5 + 0xE6546B64 & ALL
    h ^= scrambled(int.from_bytes(data[whole:], "little")) ^ len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h >> shift) * factor & ALL
    return h


def test_the_hash_is_murmurhash3_of_seed_position_and_token() -> None:
    assert murmur3(b"test") == 0xBA6BD213
    assert murmur3(b"Hello, world!") == 0xC0363E43
    assert murmur3(b"The quick brown fox jumps over the lazy dog") == 0x2E4FF723
    seeds, positions, tokens = [0, 42, 2**63 - 1, 0x0123456789ABCDEF], [0, 1, 65_535, 2**31 - 1], [0, 1, 31_999, 157_183]
    found = murmur_hash32(torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(tokens))
    assert found.dtype == torch.uint32
    assert found.tolist() == [
        [murmur3(seed.to_bytes(8, "little") + position.to_bytes(4, "little") + token.to_bytes(4, "little")) for token in tokens]
        for seed, position in zip(seeds, positions, strict=True)
    ]


def test_a_requests_seed_is_the_runs_the_prompts_and_the_samples() -> None:
    first = GenerateRequest("0:p1#0", (1, 2), 9, SamplingParams())
    assert first.seed == 8363403809122153985, "the same in every process, on every machine"
    assert replace(first, tokens=(1, 2, 3), max_new_tokens=8).seed == first.seed, "an interrupted one goes on as it would have"
    others = [replace(first, rollout_id=name) for name in ("0:p1#1", "0:p2#0", "1:p1#0")]
    others += [replace(first, sampling=SamplingParams(seed=1)), replace(first, rollout_id="1 0:p1#0")]
    seeds = {request.seed for request in (first, *others)}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
