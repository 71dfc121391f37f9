"""Ctrl-C and SIGTERM ask for a clean end; the loop decides when."""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """Set by the first SIGINT or SIGTERM; further ones change nothing, so a launcher that forwards the terminal's is harmless."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> StopFlag:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
