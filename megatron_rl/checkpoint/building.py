"""A folder that is built piece by piece, by several processes, over several tries, and appears by one rename.

    NAME.tmp/folder/     what will be NAME
             pieces/0    what the maker of piece 0 has to tell whoever finishes; it is there once the piece is on disk
             of.json     what is being built of what: another source or other settings start anew

Invariants: `NAME` is absent or complete; a piece that is done is not made again, whatever ended the try that made it.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.disk import fsync

log = logging.getLogger(__name__)


class Building:
    def __init__(self, final: Path) -> None:
        self.final, self.root = final, final.with_name(f"{final.name}.tmp")
        self.folder, self._pieces = self.root / "folder", self.root / "pieces"

    def begin(self, of: Mapping[str, Any]) -> None:
        """One process, before all others. Goes on with what is there where it is of the same."""
        wanted, file = json.loads(json.dumps(of)), self.root / "of.json"
        if file.exists():
            found = json.loads(file.read_text())
            changed = sorted(key for key in wanted if found.get(key) != wanted[key])
            if not changed:
                log.info("%s: going on, %d pieces are done", self.final, len(list(self._pieces.glob("*[0-9]"))))
                return
            log.info("%s: starting anew, since the unfinished one differs in %s", self.final, ", ".join(changed))
        for old in (file, self.folder, self._pieces):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        for new in (self.folder, self._pieces):
            new.mkdir(parents=True)
        self._write(file, json.dumps(wanted).encode())

    def is_done(self, piece: int) -> bool:
        return (self._pieces / str(piece)).exists()

    def done(self, piece: int, result: Any) -> None:
        self._write(self._pieces / str(piece), pickle.dumps(result))

    def results(self, count: int) -> list[Any]:
        return [pickle.loads((self._pieces / str(piece)).read_bytes()) for piece in range(count)]

    def commit(self) -> None:
        """One process, when all pieces are done."""
        for path in (*self.folder.rglob("*"), self.folder):
            fsync(path)
        self.folder.rename(self.final)
        fsync(self.final.parent)
        shutil.rmtree(self.root)

    @staticmethod
    def _write(file: Path, content: bytes) -> None:
        partial = file.with_name(f"{file.name}.partial")
        partial.write_bytes(content)
        fsync(partial)
        partial.rename(file)
