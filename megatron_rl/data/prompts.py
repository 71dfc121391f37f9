"""Prompts for reinforcement learning: rows (data/sources.py, data/rows.py) -> `Prompt`, and the endless stream a run draws from.

Without an id the number of the row is one.

Invariants:
- a row is either a Prompt or a UserError that names file, row and fault;
- a prompt that is too long is counted and left out, never cut;
- every epoch offers every prompt exactly once, whatever was saved, loaded and given back meanwhile;
- an epoch's order depends on (seed, epoch, prompt ids) alone;
- a stream goes on only over the prompts and the seed it was saved with.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.data import RowFormat
from megatron_rl.config.errors import UserError
from megatron_rl.data.order import shuffled
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


class PromptStream:
    """ports.Prompts over a fixed set of prompts."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        self._prompts = {prompt.id: prompt for prompt in prompts}
        if not prompts or len(self._prompts) < len(prompts):
            raise ValueError(f"{len(prompts)} prompts with {len(self._prompts)} different ids")
        self._ids = list(self._prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = fingerprint(prompts)
        self._given_back: deque[str] = deque()
        self._start(epoch=0, position=0)

    def take(self) -> tuple[str, Prompt]:
        if self._given_back:
            group_id = self._given_back.popleft()
            return group_id, self._prompts[group_id.partition(":")[2]]
        if self._position == len(self._order):
            self._start(self._epoch + 1, position=0)
        id = self._order[self._position]
        self._position += 1
        return f"{self._epoch}:{id}", self._prompts[id]

    def give_back(self, group_id: str) -> None:
        """The group was dropped before it trained: offer its prompt again, next, under the same group id."""
        if group_id in self._given_back or not self._was_taken(group_id):
            raise ValueError(f"group {group_id} was not taken from this stream")
        self._given_back.append(group_id)

    def _was_taken(self, group_id: str) -> bool:
        epoch, _, id = group_id.partition(":")
        if not epoch.isdecimal() or id not in self._prompts:
            return False
        return int(epoch) < self._epoch or (int(epoch) == self._epoch and id in self._order[: self._position])

    def _start(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        order = shuffled(self._ids, self._seed, epoch) if self._shuffle else range(len(self._ids))
        self._order = [self._ids[i] for i in order]

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "given_back": list(self._given_back),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, name, now in (("seed", "run.seed", self._seed), ("shuffle", "data.shuffle", self._shuffle)):
            if state[key] != now:
                raise UserError(f"{name}={now}: the checkpoint was made with {state[key]}; its prompts would come in another order")
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "data.train: the prompts (or the tokenizer or rollout.max_prompt_tokens) are not those of the checkpoint "
                f"(fingerprint {self._fingerprint}, checkpoint {state['fingerprint']}); start a new run.dir"
            )
        self._start(state["epoch"], state["position"])
        self._given_back = deque(state["given_back"])
