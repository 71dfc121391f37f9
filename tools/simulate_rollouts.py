"""The rollout scheduler against its baselines on modelled engines: tokens per second, step time, staleness, length bias.

python tools/simulate_rollouts.py [lengths.path=lengths.csv pool_capacity=7680 ...] [--json] [--table] [--claims] [--png FILE]
python tools/simulate_rollouts.py --help

Exit codes: 0, with --claims 1 if one does not hold, 1 an unreadable trace, 2 a wrong command line.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_rl.config import SimulationRun, UserError, validate
from megatron_rl.config.simulate import Scheduler
from megatron_rl.simulation.claims import CLAIMS, Claim
from megatron_rl.simulation.cluster import Phase
from megatron_rl.simulation.compare import PICTURED, Job, against, as_dict, read_lengths, reference, train_s_per_token
from megatron_rl.simulation.lengths import Lengths
from megatron_rl.simulation.picture import Strip, draw
from megatron_rl.simulation.results import Result

CONF = Path(__file__).resolve().parent.parent / "conf"
FLAGS = ("--json", "--table", "--claims")


def main() -> None:
    flags, png = own_arguments()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us instead of printing and exiting

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="simulate")
    def job(composed: DictConfig) -> None:
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
        try:
            run = validate(SimulationRun, values)
            if "--claims" in flags:
                sys.exit(claims(run, "--json" in flags, console))
            if "--table" in flags:
                table(run, "--json" in flags, console)
            else:
                one_setting(run, "--json" in flags, png, console)
        except UserError as error:
            fail(str(error), error.exit_code)

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        fail(" ".join(str(error).split()))


def own_arguments() -> tuple[set[str], Path | None]:
    """Ours, taken out of sys.argv; the others are Hydra's."""
    rest, png = list(sys.argv), None
    if "--png" in rest:
        at = rest.index("--png")
        if at + 1 == len(rest) or not rest[at + 1].endswith(".png"):
            fail("--png needs a file name that ends in .png")
        png = Path(rest[at + 1])
        del rest[at : at + 2]
    flags = {argument for argument in rest if argument in FLAGS}
    sys.argv = [argument for argument in rest if argument not in FLAGS]
    if {"--table", "--claims"} <= flags or (png and flags & {"--table", "--claims"}):
        fail("--table, --claims and --png are three different runs")
    return flags, png


def fail(message: str, exit_code: int = 2) -> NoReturn:
    print(f"simulate_rollouts: error: {message}", file=sys.stderr)
    sys.exit(exit_code)


# Many runs at once


def simulate(jobs: Sequence[Job], processes: int | None, sample_every_s: float = float("inf")) -> list[list[Phase]]:
    """A process for every run that differs, with a bar over all their phases on a terminal."""
    differing = {job.key: job for job in jobs}
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total}"), TimeRemainingColumn())
    workers = min(len(differing), processes or os.cpu_count() or 1)
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        ProcessPoolExecutor(workers, context, _share, (done,)) as pool,
    ):
        task = bar.add_task("phases", total=sum(job.phases for job in differing.values()))
        futures = {key: pool.submit(_work, job, sample_every_s) for key, job in differing.items()}
        left = set(futures.values())
        while left:
            left = wait(left, timeout=0.5).not_done
            bar.update(task, completed=done.value)
        return [futures[job.key].result() for job in jobs]


_done: Any = None


def _share(done: Any) -> None:
    global _done
    _done = done


def _work(job: Job, sample_every_s: float) -> list[Phase]:
    def progress() -> None:
        with _done.get_lock():
            _done.value += 1

    return job.simulate(progress, sample_every_s)


# One setting


def one_setting(run: SimulationRun, as_json: bool, png: Path | None, console: Console) -> None:
    lengths = read_lengths(run)
    schedulers: list[Scheduler] = [run.scheduler, *(name for name in run.against if name != run.scheduler)]
    jobs = [Job(run, scheduler, lengths) for scheduler in schedulers]
    base = reference(run, lengths)
    settings = jobs[0].settings
    sample_every_s = settings.token_budget / run.engines.count / jobs[0].model.throughput(run.pool / run.engines.count) / 60
    *phases, base_phases = simulate([*jobs, base], run.jobs, sample_every_s if png else float("inf"))
    price = train_s_per_token(run, base_phases)
    results = [job.result(each, price) for job, each in zip(jobs, phases, strict=True)]
    if png:
        draw([Strip(result, each[-PICTURED:]) for result, each in zip(results, phases, strict=True)], sample_every_s, png)
    if as_json:
        print(json.dumps(as_dict(results), indent=1))
    else:
        show(run, lengths, results, console)


