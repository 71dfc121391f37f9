"""Invariants of megatron_rl/data/prompts.py and jsonl.py."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config import UserError
from megatron_rl.data.order import shuffled
from megatron_rl.data.prompts import PromptStream, fingerprint, read_prompts
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


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p:{i}", str(i), (i,), str(i), "exact") for i in range(count)]


@given(
    count=st.integers(1, 12),
    seed=st.integers(0, 3),
    moves=st.lists(st.tuples(st.sampled_from(["take", "take", "take", "give_back", "reload"]), st.integers(0, 100)), max_size=80),
)
@settings(max_examples=150, deadline=None)
def test_every_epoch_offers_every_prompt_exactly_once(count: int, seed: int, moves: list[tuple[str, int]]) -> None:
    """... whatever was given back, saved and loaded meanwhile; a group counts when it is not given back."""
    stream = PromptStream(prompts(count), seed)
    held: list[str] = []
    for move, choice in moves:
        if move == "take":
            group_id, prompt = stream.take()
            assert group_id.partition(":")[2] == prompt.id
            held.append(group_id)
        elif move == "give_back" and held:
            stream.give_back(held.pop(choice % len(held)))
        elif move == "reload":
            state = json.loads(json.dumps(stream.state_dict()))
            stream = PromptStream(prompts(count)[::-1], seed)  # the file may be in another order
            stream.load_state_dict(state)
    while stream.state_dict()["given_back"] or stream.state_dict()["position"] < count:
        held.append(stream.take()[0])
    epochs = Counter(int(group_id.partition(":")[0]) for group_id in held)
    assert len(held) == len(set(held))
    assert set(epochs.values()) == {count}
    assert sorted(epochs) == list(range(len(epochs)))


def test_an_order_depends_on_seed_epoch_and_ids_alone() -> None:
    def order(items: list[Prompt], seed: int, takes: int) -> list[str]:
        stream = PromptStream(items, seed)
        return [stream.take()[1].id for _ in range(takes)]

    items = prompts(20)
    both = order(items, 0, 40)
    assert both == order(items[::-1], 0, 40)
    assert both[:20] != both[20:]
    assert both[:20] != order(items, 1, 20)
    assert both[:20] != [p.id for p in items]
    assert shuffled(["a", "b", "c", "d", "e"], 0, 0) == [1, 0, 2, 3, 4]  # pinned: old checkpoints rely on it


def test_without_shuffle_the_file_order_stays() -> None:
    stream = PromptStream(prompts(3), seed=0, shuffle=False)
    assert [stream.take()[0] for _ in range(5)] == ["0:p:0", "0:p:1", "0:p:2", "1:p:0", "1:p:1"]


def test_a_group_that_was_not_taken_cannot_come_back() -> None:
    stream = PromptStream(prompts(3), seed=0)
    taken, _ = stream.take()
    stream.give_back(taken)
    for group_id in (taken, "0:p:9", "7:p:1", "nonsense"):
        with pytest.raises(ValueError, match="not taken"):
            stream.give_back(group_id)
    assert stream.take()[0] == taken


def test_a_stream_goes_on_only_over_what_it_was_saved_with() -> None:
    state = PromptStream(prompts(5), seed=0).state_dict()
    with pytest.raises(UserError, match=r"data\.train.*not those of the checkpoint"):
        PromptStream(prompts(6), seed=0).load_state_dict(state)
    with pytest.raises(UserError, match=r"run\.seed=1"):
        PromptStream(prompts(5), seed=1).load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.shuffle=False"):
        PromptStream(prompts(5), seed=0, shuffle=False).load_state_dict(state)


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
