"""python -m megatron_rl_kernels.fp8.bench [ROWS] [COLUMNS]: one matrix in bf16 on this GPU, beside plain torch."""

from __future__ import annotations

import argparse

import torch
from triton.testing import do_bench

from megatron_rl_kernels.fp8 import reference, triton


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="?", default=18_432)
    parser.add_argument("columns", type=int, nargs="?", default=7168)
    rows, columns = vars(parser.parse_args()).values()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    weights_RC = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    moved = weights_RC.nbytes * 1.5  # read in bf16, written in fp8
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {rows} x {columns}")
    for name, quantize in (("torch", reference.quantize), ("triton", triton.quantize)):
        milliseconds = float(do_bench(lambda quantize=quantize: quantize(weights_RC)))
        print(f"{name:>8}: {milliseconds:8.3f} ms  {moved / milliseconds / 1e6:8.0f} GB/s")


if __name__ == "__main__":
    main()
