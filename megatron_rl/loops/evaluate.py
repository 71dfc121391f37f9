"""Held-out prompts through the engines and the verifiers: mean accuracy over n samples a prompt, greedy beside it.

With `forced_prefix` each response starts with the prompt's own `metadata.forced_prefix`: what the model can do when it is made to
begin a certain way, whether or not it would by itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from megatron_rl.config.run import EvalConfig
from megatron_rl.ports import Engine, Engines, Rewards
from megatron_rl.types import EngineLost, GenerateRequest, Prompt, Rollout, SamplingParams, Score

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """An evaluation that loses an engine is repeated, not patched together."""

    config: EvalConfig
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    engines: Engines
    rewards: Rewards
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    runner: asyncio.Runner

    def metrics_or_none(self) -> dict[str, float] | None:
        """None when an engine died under it."""
        try:
            return self.metrics()
        except EngineLost as error:
            log.warning("%s during the evaluation; it starts again", error)
            return None

    def metrics(self, responses: Path | None = None) -> dict[str, float]:
        """`eval/...` numbers of every pass; with `responses`, all of them go there as JSONL. Raises EngineLost."""
        started = time.monotonic()
        sampled = replace(self.sampling, temperature=self.config.temperature)
        greedy = replace(self.sampling, temperature=0.0)
        passes = {"": (sampled, self.config.samples, False)}
        if self.config.greedy:
            passes["_greedy"] = (greedy, 1, False)
        if self.config.forced_prefix:
            passes["_forced"] = (sampled, self.config.samples, True)
        metrics: dict[str, float] = {}
        rows: list[str] = []
        for name, (sampling, samples, forced) in passes.items():
            judged = self.runner.run(self._judged(sampling, samples, forced))
            metrics |= {
                f"eval/accuracy{name}": fmean(float(score.status == "correct") for _, score in judged),
                f"eval/response_tokens{name}": fmean(len(rollout.tokens) for rollout, _ in judged),
                f"eval/truncated{name}": fmean(float(rollout.finish_reason == "length") for rollout, _ in judged),
                f"eval/unjudged{name}": fmean(float(score.status in ("timeout", "error")) for _, score in judged),
            }
            rows += [self._row(name.removeprefix("_") or "sampled", rollout, score) for rollout, score in judged]
        if responses:
            responses.write_text("".join(rows))
        return metrics | {"time/eval_s": time.monotonic() - started}

    async def _judged(self, sampling: SamplingParams, samples: int, forced: bool) -> list[tuple[Rollout, Score]]:
        engines = list(self.engines.alive)
        if not engines:
            raise EngineLost("no engine is alive")
        prefixes = {p.id: tuple(self.encode(p.metadata["forced_prefix"])) if forced else () for p in self.prompts}
        started = {
            rollout.id: rollout
            for prompt in self.prompts
            for sample in range(samples)
            for rollout in [started_rollout(prompt, sample, prefixes[prompt.id])]
        }
        shares = [list(started.values())[i :: len(engines)] for i in range(len(engines))]
        runs = [asyncio.create_task(run_to_end(e, share, sampling)) for e, share in zip(engines, shares, strict=True) if share]
        try:
            done = await asyncio.gather(*runs)
        except EngineLost:  # the others must be quiet before the next push
            await asyncio.gather(*(engine.abort() for engine in self.engines.alive), return_exceptions=True)
            await asyncio.gather(*runs, return_exceptions=True)
            raise
        finished = {rollout.id: rollout for share in done for rollout in share}
        rollouts = [finished[rollout_id] for rollout_id in started]
        return list(zip(rollouts, await self.rewards.score(rollouts), strict=True))

    def _row(self, name: str, rollout: Rollout, score: Score) -> str:
        row = {
            "pass": name,
            "prompt_id": rollout.prompt.id,
            "sample": rollout.sample,
            "prompt": rollout.prompt.text,
            "response": self.decode(rollout.tokens),
            "answer": rollout.prompt.answer,
            "reward": score.value,
            "status": score.status,
            "tokens": len(rollout.tokens),
            "finish_reason": rollout.finish_reason,
        }
        return json.dumps(row, ensure_ascii=False) + "\n"


def started_rollout(prompt: Prompt, sample: int, prefix: tuple[int, ...]) -> Rollout:
    zeros = (0.0,) * len(prefix)
    return Rollout(f"eval:{prompt.id}#{sample}", prompt, sample, prefix, zeros, (0,) * len(prefix))


async def run_to_end(engine: Engine, rollouts: Sequence[Rollout], sampling: SamplingParams) -> list[Rollout]:
    """Generate all of them on one engine until each is finished. Raises EngineLost."""
    by_id = {rollout.id: rollout for rollout in rollouts}
    requests = [
        GenerateRequest(r.id, r.prompt.tokens + r.tokens, sampling.max_response_tokens - len(r.tokens), sampling) for r in rollouts
    ]
    async for messages in engine.generate(requests):
        for message in messages:
            by_id[message.rollout_id] = by_id[message.rollout_id].extended(message)
    return list(by_id.values())
