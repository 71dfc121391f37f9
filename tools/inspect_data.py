"""What is in a prompt file, before a run finds out: see `python tools/inspect_data.py --help`."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_rl import rundir
from megatron_rl.config import UserError
from megatron_rl.config.data import Columns, RowFormat
from megatron_rl.data.gold import Gold, gold_answers, text_of
from megatron_rl.data.inspection import Note, note, summarised
from megatron_rl.data.prompts import prompt_of, prompt_text
from megatron_rl.data.rows import our_row, question
from megatron_rl.data.sources import Row, is_foreign, read_rows
from megatron_rl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rl.observability.console import set_up_logging
from megatron_rl.observability.counting import counted
from megatron_rl.resumable import ResumableRows
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.types import Prompt

BATCH = 256  # rows at a time to the tokenizer and the verifiers
EXAMPLES = """examples:
  python tools/inspect_data.py train.jsonl --tokenizer runs/quickstart/data/tokenizer.model --limit 1024
  python tools/inspect_data.py train.parquet --tokenizer Ling-mini-2.0 --chat-template --out inspected
  python tools/inspect_data.py gsm8k.jsonl --column prompt=question --verifier math --answer-after '####' --json

FILE is JSONL or Parquet by its suffix, or datasets:NAME[:CONFIGURATION][@SPLIT]; verl's rows are read as they are. With --out, DIR
gets rows.jsonl (a line a row: tokens, domain, verifier, what the verifier says of the gold answer) and summary.json, and one that
was killed goes on with the same command. Exit codes: 0 done, 1 the file cannot be read, 2 a wrong command line."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="inspect_data.py",
        description=__doc__.partition(":")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="FILE")
    parser.add_argument("--tokenizer", metavar="PATH", help="counts tokens: a SentencePiece model or a Hugging Face directory")
    parser.add_argument("--chat-template", action="store_true", help="as data.chat_template")
    parser.add_argument("--limit", type=int, metavar="N", help="tokens a prompt may have, as rollout.max_prompt_tokens")
    parser.add_argument("--column", action="append", default=[], metavar="KEY=NAME", help="as data.columns: prompt=question")
    parser.add_argument("--verifier", metavar="NAME", help="of rows that name none, as data.verifier")
    parser.add_argument("--domain", metavar="NAME", help="of rows that name none, as data.domain")
    parser.add_argument("--answer-after", metavar="TEXT", help="as data.answer_after")
    parser.add_argument("--no-gold", action="store_true", help="do not give gold answers to their verifiers")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="that verify (default: 1)")
    parser.add_argument("--timeout-s", type=float, default=10.0, metavar="S", help="of an answer (default: 10)")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args()
    if args.workers < 1 or args.timeout_s <= 0:
        parser.error("--workers has to be at least 1, and --timeout-s above 0")
    if args.tokenizer is None and (args.limit is not None or args.chat_template):
        parser.error("--limit and --chat-template need --tokenizer")
    for column in args.column:
        if column.partition("=")[0] not in Columns.model_fields or not column.partition("=")[2]:
            parser.error(f"--column {column}: expected KEY=NAME, with a key of {', '.join(Columns.model_fields)}")
    return args


def main() -> None:
    args = arguments()
    set_up_logging(0)
    logging.getLogger("megatron_rl.rewards").setLevel(logging.ERROR)  # the summary says what verifiers cannot read
    try:
        if args.out is None:
            with TemporaryDirectory() as folder:
                summary = inspect(args, Path(folder))
        else:
            with rundir.owned("--out", args.out):
                summary = inspect(args, args.out)
        print(json.dumps(summary, indent=1)) if args.json else show(summary, args.limit)
    except UserError as error:
        print(f"inspect_data.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from here" if args.out else ""
        print(f"inspect_data.py: interrupted{goes_on}", file=sys.stderr)
        sys.exit(130)


def inspect(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    about = {key: value for key, value in vars(args).items() if key not in ("out", "json", "workers", "limit")}
    notes = ResumableRows(out / "rows.partial.jsonl", about)
    there = len(notes.rows)
    rewards = None if args.no_gold else RewardPool(args.workers, args.timeout_s, text_of)
    try:
        rows = islice(counted(read_rows(args.source), "rows", skipped=there), there, None)
        while batch := list(islice(rows, BATCH)):
            for each in inspected(batch, args, tokenizer, rewards):
                notes.add(asdict(each))
    finally:
        notes.close()
        if rewards:
            rewards.close()
    summary = summarised([Note(**each) for each in notes.rows], args.limit)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "rows.jsonl").write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in notes.rows))
    notes.remove()
    return summary


def inspected(
    batch: Sequence[tuple[str, Row]], args: argparse.Namespace, tokenizer: Tokenizer | None, rewards: RewardPool | None
) -> Iterator[Note]:
    columns = Columns(**dict(column.split("=", 1) for column in args.column))
    chat = args.chat_template or tokenizer is None
    format = RowFormat(
        chat_template=chat, columns=columns, verifier=args.verifier, domain=args.domain, answer_after=args.answer_after
    )
    prompts: list[Prompt | Note] = []
    for where, found in batch:
        try:
            row = our_row(found, where, format, is_foreign(args.source))
        except UserError as error:
            prompts.append(Note(where, fault=str(error)))
            continue
        text = prompt_text(row, tokenizer, args.chat_template) if tokenizer else question(row, where)
        prompts.append(prompt_of(row, where, text, tokenizer.encode(text) if tokenizer else ()))
    good = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    golds = iter(asyncio.run(gold_answers(good, rewards)) if rewards else [Gold("unchecked")] * len(good))
    for (where, _), each in zip(batch, prompts, strict=True):
        yield each if isinstance(each, Note) else note(where, each, next(golds))


def show(summary: dict[str, Any], limit: int | None) -> None:
    table = Table("", "rows", "", box=None)
    table.add_row("all", f"{summary['rows']:,}", "")
    table.add_row("faulty", f"{summary['faulty']:,}", "")
    if "over_limit" in summary:
        table.add_row("over the limit", f"{summary['over_limit']:,}", f"more than {limit:,} tokens")
    table.add_row("duplicates", f"{summary['duplicates']:,}", f"{summary['conflicts']:,} with another answer than the first")
    for title, key in (("domain", "domains"), ("verifier", "verifiers"), ("gold answer", "gold")):
        for name, count in summary[key].items():
            table.add_row(title, f"{count:,}", escape(name))
            title = ""
    console = Console(highlight=False)
    console.print(table)
    if "tokens" in summary:
        console.print("tokens  " + "  ".join(f"{name} {value:,.0f}" for name, value in summary["tokens"].items()))
    for words in (*summary["faults"], *summary["gold_faults"], *(f"{row}: another answer" for row in summary["conflict_rows"])):
        console.print(escape(words), soft_wrap=True)


if __name__ == "__main__":
    main()
