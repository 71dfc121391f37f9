"""Is a prompt in a benchmark? Three rules over the texts of questions, the first that holds is the answer.

- `exact`: equal once numbers, case and white space are gone, so that a question with other numbers is found. Where fewer than
  four words are left without the numbers ("What is 3 + 4?"), equal with them: a template that short says nothing.
- `ngram`: 32 words in a row in common, lower-cased and split at white space (these two are Light-R1's, arXiv 2503.10460).
- `near`: at least `jaccard` of the runs of three words in both are common to both; numbers and punctuation are no words. Counted
  exactly over an index of the benchmarks, which are small enough for that: there is no hash to miss a pair.

Invariants: a planted copy is found whatever happens to its case, white space and numbers; a text shorter than a rule's unit
is never found by that rule.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

Rule = Literal["exact", "ngram", "near"]
NGRAM, JACCARD = 32, 0.5
SHINGLE = 3  # words
FEWEST_SHINGLES = 8  # of a text that can be near another
FEWEST_WORDS = 4  # of a text that stands without its numbers
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class Match:
    rule: Rule
    benchmark: str  # "<file>:<row>"
    similarity: float = 1.0  # Jaccard's, of `near`


class Benchmarks:
    """An index of questions that must not be trained on."""

    def __init__(self, questions: Iterable[tuple[str, str]], ngram: int = NGRAM, jaccard: float = JACCARD) -> None:
        """`questions`: ("<file>:<row>", text)."""
        self._ngram, self._jaccard = ngram, jaccard
        self._names: list[str] = []
        self._exact: dict[str, int] = {}
        self._ngrams: dict[int, int] = {}
        self._shingles: defaultdict[str, list[int]] = defaultdict(list)
        self._sizes: list[int] = []
        digest = blake2b(digest_size=8)
        for name, text in questions:
            digest.update(text.encode() + b"\0")
            self._add(name, text)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def _add(self, name: str, text: str) -> None:
        row = len(self._names)
        self._names.append(name)
        self._exact.setdefault(skeleton(text), row)
        for gram in ngrams(text, self._ngram):
            self._ngrams.setdefault(hash(gram), row)
        mine = shingles(text)
        self._sizes.append(len(mine))
        for shingle in mine:
            self._shingles[shingle].append(row)

    def match(self, text: str) -> Match | None:
        if (row := self._exact.get(skeleton(text))) is not None:
            return Match("exact", self._names[row])
        for gram in ngrams(text, self._ngram):
            if (row := self._ngrams.get(hash(gram))) is not None:
                return Match("ngram", self._names[row])
        return self._nearest(shingles(text))

    def _nearest(self, mine: set[str]) -> Match | None:
        if len(mine) < FEWEST_SHINGLES:
            return None
        common = Counter(row for shingle in mine for row in self._shingles.get(shingle, ()))
        similarities = (
            (count / (len(mine) + self._sizes[row] - count), row)
            for row, count in common.items()
            if self._sizes[row] >= FEWEST_SHINGLES
        )
        similarity, row = max(similarities, default=(0.0, 0), key=lambda found: (found[0], -found[1]))
        return Match("near", self._names[row], similarity) if similarity >= self._jaccard else None


def skeleton(text: str) -> str:
    """What `exact` compares."""
    whole = text.lower()
    bare = _NUMBER.sub("", whole)
    words = [word for word in _WORD.findall(bare) if len(word) > 1]
    return "".join((bare if len(words) >= FEWEST_WORDS else whole).split())


def ngrams(text: str, n: int) -> Iterator[str]:
    words = text.lower().split()
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def shingles(text: str) -> set[str]:
    words = _WORD.findall(text.lower())
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
