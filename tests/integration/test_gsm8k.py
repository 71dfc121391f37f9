"""Ten steps of `experiment=gsm8k_tiny`: GSM8K as it is published, the 151,643 words of Qwen's BPE, Ring's chat template, the math
verifier. The model is tiny and random: what is proven is the path.

    pytest -m slow tests/integration/test_gsm8k.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

pytestmark = [pytest.mark.slow, pytest.mark.sglang, pytest.mark.timeout(1200)]

WORDS = 151_643
# How Qwen's tokenizer cuts a text before it looks for pairs.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|role_end|>", "<role>", "</role>"]


def write_tokenizer(path: Path, tokenizers: Path) -> PreTrainedTokenizerFast:
    converter = TikTokenConverter(str(tokenizers / "qwen.tiktoken"), pattern=PATTERN, extra_special_tokens=SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token="<|role_end|>", pad_token="<|endoftext|>")
    config = json.loads((tokenizers / "ring_v2_config_sft" / "tokenizer_config.json").read_text())
    tokenizer.chat_template = config["chat_template"]
    tokenizer.save_pretrained(path)
    return tokenizer


def test_ten_steps(tmp_path: Path, shared_data: Path) -> None:
    train = shared_data / "math" / "gsm8k_train.jsonl"
    tokenizer = write_tokenizer(tmp_path / "tokenizer", shared_data / "tokenizers")
    words = load_tiktoken_bpe(str(shared_data / "tokenizers" / "qwen.tiktoken"))
    original = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=words, special_tokens={})
    questions = [json.loads(line)["question"] for line in train.read_text().splitlines()[:200]]
    assert len(words) == WORDS and len(tokenizer) == WORDS + len(SPECIAL)
    assert [tokenizer.encode(text) for text in questions] == original.encode_batch(questions)

    run = tmp_path / "run"
    command = [sys.executable, "-m", "megatron_rl", "rl", "experiment=gsm8k_tiny", f"run.dir={run}"]
    command += [f"data.tokenizer={tmp_path}/tokenizer", f"data.train={train}", f"data.eval={train}"]
    command += ["eval.at_ends=true", "eval.prompts=4", "eval.samples=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, 11))
    assert sum(row["train/tokens"] for row in metrics) > 0
    assert all(row.get("mismatch/logprob_gap_max", 0.0) < 1e-4 for row in metrics)
    assert [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()] == [0, 10]
    dumps = sorted((run / "rollouts").glob("step_*.jsonl"))
    samples = [json.loads(line) for dump in dumps for line in dump.read_text().splitlines()]
    assert samples and {row["status"] for row in samples} <= {"correct", "wrong", "unparsable"}
    for row in samples:
        assert row["prompt"].startswith("<role>SYSTEM</role>") and row["answer"].replace(",", "").lstrip("-").isdigit()
