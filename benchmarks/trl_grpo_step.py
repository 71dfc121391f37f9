"""Seconds per step of TRL's GRPO on the quickstart's task: the figure our own step is held against.

Runs in an environment of its own, since TRL is no dependency of ours:

    python -m venv trl && trl/bin/pip install torch==2.13.0 && trl/bin/pip install trl==1.16.0 transformers==5.12.1 reasoning-gym
    OMP_NUM_THREADS=1 trl/bin/torchrun --nproc-per-node 2 benchmarks/trl_grpo_step.py --data runs/quickstart/data

A Qwen3-MoE of the quickstart model's size is first taught worked and direct answers for a few seconds, so that its answers end;
then GRPO runs with 32 prompts x 8 samples a step, T = 1. Prints the median step and its parts as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def tokenizer_for(texts: list[str]) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<unk>", "<s>", "</s>", *sorted(set("".join(texts)))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def model_of(vocab: int) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocab,
            hidden_size=128,
            intermediate_size=384,
            moe_intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.05,
            pad_token_id=0,
            eos_token_id=3,
            bos_token_id=2,
        )
    )


def warm_up(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99))
    rng = random.Random(0)
    for _ in range(steps):
        texts = [row["prompt"] + row["response"] + "</s>" for row in rng.sample(rows, 96)]
        batch = tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.lengths: list[float] = []

    def on_step_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.seconds.append(time.monotonic() - self.began)

    def on_log(self, args, state, control, logs=None, **_):  # type: ignore[no-untyped-def]
        if logs and "completions/mean_length" in logs:
            self.lengths.append(logs["completions/mean_length"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sft-steps", type=int, default=150)
    parser.add_argument("--processes", type=int, default=2, help="as given to torchrun; a step is 256 samples over all of them")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.data / "sft_mixed.jsonl").read_text().splitlines()]
    prompts = [json.loads(line) for line in (args.data / "train.jsonl").read_text().splitlines()]
    tokenizer = tokenizer_for([row["prompt"] + row["response"] for row in rows[:2000]])
    torch.manual_seed(0)
    model = model_of(len(tokenizer))
    warm_up(model, tokenizer, rows, args.sft_steps)

    def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
        texts = (text.replace("</s>", "").replace("<pad>", "") for text in completions)
        return [float(text.rpartition("#")[2].strip() == gold) for text, gold in zip(texts, answer, strict=True)]

    times = StepTimes()
    per_process = 256 // args.processes
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir="/tmp/trl_grpo_step",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=per_process,
            num_generations=8,
            max_completion_length=96,
            max_steps=args.steps,
            learning_rate=5e-5,
            lr_scheduler_type="constant",
            beta=0.0,
            temperature=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in prompts]),
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        step, length = statistics.median(times.seconds[2:]), statistics.fmean(times.lengths[2:])
        figures = {"step_s": round(step, 3), "mean_length": round(length, 1), "completion_tokens_per_s": round(256 * length / step)}
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
