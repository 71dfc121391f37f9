"""Warnings come once a crossing, and only for what was asked."""

from __future__ import annotations

import math

from megatron_rl.observability.alarms import Alarm, Alarms, mismatch_alarms

GAP, MASKED = "mismatch/prob_gap_mean", "mismatch/masked_fraction"


def test_one_warning_for_each_crossing() -> None:
    alarms = Alarms([Alarm(GAP, 0.05, "advice"), Alarm(MASKED, 0.01, "other advice")])
    values = [(0.01, 0.0), (0.06, 0.0), (0.09, 0.02), (0.05, 0.02), (0.051, 0.02)]
    lines = [alarms.raised_by(step, {GAP: gap, MASKED: masked}) for step, (gap, masked) in enumerate(values)]
    assert lines[0] == lines[3] == []
    assert lines[1] == [f"step 1: {GAP} is 0.06, above 0.05: advice"]
    assert lines[2] == [f"step 2: {MASKED} is 0.02, above 0.01: other advice"]
    assert lines[4] == [f"step 4: {GAP} is 0.051, above 0.05: advice"]


def test_a_number_that_is_missing_or_undefined_changes_nothing() -> None:
    alarms = Alarms([Alarm(GAP, 0.05, "advice")])
    assert len(alarms.raised_by(1, {GAP: 0.06})) == 1
    assert alarms.raised_by(2, {}) == alarms.raised_by(3, {GAP: math.nan}) == alarms.raised_by(4, {GAP: 0.07}) == []
    assert len(Alarms([Alarm(GAP, 0.05, "advice")]).raised_by(1, {GAP: math.inf})) == 1


def test_null_turns_an_alarm_off() -> None:
    assert [(alarm.metric, alarm.threshold) for alarm in mismatch_alarms(0.05, 0.01)] == [(GAP, 0.05), (MASKED, 0.01)]
    assert [alarm.metric for alarm in mismatch_alarms(None, 0.01)] == [MASKED]
    assert mismatch_alarms(None, None) == []
