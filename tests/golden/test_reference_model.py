"""The test suite's own BailingMoeV2 against outputs of the original implementation."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from reference_model import reference_logits
from safetensors.torch import load_file


def test_logits_equal_the_original_implementations(shared_data: Path) -> None:
    golden = shared_data / "golden_bailing_moe_v2"
    config = json.loads((golden / "config.json").read_text())
    weights, expected = load_file(golden / "model.safetensors"), load_file(golden / "golden.safetensors")
    for tokens, mask, logits_TV in zip(expected["input_ids"], expected["attention_mask"], expected["logits"], strict=True):
        real = mask.bool()
        assert torch.equal(real, torch.arange(len(real)) < real.sum()), "padding is expected on the right"
        torch.testing.assert_close(reference_logits(weights, config, tokens[real].tolist()), logits_TV[real], atol=2e-5, rtol=1e-4)
