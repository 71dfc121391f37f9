"""Prompts that a model solves sometimes: see `python tools/filter_by_pass_rate.py --help`."""

from __future__ import annotations

import argparse
import asyncio
import filecmp
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from megatron_rl import rundir
from megatron_rl.__main__ import conf_dir
from megatron_rl.config import EvalRun, UserError, validate
from megatron_rl.config.data import EvalData
from megatron_rl.config.rollout import RewardConfig
from megatron_rl.data.gold import USABLE, Gold, gold_answers, text_of
from megatron_rl.data.jsonl import read_jsonl
from megatron_rl.data.pass_rate import HIGH, LOW, tallies, why_dropped
from megatron_rl.data.prompts import prompt_of, row_id
from megatron_rl.data.rows import our_row
from megatron_rl.data.sources import Row, is_foreign, read_rows
from megatron_rl.data.split import write_split
from megatron_rl.observability.console import set_up_logging
from megatron_rl.observability.counting import counted
from megatron_rl.resumable import ResumableRows
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.worker import Limits
from megatron_rl.types import EngineLost

BATCH = 256  # gold answers at a time to the verifiers
DEFAULTS = ["out=runs/filter", "eval.samples=16", "eval.temperature=1.0"]  # as training samples
REASONS = {
    "gold_unparsable": "the verifier cannot read the gold answer",
    "gold_fails": "the gold answer does not verify against itself",
    "gold_timeout": "the verifier does not come to an end with it",
    "over_limit": "more than max_prompt_tokens",
    "unjudged": "the verifier judged less than half of the samples",
    "too_hard": "pass rate below --low",
    "too_easy": "pass rate above --high",
}
EXAMPLES = """examples:
  python tools/filter_by_pass_rate.py checkpoint=Ling-mini-2.0 data.eval=train.parquet data.chat_template=true out=filtered
  python tools/filter_by_pass_rate.py checkpoint=DIR data.eval=train.jsonl out=filtered eval.samples=64 --low 0.2 --high 0.8

Overrides are those of `megatron-rl eval`; data.eval names the prompts, each of which is sampled eval.samples (16) times at
eval.temperature (1.0). OUT gets kept.jsonl (or .parquet), dropped.jsonl with the reason, rates.jsonl (a line a prompt), gold.jsonl
(what verifiers say of their own gold answers; those that cannot be right are not sampled), samples/responses.jsonl and
summary.json. One that was killed goes on with the same command; another --low and --high cost no samples."""

