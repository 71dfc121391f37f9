"""The nouns every room shares. Plain values: no torch, no clock, no client.

Whose log-probability it is stands in the name, always: `engine_logprobs` were recorded by the inference engine when a token
was sampled, `old_logprobs` come from the policy at the step's starting weights, `new_logprobs` from the policy now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal

FinishReason = Literal["stop", "length"]
ScoreStatus = Literal["correct", "wrong", "unparsable", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised, with all a verifier needs to judge an answer to it."""

    id: str  # unique in its data set and stable across runs
    text: str
    tokens: tuple[int, ...]
    answer: str
    verifier: str
    domain: str = "default"
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response to a prompt, finished or not. All per-token tuples have one entry per response token.

    A rollout may have been generated over several steps and engines: `versions[t]` is the weight version that sampled token t,
    `engine_logprobs[t]` the log-prob (nats, at the sampling temperature) that engine reported for it, and `support[t]` the ids that
    top-p and top-k had left to sample it from, itself among them, as little-endian int32: the log-prob is of the softmax over
    those. Where it is empty, or ends before t, it is of the softmax over the whole vocabulary.
    """

    id: str  # "<epoch>:<prompt id>#<sample>", see rollout_id
    prompt: Prompt
    sample: int  # 0 .. group_size-1
    tokens: tuple[int, ...] = ()
    engine_logprobs: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None  # None while unfinished
    experts: bytes = b""  # rows (RoutingShape) of the first so many positions, the prompt's included: as the last engine chose
    support: tuple[bytes, ...] = ()  # of the first so many tokens

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.engine_logprobs) == len(self.versions):
            raise ValueError(
                f"rollout {self.id}: {len(self.tokens)} tokens, {len(self.engine_logprobs)} engine log-probs and "
                f"{len(self.versions)} versions; each token needs one of each"
            )
        if len(self.support) > len(self.tokens):
            raise ValueError(f"rollout {self.id}: supports of {len(self.support)} tokens, and only {len(self.tokens)} tokens")

    def extended(self, progress: Progress) -> Rollout:
        return replace(
            self,
            tokens=self.tokens + progress.tokens,
            engine_logprobs=self.engine_logprobs + progress.engine_logprobs,
            versions=self.versions + progress.versions,
            finish_reason=progress.finish_reason,
            experts=progress.experts or self.experts,
            support=self.support + progress.support_after(len(self.tokens) - len(self.support)),
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """What an engine sent since its last message about one rollout; `finish_reason` is None while more will come."""

    rollout_id: str
    tokens: tuple[int, ...]
    engine_logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish_reason: FinishReason | None = None
    experts: bytes = b""  # with the last message: of all positions but the last, those of earlier requests included
    support: tuple[bytes, ...] = ()  # of each of the tokens, or of none

    def support_after(self, unknown: int) -> tuple[bytes, ...]:
        """What to append to the supports of a rollout whose last `unknown` tokens have none."""
        return (b"",) * unknown + self.support if self.support else ()


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """Of a record of routed experts. Row p holds the experts that the routers chose for position p of a sequence, MoE layer by MoE
    layer: those that computed the log-prob of the token at p + 1. A number takes one byte, or two where 256 are not enough."""

    layers: int  # of the decoder, dense ones included
    first_dense: int  # so many at the start have no experts, and are not in a row
    top_k: int
    experts: int

    @property
    def moe_layers(self) -> int:
        return self.layers - self.first_dense

    @property
    def itemsize(self) -> Literal[1, 2]:
        return 1 if self.experts <= 256 else 2

    @property
    def row_bytes(self) -> int:
        return self.moe_layers * self.top_k * self.itemsize


@dataclass(frozen=True, slots=True)
class Score:
    """A verifier's judgement. `timeout` and `error` say that no judgement was reached; they are counted, never hidden."""

    value: float
    status: ScoreStatus
    extracted: str | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def is_judgement(self) -> bool:
        return self.status not in ("timeout", "error")


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one prompt, finished, with a score each; the unit over which advantages are computed. Under early release a
    part of them, and the rewards of those that were released before: they count for the advantage and are not trained again."""

    id: str
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
    earlier_rewards: tuple[float, ...] = ()

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(score.value for score in self.scores)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    max_response_tokens: int = 1024
    stop_token_ids: tuple[int, ...] = ()
    report_support: bool = False  # and log-probs within it
    seed: int = 0  # of the run; see GenerateRequest.seed


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Go on from `tokens` (prompt + response so far); at most `max_new_tokens` more."""

    rollout_id: str
    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams
    report_experts: bool = False  # when it ends: an engine with new weights computes all positions again

    @property
    def seed(self) -> int:
        """Its own, from the run's: the epoch, the prompt's id and the number of the sample decide it, not the engine, the moment or
        what was generated so far. An engine under `engine.deterministic` draws a token from this and the token's position."""
        said = f"{self.sampling.seed} {self.rollout_id}".encode("utf-8", "surrogatepass")
        return int.from_bytes(blake2b(said, digest_size=8).digest()) >> 1  # as engines take it: 63 bits


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a weight push: its Hugging Face name, full shape and type as sent ("bfloat16")."""

    name: str
    shape: tuple[int, ...]
    dtype: str


Manifest = Sequence[Sequence[TensorSpec]]  # of a push, bucket by bucket: some engines only take certain tensors together


@dataclass(frozen=True, slots=True)
class Intake:
    """What the engines answered to a manifest."""

    dtypes: Mapping[str, str]  # the type each tensor is held in; a name that is missing is of no use to them: do not send it
    has_all: bool  # all have taken a whole push before, so that what has not changed since may stay away


class EngineLost(RuntimeError):
    """An engine died, stopped answering or answered nonsense; what it had streamed before is valid."""
