"""SGLang on a CPU, as the engine room runs it, against `transformers`' batched generate: the same model, batch and threads.

    python benchmarks/generate_vs_transformers.py [--batch 256] [--processes 2] [--rounds 7]

Both sides generate for the same prompts (8 tokens) with the same weights (a random Qwen3-MoE of the quickstart model's size:
transformers has no BailingMoeV2) at temperature 1, on `--processes` processes of one thread each that split the batch: transformers
as a data-parallel trainer would, SGLang as `engine.count`. RL needs every token's log-prob: SGLang always returns them (over HTTP),
transformers is measured with (`output_logits` and a gather) and without. Three length distributions:
- `answers`: the quickstart's (half direct answers of 4 tokens, half worked ones of 9 to 50, median 21);
- `tailed`: geometric with mean 25, at most 96;
- `fixed`: 25 each, the best case for a static batch, which otherwise computes until its longest answer ends.
The sides take turns, round by round, so that all see the same machine; only tokens of answers count. BailingMoeV2 of the same size
follows on SGLang alone. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from tiny_checkpoint import write_checkpoint

from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine import standins  # for torchvision, which transformers imports
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.types import GenerateRequest, SamplingParams

PROMPT_TOKENS, MEAN_TOKENS, MAX_TOKENS, VOCABULARY = 8, 25, 96, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 384, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 2048, "rope_theta": 600000.0, "tie_word_embeddings": False, "initializer_range": 0.05,
    "eos_token_id": VOCABULARY,  # never sampled: the requested lengths decide
}  # fmt: skip


def write_qwen3_moe(path: Path) -> Path:
    standins.install()
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, norm_topk_prob=True, dtype="float32")  # no dense layer: SGLang ignores mlp_only_layers
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def requested(batch: int, distribution: str) -> tuple[list[list[int]], list[int]]:
    rng = random.Random(batch)
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
    draw = {
        "answers": lambda: rng.choice((4, round(rng.triangular(9, 50, 12)))),
        "tailed": lambda: max(1, min(MAX_TOKENS, round(rng.expovariate(1 / MEAN_TOKENS)))),
        "fixed": lambda: MEAN_TOKENS,
    }[distribution]
    return prompts, [draw() for _ in range(batch)]


class Transformers:
    """`processes` workers, each with its share of the batch."""

    def __init__(self, model: Path, processes: int, experts: str, logprobs: bool) -> None:
        command = [sys.executable, __file__, "--transformers-worker", str(model), "--experts", experts]
        command += ["--logprobs"] if logprobs else []
        pipe = subprocess.PIPE
        self._workers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(processes)]

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> None:
        n = len(self._workers)
        for i, worker in enumerate(self._workers):
            self._tell(worker, {"prompts": prompts[i::n], "lengths": lengths[i::n]})
        for worker in self._workers:
            self._answer(worker)

    def score(self, tokens: list[int]) -> list[float]:
        self._tell(self._workers[0], {"score": tokens})
        return self._answer(self._workers[0])

    def stop(self) -> None:
        for worker in self._workers:
            worker.communicate()

    def _tell(self, worker: subprocess.Popen[str], work: dict[str, Any]) -> None:
        assert worker.stdin
        print(json.dumps(work), file=worker.stdin, flush=True)

    def _answer(self, worker: subprocess.Popen[str]) -> Any:
        assert worker.stdout
        return json.loads(worker.stdout.readline())


def transformers_worker(model: str, experts: str, logprobs: bool) -> None:
    standins.install()
    import torch
    from transformers import Qwen3MoeForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(1)
    lm = Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation=experts).eval()

    class EachItsLength(StoppingCriteria):
        def __init__(self, lengths: list[int]) -> None:
            self.ends = torch.tensor(lengths) + PROMPT_TOKENS

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def generate(prompts: list[list[int]], lengths: list[int]) -> None:
        out = lm.generate(
            torch.tensor(prompts),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_TOKENS, pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([EachItsLength(lengths)]),
            return_dict_in_generate=True, output_logits=logprobs,
        )  # fmt: skip
        if logprobs:
            logprobs_BTV = torch.stack(out.logits, 1).log_softmax(-1)
            logprobs_BTV.gather(-1, out.sequences[:, PROMPT_TOKENS:, None]).tolist()

    def score(tokens: list[int]) -> list[float]:
        logprobs_TV = lm(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        return logprobs_TV.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()

    for line in sys.stdin:
        work = json.loads(line)
        with torch.inference_mode():
            print(json.dumps(score(work["score"]) if "score" in work else generate(**work)), flush=True)


class Sglang:
    """`processes` servers, each with its share of the batch."""

    def __init__(self, model: Path, processes: int, run_dir: Path) -> None:
        config = EngineConfig(count=processes, device="cpu", max_total_tokens=32768)
        self._engines = SglangEngines(config, str(model), run_dir, context_length=256, seed=0)
        self._engines.start()
        self.stop = self._engines.stop

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> None:
        work = enumerate(zip(prompts, lengths, strict=True))
        requests = [GenerateRequest(f"0:{i}#0", tuple(prompt), length, SamplingParams()) for i, (prompt, length) in work]
        tokens = asyncio.run(self._all_of(requests))
        assert tokens == sum(lengths), f"{tokens} tokens instead of {sum(lengths)}"

    async def _all_of(self, requests: list[GenerateRequest]) -> int:
        async def share(engine: SglangEngine, its: list[GenerateRequest]) -> int:
            return sum([len(message.tokens) async for messages in engine.generate(its) for message in messages])

        engines = self._engines.alive
        return sum(await asyncio.gather(*(share(engine, requests[i :: len(engines)]) for i, engine in enumerate(engines))))

    def score(self, tokens: list[int]) -> list[float]:
        body = {"input_ids": [tokens], "sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "logprob_start_len": 0}
        told = self._engines.alive[0].call("/generate", body)[0]["meta_info"]["input_token_logprobs"]
        return [logprob for logprob, _, _ in told[1:]]


def measure(sides: dict[str, Transformers | Sglang], batch: int, rounds: int) -> dict[str, Any]:
    """Tokens per second, the median and the best of `rounds` after one to warm up; the sides take turns."""
    result: dict[str, Any] = {}
    try:
        scores = [side.score(list(range(2, 42))) for side in sides.values()]
        gap = max(abs(a - b) for score in scores for a, b in zip(score, scores[0], strict=True))
        assert gap < 1e-3, f"the sides' log-probs differ by {gap}: not the same model"
        for distribution in ("answers", "tailed", "fixed"):
            prompts, lengths = requested(batch, distribution)
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(rounds + 1):
                for name, side in sides.items():
                    started = time.perf_counter()
                    side.generate(prompts, lengths)
                    rates[name].append(sum(lengths) / (time.perf_counter() - started))
            for name, values in rates.items():
                result[f"{distribution}/{name}"] = [round(statistics.median(values[1:])), round(max(values[1:]))]
    finally:
        for side in sides.values():
            side.stop()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--experts", choices=("eager", "batched_mm", "grouped_mm"), default="grouped_mm", help="of transformers")
    parser.add_argument("--transformers-worker", help=argparse.SUPPRESS)
    parser.add_argument("--logprobs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.transformers_worker:
        transformers_worker(args.transformers_worker, args.experts, args.logprobs)
        return
    result: dict[str, Any] = {name: getattr(args, name) for name in ("batch", "processes", "experts", "rounds")}
    result |= {package: version(package) for package in ("sglang", "transformers", "torch")}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        qwen = write_qwen3_moe(path / "qwen3_moe")
        sides: dict[str, Transformers | Sglang] = {
            "transformers": Transformers(qwen, args.processes, args.experts, logprobs=False),
            "transformers+logprobs": Transformers(qwen, args.processes, args.experts, logprobs=True),
            "sglang": Sglang(qwen, args.processes, path / "qwen3_moe_run"),
        }
        result["qwen3_moe [median, best tokens/s]"] = measure(sides, args.batch, args.rounds)
        ling = write_checkpoint(path / "bailing_moe_v2", eos_token_id=VOCABULARY)
        sides = {"sglang": Sglang(ling, args.processes, path / "bailing_moe_v2_run")}
        result["bailing_moe_v2 [median, best tokens/s]"] = measure(sides, args.batch, args.rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
