"""The gap between trainer and engine, measured again: the log-probs in a run's rollout dumps against those of any checkpoint.

What it returns are the numbers that a run logs of its own steps (algorithms/mismatch.py), from the same forward pass; for the
weights that trained on a dump, version N - 1 for rollouts/step_N.jsonl, they are the run's own over these rollouts.
Which version a checkpoint is of is never guessed: its run says so, or the user.

Invariants (tests/unit/test_compare.py):
- the numbers are those of the engine's log-probs in the file and the checkpoint's at the temperature of sampling, token by token,
  and within its support where the file has one;
- a token's age is the number of versions between the weights that sampled it and those of the checkpoint, whichever are older;
- what is wrong with a file or a checkpoint is one line that names it, the line of the file included.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.algorithms.correction import icepop_weights
from megatron_rl.algorithms.mismatch import mismatch_histograms, mismatch_metrics, mismatch_sums
from megatron_rl.config import UserError, validate
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.data.jsonl import read_jsonl
from megatron_rl.loops.batches import TrainSequence, microbatches
from megatron_rl.observability.rollout_rows import support_of_row, tokens_of_row
from megatron_rl.ports import TokenLoss
from megatron_rl.resharding.families import model_values
from megatron_rl.resharding.hf import load_hf
from megatron_rl.resharding.hf_source import read_json
from megatron_rl.start import HF, run_of

if TYPE_CHECKING:
    from megatron_rl.policy.megatron_policy import Load

ROUNDING = 1e-4  # nats by which an engine's arithmetic may leave a sure token above 0


@dataclass(frozen=True)
class Comparison:
    rollouts: int
    tokens: int  # sampled by the engine
    temperature: float
    version: int  # of the checkpoint's weights
    sampled_by: dict[int, int]  # version -> how many of the tokens
    metrics: dict[str, float]
    histograms: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Dumped:
    """A rollout of a dump."""

    where: str  # file:line
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    engine_logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    support: tuple[bytes, ...]

    def sequence(self, version: int) -> TrainSequence:
        ages = torch.tensor([float(abs(version - sampled_by)) for sampled_by in self.versions])
        fields = {"engine_logprobs": torch.tensor(self.engine_logprobs), "age": ages}
        return TrainSequence(self.prompt, self.response, fields, support=self.support)


def compare(
    dumps: Sequence[Path],
    checkpoint: Path,
    *,
    temperature: float | None = None,
    version: int | None = None,
    low: float = 0.5,
    high: float = 5.0,
    microbatch_tokens: int = 8192,
) -> Comparison:
    """`dumps` are a run's rollouts/step_N.jsonl, `checkpoint` is a Hugging Face directory, a conversion's, or a run's
    checkpoints/step_N. None: the temperature of the dumps' run, and what that run knows of the checkpoint's version. Masked is what
    IcePop would mask outside [low, high]."""
    rollouts = [rollout for dump in dumps for rollout in read_dump(dump)]
    if not rollouts:
        raise UserError(f"{', '.join(map(str, dumps))}: no response has a token", exit_code=1)
    temperatures = {temperature if temperature is not None else sampling_temperature(dump) for dump in dumps}
    if len(temperatures) > 1:
        raise UserError(f"the dumps were sampled at temperatures {sorted(temperatures)}: compare them one by one", exit_code=1)
    model, load = opened(checkpoint)
    for rollout in rollouts:
        _check_vocabulary(rollout, model.vocab_size, checkpoint)
    version = version if version is not None else version_of(checkpoint, dumps)
    at = temperatures.pop()
    totals = _totals(model, load, [rollout.sequence(version) for rollout in rollouts], gap(low, high), at, microbatch_tokens)
    histograms = {name: histogram.to_json() for name, histogram in mismatch_histograms(totals).items()}
    sampled_by = Counter(sampler for rollout in rollouts for sampler in rollout.versions)
    metrics = mismatch_metrics(totals)
    return Comparison(len(rollouts), sampled_by.total(), at, version, dict(sorted(sampled_by.items())), metrics, histograms)


def read_dump(file: Path) -> Iterator[Dumped]:
    """The rollouts that have a response."""
    for where, row in read_jsonl(file):
        try:
            tokens, support = tokens_of_row(row), support_of_row(row)
        except ValueError as error:
            raise UserError(f"{where}: {error}", exit_code=1) from None
        if row["response_ids"]:
            yield _checked(Dumped(where, *tokens, support))


def sampling_temperature(dump: Path) -> float:
    """Of the run that wrote runs/NAME/rollouts/step_N.jsonl; a greedy engine reports log-probs at temperature 1."""
    config = dump.resolve().parent.parent / "config.yaml"
    try:
        return float(yaml.safe_load(config.read_text())["rollout"]["temperature"]) or 1.0
    except FileNotFoundError:
        raise UserError(f"{dump}: there is no {config} that tells its temperature of sampling: --temperature") from None
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        raise UserError(f"{config}: does not tell the temperature of sampling: --temperature") from None


def opened(checkpoint: Path) -> tuple[ModelConfig, Load]:
    """The checkpoint's model, and what loads its weights into one process."""
    from megatron_rl.checkpoint.intact import check_files
    from megatron_rl.checkpoint.weights import load_weights
    from megatron_rl.policy import weights

    if (checkpoint / "config.json").is_file():
        model = _described_by(checkpoint / "config.json")
        return model, lambda chunks: load_hf(checkpoint, weights(chunks), model, ParallelConfig(), rank=0)
    if not (checkpoint / ".metadata").is_file():
        there = "has neither config.json nor .metadata" if checkpoint.is_dir() else "no such folder"
        kinds = "give a Hugging Face checkpoint, a conversion's, or a run's checkpoints/step_N"
        raise UserError(f"{checkpoint}: {there}; {kinds}", exit_code=1)
    kept = checkpoint / HF / "config.json"
    model = _described_by(kept) if kept.is_file() else _without_mtp(run_of(checkpoint)[0])
    check_files(checkpoint)
    return model, lambda chunks: load_weights(chunks, checkpoint)


