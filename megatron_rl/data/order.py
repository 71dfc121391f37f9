"""The one shuffle of this package.

Invariant: an order depends on its seed, its epoch and the keys alone: not on the order of the file, the platform, or the version of
Python or NumPy (neither promises a stable shuffle), so that a run resumed elsewhere goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def shuffled(keys: Sequence[str], *seed: int | str) -> list[int]:
    """The positions of `keys` in the order of their hashes under `seed`. Equal keys keep their order."""
    prefix = ":".join(map(str, seed)) + ":"
    return sorted(range(len(keys)), key=lambda i: hashlib.blake2b((prefix + keys[i]).encode(), digest_size=16).digest())
