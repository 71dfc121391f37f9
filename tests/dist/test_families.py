"""Logits of every family's policy are those of the reference implementation, at one rank and at every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SUPPORT, run_ranks
from reference_model import reference_logits
from safetensors.torch import load_file, save_file
from tiny_families import TINY, write_family
from transformers_reference import transformers_logits

pytestmark = pytest.mark.dist
TOLERANCE = 1e-4
LENGTHS = (17, 5, 26, 2)  # of packed segments
SP = {"sequence_parallel": True}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "TP2": {"tp": 2, **SP},
        "EP2": {"ep": 2},
        "PP2": {"pp": 2, "layers_per_stage": [1, 3]},
        "CP2": {"cp": 2},
    },
}
OVERRIDES = {  # beyond a family's usual form
    "qwen3_moe, odd vocabulary": ("qwen3_moe", {"vocab_size": 67}),
    "qwen3_moe, scores as they are": ("qwen3_moe", {"norm_topk_prob": False}),
    "bailing_moe, odd vocabulary": ("bailing_moe", {"vocab_size": 67}),
}
CASES = {name: (name, {}) for name in TINY} | OVERRIDES


def reference(path: Path, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    config = json.loads((path / "config.json").read_text())
    if config["model_type"].startswith("bailing"):
        weights = load_file(path / "model.safetensors")
        return [reference_logits(weights, config, each.tolist()) for each in tokens]
    return transformers_logits(path, tokens)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All families at all layouts of a world size in one launch, by case and layout the ranks' results."""
    folder = tmp_path_factory.mktemp("families")
    random = torch.Generator().manual_seed(5)
    for number, (case, (family, overrides)) in enumerate(CASES.items()):
        path = write_family(folder / case, family, seed=number, **overrides)
        tokens = [torch.randint(64, (length,), generator=random) for length in LENGTHS]
        logits = reference(path, tokens)
        lengths = torch.tensor([len(each) for each in tokens])
        expected = {"tokens_T": torch.cat(tokens), "lengths_S": lengths, "logits_TV": torch.cat(logits)}
        save_file(expected, path / "expected.safetensors")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for world, layouts in LAYOUTS.items():
        output = run_ranks(world, SUPPORT / "family_logits.py", [str(folder), json.dumps(layouts)], timeout=580)
        for line in output.splitlines():
            if line.startswith('{"case"'):
                result = json.loads(line)
                found.setdefault((result["case"], result["layout"]), []).append(result)
    return found


DENSE = ("qwen3", "qwen3_tied", "qwen2", "qwen2_tied")
PAIRS = [
    (case, world, layout)
    for world, layouts in LAYOUTS.items()
    for layout in layouts
    for case in CASES
    if case not in DENSE or layout != "EP2"
]


@pytest.mark.parametrize(("case", "world", "layout"), PAIRS)
def test_logits_are_those_of_the_reference(results: Any, case: str, world: int, layout: str) -> None:
    ranks = results[case, layout]
    assert len(ranks) == world
    assert sum(result["compared"] for result in ranks) >= (sum(LENGTHS) - len(LENGTHS)) * 64  # first tokens are predicted by none
    assert max(result["difference"] for result in ranks) < TOLERANCE
