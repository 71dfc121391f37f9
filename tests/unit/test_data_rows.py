"""Invariants of megatron_rl/data/sources.py and rows.py: the same prompts out of every format, and every fault by file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.config import UserError
from megatron_rl.config.data import Columns, RowFormat
from megatron_rl.data.prompts import read_prompts
from megatron_rl.data.rows import our_row
from megatron_rl.data.sources import read_rows
from megatron_rl.data.tokenizer import SentencePieceTokenizer, train_sentencepiece

OURS = {"prompt": "1+2=", "answer": "3", "verifier": "math", "domain": "sums"}
VERL = {
    "data_source": "sums",
    "prompt": [{"role": "system", "content": "Box it."}, {"role": "user", "content": "1+2="}],
    "ability": "math",
    "reward_model": {"ground_truth": "3", "style": "rule"},
    "extra_info": {"index": 7, "split": "train"},
}
CHAT = RowFormat(chat_template=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_sentencepiece(["0123456789+-= #"], tmp_path_factory.mktemp("t") / "tokenizer.model", 24)


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_source_gives_the_same_prompts(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    rows = [OURS, {**OURS, "id": "b", "prompt": "2+2=", "answer": "4"}, {**OURS, "prompt": "3+3=", "answer": "6"}]
    expected = read_prompts(jsonl(tmp_path / "p.jsonl", *rows), tokenizer, 10)
    assert [prompt.id for prompt in expected] == ["1", "b", "3"]
    (tmp_path / "folder").mkdir()
    file = parquet(tmp_path / "folder" / "train.parquet", {**rows[0], "id": None}, *rows[1:])
    for source in (file, f"datasets:{tmp_path / 'folder'}", f"datasets:{tmp_path / 'folder'}:default@train"):
        assert read_prompts(source, tokenizer, 10) == expected


def test_columns_by_another_name(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    rows = [{"question": "1+2=", "solution": "1+2 is 3\n#### 3", "level": 5}]
    format = RowFormat(columns=Columns(prompt="question", answer="solution"), verifier="math", domain="sums", answer_after="####")
    expected = read_prompts(jsonl(tmp_path / "ours.jsonl", OURS), tokenizer, 10)
    assert read_prompts(jsonl(tmp_path / "theirs.jsonl", *rows), tokenizer, 10, format) == expected
    assert read_prompts(parquet(tmp_path / "theirs.parquet", *rows), tokenizer, 10, format) == expected


def test_a_row_of_verl_is_read_as_it_is(tmp_path: Path) -> None:
    expected = {
        "messages": VERL["prompt"],
        "answer": "3",
        "verifier": "math",
        "domain": "sums",
        "metadata": {"index": 7, "split": "train"},
    }
    for file in (parquet(tmp_path / "v.parquet", VERL), jsonl(tmp_path / "v.jsonl", VERL)):
        [(where, row)] = read_rows(file)
        assert our_row(row, where, CHAT, foreign=True) == expected == our_row(row, where, CHAT)
    numbers = {**VERL, "reward_model": {"ground_truth": 3}, "ability": "sums"}
    row = our_row(numbers, "f:1", RowFormat(chat_template=True, verifier="exact"))
    assert (row["answer"], row["verifier"]) == ("3", "exact")


def test_a_column_is_one_part_of_a_row_and_no_other() -> None:
    row = {"prompt": "1+2=", "messages": '[{"role"', "id": 4, "answer": "working", "result": 3, "domain": "sums"}
    format = RowFormat(columns=Columns(prompt="prompt", answer="result"), verifier="math")
    assert our_row(row, "f:1", format) == {"prompt": "1+2=", "id": "4", "answer": "3", "domain": "sums", "verifier": "math"}
    swapped = RowFormat(columns=Columns(prompt="answer", answer="prompt"), verifier="math")
    assert our_row({"prompt": "3", "answer": "1+2="}, "f:1", swapped) == {"prompt": "1+2=", "answer": "3", "verifier": "math"}


def test_a_row_that_names_its_verifier_and_domain_keeps_them() -> None:
    row = our_row({**OURS, "verifier": "exact"}, "f:1", RowFormat(verifier="math", domain="other"))
    assert (row["verifier"], row["domain"]) == ("exact", "sums")


@pytest.mark.parametrize(
    ("row", "format", "words"),
    [
        (
            {"question": "1"},
            RowFormat(columns=Columns(prompt="text")),
            r"no column 'text' \(data.columns.prompt\); there are question",
        ),
        ({**VERL, "ability": "poetry"}, CHAT, "the ability 'poetry' names no verifier; data.verifier"),
        ({**VERL, "reward_model": {"style": "rule"}}, CHAT, "missing key 'reward_model.ground_truth'"),
        (VERL, RowFormat(), "'messages' need data.chat_template=true"),
        ({**OURS, "answer": "3"}, RowFormat(answer_after="####"), "no '####' in the answer"),
        ({"prompt": "1", "answer": "1"}, RowFormat(), "missing key 'verifier'"),
        ({**OURS, "metadata": {"k": b"1"}}, RowFormat(), "'metadata' is no JSON"),
    ],
)
def test_a_fault_names_file_and_row(tmp_path: Path, row: dict[str, Any], format: RowFormat, words: str) -> None:
    file = parquet(tmp_path / "p.parquet", row)
    with pytest.raises(UserError, match=words) as caught:
        for where, found in read_rows(file):
            our_row(found, where, format, foreign=True)
    assert str(caught.value).startswith(f"{file}:1: ") and "\n" not in str(caught.value) and caught.value.exit_code == 1


def test_rows_are_numbered_across_batches(tmp_path: Path) -> None:
    file = parquet(tmp_path / "p.parquet", *({"prompt": str(i)} for i in range(3000)))
    rows = list(read_rows(file))
    assert rows[0] == (f"{file}:1", {"prompt": "0"}) and rows[-1] == (f"{file}:3000", {"prompt": "2999"})


def test_what_is_null_is_absent_at_any_depth(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+2="}, {"role": "user", "content": "so?", "name": "tom"}]
    file = parquet(
        tmp_path / "p.parquet", {"prompt": messages, "extra": {"a": 1}, "id": "x"}, {"prompt": messages[:1], "extra": {"b": 2}}
    )
    expected = [{"prompt": messages, "extra": {"a": 1}, "id": "x"}, {"prompt": messages[:1], "extra": {"b": 2}}]
    assert [row for _, row in read_rows(file)] == expected


def test_missing_empty_and_broken_sources(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("not parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    whole = parquet(tmp_path / "whole.parquet", *({"prompt": str(i) * 50} for i in range(2000))).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    cases = {"absent.parquet": "no such file", "text.parquet": "not a Parquet file", "empty.parquet": "the file is empty"}
    for name, words in {**cases, "cut.parquet": "not a Parquet file"}.items():
        with pytest.raises(UserError, match=words) as caught:
            list(read_rows(tmp_path / name))
        assert caught.value.exit_code == 1
    for source in (f"datasets:{tmp_path / 'nowhere'}", "datasets:", f"datasets:{tmp_path}@test"):
        with pytest.raises(UserError, match="datasets:"):
            list(read_rows(source))


def test_the_deepscaler_rows_of_verl(shared_data: Path) -> None:
    rows = [our_row(row, where, CHAT, foreign=True) for where, row in read_rows(shared_data / "math" / "deepscaler_sub.parquet")]
    assert len(rows) == 1209 and {row["domain"] for row in rows} == {"deepscaler"} and rows[0]["answer"] == r"\frac{3}{7}"


def test_gsm8k_as_it_is_published(shared_data: Path, repo_root: Path) -> None:
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(OmegaConf.load(repo_root / "conf" / "data" / "gsm8k.yaml"))
    format = RowFormat(**{key: value for key, value in values.items() if key in RowFormat.model_fields})
    rows = [our_row(row, where, format) for where, row in read_rows(shared_data / "math" / "gsm8k_train.jsonl")]
    assert len(rows) == 7473 and rows[0]["answer"] == "72" and rows[0]["domain"] == "gsm8k"
