"""What a run is: frozen, validated models. No torch; everything a run can refuse before anything is allocated is refused here."""

from megatron_rl.config.errors import UserError
from megatron_rl.config.load import validate
from megatron_rl.config.plan import PlanRun
from megatron_rl.config.run import EvalRun, RlRun, SftRun
from megatron_rl.config.simulate import SimulationRun

__all__ = ["EvalRun", "PlanRun", "RlRun", "SftRun", "SimulationRun", "UserError", "validate"]
