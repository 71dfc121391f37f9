"""SGLang's own HTTP server as a process of ours: `python -P -m megatron_rl.engine.server --model-path DIR --device cpu ...`.

SGLang itself is unmodified. Around its `launch_server` this module
- ties the processes' lives together: the server dies with the trainer that started it, SGLang's children with the server;
- makes it run on machines without CUDA: stand-ins for two things that have no CPU build, attention over whole batches
  (cpu_attention.py), and a factor that the CPU path forgets (cpu_experts.py);
- registers BailingMoeV2's configuration class, which SGLang has but does not register (srt/utils/hf_transformers/common.py:115).
With `--device cuda` only the first and the last happen.

SGLang spawns its children, and a spawned child imports this module again (as `__mp_main__`) before anything else: that is how it
all reaches them. Secrets come by environment, since everyone on the machine can read a command line.

Invariants: no process survives its parent, even one that dies while it starts; calling a stand-in is an error, never a wrong
number.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import signal
import sys
import types
from typing import Any

PARENT_PID = "MEGATRON_RL_ENGINE_PARENT_PID"
API_KEY = "MEGATRON_RL_ENGINE_API_KEY"
AUTHKEY = "MEGATRON_RL_ENGINE_AUTHKEY"  # the trainer's, by which it hands over file descriptors of shared memory
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """The kernel kills this process when its parent dies; a parent that is dead by now shows as another parent.

    SGLang does the first half too, but only after seconds of imports (srt/managers/scheduler.py:5989).
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get(PARENT_PID)
    if expected is not None and os.getppid() != int(expected):
        sys.exit("the process that started this server is gone")
    os.environ[PARENT_PID] = str(os.getpid())  # for our children


def run_on_cpu() -> None:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # grouped top-k is wrapped in torch.compile; eager is as fast here
    sys.meta_path.insert(0, _Absentees())


class _Absent:
    """Anything of `sgl_kernel`, which exists for CUDA only: it can be imported and looked at, not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> _Absent:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _Absent(f"{self._name}.{attribute}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self._name} has no CPU build")


class _AbsentModule(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # a package: `import sgl_kernel.anything` asks for it

    def __getattr__(self, attribute: str) -> _Absent:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _Absent(f"{self.__name__}.{attribute}")


class _Absentees(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import sgl_kernel`, and declares the two operators that torchvision's CUDA build would bring before it is imported.

    Both can go when the package index has CPU builds of the two.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] == "sgl_kernel":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if fullname == "torchvision":
            _declare_torchvision_operators()
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@functools.cache
def _declare_torchvision_operators() -> None:
    from torch.library import define

    for operator in ("nms", "qnms"):
        define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def register_configs() -> None:
    """Needed by every process that reads the model's config.json."""
    from sglang.srt.configs.bailing_moe_v2 import BailingMoeV2Config
    from transformers import AutoConfig

    AutoConfig.register(BailingMoeV2Config.model_type, BailingMoeV2Config)


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.managers.scheduler import run_scheduler_process

    register_configs()
    if ON_CPU:
        from megatron_rl.engine import cpu_attention, cpu_experts

        cpu_attention.register()
        cpu_experts.register()

    run_scheduler_process(*args, **kwargs)


def run_no_detokenizer(*args: Any, **kwargs: Any) -> None:
    """With --skip-tokenizer-init the scheduler answers the HTTP process directly (scheduler_components/ipc_channels.py:55)."""
    while True:
        signal.pause()


def main(arguments: list[str]) -> None:
    if AUTHKEY in os.environ:
        multiprocessing.current_process().authkey = bytes.fromhex(os.environ.pop(AUTHKEY))
    if API_KEY in os.environ:
        arguments = [*arguments, "--api-key", os.environ.pop(API_KEY)]
    register_configs()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(arguments)
    server_args.resolve_once()
    if not server_args.skip_tokenizer_init:
        sys.exit("this server takes and gives token ids: --skip-tokenizer-init is missing")
    launch_server(server_args, run_scheduler_process_func=run_scheduler, run_detokenizer_process_func=run_no_detokenizer)


def _device(arguments: list[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    device: str | None = parser.parse_known_args(arguments)[0].device
    return device


ON_CPU = _device(sys.argv[1:]) == "cpu"
if __name__ in ("__main__", "__mp_main__"):
    die_with_parent()
    if ON_CPU:
        run_on_cpu()
if __name__ == "__main__":
    main(sys.argv[1:])
