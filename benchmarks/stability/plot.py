"""The runs of run.py in a picture and a table.

    python benchmarks/stability/plot.py runs/stability [--png FILE]

Writes OUT/stability.png: reward, gradient norm, masked fraction and the gap in log-prob over the steps, a column for each setting,
a line for each variant: the mean over seeds, with a band from the least to the greatest. Prints a Markdown table of the same runs,
each number the mean over seeds unless it says otherwise:

- final reward: mean of the run's last quarter (least, greatest);
- worst drop: how far reward, as a mean of 5 steps, ever fell below its own earlier maximum, without the first 5 steps, in which an
  empty pool finishes short and easy rollouts alone; the worst seed's;
- max grad norm: of any step, before clipping; the worst seed's;
- masked: tokens that the correction gave no weight; gap: mean |old - engine log-prob| of all trained tokens, stale ones included;
- agreement: of the router's own choices with the engine's experts, in the steps that compare them.

A run that is not complete is shown as far as it went, and named below the table. Reward is that of the rollouts, which the engine
samples: under injected noise from noisy weights.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure
from run import SETTINGS, VARIANTS

from megatron_rl.observability.summary import read_rows

REWARD, GRAD_NORM, MASKED, GAP = "reward/mean", "policy/grad_norm", "mismatch/masked_fraction", "mismatch/gap_mean"
AGREEMENT, TOKENS = "routing/agreement", "policy/tokens"
PANELS = {REWARD: "reward", GRAD_NORM: "gradient norm", MASKED: "masked fraction of tokens", GAP: "mean |log-prob gap|"}
LOGARITHMIC = (GRAD_NORM, GAP)
LABELS = {"none": "no correction", "tis": "TIS", "icepop": "IcePop", "icepop_r3": "IcePop + R3"}
COLOURS = {"none": "#c0392b", "tis": "#d68910", "icepop": "#174ea6", "icepop_r3": "#2e7d32"}
COLD, SMOOTH = 5, 5  # steps, of the reward's drop

Rows = Sequence[Mapping[str, float | None]]
Runs = dict[tuple[str, str], dict[int, Rows]]  # (setting, variant) -> seed -> its steps


def read_runs(out: Path) -> Runs:
    runs: Runs = {}
    for setting, variant in itertools.product(SETTINGS, VARIANTS):
        by_seed: dict[int, Rows] = {}
        for folder in sorted((out / setting / variant).glob("seed_*/")):
            if rows := read_rows(folder / "metrics.jsonl"):
                by_seed[int(folder.name.removeprefix("seed_"))] = rows
        if by_seed:
            runs[setting, variant] = by_seed
    return runs


def values(rows: Rows, name: str) -> list[float]:
    """Of the steps that have it: a step without a trained token has no gap, and what was not finite is null."""
    return [value for row in rows if (value := row.get(name)) is not None]


def over_steps(by_seed: Mapping[int, Rows], name: str) -> Iterator[tuple[float, float, float, float]]:
    """(step, mean, least, greatest) over the seeds that have it."""
    by_step: dict[float, list[float]] = {}
    for rows in by_seed.values():
        for row in rows:
            step, value = row["step"], row.get(name)
            if step is not None and value is not None:
                by_step.setdefault(step, []).append(value)
    for step, found in sorted(by_step.items()):
        yield step, fmean(found), min(found), max(found)


def draw(runs: Runs, file: Path) -> None:
    settings = [setting for setting in SETTINGS if any(key[0] == setting for key in runs)]
    figure = Figure(figsize=(6.4 * len(settings), 2.6 * len(PANELS)), layout="constrained")
    axes = figure.subplots(len(PANELS), len(settings), squeeze=False, sharex="col")
    for column, setting in enumerate(settings):
        for row, (name, title) in enumerate(PANELS.items()):
            panel = axes[row][column]
            for variant in VARIANTS:
                if points := list(over_steps(runs.get((setting, variant), {}), name)):
                    steps, mean, least, greatest = zip(*points, strict=True)
                    panel.plot(steps, mean, color=COLOURS[variant], label=LABELS[variant], linewidth=1.4)
                    panel.fill_between(steps, least, greatest, color=COLOURS[variant], alpha=0.13, linewidth=0)
            if name in LOGARITHMIC:
                panel.set_yscale("log")
            panel.set_ylabel(title)
            panel.grid(alpha=0.25)
        axes[0][column].set_title(setting)
        axes[-1][column].set_xlabel("step")
    axes[0][0].legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=130)


def final_reward(rows: Rows) -> float:
    rewards = values(rows, REWARD)
    return fmean(rewards[-max(1, len(rewards) // 4) :])


def worst_drop(rows: Rows) -> float:
    rewards = values(rows[COLD:] or rows, REWARD)
    smooth = [fmean(rewards[start : start + SMOOTH]) for start in range(max(1, len(rewards) - SMOOTH + 1))]
    return max(max(smooth[: at + 1]) - value for at, value in enumerate(smooth))


def mean(by_seed: Mapping[int, Rows], name: str) -> float | None:
    """Over seeds of the mean over tokens."""
    found = []
    for rows in by_seed.values():
        pairs = [(value, row[TOKENS] or 0.0) for row in rows if (value := row.get(name)) is not None]
        if tokens := sum(weight for _, weight in pairs):
            found.append(sum(value * weight for value, weight in pairs) / tokens)
    return fmean(found) if found else None


def table(runs: Runs) -> Iterator[str]:
    yield "| setting | variant | seeds | final reward | worst drop | max grad norm | masked | gap | agreement |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (setting, variant), by_seed in runs.items():
        rewarded = [rows for rows in by_seed.values() if values(rows[COLD:] or rows, REWARD)]
        finals = [final_reward(rows) for rows in rewarded]
        norms = [value for rows in by_seed.values() for value in values(rows, GRAD_NORM)]
        cells = [
            setting,
            LABELS[variant],
            str(len(by_seed)),
            f"{fmean(finals):.3f} ({min(finals):.3f}, {max(finals):.3f})" if finals else "-",
            f"{max(map(worst_drop, rewarded)):.3f}" if finals else "-",
            f"{max(norms):.3g}" if norms else "-",
            told(mean(by_seed, MASKED)),
            told(mean(by_seed, GAP)),
            told(mean(by_seed, AGREEMENT)),
        ]
        yield f"| {' | '.join(cells)} |"


def told(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def shorter(runs: Runs) -> Iterator[str]:
    """Runs with fewer steps than their setting's longest."""
    longest: dict[str, int] = {}
    for (setting, _), by_seed in runs.items():
        longest[setting] = max(longest.get(setting, 0), *(len(rows) for rows in by_seed.values()))
    for (setting, variant), by_seed in runs.items():
        for seed, rows in by_seed.items():
            if len(rows) < longest[setting]:
                yield f"{setting}, {LABELS[variant]}, seed {seed}: {len(rows)} of {longest[setting]} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the --out of run.py")
    parser.add_argument("--png", type=Path, help="the picture's file; OUT/stability.png unless given")
    args = parser.parse_args()
    runs = read_runs(args.out)
    if not runs:
        sys.exit(f"{args.out}: no metrics.jsonl of run.py there")
    matplotlib.rcParams["font.size"] = 9
    draw(runs, args.png or args.out / "stability.png")
    print("\n".join([*table(runs), *shorter(runs)]))


if __name__ == "__main__":
    main()
