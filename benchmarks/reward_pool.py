"""Scores per second through the reward pool, against the same verifier called in this process.

    python benchmarks/reward_pool.py [--responses 256] [--workers 1]

The batch is a quickstart step's: `chain_sum` answers of 4 to 50 characters, and for `math` boxed fractions.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable
from statistics import median

from megatron_rl import verifiers
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.types import Prompt, Rollout


def rollouts(verifier: str, count: int) -> tuple[list[str], list[Rollout]]:
    rng = random.Random(0)
    texts, out = [], []
    for i in range(count):
        a, b, c = (rng.randrange(1, 99) for _ in range(3))
        if verifier == "math":
            texts.append(rf"We get \boxed{{\frac{{{a}}}{{{b}}}}}.")
            prompt = Prompt(str(i), "", (), f"{a * c}/{b * c}", verifier)
        else:
            texts.append(f"{a}+{b}={a + b} {a + b}-{c}={a + b - c} #{a + b - c}")
            metadata = {"dataset": "chain_sum", "entry": {"answer": str(a + b - c), "metadata": {}}}
            prompt = Prompt(str(i), "", (), str(a + b - c), verifier, metadata=metadata)
        out.append(Rollout(f"0:{i}#0", prompt, 0, (i,), (0.0,), (0,), "stop"))
    return texts, out


def repeated(work: Callable[[], object], times: int = 9) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    for verifier in ("reasoning_gym", "math"):
        texts, batch = rollouts(verifier, args.responses)
        started = time.perf_counter()
        pool = RewardPool(args.workers, 10.0, lambda tokens, texts=texts: texts[tokens[0]])
        asyncio.run(pool.score(batch[:1]))
        warm = time.perf_counter() - started
        in_pool = repeated(lambda pool=pool, batch=batch: asyncio.run(pool.score(batch)))
        pool.close()
        verify = verifiers.load(verifiers.MODULES[verifier])
        pairs = [(text, rollout.prompt) for text, rollout in zip(texts, batch, strict=True)]
        here = repeated(lambda verify=verify, pairs=pairs: [verify(text, prompt) for text, prompt in pairs])
        print(
            f"{verifier:14} {args.responses} responses, {args.workers} worker(s), warm after {warm:.1f} s: "
            f"{in_pool * 1e3:.1f} ms in the pool ({args.responses / in_pool:,.0f}/s), "
            f"{here * 1e3:.1f} ms in process ({args.responses / here:,.0f}/s)"
        )


if __name__ == "__main__":
    main()
