"""Whether a server that owes us something still lives, and the end of every wait for one that does not.

A stream may be silent for long in good health: its requests may queue behind another stream's. So silence is the whole server's,
and a reason to ask, not to give up: SGLang's /health answers for as long as the scheduler turns, however busy
(managers/scheduler.py:2093), and does not when the server or its scheduler is stopped or hangs.

Invariants:
- a server that has sent nothing for `stall_timeout_s` while it owes something is asked, and is lost if for as long again it neither
  says that it is well nor sends anything;
- so is one that says it is well and sends nothing for `request_timeout_s`;
- every wait for a lost server ends at once, whoever noticed, and whatever a socket still holds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")
ASK_AGAIN_S = 0.2  # after an answer that is not the one we want


class GivenUp(Exception):
    """The server was lost while we waited."""


class Watch:
    """Of one server. `is_well` asks it once and never raises; `give_up` is told the reason, and ends the waits by `end`."""

    def __init__(
        self,
        stall_timeout_s: float,
        request_timeout_s: float,
        is_well: Callable[[], Awaitable[bool]],
        give_up: Callable[[str], None],
    ) -> None:
        self._stall_s, self._request_s = stall_timeout_s, request_timeout_s
        self._is_well, self._give_up = is_well, give_up
        self._heard = 0.0
        self._streams = 0
        self._ended = False
        self._watcher: asyncio.Task[None] | None = None
        self._waits: set[asyncio.Timeout] = set()

    def heard(self) -> None:
        """The server has sent something."""
        self._heard = time.monotonic()

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[None]:
        """While it is open the server owes us something."""
        if self._watcher is None:
            self.heard()
            self._watcher = asyncio.create_task(self._watch())
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
            if not self._streams:
                self._watcher.cancel()
                self._watcher = None

    async def wait(self, work: Awaitable[T]) -> T:
        """Raises GivenUp when the server is lost meanwhile."""
        try:
            async with asyncio.timeout_at(0.0 if self._ended else None) as until_lost:
                self._waits.add(until_lost)
                try:
                    return await work
                finally:
                    self._waits.discard(until_lost)
        except TimeoutError:
            if until_lost.expired():
                raise GivenUp from None
            raise

    def end(self) -> None:
        """End every wait there is, and any to come: the server is lost."""
        self._ended = True
        for until_lost in self._waits:
            until_lost.reschedule(0.0)

    async def _watch(self) -> None:
        while True:
            silent = self._silent_for()
            if silent >= self._request_s:
                return self._give_up(
                    f"sent nothing for engine.request_timeout_s={self._request_s:g}, though it says that it is well"
                )
            if silent < self._stall_s:
                await asyncio.sleep(min(self._stall_s, self._request_s) - silent)
            elif await self._answers():
                await asyncio.sleep(min(self._stall_s, max(0.0, self._request_s - self._silent_for())))
            else:
                return self._give_up(
                    f"wedged: it sent nothing for engine.stall_timeout_s={self._stall_s:g}, and did not answer /health for as long"
                )

    async def _answers(self) -> bool:
        """Whether within the limit it says that it is well, or sends anything else."""
        asked = time.monotonic()
        try:
            async with asyncio.timeout(self._stall_s):
                while not await self._is_well():
                    await asyncio.sleep(ASK_AGAIN_S)
            return True
        except TimeoutError:
            return self._heard > asked

    def _silent_for(self) -> float:
        return time.monotonic() - self._heard
