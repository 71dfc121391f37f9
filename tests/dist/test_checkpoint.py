"""Saving and restoring a real policy: exactly at the same layout, to fp32's precision at others, and not at all on a full disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ranks import run_ranks
from tiny_families import tiny_model

pytestmark = pytest.mark.dist

PREAMBLE = """
import hashlib, json, sys
from pathlib import Path
import torch, yaml
from disk_limit import files_at_most
from megatron.core import parallel_state
from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.config.errors import UserError
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.checkpoint.store import CheckpointStore
from megatron_rl.policy import MegatronPolicy, MegatronRanks
from megatron_rl.policy.ranks import _init_megatron

config, folder, layouts = yaml.safe_load(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), json.loads(sys.argv[3])
optimizer = OptimizerConfig(lr=1e-3, warmup_steps=3, weight_decay=0.1, grad_clip=0.5)
ranks = None

def build(layout, **model_changes):
    global ranks
    model, parallel = ModelConfig.model_validate(config | model_changes), ParallelConfig(**layout)
    if ranks is None:
        ranks = MegatronRanks(parallel, model)
    else:  # the same world, laid out anew
        parallel_state.destroy_model_parallel()
        _init_megatron(parallel, seed=0)
    policy = MegatronPolicy(model, parallel, optimizer, total_steps=10, seed=0, ranks=ranks)
    return policy, CheckpointStore(folder, policy, ranks, 2, lambda path: None)

def loss(new_logprobs_T, entropy_T, batch):
    return LossOutput(-(new_logprobs_T * batch.loss_mask_T).sum() / 100)

