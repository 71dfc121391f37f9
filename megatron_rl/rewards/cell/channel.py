"""Messages over a socket: four bytes of length, then JSON. Both ends of every sandbox use it.

Invariant: a message longer than the reader's limit, or one that is no JSON, is a ValueError of the reader before it holds it.
"""

from __future__ import annotations

import json
import os
from typing import Any

HEADER = 4
PIECE = 2**20


class Channel:
    def __init__(self, fd: int, limit: int) -> None:
        self.fd = fd
        self._limit = limit

    def send(self, message: Any) -> None:
        body = json.dumps(message).encode()
        left = memoryview(len(body).to_bytes(HEADER, "big") + body)
        while left:
            left = left[self.write(left) :]

    def receive(self) -> Any:
        length = int.from_bytes(self._exactly(HEADER), "big")
        if length > self._limit:
            raise ValueError(f"a message of {length:,} bytes; the limit is {self._limit:,}")
        try:
            return json.loads(self._exactly(length))
        except RecursionError:
            raise ValueError("a message nested too deeply") from None

    def write(self, data: memoryview) -> int:
        return os.write(self.fd, data)

    def read(self, count: int) -> bytes:
        return os.read(self.fd, count)

    def close(self) -> None:
        os.close(self.fd)

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = self.read(min(count, PIECE))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
