"""Checkpoints between Hugging Face's layout and Megatron-Core's: see `python tools/convert.py --help`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from megatron_rl.config import UserError
from megatron_rl.observability.console import set_up_logging

EXAMPLES = """examples:
  python tools/convert.py hf-to-megatron --src Ling-mini-2.0 --dst ckpt/ling_mini
  python tools/convert.py hf-to-megatron --src DeepSeek-V3 --dst ckpt/v3 parallel.tp=2 parallel.ep=8 model.num_mtp_layers=0
  torchrun --nproc-per-node 8 tools/convert.py hf-to-megatron --src Ling-1T --dst ckpt/ling_1t
  python tools/convert.py megatron-to-hf --src runs/quickstart/checkpoints/step_60 --dst exported --dtype bfloat16

A Megatron checkpoint loads at any layout, whatever it was cut for. A conversion that was killed goes on with the same command, on
any number of ranks; the destination appears when it is complete. `model.init_from` takes checkpoints of both kinds."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description=__doc__.partition(":")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--src", type=Path, required=True, metavar="DIR", help="the checkpoint to read")
    shared.add_argument("--dst", type=Path, required=True, metavar="DIR", help="the checkpoint to write; must not exist")
    shared.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights but the expert bias; default: the source's"
    )
    shared.add_argument("--bucket-mb", type=float, default=512, metavar="MB", help="of a file, and of memory (default: 512)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="hf-to-megatron|megatron-to-hf")
    to_megatron = verbs.add_parser("hf-to-megatron", parents=[shared], help="Hugging Face to a distributed checkpoint")
    to_megatron.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="a layout to cut for, e.g. parallel.tp=2 parallel.etp=2"
    )
    verbs.add_parser("megatron-to-hf", parents=[shared], help="a conversion's or a run's checkpoint to Hugging Face")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    set_up_logging(int(os.environ.get("RANK", 0)))
    try:
        if not 0 < args.bucket_mb < math.inf:
            raise UserError(f"--bucket-mb={args.bucket_mb:g}: has to be positive")
        bucket_bytes = int(args.bucket_mb * 2**20)
        from megatron_rl import convert  # seconds

        if args.verb == "hf-to-megatron":
            convert.hf_to_megatron(args.src, args.dst, args.overrides, args.dtype, bucket_bytes)
        else:
            convert.megatron_to_hf(args.src, args.dst, args.dtype, bucket_bytes)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"convert.py: error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("convert.py: interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)  # other ranks may be in the middle of a collective, and a clean end would wait for them


if __name__ == "__main__":
    main()
