"""The dry run tells where tensors go, names what is wrong, and changes nothing; verification reads what is really held."""

from __future__ import annotations

import pytest
import torch
from toy_loader import SHAPES, ToyModel, random_tensors

from megatron_rl.checksum import checksum
from megatron_rl.engine.boxes import Geometry, box_of, gap, overlap
from megatron_rl.engine.dry_run import Spec
from megatron_rl.engine.intake import Answer, agreed, check, differences, note_arrivals, verify

ALL: list[Spec] = [(name, shape, "float32") for name, shape in SHAPES.items()]


def ranks(tp: int, dtype: torch.dtype = torch.float32) -> list[ToyModel]:
    return [ToyModel(rank, tp, dtype) for rank in range(tp)]


def asked(models: list[ToyModel], *buckets: list[Spec]) -> Answer:
    return agreed([check(model, buckets) for model in models], buckets, layers=1)


def without(*names: str) -> list[Spec]:
    return [spec for spec in ALL if spec[0] not in names]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_whole_manifest_has_no_problem_and_changes_nothing(tp: int) -> None:
    models = ranks(tp)
    answer = asked(models, ALL[:7], ALL[7:])
    assert answer.problems == [] and answer.dtypes == dict.fromkeys(SHAPES, "float32")
    assert all(torch.isnan(p).all() for model in models for p in model.parameters())


def test_the_answer_tells_the_type_each_tensor_is_held_in() -> None:
    answer = asked(ranks(1, torch.bfloat16), ALL)
    assert answer.dtypes == dict.fromkeys(SHAPES, "bfloat16") | {"router.bias": "float32"}


@pytest.mark.parametrize(
    ("buckets", "problem"),
    [
        ([without("norm.weight")], "nothing writes norm"),
        ([without("k.weight")], "nothing writes qkv[4:6, 0:4]"),
        ([without("experts.1.up.weight")], "nothing writes w13[1:2, 6:12, 0:4]"),
        ([without("router.bias")], "nothing writes bias"),
        ([[*ALL, ("other.weight", (2,), "float32")]], "other.weight is unknown to the model"),
        ([[*ALL, ("layers.0.other.weight", (2,), "float32")]], "layers.0.other.weight is unknown to the model"),
        ([[*without("norm.weight"), ("norm.weight", (5,), "float32")]], "norm.weight: AssertionError: (5,) into (4,)"),
        ([[*without("scale"), ("scale", (2,), "float32")]], "scale: "),
        ([[*without("router.bias"), ("router.bias", (1,), "float32")]], "[1] is broadcast into [2] of bias"),
        ([[*without("q.weight"), ("q.weight", (5, 4), "float32")]], "q.weight [5, 4] is not used as a whole"),
        ([ALL, [("q.weight", (4, 4), "float32")]], "qkv is written twice, from q.weight and q.weight"),
        ([without("down_b.weight"), [("down_b.weight", (2, 4), "float32")]], "nothing writes down"),  # one bucket too late
    ],
)
def test_a_difference_is_named(buckets: list[list[Spec]], problem: str) -> None:
    answer = asked(ranks(1), *buckets)
    assert len(answer.problems) == 1 and problem in answer.problems[0]


def test_all_wrong_shapes_are_named_at_once() -> None:
    wrong = {"norm.weight": (5,), "v.weight": (2, 7), "experts.0.down.weight": (3, 6)}
    answer = asked(ranks(1), [(name, wrong.get(name, shape), dtype) for name, shape, dtype in ALL])
    assert sorted(problem.split(":")[0] for problem in answer.problems) == sorted(wrong)


def test_layers_beyond_the_last_are_not_wanted() -> None:
    answer = asked(ranks(1), [*ALL, ("model.layers.1.eh_proj.weight", (2, 2), "float32")])
    assert answer.problems == [] and answer.dtypes.keys() == SHAPES.keys()


def test_a_tensor_no_rank_takes_a_part_of_is_seen() -> None:
    """Rank 0 alone: the half of the experts that rank 1 would take is nowhere."""
    answer = asked([ToyModel(0, 2)], ALL)
    assert any("experts.0.gate.weight [6, 4] is not used as a whole" in problem for problem in answer.problems)


def pushed(models: list[ToyModel], tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Asked, cast and sent as a push does; the checksums of what was sent."""
    held = asked(models, ALL).dtypes
    cast = {name: tensor.to(getattr(torch, held[name])) for name, tensor in tensors.items()}
    for model in models:
        note_arrivals(model, cast.items())
        model.load_weights(iter(cast.items()))
    return {name: int(checksum(tensor)) for name, tensor in cast.items()}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_loaded_verifies(tp: int, dtype: torch.dtype) -> None:
    models = ranks(tp, dtype)
    expected = pushed(models, random_tensors())
    assert differences(expected, [verify(model, expected) for model in models]) == []


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda m: m.qkv.data.copy_(m.qkv.data.roll(1, 1)), ["q.weight", "k.weight", "v.weight"]),
        (lambda m: m.qkv.data[:2].copy_(m.qkv.data[:2].flip(0)), ["q.weight"]),
        (lambda m: m.w13.data.copy_(m.w13.data.flip(0)), [f"experts.{e}.{w}.weight" for e in (0, 1) for w in ("gate", "up")]),
        (lambda m: m.w2.data[1].zero_(), ["experts.1.down.weight"]),
        (lambda m: m.bias[0].add_(1e-6), ["router.bias"]),
        (lambda m: m.scale.data.neg_(), ["scale"]),
        (lambda m: m.down.data[4, 3].mul_(1.0000001), ["down_b.weight"]),
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_held_otherwise_is_named(damage, named: list[str], tp: int) -> None:
    models = ranks(tp)
    expected = pushed(models, random_tensors())
    damage(models[-1])
    assert sorted(differences(expected, [verify(model, expected) for model in models])) == sorted(named)


def test_a_tensor_the_loader_computes_with_is_verified_as_it_arrived() -> None:
    models = ranks(1)
    expected = pushed(models, random_tensors())
    expected["head.weight"] += 1
    assert differences(expected, [verify(models[0], expected)]) == ["head.weight"]


def test_boxes_of_views() -> None:
    tensor = torch.empty(4, 6, 5)

    def box(view: torch.Tensor) -> object:
        return box_of(Geometry(view.storage_offset(), tuple(view.shape), view.stride()), tensor.shape, tensor.stride())

    assert box(tensor) == ((0, 4), (0, 6), (0, 5)) == box(tensor.flatten()) == box(tensor.permute(2, 0, 1))
    assert box(tensor[1]) == ((1, 2), (0, 6), (0, 5)) == box(tensor.view(-1)[30:60])
    assert box(tensor[1:3, 2]) == ((1, 3), (2, 3), (0, 5))
    assert box(tensor.view(4, 2, 3, 5)[:, 1]) == ((0, 4), (3, 6), (0, 5))
    assert box(tensor[2, 3, 1:2]) == ((2, 3), (3, 4), (1, 2))
    assert box(tensor[:, ::2]) is None and box(tensor.view(-1)[3:33]) is None


def test_gaps_and_overlaps() -> None:
    halves = [((0, 2), (0, 3)), ((2, 4), (0, 3))]
    assert gap(halves, (4, 3)) is None and overlap(halves, (4, 3)) is None
    assert gap(halves[:1], (4, 3)) == ((2, 4), (0, 3)) and gap([], (4, 3)) == ((0, 4), (0, 3))
    assert overlap([*halves, ((1, 2), (2, 3))], (4, 3)) == (0, 2)
