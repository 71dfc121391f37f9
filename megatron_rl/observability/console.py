"""What a person watching the run sees: our own log lines, and one line a step. Libraries' chatter stays out."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping

from rich.console import Console

BRIEF = (  # metric, its short name, how it is shown
    ("reward/mean", "reward", "{:.3f}"),
    ("sft/nll", "nll", "{:.3f}"),
    ("response/tokens_mean", "length", "{:.1f}"),
    ("mismatch/masked_fraction", "masked", "{:.2%}"),
    ("mismatch/logprob_gap_max", "gap", "{:.1e}"),
    ("policy/entropy", "entropy", "{:.3f}"),
    ("policy/grad_norm", "grad", "{:.2f}"),
    ("rollout/carried", "carried", "{:.0f}"),
    ("eval/accuracy", "accuracy", "{:.1%}"),
    ("eval/accuracy_greedy", "greedy", "{:.1%}"),
)
TIMES = (("time/rollout_s", "rollout"), ("time/train_s", "train"), ("time/sync_s", "sync"), ("time/eval_s", "eval"))


def set_up_logging(rank: int) -> None:
    """Rank 0 tells what happens, the others only what is wrong; Megatron's INFO and its warnings about absent CUDA packages
    (apex, Transformer Engine) say nothing that a run without them does not know."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("megatron_rl").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|torch)\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch)\.")


def step_line(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """`step 12/60  reward 0.563 ...  8,210 tok/s generated  rollout 1.1 train 0.9 sync 0.1 s`"""
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    parts += [f"{short} {form.format(metrics[name])}" for name, short, form in BRIEF if name in metrics]
    for tokens, seconds, what in (
        ("rollout/generated_tokens", "time/rollout_s", "generated"),
        ("train/tokens", "time/train_s", "trained"),
    ):
        if metrics.get(tokens) and metrics.get(seconds):
            parts.append(f"{metrics[tokens] / metrics[seconds]:,.0f} tok/s {what}")
    times = " ".join(f"{short} {metrics[name]:.1f}" for name, short in TIMES if name in metrics)
    return "  ".join([*parts, f"{times} s"] if times else parts)


class StepLines:
    """A line for every step of RL, one every `every_s` seconds where steps are fast; each with an estimate of the time left."""

    def __init__(self, steps: int, every_s: float = 5.0) -> None:
        self._steps, self._every_s, self._shown_at = steps, every_s, float("-inf")
        self._first: tuple[int, float] | None = None  # (step, when) of the first line: steps before a resume cost nothing now
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def show(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        first_step, started = self._first = self._first or (step, now)
        important = step in (0, 1, self._steps) or "eval/accuracy" in metrics or "reward/mean" in metrics
        if important or now - self._shown_at >= self._every_s:
            self._shown_at = now
            line = step_line(step, self._steps, metrics)
            if first_step < step < self._steps:
                line += f"  {clock((now - started) / (step - first_step) * (self._steps - step))} left"
            self._console.print(line)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
