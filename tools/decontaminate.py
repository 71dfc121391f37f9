"""Prompts without those that stand in a benchmark: see `python tools/decontaminate.py --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_rl import rundir
from megatron_rl.config import UserError
from megatron_rl.data.overlap import JACCARD, NGRAM, Benchmarks, Match
from megatron_rl.data.rows import question
from megatron_rl.data.sources import read_rows
from megatron_rl.data.split import write_split
from megatron_rl.observability.console import set_up_logging
from megatron_rl.observability.counting import counted
from megatron_rl.resumable import ResumableRows

RULES = {
    "exact": "equal but for numbers, case and white space",
    "ngram": "words in a row in common",
    "near": "of the runs of three words in common",
}
EXAMPLES = """examples:
  python tools/decontaminate.py --in train.jsonl --against aime24.jsonl math500.parquet --out clean
  python tools/decontaminate.py --in verl.parquet --ignore "Let's think step by step." --out clean \\
    --against datasets:openai/gsm8k:main@test

Files are JSONL or Parquet by their suffix, or datasets:NAME[:CONFIGURATION][@SPLIT]. The question is the first of the columns
prompt, messages, question and problem. DIR gets kept.jsonl (or .parquet), dropped.jsonl with the rule and the benchmark's row, and
summary.json. One that was killed goes on with the same command."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="decontaminate.py",
        description=__doc__.partition(":")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--in", dest="source", required=True, metavar="FILE", help="the prompts")
    parser.add_argument("--against", nargs="+", required=True, metavar="FILE", help="benchmarks")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--column", metavar="NAME", help="of the question in the prompts")
    parser.add_argument("--benchmark-column", metavar="NAME", help="of the question in the benchmarks")
    parser.add_argument("--ignore", action="append", default=[], metavar="TEXT", help="an instruction that is part of every prompt")
    parser.add_argument("--ngram", type=int, default=NGRAM, metavar="N", help=f"words in a row (default: {NGRAM})")
    parser.add_argument("--jaccard", type=float, default=JACCARD, metavar="J", help=f"of near duplicates (default: {JACCARD})")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args()
    if args.ngram < 1 or not 0 < args.jaccard <= 1:
        parser.error("--ngram has to be at least 1, and --jaccard above 0 and at most 1")
    return args


def main() -> None:
    args = arguments()
    set_up_logging(0)
    try:
        with rundir.owned("--out", args.out):
            summary = decontaminate(args)
        print(json.dumps(summary, indent=1)) if args.json else show(summary)
    except UserError as error:
        print(f"decontaminate.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("decontaminate.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def decontaminate(args: argparse.Namespace) -> dict[str, Any]:
    benchmarks = Benchmarks(texts(args.against, args.benchmark_column, args.ignore), args.ngram, args.jaccard)
    settings = {key: getattr(args, key) for key in ("source", "column", "ignore", "ngram", "jaccard")}
    decisions = ResumableRows(args.out / "decisions.partial.jsonl", settings | {"benchmarks": benchmarks.fingerprint})
    there = len(decisions.rows)
    try:
        for number, (_, text) in enumerate(counted(texts([args.source], args.column, args.ignore), "prompts", skipped=there)):
            if number >= there:
                decisions.add(reason(benchmarks.match(text)))
    finally:
        decisions.close()
    kept = write_split(args.source, args.out, decisions.rows)
    summary = summarised(decisions.rows) | {"benchmark_rows": len(benchmarks), "kept_in": str(kept)}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    decisions.remove()
    return summary


def texts(sources: Sequence[str], column: str | None, ignore: Sequence[str]) -> Iterator[tuple[str, str]]:
    for source in sources:
        for where, row in read_rows(source):
            text = question(row, where, column)
            for words in ignore:
                text = text.replace(words, "")
            yield where, text


def reason(match: Match | None) -> dict[str, Any] | None:
    return {"rule": match.rule, "benchmark": match.benchmark, "similarity": round(match.similarity, 3)} if match else None


def summarised(made: Sequence[Any]) -> dict[str, Any]:
    dropped = [decision for decision in made if decision]
    files = Counter(decision["benchmark"].rpartition(":")[0] for decision in dropped)
    return {
        "rows": len(made),
        "kept": len(made) - len(dropped),
        "dropped": dict(Counter(decision["rule"] for decision in dropped)),
        "dropped_by_benchmark": dict(files),
    }


def show(summary: dict[str, Any]) -> None:
    table = Table("", "rows", "", title=None, box=None)
    table.add_row("prompts", f"{summary['rows']:,}", "")
    for rule, words in RULES.items():
        table.add_row(rule, f"{summary['dropped'].get(rule, 0):,}", words)
    for name, count in summary["dropped_by_benchmark"].items():
        table.add_row("", f"{count:,}", f"in {name}")
    table.add_row("kept", f"{summary['kept']:,}", summary["kept_in"])
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
