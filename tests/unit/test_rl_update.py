"""The update of one phase's groups: what reaches the policy, with the policy and its ranks stood in for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.algorithms.histogram import Histogram
from megatron_rl.algorithms.loss import policy_loss
from megatron_rl.config import RlRun, validate
from megatron_rl.loops.parts import RlParts
from megatron_rl.loops.update import update
from megatron_rl.types import Group, Prompt, Rollout, Score


class OneReplica:
    rank = dp_rank = 0
    world_size = dp_size = 1

    def barrier(self, what: str) -> None: ...

    def sum_over_replicas(self, values: torch.Tensor, what: str) -> torch.Tensor:
        return values


class RecordingPolicy:
    """Finds every token 0.5 nats likelier than the reference does, and keeps what it is trained on."""

    def __init__(self) -> None:
        self.trained: list[list[PackedBatch]] = []

    def occupy(self, what: str) -> None: ...

    def logprobs(self, microbatches: Sequence[PackedBatch], temperature: float) -> list[torch.Tensor]:
        return [torch.full((len(batch.tokens_T),), -1.0) for batch in microbatches]

    def reference_logprobs(self, microbatches: Sequence[PackedBatch], temperature: float) -> list[torch.Tensor]:
        return [torch.full((len(batch.tokens_T),), -1.5) for batch in microbatches]

    def train_step(self, microbatches: Sequence[PackedBatch], loss: Any, temperature: float) -> dict[str, float]:
        self.trained.append(list(microbatches))
        return {"tokens": float(sum(batch.loss_mask_T.sum() for batch in microbatches))}


def group(name: str, rewards: list[float], lengths: list[int]) -> Group:
    prompt = Prompt(name, name, (7,), "a", "exact")
    rollouts = tuple(
        Rollout(f"0:{name}#{i}", prompt, i, tuple(range(10, 10 + n)), (-1.0,) * n, (0,) * n, "stop") for i, n in enumerate(lengths)
    )
    return Group(f"0:{name}", prompt, rollouts, tuple(Score(r, "correct" if r else "wrong") for r in rewards))


def updated(groups: list[Group], **algorithm: object) -> tuple[dict[str, float], dict[int, float], RecordingPolicy]:
    """(metrics, advantage by response length, policy); every response must have a length of its own."""
    policy, nothing = RecordingPolicy(), Any
    parts = RlParts(OneReplica(), policy, nothing, nothing, nothing, nothing, torch.device("cpu"))  # type: ignore[arg-type]
    metrics = update(config(**algorithm), parts, groups, version=0)
    advantages = {}
    for batch in policy.trained[0] if policy.trained else []:
        for values_S in batch.fields["advantages"].split(batch.cu_seqlens.diff().tolist()):
            advantages[len(values_S) - 1] = values_S[-1].item()
    return metrics, advantages, policy


def config(**algorithm: object) -> RlRun:
    shape = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "ffn_hidden_size": 8, "vocab_size": 32}
    values = {
        "run": {"dir": "unused", "steps": 1},
        "model": shape | {"num_kv_heads": 1, "head_dim": 8, "max_position_embeddings": 8192},
        "optimizer": {"lr": 1e-3},
        "rollout": {"token_budget": 8, "pool_capacity": 8, "group_size": 2},
        "data": {"tokenizer": "unused", "train": "unused"},
        "eval": {"at_ends": False},
        "algorithm": algorithm,
    }
    return validate(RlRun, values)


def test_the_gap_reaches_the_tracker_under_the_steps_number() -> None:
    found: dict[int, Mapping[str, Histogram]] = {}

    class Gaps:
        def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
            found[step] = histograms

    class Measuring(RecordingPolicy):
        def train_step(self, microbatches: Sequence[PackedBatch], loss: Any, temperature: float) -> dict[str, Any]:
            (batch,) = microbatches
            output = loss(batch.fields["old_logprobs"], torch.zeros(len(batch.tokens_T)), batch)
            return {name: value.tolist() for name, value in (output.sums | output.maxima | output.tables).items()}

    nothing = Any
    parts = RlParts(OneReplica(), Measuring(), policy_loss(), nothing, nothing, Gaps(), torch.device("cpu"))  # type: ignore[arg-type]
    metrics = update(config(), parts, GROUPS[:1], version=4)
    assert metrics["mismatch/by_age/4-7/share"] == 1.0 and metrics["mismatch/gap_max"] == 0.0
    assert [(step, of["mismatch/gap_above"].total) for step, of in found.items()] == [(5, 6.0)]


GROUPS = [group("a", [1, 0], [2, 4]), group("b", [1, 1], [3, 5])]


def test_kl_in_the_reward_reaches_the_advantages() -> None:
    # Penalties 0.2 x 0.5 a token: a has 1 - 0.2 and 0 - 0.4, mean 0.2; b has 1 - 0.3 and 1 - 0.5, mean 0.6.
    settings = {"advantage": "dr_grpo", "zero_variance": "keep", "kl_weight": 0.2, "kl_estimator": "k1", "kl_in": "reward"}
    metrics, advantages, _ = updated(GROUPS, **settings)
    assert advantages == pytest.approx({2: 0.6, 4: -0.6, 3: 0.1, 5: -0.1})
    assert metrics["reward/kl_penalty_mean"] == pytest.approx(0.1 * 14 / 4)


def test_kl_in_the_loss_leaves_the_advantages_alone() -> None:
    metrics, advantages, policy = updated(GROUPS, advantage="dr_grpo", zero_variance="keep", kl_weight=0.2)
    assert advantages == {2: 0.5, 4: -0.5, 3: 0.0, 5: 0.0} and "reward/kl_penalty_mean" not in metrics
    assert policy.trained[0][0].fields["ref_logprobs"].eq(-1.5).all()


def test_masked_groups_are_not_trained_and_without_others_there_is_no_update() -> None:
    metrics, advantages, _ = updated(GROUPS, zero_variance="mask")
    assert set(advantages) == {2, 4} and metrics["policy/tokens"] == 6.0
    metrics, advantages, policy = updated(GROUPS[1:], zero_variance="mask")
    assert metrics == {"policy/updates": 0.0} and not policy.trained


def test_the_constant_of_the_divisor_is_the_longest_response_there_may_be() -> None:
    for constant, divisor in ((None, 4096), (100, 100)):
        _, _, policy = updated(GROUPS, aggregation="constant", loss_constant=constant, updates_per_step=2)
        assert len(policy.trained) == 2
        (batch,) = policy.trained[0]
        assert batch.fields["weight"].max().item() == pytest.approx(1 / (4 * divisor))
