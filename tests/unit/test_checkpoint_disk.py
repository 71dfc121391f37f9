"""The folders of checkpoints: atomic, pruned, examined; what a kill or a full disk leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from disk_limit import files_at_most

from megatron_rl.checkpoint import disk
from megatron_rl.config.errors import UserError


def write(folder: Path, step: int, trainer: dict[str, object] | None = None, keep: int = 9, nbytes: int = 1000) -> Path:
    building = folder / f"step_{step}.tmp"
    disk.begin(building, trainer or {"step": step}, lambda there: None)
    (building / "__0_0.distcp").write_bytes(bytes(nbytes))
    disk.commit(building, step, {"world_size": 2})
    disk.prune(folder, keep)
    return folder / f"step_{step}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_step_is_found_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        write(tmp_path, step)
    found = disk.newest(tmp_path)
    assert found == disk.Found(10, tmp_path / "step_10", {"world_size": 2}, {"step": 10})


def test_a_fresh_run_has_none(tmp_path: Path) -> None:
    assert disk.newest(tmp_path) is None
    assert disk.newest(tmp_path / "absent") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_4", "step_5"]


def test_a_step_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, 3, {"version": 1})
    write(tmp_path, 3, {"version": 2})
    assert names(tmp_path) == ["step_3"]
    found = disk.newest(tmp_path)
    assert found and found.trainer == {"version": 2}


def test_what_a_killed_save_leaves_is_cleared_away(tmp_path: Path) -> None:
    write(tmp_path, 1)
    disk.begin(tmp_path / "step_2.tmp", {}, lambda there: None)
    found = disk.newest(tmp_path)
    assert found and found.step == 1
    assert names(tmp_path) == ["step_1"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2).rename(tmp_path / "step_2.old")
    disk.begin(tmp_path / "step_2.tmp", {}, lambda there: None)
    found = disk.newest(tmp_path)
    assert found and found.step == 2
    assert names(tmp_path) == ["step_1", "step_2"]


@pytest.mark.parametrize(
    ("tear", "message"),
    [
        (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda step: (step / "__0_0.distcp").write_bytes(bytes(999)), "__0_0.distcp has 999 bytes instead of 1000"),
        (lambda step: (step / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda step: (step / "manifest.json").write_text('{"step": 4, "fi'), "manifest.json is not JSON"),
        (lambda step: (step / "trainer.json").write_text("{'step': 4}"), "trainer.json is not JSON"),
    ],
)
def test_a_torn_checkpoint_is_named_with_the_one_to_use_instead(tmp_path: Path, tear: object, message: str) -> None:
    write(tmp_path, 2)
    write(tmp_path, 3)
    (tmp_path / "step_3" / "manifest.json").unlink()  # an older torn one is passed over
    torn = write(tmp_path, 4)
    tear(torn)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        disk.newest(tmp_path)
    assert caught.value.exit_code == 1
    assert str(torn / message.split()[0]) in str(caught.value)
    assert message in str(caught.value)
    assert f"remove {torn} to go on from step 2" in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(torn)
    with pytest.raises(UserError, match="step_3"):
        disk.newest(tmp_path)


def test_a_torn_checkpoint_without_an_older_one_says_so(tmp_path: Path) -> None:
    (write(tmp_path, 1) / "trainer.json").unlink()
    with pytest.raises(UserError, match="start anew"):
        disk.newest(tmp_path)


def test_a_full_disk_leaves_the_older_checkpoint_and_no_trace(tmp_path: Path) -> None:
    older = write(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in older.iterdir()}
    trainer = {"rollouts": ["x" * 100] * 10_000}
    with files_at_most(100_000), pytest.raises(UserError, match=r"step_2: cannot write the checkpoint: File too large") as caught:
        write(tmp_path, 2, trainer)
    assert caught.value.exit_code == 1
    assert names(tmp_path) == ["step_1"]
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
    assert json.loads((older / "trainer.json").read_text()) == {"step": 1}
