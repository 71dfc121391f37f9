"""How fast a checkpoint is converted to Megatron's form and back, against a plain read and write of the same bytes.

    OMP_NUM_THREADS=1 python benchmarks/convert.py
    OMP_NUM_THREADS=1 python benchmarks/convert.py --family qwen3 --peer mbridge      (where mbridge is installed)

Makes a checkpoint of random weights (--gb), and runs each of these --rounds times in a process of its own, one after the other:
- copy: every file of the checkpoint read, written elsewhere in pieces of 16 MiB, and fsynced;
- hf-to-megatron, megatron-to-hf: `megatron_rl.convert`, which fsyncs what it writes;
- with --peer mbridge: the same by mbridge (peer_mbridge.py).

Seconds are of the conversion alone, without imports. Memory is the most of the process's own (RssAnon and RssShmem, sampled every
10 ms), less what it had when the conversion began: files that are mapped while they are read do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
PIECE, MEASURED = 16 << 20, "measured:"
SIZES: dict[str, dict[str, Any]] = {  # real widths, few layers
    "bailing_moe_v2": {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_nextn_predict_layers": 0,
        "n_group": 8,
        "topk_group": 4,
    },
    "qwen3": {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
    },
}


def write_checkpoint(path: Path, family: str, gigabytes: float) -> None:
    """Of at least that size: layers are added until it is reached."""
    from tiny_families import TINY, model_of

    from megatron_rl.resharding.families import names_of
    from megatron_rl.resharding.hf_target import shard_name, write_facts, write_shard

    config = TINY[family] | SIZES[family] | {"vocab_size": 32768, "torch_dtype": "bfloat16"}
    for layers in range(2, 100):
        config["num_hidden_layers"] = layers
        shapes = names_of(model_of(config)).hf_shapes
        if 2 * sum(map(math.prod, shapes.values())) >= gigabytes * 1e9:
            break
    path.mkdir(parents=True)
    names = list(shapes)
    files = [names[start :: max(2, round(gigabytes))] for start in range(max(2, round(gigabytes)))]
    for number, held in enumerate(files):
        write_shard(path / shard_name(number, len(files)), [(name, _random(name, shapes[name])) for name in held])
    write_facts(path, config, [], files, 0)


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    dtype = torch.float32 if name.endswith("expert_bias") else torch.bfloat16
    return torch.empty(shape, dtype=dtype).uniform_(-0.05, 0.05)


def copy(src: Path, dst: Path, _: int) -> None:
    dst.mkdir()
    for file in sorted(src.iterdir()):
        with file.open("rb") as reading, (dst / file.name).open("wb") as writing:
            while piece := reading.read(PIECE):
                writing.write(piece)
            writing.flush()
            os.fsync(writing.fileno())


class Own(threading.Thread):
    """The most of this process's own memory, without files mapped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self.first = self.most = self._now()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, self._now())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.most - self.first

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def conversion(name: str, folder: Path) -> tuple[Callable[[Path, Path, int], None], str, str]:
    """What to call, from where, to where."""
    if name.startswith("mbridge"):
        import peer_mbridge as peer

        peer.start(folder / "hf")
        return (peer.to_megatron, "hf", "mbridge") if name.endswith("to-megatron") else (peer.to_hf, "mbridge", "mbridge-hf")
    from megatron_rl import convert

    return {
        "copy": (copy, "hf", "copy"),
        "hf-to-megatron": (lambda src, dst, bucket: convert.hf_to_megatron(src, dst, [], None, bucket), "hf", "megatron"),
        "megatron-to-hf": (lambda src, dst, bucket: convert.megatron_to_hf(src, dst, None, bucket), "megatron", "back"),
    }[name]


def act(name: str, folder: Path, bucket_bytes: int) -> None:
    """In a process of its own. Prints seconds and bytes."""
    from megatron_rl.policy import platform_cpu

    platform_cpu.install()
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt  # noqa: F401 (before the clock starts)

    import megatron_rl.checkpoint.boxes  # noqa: F401

    function, src, dst = conversion(name, folder)
    own = Own()
    own.start()
    started = time.perf_counter()
    function(folder / src, folder / dst, bucket_bytes)
    print(MEASURED, json.dumps([time.perf_counter() - started, own.stop()]), flush=True)


def measured(name: str, folder: Path, bucket_mb: float) -> tuple[float, int]:
    command = [sys.executable, "-W", "ignore", __file__, "--act", name, "--folder", str(folder), "--bucket-mb", str(bucket_mb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(MEASURED)]
    if done.returncode or not found:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    seconds, own = json.loads(found[0].removeprefix(MEASURED))
    return seconds, own


def same(one: Path, other: Path) -> bool:
    """Whether both checkpoints hold the same tensors."""
    from safetensors.torch import load_file

    found: list[dict[str, torch.Tensor]] = [{}, {}]
    for tensors, path in zip(found, (one, other), strict=True):
        for file in path.glob("*.safetensors"):
            tensors |= load_file(file)
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(SIZES), default="bailing_moe_v2")
    parser.add_argument("--gb", type=float, default=1.5)
    parser.add_argument("--bucket-mb", type=float, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", choices=["mbridge"])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--act", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.act:
        act(args.act, args.folder, int(args.bucket_mb * 2**20))
        return
    directions = ["hf-to-megatron", "megatron-to-hf"]
    names = ["copy", *directions, *(f"{args.peer} {direction}" for direction in directions if args.peer)]
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    own: defaultdict[str, int] = defaultdict(int)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "hf", args.family, args.gb)
        size = sum(file.stat().st_size for file in (folder / "hf").iterdir())
        for number in range(args.rounds):
            for name in names:
                took, most = measured(name, folder, args.bucket_mb)
                seconds[name].append(took)
                own[name] = max(own[name], most)
            backs = [back for back in (folder / "back", folder / "mbridge-hf") if back.exists()]
            equal = all(same(folder / "hf", back) for back in backs) if number == 0 else True
            if not equal:
                sys.exit("a checkpoint that went there and back is not the same")
            for made in folder.iterdir():
                if made.name != "hf":
                    shutil.rmtree(made)
    print(f"{args.family}, {size / 1e9:.2f} GB, buckets of {args.bucket_mb * 2**20 / 1e6:.0f} MB, median of {args.rounds}")
    print("| | s | GB/s | of the copy | own memory, MB |\n|---|---|---|---|---|")
    floor = statistics.median(seconds["copy"])
    for name in names:
        took = statistics.median(seconds[name])
        print(f"| {name} | {took:.2f} | {size / took / 1e9:.2f} | {floor / took:.2f} | {own[name] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
