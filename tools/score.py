"""Responses against gold answers, offline: any verifier over a JSONL file. See `score.py --help`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rl import verifiers
from megatron_rl.config import UserError, validate
from megatron_rl.config.rollout import CodeConfig
from megatron_rl.data.jsonl import field as typed
from megatron_rl.data.jsonl import read_jsonl
from megatron_rl.observability.console import set_up_logging
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.worker import Limits
from megatron_rl.types import Prompt, Rollout, Score

EXAMPLES = """examples:
  python tools/score.py --verifier math --in pairs.jsonl --out scored.jsonl
  python tools/score.py --verifier math --in pairs.jsonl --out scored.jsonl --math-mode strict --disagreements 50
  python tools/score.py --verifier code --in solutions.jsonl --out scored.jsonl --workers 2 --code-marks fraction --timeout-s 30

A row has `response` and `gold`, and may have `metadata` (what the verifier needs), `source` and a label: `is_correct`, or `label`
where that is true or false. The output has a row for each, in order: value, status, extracted, reason, seconds, and the id and
source of its input; it appears when all are scored. With labels a table says how often value > 0 agrees with them, by source.
Exit codes: 0 scored, 1 a file is wrong, 2 the command line is."""

BATCH = 512  # rows in memory
STATUSES = ("correct", "wrong", "unparsable", "timeout", "error")


@dataclass
class Tally:
    rows: int = 0
    labelled: int = 0
    agreed: int = 0
    statuses: Counter[str] = field(default_factory=Counter)

    def add(self, score: Score, label: bool | None) -> None:
        self.rows += 1
        self.statuses[score.status] += 1
        self.labelled += label is not None
        self.agreed += label is not None and label == (score.value > 0)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="score.py",
        description="Score responses against gold answers, in killable workers, as training does.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verifier", required=True, choices=sorted(verifiers.MODULES))
    parser.add_argument("--in", dest="source", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=10.0, help="wall time of a response (default 10)")
    parser.add_argument("--cpu-s", type=float, default=5.0, help="processor time of a response (default 5)")
    parser.add_argument("--memory-mb", type=int, default=4096, help="address space of a worker (default 4096)")
    parser.add_argument("--math-mode", choices=("lenient", "strict"), default="lenient")
    code = parser.add_argument_group("programs, of --verifier code or mixture; as reward.code.* in training")
    code.add_argument("--code-marks", choices=("all", "fraction"), help="1 if every test passes, or the share (default all)")
    code.add_argument("--code-timeout-s", type=float, help="wall time of a response's programs (default 5)")
    code.add_argument("--code-memory-mb", type=int, help="memory of a sandbox (default 512)")
    code.add_argument("--code-unsafe", action="store_true", default=None, help="without a sandbox where none can be made")
    parser.add_argument("--disagreements", type=int, default=20, metavar="N", help="how many to print (default 20)")
    args = parser.parse_args(argv)
    for key in ("workers", "timeout_s", "cpu_s", "memory_mb"):
        if getattr(args, key) <= 0:
            parser.error(f"--{key.replace('_', '-')} must be above 0")
    keys = ("marks", "timeout_s", "memory_mb", "unsafe")
    given = {key: value for key in keys if (value := getattr(args, f"code_{key}")) is not None}
    if given and args.verifier not in ("code", "mixture"):
        parser.error(f"--code-{min(given).replace('_', '-')}: without effect, needs --verifier code or mixture")
    try:
        args.code = validate(CodeConfig, given)
    except UserError as error:
        parser.error(f"--code-{error}".replace("_", "-"))
    return args


def prompt_of(where: str, row: dict[str, Any], verifier: str) -> Prompt:
    metadata = typed(row, "metadata", dict, where) if "metadata" in row else {}
    if fault := verifiers.fault(verifier, metadata):
        raise UserError(f"{where}: {fault}", exit_code=1)
    return Prompt(where, "", (), typed(row, "gold", str, where), verifier, metadata=metadata)


def label_of(row: Mapping[str, Any]) -> bool | None:
    return next((row[key] for key in ("is_correct", "label") if isinstance(row.get(key), bool)), None)


def batches(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    while batch := list(islice(rows, BATCH)):
        yield batch


def output_row(row: Mapping[str, Any], score: Score) -> str:
    kept = {key: row[key] for key in ("id", "source") if key in row}
    judged = {"value": score.value, "status": score.status, "extracted": score.extracted, "reason": score.reason}
    return json.dumps(kept | judged | {"seconds": round(score.seconds, 6)}, ensure_ascii=False) + "\n"


def table(tallies: Mapping[str, Tally]) -> Table:
    out = Table()
    for column in ("source", "rows", "agreement", *STATUSES):
        out.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    everything = Tally(
        sum(tally.rows for tally in tallies.values()),
        sum(tally.labelled for tally in tallies.values()),
        sum(tally.agreed for tally in tallies.values()),
        sum((tally.statuses for tally in tallies.values()), Counter()),
    )
    for name, tally in [*tallies.items(), ("all", everything)]:
        share = f"{tally.agreed}/{tally.labelled} {tally.agreed / tally.labelled:7.2%}" if tally.labelled else "-"
        out.add_row(name, str(tally.rows), share, *(str(tally.statuses[status]) for status in STATUSES))
    return out


def disagreement(where: str, row: Mapping[str, Any], score: Score) -> tuple[str, ...]:
    label = "correct" if label_of(row) else "wrong"
    extracted = "-" if score.extracted is None else score.extracted
    return (
        where.rpartition(":")[2],
        str(row.get("source", "")),
        label,
        score.status,
        row["gold"][-80:],
        extracted[-80:],
        score.reason[:120],
    )


async def score_file(args: argparse.Namespace, console: Console) -> None:
    texts: list[str] = []
    tallies: dict[str, Tally] = {}
    shown = Table(title="disagreements with the labels")
    for column in ("line", "source", "label", "status", "gold", "extracted", "reason"):
        shown.add_column(column, overflow="fold")
    pool = RewardPool(
        args.workers,
        args.timeout_s,
        lambda tokens: texts[tokens[0]],
        {args.verifier: verifiers.MODULES[args.verifier]} if args.verifier != "mixture" else verifiers.MODULES,
        limits=Limits(args.cpu_s, args.memory_mb),
        metadata={"math_mode": args.math_mode},
        code=args.code.model_dump(),
    )
    partial = args.out.with_name(f"{args.out.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            for batch in batches(read_jsonl(args.source)):
                texts[:] = [typed(row, "response", str, where) for where, row in batch]
                prompts = [prompt_of(where, row, args.verifier) for where, row in batch]
                scores = await pool.score([Rollout(p.id, p, 0, (i,), (0.0,), (0,)) for i, p in enumerate(prompts)])
                for (where, row), score in zip(batch, scores, strict=True):
                    out.write(output_row(row, score))
                    tallies.setdefault(str(row.get("source", "-")), Tally()).add(score, label_of(row))
                    if label_of(row) not in (None, score.value > 0) and shown.row_count < args.disagreements:
                        shown.add_row(*map(escape, disagreement(where, row, score)))
        partial.replace(args.out)
    finally:
        pool.close()
        partial.unlink(missing_ok=True)
    console.print(table(tallies))
    if shown.row_count:
        console.print(shown)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    set_up_logging(0)
    try:
        asyncio.run(score_file(args, Console(width=max(150, Console().width))))
    except UserError as error:
        print(f"score.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"score.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
