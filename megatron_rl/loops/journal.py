"""The write-ahead log of the rollouts: what the pool was told since the last checkpoint, so that a run that was killed need not
generate it again. `journal/step_N.log` holds what came after the checkpoint of step N.

A record is its length and CRC-32, then a line of JSON and the arrays that it announces: 16 bytes a token, and its experts and
support where they are recorded.

Invariants:
- what was written survives the death of the process, and after `sync` that of the machine;
- a torn or damaged tail is cut off; the entries before it come back as they were, bit for bit;
- a journal that was written under other settings or from another state is left out, in one line;
- a disk that takes no more ends the journal, not the run.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from io import BufferedRandom, BytesIO
from pathlib import Path
from typing import Any

from megatron_rl.config import UserError
from megatron_rl.loops.pool import Began, Cut, Entry, Scored, Stopped, Streamed, Taken
from megatron_rl.types import Progress, Score

log = logging.getLogger(__name__)
FRAME = struct.Struct("<II")  # length, CRC-32
KINDS = {kind.__name__: kind for kind in (Began, Cut, Stopped, Taken)}  # of plain numbers and names


class Journal:
    """`about`: what else the entries depend on (model, rewards), beside the state and settings of each `fingerprint`."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, about
        self._file: BufferedRandom | None = None

    def reopen(self, step: int, fingerprint: Mapping[str, Any]) -> list[Entry]:
        """What was written after the checkpoint of `step` (0: the start of the run), to which later entries are appended.
        `fingerprint` says what it has to have been written under."""
        path, wanted = self._path(step), json.loads(self._head(fingerprint))
        payloads = list(_records(path)) if path.exists() else []
        try:
            found = json.loads(payloads[0]) if payloads else None
            entries = [_decoded(payload) for payload in payloads[1:]] if found == wanted else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a journal of this program ({error}); remove it to go on without", exit_code=1) from error
        if found == wanted:
            self._open(path, keep=sum(FRAME.size + len(payload) for payload in payloads))
        else:
            if payloads:
                log.warning("%s was written under other settings: what it holds is generated again", path)
            self.begin(step, fingerprint)
        return entries

    def begin(self, step: int, fingerprint: Mapping[str, Any]) -> None:
        """The checkpoint of `step` is on disk: what is older is of no more use."""
        self._open(self._path(step), keep=0)
        self._write(self._head(fingerprint))
        self.sync()
        for other in self._folder.glob("step_*.log"):
            if other != self._path(step):
                other.unlink(missing_ok=True)

    def append(self, entry: Entry) -> None:
        self._write(_encoded(entry))

    def sync(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())

    def _head(self, fingerprint: Mapping[str, Any]) -> bytes:
        return json.dumps({"about": self._about, **fingerprint}).encode()

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step}.log"

    def _open(self, path: Path, keep: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._file:
            self._file.close()
        self._file = path.open("r+b" if keep else "w+b")
        self._file.truncate(keep)
        self._file.seek(keep)

    def _write(self, payload: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(FRAME.pack(len(payload), zlib.crc32(payload)) + payload)
            self._file.flush()
        except OSError as error:
            log.warning("%s: %s. A killed run will generate again what comes after the last checkpoint", self._folder, error)
            self._file = None


def _records(path: Path) -> Iterator[bytes]:
    """The payloads up to the first that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while len(frame := file.read(FRAME.size)) == FRAME.size:
            length, crc = FRAME.unpack(frame)
            payload = file.read(length) if length <= size else b""
            if len(payload) < length or zlib.crc32(payload) != crc:
                log.warning("%s ends in a torn record: %d bytes are left out", path, size - file.tell() + FRAME.size + len(payload))
                return
            yield payload


def _encoded(entry: Entry) -> bytes:
    match entry:
        case Streamed(messages):
            heads = [[m.rollout_id, len(m.tokens), len(m.experts), m.finish_reason, len(m.support)] for m in messages]
            arrays = (
                array("i", [token for m in messages for token in m.tokens]),
                array("d", [logprob for m in messages for logprob in m.engine_logprobs]),
                array("i", [version for m in messages for version in m.versions]),
                array("i", [len(ids) for m in messages for ids in m.support]),
            )
            parts = (*(values.tobytes() for values in arrays), *(part for m in messages for part in (m.experts, *m.support)))
            return json.dumps({"Streamed": heads}).encode() + b"\n" + b"".join(parts)
        case Scored(group_id, scores):
            return json.dumps({"Scored": [group_id, [asdict(score) for score in scores]]}).encode()
        case _:
            return json.dumps({type(entry).__name__: list(asdict(entry).values())}).encode()


def _decoded(payload: bytes) -> Entry:
    line, _, data = payload.partition(b"\n")
    ((kind, value),) = json.loads(line).items()
    if kind == "Streamed":
        return Streamed(_messages(value, data))
    if kind == "Scored":
        return Scored(value[0], tuple(Score(**score) for score in value[1]))
    entry: Entry = KINDS[kind](*value)
    return entry


def _messages(heads: Sequence[tuple[str, int, int, Any, int]], data: bytes) -> tuple[Progress, ...]:
    file = BytesIO(data)
    tokens, logprobs, versions, sizes = array("i"), array("d"), array("i"), array("i")
    total = sum(count for _, count, _, _, _ in heads)
    for values, count in ((tokens, total), (logprobs, total), (versions, total), (sizes, sum(head[-1] for head in heads))):
        values.frombytes(file.read(values.itemsize * count))
    messages, at, support_at = [], 0, 0
    for name, count, expert_bytes, reason, supports in heads:
        part = slice(at, at + count)
        experts = file.read(expert_bytes)
        support = tuple(file.read(size) for size in sizes[support_at : support_at + supports])
        values_of = (tuple(tokens[part]), tuple(logprobs[part]), tuple(versions[part]))
        messages.append(Progress(name, *values_of, reason, experts, support))
        at, support_at = at + count, support_at + supports
    return tuple(messages)
