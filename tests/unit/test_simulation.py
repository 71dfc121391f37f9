"""The simulator: its arithmetic by hand, its accounting to the token, and what it says of settings whose outcome is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import SimulationRun
from megatron_rl.config.simulate import LengthsConfig
from megatron_rl.scheduler.c3po_pp import Settings
from megatron_rl.simulation.claims import CLAIMS
from megatron_rl.simulation.cluster import Cluster, Workload
from megatron_rl.simulation.compare import Job, against, as_dict, read_lengths, reference, train_s_per_token
from megatron_rl.simulation.engine import Engine, EngineModel, Rollout
from megatron_rl.simulation.lengths import Lengths, Pmf
from megatron_rl.simulation.results import Result

REASONING = Path(__file__).resolve().parents[3] / "shared" / "data" / "lengths" / "reasoning_pmf.csv.gz"
FREE = EngineModel(
    slots=1000, step_s=0.02, step_s_per_rollout=0.001, prefill_tokens_per_s=math.inf, kv_tokens=math.inf, prompt_tokens=10
)
SMALL: dict[str, Any] = {
    "prompts": 32,
    "group_size": 4,
    "steps": 25,
    "lengths": {"scale": 0.05, "max_tokens": 3277},
    "engines": {"count": 8, "slots": 64, "prompt_tokens": 16},
}


def rollouts(*lengths: int) -> list[Rollout]:
    return [Rollout(f"0#{number}", length) for number, length in enumerate(lengths)]


def run_engine(engine: Engine, members: Sequence[Rollout]) -> dict[str, float]:
    """The second at which each ends; slots and cache are watched on the way."""
    for rollout in members:
        engine.queue(rollout)
    engine.admit()
    ends: dict[str, float] = {}
    while engine.running:
        assert len(engine.running) <= engine.model.slots
        engine.advance(engine.next_event())
        assert engine.kv <= engine.model.kv_tokens + 1e-6
        ends |= {rollout.id: engine.now for rollout in engine.ended()}
        engine.admit()
    return ends


def batch_seconds(lengths: Sequence[int], model: EngineModel) -> float:
    """Step by step: all that are not at their end get a token."""
    batches = (sum(length > step for length in lengths) for step in range(max(lengths)))
    return sum(model.step_s + model.step_s_per_rollout * batch for batch in batches)


# One engine


def test_a_batch_of_given_lengths_takes_the_sum_of_its_steps() -> None:
    lengths = [3, 7, 7, 20]
    ends = run_engine(Engine(0, FREE), rollouts(*lengths))
    assert ends["0#3"] == pytest.approx(batch_seconds(lengths, FREE))
    assert ends["0#0"] == pytest.approx(3 * (0.02 + 0.004))
    assert ends["0#1"] == ends["0#2"] == pytest.approx(3 * 0.024 + 4 * 0.023)


def test_slots_are_never_exceeded_and_the_next_in_line_takes_a_free_one() -> None:
    ends = run_engine(Engine(0, replace(FREE, slots=2)), rollouts(5, 8, 4, 1))
    pair = 0.022
    assert ends == pytest.approx({"0#0": 5 * pair, "0#1": 8 * pair, "0#2": 9 * pair, "0#3": 9 * pair})


def test_prefill_stops_decoding_and_siblings_share_the_prompt() -> None:
    members = rollouts(100, 100)
    members[0].tokens, members[1].pays_prompt = 40, False
    engine = Engine(0, replace(FREE, prefill_tokens_per_s=100.0))
    ends = run_engine(engine, members)
    assert engine.prefill_s == pytest.approx((40 + 10) / 100)
    assert ends["0#1"] == pytest.approx(0.5 + 60 * 0.022 + 40 * 0.021)
    assert engine.busy_s == pytest.approx(ends["0#1"])


def test_the_cache_is_never_exceeded_and_what_it_throws_out_comes_back() -> None:
    lengths = [100] * 10
    model = replace(FREE, kv_tokens=400.0, prefill_tokens_per_s=1000.0)
    engine = Engine(0, model)
    ends = run_engine(engine, rollouts(*lengths))
    assert len(ends) == 10
    assert engine.retracted > 0
    assert engine.kv_peak <= 400 + 1e-6
    assert engine.prefill_s > 10 * 10 / 1000  # more than the prompts once each
    assert max(ends.values()) > batch_seconds(lengths, model)


# The cluster


def cluster_of(policy: Any, lengths: Lengths, model: EngineModel = FREE, engines: int = 2, **settings: Any) -> Cluster:
    values: dict[str, Any] = {"token_budget": 1000, "pool_capacity": 16, "group_size": 4, "retention_bound": 100} | settings
    return Cluster(Settings(policy=policy, **values), model, engines, Workload(lengths), stream_interval=4)


def of(**weights: float) -> Lengths:
    pmf = Pmf.of({int(name[1:]): weight for name, weight in weights.items()})
    return Lengths(pmf, (pmf,))


def test_a_synchronous_phase_lasts_as_long_as_its_batch() -> None:
    cluster = cluster_of("synchronous", of(_10=1, _50=1, _400=1), engines=1)
    for _ in range(3):
        phase = cluster.run_phase()
        assert len(phase.trained_lengths) == 16
        assert phase.rollout_s == pytest.approx(batch_seconds(phase.trained_lengths, FREE))
        assert phase.generated == phase.trained == sum(phase.trained_lengths)


def test_groups_go_to_the_engine_with_the_least_to_do() -> None:
    cluster = cluster_of("synchronous", of(_400=1), engines=4, pool_capacity=48)
    phase = cluster.run_phase()
    assert phase.rollout_s == pytest.approx(batch_seconds([400] * 12, FREE))  # three groups each, not one more anywhere


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("synchronous", {}),
    ("c3po_pp", {}),
    ("c3po_pp", {"budget_counts": "finished"}),
    ("c3po_pp", {"retention_bound": 1, "on_stale": "drop_group"}),
    ("c3po_pp", {"retention_bound": 1, "on_stale": "restart"}),
    ("c3po_pp", {"group_release": "early"}),
    ("c3po_pp", {"warm_start": True}),
    ("count", {"groups_per_phase": 2}),
    ("count", {"groups_per_phase": 2, "unfinished": "discard"}),
]


@pytest.mark.parametrize(("policy", "settings"), SETTINGS)
@pytest.mark.parametrize("kv_tokens", [math.inf, 1000.0])
def test_generated_is_trained_and_discarded_and_in_the_pool(policy: str, settings: dict[str, Any], kv_tokens: float) -> None:
    model = replace(FREE, slots=6, prefill_tokens_per_s=2000.0, kv_tokens=kv_tokens)
    cluster = cluster_of(policy, of(_10=2, _50=3, _400=1), model, **settings)
    generated = trained = discarded = 0
    for _ in range(60):
        phase = cluster.run_phase()
        generated, trained, discarded = generated + phase.generated, trained + phase.trained, discarded + phase.discarded
        assert generated == trained + discarded + phase.pool_tokens
        assert phase.token_ages.total() == phase.trained > 0
        assert phase.kv_peak <= kv_tokens + 1e-6
        assert all(0 < length <= 400 for length in phase.trained_lengths)
        assert not any(engine.running or engine.waiting for engine in cluster.engines)
    assert (discarded > 0) == (settings.get("on_stale") is not None or settings.get("unfinished") == "discard")


def test_the_budget_stops_a_phase_within_what_streams_do_not_show_yet() -> None:
    cluster = cluster_of("c3po_pp", of(_50=9, _400=1), engines=4, pool_capacity=64, token_budget=5000)
    phases = [cluster.run_phase() for _ in range(30)]
    assert all(0 <= phase.overshoot < 64 * 4 + 64 for phase in phases)  # an interval and a step of each
    assert all(phase.generated == 5000 + phase.overshoot for phase in phases)


def test_a_tokens_age_is_counted_from_the_version_that_made_it() -> None:
    """One after the other, 400 tokens each and 500 a phase: 400 + 100, 300 + 200, 200 + 300, 100 + 400."""
    cluster = cluster_of("c3po_pp", of(_400=1), replace(FREE, slots=1), 1, group_size=1, pool_capacity=3, token_budget=500)
    phases = [cluster.run_phase() for _ in range(4)]
    assert [phase.generated for phase in phases] == [500] * 4
    assert [dict(phase.token_ages) for phase in phases] == [{0: 400}, {1: 100, 0: 300}, {1: 200, 0: 200}, {1: 300, 0: 500}]
    assert [phase.pool_tokens for phase in phases] == [100, 200, 300, 0]


def test_schedulers_meet_the_same_prompts_in_the_same_order() -> None:
    lengths = of(_10=1, _50=1, _400=1)
    synchronous, count = cluster_of("synchronous", lengths), cluster_of("count", lengths, groups_per_phase=4)
    for _ in range(3):
        assert sorted(synchronous.run_phase().trained_lengths) == sorted(count.run_phase().trained_lengths)


def test_a_count_leaves_the_places_of_ended_members_empty() -> None:
    lengths = of(_10=3, _400=1)
    settings = Settings(1, 16, 4, 100, policy="count", groups_per_phase=2)
    cluster = Cluster(settings, FREE, 2, Workload(lengths), 4)
    for _ in range(40):
        cluster.run_phase()
        assert len(cluster.rollouts) <= 4 * 4


# Known outcomes, at a tenth of a cluster


@cache
def compared(**changes: Any) -> list[Result]:
    run = SimulationRun.model_validate(SMALL | changes)
    lengths = read_lengths(run)
    price = train_s_per_token(run, reference(run, lengths).simulate(lambda: None))
    jobs = [Job(run, scheduler, lengths) for scheduler in (run.scheduler, *run.against)]
    return [job.result(job.simulate(lambda: None), price) for job in jobs]


def test_with_sigma_by_the_formula_speed_comes_without_bias() -> None:
    ours, synchronous, _ = compared()
    assert abs(ours.length_bias) < 0.04  # 3,200 rollouts: one standard deviation is 2 %
    assert 0.85 < ours.tail_ratio < 1.15
    assert ours.dropped_fraction == 0
    assert ours.token_age_max <= ours.retention_bound + 1
    assert against(ours, synchronous)["rollout_speedup"] > 3
    assert 1 < against(ours, synchronous)["end_to_end_speedup"] < against(ours, synchronous)["rollout_speedup"]
    assert synchronous.train_s / synchronous.step_s == pytest.approx(0.375, abs=0.01)
    for result in (ours, synchronous):
        assert 0 < result.work_conserving_fraction <= 1
        assert sum(result.token_ages.values()) == pytest.approx(1)
        assert 0 <= result.engine_idle_fraction < 1


def test_a_tight_sigma_that_drops_groups_keeps_the_pool_busy_and_loses_the_tail() -> None:
    ours = compared(retention_bound=1, on_stale="drop_group")[0]
    assert ours.length_bias < -0.15
    assert ours.tail_ratio < 0.2
    assert ours.dropped_fraction > 0.2


def test_the_first_steps_train_what_is_short() -> None:
    assert compared()[0].cold_start_bias[0] < -0.2


def test_speedups_at_the_top_are_those_over_synchronous() -> None:
    results = compared()
    told = as_dict(results)
    assert told["rollout_speedup"] == told["against"]["synchronous"]["rollout_speedup"]
    assert set(told) >= {"rollout_speedup", "end_to_end_speedup", "work_conserving_fraction", "length_bias"}
    assert [each["scheduler"] for each in told["results"]] == ["c3po_pp", "synchronous", "count"]


@pytest.mark.skipif(not REASONING.exists(), reason="the reasoning lengths are not beside this checkout")
def test_the_first_claim_holds_in_small_on_real_lengths() -> None:
    """A quarter of the prompts on a quarter of the engines; the tool's --claims has the whole."""
    claim = CLAIMS[0]
    full = claim.run(SimulationRun(lengths=LengthsConfig(path=str(REASONING), scale=14), steps=12))
    run = full.model_copy(update={"prompts": full.prompts // 4, "engines": full.engines.model_copy(update={"count": 16})})
    lengths = read_lengths(run)
    ours, base = Job(run, "c3po_pp", lengths), Job(run, "synchronous", lengths)
    base_phases = base.simulate(lambda: None)
    price = train_s_per_token(run, base_phases)
    judged = claim.judge(ours.result(ours.simulate(lambda: None), price), base.result(base_phases, price))
    assert all(holds for name, *_, holds in judged if name in claim.at_least), judged


def test_what_a_scheduler_does_not_look_at_makes_no_other_run() -> None:
    run, lengths = SimulationRun(), of(_1=1)
    other = SimulationRun.model_validate({"count": {"unfinished": "discard"}, "pool_capacity": 3840, "against": []})
    assert Job(run, "c3po_pp", lengths).key == Job(other, "c3po_pp", lengths).key
    assert Job(run, "count", lengths).key != Job(other, "count", lengths).key
    assert len({Job(run, "c3po_pp", lengths).key, Job(other, "c3po_pp", lengths).key, reference(run, lengths).key}) == 2
