"""What the rollout scheduler knows, as plain values.

Invariant: from_json(to_json(state)) == state, through any JSON serialiser, one that sorts keys included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

ENDED = ("finished", "released")
Status = Literal["waiting", "running", "finished", "released"]  # released: early, its siblings are still at it


@dataclass(slots=True)
class Member:
    tokens: int = 0
    first_version: int | None = None  # of the weights that sampled its first token
    status: Status = "waiting"


@dataclass(slots=True)
class Counts:
    """Of one phase."""

    generated: int = 0  # tokens
    finished: int = 0  # tokens of the rollouts that finished, earlier phases' share included
    released: int = 0  # groups, without those found to carry no gradient
    unjudged: int = 0  # of the released, under dynamic sampling
    useless: int = 0  # groups found to carry no gradient, under dynamic sampling
    resumed: int = 0  # rollouts that went on from an earlier phase's tokens
    restarted: int = 0  # rollouts
    dropped_stale: int = 0  # rollouts with tokens, of groups dropped for a stale member
    discarded: int = 0  # tokens of the restarted and the dropped


@dataclass
class State:
    """All that a run's scheduler knows; JSON by `to_json`. Group order is admission order."""

    phase: Literal["idle", "running", "stopping"] = "idle"
    version: int = -1
    wants: int = 0  # groups asked for and not yet offered
    counts: Counts = field(default_factory=Counts)
    groups: dict[str, list[Member]] = field(default_factory=dict)  # with an unfinished member
    training_pool: dict[str, list[int]] = field(default_factory=dict)  # released, untrained: each member's first version
    unfinished: int = 0  # the pool's size
    running: int = 0
    ready: int = 0  # open groups with something that early release may take
    is_first_phase: bool = False
    first_fill: dict[str, None] = field(default_factory=dict)  # of a warm start: open groups that the first phase began with

    def to_json(self) -> dict[str, Any]:
        """Lists, not objects, where order matters: it survives a serialiser that sorts keys."""
        return {
            "phase": self.phase,
            "version": self.version,
            "wants": self.wants,
            "counts": asdict(self.counts),
            "groups": [[name, [[m.tokens, m.first_version, m.status] for m in members]] for name, members in self.groups.items()],
            "ready": self.ready,
            "is_first_phase": self.is_first_phase,
            "first_fill": list(self.first_fill),
            "training_pool": [[name, versions] for name, versions in self.training_pool.items()],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> State:
        groups = {name: [Member(*member) for member in members] for name, members in value["groups"]}
        statuses = [member.status for members in groups.values() for member in members]
        return cls(
            phase=value["phase"],
            version=value["version"],
            wants=value["wants"],
            counts=Counts(**value["counts"]),
            groups=groups,
            training_pool={name: list(versions) for name, versions in value["training_pool"]},
            unfinished=sum(status not in ENDED for status in statuses),
            ready=value.get("ready", 0),
            is_first_phase=value.get("is_first_phase", False),
            first_fill=dict.fromkeys(value.get("first_fill", ())),
            running=statuses.count("running"),
        )
