"""Malformed calls, a part of those in faults/malformed.py: each is refused in one line of ours."""

import pytest
from faults import malformed

# Every how many of a room's calls are made here; the script makes all, also as processes
PARTS = {room: 1 for room in malformed.ROOMS if room != "processes"} | {
    "commands": 4,
    "data": 3,
    "losses": 12,
}


@pytest.mark.parametrize("room", PARTS)
def test_malformed_calls_are_refused_in_one_line(room):
    cases = list(malformed.ROOMS[room]())[:: PARTS[room]]
    wrong = {case.name: found for case in cases if (found := malformed.judge(case))[0] != "refused"}
    assert len(cases) > 2
    assert not wrong