def show(run: SimulationRun, lengths: Lengths, results: Sequence[Result], console: Console) -> None:
    first, pmf, engines = results[0], lengths.all, run.engines
    console.print(
        f"[bold]{run.lengths.path or 'Lengths as of Ring-1T'}[/]  mean {pmf.mean:,.0f} tokens, median {pmf.quantile(0.5):,}, "
        f"p95 {pmf.quantile(0.95):,}, at the limit of {run.lengths.max_tokens:,} {pmf.at_least(run.lengths.max_tokens):.1%}\n"
        f"{engines.count:,} engines of {engines.slots} slots, decode step {engines.step_s * 1e3:g} ms + "
        f"{engines.step_s_per_rollout * 1e3:g} ms x batch, prefill "
        f"{f'{engines.prefill_tokens_per_s:,.0f} tokens/s' if engines.prefill_tokens_per_s else 'free'}\n"
        f"pool {first.pool_capacity:,}, budget {first.token_budget:,} tokens, sigma {first.retention_bound}, "
        f"on_stale {run.on_stale}; {run.steps} steps after warm-up\n"
    )
    columns = Table(title="Means of a step", title_justify="left")
    columns.add_column("")
    for result in results:
        columns.add_column(result.scheduler, justify="right")
    for name, cells in lines(results):
        columns.add_row(name, *cells)
    console.print(columns)
    for other in results[1:]:
        speed = against(first, other)
        console.print(
            f"[bold]{first.scheduler} against {other.scheduler}[/], at equal trained tokens: "
            f"rollout x {speed['rollout_speedup']:.2f}, end to end x {speed['end_to_end_speedup']:.2f}"
        )