def gap(low: float, high: float) -> TokenLoss:
    """Trains nothing: the sums of the mismatch report."""

    def measured(new_logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedBatch) -> LossOutput:
        engine_T, age_T = batch.fields["engine_logprobs"], batch.fields["age"]
        weights_T = icepop_weights(new_logprobs_T, engine_T, low, high)
        found = mismatch_sums(new_logprobs_T, engine_T, entropy_T, age_T, weights_T, batch.loss_mask_T)
        return LossOutput(new_logprobs_T.new_zeros(()), found.sums, found.maxima, found.tables)

    return measured


def _totals(
    model: ModelConfig, load: Load, sequences: Sequence[TrainSequence], loss: TokenLoss, temperature: float, capacity: int
) -> dict[str, Any]:
    from megatron_rl.policy import MegatronPolicy, MegatronRanks

    alone = ParallelConfig(microbatch_tokens=capacity)
    ranks = MegatronRanks(alone, model)
    try:
        untrained = OptimizerConfig(lr=1e-30)  # the policy wants one; no step is taken
        policy = MegatronPolicy(model, alone, untrained, total_steps=1, seed=0, ranks=ranks, load=load)
        batches = microbatches(sequences, capacity=capacity, replicas=1, replica=0, device=ranks.device)
        return policy.evaluate(batches, loss, temperature)
    finally:
        ranks.close()


def _described_by(file: Path) -> ModelConfig:
    try:
        return _without_mtp(validate(ModelConfig, model_values(read_json(file))))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file}: {error}", exit_code=1) from None


def _without_mtp(model: ModelConfig) -> ModelConfig:
    """Their predictions are of other tokens."""
    return model.model_copy(update={"num_mtp_layers": 0})


def version_of(checkpoint: Path, dumps: Sequence[Path]) -> int:
    """N of the dumps' own run's checkpoints/step_N, 0 of what that run started from; raises UserError of any other."""
    folder = checkpoint.resolve()
    runs = {dump.resolve().parent.parent for dump in dumps}
    named = re.fullmatch(r"step_(\d+)", folder.name)
    if named and runs == {folder.parent.parent} and folder.parent.name == "checkpoints":
        return int(named[1])
    if all(folder == _started_from(run) for run in runs):
        return 0
    raise UserError(f"{checkpoint}: not on record which of the run's weights these are: --version N (after N steps; 0: its start)")


def _started_from(run: Path) -> Path | None:
    try:
        return Path(yaml.safe_load((run / "config.yaml").read_text())["model"]["init_from"]).resolve()
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return None


def _checked(rollout: Dumped) -> Dumped:
    if not rollout.prompt:
        raise UserError(f"{rollout.where}: 'prompt_ids' is empty: the first token's log-prob needs a prefix", exit_code=1)
    for at, logprob in enumerate(rollout.engine_logprobs):
        if logprob > ROUNDING:
            raise UserError(f"{rollout.where}: {logprob:g} as the log-prob of response token {at}: above 0", exit_code=1)
    return rollout


def _check_vocabulary(rollout: Dumped, vocab_size: int, checkpoint: Path) -> None:
    left = array("i", b"".join(rollout.support))
    strange = [token for token in (*rollout.prompt, *rollout.response, *left) if not 0 <= token < vocab_size]
    if strange:
        theirs = f"{checkpoint} has a vocabulary of {vocab_size}"
        raise UserError(f"{rollout.where}: token id {strange[0]}, but {theirs}: it is of another model", exit_code=1)
