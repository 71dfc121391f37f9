"""Shared by all tests: where things lie, and how to run a script on several gloo ranks.

Invariants: a test never sees more than one thread per process; whatever `torchrun` starts is gone when the test ends, however
it ends; helpers that several tests import lie in `tests/support/` (on the path of tests and ranks; `tests/` itself is not,
since its `kernels/` would shadow the public package of that name).
"""

from __future__ import annotations

import os

# Before torch is imported anywhere, here and in every child.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets and golden files that lie beside the checkout; the test is skipped where they do not."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture
def torchrun(tmp_path: Path) -> Callable[..., str]:
    """`torchrun(nproc, script, *args, timeout=180) -> str`: run `script` as torchrun would, gloo ranks on this machine.

    `script` is a path, or Python source. Returns the ranks' stdout, rank after rank. A rank that fails or a run beyond `timeout`
    seconds fails the test and shows every rank's output.
    """

    def run(nproc: int, script: str | Path, *args: object, timeout: float = 180) -> str:
        if isinstance(script, str) and "\n" in script:
            source, script = script, tmp_path / "script.py"
            script.write_text(source)
        return run_ranks(nproc, Path(script), [str(arg) for arg in args], timeout=timeout)

    return run