def lines(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    formats: tuple[tuple[str, Callable[[Result], str]], ...] = (
        ("step s", lambda r: f"{r.step_s:,.0f}"),
        ("  rollout, sync, training", lambda r: f"{r.rollout_s:,.0f}, {r.sync_s:,.0f}, {r.train_s:,.0f}"),
        ("trained tokens/s", lambda r: f"{r.tokens_per_s:,.0f}"),
        ("  of rollout phases", lambda r: f"{r.rollout_tokens_per_s:,.0f}"),
        ("of the work-conserving bound", lambda r: f"{r.work_conserving_fraction:.1%}"),
        ("engines idle, in prefill", lambda r: f"{r.engine_idle_fraction:.1%}, {r.prefill_fraction:.1%}"),
        ("length bias", lambda r: f"{r.length_bias:+.1%}"),
        ("tail (p95 and longer) kept", lambda r: f"{r.tail_ratio:.2f}"),
        ("first steps' bias", lambda r: " ".join(f"{bias:+.0%}" for bias in r.cold_start_bias)),
        ("tokens dropped", lambda r: f"{r.dropped_fraction:.1%}"),
        ("carried, restarted rollouts", lambda r: f"{r.carried:,.0f}, {r.restarted:,.0f}"),
        ("over budget, most", lambda r: f"{r.overshoot:,.0f}, {r.overshoot_max:,}"),
        ("token age mean, p99, max", lambda r: f"{r.token_age_mean:.2f}, {r.token_age_p99}, {r.token_age_max}"),
        ("  0, 1, 2 ...", lambda r: " ".join(f"{r.token_ages.get(age, 0):.0%}" for age in range(min(10, r.token_age_max + 1)))),
        ("KV tokens an engine, most", lambda r: f"{r.kv_tokens_mean:,.0f}, {r.kv_tokens_peak:,.0f}"),
        ("retracted", lambda r: f"{r.retracted:,.0f}"),
    )
    return [(name, [text(result) for result in results]) for name, text in formats]


# Budget x pool x sigma


def table(run: SimulationRun, as_json: bool, console: Console) -> None:
    """A sigma of its own comes with drop_group, where on_stale is `finish` and would make it idle."""
    lengths = read_lengths(run)
    budget = Job(run, run.scheduler, lengths).settings.token_budget
    runs = [
        run.model_copy(
            update={
                "token_budget": round(budget * budgets),
                "pool_capacity": round(run.pool * pools),
                "retention_bound": sigma,
                "on_stale": "drop_group" if sigma is not None and run.on_stale == "finish" else run.on_stale,
            }
        )
        for pools, budgets, sigma in itertools.product(run.table.pools, run.table.budgets, run.table.sigmas)
    ]
    baselines = [run.model_copy(update={"pool_capacity": round(run.pool * pools)}) for pools in run.table.pools]
    jobs = [Job(each, "c3po_pp", lengths) for each in runs] + [Job(each, "synchronous", lengths) for each in baselines]
    *phases, base_phases = simulate([*jobs, reference(run, lengths)], run.jobs)
    price = train_s_per_token(run, base_phases)
    results = [job.result(each, price) for job, each in zip(jobs, phases, strict=True)]
    synchronous = {result.pool_capacity: result for result in results[len(runs) :]}
    rows = [(result, each.on_stale, against(result, synchronous[each.pool])) for each, result in zip(runs, results, strict=False)]
    if as_json:
        print(json.dumps([asdict(result) | {"on_stale": on_stale} | speed for result, on_stale, speed in rows], indent=1))
        return
    grid = Table(title="C3PO++ against synchronous at the same pool and equal trained tokens", title_justify="left")
    for name in (
        "pool",
        "budget",
        "sigma",
        "on_stale",
        "rollout x",
        "all x",
        "of bound",
        "bias",
        "tail",
        "dropped",
        "token age",
        "KV most",
    ):
        grid.add_column(name, justify="right")
    for r, on_stale, speed in rows:
        grid.add_row(
            f"{r.pool_capacity:,}",
            f"{r.token_budget / 1e6:,.1f} M",
            str(r.retention_bound),
            on_stale,
            f"{speed['rollout_speedup']:.2f}",
            f"{speed['end_to_end_speedup']:.2f}",
            f"{r.work_conserving_fraction:.1%}",
            f"{r.length_bias:+.1%}",
            f"{r.tail_ratio:.2f}",
            f"{r.dropped_fraction:.1%}",
            f"{r.token_age_mean:.1f}, {r.token_age_p99}, {r.token_age_max}",
            f"{r.kv_tokens_peak / 1e6:.2f} M",
        )
    console.print(grid)


# Claims


def claims(run: SimulationRun, as_json: bool, console: Console) -> int:
    """The exit code."""
    jobs = [job for claim in CLAIMS for job in jobs_of(claim, run)]
    phases = iter(simulate(jobs, run.jobs))
    judged = []
    for claim in CLAIMS:
        ours, theirs, _ = jobs_of(claim, run)
        each = [next(phases) for _ in range(3)]
        price = train_s_per_token(ours.run, each[2])
        result, baseline = ours.result(each[0], price), theirs.result(each[1], price)
        judged.append((claim, result, baseline, claim.judge(result, baseline)))
    if as_json:
        print(json.dumps([claim_dict(*each) for each in judged], indent=1))
    else:
        show_claims(judged, console)
    return 0 if all(number[-1] for *_, numbers in judged for number in numbers) else 1


def jobs_of(claim: Claim, run: SimulationRun) -> tuple[Job, Job, Job]:
    changed = claim.run(run)
    lengths = read_lengths(changed)
    return Job(changed, "c3po_pp", lengths), Job(changed, claim.baseline, lengths), reference(changed, lengths)


def claim_dict(
    claim: Claim, result: Result, baseline: Result, numbers: Sequence[tuple[str, float, float, float, bool]]
) -> dict[str, Any]:
    judged = {name: {"value": value, "bar": [low, high], "holds": holds} for name, value, low, high, holds in numbers}
    return {"claim": claim.name, "against": claim.baseline, "numbers": judged, "results": [asdict(result), asdict(baseline)]}


def show_claims(
    judged: Sequence[tuple[Claim, Result, Result, Sequence[tuple[str, float, float, float, bool]]]], console: Console
) -> None:
    grid = Table(title="C3PO++, at equal trained tokens and equal pool", title_justify="left")
    for name in ("claim", "against", "number", "value", "bar", "holds"):
        grid.add_column(name, justify="right" if name in ("value", "bar") else "left")
    for claim, result, _, numbers in judged:
        for place, (name, value, low, high, holds) in enumerate(numbers):
            bar = f">= {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
            grid.add_row(
                *((claim.name, claim.baseline) if not place else ("", "")),
                name,
                f"{value:.4f}",
                bar,
                "yes" if holds else "[bold]NO[/]",
            )
        age = f"{result.token_age_mean:.2f}, {result.token_age_p99}, {result.token_age_max}"
        grid.add_row("", "", "token age mean, p99, max", age, "", "", end_section=True)
    console.print(grid)


if __name__ == "__main__":
    main()
