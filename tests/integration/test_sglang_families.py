"""Every family that SGLang serves on a CPU: greedy tokens and log-probs after a push are those of a server started from the
checkpoint that holds the same weights, and those of the reference implementation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from reference_model import reference_logits
from safetensors.torch import load_file
from tiny_checkpoint import manifest_of
from tiny_families import write_family
from transformers_reference import transformers_logits

from megatron_rl.checksum import checksum
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.engine.weights import EngineWeights

pytestmark = pytest.mark.sglang
TOLERANCE = 1e-4  # nats, float32
PROMPTS = [[5, 6, 7, 9, 11, 13], [3, 4], list(range(40, 62))]
NEW = 12
Generated = list[tuple[list[int], torch.Tensor]]  # per prompt: greedy tokens, and log-probs of all but the prompt's first token


def generate(engine: SglangEngine) -> Generated:
    body = {
        "input_ids": PROMPTS,
        "sampling_params": {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    generated = []
    for answer in engine.call("/generate", body):
        meta = answer["meta_info"]
        logprobs = [*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"]]
        generated.append((answer["output_ids"], torch.tensor([logprob for logprob, _, _ in logprobs])))
    return generated


def push(sink: EngineWeights, path: Path, version: int, buckets: int = 3) -> None:
    tensors = load_file(path / "model.safetensors")
    items = list(tensors.items())
    cut = [items[i * len(items) // buckets : (i + 1) * len(items) // buckets] for i in range(buckets)]
    intake = sink.begin(manifest_of(*cut))
    for bucket in cut:
        sink.send([(name, tensor) for name, tensor in bucket if name in intake.dtypes])
    sink.end(version, {name: int(checksum(tensor)) for name, tensor in items})


def gap(one: Generated, other: Generated) -> float:
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]
    return max((a - b).abs().max().item() for (_, a), (_, b) in zip(one, other, strict=True))


def by_reference(path: Path, greedy: Sequence[list[int]]) -> Generated:
    config = json.loads((path / "config.json").read_text())
    sequences = [torch.tensor([*prompt, *tokens]) for prompt, tokens in zip(PROMPTS, greedy, strict=True)]
    if config["model_type"].startswith("bailing"):
        weights = load_file(path / "model.safetensors")
        logits = [reference_logits(weights, config, sequence.tolist()) for sequence in sequences]
    else:
        logits = transformers_logits(path, sequences)
    generated = []
    for prompt, sequence, logits_TV in zip(PROMPTS, sequences, logits, strict=True):
        logprobs_T = logits_TV[:-1].log_softmax(-1).gather(-1, sequence[1:, None])[:, 0]
        generated.append((logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist(), logprobs_T))
    return generated


@pytest.mark.parametrize(
    ("family", "tp"),
    [
        ("qwen3_moe", 1),
        ("bailing_moe_v2", 2),
        *(pytest.param(family, 1, marks=pytest.mark.slow) for family in ("bailing_moe_v2", "bailing_moe", "qwen3", "qwen2_tied")),
    ],
)
def test_a_push_equals_a_start_from_the_checkpoint(family: str, tp: int, tmp_path: Path) -> None:
    start, other = (write_family(tmp_path / f"hf{seed}", family, seed) for seed in (0, 1))
    engines = SglangEngines(EngineConfig(device="cpu", tp=tp, max_total_tokens=512), str(start), tmp_path, 128, seed=0)
    try:
        engines.start()
        (engine,) = engines.alive
        started = generate(engine)
        sink = EngineWeights(engines, tp)
        push(sink, other, version=1)
        pushed = generate(engine)
        push(sink, start, version=2)
        back = generate(engine)
    finally:
        engines.stop()
    assert max((a[: len(b)] - b[: len(a)]).abs().max() for (_, a), (_, b) in zip(started, pushed, strict=True)) > 0.1
    assert gap(started, back) < TOLERANCE
    for path, generated in ((start, started), (other, pushed)):
        assert gap(generated, by_reference(path, [tokens for tokens, _ in generated])) < TOLERANCE
