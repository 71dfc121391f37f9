"""The contracts of .importlinter hold, and each of them notices a planted violation."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = "A room imports only from rooms below it"
SGLANG = "Only engine imports SGLang"
MEGATRON = "Only policy, checkpoint and resharding import Megatron-Core"
PURE = "Decisions, nouns and configuration are pure"
LOOPS = "Algorithms are tensor functions and loops talk to ports"
LEAF = "Kernels know nothing of the rest"
KERNELS = "Only policy and resharding use kernels"

VIOLATIONS = [
    ("megatron_rl/config/run.py", "import megatron_rl.types", LAYERS),  # upwards
    ("megatron_rl/types.py", "from megatron_rl.algorithms.batch import PackedBatch", LAYERS),
    ("megatron_rl/ports.py", "import megatron_rl.engine", LAYERS),
    ("megatron_rl/rewards/__init__.py", "import megatron_rl.assemble", LAYERS),
    ("megatron_rl/policy/__init__.py", "from megatron_rl import resharding", LAYERS),  # siblings
    ("megatron_rl/verifiers/__init__.py", "import megatron_rl.scheduler", LAYERS),
    ("megatron_rl/loops/__init__.py", "import megatron_rl.policy", LAYERS),
    ("megatron_rl/stray.py", "", LAYERS),  # a module without a layer
    ("megatron_rl/resharding/__init__.py", "import sglang.srt.utils", SGLANG),
    ("megatron_rl/assemble.py", "import sglang", SGLANG),
    ("megatron_rl/engine/__init__.py", "from megatron.core import parallel_state", MEGATRON),
    ("megatron_rl/scheduler/__init__.py", "import torch", PURE),
    ("megatron_rl/types.py", "import torch.distributed", PURE),
    ("megatron_rl/config/model.py", "import torch", PURE),
    ("megatron_rl/scheduler/__init__.py", "import asyncio", PURE),
    ("megatron_rl/planning/__init__.py", "import torch", PURE),
    ("megatron_rl/planning/__init__.py", "import megatron_rl.assemble", LAYERS),
    ("megatron_rl/simulation/__init__.py", "import torch", PURE),
    ("megatron_rl/simulation/__init__.py", "import megatron_rl.planning", LAYERS),
    ("megatron_rl/algorithms/__init__.py", "def f():\n    import megatron.core", LOOPS),
    ("megatron_rl/loops/__init__.py", "import transformers", LOOPS),
    ("megatron_rl_kernels/logprob/reference.py", "import megatron_rl.types", LEAF),
    ("megatron_rl/engine/__init__.py", "import megatron_rl_kernels.logprob", KERNELS),
]


def lint(package_root: Path) -> tuple[int, str]:
    """Exit code and report, in one line and without colour, of the contracts on the packages under `package_root`."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache", "--config", package_root / ".importlinter"]
    done = subprocess.run(command, cwd=package_root, capture_output=True, text=True, timeout=120, env={"NO_COLOR": "1"})
    return done.returncode, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def pristine(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layers")
    for source in (repo_root / "megatron_rl", repo_root / "kernels" / "megatron_rl_kernels"):
        shutil.copytree(source, root / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repo_root / ".importlinter", root)
    return root


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def test_the_tree_is_clean(copy: Path) -> None:
    code, report = lint(copy)
    assert code == 0, report
    assert "0 broken" in report


@pytest.mark.parametrize(("file", "line", "contract"), VIOLATIONS, ids=lambda value: value.replace("/", "."))
def test_a_planted_violation_is_caught(copy: Path, file: str, line: str, contract: str) -> None:
    path = copy / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    code, report = lint(copy)
    assert code != 0, report
    assert re.search(rf"{re.escape(contract)}((?!KEPT|BROKEN).)* BROKEN", report), report
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert module in report.partition("Broken contracts")[2], report
