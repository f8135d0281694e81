"""Packs small integers, such as quantised weights, into about as many bytes as their entropy, and unpacks them.

:func:`encode` and :func:`decode` are an adaptive entropy coder: how often each integer has occurred so far says how
many bits it costs, so no table of frequencies is stored. The whole message is one large number, which keeps the
decoder short enough to be sent with the weights: it is ten lines of plain Python.
"""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_integers, check_sequence

STEP = 2  # by which an occurrence raises a count that starts at 1: as adding ½ to each number of occurrences


def encode(arrays: Sequence[ArrayLike], *, limit: int, check: int = 2) -> bytes:
    """Packs arrays of integers into bytes; :func:`decode` returns the same integers.

    An integer q whose count is f among counts of sum F costs log₂(F/f) bits. All counts start at 1, and each
    occurrence of q raises that of q by 2. Each array has counts of its own, since layers differ in how often weights
    are zero. To code is to turn the message x, a number, into ⌊x/f⌋·F + (x mod f) + (sum of the counts below q), last
    integer first. These numbers have no upper bound, so nothing is rounded, and the bytes are at most one more
    than the information asks for. The time grows with the square of their number: seconds for some 20,000 bytes.

    Args:
      arrays: integers of any shapes, each from −``limit`` to ``limit``.
      limit: the largest absolute value that can be coded, at least 1.
      check: number of additional bytes by which :func:`decode` recognises damaged bytes, 0 or more. It overlooks one
        case in 256 to this power.

    Returns:
      The bytes. Neither shapes nor ``limit`` are among them.

    Raises:
      ValueError: if an array does not hold integers of that range, or an option is out of range.

    References:
      Duda, `Asymmetric numeral systems`, 2013 (arXiv 1311.2540), §2.2 and §3 (rANS), here without renormalisation.
      Krichevsky, Trofimov, `The Performance of Universal Encoding`, 1981 (the counts).

    >>> weights = [0, 0, 1, 0, 0, 0, -1, 0] * 8
    >>> len(encode([weights], limit=1, check=0))  # 2 bits each would be 16 bytes
    10
    """
    check_count("limit", limit)
    check_count("check", check, least=0)
    check_sequence("arrays", arrays, "arrays of integers")
    costs: list[tuple[int, int, int]] = []
    for position, array in enumerate(arrays):
        values = np.asarray(array)
        if values.size:
            check_integers(f"arrays[{position}]", values)
            if np.abs(values.astype(np.int64)).max() > limit:
                raise ValueError(
                    f"arrays[{position}] must hold integers from {-limit} to {limit}, got {values.min()} to "
                    f"{values.max()}"
                )
        counts = [1] * (2 * limit + 1)
        total = len(counts)
        for q in (values.ravel().astype(np.int64) + limit).tolist():
            costs.append((counts[q], sum(counts[:q]), total))
            counts[q] += STEP
            total += STEP
    message = _start(check)
    for count, below, total in reversed(costs):
        message = message // count * total + message % count + below
    return message.to_bytes(-(-message.bit_length() // 8), "big")


def decode(coded: bytes, sizes: Sequence[int], *, limit: int, check: int = 2) -> list[np.ndarray]:
    """Unpacks what :func:`encode` packed.

    Args:
      coded: the bytes.
      sizes: the number of integers in each array, in the order in which they were packed.
      limit: as in :func:`encode`.
      check: as in :func:`encode`.

    Returns:
      For each size, an array of integers, int64 ``[size]``.

    Raises:
      ValueError: if the bytes are not those of such arrays: damaged, cut off, or packed with other options.

    >>> decode(encode([[1, -1], [0]], limit=1), [2, 1], limit=1)
    [array([ 1, -1]), array([0])]
    """
    check_count("limit", limit)
    check_count("check", check, least=0)
    check_sequence("sizes", sizes, "numbers of integers")
    for size in sizes:
        check_count("each of sizes", size, least=0)
    if not isinstance(coded, bytes):
        raise ValueError(f"coded must be bytes, got {type(coded).__name__}")
    message = int.from_bytes(coded, "big")
    arrays = []
    for size in sizes:
        counts = [1] * (2 * limit + 1)
        values = np.empty(size, np.int64)
        for place, total in enumerate(range(len(counts), len(counts) + STEP * size, STEP)):
            message, rest = divmod(message, total)
            q = 0
            while rest >= counts[q]:
                rest -= counts[q]
                q += 1
            message = message * counts[q] + rest
            counts[q] += STEP
            values[place] = q - limit
        arrays.append(values)
    if message != _start(check) or coded[:1] == b"\0":
        raise ValueError(
            f"coded must be what encode packed of {len(sizes)} arrays of {sum(sizes)} integers in all with "
            f"limit={limit} and check={check}, got {len(coded)} bytes that are damaged, or were packed otherwise"
        )
    return arrays


def _start(check: int) -> int:
    """The message before anything is packed, which is what remains when all is unpacked."""
    return 256**check - 1
