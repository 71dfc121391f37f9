"""C3PO++ against waiting for all and against over-sampling to a count: the real loop, two SGLang servers, a long-tailed task.

    OMP_NUM_THREADS=1 python benchmarks/rollout_schedulers.py --out runs/rollout_schedulers [--rounds 2] [--seconds 40]

The task is the quickstart's (sums, worked term by term) with 2 to 12 terms, few of them many: a response is as long as its prompt
asks, no length is forced. The model is the quickstart's, after a short SFT of its own on worked and direct answers mixed; it lies
in `--out` and is made once. Then `megatron-rl rl` runs with each scheduler, in turns: a round lasts `--seconds` of steps, ends by
SIGTERM, and the next one goes on from there by the same command, so that all see the same machine. Start-ups do not count. Equal
for all: the pool (128 rollouts under way, 64 an engine), the optimizer, the first weights, the order of the prompts. The budget of
C3PO++ is a synchronous step's median of generated tokens; `count` ends a phase at half of the pool's groups and carries the rest.

The first steps of C3PO++ and count finish short responses alone (an empty pool): `--skip` steps of each are left out of the
medians, not of the clock that the rewards are compared by. The reward after equal wall-clock is that of 100 held-out sums, one
greedy answer each, under the weights of the last step. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import quickstart_data as task  # noqa: E402
import reasoning_gym  # noqa: E402

from megatron_rl.data.tokenizer import train_sentencepiece  # noqa: E402

POOL, GROUP, LONGEST = 128, 8, 288
TERMS = {2: 0.5, 3: 0.2, 4: 0.1, 6: 0.1, 8: 0.06, 12: 0.04}
DIRECT = 0.3  # share of direct answers in the SFT: what RL has to unlearn
SFT_STEPS = 300
SYNCHRONOUS, C3PO_PP, COUNT = "synchronous", "c3po_pp", "count"


def problems(seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    streams = {
        terms: iter(
            reasoning_gym.create_dataset(
                "chain_sum", seed=seed * 10**7 + terms * 10**6, size=10**6, **task.TASK | {"min_terms": terms, "max_terms": terms}
            )
        )
        for terms in TERMS
    }
    while True:
        entry = next(streams[rng.choices(list(TERMS), TERMS.values())[0]])
        yield {"expression": entry["metadata"]["expression"].replace(" ", ""), "entry": entry}


def make_data(folder: Path) -> None:
    if (folder / "tokenizer.model").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    stream, rng, held_out, others = problems(seed=1), random.Random(1), {}, []
    while len(held_out) < 100 or len(others) < 24_000:
        problem = next(stream)
        if task.is_held_out(problem["expression"]):
            held_out[problem["expression"]] = problem
        else:
            others.append(problem)
    train, sft = others[:4_000], others[4_000:]
    task.write_jsonl(folder / "eval.jsonl", (task.prompt_row(i, p) for i, p in enumerate(list(held_out.values())[:100])))
    task.write_jsonl(folder / "train.jsonl", (task.prompt_row(i, p) for i, p in enumerate(train)))
    task.write_jsonl(folder / "sft.jsonl", (task.sft_row(p, direct=rng.random() < DIRECT) for p in sft))
    texts = [row["prompt"] + row["response"] for row in (task.sft_row(p, direct=False) for p in sft[:2_000])]
    train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=task.VOCAB, model_type="char")


def make_model(out: Path, data: Path) -> Path:
    if not (out / "sft" / "hf" / "config.json").exists():
        stages = f"data.stages=[{{data: {data}/sft.jsonl, steps: {SFT_STEPS}}}]"
        command = [sys.executable, "-m", "megatron_rl", "sft", "experiment=quickstart_sft", f"run.dir={out}/sft", stages]
        command += [f"run.steps={SFT_STEPS}", f"data.tokenizer={data}/tokenizer.model", "max_tokens=384"]
        with (out / "sft.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
    return out / "sft" / "hf"


class Run:
    """One scheduler's run, which goes on round by round."""

    def __init__(self, name: str, out: Path, data: Path, model: Path, *overrides: str) -> None:
        self.name, self.dir, self.log = name, out / name, out / f"{name}.log"
        self._command = [
            *(sys.executable, "-m", "megatron_rl", "rl", "experiment=quickstart", f"run.dir={self.dir}", f"rollout={name}"),
            *(f"model.init_from={model}", f"data.tokenizer={data}/tokenizer.model", f"data.train={data}/train.jsonl"),
            *(f"data.eval={data}/eval.jsonl", "eval.samples=1", "eval.forced_prefix=false", "algorithm.zero_variance=keep"),
            *(
                "checkpoint.every=1000",
                "checkpoint.export_hf=false",
                f"rollout.pool_capacity={POOL}",
                f"rollout.group_size={GROUP}",
            ),
            *("rollout.max_prompt_tokens=48", f"rollout.max_response_tokens={LONGEST}", *overrides),
        ]

    def rows(self) -> list[dict[str, float]]:
        path = self.dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def go_on(self, seconds: float) -> None:
        """For so many seconds of steps more."""
        already = sum(row["time/step_s"] for row in self.rows())
        process = self._start("eval.at_ends=false", "run.steps=100000")
        deadline = time.monotonic() + 10 * seconds + 120
        while sum(row["time/step_s"] for row in self.rows()) - already < seconds:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise SystemExit(f"{self.name} did not run for {seconds:g} s: {self.log}")
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)

    def held_out_reward(self) -> float:
        steps = len(self.rows())
        self._start("eval.at_ends=true", f"run.steps={steps}").wait(timeout=300)
        evaluations = [json.loads(line) for line in (self.dir / "evaluations.jsonl").read_text().splitlines()]
        return float(next(row["eval/accuracy_greedy"] for row in evaluations if row["step"] == steps))

    def _start(self, *overrides: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen([*self._command, *overrides], stdout=log, stderr=log, cwd=ROOT)

    def summary(self, skip: int) -> dict[str, float]:
        rows = self.rows()
        steady = rows[skip:]
        seconds = sum(row["time/step_s"] for row in steady)

        def median(name: str) -> float:
            return round(statistics.median(row[name] for row in steady), 3)

        return {
            "steps": len(rows),
            "seconds_of_steps": round(sum(row["time/step_s"] for row in rows), 1),
            "step_s": median("time/step_s"),
            "rollout_s": median("time/rollout_s"),
            "train_s": median("time/train_s"),
            "trained_tokens_per_step": median("train/tokens"),
            "trained_tokens_per_s": round(sum(row["train/tokens"] for row in steady) / seconds),
            "generated_tokens_per_s": round(sum(row["rollout/generated_tokens"] for row in steady) / seconds),
            "generated_tokens_per_rollout_s": round(
                sum(row["rollout/generated_tokens"] for row in steady) / sum(row["time/rollout_s"] for row in steady)
            ),
            "engine_idle_fraction": median("rollout/engine_idle_fraction"),
            "response_tokens_mean": round(statistics.fmean(row["response/tokens_mean"] for row in steady), 1),
            "token_age_mean": median("rollout/token_age_mean"),
            "reward_first_5_steps": round(statistics.fmean(row["reward/mean"] for row in rows[:5]), 3),
            "reward_last_5_steps": round(statistics.fmean(row["reward/mean"] for row in rows[-5:]), 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder; one with `data` and `sft` of an earlier call will do"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="of steps, for each scheduler in each round")
    parser.add_argument("--skip", type=int, default=8, help="steps of the cold start")
    args = parser.parse_args()
    out = args.out.resolve()
    if any((out / name).exists() for name in (SYNCHRONOUS, C3PO_PP, COUNT)):
        parser.error(f"--out={args.out} holds runs already")
    data = out / "data"
    make_data(data)
    model = make_model(out, data)

    runs = [Run(SYNCHRONOUS, out, data, model)]
    runs[0].go_on(args.seconds)
    budget = round(statistics.median(row["rollout/generated_tokens"] for row in runs[0].rows()))
    runs += [Run(C3PO_PP, out, data, model, f"rollout.token_budget={budget}")]
    runs += [Run(COUNT, out, data, model, f"rollout.groups_per_phase={POOL // GROUP // 2}")]
    for turn in range(args.rounds):
        for run in runs[1:] if turn == 0 else runs:
            run.go_on(args.seconds)
    result = {run.name: run.summary(args.skip) | {"held_out_reward": run.held_out_reward()} for run in runs}
    print(json.dumps({"token_budget": budget} | result, indent=1))


if __name__ == "__main__":
    main()
