from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import UserError
from megatron_rl.resumable import ResumableRows

ODD = {"text": "a line\u2028another\u2029third\u0085 \x00 \ud800 é"}


def test_rows_come_back_as_they_were_and_more_are_added(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    first = ResumableRows(file, {"of": "this"})
    for row in (ODD, None, 3):
        first.add(row)
    first.close()
    again = ResumableRows(file, {"of": "this"})
    assert again.rows == [ODD, None, 3]
    again.add("more")
    again.close()
    assert ResumableRows(file, {"of": "this"}).rows == [ODD, None, 3, "more"]


@pytest.mark.parametrize("torn", [b'{"text": "half', "é".encode()[:1], b"null"])
def test_a_torn_last_line_is_made_again(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    rows = ResumableRows(file, {})
    rows.add(ODD)
    rows.close()
    whole = file.read_bytes()
    file.write_bytes(whole + torn)
    again = ResumableRows(file, {})
    assert again.rows == [ODD] and file.read_bytes() == whole
    again.add(1)
    again.close()
    assert ResumableRows(file, {}).rows == [ODD, 1]


def test_a_file_that_was_torn_in_its_first_line_begins_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"of": "th')
    ResumableRows(file, {"of": "this"}).close()
    assert ResumableRows(file, {"of": "this"}).rows == []


def test_other_rows_and_no_rows_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    ResumableRows(file, {"of": "this"}).close()
    with pytest.raises(UserError, match=r"rows\.jsonl: made from other input or settings"):
        ResumableRows(file, {"of": "that"})
    with file.open("ab") as out:
        out.write(b"\x00\xff\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not a line of this file"):
        ResumableRows(file, {"of": "this"})
