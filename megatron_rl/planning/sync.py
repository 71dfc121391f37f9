"""A weight sync: how many bytes, and how long it takes at least.

Every engine has to get every tensor. The floors are bandwidths alone, each for the path it names: an engine's nodes take in what
the policy's ranks on them do not already hold, over all their adapters at once; inside a node each GPU takes in its rank's part;
and offloading moves weights and optimizer state to the host and back once a step. `through_one_rank` is what it takes while rank 0
assembles full tensors for everyone, as `resharding.execute.PushToEngines` does it.

Invariants: at bfloat16 and float32 the bytes of the first push are those of the plan that `resharding.plan` makes, without its
alignment; later pushes leave frozen tensors out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.plan import PlanRun
from megatron_rl.planning.memory import FP8, Engine, PolicyBytes, item_bytes
from megatron_rl.planning.parameters import Census, Tensors

BUCKETS = 2  # at the rank that hands them to an engine: one being gathered, one being taken


@dataclass(frozen=True)
class Sync:
    first_bytes: float  # with frozen tensors
    push_bytes: float
    bucket_bytes: float
    into_node_bytes: float  # over the network
    network_s: float
    nvlink_s: float
    host_s: float  # of an offload and the return from it
    through_one_rank_s: float

    @property
    def floor_s(self) -> float:
        return max(self.network_s, self.nvlink_s)


def pushed_bytes(run: PlanRun, census: Census, with_mtp: bool) -> float:
    """As Hugging Face tensors. Families that repeat embedding and output layer in the prediction layer send them twice at first."""
    model, item = run.model, item_bytes(run.model)
    tensors = census.layers + (census.mtp if with_mtp else Tensors())
    total: float = item * census.total(with_mtp) + 4 * tensors.buffers
    if with_mtp and model.family == "deepseek_v3":
        total += item * 2 * model.num_mtp_layers * model.vocab_size * model.hidden_size
    if run.engine.sync.quantize == "fp8":
        total -= (item - FP8) * (tensors.tp + tensors.experts)
    return total


def largest_tensor_bytes(run: PlanRun) -> float:
    return item_bytes(run.model) * run.model.vocab_size * run.model.hidden_size


def sync_of(run: PlanRun, census: Census, engine: Engine, policy: PolicyBytes) -> Sync:
    """`policy`: of the fullest rank; for the network floor all are taken to hold as much."""
    cluster, push = run.cluster, pushed_bytes(run, census, with_mtp=False)
    node = cluster.node_size
    wanted = push * min(1.0, node / engine.tp)  # engines that share a node get one copy between them
    into_node = max(0.0, wanted - node * policy.weights) if cluster.gpus > node else 0.0
    nvlink = cluster.specs.nvlink_gb_s * 1e9
    one_rank = cluster.network if cluster.gpus > node else nvlink
    return Sync(
        first_bytes=pushed_bytes(run, census, with_mtp=True),
        push_bytes=push,
        bucket_bytes=max(run.engine.sync.bucket_mb * 2**20, largest_tensor_bytes(run)),
        into_node_bytes=into_node,
        network_s=into_node / (node * cluster.network),
        nvlink_s=max(0.0, engine.weights - policy.weights) / nvlink if node > 1 else 0.0,
        host_s=2 * (policy.weights - policy.fixed + policy.optimizer) / (cluster.specs.host_gb_s * 1e9),
        through_one_rank_s=push / one_rank if cluster.gpus > 1 else 0.0,
    )
