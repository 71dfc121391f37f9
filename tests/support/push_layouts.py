"""Ranks of tests/integration/test_push_from_layouts.py: policies at several layouts push into a server of theirs.

    push_layouts.py FOLDER {"layout": {"tp": 2, ...}, ...}

FOLDER/hf is a checkpoint. The first layout's policy exports it again to FOLDER/exported, from which a second server is started, and
every layout pushes other weights first and then those. Rank 0 prints a line of JSON per layout: the largest difference between
the log-probs of both servers' greedy outputs (null where these differ), and between those of the two pushes.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_families import model_of

from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.engine.client import SglangEngine
from megatron_rl.engine.launcher import SglangEngines
from megatron_rl.engine.weights import EngineWeights
from megatron_rl.policy import MegatronPolicy, MegatronRanks, weights
from megatron_rl.resharding.execute import Resharder
from megatron_rl.resharding.hf import export_hf, hf_config, load_hf
from megatron_rl.resharding.push import PushToEngines, frozen

PROMPTS, NEW = [[5, 6, 7, 9, 11, 13], [3, 4], list(range(40, 62))], 12
BUCKET_BYTES = 100_000
Generated = list[tuple[list[int], torch.Tensor]]


def generate(engine: SglangEngine) -> Generated:
    sampling = {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True}
    body = {"input_ids": PROMPTS, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    generated = []
    for answer in engine.call("/generate", body):
        meta = answer["meta_info"]
        logprobs = [*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"]]
        generated.append((answer["output_ids"], torch.tensor([logprob for logprob, _, _ in logprobs])))
    return generated


def gap(one: Generated, other: Generated) -> float | None:
    if [tokens for tokens, _ in one] != [tokens for tokens, _ in other]:
        return None
    return max(float((a - b).abs().max()) for (_, a), (_, b) in zip(one, other, strict=True))


def server(folder: Path, model: Path, stack: ExitStack, **arguments: Any) -> SglangEngines:
    folder.mkdir(exist_ok=True)
    config = EngineConfig(device="cpu", max_total_tokens=1000, server_args=arguments)
    engines = SglangEngines(config, str(model), folder, context_length=128, seed=0)
    stack.callback(engines.stop)
    engines.start()
    return engines


def main() -> None:
    folder, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    model = model_of(json.loads((folder / "hf/config.json").read_text()))
    dist.init_process_group("gloo")
    with ExitStack() as stack:
        engines = expected = None
        for number, (name, layout) in enumerate(layouts.items()):
            parallel = ParallelConfig.model_validate(layout)
            ranks = MegatronRanks(parallel, model)
            policy = policy_of(folder / "hf", model, parallel, ranks)
            resharder = Resharder(model, parallel, policy.weights, ranks, BUCKET_BYTES, frozen=frozen(model))
            if number == 0:
                facts = hf_config(model, dtype="float32", eos_token_id=1, pad_token_id=0)
                export_hf(resharder, folder / "exported", ranks.rank, facts)
                if ranks.rank == 0:
                    expected = generate(server(folder / "one", folder / "exported", stack).alive[0])
                    engines = server(folder / "two", folder / "exported", stack, load_format="dummy")
            sync = PushToEngines(resharder, EngineWeights(engines) if engines else None, verify=True)
            change(policy, 0.5)
            sync.push(1)
            other = generate(engines.alive[0]) if engines else []
            change(policy, 2.0)
            sync.push(2)
            if engines and expected:
                ours = generate(engines.alive[0])
                moved = max(float((a - b).abs().max()) for (_, a), (_, b) in zip(ours, other, strict=True))
                print(json.dumps({"layout": name, "gap": gap(ours, expected), "moved": moved}), flush=True)
            ranks.close()
    dist.destroy_process_group()


def policy_of(path: Path, model: ModelConfig, parallel: ParallelConfig, ranks: MegatronRanks) -> MegatronPolicy:
    def load(chunks: Any) -> None:
        load_hf(path, weights(chunks), model, parallel, ranks.rank)

    return MegatronPolicy(model, parallel, OptimizerConfig(lr=1e-3), total_steps=1, seed=0, ranks=ranks, load=load)


@torch.no_grad()
def change(policy: MegatronPolicy, factor: float) -> None:
    """By a power of 2, which can be taken back bit for bit; what is frozen stays."""
    for name, tensor in policy.weights().items():
        if name.endswith("linear_fc2.weight") and not name.startswith("mtp."):
            tensor.mul_(factor)


if __name__ == "__main__":
    main()
