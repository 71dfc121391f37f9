"""What a policy starts from: `model.init_from`, a Hugging Face checkpoint or a Megatron-Core one, of a conversion or of a run.

Invariants:
- rank 0 looks at the checkpoint before any weight changes, and what is wrong with it is the same error on all ranks;
- it is of the configured model, and no token of the tokenizer that comes with it has the id of another in the run's.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from megatron_rl.config import UserError, validate
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.data.tokenizer import Tokenizer, conflict, load_tokenizer
from megatron_rl.ports import Ranks
from megatron_rl.resharding.families import family_of
from megatron_rl.resharding.hf import load_hf
from megatron_rl.resharding.hf_source import check_config, check_facts

if TYPE_CHECKING:
    from megatron_rl.policy.megatron_policy import Load

log = logging.getLogger(__name__)
HF = "hf"  # in a Megatron checkpoint of a conversion: config.json and what else came with the weights


def start_from(path: Path, model: ModelConfig, parallel: ParallelConfig, ranks: Ranks, tokenizer: Tokenizer) -> Load:
    """*Collective*"""
    from megatron_rl.checkpoint.intact import check_files_together
    from megatron_rl.checkpoint.weights import load_weights
    from megatron_rl.policy import weights

    is_megatron, error = None, None
    if ranks.rank == 0:
        try:
            is_megatron = _examine(path, model, tokenizer)
        except UserError as wrong:
            error = UserError(f"model.init_from={path}: {str(wrong).removeprefix(f'{path}: ')}", exit_code=1)
    is_megatron, error = ranks.broadcast((is_megatron, error), f"a look at {path}")
    if error:
        raise error
    if is_megatron:
        check_files_together(path)
        return lambda chunks: load_weights(chunks, path)
    return lambda chunks: load_hf(path, weights(chunks), model, parallel, ranks.rank, ranks)


def run_of(step: Path) -> tuple[ModelConfig, str]:
    """The model and `data.tokenizer` of the run that saved runs/NAME/checkpoints/step_N."""
    if not step.is_dir():
        raise UserError(f"{step}: no such folder", exit_code=1)
    file = step.parent.parent / "config.yaml"
    try:
        run = yaml.safe_load(file.read_text())
        return validate(ModelConfig, run["model"]), str(run["data"]["tokenizer"])
    except FileNotFoundError:
        there = f"{step} has no {HF}/config.json, and there is no {file}"
        raise UserError(f"{there}: neither a conversion's checkpoint nor a run's checkpoints/step_N", exit_code=1) from None
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not a run's configuration: {' '.join(str(error).split())}", exit_code=1) from None


def _examine(path: Path, model: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Whether it is a Megatron-Core checkpoint. Raises UserError if it is not one to start from."""
    if (path / "config.json").is_file():  # its tensors are looked at by `load_hf`
        check_config(path, model)
        _compare(tokenizer, path)
        return False
    if not (path / ".metadata").is_file():
        there = "has neither config.json nor .metadata" if path.is_dir() else "no such folder"
        raise UserError(f"{there}; give a Hugging Face checkpoint, a conversion's, or a run's checkpoints/step_N", exit_code=1)
    if (path / HF / "config.json").is_file():
        check_config(path / HF, model)
        _compare(tokenizer, path / HF)
    else:
        theirs, its_tokenizer = run_of(path)
        check_facts(path.parent.parent / "config.yaml", family_of(theirs).to_hf_config(theirs), model)
        _compare(tokenizer, Path(its_tokenizer))
    return True


def _compare(tokenizer: Tokenizer, theirs: Path) -> None:
    if theirs.is_dir() and not [*theirs.glob("tokenizer*")]:
        return  # weights alone
    if not theirs.exists():
        log.warning("%s, the tokenizer of the checkpoint to start from, is no longer there: not compared", theirs)
        return
    if wrong := conflict(tokenizer, load_tokenizer(theirs)):
        raise UserError(f"the weights were trained with another tokenizer: {wrong}", exit_code=1)
