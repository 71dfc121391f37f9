"""What the rollout scheduler is told, what it answers, and the numbers it works with. Ids and counts alone, all immutable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Settings:
    token_budget: int  # Phi: tokens per phase
    pool_capacity: int  # Omega: unfinished rollouts
    group_size: int
    retention_bound: int  # sigma, in weight versions
    budget_counts: Literal["generated", "finished"] = "generated"  # the report's prose, or its Algorithm 1
    on_stale: Literal["finish", "restart", "drop_group"] = "finish"
    policy: Literal["c3po_pp", "synchronous", "count"] = "c3po_pp"
    groups_per_phase: int = 0  # of policy "count": what ends a phase
    unfinished: Literal["carry", "discard"] = "carry"  # of policy "count": what becomes of the rest then

    warm_start: bool = False  # of policy c3po_pp: the first phase also waits for the groups it began with, the long ones among them
    group_release: Literal["complete", "early"] = "complete"  # early: what has finished of a group may be trained before the rest
    dynamic_sampling: bool = False  # every released group is Judged, and one without a gradient counts for nothing (DAPO)

    def __post_init__(self) -> None:
        if self.group_release == "early" and (self.policy != "c3po_pp" or self.on_stale == "drop_group"):
            raise ValueError(f"group_release=early is for policy c3po_pp, without on_stale=drop_group: {self}")
        if self.policy == "count" and not 1 <= self.groups_per_phase <= self.pool_capacity // self.group_size:
            raise ValueError(f"1 <= groups_per_phase <= pool_capacity // group_size does not hold: {self}")
        if self.token_budget < 1 or self.retention_bound < 0 or not 1 <= self.group_size <= self.pool_capacity:
            raise ValueError(f"token_budget >= 1, retention_bound >= 0 and 1 <= group_size <= pool_capacity do not hold: {self}")

    @property
    def target(self) -> int:
        """Groups that end a phase of the baselines."""
        return self.groups_per_phase if self.policy == "count" else self.pool_capacity // self.group_size


def rollout_id(group_id: str, sample: int) -> str:
    return f"{group_id}#{sample}"


def group_of(rollout_id: str) -> str:
    return rollout_id.rpartition("#")[0]


# Events: what the driver reports.


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """Engines are ready under weights `version`: a new version starts a new phase, the same one goes on with a phase cut short."""

    version: int


@dataclass(frozen=True, slots=True)
class GroupOffered:
    """The answer to one WantGroup: a group new to the state, of group_size rollouts. Unanswered wants end with their phase."""

    group_id: str


@dataclass(frozen=True, slots=True)
class Generated:
    rollout_id: str
    tokens: int  # since the last such event of this rollout


@dataclass(frozen=True, slots=True)
class Finished:
    """The rollout has reached its end; its last tokens came before, as Generated."""

    rollout_id: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A running rollout runs no more: aborted, or its engine was lost. What it has generated stays."""

    rollout_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """A shutdown: end the phase now, whatever its budget. Ignored when no phase runs or it is ending already."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Under dynamic sampling, once for everything released: whether it carries a gradient. If not it is gone."""

    part_id: str
    useful: bool


@dataclass(frozen=True, slots=True)
class Trained:
    """These groups (or parts) have left the training pool for good: trained, or of no use for it."""

    part_ids: tuple[str, ...]


Event = PhaseStarted | GroupOffered | Generated | Finished | Interrupted | Stop | Judged | Trained


# Actions: what the driver does, in order.


@dataclass(frozen=True, slots=True)
class WantGroup:
    """Offer one more group; dropped ones first."""


@dataclass(frozen=True, slots=True)
class Start:
    """Begin the rollout, or go on with it; never aborted or lost without an Interrupted."""

    rollout_id: str


@dataclass(frozen=True, slots=True)
class StopAll:
    """Abort everything; each running rollout then reports Finished or Interrupted."""


@dataclass(frozen=True, slots=True)
class Release:
    """These members, finished, are in the training pool: the whole group, or under early release a part with an id of its own."""

    part_id: str
    rollout_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Restart:
    """Discard the rollout's tokens; it begins anew."""

    rollout_id: str


@dataclass(frozen=True, slots=True)
class DropGroup:
    """Discard all members; the state forgets the group, its prompt must be offered again (under the same id or another)."""

    group_id: str


@dataclass(frozen=True, slots=True)
class PhaseDone:
    """Nothing runs any more."""


Action = WantGroup | Start | StopAll | Release | Restart | DropGroup | PhaseDone
