"""Weight pushes to two real SGLang servers by both transports, and what can go wrong: always an error that names the tensor or the
server, within the limit, and afterwards a push that works."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import manifest_of
from tiny_families import write_family

from megatron_rl.checksum import checksum
from megatron_rl.config import UserError
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine import group
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.engine.weights import EngineWeights, Transport
from megatron_rl.types import EngineLost

pytestmark = pytest.mark.sglang
TIMEOUT_S = 4.0
BOTH: tuple[Transport, ...] = ("shared_memory", "group")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("push")


@pytest.fixture(scope="module")
def weights(folder: Path) -> list[Tensors]:
    return [load_file(write_family(folder / f"hf{seed}", "bailing_moe_v2", seed) / "model.safetensors") for seed in (0, 1)]


@pytest.fixture(scope="module")
def engines(folder: Path, weights: list[Tensors]) -> Iterator[SglangEngines]:
    config = EngineConfig(device="cpu", count=2, max_total_tokens=1024)
    fleet = SglangEngines(config, str(folder / "hf0"), folder, context_length=128, seed=0)
    fleet.start()
    yield fleet
    fleet.stop()


def halves(tensors: Mapping[str, torch.Tensor]) -> list[list[tuple[str, torch.Tensor]]]:
    items = list(tensors.items())
    return [items[: len(items) // 2], items[len(items) // 2 :]]


def push(sink: EngineWeights, tensors: Tensors, version: int) -> None:
    intake = sink.begin(manifest_of(*halves(tensors)))
    for bucket in halves(tensors):
        sink.send([(name, tensor) for name, tensor in bucket if name in intake.dtypes])
    sink.end(version, {name: int(checksum(tensor)) for name, tensor in tensors.items()})


def logprobs(engine: SglangEngine) -> list[float]:
    body = {
        "input_ids": [[5, 6, 7, 9, 11, 13, 3, 4]],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    (answer,) = engine.call("/generate", body)
    return [logprob for logprob, _, _ in answer["meta_info"]["input_token_logprobs"][1:]]


@pytest.fixture(scope="module")
def expected(engines: SglangEngines, weights: list[Tensors]) -> list[list[float]]:
    """Log-probs under each of the weights, the first as the servers loaded them from disk."""
    first = logprobs(engines.alive[0])
    push(EngineWeights(engines), weights[1], version=1)
    second = logprobs(engines.alive[0])
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.1
    return [first, second]


@pytest.mark.parametrize("transport", BOTH)
def test_a_push_reaches_every_server(
    engines: SglangEngines, weights: list[Tensors], expected: list[list[float]], transport: Transport
) -> None:
    sink = EngineWeights(engines, timeout_s=60, transport=transport)
    for version in (10, 11):  # the group stays from one to the next
        push(sink, weights[version % 2], version)
        assert [logprobs(engine) for engine in engines.alive] == [expected[version % 2]] * 2
        assert [engine.call("/model_info")["weight_version"] for engine in engines.alive] == [str(version)] * 2


def test_what_the_engines_would_not_take_is_refused_before_the_first_byte(
    engines: SglangEngines, weights: list[Tensors], expected: list[list[float]]
) -> None:
    whole, sink = weights[0], EngineWeights(engines)
    push(sink, whole, version=20)
    norm, expert, bias = "model.norm.weight", "model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.expert_bias"
    lost_expert = r"nothing writes model\.layers\.2\.mlp\.experts\.w13_weight\[3:4, 32:64, 0:64\]"
    for change, message in {
        "missing norm": (lambda t: t.pop(norm), r"nothing writes model\.norm\.weight"),
        "missing expert": (lambda t: t.pop(expert), lost_expert),
        "missing bias": (lambda t: t.pop(bias), r"nothing writes model\.layers\.1\.mlp\.gate\.expert_bias"),
        "unknown": (lambda t: t.update(extra=torch.zeros(2)), "extra is unknown"),
        "shape": (lambda t: t.update({expert: torch.zeros(33, 64)}), expert.replace(".", r"\.")),
        "one row too few": (lambda t: t.update({"lm_head.weight": torch.zeros(63, 64)}), r"lm_head\.weight"),
    }.values():  # fmt: skip
        tensors = dict(whole)
        change(tensors)
        with pytest.raises(UserError, match=rf"engine_0 would not take the policy's weights: .*{message}"):
            sink.begin(manifest_of(*halves(tensors)))
    assert [logprobs(engine) for engine in engines.alive] == [expected[0]] * 2
    push(sink, whole, version=21)


def test_a_wrong_checksum_names_the_tensor(engines: SglangEngines, weights: list[Tensors]) -> None:
    sink = EngineWeights(engines)
    sink.begin(manifest_of(*halves(weights[0])))
    for bucket in halves(weights[0]):
        sink.send(bucket)
    sums = {name: int(checksum(tensor)) for name, tensor in weights[0].items()}
    qkv = "model.layers.0.attention.query_key_value.weight"
    sums[qkv] = int(checksum(weights[0][qkv].roll(1, 0)))
    with pytest.raises(RuntimeError, match=rf"engine_0 does not hold what it was sent: {qkv}$"):
        sink.end(30, sums)


def test_a_new_server_must_be_sent_everything(engines: SglangEngines, weights: list[Tensors]) -> None:
    sink, buckets = EngineWeights(engines), halves(weights[0])
    assert not sink.begin(manifest_of(*buckets)).has_all  # the wrong checksum of before ended its push
    sink.send(buckets[0])
    with pytest.raises(RuntimeError, match=r"engine_0 is new and was not sent .*model\.norm\.weight|and \d+ more"):
        sink.end(31)
    push(sink, weights[0], version=32)
    assert sink.begin(manifest_of(*buckets)).has_all
    sink.send(buckets[1])
    sink.end(33)


def server_pid(name: str) -> int:
    mine = psutil.Process().children(recursive=True)
    return next(p.pid for p in mine if f"engines/{name}.log" in os.path.realpath(f"/proc/{p.pid}/fd/1"))


@pytest.mark.parametrize(
    ("sent", "transport"),
    [
        (signal.SIGKILL, "group"),
        pytest.param(signal.SIGSTOP, "group", marks=pytest.mark.slow),
        (signal.SIGSTOP, "shared_memory"),
    ],
)
def test_a_server_that_dies_or_hangs_during_a_push_is_named_in_time(
    engines: SglangEngines,
    weights: list[Tensors],
    expected: list[list[float]],
    sent: signal.Signals,
    transport: Transport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group, "GRACE_S", 2.0)
    sink = EngineWeights(engines, timeout_s=TIMEOUT_S, transport=transport)
    push(sink, weights[0], version=40)
    sink.begin(manifest_of(*halves(weights[1])))
    sink.send(halves(weights[1])[0])
    os.killpg(server_pid("engine_1"), sent)
    started = time.monotonic()
    with pytest.raises(EngineLost, match="engine_1"):
        sink.send(halves(weights[1])[1])
    assert time.monotonic() - started < TIMEOUT_S + 4.0
    assert [engine.name for engine in engines.alive] == ["engine_0"]
    assert engines.recover() == ["engine_1"]
    patient = EngineWeights(engines, timeout_s=60, transport=transport)
    push(patient, weights[1], version=41)
    assert [logprobs(engine) for engine in engines.alive] == [expected[1]] * 2
