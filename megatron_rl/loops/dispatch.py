"""Which engine runs which rollouts: the one with the fewest outstanding tokens, or the one that has the group's prompt.

Outstanding are the tokens that its rollouts hold in the KV cache, and for each as many again as rollouts were seen to have at their
end. A fast engine works its share off sooner and gets the next group sooner: speeds need not be known.

Invariants: members that start together go to one engine, which computes their prompt once; so do later ones of the group, and
rollouts that were cut, back to where their prefix may be cached, unless that engine has a good deal more to do than the idlest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

AFFINITY = 1.25  # times the idlest engine's outstanding tokens: beyond it the prefix is computed again elsewhere


class Dispatch:
    def __init__(self) -> None:
        self.in_flight: dict[str, dict[str, int]] = defaultdict(dict)  # engine -> rollout -> its tokens, the prompt's included
        self._held: dict[str, int] = defaultdict(int)  # engine -> the sum of these
        self._home: dict[str, str] = {}  # group -> engine, under the present weights
        self._ended = self._ended_tokens = 0

    @property
    def any_in_flight(self) -> bool:
        return any(self.in_flight.values())

    def outstanding(self, engine: str) -> int:
        expected = self._ended_tokens // self._ended if self._ended else 0
        return self._held[engine] + expected * len(self.in_flight[engine])

    def assign(self, starting: Mapping[str, int], engines: Sequence[str]) -> dict[str, list[str]]:
        """`starting`: tokens of each rollout so far, its prompt's included. What each engine gets, from now on in flight there."""
        by_group: dict[str, list[str]] = defaultdict(list)
        for rollout_id in starting:
            by_group[rollout_id.rpartition("#")[0]].append(rollout_id)
        assigned: dict[str, list[str]] = defaultdict(list)
        for group, members in by_group.items():
            tokens = sum(starting[name] for name in members)
            engine, home = min(engines, key=self.outstanding), self._home.get(group)
            if home is not None and home in engines and self.outstanding(home) <= AFFINITY * self.outstanding(engine) + tokens:
                engine = home
            self._home[group] = engine
            self._held[engine] += tokens
            self.in_flight[engine].update((name, starting[name]) for name in members)
            assigned[engine] += members
        return assigned

    def grew(self, engine: str, rollout_id: str, tokens: int) -> None:
        self.in_flight[engine][rollout_id] += tokens
        self._held[engine] += tokens

    def left(self, engine: str, rollout_id: str, *, at_its_end: bool) -> None:
        tokens = self.in_flight[engine].pop(rollout_id)
        self._held[engine] -= tokens
        if at_its_end:
            self._ended += 1
            self._ended_tokens += tokens

    def forget_prefixes(self) -> None:
        """The weights have changed, and every cache was flushed."""
        self._home.clear()
