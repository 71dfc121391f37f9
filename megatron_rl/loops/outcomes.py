"""What an evaluation says, from the outcome of every sample: pure numbers.

Invariants (tests/unit/test_outcomes.py): every question weighs the same, whatever number of samples it has; pass@1 is their mean
accuracy; pass@k is exact in expectation over the samples at hand; a seed gives the same interval.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

RESAMPLES, LEVEL = 1000, 0.95  # of the bootstrap
DRAWS = 200  # of samples, for a majority among some of them


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one sample."""

    question: str
    domain: str
    correct: bool
    answer: str | None  # what was extracted; None: nothing, which is no vote
    tokens: int
    truncated: bool
    judged: bool = True


def summary(outcomes: Sequence[Outcome], seed: int = 0) -> dict[str, float]:
    """accuracy (pass@1) with the ends of its interval, pass@k and maj@k for k = 2, 4, 8, ... up to the samples of every question,
    and accuracy by domain where there are several."""
    questions = by_question(outcomes)
    fewest = min(map(len, questions.values()))
    low, high = interval([[o.correct for o in samples] for samples in questions.values()], seed)
    numbers = {
        "accuracy": fmean(accuracy(samples) for samples in questions.values()),
        "accuracy_low": low,
        "accuracy_high": high,
        "response_tokens": fmean(o.tokens for o in outcomes),
        "response_tokens_p50": quantile([o.tokens for o in outcomes], 0.5),
        "response_tokens_p95": quantile([o.tokens for o in outcomes], 0.95),
        "truncated": fmean(o.truncated for o in outcomes),
        "unjudged": fmean(not o.judged for o in outcomes),
    }
    for k in powers_of_two(fewest):
        numbers[f"pass@{k}"] = fmean(pass_at(k, samples) for samples in questions.values())
        numbers[f"maj@{k}"] = fmean(majority_at(k, samples, seed) for samples in questions.values())
    domains = defaultdict(list)
    for samples in questions.values():
        domains[samples[0].domain].append(accuracy(samples))
    return numbers | ({f"accuracy/{name}": fmean(values) for name, values in sorted(domains.items())} if len(domains) > 1 else {})


def by_question(outcomes: Sequence[Outcome]) -> Mapping[str, list[Outcome]]:
    questions: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        questions[outcome.question].append(outcome)
    return questions


def accuracy(samples: Sequence[Outcome]) -> float:
    return fmean(o.correct for o in samples)


def pass_at(k: int, samples: Sequence[Outcome]) -> float:
    """The probability that k of the samples, drawn without replacement, hold a correct one: 1 - C(n - c, k) / C(n, k) (Chen et al.
    2021, arXiv 2107.03374, equation 1)."""
    wrong = sum(not o.correct for o in samples)
    return 1.0 - math.comb(wrong, k) / math.comb(len(samples), k)


def majority_at(k: int, samples: Sequence[Outcome], seed: int = 0) -> float:
    """The probability that the most common answer among k of the samples is right; equally common ones share it. All correct
    answers are one, however they are written. The mean over draws without replacement; exact where k is all of them."""
    if k == len(samples):
        return _majority(samples)
    rng = np.random.default_rng([seed, k])
    return fmean(_majority([samples[i] for i in rng.choice(len(samples), k, replace=False)]) for _ in range(DRAWS))


def _majority(samples: Sequence[Outcome]) -> float:
    votes = Counter("correct" if o.correct else f"wrong: {o.answer}" for o in samples if o.correct or o.answer is not None)
    most = max(votes.values(), default=0)
    first = [answer for answer, count in votes.items() if count == most]
    return float("correct" in first) / max(1, len(first))


def interval(correct: Sequence[Sequence[bool]], seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of the mean accuracy: questions are drawn again, and samples within each (both are a
    draw from what could have been asked and answered)."""
    rng = np.random.default_rng(seed)
    shares = np.array([np.mean(samples) for samples in correct])
    counts = np.array([len(samples) for samples in correct])
    drawn = rng.integers(len(shares), size=(RESAMPLES, len(shares)))
    means = (rng.binomial(counts[drawn], shares[drawn]) / counts[drawn]).mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def quantile(values: Sequence[int], share: float) -> float:
    return float(np.quantile(np.array(values), share))


def powers_of_two(largest: int) -> list[int]:
    return [2**i for i in range(1, largest.bit_length()) if 2**i <= largest]
