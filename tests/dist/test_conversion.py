"""Weights of every family: from Hugging Face to Megatron, at and between all layouts, and back, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SUPPORT, run_ranks
from safetensors.torch import load_file
from tiny_families import TINY, tiny_model, write_family

from megatron_rl.convert import megatron_to_hf

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]  # the first test waits for all ranks' work
SP = {"sequence_parallel": True}
DENSE: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2, **SP},
    "PP2": {"pp": 2},
    "PP2.VPP2": {"pp": 2, "vpp": 2},
    "TP2.PP2, uneven": {"tp": 2, "pp": 2, "layers_per_stage": [1, 3], **SP},
}
MOE: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2, **SP},
    "PP2": {"pp": 2},
    "PP2.VPP2": {"pp": 2, "vpp": 2},
    "EP2": {"ep": 2},
    "TP2.EP2": {"tp": 2, "ep": 2, **SP},
    "ETP2": {"tp": 2, "etp": 2, **SP},
    "TP2.PP2.EP2, uneven": {"tp": 2, "pp": 2, "ep": 2, "layers_per_stage": [1, 3], **SP},
}
SIZES = {"vocab_size": 67, "n_group": 2}  # the vocabulary is padded under any TP; few experts: each is several tensors
FAMILIES = [family for family in TINY if family != "deepseek_v3_yarn"]  # whose weights are deepseek_v3's
LAYOUTS = {family: MOE if tiny_model(family).moe else DENSE for family in FAMILIES}
FIRST = ("bailing_moe_v2", "qwen2_tied")  # the others take two minutes more


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        part = load_file(file)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def assert_same(source: Path, target: Path) -> None:
    wanted, found = checkpoint(source), checkpoint(target)
    assert found.keys() == wanted.keys()
    unlike = [name for name in wanted if wanted[name].dtype != found[name].dtype or not torch.equal(wanted[name], found[name])]
    assert not unlike


@pytest.fixture(scope="module", params=[pytest.param(True, id="first"), pytest.param(False, id="others", marks=pytest.mark.slow)])
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    folder = tmp_path_factory.mktemp("families")
    families = [family for family in LAYOUTS if (family in FIRST) == request.param]
    for number, family in enumerate(families):
        experts = "n_routed_experts" if "n_routed_experts" in TINY[family] else "num_experts"
        write_family(folder / family / "hf", family, seed=number, **SIZES, **({experts: 4} if LAYOUTS[family] is MOE else {}))
    layouts = json.dumps({family: LAYOUTS[family] for family in families})
    return folder, run_ranks(4, SUPPORT / "weight_round_trips.py", [str(folder), layouts], timeout=580), families


def test_hugging_face_into_every_layout_and_back(tried: tuple[Path, str, list[str]]) -> None:
    folder, _, families = tried
    for family in families:
        for layout in LAYOUTS[family]:
            assert_same(folder / family / "hf", folder / family / layout)


def test_a_megatron_checkpoint_of_any_layout_loads_at_any_other(tried: tuple[Path, str, list[str]]) -> None:
    _, output, families = tried
    assert output.count("done") == 4 * len(families)
    assert [line for line in output.splitlines() if line.startswith("WRONG")] == []


@pytest.mark.slow
def test_an_interrupted_and_then_killed_conversion_is_finished_by_other_ranks(tmp_path: Path, repo_root: Path) -> None:
    source, target, tool = (
        write_family(tmp_path / "hf", "qwen3_moe", num_hidden_layers=8),
        tmp_path / "megatron",
        repo_root / "tools/convert.py",
    )
    arguments = ["hf-to-megatron", "--src", str(source), "--dst", str(target), "--bucket-mb", "0.001"]
    pieces = target.with_name("megatron.tmp") / "pieces"
    done = 0
    for how in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, tool, *arguments], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len([*pieces.glob("*[0-9]")]) <= done and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (130 if how == signal.SIGINT else -how), errors
        assert "Traceback" not in errors
        assert ("interrupted; the same command goes on" in errors) == (how == signal.SIGINT)
        assert not target.exists()
        assert len([*pieces.glob("*[0-9]")]) > done
        done = len([*pieces.glob("*[0-9]")])
    run_ranks(2, tool, arguments)
    assert not pieces.parent.exists()
    megatron_to_hf(target, tmp_path / "back", None, 2**20)
    assert_same(source, tmp_path / "back")


WHOLE_MODEL = """
import torch
from tiny_families import tiny_model
from megatron_rl.config.model import ParallelConfig
from megatron_rl.policy import MegatronRanks
from megatron_rl.policy.model import build_chunks

model = tiny_model("bailing_moe_v2")
MegatronRanks(ParallelConfig(), model)
(chunk,) = build_chunks(model, ParallelConfig(), torch.device("meta"))
print({str(parameter.device) for parameter in chunk.parameters()})
"""


def test_the_whole_model_is_laid_out_without_its_memory(torchrun: Callable[..., str]) -> None:
    assert torchrun(1, WHOLE_MODEL).strip() == "{'meta'}"
