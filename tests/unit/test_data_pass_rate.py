"""megatron_rl/data/pass_rate.py and tools/filter_by_pass_rate.py: the numbers of a direct count, over scripted engines."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEngine, ScriptedEngines

from megatron_rl.config import EvalRun, UserError
from megatron_rl.data.gold import Gold
from megatron_rl.data.pass_rate import HIGH, LOW, Tally, tallies, why_dropped
from megatron_rl.data.prompts import fingerprint, read_prompts
from megatron_rl.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_rl.loops.evaluate import Evaluator
from megatron_rl.loops.responses import Responses
from megatron_rl.types import EngineLost, Rollout, SamplingParams, Score, ScoreStatus

FINE = Gold("verifies")
SAMPLES, LIMIT = 16, 20


@pytest.mark.parametrize(
    ("correct", "wrong", "failed", "reason"),
    [
        (1, 3, 0, None),
        (5, 3, 0, None),
        (2, 7, 0, "too_hard"),
        (6, 3, 0, "too_easy"),
        (0, 8, 0, "too_hard"),
        (8, 0, 0, "too_easy"),
        (1, 3, 4, None),  # half of them judged, and a quarter of those correct
        (1, 3, 5, "unjudged"),
        (0, 0, 8, "unjudged"),
    ],
)
def test_the_band_holds_its_ends_and_counts_judged_samples_alone(correct: int, wrong: int, failed: int, reason: str | None) -> None:
    statuses: Counter[ScoreStatus] = Counter({"correct": correct, "wrong": wrong - 1 if wrong else 0})
    statuses += Counter({"unparsable": 1 if wrong else 0, "timeout": failed // 2, "error": failed - failed // 2})
    why = why_dropped(FINE, Tally(statuses))
    assert (why and why["reason"]) == reason
    if why and correct + wrong:
        assert why["pass_rate"] == round(correct / (correct + wrong), 4)


def test_what_could_not_be_solved_is_named_for_it_whatever_its_pass_rate() -> None:
    good = Tally(Counter({"correct": 1, "wrong": 1}))
    assert why_dropped(Gold("unparsable", "why"), good) == {"reason": "gold_unparsable", "detail": "why"}
    assert why_dropped(Gold("fails"), None) == {"reason": "gold_fails", "detail": ""}
    assert why_dropped(FINE, None) == {"reason": "over_limit"}
    assert why_dropped(Gold("unchecked"), good) is None


def length(rollout_id: str) -> int:
    """An odd number as often, in eight, as the prompt's number says."""
    prompt = rollout_id.removeprefix("eval:").partition("#")[0]
    digest = blake2b(rollout_id.encode(), digest_size=2).digest()
    return 2 + 2 * (digest[0] % 12) + (digest[1] % 8 < int(prompt) % 9)


class LengthRewards:
    """By the length: of every seven one is no judgement, and odd others are right."""

    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [score_of(len(rollout.tokens)) for rollout in rollouts]

    def close(self) -> None: ...


def score_of(length: int) -> Score:
    if length % 7 == 0:
        return Score(0.0, "timeout")
    return Score(1.0, "correct") if length % 2 else Score(0.0, "wrong")


def scripted(dies_after: int | None = None) -> Callable[[EvalRun], None]:
    """evaluation.run_eval over a scripted engine."""

    def sample(config: EvalRun) -> None:
        out = Path(config.out)
        out.mkdir(exist_ok=True)
        assert config.data.tokenizer
        tokenizer = load_tokenizer(config.data.tokenizer)
        prompts = read_prompts(config.data.eval, tokenizer, config.max_prompt_tokens, config.data)
        [prompt_tokens] = {len(prompt.tokens) for prompt in prompts}  # a scripted engine serves one length of prompts
        engine = ScriptedEngine("a", prompt_tokens, length)
        engine.dies_after = dies_after
        with asyncio.Runner() as runner:
            evaluator = Evaluator(
                config=config.eval,
                prompts=prompts,
                sampling=SamplingParams(max_response_tokens=config.max_response_tokens),
                engines=ScriptedEngines([engine]),
                rewards=LengthRewards(),
                encode=tokenizer.encode,
                decode=str,
                runner=runner,
            )
            evaluator.metrics(Responses(out / "responses.jsonl", {"prompts": fingerprint(prompts)}))

    return sample


def direct_count(prompt_id: str) -> str | None:
    """Why the prompt is dropped, from the engine's script and the reward's rule alone."""
    judged = [n for i in range(SAMPLES) if (n := length(f"eval:{prompt_id}#{i}")) % 7]
    if 2 * len(judged) < SAMPLES:
        return "unjudged"
    rate = sum(n % 2 for n in judged) / len(judged)
    return None if LOW <= rate <= HIGH else "too_hard" if rate < LOW else "too_easy"


