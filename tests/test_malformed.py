"""Malformed calls, a part of those in faults/malformed.py: each is refused in one line of ours."""

import pytest
from faults import malformed

from distill_jax.losses import _numerics

# Every how many of a room's calls are made here; the script makes all, also as processes
PARTS = {room: 1 for room in malformed.ROOMS if room not in ("processes", "losses")} | {
    "commands": 4,
    "data": 3,
}


@pytest.mark.parametrize("room", PARTS)
def test_malformed_calls_are_refused_in_one_line(room):
    cases = list(malformed.ROOMS[room]())[:: PARTS[room]]
    wrong = {case.name: found for case in cases if (found := malformed.judge(case))[0] != "refused"}
    assert len(cases) > 2
    assert not wrong


def test_losses_refuse_before_they_compute(monkeypatch):
    """What is wrong is refused before the first maximum over classes, from which any softmax begins."""
    monkeypatch.setattr(_numerics, "peak", computed)
    cases = list(malformed.of_losses())
    wrong = {case.name: found for case in cases if (found := malformed.judge(case))[0] != "refused"}
    assert len(cases) > 900
    assert not wrong


def computed(logits, axis):
    raise RuntimeError("the loss is being computed")
