"""The simulator's engine against a real one: how far simulated and measured times of a rollout phase differ.

    OMP_NUM_THREADS=1 python benchmarks/simulator_calibration.py [--rounds 5]

Starts one SGLang server on the CPU (a random BailingMoeV2 of the quickstart's size, one thread), and fits the model's three
numbers to it: fixed-length batches of 1 to 64 give the decode step (step_s + step_s_per_rollout x batch), long prompts the prefill
rate. Then phases that were no part of the fit are run and simulated with the same lengths (megatron_rl/simulation/engine.py):
- tailed: 64 rollouts of long-tailed lengths at once, as a synchronous phase has them;
- queued: 192 such rollouts through 64 slots.
Requests go over HTTP and stream every token's log-prob, as in production. Medians of --rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import numpy as np
from tiny_checkpoint import write_checkpoint

from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.simulation.engine import Engine, EngineModel, Rollout
from megatron_rl.types import GenerateRequest, SamplingParams

VOCABULARY, SLOTS, PROMPT, LONG_PROMPT, SHORT, LONG = 64, 64, 8, 512, 8, 72


def tailed(count: int) -> list[int]:
    rng = random.Random(count)
    return [max(4, min(240, round(rng.lognormvariate(3.2, 0.9)))) for _ in range(count)]


class Server:
    def __init__(self, engine: SglangEngine, rounds: int) -> None:
        self._engine, self._rounds = engine, rounds
        self._rng = random.Random(0)
        self.seconds(LONG, [SHORT] * SLOTS, rounds=2)  # warm

    def seconds(self, prompt_tokens: int, lengths: Sequence[int], rounds: int | None = None) -> float:
        return statistics.median(asyncio.run(self._once(prompt_tokens, lengths)) for _ in range(rounds or self._rounds))

    async def _once(self, prompt_tokens: int, lengths: Sequence[int]) -> float:
        requests = [
            GenerateRequest(f"{number}", self._prompt(prompt_tokens), length, SamplingParams(max_response_tokens=length))
            for number, length in enumerate(lengths)
        ]
        started, tokens = time.perf_counter(), 0
        async for messages in self._engine.generate(requests):
            tokens += sum(len(message.tokens) for message in messages)
        assert tokens == sum(lengths), "a rollout ended early"
        return time.perf_counter() - started

    def _prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(2, VOCABULARY) for _ in range(tokens))


def fitted(server: Server) -> EngineModel:
    batches = (1, 4, 16, 32, 64)
    steps = [(server.seconds(PROMPT, [LONG] * b) - server.seconds(PROMPT, [SHORT] * b)) / (LONG - SHORT) for b in batches]
    slope, start = np.polyfit(batches, steps, 1)
    prefill = (server.seconds(LONG_PROMPT, [1] * 16) - server.seconds(PROMPT, [1] * 16)) / (16 * (LONG_PROMPT - PROMPT))
    print("| batch | decode step, ms | of the fit |\n|---|---|---|")
    for batch, step in zip(batches, steps, strict=True):
        print(f"| {batch} | {1e3 * step:.2f} | {step / (start + slope * batch):.2f} |")
    return EngineModel(SLOTS, float(start), float(slope), 1 / prefill, math.inf, PROMPT)


def simulated(model: EngineModel, lengths: Sequence[int]) -> float:
    engine = Engine(0, model)
    for number, length in enumerate(lengths):
        engine.queue(Rollout(f"{number}", length))
    engine.admit()
    while math.isfinite(now := engine.next_event()):
        engine.advance(now)
        engine.ended()
        engine.admit()
    return engine.now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(Path(folder) / "model", vocab_size=VOCABULARY, eos_token_id=VOCABULARY)
        config = EngineConfig(device="cpu", max_running_requests=SLOTS, max_total_tokens=65_536)
        engines = SglangEngines(config, str(model), Path(folder), context_length=1024, seed=0)
        try:
            engines.start()
            server = Server(engines.alive[0], rounds)
            fit = fitted(server)
            print(
                f"\nstep {1e3 * fit.step_s:.2f} ms + {1e3 * fit.step_s_per_rollout:.3f} ms x batch, "
                f"prefill {fit.prefill_tokens_per_s:,.0f} tokens/s\n"
            )
            print("| phase | rollouts, tokens | measured s | simulated s | simulated / measured |\n|---|---|---|---|---|")
            for name, lengths in (("tailed", tailed(SLOTS)), ("queued", tailed(3 * SLOTS))):
                measured, model_s = server.seconds(PROMPT, lengths), simulated(fit, lengths)
                print(f"| {name} | {len(lengths)}, {sum(lengths):,} | {measured:.2f} | {model_s:.2f} | {model_s / measured:.2f} |")
        finally:
            engines.stop()


if __name__ == "__main__":
    main()
