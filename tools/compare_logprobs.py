"""Trainer against engine, offline: log-probs in rollout dumps against any checkpoint's. See `compare_logprobs.py --help`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rl.config import UserError
from megatron_rl.observability.console import set_up_logging
from megatron_rl.observability.mismatch_section import COLUMNS, GROUPS

if TYPE_CHECKING:
    from megatron_rl.compare import Comparison

EXAMPLES = """examples:
  the gap of a step, as the run measured it (version 40 trained on the rollouts of step 41):
    python tools/compare_logprobs.py runs/quickstart/rollouts/step_41.jsonl --checkpoint runs/quickstart/checkpoints/step_40
  how far the final policy has moved from what its first engines sampled:
    python tools/compare_logprobs.py runs/quickstart/rollouts/step_1.jsonl --checkpoint runs/quickstart/hf --version 60 --json
  several dumps together, against weights from elsewhere:
    python tools/compare_logprobs.py runs/NAME/rollouts/step_*.jsonl --checkpoint Ling-mini-2.0 --microbatch-tokens 4096

Log-probs are computed here, in one process, with the policy that trains and its own routing; on a GPU where there is one. A token's
age counts the versions between the weights that sampled it and the checkpoint's. Exit codes: 0 compared, 1 a file or checkpoint is
wrong, 2 the command line is."""

NUMBERS = (  # metric, what it is called
    ("mismatch/gap_mean", "|gap|, mean"),
    ("mismatch/gap_p50", "  median"),
    ("mismatch/gap_p99", "  99 %"),
    ("mismatch/gap_p99.9", "  99.9 %"),
    ("mismatch/gap_max", "  largest"),
    ("mismatch/prob_gap_mean", "|gap| in probability, mean"),
    ("mismatch/prob_gap_p99", "  99 %"),
    ("mismatch/prob_gap_max", "  largest"),
    ("mismatch/kl_engine_train", "KL(engine || checkpoint) per token, k3"),
    ("mismatch/kl_engine_train_k1", "  k1"),
    ("mismatch/ess", "effective sample size, share of tokens"),
    ("mismatch/masked_low_fraction", "masked, less likely than to the engine"),
    ("mismatch/masked_high_fraction", "  likelier"),
    ("mismatch/nonfinite", "tokens without a finite gap"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_logprobs.py",
        description="Log-probs that engines reported, from a run's rollout dumps, against those of any checkpoint:\n"
        "gap, KL, effective sample size and masked tokens, by age and by entropy.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rollouts", nargs="+", type=Path, metavar="FILE", help="runs/NAME/rollouts/step_N.jsonl")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a Hugging Face directory, a conversion's checkpoint, or a run's checkpoints/step_N",
    )
    parser.add_argument(
        "--temperature", type=float, help="of sampling; default: of the run that wrote the dump, from its config.yaml"
    )
    parser.add_argument(
        "--version",
        type=int,
        metavar="N",
        help="of the checkpoint's weights, as the dumps' run counts them; known of that run's own checkpoints/step_N and of what "
        "it started from (0), needed for all others",
    )
    parser.add_argument("--low", type=float, default=0.5, help="IcePop's band, outside of which a token is masked (default: 0.5)")
    parser.add_argument("--high", type=float, default=5.0, help="(default: 5)")
    parser.add_argument("--microbatch-tokens", type=int, default=8192, metavar="N", help="of a forward pass (default: 8192)")
    parser.add_argument("--json", action="store_true", help="one object instead of tables, with histograms of the gap")
    args = parser.parse_args()
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        parser.error(f"--temperature={args.temperature:g}: has to be positive (a greedy engine reports log-probs at 1)")
    if not 0 <= args.low < args.high < math.inf:
        parser.error(f"--low={args.low:g} --high={args.high:g}: no band")
    if args.microbatch_tokens < 1:
        parser.error(f"--microbatch-tokens={args.microbatch_tokens}: has to be positive")
    return args


def show(found: Comparison, args: argparse.Namespace, console: Console) -> None:
    console.print(
        f"{found.tokens:,} tokens of {found.rollouts:,} rollouts against {args.checkpoint}, weights version {found.version}"
    )
    console.print(samplers(found))
    console.print(f"temperature {found.temperature:g}; masked outside [{args.low:g}, {args.high:g}]; gaps in nats\n", markup=False)
    numbers = Table("all tokens", "", box=None, header_style="bold")
    numbers.columns[1].justify = "right"
    for metric, name in NUMBERS:
        numbers.add_row(name, text(found.metrics[metric]))
    console.print(numbers)
    for prefix, heading, groups, first in GROUPS:
        console.print()
        console.print(group_table(found.metrics, prefix, heading, groups, (first, *COLUMNS)))


def samplers(found: Comparison) -> str:
    own = found.sampled_by.get(found.version, 0)
    others = [version for version in found.sampled_by if version != found.version]
    said = f"sampled by that version: {own:,} of them ({own / found.tokens:.0%})"
    return said + (f"; by others, {min(others)} to {max(others)}: {found.tokens - own:,}" if others else "")


def group_table(
    metrics: Mapping[str, float],
    prefix: str,
    heading: str,
    groups: Sequence[tuple[str, str]],
    columns: Sequence[tuple[str, str, str]],
) -> Table:
    table = Table(heading, *(title for _, title, _ in columns), box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for group, name in groups:
        if f"{prefix}/{group}/gap_mean" in metrics:
            table.add_row(name, *(text(metrics[f"{prefix}/{group}/{metric}"], unit) for metric, _, unit in columns))
    return table


def text(value: float, unit: str = "") -> str:
    return f"{value:.2%}" if unit == "%" else f"{value:.3g}"


def main() -> None:
    args = arguments()
    set_up_logging(0)
    try:
        from megatron_rl.compare import compare  # seconds

        found = compare(
            args.rollouts,
            args.checkpoint,
            temperature=args.temperature,
            version=args.version,
            low=args.low,
            high=args.high,
            microbatch_tokens=args.microbatch_tokens,
        )
    except UserError as error:
        print(f"compare_logprobs.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if args.json:
        print(
            json.dumps(
                {"checkpoint": str(args.checkpoint), "dumps": [str(file) for file in args.rollouts]} | asdict(found), indent=1
            )
        )
    else:
        show(found, args, Console(width=None if sys.stdout.isatty() else 120, highlight=False))


if __name__ == "__main__":
    main()
