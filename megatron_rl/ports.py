"""The few things a loop talks to. Loops know these Protocols; `assemble.py` binds them to Megatron-Core, SGLang and the disk.

Calls marked *collective* are made by every rank, in the same order; all others by rank 0 alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from megatron_rl.types import GenerateRequest, Group, Intake, Manifest, Progress, Prompt, Rollout, Score

if TYPE_CHECKING:
    import torch

    from megatron_rl.algorithms.batch import LossOutput, PackedBatch
    from megatron_rl.algorithms.histogram import Histogram

T = TypeVar("T")
Occupied = Literal["all", "weights", "nothing"]
TokenLoss = Callable[["torch.Tensor", "torch.Tensor", "PackedBatch"], "LossOutput"]
"""(new_logprobs_T, entropy_T, batch) -> LossOutput; all aligned: entry t belongs to the token tokens_T[t]."""


class Ranks(Protocol):
    """Where this process stands, and the collectives a loop needs. A wait beyond the limit raises and says for what."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int  # data-parallel replicas; the CP, TP and PP ranks of one replica share a dp_rank

    def broadcast(self, value: T | None, what: str) -> T:
        """*Collective*: rank 0's `value` on every rank."""

    def barrier(self, what: str) -> None:
        """*Collective*."""

    def sum_over_replicas(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """*Collective*: `values` lie on the policy's device and are the same on all ranks of a replica."""


class Policy(Protocol):
    """The model under training. Every method is *collective*."""

    def logprobs(self, microbatches: Sequence[PackedBatch], temperature: float) -> list[torch.Tensor]:
        """logprobs_T of each microbatch's own tokens given their prefix (0 at every segment's first token), detached, on
        every rank of the replica."""

    def reference_logprobs(self, microbatches: Sequence[PackedBatch], temperature: float) -> list[torch.Tensor]:
        """The same under the weights the run started from (kept in host memory when the policy was built with a reference)."""

    def train_step(self, microbatches: Sequence[PackedBatch], loss: TokenLoss, temperature: float) -> dict[str, Any]:
        """One optimizer step over all microbatches of all replicas. Gradients of `LossOutput.loss` are *summed* over
        microbatches and replicas: the divisor is the loss's own business. Returns the summed `sums`, the maxima and, as nested
        lists, the summed tables over all tokens of all replicas, plus `policy/grad_norm` and `policy/lr`."""

    def weights(self) -> Mapping[str, torch.Tensor]:
        """This rank's shards of all parameters and persistent buffers, by Megatron name with *global* layer and expert
        numbers (`decoder.layers.7.mlp.experts.local_experts.12.linear_fc1.weight`). Live storage, not copies."""

    def occupy(self, what: Occupied) -> None:
        """What lies on the device from now on: `all`, the `weights` alone (for a push), or `nothing`, which leaves it to the
        engines. Without effect where they share no device memory. Gradients do not survive."""


class WeightSync(Protocol):
    def push(self, version: int) -> None:
        """*Collective*: the policy's present weights into every engine, which then stamp tokens with `version`."""


class WeightSink(Protocol):
    """The engines' side of a push: `begin`, `send` for each bucket of the manifest in its order, `end`. After an error in between
    the engines are on no version until the next push, which starts over."""

    def begin(self, manifest: Manifest) -> Intake:
        """Open the push. Each server process is asked once, before its first byte, whether it takes every tensor of the manifest
        and is then written completely, each element once; if not, a UserError names the tensors and nothing has changed."""

    def memory(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Bytes that the engines can read: a bucket whose tensors all lie in them need not be copied again."""

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Full tensors by Hugging Face name, best in the type that `Intake.dtypes` names; the memory may be reused after the
        return. Called from one thread, perhaps another than the other calls. Raises EngineLost naming the engine that refused,
        died or did not answer in time."""

    def end(self, version: int, checksums: Mapping[str, int] | None = None) -> None:
        """Commit: flush caches, stamp `version`; raises EngineLost naming the engine that did not confirm. With `checksums`
        (megatron_rl.checksum of each full tensor, in the type that `Intake.dtypes` names) what the engines hold is compared
        first; a difference is a RuntimeError that names the tensors."""


class Engine(Protocol):
    """One inference server."""

    name: str

    def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[Sequence[Progress]]:
        """Stream progress of all requests, many messages at a time, until each is finished or aborted. Raises EngineLost."""

    async def abort(self, rollout_ids: Iterable[str] | None = None) -> None:
        """End the given requests (None: all). Their streams deliver what was generated and then stop, unfinished."""


class Engines(Protocol):
    """The fleet: processes and clients."""

    @property
    def alive(self) -> Sequence[Engine]: ...

    def start(self) -> None:
        """Start every engine and wait until each answers. Raises UserError (port in use) or EngineLost with the engine's own
        last words."""

    def recover(self) -> list[str]:
        """Start what is not alive, all of them the first time; the names. They need a push before they are of use."""

    def sleep(self) -> None:
        """Give the device memory back, weights included; a sleeping engine stays asleep."""

    def wake(self, *, for_push: bool) -> None:
        """Take memory again: that of the weights, whose values are lost, and unless it is for a push that of all else. What is
        awake stays awake."""

    def stop(self) -> None: ...


class Rewards(Protocol):
    async def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One Score per rollout, in order, each within the configured limit; never raises for a bad response."""

    def close(self) -> None: ...


class Prompts(Protocol):
    """An endless, resumable, seeded stream over the training prompts, stage after stage, epoch after epoch."""

    def begin(self, version: int) -> None:
        """A phase of weights `version` begins, or goes on: their stage is in force."""

    def take(self) -> tuple[str, Prompt]:
        """(group id, prompt); the group id is unique over the whole run: `<epoch>:<prompt id>`."""

    def give_back(self, group_id: str) -> None:
        """A group that was dropped: its prompt is offered again under the same id, or not at all if its stage is over."""

    def judged(self, group_id: str, scores: Sequence[Score]) -> None:
        """Of a group, or of a part of one that was released early: what its prompt's pass history is made of."""

    def metrics(self) -> dict[str, float]:
        """Where the stream stands."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Store(Protocol):
    """Checkpoints. A step is there completely or not at all."""

    def save(self, step: int, trainer: Mapping[str, Any]) -> Path:
        """*Collective*: model, optimizer, RNG and the JSON-able `trainer` state (rank 0's) in one atomic commit."""

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        """*Collective*: load the newest complete step into the policy; (step, trainer state), None in a fresh run."""

    def export_hf(self, path: Path) -> None:
        """*Collective*: the policy as a Hugging Face checkpoint with its tokenizer; absent or complete."""


class Tracker(Protocol):
    """Where numbers and samples go; rank 0 writes, other ranks hold one that drops everything."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None: ...

    def rollouts(self, step: int, groups: Sequence[Group]) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out numbers of the weights after `step` steps."""

    def evaluated(self) -> Collection[int]:
        """The steps whose evaluation is on record."""

    def rewind(self, step: int) -> None:
        """Forget everything after `step`: the run goes on from there."""

    def close(self) -> None: ...