Sample = Callable[[EvalRun], None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="filter_by_pass_rate.py",
        description=__doc__.partition(":")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--low", type=float, default=LOW, metavar="RATE", help=f"lowest pass rate that is kept (default: {LOW})")
    parser.add_argument("--high", type=float, default=HIGH, metavar="RATE", help=f"highest (default: {HIGH})")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_intermixed_args()
    if not 0 <= args.low <= args.high <= 1:
        parser.error("expected 0 <= --low <= --high <= 1")
    return args


def main() -> None:
    args = arguments()
    set_up_logging(0)
    try:
        config = configuration(args.overrides)
        with redirect_stdout(sys.stderr):
            from megatron_rl.evaluation import run_eval  # seconds

            summary = filtered(config, args.low, args.high, run_eval)
        print(json.dumps(summary, indent=1)) if args.json else show(summary)
    except UserError as error:
        fail(str(error), error.exit_code)
    except (EngineLost, TimeoutError) as error:
        fail(str(error), 1)
    except MissingMandatoryValue as error:
        fail(f"{error.full_key}: missing; give it as {error.full_key}=...", 2)
    except (HydraException, OmegaConfBaseException) as error:
        fail(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", 130)


def fail(message: str, code: int) -> None:
    print(f"filter_by_pass_rate.py: error: {message}", file=sys.stderr)
    sys.exit(code)


def configuration(overrides: Sequence[str]) -> EvalRun:
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("eval", [*DEFAULTS, *overrides]), resolve=True, throw_on_missing=True)
    config = validate(EvalRun, values)
    for key, only in (("greedy", False), ("forced_prefix", False), ("prompts", None)):
        if getattr(config.eval, key) != only:
            raise UserError(f"eval.{key}={getattr(config.eval, key)}: the filter samples every prompt freely, and nothing else")
    return config


def filtered(config: EvalRun, low: float, high: float, sample: Sample) -> dict[str, Any]:
    """`sample`: evaluation.run_eval, which writes <out>/responses.jsonl."""
    out, source = Path(config.out), config.data.eval
    with rundir.owned("out", out):
        about = config.model_dump(mode="json", exclude={"out", "engine"})
        golds = checked_gold(config, ResumableRows(out / "gold.jsonl", about))
        responses = out / "samples" / "responses.jsonl"
        candidates = write_candidates(config.data, golds, out / "candidates.jsonl", responses.exists())
        if candidates and not responses.exists():
            sample(sampling_of(config, out))
        found = tallies(row for _, row in read_jsonl(responses)) if candidates else {}
        decisions = [why_dropped(Gold(**gold["verdict"]), found.get(gold["id"]), low, high) for gold in golds]
        with (out / "rates.jsonl").open("w") as file:
            for gold in golds:
                tally = found[gold["id"]].as_dict() if gold["id"] in found else {"pass_rate": None, "samples": 0}
                file.write(json.dumps({"id": gold["id"], "gold": gold["verdict"]["status"], **tally}, ensure_ascii=False) + "\n")
        kept = write_split(source, out, decisions)
        reasons = Counter(decision["reason"] for decision in decisions if decision)
        summary = {
            "rows": len(golds),
            "kept": len(golds) - reasons.total(),
            "dropped": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
            "band": [low, high],
            "samples": sum(tally.samples for tally in found.values()),
            "kept_in": str(kept),
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def checked_gold(config: EvalRun, notes: ResumableRows) -> list[dict[str, Any]]:
    """{"id", "verdict": Gold} of every row."""
    source, there = config.data.eval, len(notes.rows)
    rewards: RewardPool | None = None
    try:
        rows = islice(counted(read_rows(source), "gold answers", skipped=there), there, None)
        while batch := list(islice(rows, BATCH)):
            rewards = rewards or pool(config.reward)
            prompts = [prompt_of(ours(row, where, config.data), where, "", ()) for where, row in batch]
            for prompt, gold in zip(prompts, asyncio.run(gold_answers(prompts, rewards)), strict=True):
                notes.add({"id": prompt.id, "verdict": asdict(gold)})
    finally:
        notes.close()
        if rewards:
            rewards.close()
    return notes.rows


def pool(reward: RewardConfig) -> RewardPool:
    """The run's verifiers, without what mixtures and lengths add."""
    metadata = {"math_mode": reward.math_mode, "format": reward.format}
    return RewardPool(reward.workers, reward.timeout_s, text_of, limits=Limits(reward.cpu_s, reward.memory_mb), metadata=metadata)


def ours(row: Row, where: str, data: EvalData) -> Row:
    return our_row(row, where, data, is_foreign(data.eval))


def write_candidates(data: EvalData, golds: Sequence[dict[str, Any]], path: Path, sampled: bool) -> int:
    """The prompts that a sample could solve, in our own format; their number. `sampled`: they must be what the file has."""
    changed = UserError(f"{data.eval}: not the prompts that {path.parent} began with; give out=... a new name", exit_code=1)
    number, partial = 0, path.with_suffix(".tmp")
    with partial.open("w") as file:
        for gold, found in zip_longest(golds, read_rows(data.eval)):
            if gold is None or found is None:
                raise changed
            if gold["verdict"]["status"] in USABLE:
                row = ours(found[1], found[0], data)
                file.write(json.dumps(row | {"id": row_id(row, found[0])}, ensure_ascii=False) + "\n")
                number += 1
    if sampled and not filecmp.cmp(partial, path, shallow=False):
        raise changed
    partial.replace(path)
    return number


def sampling_of(config: EvalRun, out: Path) -> EvalRun:
    data = EvalData(eval=str(out / "candidates.jsonl"), tokenizer=config.data.tokenizer, chat_template=config.data.chat_template)
    return config.model_copy(update={"out": str(out / "samples"), "data": data})


def show(summary: dict[str, Any]) -> None:
    table = Table("", "rows", "", box=None)
    table.add_row("prompts", f"{summary['rows']:,}", f"{summary['samples']:,} samples")
    for reason, words in REASONS.items():
        if reason in summary["dropped"]:
            table.add_row(reason, f"{summary['dropped'][reason]:,}", words)
    low, high = summary["band"]
    table.add_row("kept", f"{summary['kept']:,}", f"pass rate {low:g} to {high:g}: {summary['kept_in']}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
