r"""Gold answers given to their own verifier, as a response that states them and nothing else.

`verifies`: one way to write it is correct. `unparsable`: the verifier reads none of them, or not the gold answer itself. `fails`:
it reads them, and none is correct. `timeout`: it reached no judgement in time. `unchecked`: a verifier whose gold answer is no
response, such as tests for code.

Over half of Light-R1's prompts that no sample ever solved were of the second and third kind (arXiv 2503.10460): noise to train on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_rl.ports import Rewards
from megatron_rl.types import Prompt, Rollout, Score

GoldStatus = Literal["verifies", "unparsable", "fails", "timeout", "unchecked"]
USABLE: tuple[GoldStatus, ...] = ("verifies", "unchecked")
_BOXED = ("\\boxed{{{}}}", "{}")
WRITTEN: dict[str, tuple[str, ...]] = {"math": _BOXED, "mcq": _BOXED, "exact": ("{}",), "reasoning_gym": ("#{}",)}


@dataclass(frozen=True, slots=True)
class Gold:
    status: GoldStatus
    reason: str = ""


async def gold_answers(prompts: Sequence[Prompt], rewards: Rewards) -> list[Gold]:
    """One a prompt. `rewards` must read responses with `text_of`, and judge them by the prompts' verifiers alone."""
    scores: list[list[Score]] = [[] for _ in prompts]
    for way in range(max(map(len, WRITTEN.values()))):
        asked = [i for i, prompt in enumerate(prompts) if _is_open(scores[i]) and way < len(WRITTEN.get(prompt.verifier, ()))]
        rollouts = [_response(prompts[i], way) for i in asked]
        for i, score in zip(asked, await rewards.score(rollouts) if rollouts else [], strict=True):
            scores[i].append(score)
    return [judged(each) for each in scores]


def _is_open(scores: Sequence[Score]) -> bool:
    return all(score.status != "correct" for score in scores)


def _response(prompt: Prompt, way: int) -> Rollout:
    tokens = tuple(WRITTEN[prompt.verifier][way].format(prompt.answer).encode())
    return Rollout(f"gold:{prompt.id}#{way}", prompt, way, tokens, (0.0,) * len(tokens), (0,) * len(tokens), "stop")


def judged(scores: Sequence[Score]) -> Gold:
    """Of the ways to write one answer that were tried."""
    if not scores:
        return Gold("unchecked")
    if any(score.status == "correct" for score in scores):
        return Gold("verifies")
    order: list[tuple[str, GoldStatus]] = [
        ("timeout", "timeout"),
        ("error", "unparsable"),
        ("wrong", "fails"),
        ("unparsable", "unparsable"),
    ]
    for status, verdict in order:
        for score in scores:
            if score.status == status:
                return Gold(verdict, score.reason)
    raise ValueError(f"unknown status {scores[0].status!r}")


def text_of(tokens: Sequence[int]) -> str:
    """Responses here are bytes: no tokenizer has to be lossless on them."""
    return bytes(tokens).decode()
