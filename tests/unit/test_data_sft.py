"""Invariants of megatron_rl/data/sft.py."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from megatron_rl.config import UserError
from megatron_rl.data.sft import SftExample, SftStream, read_sft
from megatron_rl.data.tokenizer import EOS, SentencePieceTokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_sentencepiece(["0123456789+-= #"], tmp_path_factory.mktemp("t") / "tokenizer.model", 24)


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_example_ends_in_eos(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    path = write(tmp_path / "s.jsonl", {"prompt": "1+2=", "response": "#3"})
    assert read_sft(path, tokenizer, 100) == (SftExample(tuple(tokenizer.encode("1+2=")), (*tokenizer.encode("#3"), EOS)),)


def test_examples_over_the_limit_are_counted_not_cut(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "s.jsonl", {"prompt": "1+2=", "response": "#3"}, {"prompt": "1+2=", "response": "1+2=3 #3"})
    with caplog.at_level(logging.WARNING):
        assert len(read_sft(path, tokenizer, 7)) == 1
    assert "1 of 2 examples have more than 7 tokens" in caplog.text
    with pytest.raises(UserError, match="none is left"):
        read_sft(path, tokenizer, 6)


def test_a_bad_row_names_file_and_line(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    good: dict[str, object] = {"prompt": "1", "response": "2"}
    cases = (({"prompt": "1"}, "missing key 'response'"), (good | {"x": 1}, "unknown key 'x'"), (good | {"prompt": 1}, "a string"))
    for bad, words in cases:
        path = write(tmp_path / "s.jsonl", good, bad)
        with pytest.raises(UserError, match=f"{path}:2: .*{words}"):
            read_sft(path, tokenizer, 100)


def examples(start: int, count: int) -> list[SftExample]:
    return [SftExample((i,), (i, EOS)) for i in range(start, start + count)]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 25])
def test_a_batch_depends_on_seed_and_step_alone_and_epochs_are_whole(batch_size: int) -> None:
    stages = [(examples(0, 7), 14), (examples(100, 5), 10)]
    stream = SftStream(stages, batch_size, seed=3)
    assert stream.steps == 24
    forward = [stream.batch(step) for step in range(24)]
    backward = [SftStream(stages, batch_size, seed=3).batch(step) for step in reversed(range(24))]
    assert forward == backward[::-1]
    for (members, _), batches in zip(stages, (forward[:14], forward[14:]), strict=True):
        seen = [example.prompt_tokens[0] for batch in batches for example in batch]
        size = len(members)
        epochs = [seen[i : i + size] for i in range(0, len(seen) - size + 1, size)]
        assert all(Counter(epoch) == Counter(m.prompt_tokens[0] for m in members) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # an order of its own
    if batch_size == 25:
        assert forward != [SftStream(stages, batch_size, seed=4).batch(step) for step in range(24)]


def test_a_step_outside_is_refused() -> None:
    stream = SftStream([(examples(0, 3), 2)], 2, seed=0)
    for step in (-1, 2):
        with pytest.raises(ValueError, match=r"outside 0\.\.1"):
            stream.batch(step)
