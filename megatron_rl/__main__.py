"""The command line: `python -m megatron_rl <rl|sft|eval> [Hydra overrides]`, also installed as `megatron-rl`.

Hydra composes conf/, the result is validated into frozen models, and `assemble` runs it: in this process under torchrun or for one
rank, else in `parallel.nproc` ranks started here. Exit codes: 0 done, 128 + its number after a signal, 2 a wrong command line or
configuration, 1 anything else. Nothing is allocated before the configuration is found possible.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_rl import __version__
from megatron_rl.config import EvalRun, RlRun, SftRun, UserError, validate
from megatron_rl.launcher import die_with_parent, run_ranks, run_sweep_job
from megatron_rl.types import EngineLost

VERBS: dict[str, type[RlRun] | type[SftRun] | type[EvalRun]] = {"rl": RlRun, "sft": SftRun, "eval": EvalRun}
USAGE = f"""megatron_rl {__version__}: reinforcement learning with verifiable rewards for mixture-of-experts models

  megatron-rl rl   experiment=quickstart [key=value ...]   rollouts, verified rewards, updates
  megatron-rl sft  experiment=quickstart_sft [...]         supervised warm-up over a curriculum
  megatron-rl eval checkpoint=DIR data.eval=FILE [...]     accuracy of a Hugging Face checkpoint

megatron-rl VERB --help    every key with its default, and examples
megatron-rl VERB --cfg job the composed configuration, without running it
megatron-rl VERB -m a=1,2  a sweep, one run after the other
The same under torchrun:   torchrun --nproc-per-node 2 -m megatron_rl rl ...
New here:                  bash launch/quickstart.sh"""


def main() -> None:
    verb, overrides = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if verb in ("-h", "--help"):
        print(USAGE)
        return
    if verb == "--version":
        print(__version__)
        return
    if verb not in VERBS:
        fail(f"unknown verb {verb!r}: one of {', '.join(VERBS)}", 2)
    try:
        compose_and_run(verb, overrides)
    except KeyboardInterrupt:  # before a run took the signal over
        fail("interrupted before the run began", 130)
    except (HydraException, OmegaConfBaseException) as error:
        fail(" ".join(str(error).split()), 2)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, once a node: under torchrun every rank finds the same mistake."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"megatron-rl: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def compose_and_run(verb: str, overrides: Sequence[str]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us instead of printing and exiting
    sys.argv = [f"megatron-rl {verb}", *overrides]

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=verb)
    def job(composed: DictConfig) -> None:
        try:
            values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            run(verb, validate(VERBS[verb], values))
        except MissingMandatoryValue as error:
            fail(f"{error.full_key}: missing; give it as {error.full_key}=...", 2)
        except UserError as error:
            fail(str(error), error.exit_code)
        except (EngineLost, TimeoutError) as error:
            fail(str(error), 1)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("closed by peer", "reset by peer")):
                raise
            sys.exit(1)  # another rank ended first, and it or the launcher says why

    job()


def conf_dir() -> Path:
    """`conf/` lies beside the package in a checkout and inside it in an installation."""
    here = Path(__file__).resolve().parent
    inside = here / "conf"
    return inside if inside.is_dir() else here.parent / "conf"


def run(verb: str, config: RlRun | SftRun | EvalRun) -> None:
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        run_sweep_job(verb, overrides, config, HydraConfig.get().job.num)
        return
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_RANK" in os.environ
    if not isinstance(config, EvalRun):
        try:
            config.parallel.check(int(os.environ.get("WORLD_SIZE", config.parallel.nproc)), config.model)
        except ValueError as error:
            raise UserError(str(error)) from None
        if not under_torchrun and config.parallel.nproc > 1:
            run_ranks(verb, overrides, config.parallel.nproc)
            return
    if under_torchrun:
        die_with_parent()
    from megatron_rl import assemble, evaluation  # torch and Megatron are not needed to refuse a configuration

    match config:
        case RlRun():
            assemble.run_rl(config)
        case SftRun():
            assemble.run_sft(config)
        case EvalRun():
            evaluation.run_eval(config)


if __name__ == "__main__":
    main()
