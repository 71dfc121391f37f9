"""A server's command line and environment, and its ports."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_rl.config import UserError
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine.arguments import server_arguments, server_environment
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.engine.process import FREE_PORTS, free_ports, is_port_free


def flags(device: str = "cpu", index: int = 0, **config: object) -> list[str]:
    return server_arguments(EngineConfig.model_validate(config), device, "/hf", 128, 5, index, 20_001, 20_002)


def test_the_configuration_reaches_the_command_line() -> None:
    line = flags(index=2, max_total_tokens=4096, stream_interval=4, tp=2)
    ours = "--model-path=/hf --device=cpu --context-length=128 --random-seed=7 --port=20001 --nccl-port=20002 --weight-version=-1"
    from_config = "--max-total-tokens=4096 --stream-interval=4 --tp-size=2 --skip-tokenizer-init"
    assert set(f"{ours} {from_config}".split()) <= set(line)
    assert not any(flag.startswith("--max-total-tokens") for flag in flags())  # null: SGLang decides


@pytest.mark.parametrize(
    ("dtype", "device", "expected"), [("auto", "cpu", "float32"), ("auto", "cuda", "bfloat16"), ("bfloat16", "cpu", "bfloat16")]
)
def test_dtype_auto_is_ours_to_decide(dtype: str, device: str, expected: str) -> None:
    assert f"--dtype={expected}" in flags(device, dtype=dtype)


def test_each_device_gets_its_own_flags() -> None:
    assert "--attention-backend=torch_native" in flags("cpu") and "--enable-memory-saver" not in flags("cpu")
    cuda = flags("cuda", index=3, tp=2)
    assert "--enable-memory-saver" in cuda and "--base-gpu-id=6" in cuda and not any("attention-backend" in flag for flag in cuda)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deterministic_inference_is_sglangs_own_on_every_device(device: str) -> None:
    flag = "--enable-deterministic-inference"
    assert flag in flags(device, deterministic=True) and flag not in flags(device)


def test_server_args_replace_ours_or_take_them_away() -> None:
    taken_away = {"sleep_on_idle": False, "random_seed": None}
    wanted = {"stream_interval": 99, "enable_mixed_chunk": True, "lora_paths": ["a", "b"], **taken_away}
    line = flags(server_args=wanted)
    assert "--stream-interval=99" in line and "--stream-interval=8" not in line
    assert "--sleep-on-idle" not in line and not any("random-seed" in flag for flag in line)
    assert "--enable-mixed-chunk" in line
    assert line[-3:] == ["--lora-paths", "a", "b"]


def test_nothing_of_torchrun_reaches_a_server() -> None:
    ranks = "RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE"
    store = "MASTER_ADDR MASTER_PORT TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_RESTART_COUNT TORCHELASTIC_RUN_ID"
    torchrun = dict.fromkeys(f"{ranks} {store}".split(), "1")
    inherited = {"PATH": "/bin", "OMP_NUM_THREADS": "64", **torchrun}
    environment = server_environment(inherited, EngineConfig(threads=2), "cpu", {"KEY": "s"})
    assert not torchrun.keys() & environment.keys()
    assert environment["PATH"] == "/bin" and environment["OMP_NUM_THREADS"] == "2" and environment["KEY"] == "s"


def test_ranks_of_a_cpu_engine_get_cores_of_their_own_while_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2, 3, 4, 5, 6})

    def bound(config: EngineConfig, index: int, device: str = "cpu", **inherited: str) -> str | None:
        return server_environment(inherited, config, device, {}, index).get("SGLANG_CPU_OMP_THREADS_BIND")

    assert bound(EngineConfig(tp=2), 0) == "2|3" and bound(EngineConfig(tp=2), 1) == "4|5"
    assert bound(EngineConfig(tp=2, threads=2), 0) == "2,3|4,5" and bound(EngineConfig(tp=2, threads=2), 1) == "6,2|3,4"
    assert bound(EngineConfig(tp=2), 0, SGLANG_CPU_OMP_THREADS_BIND="0|1") == "0|1"
    assert bound(EngineConfig(tp=1), 0) is None and bound(EngineConfig(tp=2), 0, "cuda") is None


def test_free_ports_are_free_distinct_and_out_of_the_way() -> None:
    ports = free_ports("127.0.0.1", 3)
    assert len(set(ports)) == 3 and all(port in FREE_PORTS and is_port_free("127.0.0.1", port) for port in ports)


def test_a_port_in_use_is_refused_by_its_key_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        engines = SglangEngines(EngineConfig(port=port, device="cpu"), str(tmp_path), tmp_path / "run", 128, 0)
        with pytest.raises(UserError, match=rf"engine\.port={port}: .*in use"):
            engines.start()
    assert not (tmp_path / "run").exists()


def test_a_model_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        SglangEngines(EngineConfig(device="cpu"), str(tmp_path / "hf"), tmp_path, 128, 0)
