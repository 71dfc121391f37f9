"""Hugging Face -> Megatron's own shards -> Hugging Face, and what the loaded model computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.dist

# Loads the checkpoint at every layout, exports it again, and asks for the same bytes.
ROUND_TRIP = """
import json, sys
from pathlib import Path
import torch, yaml
from megatron.core import parallel_state
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.policy.model import build_chunks, weights
from megatron_rl.policy.ranks import MegatronRanks, _init_megatron
from megatron_rl.resharding.execute import Resharder
from megatron_rl.resharding.hf import export_hf, hf_config, load_hf

if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    config, layouts = yaml.safe_load(Path(sys.argv[3]).read_text()), json.loads(sys.argv[4])
    ranks = MegatronRanks(ParallelConfig(), ModelConfig.model_validate(config))
    for name, layout in layouts.items():
        model = ModelConfig.model_validate(config | {"dtype": layout.pop("dtype", "auto")})
        parallel = ParallelConfig(**layout)
        parallel_state.destroy_model_parallel()
        _init_megatron(parallel, seed=0)
        chunks = build_chunks(model, parallel, ranks.device)
        for tensor in weights(chunks).values():
            tensor.fill_(float("nan"))
        load_hf(source, weights(chunks), model, parallel, ranks.rank)
        facts = hf_config(model, dtype="float32", eos_token_id=1, pad_token_id=0)
        resharder = Resharder(model, parallel, lambda: weights(chunks), ranks, 1_000_000)
        export_hf(resharder, target / name, ranks.rank, facts)
    print(f"rank {ranks.rank} done")
"""


def assert_same_checkpoint(source: Path, target: Path, half: bool) -> None:
    wanted = load_file(source / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for file in target.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        dtype = torch.bfloat16 if half and not name.endswith("expert_bias") else torch.float32
        assert found[name].dtype == dtype, name
        assert torch.equal(found[name], tensor.to(dtype)), name


LAYOUTS = {
    "dp2": {},
    "ep2": {"ep": 2},
    "ep2-bf16": {"ep": 2, "dtype": "bfloat16"},
    "tp2": {"tp": 2, "etp": 2, "sequence_parallel": True},
    "tp2-ep2": {"tp": 2, "ep": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
}


def test_round_trip_is_bitwise(torchrun: Callable[..., str], tmp_path: Path, repo_root: Path) -> None:
    source = write_checkpoint(tmp_path / "source", seed=11)
    output = torchrun(2, ROUND_TRIP, source, tmp_path / "out", repo_root / "conf/model/tiny_ling.yaml", json.dumps(LAYOUTS))
    assert output.count("done") == 2
    for name, layout in LAYOUTS.items():
        assert_same_checkpoint(source, tmp_path / "out" / name, half="dtype" in layout)


# The reference implementation's logits at the real tokens of a right-padded batch, from packed segments; and back again.
GOLDEN = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from megatron_rl.algorithms.batch import PackedBatch
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.policy.attention import make_plan
from megatron_rl.policy.model import build_chunks, weights
from megatron_rl.policy.packed import rank_inputs
from megatron_rl.policy.ranks import MegatronRanks
from megatron_rl.resharding.execute import Resharder
from megatron_rl.resharding.families import FAMILIES
from megatron_rl.resharding.hf import export_hf, load_hf

if __name__ == "__main__":
    path, parallel = Path(sys.argv[1]), ParallelConfig()
    values = FAMILIES["bailing_moe_v2"].from_hf_config(json.loads((path / "config.json").read_text()))
    model = ModelConfig.model_validate(values)
    ranks = MegatronRanks(parallel, model)
    (chunk,) = build_chunks(model, parallel, ranks.device)
    load_hf(path, weights([chunk]), model, parallel, ranks.rank)
    resharder = Resharder(model, parallel, lambda: weights([chunk]), ranks, 1 << 30)
    export_hf(resharder, Path(sys.argv[2]), ranks.rank, {})

    golden = load_file(path / "golden.safetensors")
    real = golden["attention_mask"].bool()
    lengths = real.sum(1)
    tokens_T = golden["input_ids"][real]
    batch = PackedBatch(tokens_T, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(), torch.ones(len(tokens_T)))
    inputs = rank_inputs(batch, tp=1, cp=1, cp_rank=0)
    plan = make_plan(inputs.segments, int(model.head_dim * model.rotary_percent), model.rotary_base)
    with torch.no_grad():
        logits_1TV = chunk(inputs.input_ids_R[None], inputs.segments.positions_R[None], None, packed_seq_params=plan)
    print("difference", (logits_1TV[0] - golden["logits"][real]).abs().max().item())
"""


def test_logits_are_those_of_the_reference_implementation(torchrun: Callable[..., str], shared_data: Path, tmp_path: Path) -> None:
    golden = shared_data / "golden_bailing_moe_v2"
    output = torchrun(1, GOLDEN, golden, tmp_path / "out")
    (difference,) = (float(line.split()[1]) for line in output.splitlines() if line.startswith("difference"))
    assert difference < 1e-4
    assert_same_checkpoint(golden, tmp_path / "out", half=False)
