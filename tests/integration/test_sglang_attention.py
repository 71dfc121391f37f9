"""The batched CPU attention against SGLang's own loop over requests, and its refusal of an SGLang it does not know.

SGLang is imported in a process of its own: without CUDA it needs stand-ins, which must not stay in the test suite's process.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.sglang

SCRIPT = """
import json, random
from types import SimpleNamespace
from megatron_rl.engine import server
server.prepare_cpu()
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from megatron_rl.engine import cpu_attention
from megatron_rl.engine.cpu_attention import BatchedCpuAttention

HEADS, KV_HEADS, DIM, SLOTS, LONGEST = 4, 2, 8, 2000, 60
rng, generator = random.Random(0), torch.Generator().manual_seed(0)
padded = []

def case(count, decode, uniform, limit, dtype):
    cpu_attention.PADDED_LIMIT = limit
    keys = [rng.randint(2, LONGEST) for _ in range(count)]
    queries = [1 if decode else min(5, k) if uniform else rng.randint(1, k) for k in keys]  # the rest is a cached prefix
    slots = torch.randperm(SLOTS - 1, generator=generator) + 1
    req_to_token = torch.zeros(count + 3, LONGEST, dtype=torch.int32)
    rows = torch.randperm(count + 3, generator=generator)[:count]
    for row, k in zip(rows, keys):
        req_to_token[row, :k], slots = slots[:k], slots[k:]
    k_cache, v_cache = (torch.randn(SLOTS, KV_HEADS, DIM, generator=generator).to(dtype) for _ in range(2))
    k_cache[0] = v_cache[0] = float("nan")  # no request owns slot 0
    query = torch.randn(sum(queries), HEADS, DIM, generator=generator).to(dtype)
    seq_lens, extend = torch.tensor(keys), torch.tensor(queries)
    runner = SimpleNamespace(
        device="cpu", dtype=dtype, token_to_kv_pool=None, req_to_token_pool=SimpleNamespace(req_to_token=req_to_token)
    )
    batch = SimpleNamespace(
        seq_lens=seq_lens, extend_seq_lens=extend, req_pool_indices=rows, out_cache_loc=None,
        forward_mode=SimpleNamespace(is_decode=lambda: decode),
    )
    lengths = [seq_lens] if decode else [seq_lens, seq_lens - extend, extend]
    outputs = []
    for backend in (TorchNativeAttnBackend(runner), BatchedCpuAttention(runner)):
        backend.init_forward_metadata(batch)
        run = backend._run_sdpa_forward_decode if decode else backend._run_sdpa_forward_extend
        output = torch.full_like(query, float("nan"))
        run(query, output, k_cache, v_cache, req_to_token, rows, *lengths, None, scaling=DIM ** -0.5, enable_gqa=True,
            causal=not decode, is_cross_attn=False, sliding_window_size=None)
        outputs.append(output.float())
    shapes = [piece.bias.shape for piece in backend._pieces]
    padded.append([limit, max(n * max(16, q) * length for n, q, length in shapes), len(shapes)])
    return (outputs[0] - outputs[1]).abs().max().item()

gaps = {}
for dtype in (torch.float32, torch.bfloat16):
    for decode, uniform in ((True, True), (False, True), (False, False)):
        for limit in (2**22, 16 * LONGEST * 3):
            gaps[f"{dtype} decode={decode} uniform={uniform} limit={limit}"] = case(13, decode, uniform, limit, dtype)
TorchNativeAttnBackend._run_sdpa_forward_decode = lambda self, query, output, surprise: None
try:
    cpu_attention.register()
    refusal = None
except RuntimeError as error:
    refusal = str(error)
print(json.dumps({"gaps": gaps, "padded": padded, "refusal": refusal}))
"""


@pytest.fixture(scope="module")
def outcome() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_outputs_equal_the_loop_over_requests(outcome: dict[str, dict[str, float]]) -> None:
    assert len(outcome["gaps"]) == 12
    for case, gap in outcome["gaps"].items():
        assert gap < (1e-5 if "float32" in case else 2e-2), case


def test_padding_keeps_within_the_limit(outcome: dict[str, list[tuple[int, int, int]]]) -> None:
    assert all(pairs <= limit for limit, pairs, _ in outcome["padded"])
    assert {pieces > 1 for limit, _, pieces in outcome["padded"] if limit < 2**22} == {True}
    assert {pieces for limit, _, pieces in outcome["padded"] if limit == 2**22} == {1}


def test_an_upstream_method_that_changed_is_refused(outcome: dict[str, str]) -> None:
    assert "_run_sdpa_forward_decode takes (self query output surprise)" in outcome["refusal"]
