"""Gathering and delivering over real gloo ranks, the shards cut by hand; Megatron's own shards are in test_megatron_weights.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.dist

PREAMBLE = """
import sys, time
from contextlib import contextmanager
import torch
import torch.distributed as dist
from plain_ranks import PlainRanks
from toy_shards import cut, small_model
from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ParallelConfig
from megatron_rl.checksum import checksum
from megatron_rl.resharding.execute import Resharder
from megatron_rl.resharding.families import names_of
from megatron_rl.resharding.fp8 import SCALE, is_quantized
from megatron_rl.resharding.gather import plain_memory
from megatron_rl.resharding.push import PushToEngines
from megatron_rl.resharding.quantizing import QuantizingSink
from megatron_rl.types import EngineLost, Intake

ranks = PlainRanks()

def full_weights(model, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names_of(model).hf_shapes.items()}

def shards(full, model, parallel):
    return cut(full, names_of(model), parallel, ranks.world_size, ranks.rank)

class Sink:
    # An engine that takes everything, as it is sent, and remembers it.
    def __init__(self, fails_at=0, error=None):
        self.fails_at, self.error, self.calls, self.held, self.checksums, self.has_all = fails_at, error, [], {}, None, False
    def call(self, what):
        self.calls.append(what)
        if len(self.calls) == self.fails_at: raise self.error
    def begin(self, manifest):
        self.call("begin")
        return Intake({spec.name: spec.dtype for bucket in manifest for spec in bucket}, self.has_all)
    memory = staticmethod(plain_memory)
    def send(self, bucket):
        self.call("send")
        self.held |= {name: tensor.clone() for name, tensor in bucket}
    def end(self, version, checksums=None):
        self.call(version)
        self.checksums = checksums
"""

GATHER = (
    PREAMBLE
    + """
model = small_model(vocab_size=11)
for layout in ({"ep": 2}, {"pp": 2}, {}, {"tp": 2, "etp": 2, "sequence_parallel": True}):
    for destinations in ((0,), (0, 1), (1,)):
        for bucket_bytes in (1, 3000, 1 << 20):
            parallel = ParallelConfig(**layout)
            full = full_weights(model)
            mine = shards(full, model, parallel)
            resharder = Resharder(model, parallel, lambda: mine, ranks, bucket_bytes, destinations)
            for seed in (0, 1):  # the second time with other values in the same storage
                changed = full_weights(model, seed)
                for name, shard in shards(changed, model, parallel).items():
                    mine[name].copy_(shard)
                seen = {name: tensor.clone() for bucket in resharder.gather() for name, tensor in bucket}
                assert seen.keys() == (changed.keys() if ranks.rank in destinations else set())
                assert all(torch.equal(seen[name], changed[name]) for name in seen)
print(f"rank {ranks.rank} done")
"""
)

FAILURES = (
    PREAMBLE
    + """
model, parallel = small_model(), ParallelConfig(ep=2)
mine = shards(full_weights(model), model, parallel)
resharder = Resharder(model, parallel, lambda: mine, ranks, 4000)
buckets = len(resharder.plan.buckets)
assert buckets > 5

for fails_at in (1, 2, 4, buckets + 2):
    for error in (EngineLost("engine 0 is gone"), UserError("disk full", exit_code=1), KeyError("bug")):
        sink = Sink(fails_at, error) if ranks.rank == 0 else None
        try:
            PushToEngines(resharder, sink).push(3)
            raise AssertionError("no error")
        except (EngineLost, UserError, KeyError, RuntimeError) as raised:
            if ranks.rank == 0:
                assert raised is error
            elif isinstance(error, KeyError):
                assert type(raised) is RuntimeError and "bug" in str(raised)
            else:
                assert type(raised) is type(error) and str(raised) == str(error)
                assert getattr(raised, "exit_code", 1) == 1
sink = Sink() if ranks.rank == 0 else None
PushToEngines(resharder, sink).push(7)
assert sink is None or sink.calls == ["begin"] + ["send"] * buckets + [7]
print(f"rank {ranks.rank} done")
"""
)

PUSHES = (
    PREAMBLE
    + """
from megatron_rl_kernels.fp8 import quantize
from megatron_rl.resharding.push import frozen

model, parallel = small_model(hidden_size=136), ParallelConfig(tp=2, etp=2, sequence_parallel=True)
full = full_weights(model)
mine = shards(full, model, parallel)
resharder = Resharder(model, parallel, lambda: mine, ranks, 30_000, frozen=frozen(model))
biases = {name for name in full if name.endswith("expert_bias")}
assert biases

sink = Sink() if ranks.rank == 0 else None
sync = PushToEngines(resharder, sink, verify=True)
for has_all in (False, True):  # what no step changes goes once
    if sink:
        sink.has_all, sink.held = has_all, {}
    sync.push(1)
    if sink:
        assert sink.held.keys() == full.keys() - (biases if has_all else set())
        assert all(torch.equal(tensor, full[name]) for name, tensor in sink.held.items())
        assert sink.checksums == {name: int(checksum(full[name])) for name in full}

PushToEngines(resharder, QuantizingSink(sink, verify=True) if sink else None, verify=True).push(2)
if sink:
    sink.has_all = False
PushToEngines(resharder, QuantizingSink(sink, verify=True) if sink else None, verify=True).push(3)
if sink:
    wanted = {}
    for name, tensor in full.items():
        if is_quantized(name, tensor.shape):
            wanted[name], wanted[name + SCALE] = quantize(tensor)
        else:
            wanted[name] = tensor
    assert sink.held.keys() == wanted.keys()
    assert all(sink.held[name].dtype == wanted[name].dtype for name in wanted)
    assert all(torch.equal(sink.held[name].float(), wanted[name].float()) for name in wanted)
    assert sink.checksums == {name: int(checksum(tensor)) for name, tensor in wanted.items()}
print(f"rank {ranks.rank} done")
"""
)


def test_every_rank_gets_every_tensor_bit_for_bit(torchrun: Callable[..., str]) -> None:
    assert torchrun(2, GATHER, timeout=120).count("done") == 2


def test_a_failing_sink_is_raised_everywhere_and_nobody_waits(torchrun: Callable[..., str]) -> None:
    assert torchrun(2, FAILURES, timeout=60).count("done") == 2


def test_pushes_of_what_changed_and_in_fp8(torchrun: Callable[..., str]) -> None:
    assert torchrun(2, PUSHES, timeout=60).count("done") == 2
