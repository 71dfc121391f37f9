"""`megatron-rl rl` with engines that never hold quite the policy's weights: every push adds noise on its way to them.

    torchrun --nproc-per-node 2 benchmarks/stability/noisy_engine.py 0.05 experiment=quickstart [key=value ...]

The first argument is eps. An element w of a tensor arrives as w (1 + eps z), z a standard normal: what a coarser number format does
to it, only larger at will (bfloat16's rounding has a standard deviation of about 0.001, float8_e4m3's of about 0.02). The rest of
the command line is that of `megatron-rl rl`, whose loop, policy, engines and record these are; `report.html` is left out.

Invariants:
- the policy's own tensors are untouched, and every engine gets the same noise;
- the noise is a function of run.seed, the weights' version and the tensor's name: a push that is repeated is the same push, and
  runs that differ in their algorithm alone draw the same z;
- what no step changes (the frozen router bias) is sent once, with the noise of that push.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_rl import assemble
from megatron_rl.__main__ import compose_and_run, fail
from megatron_rl.config import RlRun
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.engine.weights import EngineWeights
from megatron_rl.loops import rl
from megatron_rl.loops.parts import RlParts
from megatron_rl.loops.signals import StopFlag
from megatron_rl.ports import WeightSink
from megatron_rl.resharding.execute import Resharder
from megatron_rl.resharding.gather import plain_memory
from megatron_rl.resharding.push import PushToEngines, frozen
from megatron_rl.types import Intake, Manifest


def noisy(tensor: torch.Tensor, eps: float, seed: int, version: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{version}:{name}".encode()))
    z = torch.randn(tensor.shape, generator=generator)
    return (tensor.float() * (1 + eps * z)).to(tensor.dtype)


class NoisySink:
    """A `ports.WeightSink` before another. `version` is that of the push under way."""

    memory = staticmethod(plain_memory)  # the other sink copies what is made of it

    def __init__(self, sink: WeightSink, eps: float, seed: int) -> None:
        self._sink, self._eps, self._seed = sink, eps, seed
        self.version = 0

    def begin(self, manifest: Manifest) -> Intake:
        return self._sink.begin(manifest)

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._sink.send([(name, noisy(tensor, self._eps, self._seed, self.version, name)) for name, tensor in bucket])

    def end(self, version: int, checksums: Mapping[str, int] | None = None) -> None:
        self._sink.end(version, checksums)


class NoisyPush:
    """A `ports.WeightSync`: tells the sink, which exists on rank 0 only, the version before its first tensor."""

    def __init__(self, push: PushToEngines, sink: NoisySink | None) -> None:
        self._push, self._sink = push, sink

    def push(self, version: int) -> None:
        if self._sink:
            self._sink.version = version
        self._push.push(version)


def noisy_push(config: RlRun, core: assemble.PolicyParts, parts: RlParts, eps: float) -> NoisyPush:
    """*Collective*: as assemble.rl_parts makes a run's push, with the noise in between."""
    sync = config.engine.sync
    resharder = Resharder(
        config.model,
        config.parallel,
        core.policy.weights,
        core.ranks,
        int(sync.bucket_mb * 2**20),
        frozen=frozen(config.model),
        timeout_s=2 * sync.timeout_s,
    )
    sink = None
    if isinstance(parts.engines, SglangEngines):  # on rank 0
        sink = NoisySink(EngineWeights(parts.engines, config.engine.tp, sync.timeout_s, sync.transport), eps, config.run.seed)
    return NoisyPush(PushToEngines(resharder, sink), sink)


def run_rl(eps: float, config: RlRun) -> None:
    run_dir = Path(config.run.dir)
    with ExitStack() as stack:
        stop = StopFlag().install()
        core = assemble.policy_parts(config, run_dir, stack)
        parts = assemble.rl_parts(config, run_dir, core, stop, stack)
        parts = replace(parts, sync=noisy_push(config, core, parts, eps))
        complete = rl.train(config, parts)
        if core.ranks.rank == 0:
            assemble.farewell(complete, run_dir)
        stop.exit_if_requested(complete)


def main() -> None:
    try:
        eps, overrides = float(sys.argv[1]), sys.argv[2:]
    except (IndexError, ValueError):
        fail("noisy_engine.py: the first argument is eps, a number; then come the overrides of `megatron-rl rl`", 2)
    if "LOCAL_RANK" not in os.environ:
        fail("noisy_engine.py: a rank of torchrun; see its first lines", 2)
    assemble.run_rl = partial(run_rl, eps)
    compose_and_run("rl", overrides)


if __name__ == "__main__":
    main()