def train(policy, step):
    generator = torch.Generator().manual_seed(step)
    sequences = torch.randint(0, config["vocab_size"], (4, 30), generator=generator)
    sequences = sequences[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    lengths = torch.full((len(sequences),), 30)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    batch = PackedBatch(sequences.flatten(), cu_seqlens, torch.ones(sequences.numel()))
    return policy.train_step([batch], loss, 1.0)["policy/grad_norm"]

def end(policy):
    tensors = policy.weights()
    digest = hashlib.sha256(b"".join(tensors[name].float().numpy().tobytes() for name in sorted(tensors))).hexdigest()
    return f"{digest} {torch.rand(1).item()!r}"  # weights and random state

def refused(act):
    try:
        act()
    except UserError as error:
        assert error.exit_code == 1 and "\\n" not in str(error)
        return str(error)
    raise AssertionError("no error")
"""

TRAINER = {"cursor": 17, "rollouts": [{"tokens": [1, 2]}]}
UNINTERRUPTED = (
    PREAMBLE
    + f"""
policy, store = build(*layouts)
train(policy, 0), train(policy, 1)
torch.rand(7)  # a random state that no seed gives
store.save(2, {TRAINER})
print("RESULT", json.dumps([[train(policy, 2), train(policy, 3)], end(policy)]))
"""
)
RESUMED = (
    PREAMBLE
    + f"""
for layout in layouts:
    policy, store = build(layout)
    assert store.restore() == (2, {TRAINER})
    assert policy.updates == 2
    print("RESULT", json.dumps([[train(policy, 2), train(policy, 3)], end(policy)]))
"""
)


Results = list[tuple[list[float], str]]
"""([grad norm of steps 2 and 3], what the rank ended with), rank after rank and in each layout after layout"""


def run(nproc: int, source: str, folder: Path, model: Path, layouts: list[dict[str, object]]) -> Results:
    script = folder / "script.py"
    script.write_text(source)
    output = run_ranks(nproc, script, [str(model), str(folder / "checkpoints"), json.dumps(layouts)])
    return [tuple(json.loads(line.split(maxsplit=1)[1])) for line in output.splitlines() if line.startswith("RESULT")]


OTHERS = [{"tp": 2, "etp": 2, "sequence_parallel": True}, {"pp": 2, "vpp": 2}, {"ep": 2, "distributed_optimizer": False}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def ling(repo_root: Path) -> Path:
    return repo_root / "conf/model/tiny_ling.yaml"


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, ling: Path) -> Results:
    """Two ranks with EP 2 that saved at step 2 and went on."""
    return run(2, UNINTERRUPTED, folder, ling, [{"ep": 2}])


@pytest.fixture(scope="module")
def resumed(folder: Path, ling: Path, uninterrupted: object) -> Results:
    """Two other ranks that went on from step 2, at that layout and at others."""
    return run(2, RESUMED, folder, ling, [{"ep": 2}, *OTHERS])


def test_a_resumed_run_goes_on_bit_for_bit(uninterrupted: Results, resumed: Results) -> None:
    assert len(uninterrupted) == 2
    assert [resumed[0], resumed[1 + len(OTHERS)]] == uninterrupted


def test_a_run_goes_on_at_another_layout(uninterrupted: Results, resumed: Results) -> None:
    assert len(resumed) == 2 * (1 + len(OTHERS))
    for norms, _ in resumed:
        assert norms == pytest.approx(uninterrupted[0][0], rel=1e-5)


ONE_RANK = RESUMED + 'print("RESULT", json.dumps([refused(build({}, vocab_size=32, num_layers=3)[1].restore), ""]))'


def test_one_rank_goes_on_with_either_optimizer_and_refuses_another_model(folder: Path, ling: Path, uninterrupted: Results) -> None:
    *resumed, (message, _) = run(1, ONE_RANK, folder, ling, [{}, {"distributed_optimizer": False}])
    assert len(resumed) == 2
    for norms, _ in resumed:
        assert norms == pytest.approx(uninterrupted[0][0], rel=1e-5)
    assert "is of another model: vocab_size=32 (there: 64), num_layers=3 (there: 4)" in message


@pytest.mark.slow
def test_latent_attention_prediction_layers_and_a_padded_vocabulary_move_between_layouts(tmp_path: Path) -> None:
    model = tmp_path / "model.yaml"
    model.write_text(yaml.safe_dump(tiny_model("deepseek_v3", vocab_size=51).model_dump()))  # no multiple of 2
    tp2, pp2 = {"tp": 2, "sequence_parallel": True}, {"pp": 2, "layers_per_stage": [3, 1]}
    saved = run(2, UNINTERRUPTED, tmp_path, model, [tp2])
    for norms, _ in [*run(2, RESUMED, tmp_path, model, [tp2, pp2]), *run(1, RESUMED, tmp_path, model, [{}])]:
        assert norms == pytest.approx(saved[0][0], rel=1e-5)


FAILURES = (
    PREAMBLE
    + """
policy, store = build(*layouts)

def content():
    ranks.barrier("the others")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

store.save(0, {})  # before any step
train(policy, 0)
store.save(1, {"cursor": 1})
before = content()
with files_at_most(1_000_000):
    message = refused(lambda: store.save(2, {}))
assert "step_2: cannot write the checkpoint: File too large" in message, message
assert content() == before
with files_at_most(1_000_000 if ranks.rank == 1 else 1 << 40):  # rank 0's disk is fine
    message = refused(lambda: store.save(2, {}))
assert "step_2: cannot write the checkpoint" in message, message
assert content() == before
with files_at_most(1_000_000):
    refused(lambda: store.save(2, {"rollouts": ["x" * 100] * 20_000}))
assert content() == before
assert store.restore() == (1, {"cursor": 1})

ranks.barrier("all have restored")
if ranks.rank == 0:
    (folder / "step_1" / "__1_0.distcp").unlink()
message = refused(store.restore)
assert "__1_0.distcp is missing" in message and "to go on from step 0" in message
print(f"rank {ranks.rank} done")
"""
)


def test_failures_reach_every_rank_and_leave_the_older_checkpoints(
    torchrun: Callable[..., str], repo_root: Path, tmp_path: Path
) -> None:
    output = torchrun(2, FAILURES, repo_root / "conf/model/tiny_ling.yaml", tmp_path / "checkpoints", '[{"ep": 2}]', timeout=90)
    assert output.count("done") == 2
