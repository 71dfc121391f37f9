"""What a prompt file holds, from a note on every row: pure numbers.

A prompt is a duplicate when an earlier row has the same text but for white space; one whose earlier row has another answer is in
conflict, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from megatron_rl.data.gold import USABLE, Gold
from megatron_rl.types import Prompt

PERCENTILES = (1, 10, 50, 90, 99, 100)
SHOWN = 20  # faults of each kind that are named


@dataclass(frozen=True, slots=True)
class Note:
    """On one row; of a faulty one, `where` and `fault` alone."""

    where: str
    fault: str = ""
    tokens: int = 0
    domain: str = ""
    verifier: str = ""
    text: str = ""  # a digest
    answer: str = ""
    gold: str = ""  # GoldStatus
    reason: str = ""


def note(where: str, prompt: Prompt, gold: Gold) -> Note:
    text = blake2b(" ".join(prompt.text.split()).encode(), digest_size=8).hexdigest()
    answer = blake2b(prompt.answer.strip().encode(), digest_size=8).hexdigest()
    return Note(where, "", len(prompt.tokens), prompt.domain, prompt.verifier, text, answer, gold.status, gold.reason[:200])


def summarised(notes: Sequence[Note], limit: int | None = None) -> dict[str, Any]:
    """`limit`: tokens a prompt may have. Lengths are left out where no tokenizer counted them."""
    faulty = [note.fault for note in notes if note.fault]
    good = [note for note in notes if not note.fault]
    duplicates, conflicts = _duplicates(good)
    unusable = [note for note in good if note.gold and note.gold not in USABLE]
    lengths = [note.tokens for note in good]
    summary: dict[str, Any] = {
        "rows": len(notes),
        "faulty": len(faulty),
        "faults": faulty[:SHOWN],
        "domains": dict(Counter(note.domain for note in good).most_common()),
        "verifiers": dict(Counter(note.verifier for note in good).most_common()),
        "duplicates": len(duplicates),
        "conflicts": len(conflicts),
        "duplicate_rows": duplicates[:SHOWN],
        "conflict_rows": conflicts[:SHOWN],
        "gold": dict(Counter(note.gold for note in good).most_common()),
        "gold_faults": [f"{note.where}: {note.gold}: {note.reason}" for note in unusable[:SHOWN]],
    }
    if any(lengths):
        quantiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
        summary["tokens"] = {f"p{p}": int(value) for p, value in zip(PERCENTILES, quantiles, strict=True)}
        summary["tokens"]["mean"] = float(np.mean(lengths))
        if limit is not None:
            summary["over_limit"] = sum(length > limit for length in lengths)
    return summary


def _duplicates(notes: Sequence[Note]) -> tuple[list[str], list[str]]:
    """Rows that repeat an earlier one, and those of them that answer it otherwise."""
    answers: dict[str, str] = {}  # of the first row with a text
    duplicates, conflicts = [], []
    for each in notes:
        if each.text not in answers:
            answers[each.text] = each.answer
            continue
        duplicates.append(each.where)
        if answers[each.text] != each.answer:
            conflicts.append(each.where)
    return duplicates, conflicts
