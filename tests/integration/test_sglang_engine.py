"""A real SGLang server on a CPU against the plain-torch reference: log-probs, weight pushes, aborts and continuations, and samples
by the seeds of requests (in other files servers sample by their own generator).

Its KV cache is small on purpose: requests queue, and some are thrown out of the batch and come back.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_model import Weights, reference_experts, reference_logits, reference_logprobs
from safetensors.torch import load_file
from tiny_checkpoint import TINY_CONFIG, manifest_of, random_weights, write_checkpoint

from megatron_rl.checksum import checksum
from megatron_rl.config import UserError
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine.arguments import STARTUP_VERSION
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.engine.weights import EngineWeights
from megatron_rl.types import EngineLost, GenerateRequest, Progress, Prompt, Rollout, RoutingShape, SamplingParams

pytestmark = pytest.mark.sglang
TOLERANCE = 1e-4  # nats, float32
OVERRIDES = {  # the shapes of the original implementation's golden outputs
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_experts": 16,
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 32, "eos_token_id": 255,
}  # fmt: skip
CONFIG = TINY_CONFIG | OVERRIDES
KV_TOKENS = 1500
ROUTING = RoutingShape(CONFIG["num_hidden_layers"], CONFIG["first_k_dense_replace"], top_k=4, experts=16)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def engine_log(run_dir: Path) -> Path:
    return run_dir / "engines" / "engine_0.log"


@pytest.fixture(scope="module")
def engines(run_dir: Path) -> Iterator[SglangEngines]:
    config = EngineConfig(device="cpu", max_total_tokens=KV_TOKENS, stream_interval=4, deterministic=True)
    path = write_checkpoint(run_dir / "hf", seed=0, **OVERRIDES)
    fleet = SglangEngines(config, str(path), run_dir, context_length=256, seed=0, routing=ROUTING)
    fleet.start()
    yield fleet
    fleet.stop()


@pytest.fixture
def engine(engines: SglangEngines) -> SglangEngine:
    assert [engine.lost for engine in engines.alive] == [None]
    return engines.alive[0]


def push(engines: SglangEngines, weights: Weights, version: int, bucket_size: int = 40) -> None:
    items = list(weights.items())
    buckets = [items[start : start + bucket_size] for start in range(0, len(items), bucket_size)]
    sink = EngineWeights(engines)
    sink.begin(manifest_of(*buckets))
    for bucket in buckets:
        copies = [(name, tensor.clone()) for name, tensor in bucket]
        sink.send(copies)
        for _, tensor in copies:
            tensor.fill_(float("nan"))  # the memory is ours again
    sink.end(version, {name: int(checksum(tensor)) for name, tensor in items})


def requests_for(prompts: Sequence[Sequence[int]], new: int, **sampling: Any) -> list[GenerateRequest]:
    return [GenerateRequest(f"0:{i}#0", tuple(prompt), new, SamplingParams(**sampling)) for i, prompt in enumerate(prompts)]


def generate(engine: SglangEngine, requests: Sequence[GenerateRequest], abort_at: int | None = None) -> dict[str, Rollout]:
    """Run the requests to their end; `abort_at`: abort all once so many tokens came."""
    prompt = Prompt(id="", text="", tokens=(), answer="", verifier="")
    got = {request.rollout_id: Rollout(request.rollout_id, prompt, 0) for request in requests}

    def take(messages: Sequence[Progress]) -> int:
        for message in messages:
            got[message.rollout_id] = got[message.rollout_id].extended(message)
        return sum(len(rollout.tokens) for rollout in got.values())

    async def run() -> None:
        aborts: list[asyncio.Task[None]] = []
        async for messages in engine.generate(requests):
            if abort_at is not None and take(messages) >= abort_at and not aborts:
                aborts.append(asyncio.create_task(engine.abort()))
            elif abort_at is None:
                take(messages)
        await asyncio.gather(*aborts)

    asyncio.run(asyncio.wait_for(run(), 60))
    return got


def random_prompts(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, 255, (length,), generator=generator).tolist() for length in lengths]


def worst_gap(weights: Weights, prompt: Sequence[int], rollout: Rollout, temperature: float = 1.0) -> float:
    expected = reference_logprobs(weights, CONFIG, [*prompt, *rollout.tokens], temperature)[len(prompt) - 1 :]
    return (expected - torch.tensor(rollout.engine_logprobs)).abs().max().item() if rollout.tokens else 0.0


def test_a_fresh_server_is_on_its_checkpoints_weights(engine: SglangEngine) -> None:
    got = generate(engine, requests_for([[5, 6]], 8))["0:0#0"]
    assert set(got.versions) == {STARTUP_VERSION}
    assert worst_gap(random_weights(CONFIG, seed=0), [5, 6], got) < TOLERANCE


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_models_at_the_sampling_temperature(
    engines: SglangEngines, engine: SglangEngine, engine_log: Path, temperature: float
) -> None:
    weights = random_weights(CONFIG, seed=3)
    push(engines, weights, version=3)
    prompts = random_prompts(48, seed=1)
    requests = requests_for(prompts, 40, temperature=temperature)
    assert sum(len(prompt) for prompt in prompts) + 48 * 40 > KV_TOKENS  # they do not fit at once
    for _ in range(2):  # the second time, prompts are in the prefix cache
        got = generate(engine, requests)
        assert {rollout.finish_reason for rollout in got.values()} <= {"length", "stop"}
        assert max(worst_gap(weights, r.tokens, got[r.rollout_id], temperature) for r in requests) < TOLERANCE
    assert "Retract requests" in engine_log.read_text()


def test_greedy_stop_and_length(engines: SglangEngines, engine: SglangEngine) -> None:
    weights = random_weights(CONFIG, seed=4)
    push(engines, weights, version=4)
    prompt = [7, 8, 9]
    greedy = list(prompt)
    for _ in range(12):
        greedy.append(int(reference_logits(weights, CONFIG, greedy)[-1].argmax()))
    answer = greedy[3:]
    assert 255 not in answer
    stop = next(token for at, token in enumerate(answer) if at > 2 and token not in answer[:at])
    free, stopped = (generate(engine, requests_for([prompt], 12, temperature=0.0, stop_token_ids=s)) for s in ((), (stop,)))
    assert free["0:0#0"].tokens == tuple(answer) and free["0:0#0"].finish_reason == "length"
    assert stopped["0:0#0"].tokens == tuple(answer[: answer.index(stop) + 1]) and stopped["0:0#0"].finish_reason == "stop"


@pytest.mark.parametrize("sampling", [{"temperature": 0.6}, {"temperature": 1.0, "top_p": 0.8, "top_k": 40}], ids=str)
def test_a_seed_decides_the_samples_however_they_are_made(
    engines: SglangEngines, engine: SglangEngine, engine_log: Path, sampling: dict[str, Any]
) -> None:
    """All at once, in another order, in two parts as on two servers, and cut in the middle; some are thrown out of the batch."""
    push(engines, random_weights(CONFIG, seed=12), version=12)
    prompts = random_prompts(64, seed=4, longest=12)
    requests = requests_for(prompts, 40, seed=1, **sampling)
    retractions = engine_log.read_text().count("Retract requests")
    expected = {name: rollout.tokens for name, rollout in generate(engine, requests).items()}
    assert engine_log.read_text().count("Retract requests") > retractions

    def tokens(*parts: Sequence[GenerateRequest]) -> dict[str, tuple[int, ...]]:
        return {name: rollout.tokens for part in parts for name, rollout in generate(engine, part).items()}

    assert tokens(requests[::-1]) == expected
    assert tokens(requests[1::2], requests[::2]) == expected
    cut = generate(engine, requests, abort_at=900)
    rest = [
        replace(r, tokens=r.tokens + cut[r.rollout_id].tokens, max_new_tokens=40 - len(cut[r.rollout_id].tokens))
        for r in requests
        if cut[r.rollout_id].finish_reason is None
    ]
    assert any(cut[r.rollout_id].tokens for r in rest)
    went_on = tokens(rest)
    assert {name: rollout.tokens + went_on.get(name, ()) for name, rollout in cut.items()} == expected
    others = tokens(requests_for(prompts[:8], 40, seed=2, **sampling))
    assert all(others[name] != expected[name] for name in others)


def test_seeded_samples_follow_the_probabilities(engines: SglangEngines, engine: SglangEngine) -> None:
    weights = random_weights(CONFIG, seed=13)
    push(engines, weights, version=13)
    prompt = [9, 8, 7]
    logprobs_V = torch.log_softmax(reference_logits(weights, CONFIG, prompt)[-1].double(), -1)
    got = generate(engine, requests_for([prompt] * 1500, 1))
    counts_V = (
        torch.zeros(len(logprobs_V))
        .double()
        .index_add_(0, torch.tensor([r.tokens[0] for r in got.values()]), torch.ones(1500).double())
    )
    expected_V = 1500 * logprobs_V.exp()
    often_V = expected_V > 5
    chi_squared = ((counts_V - expected_V) ** 2 / expected_V)[often_V].sum().item()
    assert often_V.sum() > 20 and chi_squared < often_V.sum() + 5 * (2 * often_V.sum()) ** 0.5


def experts_of(rows: bytes) -> torch.Tensor:
    return torch.tensor(list(rows), dtype=torch.long).view(-1, ROUTING.layers - ROUTING.first_dense, ROUTING.top_k).sort(-1).values


def test_a_continued_rollout_keeps_each_tokens_version_logprob_and_experts(engines: SglangEngines, engine: SglangEngine) -> None:
    old, new = random_weights(CONFIG, seed=5), random_weights(CONFIG, seed=6)
    push(engines, old, version=5)
    prompts = random_prompts(60, seed=2)
    requests = [replace(request, report_experts=True) for request in requests_for(prompts, 64, temperature=1.0)]
    before = generate(engine, requests, abort_at=600)
    started = [r for r in before.values() if r.tokens]
    assert any(r.finish_reason is None for r in started) and sum(len(r.tokens) for r in started) < 60 * 64 / 2
    push(engines, new, version=6)
    unfinished = {name: r for name, r in before.items() if r.finish_reason is None}
    prompt_of = {f"0:{i}#0": prompt for i, prompt in enumerate(prompts)}
    requests = [
        GenerateRequest(name, (*prompt_of[name], *r.tokens), 64 - len(r.tokens), SamplingParams(), report_experts=True)
        for name, r in unfinished.items()
    ]
    after = generate(engine, requests)
    for request in requests:
        first, second = unfinished[request.rollout_id], after[request.rollout_id]
        prompt = prompt_of[request.rollout_id]
        assert set(first.versions) <= {5} and set(second.versions) == {6}
        assert worst_gap(old, prompt, first) < TOLERANCE
        assert worst_gap(new, request.tokens, second) < TOLERANCE
        sequence = (*request.tokens, *second.tokens)
        assert first.experts == b"", "it goes on, and the new weights choose anew"
        assert torch.equal(experts_of(second.experts), reference_experts(new, CONFIG, sequence)[:-1])
    for name in before.keys() - unfinished.keys():
        sequence = (*prompt_of[name], *before[name].tokens)
        assert torch.equal(experts_of(before[name].experts), reference_experts(old, CONFIG, sequence)[:-1])


def test_with_supports_logprobs_are_the_models_within_what_was_left_of_the_vocabulary(
    engines: SglangEngines, engine: SglangEngine
) -> None:
    """Through retractions, an abort and a continuation. top_p and top_k both cut."""
    weights = random_weights(CONFIG, seed=9)
    weights["lm_head.weight"] *= 8
    push(engines, weights, version=9)
    prompts = random_prompts(48, seed=1)
    cut = {"temperature": 0.8, "top_p": 0.9, "top_k": 20}
    requests = requests_for(prompts, 40, **cut, report_support=True)
    got = generate(engine, requests, abort_at=500)
    unfinished = [r for r in requests if got[r.rollout_id].finish_reason is None]
    assert unfinished
    goes_on = [
        replace(r, tokens=(*r.tokens, *got[r.rollout_id].tokens), max_new_tokens=40 - len(got[r.rollout_id].tokens))
        for r in unfinished
    ]
    for name, rest in generate(engine, goes_on).items():
        progress = Progress(name, rest.tokens, rest.engine_logprobs, rest.versions, rest.finish_reason, support=rest.support)
        got[name] = got[name].extended(progress)

    sizes, gap, gap_to_whole = set(), 0.0, 0.0
    for request in requests:
        rollout = got[request.rollout_id]
        supports = [torch.tensor(array("i", ids), dtype=torch.long) for ids in rollout.support]
        assert len(supports) == len(rollout.tokens) > 0
        x_LV = reference_logits(weights, CONFIG, [*request.tokens, *rollout.tokens])[len(request.tokens) - 1 : -1] / 0.8
        p_LV = x_LV.softmax(-1)
        left_LV = torch.stack([torch.zeros(x_LV.size(1), dtype=torch.bool).index_fill(0, ids, True) for ids in supports])
        likeliest_cut_L = p_LV.masked_fill(left_LV, 0.0).amax(-1)
        assert (p_LV.masked_fill(~left_LV, 1.0).amin(-1) > likeliest_cut_L - 1e-5).all(), "the likeliest are left"
        mass_L = (p_LV * left_LV).sum(-1)
        assert ((mass_L > 0.9 - 1e-4) | (left_LV.sum(-1) == 20)).all()
        sizes |= set(left_LV.sum(-1).tolist())
        tokens_L1 = torch.tensor(rollout.tokens)[:, None]
        expected_L = x_LV.masked_fill(~left_LV, -torch.inf).log_softmax(-1).gather(1, tokens_L1)[:, 0]
        gap = max(gap, (expected_L - torch.tensor(rollout.engine_logprobs)).abs().max().item())
        gap_to_whole = max(gap_to_whole, worst_gap(weights, request.tokens, rollout, 0.8))
    assert min(sizes) < 3 and max(sizes) == 20
    assert gap < TOLERANCE < 0.1 < gap_to_whole

    plain = requests_for(prompts[:8], 20, **cut)
    without = generate(engine, plain)
    assert all(rollout.support == () for rollout in without.values())
    assert max(worst_gap(weights, r.tokens, without[r.rollout_id], 0.8) for r in plain) < TOLERANCE
    with pytest.raises(UserError, match=r"keep_sampling_mask: return_sampling_mask requires .* \(rollout\.top_k, "):
        generate(engine, [replace(plain[0], sampling=replace(plain[0].sampling, top_k=-1, report_support=True))])
    assert engine.lost is None


def test_single_requests_can_be_aborted_while_others_go_on(engine: SglangEngine) -> None:
    async def run() -> dict[str, list[Progress]]:
        got: dict[str, list[Progress]] = {"0:0#0": [], "0:1#0": []}
        aborted = False
        async for messages in engine.generate(requests_for([[3], [4]], 120, temperature=0.0)):
            for message in messages:
                got[message.rollout_id].append(message)
            if not aborted and got["0:0#0"]:
                aborted = True
                await engine.abort(["0:0#0"])
        return got

    got = asyncio.run(asyncio.wait_for(run(), 60))
    assert got["0:0#0"][-1].finish_reason is None and sum(len(m.tokens) for m in got["0:0#0"]) < 120
    assert got["0:1#0"][-1].finish_reason == "length"


def test_weights_that_are_not_numbers_are_the_policys_fault(engines: SglangEngines, engine: SglangEngine) -> None:
    weights = random_weights(CONFIG, seed=10)
    weights["lm_head.weight"].fill_(float("nan"))
    push(engines, weights, version=10)
    for kept in (False, True):
        with pytest.raises(UserError, match="under weights 10 are not numbers: training has diverged"):
            generate(engine, requests_for([[5, 6]], 8, top_k=20, report_support=kept))
    assert engine.lost is None


def test_pushed_weights_give_the_original_implementations_logprobs(
    engines: SglangEngines, engine: SglangEngine, shared_data: Path
) -> None:
    golden = shared_data / "golden_bailing_moe_v2"
    expected = load_file(golden / "golden.safetensors")
    config = json.loads((golden / "config.json").read_text())
    ours = {"eos_token_id", "max_position_embeddings", "rope_parameters", "dtype"}
    assert {key: CONFIG[key] for key in CONFIG.keys() - ours} == {key: config[key] for key in CONFIG.keys() - ours}
    push(engines, load_file(golden / "model.safetensors"), version=7, bucket_size=17)
    real = expected["attention_mask"].bool()
    sequences = [ids[mask].tolist() for ids, mask in zip(expected["input_ids"], real, strict=True)]
    body: Mapping[str, Any] = {
        "input_ids": sequences,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    for tokens, mask, logits_TV, answer in zip(sequences, real, expected["logits"], engine.call("/generate", body), strict=True):
        told = torch.tensor([logprob for logprob, _, _ in answer["meta_info"]["input_token_logprobs"][1:]])
        wanted = logits_TV[mask][:-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert (told - wanted).abs().max() < TOLERANCE


def test_a_push_that_another_engines_death_ended_can_be_repeated(engines: SglangEngines, engine: SglangEngine) -> None:
    weights = random_weights(CONFIG, seed=8)
    EngineWeights(engines).begin(manifest_of(list(weights.items())))  # and never ended
    push(engines, weights, version=8)
    got = generate(engine, requests_for([[5, 6]], 8))["0:0#0"]
    assert set(got.versions) == {8} and worst_gap(weights, [5, 6], got) < TOLERANCE


def test_a_refused_request_is_an_engine_lost_with_the_servers_reason(engines: SglangEngines) -> None:
    """Last in this file: the server counts as lost from then on, and is restarted by `recover`."""
    engine = engines.alive[0]
    with pytest.raises(EngineLost, match=r"engine_0 .*/generate"):
        generate(engine, requests_for([list(range(2, 202)) * 2], 8))  # longer than the context
    assert engines.alive == []
