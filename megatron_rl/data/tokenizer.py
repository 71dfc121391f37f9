"""Text <-> token ids, from a SentencePiece `.model` file or a Hugging Face directory, behind one class.

Invariants:
- `encode` adds no special token, and `decode` shows none;
- what `export_hf_tokenizer` writes gives the same ids for the same text under `transformers.AutoTokenizer` (and so in SGLang),
  special tokens spelled out in the text excepted: Hugging Face reads `</s>` as one token, SentencePiece as four characters;
- a tokenizer trained here is lossless on its training texts: `decode(encode(text)) == text`.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from megatron_rl.config.errors import UserError

Message = dict[str, str]  # {"role": .., "content": ..}
PAD, UNK, BOS, EOS = range(4)  # ids of the tokenizers trained here
_HF_FILES = ("tokenizer*", "*_tokens*.json", "chat_template*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")


class Tokenizer(ABC):
    path: Path
    eos_id: int
    pad_id: int
    vocab_size: int  # one more than the largest id

    @abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Ids beyond the vocabulary have no text: a model's output layer is often padded, and may sample them."""

    @abstractmethod
    def apply_chat(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant's answer starts. Raises UserError without a chat template."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]: ...

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    @property
    def special_ids(self) -> dict[str, int]:
        """As a Hugging Face config names them."""
        return {"eos_token_id": self.eos_id, "pad_token_id": self.pad_id}


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.load(str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({str(error).splitlines()[0]})", exit_code=1) from None
        self.eos_id = self.processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{path}: the SentencePiece model has no end-of-sequence token", exit_code=1)
        self.pad_id = self.processor.pad_id() if self.processor.pad_id() >= 0 else self.eos_id
        self.vocab_size = self.processor.vocab_size()

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.processor.encode(list(texts))
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.processor.decode([token for token in tokens if token < self.vocab_size]))

    def vocabulary(self) -> dict[str, int]:
        return {self.processor.id_to_piece(token): token for token in range(self.vocab_size)}

    def apply_chat(self, messages: Sequence[Message]) -> str:
        raise UserError(f"data.chat_template=true: the SentencePiece model {self.path} has no chat template", exit_code=1)


class HfTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer  # seconds, and not needed for SentencePiece

        self.path = path
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no Hugging Face tokenizer there ({str(error).splitlines()[0]})", exit_code=1) from None
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{path}: the tokenizer has no end-of-sequence token", exit_code=1)
        self.eos_id = int(self.tokenizer.eos_token_id)
        pad = self.tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else int(pad)
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def vocabulary(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab())

    def apply_chat(self, messages: Sequence[Message]) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(f"data.chat_template=true: the tokenizer in {self.path} has no chat template", exit_code=1)
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def load_tokenizer(path: str | Path) -> Tokenizer:
    path = Path(path)
    if path.is_dir():
        return HfTokenizer(path)
    if path.is_file():
        return SentencePieceTokenizer(path)
    raise UserError(f"data.tokenizer={path}: no such file or directory (relative paths start from {Path.cwd()})", exit_code=1)


def conflict(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """An id that stands for one token here and for another there. That one of them has tokens beyond the other's is no conflict."""
    there = {token_id: token for token, token_id in theirs.vocabulary().items()}
    for token, token_id in ours.vocabulary().items():
        if there.get(token_id, token) != token:
            return f"id {token_id} is {token!r} in {ours.path} and {there[token_id]!r} in {theirs.path}"
    return None


def train_sentencepiece(
    texts: Sequence[str], path: str | Path, vocab_size: int, model_type: Literal["char", "bpe", "unigram"] = "char"
) -> SentencePieceTokenizer:
    """Train on `texts` and write `path`; the vocabulary may come out smaller than `vocab_size`. The same texts give the same bytes.

    No dummy prefix, no normalisation; a digit is a token, and so is white space other than the blank. Raises UserError if a text
    does not come back as it was (a character found no room).
    """
    model = BytesIO()
    longest = max((len(text.encode()) for text in texts), default=0)
    white = sorted({char for text in texts for char in text if char.isspace() and char != " "})
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type=model_type,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=1.0,
            user_defined_symbols=white,
            max_sentence_length=max(longest + 1, 10),  # longer ones would be left out without a word
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"cannot train a {model_type} tokenizer of {vocab_size} tokens: {error}", exit_code=1) from None
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer(path)
    for text, tokens in zip(texts, tokenizer.encode_many(texts), strict=True):
        if tokenizer.decode(tokens) != text:
            path.unlink()
            raise UserError(f"vocab_size={vocab_size}: {text!r} does not survive encoding and decoding", exit_code=1)
    return tokenizer


def export_hf_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> list[Path]:
    """Write what `AutoTokenizer.from_pretrained(directory)` needs; the files written."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, HfTokenizer):
        names = sorted({file.name for pattern in _HF_FILES for file in tokenizer.path.glob(pattern) if file.is_file()})
        return [Path(shutil.copyfile(tokenizer.path / name, directory / name)) for name in names]
    assert isinstance(tokenizer, SentencePieceTokenizer)
    from megatron_rl.data.spm_to_hf import write_hf

    return write_hf(tokenizer.processor, directory)
