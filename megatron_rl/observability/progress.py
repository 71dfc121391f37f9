"""How far a long copy is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

log = logging.getLogger(__name__)
Advance = Callable[[int], None]  # by so many bytes


@contextmanager
def progress(what: str, total: int, shown: bool, every_s: float = 5.0) -> Iterator[Advance]:
    """`shown`: false on the ranks that have nothing to say."""
    console = Console(stderr=True)
    if not shown:
        yield lambda nbytes: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda nbytes: bar.advance(task, nbytes)
    else:
        yield _lines(what, total, every_s)


def _lines(what: str, total: int, every_s: float) -> Advance:
    done, started, said = 0, time.monotonic(), time.monotonic()

    def advance(nbytes: int) -> None:
        nonlocal done, said
        done += nbytes
        now = time.monotonic()
        if now - said >= every_s or done == total:
            said = now
            log.info("%s: %.2f of %.2f GB, %.0f MB/s", what, done / 1e9, total / 1e9, done / 1e6 / max(now - started, 1e-9))

    return advance
