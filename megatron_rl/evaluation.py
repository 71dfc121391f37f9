"""`megatron-rl eval`: the answers of a checkpoint, sampled through SGLang and judged."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl import rundir
from megatron_rl.assemble import EXPORT_BUCKET_BYTES
from megatron_rl.config import EvalRun, UserError
from megatron_rl.data.prompts import fingerprint
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.generation import evaluation_prompts, reward_pool, sampling_params, sglang_engines
from megatron_rl.loops.evaluate import Evaluator
from megatron_rl.loops.responses import Responses
from megatron_rl.observability.console import set_up_logging
from megatron_rl.types import EngineLost

if TYPE_CHECKING:
    from megatron_rl.engine.launcher import SglangEngines

log = logging.getLogger("megatron_rl")
WHAT_COUNTS: Any = {  # of the configuration, for what is sampled and judged
    **dict.fromkeys(("checkpoint", "data", "eval", "reward", "seed", "max_prompt_tokens", "max_response_tokens"), True),
    "engine": {"device", "dtype", "tp", "deterministic", "server_args"},
}


def run_eval(config: EvalRun) -> None:
    out = Path(config.out)
    with ExitStack() as stack:
        check_checkpoint(Path(config.checkpoint))
        stack.enter_context(rundir.owned("out", out))
        set_up_logging(0)
        checkpoint = hf_checkpoint(Path(config.checkpoint), out)
        tokenizer = load_tokenizer(config.data.tokenizer or checkpoint)
        prompts = evaluation_prompts(config, tokenizer, config.max_prompt_tokens)
        rewards = reward_pool(config.reward, tokenizer, config.max_response_tokens)
        stack.callback(rewards.close)
        rewards.expect(prompts)
        length = config.max_prompt_tokens + config.max_response_tokens
        engines = sglang_engines(config.engine, checkpoint, out, length, config.seed, stack)
        engines.start()
        evaluator = Evaluator(
            config=config.eval,
            prompts=prompts,
            sampling=sampling_params(1.0, config.max_response_tokens, tokenizer, seed=config.seed),
            engines=engines,
            rewards=rewards,
            encode=tokenizer.encode,
            decode=tokenizer.decode,
            runner=stack.enter_context(asyncio.Runner()),
            seed=config.seed,
        )
        about = config.model_dump(mode="json", include=WHAT_COUNTS) | {
            "prompts": fingerprint(prompts),
            "weights": stamps(checkpoint),
        }
        responses = Responses(out / "responses.jsonl", about)
        if responses.rows:
            log.info("going on: %d samples are in %s already", len(responses.rows), out)
        metrics = evaluation_through_losses(evaluator, engines, responses)
    rundir.write_summary(out, metrics | {"checkpoint": str(checkpoint), "prompts": len(evaluator.prompts)})
    for name, value in metrics.items():
        print(f"{name:28} {value:.4g}")


def check_checkpoint(path: Path) -> None:
    if (path / ".metadata").is_file():
        return
    if not path.is_dir():
        raise UserError(f"checkpoint={path}: no such folder", exit_code=1)
    missing = [pattern for pattern in ("config.json", "*.safetensors") if not list(path.glob(pattern))]
    if missing:
        what = f"neither a Hugging Face checkpoint ({missing[0]} is missing) nor Megatron-Core's (.metadata is)"
        raise UserError(f"checkpoint={path}: {what}", exit_code=1)


def hf_checkpoint(path: Path, folder: Path) -> Path:
    """What engines can start from: `path` itself, or a Megatron checkpoint converted into `folder`, once."""
    metadata = path / ".metadata"
    if not metadata.is_file():
        return path
    converted = folder / f"hf_{path.name}_{metadata.stat().st_mtime_ns:x}"
    if not converted.exists():
        from megatron_rl.convert import megatron_to_hf

        megatron_to_hf(path, converted, dtype=None, bucket_bytes=EXPORT_BUCKET_BYTES)
    return converted


def stamps(checkpoint: Path) -> list[list[str | int]]:
    """Of its weights: an export to the same place is another checkpoint."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(checkpoint.glob("*.safetensors"))]


def evaluation_through_losses(evaluator: Evaluator, engines: SglangEngines, responses: Responses) -> dict[str, float]:
    """Engines that are lost come back, up to engine.max_restarts times; what was judged before stays."""
    while True:
        try:
            return evaluator.metrics(responses)
        except EngineLost as error:
            log.warning("%s", error)
            engines.recover()
