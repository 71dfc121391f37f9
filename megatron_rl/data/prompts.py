"""Prompts for reinforcement learning: rows (data/sources.py, data/rows.py) -> `Prompt`.

Without an id the number of the row is one.

Invariants:
- a row is either a Prompt or a UserError that names file, row and fault;
- a prompt that is too long is counted and left out, never cut.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.data import RowFormat
from megatron_rl.config.errors import UserError
from megatron_rl.data.rows import our_row
from megatron_rl.data.sources import Row, is_foreign, read_rows
from megatron_rl.data.tokenizer import Message, Tokenizer
from megatron_rl.types import Prompt

log = logging.getLogger(__name__)

PLAIN = RowFormat()


def read_prompts(source: str | Path, tokenizer: Tokenizer, max_prompt_tokens: int, format: RowFormat = PLAIN) -> tuple[Prompt, ...]:
    """All prompts of at most `max_prompt_tokens` tokens, in file order."""
    rows = [(where, our_row(row, where, format, is_foreign(source))) for where, row in read_rows(source)]
    texts = [prompt_text(row, tokenizer, format.chat_template) for _, row in rows]
    prompts: dict[str, Prompt] = {}
    lines: dict[str, str] = {}
    for (where, row), text, tokens in zip(rows, texts, tokenizer.encode_many(texts), strict=True):
        id = row_id(row, where)
        if id in lines:
            raise UserError(f"{where}: id {id!r} is already used at {lines[id]}", exit_code=1)
        if not tokens:
            raise UserError(f"{where}: the prompt is empty", exit_code=1)
        lines[id] = where
        prompts[id] = prompt_of(row, where, text, tokens)
    kept = tuple(prompt for prompt in prompts.values() if len(prompt.tokens) <= max_prompt_tokens)
    if len(kept) < len(prompts):
        longest = max(len(prompt.tokens) for prompt in prompts.values())
        counted = f"{len(prompts) - len(kept)} of {len(prompts)} prompts"
        report = f"{source}: {counted} have more than {max_prompt_tokens} tokens (longest {longest})"
        if not kept:
            raise UserError(f"{report}; none is left", exit_code=1)
        log.warning("%s; they are left out", report)
    return kept


def prompt_of(row: Row, where: str, text: str, tokens: Sequence[int]) -> Prompt:
    domain, metadata = row.get("domain", "default"), row.get("metadata", {})
    return Prompt(row_id(row, where), text, tuple(tokens), row["answer"], row["verifier"], domain, metadata)


def row_id(row: Row, where: str) -> str:
    return str(row.get("id", where.rpartition(":")[2]))


def prompt_text(row: Row, tokenizer: Tokenizer, chat_template: bool) -> str:
    if not chat_template:
        return str(row["prompt"])
    messages: list[Message] = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    return tokenizer.apply_chat(messages)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of everything a prompt is, tokens included, in any file order."""
    digest = hashlib.sha256()
    for prompt in sorted(prompts, key=lambda prompt: prompt.id):
        fields = (prompt.id, prompt.tokens, prompt.answer, prompt.verifier, prompt.domain, prompt.metadata)
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()[:16]
