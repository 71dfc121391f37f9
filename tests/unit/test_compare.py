"""tools/compare_logprobs.py: its numbers against a direct computation, with checkpoints of all kinds; what it says of bad input."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_policy import loaded_policy
from tiny_families import model_of, write_family

from megatron_rl.algorithms.batch import PackedBatch, Support
from megatron_rl.checkpoint.store import CheckpointStore
from megatron_rl.compare import compare, version_of
from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ParallelConfig
from megatron_rl.observability.rollout_rows import FLOATS, packed
from megatron_rl.observability.tracker import RunTracker
from megatron_rl.policy import MegatronRanks
from megatron_rl.types import Group, Prompt, Rollout, Score

TEMPERATURE, STEP = 0.7, 9  # the dump's step: trained by weights version 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a run's checkpoints/step_8 of the same weights, its configuration and its dump of step 9; in `exact.json` the log-probs
    that the policy itself gives its tokens, in the order of the dump. A part of the second response has supports."""
    run = tmp_path_factory.mktemp("compare")
    write_family(run / "hf", "qwen3_moe", seed=3, num_hidden_layers=2)
    model, alone = model_of(json.loads((run / "hf/config.json").read_text())), ParallelConfig()
    record = {
        "model": model.model_dump(mode="json"),
        "data": {"tokenizer": str(run / "tokenizer.model")},
        "rollout": {"temperature": TEMPERATURE},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(record))
    random = torch.Generator().manual_seed(0)
    tokens = [torch.randint(model.vocab_size, (length,), generator=random) for length in (12, 30, 5, 21)]
    ranks = MegatronRanks(alone, model)
    policy = loaded_policy(run / "hf", model, alone, ranks)
    ends = torch.tensor([0, *map(len, tokens)]).cumsum(0)
    mask_T = torch.ones(int(ends[-1]))
    cut = slice(int(ends[1]) + 10, int(ends[2]) - 5)
    left_TV = torch.zeros(len(mask_T), model.vocab_size, dtype=torch.bool)
    left_TV[cut] = torch.rand(left_TV[cut].shape, generator=torch.Generator().manual_seed(1)) < 0.1
    left_TV[cut].scatter_(1, torch.cat(tokens)[cut, None], True)
    tokens_K, ids_K = left_TV.nonzero(as_tuple=True)
    batch = PackedBatch(torch.cat(tokens), ends.to(torch.int32), mask_T, support=Support(ids_K, tokens_K))
    (logprobs_T,) = policy.logprobs([batch], TEMPERATURE)
    CheckpointStore(run / "checkpoints", policy, ranks, 1, lambda path: None).save(8, {})
    ranks.close()
    prompt_tokens, rollouts, exact = 4, [], []
    for number, (sequence, logprobs) in enumerate(zip(tokens, logprobs_T.split([len(t) for t in tokens]), strict=True)):
        response, own = tuple(sequence[prompt_tokens:].tolist()), logprobs[prompt_tokens:]
        engine = own + torch.randn(len(own), generator=random) ** 3 * 0.3
        versions = tuple(min(8, 3 + number + t // 4) for t in range(len(response)))
        prompt = Prompt(f"p{number}", "?", tuple(sequence[:prompt_tokens].tolist()), "a", "exact")
        left = left_TV[ends[number] + prompt_tokens : ends[number + 1]]
        support = tuple(array("i", ids.nonzero().flatten().tolist()).tobytes() for ids in left)
        sampled = Rollout(f"0:p{number}#0", prompt, 0, response, tuple(engine.tolist()), versions, "stop", support=support)
        rollouts.append(sampled)
        exact.append(own.tolist())
    silent = Rollout("0:silent#0", rollouts[0].prompt, 0, (), (), (), "length")
    groups = [Group(r.id, r.prompt, (r,), (Score(0.0, "wrong"),)) for r in (*rollouts, silent)]
    RunTracker(run, steps=9, decode=str, tensorboard=False, rollouts_every=1, rollouts_kept=9).rollouts(STEP, groups)
    numbers = [
        {"old": old, "engine": engine, "age": 8 - version}
        for r, own in zip(rollouts, exact, strict=True)
        for old, engine, version in zip(own, r.engine_logprobs, r.versions, strict=True)
    ]
    (run / "exact.json").write_text(json.dumps(numbers))
    return run


@pytest.fixture(scope="module")
def dump(run: Path) -> Path:
    return run / f"rollouts/step_{STEP}.jsonl"


def expected(run: Path) -> dict[str, Any]:
    """Of all tokens, in float64."""
    rows = json.loads((run / "exact.json").read_text())
    old, engine, age = (np.array([row[name] for row in rows]) for name in ("old", "engine", "age"))
    log_k = old - engine
    k = np.exp(log_k)
    named = {"0": age == 0, "1": age == 1, "2-3": (age > 1) & (age < 4), "4-7": age > 3}
    return {
        "mismatch/gap_mean": np.abs(log_k).mean(),
        "mismatch/gap_max": np.abs(log_k).max(),
        "mismatch/prob_gap_mean": np.abs(np.exp(old) - np.exp(engine)).mean(),
        "mismatch/kl_engine_train": (k - 1 - log_k).mean(),
        "mismatch/ess": k.sum() ** 2 / (len(k) * (k**2).sum()),
        "mismatch/masked_low_fraction": (k < 0.5).mean(),
        "mismatch/masked_high_fraction": (k > 5).mean(),
        **{f"mismatch/by_age/{name}/gap_mean": np.abs(log_k[those]).mean() for name, those in named.items()},
        **{f"mismatch/by_age/{name}/share": those.mean() for name, those in named.items()},
    }


def test_numbers_agree_with_a_direct_computation_for_checkpoints_of_all_kinds(run: Path, dump: Path) -> None:
    of_run = compare([dump], run / "checkpoints/step_8")
    of_hf = compare([dump], run / "hf", version=8, microbatch_tokens=20)
    assert (of_run.version, of_hf.version) == (8, 8)
    assert of_run.sampled_by == of_hf.sampled_by == Counter(8 - row["age"] for row in json.loads((run / "exact.json").read_text()))
    for found in (of_run, of_hf):
        assert (found.rollouts, found.tokens, found.temperature) == (4, 52, TEMPERATURE)
        for name, value in expected(run).items():
            assert found.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-9), name
        counts = [sum(found.histograms[f"mismatch/gap_{side}"]["counts"]) for side in ("above", "below")]
        assert sum(counts) == 52
    assert of_hf.metrics == pytest.approx(of_run.metrics, rel=1e-4, abs=1e-7)


def test_version_and_temperature_are_those_given(run: Path, dump: Path) -> None:
    found = compare([dump], run / "hf", version=20, temperature=1.0, low=0.0, high=1e9)
    assert found.metrics["mismatch/by_age/8_up/share"] == 1.0
    assert found.metrics["mismatch/masked_low_fraction"] == found.metrics["mismatch/masked_high_fraction"] == 0.0
    assert found.metrics["mismatch/gap_mean"] != pytest.approx(expected(run)["mismatch/gap_mean"], rel=0.1)
    older = compare([dump], run / "hf", version=0)
    assert older.metrics["mismatch/by_age/4-7/share"] > 0.5  # older than the tokens


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        compare(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_dumps_are_named_with_their_line(run: Path, dump: Path, tmp_path: Path) -> None:
    good = dump.read_text().splitlines()
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    file = tmp_path / "rollouts/step_3.jsonl"

    def written(*lines: str) -> Path:
        file.write_text("\n".join(lines) + "\n")
        return file

    assert refused([written(good[0], good[1][:200])], run / "hf").startswith(f"{file}:2: not valid JSON")
    text_only = json.dumps({key: value for key, value in json.loads(good[0]).items() if key != "response_ids"})
    assert refused([written(text_only)], run / "hf") == (
        f"{file}:1: no 'response_ids': a dump without the tokens and log-probs of its rollouts"
    )
    assert refused([written(good[-1])], run / "hf") == f"{file}: no response has a token"
    assert "no such file" in refused([tmp_path / "rollouts/step_4.jsonl"], run / "hf")
    row = json.loads(good[0])
    assert refused([written(good[1], json.dumps(row | {"prompt_ids": ""}))], run / "hf").startswith(
        f"{file}:2: 'prompt_ids' is empty"
    )
    likely = packed([-0.5, 0.25, *[-1.0] * (row["tokens"] - 2)], FLOATS)
    assert refused([written(json.dumps(row | {"engine_logprobs": likely}))], run / "hf") == (
        f"{file}:1: 0.25 as the log-prob of response token 1: above 0"
    )
    stray = tmp_path / "step_9.jsonl"
    stray.write_text(good[0] + "\n")
    assert f"{stray}: there is no " in refused([stray], run / "hf")
    assert math.isfinite(compare([stray], run / "hf", temperature=1.0, version=0).metrics["mismatch/gap_mean"])


def test_a_version_is_known_from_the_dumps_own_run_or_asked_for(run: Path, dump: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "checkpoints/step_8"
    elsewhere.mkdir(parents=True)
    assert version_of(run / "checkpoints/step_8", [dump]) == 8
    for unknown in (run / "hf", elsewhere):
        with pytest.raises(UserError, match=r"not on record which of the run's weights these are: --version N"):
            version_of(unknown, [dump])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_from": str(run / "hf")}}))
    assert version_of(run / "hf", [tmp_path / "rollouts/step_1.jsonl"]) == 0
    with pytest.raises(UserError, match="--version N"):
        version_of(run / "hf", [tmp_path / "rollouts/step_1.jsonl", dump])


def test_bad_checkpoints_are_named(run: Path, dump: Path, tmp_path: Path) -> None:
    smaller = write_family(tmp_path / "smaller", "qwen3_moe", seed=0, num_hidden_layers=1, vocab_size=32)
    message = refused([dump], smaller)
    assert message.startswith(f"{dump}:1: token id ") and f"{smaller} has a vocabulary of 32: it is of another model" in message
    assert refused([dump], tmp_path / "nothing").startswith(f"{tmp_path / 'nothing'}: no such folder; give a Hugging Face")
    assert "has neither config.json nor .metadata" in refused([dump], tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    assert refused([dump], tmp_path).startswith(f"{tmp_path / 'config.json'}: architectures=['Other']: not one of")


def test_the_tool_as_a_user_meets_it(
    run: Path, dump: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = repo_root / "tools/compare_logprobs.py"

    def printed(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, arguments)])
        runpy.run_path(str(tool), run_name="__main__")
        return capsys.readouterr().out

    found = json.loads(printed(dump, "--checkpoint", run / "checkpoints/step_8", "--json"))
    assert found["metrics"]["mismatch/gap_mean"] == pytest.approx(expected(run)["mismatch/gap_mean"], rel=1e-4)
    shown = printed(dump, "--checkpoint", run / "hf", "--version", 8)
    assert f"{found['metrics']['mismatch/gap_mean']:.3g}" in shown
    for words in (
        "52 tokens of 4 rollouts",
        "weights version 8",
        "sampled by that version: ",
        "temperature 0.7; masked outside [0.5, 5]",
        "4 to 7",
        "top 5 %",
        "effective sample size",
    ):
        assert words in shown, words
    with pytest.raises(SystemExit) as caught:
        printed(dump, "--checkpoint", run, "--low", 5)
    assert caught.value.code == 2 and "--low=5 --high=5: no band" in capsys.readouterr().err
    command = [sys.executable, tool, dump, "--checkpoint", run / "nothing"]
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == (
        f"compare_logprobs.py: error: {run / 'nothing'}: no such folder; "
        "give a Hugging Face checkpoint, a conversion's, or a run's checkpoints/step_N\n"
    )
