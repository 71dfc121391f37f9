"""What the rollout scheduler costs: 100,000 rollouts in flight and a million events on one core.

    python benchmarks/scheduler_events.py [--rollouts 100000] [--events 1000000]

Progress of every rollout in turn (64 tokens a message, some finish and make room for new groups), phases that end on the budget and
carry the pool on, and one checkpoint of the whole state. Prints seconds; a million events should take well under 60 s.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import tracemalloc
from collections import deque

from megatron_rl.scheduler.c3po_pp import (
    Event,
    Finished,
    Generated,
    GroupOffered,
    Interrupted,
    PhaseStarted,
    Settings,
    Start,
    State,
    StopAll,
    Trained,
    WantGroup,
    step,
)

GROUP, TOKENS = 8, 64


class Driver:
    def __init__(self, rollouts: int) -> None:
        self.settings = Settings(token_budget=rollouts * 3 * TOKENS, pool_capacity=rollouts, group_size=GROUP, retention_bound=100)
        self.state, self.running = State(), deque[str]()
        self.events = self.groups = self.phases = 0

    def send(self, event: Event) -> None:
        pending = deque([event])
        while pending:
            self.events += 1
            for action in step(self.state, pending.popleft(), self.settings):
                if isinstance(action, Start):
                    self.running.append(action.rollout_id)
                elif isinstance(action, WantGroup):
                    pending.append(GroupOffered(f"0:{self.groups}"))
                    self.groups += 1
                elif isinstance(action, StopAll):
                    pending.extend(Interrupted(name) for name in self.running)
                    self.running.clear()

    def start(self) -> None:
        self.send(Trained(tuple(self.state.training_pool)))
        self.send(PhaseStarted(self.phases))
        self.phases += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    arguments = parser.parse_args()

    tracemalloc.start()
    Driver(arguments.rollouts).start()
    driver = Driver(arguments.rollouts)
    before = tracemalloc.get_traced_memory()[0]
    driver.start()
    driver.running.clear()
    in_state = (tracemalloc.get_traced_memory()[0] - before) / driver.state.unfinished
    tracemalloc.stop()

    draw, driver = random.Random(0), Driver(arguments.rollouts)
    started = time.perf_counter()
    while driver.events < arguments.events:
        if not driver.running:
            driver.start()
        name = driver.running.popleft()
        driver.running.append(name)
        driver.send(Generated(name, TOKENS))
        if driver.running and draw.random() < 0.1:
            driver.send(Finished(driver.running.pop()))
    seconds = time.perf_counter() - started

    started = time.perf_counter()
    text = json.dumps(driver.state.to_json())
    assert State.from_json(json.loads(text)) == driver.state
    checkpoint = time.perf_counter() - started
    print(
        f"{driver.events} events, {driver.state.unfinished} rollouts in the pool, {driver.phases} phases: {seconds:.1f} s "
        f"({seconds / driver.events * 1e6:.1f} us an event); {in_state:.0f} bytes a rollout; "
        f"state as JSON {len(text) / 1e6:.1f} MB, written, read and compared in {checkpoint:.2f} s"
    )


if __name__ == "__main__":
    main()
