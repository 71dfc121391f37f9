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
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

pytestmark = [pytest.mark.slow, pytest.mark.sglang]
SPECIAL = ["<|endoftext|>", "<|role_end|>", "<role>", "</role>"]


def write_tokenizer(path: Path, shared_data: Path) -> Path:
    folder = shared_data / "tokenizers"
    converter = TikTokenConverter(str(folder / "qwen.tiktoken"), extra_special_tokens=SPECIAL)
    config = json.loads((folder / "ring_v2_config_sft" / "tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token="<|role_end|>", pad_token="<|endoftext|>")
    assert len(tokenizer) == 151_643 + len(SPECIAL)
    tokenizer.chat_template = config["chat_template"]
    tokenizer.save_pretrained(path)
    return path


def test_ten_steps(tmp_path: Path, shared_data: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", shared_data)
    command = [sys.executable, "-m", "megatron_rl", "rl", "experiment=gsm8k_tiny", f"run.dir={tmp_path}/run"]
    command += [f"data.tokenizer={tokenizer}", f"data.train={shared_data}/math/gsm8k_train.jsonl", "data.eval=null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, 11))
    assert all(row["mismatch/logprob_gap_max"] < 1e-4 for row in metrics)
    samples = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_10.jsonl").read_text().splitlines()]
    assert all(row["prompt"].startswith("<role>SYSTEM</role>") and row["answer"].strip().lstrip("-").isdigit() for row in samples)
    assert {row["status"] for row in samples} <= {"correct", "wrong", "unparsable"}
