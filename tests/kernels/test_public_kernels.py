"""The public package `kernels` is found, or not found, as if our folder of that name were not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import importlib.util, sys
from transformers.utils import is_kernels_available
spec = importlib.util.find_spec("kernels")
print(is_kernels_available(), spec and spec.origin)
"""


def answer(cwd: Path, pythonpath: list[Path]) -> str:
    """With `cwd` first on sys.path, as `python -m` has it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, pythonpath))}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def public_kernels(tmp_path: Path) -> Path:
    """A folder with an installed package `kernels`, as on GPU machines."""
    site = tmp_path / "site"
    info = site / "kernels-0.14.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.14.1\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("")
    return site


def test_not_shadowed_where_it_is_installed(repo_root: Path, tmp_path: Path, public_kernels: Path) -> None:
    expected = f"True {public_kernels / 'kernels' / '__init__.py'}\n"
    assert answer(tmp_path, [public_kernels]) == expected
    assert answer(repo_root, [public_kernels]) == expected
    assert answer(tmp_path, [repo_root, public_kernels]) == expected


def test_not_faked_where_it_is_absent(repo_root: Path, tmp_path: Path) -> None:
    here, elsewhere = answer(repo_root, []), answer(tmp_path, [])
    assert here.split()[0] == elsewhere.split()[0]


def test_ours_has_a_name_of_its_own(repo_root: Path) -> None:
    import megatron_rl_kernels

    assert Path(megatron_rl_kernels.__path__[0]) == repo_root / "kernels" / "megatron_rl_kernels"
    assert not (repo_root / "kernels" / "__init__.py").exists(), "a package here would shadow the public one"
