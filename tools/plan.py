"""A model on a cluster, on paper: parameters, memory by phase, weight-sync bytes and floors, for given or searched layouts.

python tools/plan.py model=ling_1t cluster.gpus=512 cluster.gpu=h100 [parallel.tp=8 ...] [--json]
python tools/plan.py --help

Exit codes: 0 a layout fits, 1 none does, 2 a wrong command line or an impossible layout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from megatron_rl.config import PlanRun, UserError, validate
from megatron_rl.config.model import ParallelConfig
from megatron_rl.planning.search import GIB, SIZES, Found, Plan, search

CONF = Path(__file__).resolve().parent.parent / "conf"


def main() -> None:
    as_json = "--json" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--json"]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us instead of printing and exiting

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="plan")
    def job(composed: DictConfig) -> None:
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        try:
            run = validate(PlanRun, values)
            found = search(run, named_keys(HydraConfig.get().overrides.task))
        except UserError as error:
            fail(str(error))
        if as_json:
            print(json.dumps(as_dict(run, found), indent=1))
        else:
            show(run, found, Console(width=None if sys.stdout.isatty() else 150, highlight=False))
        if not found.plans:
            sys.exit(1)

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        fail(" ".join(str(error).split()))


def fail(message: str) -> NoReturn:
    print(f"plan: error: {message}", file=sys.stderr)
    sys.exit(2)


def named_keys(overrides: Iterable[str]) -> set[str]:
    """`parallel=tp2` names every key of it."""
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    return keys | ({f"parallel.{key}" for key in ParallelConfig.model_fields} if "parallel" in keys else set())


def as_dict(run: PlanRun, found: Found) -> dict[str, Any]:
    census = found.census
    return {
        "model": {
            "family": run.model.family,
            "parameters": census.total(with_mtp=False),
            "parameters_with_mtp": census.total(),
            "active_parameters": census.active(),
        },
        "cluster": run.cluster.model_dump(),
        "sequence_tokens": run.longest,
        "layouts": [plan_dict(run, plan) for plan in found.plans[: run.show]],
        "nearest": plan_dict(run, found.nearest) if found.nearest and not found.plans else None,
        "rejected": [{"reason": reason, "layouts": number} for reason, number in found.rejected],
        "looked_at": found.looked_at,
        "fitting": found.fitting,
    }


def plan_dict(run: PlanRun, plan: Plan) -> dict[str, Any]:
    return {
        "overrides": overrides(run, plan),
        "problem": plan.problem or None,
        "microbatches": plan.microbatches,
        "parameters_per_rank": asdict(plan.held),
        "memory_bytes": {usage.phase: usage.kinds | {"pipeline_rank": usage.pipeline_rank} for usage in plan.usages},
        "kv_tokens_per_engine": plan.kv_tokens,
        "sync": asdict(plan.sync) | {"floor_s": plan.sync.floor_s},
        "step_s_at_peak": asdict(plan.time) | {"total": plan.time.total},
    }


def overrides(run: PlanRun, plan: Plan) -> list[str]:
    """What to write on a run's command line."""
    parallel = plan.parallel
    keys = [f"parallel.{key}={getattr(parallel, key)}" for key in SIZES]
    if parallel.sequence_parallel:
        keys.append("parallel.sequence_parallel=true")
    if parallel.recompute != "none":
        keys.append(f"parallel.recompute={parallel.recompute}")
    if parallel.layers_per_stage:
        keys.append(f"parallel.layers_per_stage=[{','.join(map(str, parallel.layers_per_stage))}]")
    engine = plan.engine.tp
    return [
        *keys,
        f"engine.tp={engine}",
        f"engine.count={run.cluster.gpus // engine}",
        f"engine.mem_fraction_static={plan.mem_fraction:.3f}",
    ]


