"""Evaluation against scripted engines: what is counted, and what happens when an engine dies under it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from fakes import ParityRewards, ScriptedEngine, ScriptedEngines, length_of

from megatron_rl.config.run import EvalConfig
from megatron_rl.loops.evaluate import Evaluator
from megatron_rl.types import EngineLost, Prompt, SamplingParams

PROMPTS = tuple(Prompt(f"p{i}", f"{i}?", (1, 1), "a", "exact", metadata={"forced_prefix": "ab"}) for i in range(5))


def evaluator(engines: ScriptedEngines, runner: asyncio.Runner, **config: object) -> Evaluator:
    return Evaluator(
        config=EvalConfig(samples=3, **config),  # type: ignore[arg-type]
        prompts=PROMPTS,
        sampling=SamplingParams(max_response_tokens=64),
        engines=engines,
        rewards=ParityRewards(),
        encode=lambda text: [7] * len(text),
        decode=str,
        runner=runner,
    )


def test_accuracy_and_length_are_means_over_all_samples(tmp_path: Path) -> None:
    engines = ScriptedEngines([ScriptedEngine("a", 2), ScriptedEngine("b", 2)])
    with asyncio.Runner() as runner:
        metrics = evaluator(engines, runner, greedy=False).metrics(tmp_path / "responses.jsonl")
    lengths = [length_of(f"eval:p{i}#{sample}") for i in range(5) for sample in range(3)]
    assert metrics["eval/accuracy"] == pytest.approx(sum(n % 2 for n in lengths) / 15)  # odd lengths are right
    assert metrics["eval/response_tokens"] == pytest.approx(sum(lengths) / 15)
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(f"p{i}", s) for i in range(5) for s in range(3)]
    assert engines.engines[0].served and engines.engines[1].served


def test_a_forced_prefix_begins_the_response() -> None:
    with asyncio.Runner() as runner:
        forced = evaluator(ScriptedEngines([ScriptedEngine("a", 2)]), runner, greedy=False, forced_prefix=True)
        judged = runner.run(forced._judged(forced.sampling, 1, forced=True))
    assert all(rollout.tokens[:2] == (7, 7) for rollout, _ in judged)


def test_an_engine_that_dies_leaves_the_others_quiet() -> None:
    engines = ScriptedEngines([ScriptedEngine("a", 2, length=lambda _: 60, chunk=1), ScriptedEngine("b", 2)])
    engines.engines[1].dies_after = 0
    with asyncio.Runner() as runner:
        assert evaluator(engines, runner).metrics_or_none() is None
    assert not engines.engines[0]._running


def test_without_an_engine_it_says_so() -> None:
    engines = ScriptedEngines([ScriptedEngine("a", 2)])
    engines.engines[0].dead = True
    with asyncio.Runner() as runner, pytest.raises(EngineLost, match="no engine is alive"):
        evaluator(engines, runner).metrics()
