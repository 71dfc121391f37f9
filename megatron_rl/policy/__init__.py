"""The model under training: Megatron-Core on CUDA or, through a start-up module, on CPU."""

from megatron_rl.policy.megatron_policy import MegatronPolicy
from megatron_rl.policy.model import build_chunks, initialise, weights
from megatron_rl.policy.ranks import MegatronRanks
from megatron_rl.policy.schedule import lr_at

__all__ = ["MegatronPolicy", "MegatronRanks", "build_chunks", "initialise", "lr_at", "weights"]
