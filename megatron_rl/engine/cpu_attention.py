"""Attention for SGLang on a CPU, over a whole batch at once, in place of upstream's loop over requests.

SGLang's `torch_native` backend attends one request after the other (torch_native_backend.py:97, :212). Here a forward's requests
share one gather and one `scaled_dot_product_attention` per layer; where padding them to a common length would cost too much
memory they are halved until it does not. SGLang's hooks let it in: a backend is registered under its name
(attention_registry.py:38). The name stays `torch_native`, since SGLang takes any other to mean that Triton runs here
(utils/common.py:1386). The subclass can go when upstream batches.

Invariants: outputs equal upstream's, for decode and for prefill with and without a cached prefix; a forward never pads beyond
`PADDED_LIMIT`; an upstream method that no longer has the signature we override is an error at start-up.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

PADDED_LIMIT = 2**22  # padded (query, key) pairs of one attention call; a decode's single query counts as 16
_COMMON = (
    "self query output k_cache v_cache req_to_token req_pool_indices seq_lens {}encoder_lens scaling enable_gqa causal "
    "is_cross_attn sliding_window_size"
)
_OVERRIDDEN = {
    "_run_sdpa_forward_extend": _COMMON.format("extend_prefix_lens extend_seq_lens "),
    "_run_sdpa_forward_decode": _COMMON.format(""),
    "init_forward_metadata": "self forward_batch",
}


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive requests of a forward, padded to N requests x Q queries x L keys."""

    tokens: slice  # their queries among the forward's tokens
    real: torch.Tensor | None  # (N, Q): which padded queries are tokens; None: all
    slots: torch.Tensor  # N * L places in the KV cache; padding repeats a request's first
    bias: torch.Tensor  # (N, Q, L): 0 where query q may see key l, else -inf


class BatchedCpuAttention(TorchNativeAttnBackend):
    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        self._dtype = model_runner.dtype
        self._pieces: list[_Piece] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        keys = forward_batch.seq_lens.tolist()
        queries = [1] * len(keys) if forward_batch.forward_mode.is_decode() else forward_batch.extend_seq_lens.tolist()
        rows = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, : max(keys, default=0)]
        starts = [0]
        for count in queries:
            starts.append(starts[-1] + count)
        self._pieces = [
            self._piece(slice(starts[part.start], starts[part.stop]), rows[part], queries[part], keys[part])
            for part in _parts(queries, keys, 0, len(keys))
        ]

    def _piece(self, tokens: slice, rows: torch.Tensor, queries: list[int], keys: list[int]) -> _Piece:
        queries_N, keys_N = torch.tensor(queries), torch.tensor(keys)
        position_Q, position_L = torch.arange(max(queries)), torch.arange(max(keys))
        slots_NL = torch.where(position_L < keys_N[:, None], rows[:, : max(keys)], rows[:, :1]).long()
        last_seen_NQ = (keys_N - queries_N)[:, None] + position_Q
        hidden_NQL = position_L > last_seen_NQ[:, :, None]
        bias_NQL = torch.zeros(hidden_NQL.shape, dtype=self._dtype).masked_fill_(hidden_NQL, float("-inf"))
        real_NQ = None if min(queries) == max(queries) else position_Q < queries_N[:, None]
        return _Piece(tokens, real_NQ, slots_NL.flatten(), bias_NQL)

    def _run_sdpa_forward_extend(
        self, query: torch.Tensor, output: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if not _is_plain(query, k_cache, **kwargs):
            return super()._run_sdpa_forward_extend(query, output, k_cache, v_cache, *args, **kwargs)
        return self._attend(query, output, k_cache, v_cache, kwargs["scaling"])

    def _run_sdpa_forward_decode(
        self, query: torch.Tensor, output: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if not _is_plain(query, k_cache, causal=True, **{k: v for k, v in kwargs.items() if k != "causal"}):
            return super()._run_sdpa_forward_decode(query, output, k_cache, v_cache, *args, **kwargs)
        return self._attend(query, output, k_cache, v_cache, kwargs["scaling"])

    def _attend(
        self, query: torch.Tensor, output: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        heads, kv_heads, dim = query.shape[1], k_cache.shape[1], query.shape[2]
        for piece in self._pieces:
            n, q, length = piece.bias.shape
            # The query heads that share a KV head stand beside its queries: no key or value is repeated.
            query_NQHD = _padded(query[piece.tokens], piece.real).view(n, q, kv_heads, heads // kv_heads, dim)
            attended = scaled_dot_product_attention(
                query_NQHD.transpose(1, 2).reshape(n, kv_heads, -1, dim),
                _gathered(k_cache, piece.slots, n, length),
                _gathered(v_cache, piece.slots, n, length),
                attn_mask=(piece.bias if q == 1 else piece.bias.repeat_interleave(heads // kv_heads, dim=1))[:, None],
                scale=scaling,
            )
            attended_NQHD = attended.view(n, kv_heads, q, heads // kv_heads, -1).transpose(1, 2).reshape(n, q, heads, -1)
            output[piece.tokens] = attended_NQHD.flatten(0, 1) if piece.real is None else attended_NQHD[piece.real]
        return output


def register() -> None:
    for name, expected in _OVERRIDDEN.items():
        found = " ".join(inspect.signature(getattr(TorchNativeAttnBackend, name)).parameters)
        if found != expected:
            raise RuntimeError(f"TorchNativeAttnBackend.{name} takes ({found}), BatchedCpuAttention overrides ({expected})")
    register_attention_backend("torch_native")(BatchedCpuAttention)


def _parts(queries: list[int], keys: list[int], start: int, stop: int) -> Iterator[slice]:
    """Halve the requests [start, stop) until padding each part to its longest request keeps within PADDED_LIMIT."""
    if start == stop:
        return
    pairs = (stop - start) * max(16, max(queries[start:stop])) * max(keys[start:stop])
    if stop - start == 1 or pairs <= PADDED_LIMIT:
        yield slice(start, stop)
        return
    middle = (start + stop) // 2
    yield from _parts(queries, keys, start, middle)
    yield from _parts(queries, keys, middle, stop)


def _is_plain(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    *,
    causal: bool,
    is_cross_attn: bool,
    sliding_window_size: int | None,
    scaling: float | None,
    enable_gqa: bool,
) -> bool:
    """Causal self-attention over a KV cache of the model's own type; upstream's loop does the rest."""
    return causal and not is_cross_attn and sliding_window_size is None and query.dtype == k_cache.dtype


def _padded(query_THD: torch.Tensor, real_NQ: torch.Tensor | None) -> torch.Tensor:
    if real_NQ is None:
        return query_THD
    padded = query_THD.new_zeros(*real_NQ.shape, *query_THD.shape[1:])
    padded[real_NQ] = query_THD
    return padded


def _gathered(cache: torch.Tensor, slots: torch.Tensor, n: int, length: int) -> torch.Tensor:
    """(n, kv heads, length, dim); rows are gathered whole, which is several times faster than indexing a 3-D cache."""
    return cache.flatten(1).index_select(0, slots).view(n, length, cache.shape[1], cache.shape[2]).transpose(1, 2)