def show(run: PlanRun, found: Found, console: Console) -> None:
    census, cluster, specs = found.census, run.cluster, run.cluster.specs
    total, mtp = census.total(with_mtp=False), census.total() - census.total(with_mtp=False)
    console.print(
        f"[bold]{run.model.family}[/]  {total / 1e9:,.2f} B parameters, {census.active() / 1e9:,.2f} B active per token"
        + (f", {mtp / 1e9:,.2f} B of multi-token prediction (frozen)" if mtp else "")
    )
    console.print(
        f"{cluster.gpus} x {cluster.gpu}, {cluster.node_size} a node: "
        f"{specs.memory_gib:g} GiB, of them {cluster.reserve_gib:g} reserved; "
        f"NVLink {specs.nvlink_gb_s:g}, network {cluster.network / 1e9:g}, host {specs.host_gb_s:g} GB/s\n"
        f"sequences up to {run.longest:,} tokens, {run.step_tokens:,} tokens a step; "
        f"{found.looked_at:,} layouts looked at, {found.fitting:,} fit\n"
    )
    plans = found.plans
    if not plans and found.nearest:
        console.print(f"[bold]No layout fits.[/] Nearest: {' '.join(overrides(run, found.nearest))}\n  {found.nearest.problem}\n")
        show_memory(found.nearest, console)
    if plans:
        show_ranking(run, plans[: run.show], console)
        show_memory(plans[0], console)
        show_sync(run, plans[0], console)
        console.print(f"\nThe first, as a run's keys:\n  {' '.join(overrides(run, plans[0]))}")
    if found.rejected:
        console.print("\nRejected")
        for reason, number in found.rejected[:8]:
            console.print(f"  {number:5,} {reason}", soft_wrap=True, markup=False)


def show_ranking(run: PlanRun, plans: list[Plan], console: Console) -> None:
    table = Table(title="Layouts, quickest first (seconds of a step at peak rates, nothing overlapped)", title_justify="left")
    for name in (*SIZES, "recompute", "engine", "micro-\nbatches"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("step s", "compute", "again s", "TP", "EP", "CP", "bubble", "DP", "train\nGiB"):
        table.add_column(name, justify="right")
    for plan in plans:
        layout = [str(getattr(plan.parallel, key)) for key in SIZES]
        times = [f"{seconds:.1f}" for seconds in (plan.time.total, *asdict(plan.time).values())]
        fullest = plan.usages[0].total / GIB
        uneven = "*" if plan.parallel.layers_per_stage else ""
        layout[SIZES.index("pp")] += uneven
        table.add_row(*layout, plan.parallel.recompute, f"tp{plan.engine.tp}", str(plan.microbatches), *times, f"{fullest:.1f}")
    console.print(table)
    if any(plan.parallel.layers_per_stage for plan in plans):
        console.print("* uneven stages (parallel.layers_per_stage)")


def show_memory(plan: Plan, console: Console) -> None:
    table = Table(title="Memory of the fullest GPU, GiB", title_justify="left")
    kinds = list(dict.fromkeys(kind for usage in plan.usages for kind in usage.kinds))
    for name in ("phase", *kinds, "total", "pipeline rank"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for usage in plan.usages:
        cells = [f"{usage.kinds[kind] / GIB:.2f}" if kind in usage.kinds else "" for kind in kinds]
        table.add_row(usage.phase, *cells, f"{usage.total / GIB:.2f}", str(usage.pipeline_rank))
    console.print(table)
    held = plan.held
    console.print(
        f"Most parameters on a rank: {held.parameters / 1e9:.3f} B (experts {held.experts / 1e9:.3f}, "
        f"dense {held.dense / 1e9:.3f}, frozen {held.frozen / 1e9:.3f}); "
        f"an engine's KV cache holds {plan.kv_tokens:,.0f} tokens\n"
    )


def show_sync(run: PlanRun, plan: Plan, console: Console) -> None:
    sync = plan.sync
    console.print(
        f"[bold]Weight sync[/]: {sync.push_bytes / 1e9:,.1f} GB each ({sync.first_bytes / 1e9:,.1f} the first), "
        f"into {run.cluster.gpus // plan.engine.tp} engines; {sync.into_node_bytes / 1e9:,.1f} GB into each node\n"
        f"  at least {sync.floor_s:.3f} s: network {sync.network_s:.3f}, NVLink {sync.nvlink_s:.3f}\n"
        f"  through one rank {sync.through_one_rank_s:.2f} s; offload to the host and back {sync.host_s:.2f} s"
    )


if __name__ == "__main__":
    main()
