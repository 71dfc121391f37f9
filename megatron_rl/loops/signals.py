"""Ctrl-C and SIGTERM ask for a clean end; the loop decides when."""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """Set by the first SIGINT or SIGTERM; further ones change nothing, so a launcher that forwards the terminal's is harmless."""

    def __init__(self) -> None:
        self.requested = False
        self._number = signal.SIGTERM.value

    def install(self) -> StopFlag:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested, self._number = True, number

    def exit_if_requested(self, complete: bool) -> None:
        """An incomplete run ends as the signal would have ended it: what comes after it in a script must not run."""
        if not complete:
            raise SystemExit(128 + self._number)
