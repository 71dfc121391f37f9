"""How far a pass over rows is, for one whose end nobody knows: a line now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


def counted(rows: Iterable[T], what: str, every_s: float = 5.0, skipped: int = 0) -> Iterator[T]:
    """`skipped`: so many at the start are there already, and pass at no cost."""
    started = said = time.monotonic()
    number = 0
    for number, row in enumerate(rows, start=1):
        yield row
        if (now := time.monotonic()) - said >= every_s:
            said = now
            log.info("%s: %d rows, %.0f rows/s", what, number, max(number - skipped, 0) / (now - started))
    log.info("%s: %d rows in %.1f s", what, number, time.monotonic() - started)
