"""Prompts, SFT examples and a tokenizer for the quickstart, from reasoning-gym's `chain_sum`.

    python tools/quickstart_data.py --out runs/quickstart/data --seed 0

The prompt is the bare sum, `47+85-6=`. A worked answer adds every term tens first, then units, and ends in `#result`:
`47+80=127 127+5=132 132-6=126 #126`; a direct answer is `#126` alone. The SFT mixture teaches both, so that the model can work but
mostly answers at once: RL then has a mode to amplify. reasoning-gym makes the problems and judges the answers.

Writes train.jsonl (RL prompts), sft_worked.jsonl and sft_mixed.jsonl, eval.jsonl (no expression of which is in the others), and
tokenizer.model.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice, starmap
from pathlib import Path
from typing import Any
from zlib import crc32

import reasoning_gym

from megatron_rl.data.tokenizer import train_sentencepiece

TASK = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
STREAM = 10_000_000  # problems per seed, made as they are asked for
VOCAB = 24  # characters of the task and the four special tokens fit


def problems(seed: int) -> Iterator[dict[str, Any]]:
    """reasoning-gym makes problem i from (seed + i), so seeds are spaced apart."""
    for entry in reasoning_gym.create_dataset("chain_sum", seed=seed * STREAM, size=STREAM, **TASK):
        yield {"expression": entry["metadata"]["expression"].replace(" ", ""), "entry": entry}


def is_held_out(expression: str) -> bool:
    """One expression in eight, whatever the seed: by its hash, so that easy and hard ones are held out alike."""
    return crc32(expression.encode()) % 8 == 0


def worked(expression: str) -> str:
    """`47+85-6` -> `47+80=127 127+5=132 132-6=126 #126`"""
    terms = [int(term) for term in re.findall(r"[+-]?\d+", expression)]
    total, steps = terms[0], []
    for term in terms[1:]:
        sign = 1 if term > 0 else -1
        for part in (abs(term) // 10 * 10, abs(term) % 10):
            if part:
                steps.append(f"{total}{'+' if sign > 0 else '-'}{part}={total + sign * part}")
                total += sign * part
    return " ".join([*steps, f"#{total}"])


def prompt_row(number: int, problem: dict[str, Any]) -> dict[str, Any]:
    expression, entry = problem["expression"], problem["entry"]
    first_step = re.match(r"\d+[+-]", expression)
    assert first_step is not None
    return {
        "id": f"{number}:{expression}",
        "prompt": f"{expression}=",
        "answer": entry["answer"],
        "verifier": "reasoning_gym",
        "domain": "chain_sum",
        "metadata": {"dataset": "chain_sum", "entry": entry, "forced_prefix": first_step.group()},
    }


def sft_row(problem: dict[str, Any], direct: bool) -> dict[str, str]:
    expression, answer = problem["expression"], problem["entry"]["answer"]
    return {"prompt": f"{expression}=", "response": f"#{answer}" if direct else worked(expression)}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=6_000, help="RL prompts")
    parser.add_argument("--eval", type=int, default=200, help="held-out prompts")
    parser.add_argument("--sft", type=int, default=20_000, help="problems of each SFT stage")
    parser.add_argument("--direct", type=float, default=0.55, help="share of direct answers in the mixed stage")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    stream = problems(args.seed)
    distinct = {problem["expression"]: problem for problem in islice(stream, 20 * args.eval) if is_held_out(problem["expression"])}
    held_out = list(distinct.values())[: args.eval]
    seen = (problem for problem in stream if not is_held_out(problem["expression"]))
    train, sft = list(islice(seen, args.train)), list(islice(seen, args.sft))
    rng = random.Random(args.seed)
    write_jsonl(args.out / "eval.jsonl", starmap(prompt_row, enumerate(held_out)))
    write_jsonl(args.out / "train.jsonl", starmap(prompt_row, enumerate(train)))
    write_jsonl(args.out / "sft_worked.jsonl", (sft_row(p, direct=False) for p in sft))
    write_jsonl(args.out / "sft_mixed.jsonl", (sft_row(p, direct=rng.random() < args.direct) for p in sft))
    texts = [row["prompt"] + row["response"] for row in (sft_row(p, direct=False) for p in sft[:2_000])]
    train_sentencepiece(texts, args.out / "tokenizer.model", vocab_size=VOCAB, model_type="char")
    print(f"{args.out}: {len(train)} training prompts, {len(held_out)} held out, {len(sft)} SFT problems")


if __name__ == "__main__":
    main()
