"""Lets unmodified Megatron-Core 0.16.1 run on a machine without CUDA; on one with CUDA it does nothing.

Megatron-Core asks `torch.cuda` for its device, its streams and its random state, and allocates with `device="cuda"`. Here these
answers are redirected to the CPU, and five places of Megatron itself are mended. Upstream lines are those of 0.16.1 under
megatron/core/; unless a comment says otherwise, a patch can go once Megatron-Core takes its device from its configuration.

Invariants: `install` can be called any number of times, from any module, before or after Megatron was imported; no result on a
machine with CUDA depends on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from megatron_rl.policy.norm import RmsNorm

CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_installed = False


def install() -> None:
    """Call before a Megatron model, optimizer or process group is built."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # jit.py:9 compiles small functions; on CPU that costs a C++ compiler run
    _keep_memory()
    _redirect_cuda()
    _redirect_tensors()
    _mend_megatron()


def _keep_memory() -> None:
    """torch has no caching allocator for the CPU, and glibc maps every large block anew and returns it when it is freed: the kernel
    then clears each page of each activation of each step. With blocks up to 32 MiB kept, a training step takes two thirds of
    the time (benchmarks/policy_step.py). Can go once torch caches CPU memory by itself."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest value that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_TOP_PAD, 64 * 2**20)


class _NoStream:
    """A stream or an event: all work is done when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: self


def _redirect_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU  # parallel_state.py, param_and_grad_buffer.py:783, router.py:169, mappings.py:91 ...
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _nothing(name))
    cuda.Stream = cuda.Event = _NoStream  # token_dispatcher.py:445, distributed_data_parallel.py:230
    stream = _NoStream()
    for name in ("current_stream", "default_stream"):  # param_and_grad_buffer.py:422, token_dispatcher.py:871
        setattr(cuda, name, _always(name, stream))
    cuda.stream = lambda *args: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = _rng_state  # tensor_parallel/random.py:235
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)


def _nothing(name: str) -> Callable[..., None]:
    def nothing(*args: Any, **kwargs: Any) -> None: ...

    nothing.__name__ = name
    return nothing  # one object per name: torch._dynamo refuses one object under two torch names


def _always(name: str, value: Any) -> Callable[..., Any]:
    def answer(*args: Any) -> Any:
        return value

    answer.__name__ = name
    return answer


def _rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.random.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.random.set_rng_state(state)


def _redirect_tensors() -> None:
    with torch.device("meta"):
        torch.empty(0)  # torch lists the functions that a device context serves when it is first asked, and knows them by identity
    for name in ("tensor", "zeros", "ones", "empty", "full"):  # schedules.py:590, optimizer.py:473, clip_grads.py:90
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    type_of: Any = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # type: ignore[assignment]  # optimizer.py:671, distrib_optimizer.py:361 compare with "torch.cuda.*"


def _on_cpu(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(create)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # rope_utils.py:73
        return create(*args, **kwargs)

    return on_cpu


def _mend_megatron() -> None:
    import megatron.core.tensor_parallel.random as tp_random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher
    import megatron.core.transformer.multi_latent_attention as latent_attention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    tp_random._get_cuda_rng_state, tp_random._set_cuda_rng_state = _rng_state, _set_rng_state  # random.py:41, :72
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # moe_utils.py:1192 reads a name that only an import of Transformer Engine defines

    latent_attention.HAVE_TE = (
        False  # multi_latent_attention.py:63 takes None for classes of Transformer Engine, and :185 asks for one
    )

    def to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # moe_utils.py:1093 turns split sizes into numpy only when they come from CUDA, and all_to_all wants no tensors
    dispatcher.maybe_move_tensor_to_cpu = to_numpy
    WrappedTorchNorm.__new__ = _norm


def _norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:
    """torch_norm.py:32 refuses sequence parallelism; all it takes is the mark that has the gradients summed over TP
    (finalize_model_grads.py, `_allreduce_non_tensor_model_parallel_grads`). Can go once upstream sets the mark itself."""
    assert config.normalization == "RMSNorm", config.normalization
    norm = RmsNorm(hidden_size, eps)
    norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
