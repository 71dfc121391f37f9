"""Invariants of megatron_rl/data/prompts.py and jsonl.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import UserError
from megatron_rl.data.prompts import fingerprint, read_prompts
from megatron_rl.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from megatron_rl.types import Prompt

ROW = {"prompt": "1+2=", "answer": "3", "verifier": "exact"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_sentencepiece(["0123456789+-= #"], tmp_path_factory.mktemp("t") / "tokenizer.model", 24)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_become_prompts(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    full = {"id": "a:b#c", "domain": "sums", "metadata": {"k": [1]}, **ROW}
    first, second = read_prompts(write(tmp_path / "p.jsonl", ROW, "", full), tokenizer, 10)
    assert first == Prompt("1", "1+2=", tuple(tokenizer.encode("1+2=")), "3", "exact")
    assert second == Prompt("a:b#c", "1+2=", first.tokens, "3", "exact", "sums", {"k": [1]})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": ', r":2: not valid JSON"),
        ("[1]", r":2: expected a JSON object, found a list"),
        ({"answer": "3", "verifier": "exact"}, r":2: expected either 'prompt' or 'messages'"),
        ({**ROW, "messages": []}, r":2: expected either"),
        ({"prompt": "1", "verifier": "exact"}, r":2: missing key 'answer'"),
        ({"prompt": "1", "answer": "3"}, r":2: missing key 'verifier'"),
        ({**ROW, "answer": 3}, r":2: 'answer' must be a string, found the number 3 \(put it in quotes\)"),
        ({**ROW, "answer": None}, r":2: 'answer' must be a string, found null"),
        ({**ROW, "prompt": ["1"]}, r":2: 'prompt' must be a string, found a list"),
        ({**ROW, "metadata": "x"}, r":2: 'metadata' must be an object"),
        ({**ROW, "id": 7}, r":2: 'id' must be a string"),
        ({**ROW, "verifier": "maths"}, r":2: unknown verifier 'maths'; known are exact, .*math, .*reasoning_gym"),
        ({**ROW, "verifier": "reasoning_gym"}, r":2: verifier 'reasoning_gym' needs metadata.dataset"),
        ({**ROW, "anwser": "3"}, r":2: unknown key 'anwser'"),
        ({**ROW, "id": "first"}, r":2: id 'first' is already used at .*:1"),
        ({**ROW, "prompt": ""}, r":2: the prompt is empty"),
        ({"messages": [{"role": "user"}], "answer": "3", "verifier": "exact"}, r":2: messages\[0\]: missing key 'content'"),
        ({"messages": [{"role": "user", "content": "1"}], "answer": "3", "verifier": "exact"}, r":2: .*data.chat_template=true"),
    ],
)
def test_a_bad_row_is_one_line_that_names_file_and_line(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, line: Any, words: str
) -> None:
    path = write(tmp_path / "p.jsonl", {**ROW, "id": "first"}, line)
    with pytest.raises(UserError, match=words) as caught:
        read_prompts(path, tokenizer, 10)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_missing_empty_and_binary_files(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "latin1.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    write(tmp_path / "empty.jsonl", "")
    cases = {"absent.jsonl": "no such file", "empty.jsonl": "is empty", ".": "is a directory", "latin1.jsonl": ":1: not UTF-8"}
    for name, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            read_prompts(tmp_path / name, tokenizer, 10)
        assert caught.value.exit_code == 1


def test_prompts_over_the_limit_are_counted_not_cut(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "p.jsonl", ROW, {**ROW, "prompt": "1+2+3+4+5="})
    with caplog.at_level(logging.WARNING):
        assert [p.id for p in read_prompts(path, tokenizer, 4)] == ["1"]
    assert "1 of 2 prompts have more than 4 tokens (longest 10)" in caplog.text
    with pytest.raises(UserError, match="none is left"):
        read_prompts(path, tokenizer, 3)


def test_the_fingerprint_sees_every_field_and_no_order() -> None:
    base = Prompt("a", "t", (1, 2), "3", "exact", "d", {"k": 1})
    others = [
        Prompt("b", "t", (1, 2), "3", "exact", "d", {"k": 1}),
        Prompt("a", "t", (1, 3), "3", "exact", "d", {"k": 1}),
        Prompt("a", "t", (1, 2), "4", "exact", "d", {"k": 1}),
        Prompt("a", "t", (1, 2), "3", "math", "d", {"k": 1}),
        Prompt("a", "t", (1, 2), "3", "exact", "e", {"k": 1}),
        Prompt("a", "t", (1, 2), "3", "exact", "d", {"k": 2}),
    ]
    assert len({fingerprint([p]) for p in [base, *others]}) == 7
    assert fingerprint([base, others[0]]) == fingerprint([others[0], base])
