"""Logits of a checkpoint by Hugging Face's own implementation, for the families it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rl.engine import standins


@torch.no_grad()
def transformers_logits(path: Path, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """logits_TV of each sequence of tokens, fp32. Multi-token-prediction layers are left out."""
    standins.install()  # transformers imports torchvision, whose build on the package index wants CUDA
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return [model(tokens[None]).logits[0] for tokens in sequences]
