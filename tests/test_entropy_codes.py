"""The entropy coder: what goes in comes out, in as few bytes as the information asks for."""

import numpy as np
import pytest

from distill_jax.compress import entropy_codes

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("arrays", "limit"),
    [
        ([], 1),
        ([[]], 1),
        ([[], [0], []], 5),
        ([[0] * 1000], 3),
        ([[-2] * 100, [2] * 100], 2),
        ([np.arange(-127, 128)], 127),
        ([RNG.integers(-1, 2, (3, 5, 2), dtype=np.int8), RNG.integers(-7, 8, 400)], 7),
    ],
)
@pytest.mark.parametrize("check", [0, 2])
def test_what_goes_in_comes_out(arrays, limit, check):
    coded = entropy_codes.encode(arrays, limit=limit, check=check)
    found = entropy_codes.decode(coded, [np.size(a) for a in arrays], limit=limit, check=check)
    assert len(found) == len(arrays)
    for array, expected in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(array, np.ravel(expected))


def test_the_bytes_are_near_the_entropy():
    q = np.rint(RNG.normal(size=3000)).clip(-3, 3).astype(int)
    counts = np.bincount(q + 3)
    entropy = -np.sum(counts * np.log2(counts / len(q))) / 8
    size = len(entropy_codes.encode([q], limit=3, check=0))
    # The counts are learned on the way: half of log2(n) bits for each of 6 that are free
    assert entropy < size < entropy + 6 / 2 * np.log2(len(q)) / 8 + 2
    assert size + 3 <= len(entropy_codes.encode([q], limit=3, check=4)) <= size + 4
    assert len(entropy_codes.encode([[0] * 1000], limit=3, check=0)) < 6


def test_counts_are_those_of_the_array():
    """Two arrays of one value each cost less than one array of both."""
    parts = [[-1] * 200, [1] * 200]
    assert (
        len(entropy_codes.encode(parts, limit=1)) < 10 < len(entropy_codes.encode([np.ravel(parts)], limit=1))
    )


def test_damaged_bytes_are_refused():
    q = RNG.integers(-3, 4, 200)
    coded = entropy_codes.encode([q], limit=3)
    damaged = [coded[:-1], coded[1:], coded + b"\0", b"\0" + coded, b""]
    damaged += [coded[:i] + bytes([coded[i] ^ 4]) + coded[i + 1 :] for i in range(0, len(coded), 7)]
    for wrong in damaged:
        with pytest.raises(
            ValueError, match=f"got {len(wrong)} bytes that are damaged, or were packed otherwise"
        ):
            entropy_codes.decode(wrong, [200], limit=3)
    for options in ({"limit": 4}, {"limit": 3, "check": 1}):
        with pytest.raises(ValueError, match="packed otherwise"):
            entropy_codes.decode(coded, [200], **options)
    with pytest.raises(ValueError, match="packed otherwise"):
        entropy_codes.decode(coded, [199], limit=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: entropy_codes.encode([[0, 4]], limit=3),
            r"arrays\[0\] must hold integers from -3 to 3, got 0 to 4",
        ),
        (
            lambda: entropy_codes.encode([[0], [0.5]], limit=3),
            r"arrays\[1\] must be integers, got dtype float64",
        ),
        (lambda: entropy_codes.encode([[-128]], limit=127), "got -128 to -128"),
        (lambda: entropy_codes.encode([[0]], limit=0), "limit must be an integer of at least 1, got 0"),
        (lambda: entropy_codes.encode("0", limit=1), "arrays must be a list of arrays of integers, got str"),
        (
            lambda: entropy_codes.decode(b"", [0], limit=1, check=-1),
            "check must be an integer of at least 0, got -1",
        ),
        (lambda: entropy_codes.decode("", [0], limit=1), "coded must be bytes, got str"),
        (
            lambda: entropy_codes.decode(b"", [-1], limit=1),
            "each of sizes must be an integer of at least 0, got -1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
