"""Invariants of megatron_rl/data/tokenizer.py."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config import UserError
from megatron_rl.data.tokenizer import (
    BOS,
    EOS,
    PAD,
    SentencePieceTokenizer,
    export_hf_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

SUMS = [f"{a}+{b}-3=\n{a}+{b}={a + b} {a + b}-3={a + b - 3} #{a + b - 3}" for a in range(10, 99) for b in (0, 7, 46, 95)]
SHARED = ("spm_test_model.model", "mistral_instruct_tokenizer_240323.model.v3")


@pytest.fixture(scope="module")
def char(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_sentencepiece(SUMS, tmp_path_factory.mktemp("char") / "tokenizer.model", vocab_size=24)


def strings(count: int = 1500) -> list[str]:
    rng = random.Random(0)
    pieces = ["hello", "world", " the", " ", "  ", "\n", "1234", "é", "你好", ".", "(x+1)^2", "\t", "ﬁ", "Ａ", "☃", "#", "9"]
    return ["", " ", "\n", "#", *("".join(rng.choices(pieces, k=rng.randrange(1, 15))) for _ in range(count))]


def test_a_trained_tokenizer_is_lossless_on_its_texts_with_fixed_special_ids(char: SentencePieceTokenizer) -> None:
    assert [char.decode(tokens) for tokens in char.encode_many(SUMS)] == SUMS
    assert (char.pad_id, char.eos_id, char.processor.bos_id()) == (PAD, EOS, BOS)
    assert char.vocab_size == 4 + len(set("".join(SUMS)))
    assert all(len(char.encode(text)) == len(text) for text in SUMS)  # a character is a token


@given(st.text(alphabet="0123456789+-=# \n", max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_over_the_alphabet_is_lossless(char: SentencePieceTokenizer, text: str) -> None:
    assert char.decode(char.encode(text)) == text


@pytest.mark.parametrize("model_type", ["char", "bpe", "unigram"])
def test_training_is_deterministic_and_digits_stay_single(tmp_path: Path, model_type: str) -> None:
    models = [train_sentencepiece(SUMS, tmp_path / f"{i}.model", 40, model_type) for i in range(2)]  # type: ignore[arg-type]
    assert models[0].path.read_bytes() == models[1].path.read_bytes()
    assert len(models[0].encode("123456")) == 6


def test_decode_shows_no_special_token(char: SentencePieceTokenizer, tmp_path: Path) -> None:
    export_hf_tokenizer(char, tmp_path)
    for tokenizer in (char, load_tokenizer(tmp_path)):
        tokens = tokenizer.encode("1+2")
        assert tokenizer.decode([BOS, *tokens, EOS, PAD, PAD]) == "1+2"
        assert tokenizer.decode([]) == ""
        assert not {BOS, EOS, PAD} & set(tokens)


@pytest.mark.parametrize("model_type", ["char", "bpe", "unigram"])
def test_an_exported_tokenizer_gives_the_same_ids(tmp_path: Path, model_type: str) -> None:
    ours = train_sentencepiece(SUMS, tmp_path / "m.model", 40, model_type)  # type: ignore[arg-type]
    check_export(ours, tmp_path / "hf", SUMS + strings())


@pytest.mark.parametrize("name", SHARED)
def test_an_exported_model_of_others_gives_the_same_ids(tmp_path: Path, shared_data: Path, name: str) -> None:
    check_export(load_tokenizer(shared_data / "tokenizers" / name), tmp_path / "hf", strings())


def check_export(ours: object, directory: Path, texts: list[str]) -> None:
    assert isinstance(ours, SentencePieceTokenizer)
    files = export_hf_tokenizer(ours, directory)
    assert sorted(files) == sorted(directory.iterdir())
    exported = load_tokenizer(directory)
    assert exported.encode_many(texts) == ours.encode_many(texts)
    assert (exported.eos_id, exported.pad_id, exported.vocab_size) == (ours.eos_id, ours.pad_id, ours.vocab_size)
    known = [text for text, tokens in zip(texts, ours.encode_many(texts), strict=True) if ours.processor.unk_id() not in tokens]
    for tokens in ours.encode_many(known):
        assert exported.decode(tokens) == ours.decode(tokens)


def test_a_hugging_face_directory_is_exported_as_it_is(char: SentencePieceTokenizer, tmp_path: Path) -> None:
    export_hf_tokenizer(char, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights")
    files = export_hf_tokenizer(load_tokenizer(tmp_path / "a"), tmp_path / "b")
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer_config.json"]
    assert load_tokenizer(tmp_path / "b").encode_many(SUMS) == char.encode_many(SUMS)


def test_chat_templates(char: SentencePieceTokenizer, tmp_path: Path, shared_data: Path) -> None:
    export_hf_tokenizer(char, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    ling = json.loads((shared_data / "tokenizers/ling_v2_config_sft/tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": ling["chat_template"]}))
    text = load_tokenizer(tmp_path).apply_chat([{"role": "user", "content": "1+2="}])
    assert text.endswith("<role>ASSISTANT</role>")
    assert "<role>HUMAN</role>1+2=" in text
    with pytest.raises(UserError, match="has no chat template"):
        char.apply_chat([{"role": "user", "content": "1+2="}])


def test_bad_tokenizers_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "torn.model").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    cases = {"absent": "data.tokenizer=.*no such file", "torn.model": "not a SentencePiece", "empty": "no Hugging Face tokenizer"}
    for name, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1


def test_a_text_that_would_not_survive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not survive"):
        train_sentencepiece(["1▁2 3"], tmp_path / "m.model", 20)
    assert not (tmp_path / "m.model").exists()


@pytest.mark.sglang
def test_sglang_reads_an_exported_tokenizer(char: SentencePieceTokenizer, tmp_path: Path, repo_root: Path) -> None:
    export_hf_tokenizer(char, tmp_path / "hf")
    script = """
import json, os, sys
from megatron_rl.engine import standins
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
standins.install()
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
tokenizer = get_tokenizer(sys.argv[1])
print(json.dumps([tokenizer.encode(sys.argv[2]), tokenizer.eos_token_id]))
"""
    text = SUMS[17]
    command = [sys.executable, "-P", "-c", script, tmp_path / "hf", text]
    out = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    assert json.loads(out.splitlines()[-1]) == [char.encode(text), char.eos_id]


def test_a_model_config_beside_the_tokenizer_changes_nothing(
    char: SentencePieceTokenizer, tmp_path: Path, shared_data: Path
) -> None:
    export_hf_tokenizer(char, tmp_path)
    shutil.copy(shared_data / "golden_bailing_moe_v2" / "config.json", tmp_path)
    assert load_tokenizer(tmp_path).encode_many(SUMS[:50]) == char.encode_many(SUMS[:50])
