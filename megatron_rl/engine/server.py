"""SGLang's own HTTP server as a process of ours: `python -P -m megatron_rl.engine.server --model-path DIR --device cpu ...`.

SGLang is unmodified; what differs goes through the arguments of its `launch_server` and its hook registry (srt/plugins).
- Everywhere: the server dies with the trainer that started it, and its children with the server. BailingMoeV2's configuration
  class is registered, which SGLang has but does not register (srt/utils/hf_transformers/common.py:115), and a plain one for
  BailingMoe, of which it has the model alone. Its schedulers answer what a weight push asks before and after (intake.py), and
  can record the experts of every model that has some (expert_record.py).
- On a CPU: stand-ins for two things that have no CPU build (standins.py), attention over whole batches (cpu_attention.py), a
  factor that the native path forgets (cpu_experts.py), and samples by the seeds of requests (cpu_determinism.py). Children are
  forked, not spawned, and there is no detokenizer: that halves the time to start and the memory.
- On CUDA nothing more.

Secrets come by environment, since everyone on the machine can read a command line.

Invariants: no process survives its parent, even one that dies while it starts; a hook that did not take is an error at start-up.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

PARENT_PID = "MEGATRON_RL_ENGINE_PARENT_PID"
API_KEY = "MEGATRON_RL_ENGINE_API_KEY"
AUTHKEY = "MEGATRON_RL_ENGINE_AUTHKEY"  # the trainer's, by which it hands over file descriptors of shared memory
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    die_with_parent()
    if AUTHKEY in os.environ:
        multiprocessing.current_process().authkey = bytes.fromhex(os.environ.pop(AUTHKEY))
    if API_KEY in os.environ:
        arguments = [*arguments, f"--api-key={os.environ.pop(API_KEY)}"]
    if _device(arguments) == "cpu":
        prepare_cpu()
    register_configs()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(arguments)
    if not server_args.skip_tokenizer_init:
        sys.exit("this server takes and gives token ids: --skip-tokenizer-init is missing")
    server_args.resolve_once()
    launch_server(server_args, run_scheduler_process_func=run_scheduler)


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    die_with_parent()
    register_configs()  # for a spawned one
    from megatron_rl.engine import expert_record, intake

    intake.register()
    expert_record.register()
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(*args, **kwargs)


def die_with_parent() -> None:
    """The kernel kills this process when its parent dies; a parent that is dead by now shows as another parent.

    SGLang's children do the first half too (srt/managers/scheduler.py:5989), its HTTP server does neither.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get(PARENT_PID)
    if expected is not None and os.getppid() != int(expected):
        sys.exit("the process that started this one is gone")
    os.environ[PARENT_PID] = str(os.getpid())  # for our children


def register_configs() -> None:
    """Needed by every process that reads the model's config.json."""
    from sglang.srt.configs.bailing_moe_v2 import BailingMoeV2Config
    from transformers import AutoConfig, PretrainedConfig

    class BailingMoeConfig(PretrainedConfig):
        model_type = "bailing_moe"

        def __init__(self, rope_theta: float = 10_000.0, rope_scaling: dict[str, Any] | None = None, **others: Any) -> None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta} | (rope_scaling or {})
            super().__init__(**others)

    for known in (BailingMoeConfig, BailingMoeV2Config):
        AutoConfig.register(known.model_type, known, exist_ok=True)


def prepare_cpu() -> None:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's would start its threads at import, before we fork
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # grouped top-k is wrapped in torch.compile; eager is as fast here
    from megatron_rl.engine import standins

    standins.install()
    from megatron_rl.engine import cpu_attention, cpu_determinism, cpu_experts
    from megatron_rl.engine.hooks import hook

    cpu_attention.register()
    cpu_determinism.register()
    cpu_experts.register()
    hook("sglang.srt.entrypoints.engine._set_envs_and_config", "AFTER", fork_children)
    hook("sglang.srt.entrypoints.engine.Engine._launch_detokenizer_subprocesses", "REPLACE", launch_no_detokenizer)


def fork_children(result: Any, *args: Any, **kwargs: Any) -> None:
    """A spawned scheduler imports for as long as this process did. SGLang asks for spawn (entrypoints/engine.py:1890), which CUDA
    needs; without CUDA a fork is safe in a process of one thread."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"SGLang's HTTP process has {threads} threads before it starts its scheduler: it cannot be forked")
    multiprocessing.set_start_method("fork", force=True)


def launch_no_detokenizer(*args: Any, **kwargs: Any) -> tuple[list[Any], list[str]]:
    """With --skip-tokenizer-init the scheduler answers the HTTP process directly (scheduler_components/ipc_channels.py:55)."""
    return [], []


def _device(arguments: list[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    device: str | None = parser.parse_known_args(arguments)[0].device
    return device


if __name__ == "__main__":
    main(sys.argv[1:])
