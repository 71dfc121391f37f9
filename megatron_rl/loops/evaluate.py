"""Held-out prompts through the engines and the verifiers: n samples a prompt, a greedy one beside them.

With `forced_prefix` each response starts with the prompt's own `metadata.forced_prefix`: what the model can do when it is made to
begin a certain way, whether or not it would by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config.run import EvalConfig
from megatron_rl.loops.outcomes import Outcome, summary
from megatron_rl.loops.responses import Key, Responses
from megatron_rl.ports import Engine, Engines, Rewards
from megatron_rl.types import EngineLost, GenerateRequest, Prompt, Rollout, SamplingParams, Score

log = logging.getLogger(__name__)
PROGRESS_S = 15.0  # between two lines


@dataclass(frozen=True)
class Pass:
    name: str  # of its rows: sampled, greedy, forced
    suffix: str  # of its metrics
    sampling: SamplingParams
    samples: int
    forced: bool = False


@dataclass(frozen=True)
class Evaluator:
    """Without a file of responses, an evaluation that loses an engine is repeated, not patched together."""

    config: EvalConfig
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    engines: Engines
    rewards: Rewards
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    runner: asyncio.Runner
    seed: int = 0  # of the statistics' draws

    def metrics_or_none(self) -> dict[str, float] | None:
        """None when an engine died under it."""
        try:
            return self.metrics()
        except EngineLost as error:
            log.warning("%s during the evaluation; it starts again", error)
            return None

    def metrics(self, responses: Responses | None = None) -> dict[str, float]:
        """`eval/...` numbers of every pass (outcomes.py). With `responses`, every sample goes there as soon as it is judged, and
        what lies there already is not sampled again. Raises EngineLost."""
        started = time.monotonic()
        metrics: dict[str, float] = {}
        order: list[Key] = []
        for each in self.passes():
            rows = {key: row for key, row in responses.rows.items() if key[0] == each.name} if responses else {}
            todo = [rollout for rollout in self._started(each) if (each.name, rollout.prompt.id, rollout.sample) not in rows]

            def keep(rollout: Rollout, score: Score, each: Pass = each, rows: dict[Key, dict[str, Any]] = rows) -> None:
                row = self._row(each.name, rollout, score)
                rows[each.name, rollout.prompt.id, rollout.sample] = row
                if responses:
                    responses.add(row)

            self.runner.run(self._sample(todo, each.sampling, keep))
            keys = [(each.name, prompt.id, sample) for prompt in self.prompts for sample in range(each.samples)]
            numbers = summary([_outcome(rows[key]) for key in keys], self.seed)
            metrics |= {_metric(name, each.suffix): value for name, value in numbers.items()}
            order += keys
        if responses:
            responses.finish(order)
        return metrics | {"time/eval_s": time.monotonic() - started}

    def passes(self) -> list[Pass]:
        config = self.config
        sampled = replace(self.sampling, temperature=config.temperature)
        passes = [Pass("sampled", "", sampled, config.samples)]
        if config.greedy:
            passes.append(Pass("greedy", "_greedy", replace(self.sampling, temperature=0.0), 1))
        if config.forced_prefix:
            passes.append(Pass("forced", "_forced", sampled, config.samples, forced=True))
        return passes

    def _started(self, each: Pass) -> list[Rollout]:
        started = []
        for prompt in self.prompts:
            prefix = tuple(self.encode(prompt.metadata["forced_prefix"])) if each.forced else ()
            started += [started_rollout(prompt, sample, prefix) for sample in range(each.samples)]
        return started

    async def _sample(self, todo: Sequence[Rollout], sampling: SamplingParams, keep: Callable[[Rollout, Score], None]) -> None:
        engines = list(self.engines.alive)
        if not engines:
            raise EngineLost("no engine is alive")
        kept, said = 0, time.monotonic()

        async def run(engine: Engine, share: Sequence[Rollout]) -> None:
            nonlocal kept, said
            async for ended in run_to_end(engine, share, sampling):
                for rollout, score in zip(ended, await self.rewards.score(ended), strict=True):
                    keep(rollout, score)
                kept += len(ended)
                if time.monotonic() - said > PROGRESS_S:
                    said = time.monotonic()
                    log.info("evaluation: %d of %d samples", kept, len(todo))

        shares = [todo[i :: len(engines)] for i in range(len(engines))]
        runs = [asyncio.create_task(run(engine, share)) for engine, share in zip(engines, shares, strict=True) if share]
        try:
            await asyncio.gather(*runs)
        except EngineLost:  # the others must be quiet before the next push
            await asyncio.gather(*(engine.abort() for engine in self.engines.alive), return_exceptions=True)
            await asyncio.gather(*runs, return_exceptions=True)
            raise

    def _row(self, name: str, rollout: Rollout, score: Score) -> dict[str, Any]:
        return {
            "pass": name,
            "prompt_id": rollout.prompt.id,
            "domain": rollout.prompt.domain,
            "sample": rollout.sample,
            "prompt": rollout.prompt.text,
            "response": self.decode(rollout.tokens),
            "answer": rollout.prompt.answer,
            "extracted": score.extracted,
            "reward": score.value,
            "status": score.status,
            "tokens": len(rollout.tokens),
            "finish_reason": rollout.finish_reason,
        }


def started_rollout(prompt: Prompt, sample: int, prefix: tuple[int, ...]) -> Rollout:
    zeros = (0.0,) * len(prefix)
    return Rollout(f"eval:{prompt.id}#{sample}", prompt, sample, prefix, zeros, (0,) * len(prefix))


async def run_to_end(engine: Engine, rollouts: Sequence[Rollout], sampling: SamplingParams) -> AsyncIterator[list[Rollout]]:
    """All of them on one engine, as they end. What an abort has cut does not end. Raises EngineLost."""
    by_id = {rollout.id: rollout for rollout in rollouts}
    requests = [
        GenerateRequest(r.id, r.prompt.tokens + r.tokens, sampling.max_response_tokens - len(r.tokens), sampling) for r in rollouts
    ]
    async for messages in engine.generate(requests):
        for message in messages:
            by_id[message.rollout_id] = by_id[message.rollout_id].extended(message)
        if ended := [by_id[message.rollout_id] for message in messages if message.finish_reason]:
            yield ended


def _outcome(row: Mapping[str, Any]) -> Outcome:
    status: str = row["status"]
    return Outcome(
        question=row["prompt_id"],
        domain=row["domain"],
        correct=status == "correct",
        answer=row["extracted"],
        tokens=row["tokens"],
        truncated=row["finish_reason"] == "length",
        judged=status not in ("timeout", "error"),
    )


def _metric(name: str, suffix: str) -> str:
    """The suffix of a pass comes before the domain."""
    quantity, slash, domain = name.partition("/")
    return f"eval/{quantity}{suffix}{slash}{domain}"
