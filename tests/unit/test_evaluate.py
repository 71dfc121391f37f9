"""Evaluation against scripted engines: what is counted, and what happens when an engine dies under it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import ParityRewards, ScriptedEngine, ScriptedEngines, length_of

from megatron_rl.config import UserError
from megatron_rl.config.run import EvalConfig
from megatron_rl.loops.evaluate import Evaluator
from megatron_rl.loops.responses import Responses
from megatron_rl.types import EngineLost, GenerateRequest, Progress, Prompt, SamplingParams

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
        metrics = evaluator(engines, runner, greedy=False).metrics(Responses(tmp_path / "responses.jsonl", {}))
    lengths = [length_of(f"eval:p{i}#{sample}") for i in range(5) for sample in range(3)]
    assert metrics["eval/accuracy"] == pytest.approx(sum(n % 2 for n in lengths) / 15)  # odd lengths are right
    assert metrics["eval/response_tokens"] == pytest.approx(sum(lengths) / 15)
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(f"p{i}", s) for i in range(5) for s in range(3)]
    assert engines.engines[0].served and engines.engines[1].served


def test_a_forced_prefix_begins_the_response(tmp_path: Path) -> None:
    with asyncio.Runner() as runner:
        forced = evaluator(ScriptedEngines([ScriptedEngine("a", 2)]), runner, greedy=False, forced_prefix=True)
        forced.metrics(Responses(tmp_path / "responses.jsonl", {}))
    rows = [row for row in rows_of(tmp_path) if row["pass"] == "forced"]
    assert len(rows) == 15 and all(row["response"].startswith("(7, 7, ") for row in rows)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def test_an_interrupted_evaluation_goes_on_and_writes_the_same_file(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with asyncio.Runner() as runner:
        for folder in (whole, cut):
            folder.mkdir()
        expected = evaluator(ScriptedEngines([ScriptedEngine("a", 2)]), runner).metrics(Responses(whole / "responses.jsonl", {}))
        engine = ScriptedEngine("a", 2)
        engine.dies_after = 6
        with pytest.raises(EngineLost):
            evaluator(ScriptedEngines([engine]), runner).metrics(Responses(cut / "responses.jsonl", {"of": "this"}))
        partial = cut / "responses.partial.jsonl"
        with partial.open("a") as file:
            file.write('{"pass": "sam')  # torn
        judged = {(row["prompt_id"], row["sample"]) for row in map(json.loads, partial.read_text().splitlines()[1:-1])}
        assert 0 < len(judged) < 15 and not (cut / "responses.jsonl").exists()
        again = ScriptedEngine("b", 2)
        metrics = evaluator(ScriptedEngines([again]), runner).metrics(Responses(cut / "responses.jsonl", {"of": "this"}))
    assert len(again.served) == 15 + 5 - len(judged), "three samples and a greedy one of five prompts"
    assert (cut / "responses.jsonl").read_bytes() == (whole / "responses.jsonl").read_bytes() and not partial.exists()
    del metrics["time/eval_s"], expected["time/eval_s"]
    assert metrics == expected


def test_what_is_asked_of_engines_is_seeded_by_run_prompt_and_sample_alone() -> None:
    class Noting(ScriptedEngine):
        async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[Sequence[Progress]]:
            seeds.update({(request.tokens, request.rollout_id): request.seed for request in requests})
            async for messages in super().generate(requests):
                yield messages

    def asked(engines: int, seed: int, prompts: Sequence[Prompt]) -> dict[tuple[tuple[int, ...], str], int]:
        seeds.clear()
        with asyncio.Runner() as runner:
            fleet = ScriptedEngines([Noting(str(number), 2) for number in range(engines)])
            each = evaluator(fleet, runner, forced_prefix=True)
            replace(each, prompts=prompts, sampling=replace(each.sampling, seed=seed)).metrics()
        return dict(seeds)

    seeds: dict[tuple[tuple[int, ...], str], int] = {}
    expected = asked(1, 5, PROMPTS)
    assert len(set(expected.values())) == 15, "of five prompts three samples, in the forced pass, too"
    assert asked(2, 5, PROMPTS[::-1]) == expected
    assert not set(asked(1, 6, PROMPTS).values()) & set(expected.values())


def test_samples_of_another_evaluation_are_not_mixed_in(tmp_path: Path) -> None:
    Responses(tmp_path / "responses.jsonl", {"temperature": 0.6})
    with pytest.raises(UserError, match="made from other input or settings"):
        Responses(tmp_path / "responses.jsonl", {"temperature": 1.0})


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
