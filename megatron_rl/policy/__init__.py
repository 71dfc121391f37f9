"""The model under training: Megatron-Core on CUDA or, through a start-up module, on CPU."""

from megatron_rl.policy.model import build_chunks, initialise, weights
from megatron_rl.policy.ranks import MegatronRanks

__all__ = ["MegatronRanks", "build_chunks", "initialise", "weights"]
