"""Examples for supervised fine-tuning, and the curriculum of stages they come in.

A row: {"prompt": str, "response": str}.

Invariants:
- `SftStream.batch(step)` depends on (examples, seed, step) alone, so that a resumed run needs no cursor;
- inside a stage every epoch shows every example once, in an order of its own;
- an example that is too long is counted and left out, never cut.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from megatron_rl.config.errors import UserError
from megatron_rl.data.jsonl import field, read_jsonl, refuse_unknown
from megatron_rl.data.order import shuffled
from megatron_rl.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SftExample:
    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]  # these are learned; the end-of-sequence token is the last


def read_sft(path: str | Path, tokenizer: Tokenizer, max_tokens: int, chat_template: bool = False) -> tuple[SftExample, ...]:
    """All examples of at most `max_tokens` tokens, encoded, in file order."""
    prompts, responses = [], []
    for where, row in read_jsonl(path):
        refuse_unknown(row, ("prompt", "response"), where)
        prompt = field(row, "prompt", str, where)
        prompts.append(tokenizer.apply_chat([{"role": "user", "content": prompt}]) if chat_template else prompt)
        responses.append(field(row, "response", str, where))
    examples = [
        SftExample(tuple(prompt), (*response, tokenizer.eos_id))
        for prompt, response in zip(tokenizer.encode_many(prompts), tokenizer.encode_many(responses), strict=True)
    ]
    kept = tuple(example for example in examples if len(example.prompt_tokens) + len(example.response_tokens) <= max_tokens)
    if len(kept) < len(examples):
        report = f"{path}: {len(examples) - len(kept)} of {len(examples)} examples have more than {max_tokens} tokens"
        if not kept:
            raise UserError(f"{report}; none is left", exit_code=1)
        log.warning("%s; they are left out", report)
    return kept


class SftStream:
    """Stages of (examples, steps), one after the other; steps count from 0."""

    def __init__(self, stages: Sequence[tuple[Sequence[SftExample], int]], batch_size: int, seed: int) -> None:
        self._stages = [examples for examples, _ in stages]
        self._ends = list(accumulate(steps for _, steps in stages))
        self._batch_size = batch_size
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._epoch_order)  # few batches touch more epochs

    @property
    def steps(self) -> int:
        return self._ends[-1]

    def batch(self, step: int) -> list[SftExample]:
        stage = bisect_right(self._ends, step)
        if step < 0 or stage == len(self._stages):
            raise ValueError(f"step {step} is outside 0..{self.steps - 1}")
        first = (step - (self._ends[stage - 1] if stage else 0)) * self._batch_size
        examples = self._stages[stage]
        places = (divmod(first + i, len(examples)) for i in range(self._batch_size))
        return [examples[self._order(stage, epoch)[offset]] for epoch, offset in places]

    def _epoch_order(self, stage: int, epoch: int) -> list[int]:
        return shuffled([str(i) for i in range(len(self._stages[stage]))], self._seed, stage, epoch)
