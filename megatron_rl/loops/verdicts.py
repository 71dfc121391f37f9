"""Scores of rollouts as they end, while their groups still wait for slower members.

Most members of a group end long before its last. Verifiers that begin then have less to do once it is complete: what a phase waits
for after its last token is the score of its last rollouts, not of its last groups (benchmarks/reward_overlap.py). Complete groups
come first: what is scored ahead is one call at a time, and begins only while none of them waits.

Invariants (tests/unit/test_conductor.py): every rollout is scored once; the scores of a group are those of its members, in their
order; a group that is dropped and offered again is judged by its new tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from megatron_rl.ports import Rewards
from megatron_rl.types import Rollout, Score

_Key = tuple[str, int]
_Call = asyncio.Task[list[Score]]


class Verdicts:
    """Of one event loop. What is under way when a phase ends goes on, and is there in a later one."""

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards
        self._ended: dict[_Key, Rollout] = {}  # not asked about yet
        self._called: dict[_Key, tuple[_Call, int]] = {}  # the call it is in, its place there
        self._ahead: _Call | None = None
        self._groups = 0  # that wait for their scores

    def expect(self, rollouts: Sequence[Rollout]) -> None:
        """These have ended, and their groups have not."""
        self._ended |= {_key(rollout): rollout for rollout in rollouts}
        self._go_ahead()

    async def of(self, rollouts: Sequence[Rollout]) -> list[Score]:
        self._groups += 1
        try:
            for rollout in rollouts:
                self._ended.pop(_key(rollout), None)
            if late := [rollout for rollout in rollouts if _key(rollout) not in self._called]:
                self._call(late)
            calls = [self._called.pop(_key(rollout)) for rollout in rollouts]
            scores = [(await call)[place] for call, place in calls]
        finally:
            self._groups -= 1
        self._go_ahead()  # and not where this was cancelled: its loop ends
        return scores

    def keep(self, rollout_ids: Collection[str]) -> None:
        """All others were dropped."""
        self._ended = {key: rollout for key, rollout in self._ended.items() if key[0] in rollout_ids}
        self._called = {key: called for key, called in self._called.items() if key[0] in rollout_ids}

    def _go_ahead(self) -> None:
        if self._ended and not self._groups and (self._ahead is None or self._ahead.done()):
            self._ahead = self._call(list(self._ended.values()))
            self._ahead.add_done_callback(lambda call: None if call.cancelled() else self._go_ahead())
            self._ended.clear()

    def _call(self, rollouts: Sequence[Rollout]) -> _Call:
        call = asyncio.create_task(self._rewards.score(rollouts))
        self._called |= {_key(rollout): (call, place) for place, rollout in enumerate(rollouts)}
        return call


def _key(rollout: Rollout) -> _Key:
    """Its id comes again, with other tokens, when its group was dropped."""
    return rollout.id, hash(rollout.tokens)
