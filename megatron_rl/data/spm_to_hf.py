"""A SentencePiece model as a Hugging Face fast tokenizer with the same ids.

transformers has converters for the families it knows, each with habits of its own (a dummy prefix, added special tokens) and
none for character models (`SpmConverter.tokenizer`, transformers/convert_slow_tokenizer.py). This one reads what the model says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from megatron_rl.config.errors import UserError

BLANK = "▁"  # how SentencePiece writes a space
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4  # TrainerSpec.ModelType, sentencepiece_model.proto
CONTROL, USER_DEFINED = 3, 4  # SentencePiece.Type


def write_hf(processor: Any, directory: Path) -> list[Path]:
    """tokenizer.json and tokenizer_config.json in `directory`."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(processor.serialized_model_proto())
    tokenizer = Tokenizer(_model(proto))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto)
    tokenizer.add_special_tokens([AddedToken(p.piece, special=True, normalized=False) for p in proto.pieces if p.type == CONTROL])
    tokenizer.add_tokens([AddedToken(p.piece, special=False, normalized=False) for p in proto.pieces if p.type == USER_DEFINED])
    ids = {"pad": processor.pad_id(), "unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    config = {f"{name}_token": proto.pieces[index].piece for name, index in ids.items() if index >= 0}
    # the name that transformers 4 and 5 both know; saved by version 5 itself it would be one that 4 refuses
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    return [directory / "tokenizer.json", directory / "tokenizer_config.json"]


def _model(proto: Any) -> Any:
    spec = proto.trainer_spec
    if spec.model_type == BPE:
        from transformers.tokenization_utils_base import generate_merges

        vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        merges = generate_merges(vocab, {piece.piece: piece.score for piece in proto.pieces})
        return models.BPE(vocab, merges, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback)
    if spec.model_type in (UNIGRAM, CHAR):  # over single characters the best segmentation is the only one
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    raise UserError("a SentencePiece word model has no Hugging Face form; train char, bpe or unigram", exit_code=1)


def _normalizer(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # normalizers.Strip would take every white space, SentencePiece takes blanks
        steps += [normalizers.Replace(Regex(rf"\A +|[ {BLANK}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])


def _decoder(proto: Any) -> Any:
    steps: list[Any] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