@pytest.fixture(scope="module")
def tool(repo_root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("filter_by_pass_rate", repo_root / "tools" / "filter_by_pass_rate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tool: Any, tmp_path: Path) -> EvalRun:
    rows = [{"prompt": f"{i:02d}+1=", "answer": str(i + 1), "verifier": "exact", "domain": "sums"} for i in range(60)]
    rows.insert(7, {**rows[0], "answer": " "})
    rows.insert(20, {**rows[0], "prompt": "1+" * 20})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_sentencepiece(["0123456789+-= #"], tmp_path / "tokenizer.model", 24)
    overrides = [f"out={tmp_path}/out", "checkpoint=scripted", f"data.eval={tmp_path}/train.jsonl", "engine=cpu"]
    overrides += [f"data.tokenizer={tmp_path}/tokenizer.model", f"max_prompt_tokens={LIMIT}", f"eval.samples={SAMPLES}"]
    found: EvalRun = tool.configuration(overrides)
    return found


def test_the_filter_agrees_with_a_direct_count(tool: Any, config: EvalRun) -> None:
    summary = tool.filtered(config, LOW, HIGH, scripted())
    expected = {str(i): direct_count(str(i)) for i in range(1, 63)} | {"8": "gold_unparsable", "21": "over_limit"}
    out, source = Path(config.out), [json.loads(line) for line in Path(config.data.eval).read_text().splitlines()]
    assert rows(out / "kept.jsonl") == [row for i, row in enumerate(source, 1) if expected[str(i)] is None]
    dropped = rows(out / "dropped.jsonl")
    assert {row["row"].rpartition(":")[2]: row["reason"] for row in dropped} == {i: why for i, why in expected.items() if why}
    counts = Counter(expected.values())
    assert summary["kept"] == counts.pop(None) and summary["dropped"] == counts and summary["samples"] == 60 * SAMPLES
    assert {"too_hard", "too_easy"} <= set(counts), "the script must have both ends"
    for row in rows(out / "rates.jsonl"):
        judged = [n for i in range(SAMPLES) if (n := length(f"eval:{row['id']}#{i}")) % 7]
        if row["samples"]:
            assert row["pass_rate"] == round(sum(n % 2 for n in judged) / len(judged), 4)


def test_another_band_costs_no_samples_and_other_prompts_are_refused(tool: Any, config: EvalRun) -> None:
    def never(config: EvalRun) -> None:
        raise AssertionError("it samples again")

    assert tool.filtered(config, 0.0, 0.1, scripted())["kept"] != tool.filtered(config, 0.0, 1.0, never)["kept"]
    assert tool.filtered(config, 0.0, 1.0, never)["kept"] == 60 - unjudged(config)
    source = Path(config.data.eval)
    text = source.read_text()
    for changed in (text.replace('"01+1="', '"11+1="'), text[: text.rindex("{")]):
        source.write_text(changed)
        with pytest.raises(UserError, match=r"not the prompts that .* began with"):
            tool.filtered(config, 0.0, 1.0, never)
    source.write_text(text)
    other = config.model_copy(update={"max_response_tokens": 5})
    with pytest.raises(UserError, match="made from other input or settings"):
        tool.filtered(other, 0.0, 1.0, never)


def unjudged(config: EvalRun) -> int:
    return sum(row.get("reason") == "unjudged" for row in rows(Path(config.out) / "dropped.jsonl"))


def test_a_filter_that_lost_its_engine_goes_on_and_writes_the_same_files(tool: Any, config: EvalRun, tmp_path: Path) -> None:
    tool.filtered(config, LOW, HIGH, scripted())
    cut = config.model_copy(update={"out": str(tmp_path / "cut")})
    with pytest.raises(EngineLost):
        tool.filtered(cut, LOW, HIGH, scripted(dies_after=3))
    partial = (tmp_path / "cut" / "samples" / "responses.partial.jsonl").read_text().splitlines()
    assert 1 < len(partial) < 60 * SAMPLES
    tool.filtered(cut, LOW, HIGH, scripted())
    for name in ("kept.jsonl", "dropped.jsonl", "rates.jsonl", "samples/responses.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (Path(config.out) / name).read_bytes()


def test_only_the_sampled_pass_is_counted() -> None:
    row = {"pass": "sampled", "prompt_id": "p", "status": "correct", "finish_reason": "length"}
    tally = tallies([row, {**row, "pass": "greedy"}, {**row, "status": "wrong", "finish_reason": "stop"}])["p"]
    assert tally.as_dict() == {"pass_rate": 0.5, "samples": 2, "truncated": 1, "statuses": {"correct": 1, "wrong": 1}}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
