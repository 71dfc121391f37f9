"""Which engine gets what."""

from __future__ import annotations

from megatron_rl.loops.dispatch import Dispatch


def group(name: str, tokens: int, size: int = 2) -> dict[str, int]:
    return {f"{name}#{sample}": tokens for sample in range(size)}


def test_groups_stay_together_and_go_where_least_is_outstanding() -> None:
    dispatch = Dispatch()
    assert dispatch.assign(group("a", 30) | group("b", 10) | group("c", 10), ["x", "y"]) == {
        "x": ["a#0", "a#1"],
        "y": ["b#0", "b#1", "c#0", "c#1"],
    }
    assert dispatch.outstanding("x") == 60 and dispatch.outstanding("y") == 40


def test_what_ended_says_what_the_others_will_grow_to() -> None:
    dispatch = Dispatch()
    dispatch.assign(group("a", 10) | group("b", 10), ["x", "y"])
    dispatch.grew("x", "a#0", 90)
    dispatch.left("x", "a#0", at_its_end=True)
    assert dispatch.outstanding("x") == 10 + 100 and dispatch.outstanding("y") == 20 + 200
    dispatch.left("y", "b#0", at_its_end=False)
    assert dispatch.outstanding("y") == 10 + 100


def test_a_cut_rollout_goes_back_to_its_groups_engine_unless_that_is_busy_or_gone() -> None:
    dispatch = Dispatch()
    dispatch.assign(group("a", 10) | group("b", 20), ["x", "y"])
    dispatch.grew("x", "a#0", 5)
    dispatch.left("x", "a#0", at_its_end=False)
    assert dispatch.assign({"a#0": 15}, ["x", "y"]) == {"x": ["a#0"]}
    dispatch.left("x", "a#0", at_its_end=False)
    assert dispatch.assign({"a#0": 15}, ["y"]) == {"y": ["a#0"]}
    dispatch.left("y", "a#0", at_its_end=False)
    dispatch.grew("y", "b#0", 1000)
    assert dispatch.assign({"a#0": 15}, ["x", "y"]) == {"x": ["a#0"]}  # y has the prefix, and far more to do


def test_new_weights_leave_no_prefix_to_go_back_to() -> None:
    dispatch = Dispatch()
    dispatch.assign(group("a", 10) | group("b", 10), ["x", "y"])
    for name in ("b#0", "b#1"):
        dispatch.left("y", name, at_its_end=False)
    dispatch.assign(group("c", 11), ["y"])
    dispatch.forget_prefixes()
    assert dispatch.assign(group("b", 10), ["x", "y"]) == {"x": ["b#0", "b#1"]}
    assert dispatch.any_in_flight
