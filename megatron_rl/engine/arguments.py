"""The command line and the environment of a SGLang server, as functions of the configuration.

Invariants: a key of `engine.server_args` replaces ours of that name, and null or false takes it away; nothing of torchrun reaches a
server; on a CPU the number of threads is not decided by the machine's core count; `engine.dtype=auto` is float32 on a CPU and
bfloat16 on CUDA, never SGLang's own guess (float16 for a float32 checkpoint).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.config.rollout import EngineConfig

STARTUP_VERSION = -1  # the weights of the checkpoint a server started from
_TORCHRUN = {prefix + name for prefix in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE", "NAME")}


def server_arguments(
    config: EngineConfig, device: str, model_path: str, context_length: int, seed: int, index: int, port: int, internal_port: int
) -> list[str]:
    """`index`: which of the `count` engines; `internal_port`: where its own processes meet."""
    arguments: dict[str, Any] = {
        "model_path": model_path,
        "device": device,
        "dtype": {"cpu": "float32", "cuda": "bfloat16"}[device] if config.dtype == "auto" else config.dtype,
        "tp_size": config.tp,
        "context_length": context_length,
        "random_seed": seed + index,
        "host": config.host,
        "port": port,
        "nccl_port": internal_port,
        "max_running_requests": config.max_running_requests,
        "max_total_tokens": config.max_total_tokens,
        "mem_fraction_static": config.mem_fraction_static,
        "weight_version": STARTUP_VERSION,
        "enable_deterministic_inference": config.deterministic,
        "sampling_defaults": "openai",  # nothing from the checkpoint's generation_config.json: the request says it all
        # Token ids in, token ids out, only what is new, many tokens at a time: HTTP and JSON compete with the model.
        "skip_tokenizer_init": True,
        "incremental_streaming_output": True,
        "stream_interval": config.stream_interval,
        # A server that has nothing to do leaves the core to the trainer (without this its scheduler spins).
        "sleep_on_idle": True,
        "skip_server_warmup": True,  # the launcher sends a request of its own
        "decode_log_interval": 1000,
        "log_level_http": "warning",
    }
    if device == "cpu":
        arguments |= {"attention_backend": "torch_native", "sampling_backend": "pytorch", "disable_overlap_schedule": True}
    else:
        arguments |= {"enable_memory_saver": True, "base_gpu_id": index * config.tp}
    arguments |= config.server_args
    return [part for name, value in arguments.items() for part in _flag(name, value)]


def server_environment(
    inherited: Mapping[str, str], config: EngineConfig, device: str, secrets: Mapping[str, str], index: int = 0
) -> dict[str, str]:
    """torchrun's variables would make the server's own torch.distributed join the trainer's store."""
    environment = {
        name: value
        for name, value in inherited.items()
        if name not in _TORCHRUN and not name.startswith(("TORCHELASTIC_", "MASTER_"))
    }
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": str(config.threads), "MKL_NUM_THREADS": str(config.threads)}
        if config.tp > 1:  # SGLang asks for it where there are more ranks than NUMA nodes (utils/numa_utils.py:453)
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _cores_of_ranks(config, index, sorted(os.sched_getaffinity(0))))
    return environment | {"PYTHONUNBUFFERED": "1"} | dict(secrets)


def _cores_of_ranks(config: EngineConfig, index: int, cores: Sequence[int]) -> str:
    """`threads` cores for each rank of each engine in turn, from the first again where there are too few."""
    first = index * config.tp * config.threads
    ranks = [range(first + rank * config.threads, first + (rank + 1) * config.threads) for rank in range(config.tp)]
    return "|".join(",".join(str(cores[i % len(cores)]) for i in rank) for rank in ranks)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *map(str, values)]
