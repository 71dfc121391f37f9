"""Several verifiers on one response: the mean of their values, by the weights in `metadata.mixture` ({"math": 0.9, "format": 0.1}).

Invariants: the first one named says whether the answer is correct (status, extracted answer); where one reaches no judgement, the
mixture reaches none; weights count relative to their sum, so that a full mark is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_rl.types import Prompt, Score
from megatron_rl.verifiers import MODULES, load

OWN = "own"  # in a run's weights: the verifier that the prompt names


def verify(response: str, prompt: Prompt) -> Score:
    weights: Mapping[str, float] = prompt.metadata["mixture"]
    scores = {name: load(MODULES[name])(response, replace(prompt, verifier=name)) for name in weights}
    for name, score in scores.items():
        if not score.is_judgement:
            return replace(score, value=0.0, reason=f"{name}: {score.reason}")
    value = sum(weights[name] * score.value for name, score in scores.items()) / sum(weights.values())
    reason = "; ".join(f"{name} {score.value:g}" + (f" ({score.reason})" if score.reason else "") for name, score in scores.items())
    return replace(next(iter(scores.values())), value=value, reason=reason)


def mixed(prompt: Prompt, weights: Mapping[str, float]) -> Prompt:
    """The prompt under a run's weights. One that brings its own mixture keeps it."""
    if not weights or prompt.verifier == "mixture":
        return prompt
    named = {prompt.verifier if name == OWN else name: weight for name, weight in weights.items()}
    return replace(prompt, verifier="mixture", metadata={**prompt.metadata, "mixture": named})
