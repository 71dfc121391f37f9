"""What a simulated cluster costs: 100,000 rollouts in flight on 2,000 engines, a million events through the scheduler, on one core.

    python benchmarks/simulated_events.py [--rollouts 100000] [--engines 2000] [--events 1000000]

Phases of C3PO++ on the built-in lengths, prefill charged; whole phases are run until that many events have been taken in. Prints
seconds (of the CPU, and by the clock) and what the process has grown by for each rollout in flight.
"""

from __future__ import annotations

import argparse
import math
import resource
import time

from megatron_rl.scheduler.c3po_pp import Settings
from megatron_rl.simulation.cluster import Cluster, Workload
from megatron_rl.simulation.engine import EngineModel
from megatron_rl.simulation.lengths import built_in, scaled


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--engines", type=int, default=2_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    arguments = parser.parse_args()

    lengths = scaled(built_in(), 1.0, 65_536)
    budget = round(arguments.rollouts * lengths.all.mean)
    settings = Settings(token_budget=budget, pool_capacity=arguments.rollouts, group_size=8, retention_bound=6)
    model = EngineModel(256, 0.02, 0.00005, 30_000.0, math.inf, 256)
    before = resident_bytes()
    cluster = Cluster(settings, model, arguments.engines, Workload(lengths), stream_interval=8)
    cpu, clock, phases, simulated = time.process_time(), time.perf_counter(), 0, 0.0
    while cluster.events < arguments.events:
        simulated += cluster.run_phase().rollout_s
        phases += 1
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    print(
        f"{cluster.events} events, {cluster.state.unfinished} rollouts in the pool on {arguments.engines} engines, "
        f"{phases} phases of {simulated / phases:,.0f} simulated seconds: {cpu:.1f} s of CPU, {clock:.1f} s by the clock "
        f"({cpu / cluster.events * 1e6:.1f} us an event); {(resident_bytes() - before) / arguments.rollouts:,.0f} bytes a rollout"
    )


if __name__ == "__main__":
    main()
