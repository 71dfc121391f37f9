"""What a gap between trainer and engine does to RL, and what none, TIS, IcePop and IcePop with R3 make of it. On a CPU, from the
quickstart's SFT checkpoint.

    python benchmarks/stability/run.py --init runs/quickstart/sft/hf --data runs/quickstart/data --out runs/stability
    python benchmarks/stability/plot.py runs/stability

Two settings, on the quickstart's task and model with a float32 policy on two ranks (EP2):

- bf16: engines in bfloat16, all else as in the quickstart: the gap of a usual run;
- injected: engines in float32 whose weights are off by noise of relative size EPS, drawn anew for every push (noisy_engine.py); a
  token budget so small beside the pool that rollouts are carried over several steps; a learning rate LR_FACTOR times the
  quickstart's, so that the weights which began a rollout are far from those that train on it.

EPS and LR_FACTOR were chosen by 16 steps of `none` and `icepop_r3`, seed 0: after the first step the mean gap lay at 0.02 to 0.14
nats, |p_old - p_engine| near 0.02, and IcePop masked 0.3 to 3 % of the tokens, about ten times what is published for a sound run.

Runs of a setting differ in nothing but the correction and the replay. One after the other, `--seeds` outermost, so that a first
seed shows the whole picture; each lies in OUT/<setting>/<variant>/seed_<n> with its own log. Ctrl-C ends the run under way with a
checkpoint; the same command skips what is complete and goes on there. A run that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_rl.observability.summary import read_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EPS, LR, LR_FACTOR = 0.05, 5e-5, 6
EXAMPLES = """examples:
  python benchmarks/stability/run.py --init runs/quickstart/sft/hf --data runs/quickstart/data --out runs/stability
  python benchmarks/stability/run.py ... --seeds 0 --settings injected --variants none,icepop     a quick look
  python benchmarks/stability/run.py ... --steps 200                                              longer; complete runs go on"""


@dataclass(frozen=True)
class Setting:
    steps: int
    overrides: tuple[str, ...]
    noise: float = 0.0  # of every push


SETTINGS = {
    "bf16": Setting(40, ("engine.dtype=bfloat16",)),
    "injected": Setting(
        60,
        (
            "engine.dtype=float32",
            "engine.stream_interval=2",  # tokens a message: a small budget is overshot by what 192 streams deliver between two
            "rollout.token_budget=1024",
            "rollout.pool_capacity=192",
            f"optimizer.lr={LR * LR_FACTOR:g}",
        ),
        noise=EPS,
    ),
}
PROBE = "algorithm.routing.probe_every=5"  # routing agreement where nothing is replayed
VARIANTS = {
    "none": ("algorithm.correction.kind=none", PROBE),
    "tis": ("algorithm.correction.kind=tis", PROBE),
    "icepop": ("algorithm.correction.kind=icepop", PROBE),
    "icepop_r3": ("algorithm.correction.kind=icepop", "algorithm.routing.kind=r3"),
}
EVERY_RUN = (
    "experiment=quickstart",
    "algorithm.old_logprobs=recompute",  # the policy's own, on the packing of the update
    "engine.max_restarts=3",
    "data.eval=null",
    "eval.at_ends=false",
    "checkpoint.every=0",  # at the end and on a signal
    "checkpoint.keep=1",
    "checkpoint.export_hf=false",
    "track.rollouts_every=0",
    "track.tensorboard=false",
)


@dataclass(frozen=True)
class Run:
    setting: str
    variant: str
    seed: int
    steps: int
    out: Path

    @property
    def dir(self) -> Path:
        return self.out / self.setting / self.variant / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        return self.dir.with_suffix(".log")

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.dir / "metrics.jsonl")

    def is_complete(self) -> bool:
        return len(self.rows()) >= self.steps

    def command(self, init: Path, data: Path) -> list[str]:
        setting = SETTINGS[self.setting]
        entry = [str(HERE / "noisy_engine.py"), f"{setting.noise:g}"] if setting.noise else ["-m", "megatron_rl", "rl"]
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *entry, *EVERY_RUN),
            *(f"run.dir={self.dir}", f"run.seed={self.seed}", f"run.steps={self.steps}", f"model.init_from={init}"),
            *(f"data.tokenizer={data}/tokenizer.model", f"data.train={data}/train.jsonl"),
            *setting.overrides,
            *VARIANTS[self.variant],
        ]


def carry_out(run: Run, init: Path, data: Path) -> int:
    run.dir.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    with run.log.open("ab") as log:
        process = subprocess.Popen(run.command(init, data), stdout=log, stderr=log, cwd=ROOT, env=environment)
        try:
            return process.wait()
        except KeyboardInterrupt:  # torchrun has it, too, and tells the ranks to save
            print("saving; the same command goes on from there", flush=True)
            process.wait(timeout=90)
            raise SystemExit(130) from None


def outcome(run: Run, code: int, seconds: float) -> str:
    rows = run.rows()
    if code or not run.is_complete():
        return f"FAILED with exit code {code} after {len(rows)} of {run.steps} steps: {run.log}"
    quarter = max(1, run.steps // 4)
    first, last = (fmean(row.get("reward/mean", 0.0) for row in part) for part in (rows[:quarter], rows[-quarter:]))
    return f"{run.steps} steps in {seconds:.0f} s, reward of the first and last quarter {first:.2f} {last:.2f}"


def time_left(to_do: Sequence[Run], seconds: Mapping[str, Sequence[float]]) -> str:
    """By each setting's own mean; a setting that has not run yet counts as the others."""
    every = [value for values in seconds.values() for value in values]
    left = sum(fmean(seconds.get(run.setting) or every) for run in to_do)
    return f"about {left / 60:.0f} min left" if to_do else "done"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names_of(known: Mapping[str, object]) -> Any:
        def names(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in known]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
            return text.split(",")

        return names

    def seeds(text: str) -> list[int]:
        return [int(seed) for seed in text.split(",")]

    parser.add_argument("--init", type=Path, required=True, help="a Hugging Face checkpoint: the quickstart's sft/hf")
    parser.add_argument("--data", type=Path, required=True, help="the quickstart's data folder")
    parser.add_argument("--out", type=Path, required=True, help="where the runs lie, complete ones of an earlier call among them")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="0,1,2 unless given")
    default = ", ".join(f"{setting.steps} of {name}" for name, setting in SETTINGS.items())
    parser.add_argument("--steps", type=int, help=f"of every run; unless given {default}")
    parser.add_argument("--settings", type=names_of(SETTINGS), default=list(SETTINGS), help=",".join(SETTINGS))
    parser.add_argument("--variants", type=names_of(VARIANTS), default=list(VARIANTS), help=",".join(VARIANTS))
    args = parser.parse_args()
    for needed in (args.init / "config.json", args.data / "tokenizer.model", args.data / "train.jsonl"):
        if not needed.exists():
            parser.error(f"{needed} is missing: bash launch/quickstart.sh makes it")
    return args


def main() -> None:
    args = arguments()
    init, data, out = args.init.resolve(), args.data.resolve(), args.out.resolve()
    runs = [
        Run(setting, variant, seed, args.steps or SETTINGS[setting].steps, out)
        for seed in args.seeds
        for setting in args.settings
        for variant in args.variants
    ]
    to_do = [run for run in runs if not run.is_complete()]
    if len(to_do) < len(runs):
        print(f"{len(runs) - len(to_do)} of {len(runs)} runs are complete", flush=True)
    seconds: dict[str, list[float]] = {}
    failed = []
    for number, run in enumerate(to_do, start=1):
        started = time.monotonic()
        code = carry_out(run, init, data)
        took = time.monotonic() - started
        seconds.setdefault(run.setting, []).append(took)
        if code or not run.is_complete():
            failed.append(run)
        told, left = outcome(run, code, took), time_left(to_do[number:], seconds)
        print(f"[{number}/{len(to_do)}] {run.setting} {run.variant} seed {run.seed}: {told}; {left}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
