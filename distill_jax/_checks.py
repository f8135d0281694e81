"""Checks of arguments, with one message for all rooms: what was given, and what was expected.

Values that JAX traces pass each check of a value, since they are not known; their shapes and dtypes are.
"""

import inspect
import numbers
import sys
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# A warning about an argument points to the first line of the stack that is outside these packages.
_INSIDE = (str(Path(__file__).parent), str(Path(jax.__file__).parent))
_warned: set[str] = set()  # names of arguments about which a warning was given


class BudgetError(ValueError):
    """Nothing keeps within these budgets, which are named as the arguments are."""

    def __init__(self, message: str, *budgets: str):
        super().__init__(message)
        self.budgets = budgets


def check_real(name: str, array: Any) -> None:
    """Raises ``ValueError`` unless an array holds real numbers: floats of any width, or integers.

    Masked, structured, complex and boolean arrays are refused, and so is what is no array of numbers. Nothing
    is converted.
    """
    _check_dtype(name, array, (jnp.floating, jnp.integer), "real numbers")


def check_integers(name: str, array: ArrayLike) -> None:
    """Raises ``ValueError`` unless an array holds integers that int64 can hold."""
    _check_dtype(name, array, (jnp.integer,), "integers")
    if isinstance(array, jax.core.Tracer) or getattr(array, "dtype", np.uint64) != np.uint64:
        return  # an array on a device is not copied
    array = np.asarray(array)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be integers of at most 63 bits, got {array.max()}")


def check_bool(name: str, array: ArrayLike) -> None:
    """Raises ``ValueError`` unless an array holds booleans."""
    _check_dtype(name, array, (jnp.bool_,), "bool")


def _check_dtype(name: str, array: ArrayLike, kinds: tuple[Any, ...], expected: str) -> None:
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"{name} must be {expected}, got a masked array: fill or select it first")
    if not isinstance(array, jax.Array):
        try:
            array = np.asarray(array)
        except ValueError:
            raise ValueError(f"{name} must be an array of {expected}, got rows of unequal length") from None
        except Exception:  # whatever an object raises that says it were an array
            raise ValueError(f"{name} must be {expected}, got {type(array).__name__}") from None
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds) or array.dtype.kind == "m":
        raise ValueError(f"{name} must be {expected}, got dtype {array.dtype}")


def shown(value: Any) -> str:
    """Writes a value in one line, as messages show it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _number(value: Any) -> str:
    return shown(value) if np.ndim(value) else str(value)


def is_integer(value: Any) -> bool:
    """Says whether a value is one integer, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raises ``ValueError`` unless a value is an integer of at least ``least``."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {shown(value)}")


def check_finite(name: str, value: ArrayLike) -> None:
    """Raises ``ValueError`` if a value is no finite real number. Traced values pass."""
    check_real(name, value)
    if not isinstance(value, jax.core.Tracer) and not np.isfinite(np.asarray(value, np.float64)).all():
        raise ValueError(f"{name} must be finite, got {value}")


def check_positive(name: str, value: ArrayLike) -> None:
    """Raises ``ValueError`` if a value is not positive and finite. Traced values pass."""
    check_real(name, value)
    if isinstance(value, jax.core.Tracer):
        return
    array = np.asarray(value, np.float64)
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"{name} must be positive and finite, got {_number(value)}")


def check_at_most(name: str, value: ArrayLike, most: float) -> None:
    """Raises ``ValueError`` if a value is not finite or above ``most``. Traced values pass."""
    check_real(name, value)
    if isinstance(value, jax.core.Tracer):
        return
    array = np.asarray(value, np.float64)
    if not (np.isfinite(array).all() and (array <= most).all()):
        raise ValueError(f"{name} must be finite and at most {most}, got {value}")


def check_not_negative(name: str, value: ArrayLike) -> None:
    """Raises ``ValueError`` if a value is negative or not finite. Traced values pass."""
    check_real(name, value)
    if isinstance(value, jax.core.Tracer):
        return
    array = np.asarray(value, np.float64)
    if not (array >= 0).all():
        raise ValueError(f"{name} must not be negative, got {_number(value)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {_number(value)}")


def check_fraction(name: str, value: Any, *, without: int | None = None) -> None:
    """Raises ``ValueError`` if a value lies outside [0, 1], or is ``without``: 0 or 1. Traced values pass."""
    check_real(name, value)
    if isinstance(value, jax.core.Tracer):
        return
    array = np.asarray(value, np.float64)
    if not ((array >= 0).all() and (array <= 1).all()) or (array == without).any():
        interval = f"{'(' if without == 0 else '['}0, 1{')' if without == 1 else ']'}"
        raise ValueError(f"{name} must lie in {interval}, got {_number(value)}")


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Raises ``ValueError`` unless a value is among the known ones."""
    if isinstance(value, Hashable) and value in known:
        return
    raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {shown(value)}")


def is_key(x: Any) -> bool:
    """Says whether a value is a typed random key, or an array of such keys."""
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_key(name: str, key: Any) -> None:
    """Raises ``ValueError`` unless a value is one random key, typed or of the older form uint32 ``[2]``."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if not (shape == () if is_key(key) else dtype == np.uint32 and shape in ((2,), (4,))):
        got = type(key).__name__ if dtype is None else f"{dtype} of shape {shape}"
        raise ValueError(f"{name} must be one random key, such as jax.random.key(0), got {got}")


def check_mapping(name: str, value: Any, of: str) -> None:
    """Raises ``ValueError`` unless a value is a dict or another mapping; ``of`` says from what to what."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict, {of}, got {type(value).__name__}")


def check_sequence(name: str, value: Any, of: str) -> None:
    """Raises ``ValueError`` unless a value is a sequence or an array ``[n]``, and no string; ``of`` says of what."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim == 1:
        return
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list of {of}, got {type(value).__name__}")


def check_function(name: str, function: Any, form: str) -> None:
    """Raises ``ValueError`` unless a value is a function that can be called in a certain form.

    Args:
      name: the name of the argument.
      function: the value.
      form: its parameters as they are given, such as ``"model, batch, *, key, step"``.
    """
    positional, _, named = form.partition("*")
    arguments = [part for part in positional.split(", ") if part]
    try:
        inspect.signature(function).bind(*arguments, **dict.fromkeys(named.split(", ")[1:]))
    except TypeError:
        got = getattr(function, "__qualname__", None) or f"a {type(function).__name__}"
        raise ValueError(f"{name} must be a function ({form}), got {got}") from None
    except ValueError:
        return  # a function of C, which has no signature
    wrapped = hasattr(function, "__wrapped__")  # such as the result of nnx.jit, a class of Flax
    if not wrapped and type(function).__module__.startswith(("flax.", "distill_jax._model")):
        raise ValueError(f"{name} must be a function ({form}), got a {type(function).__name__}")


def check_fractions(values: Mapping[str, ArrayLike]) -> None:
    """Checks several names and values by :func:`check_fraction`; one error names all that are wrong."""
    wrong = []
    for name, value in values.items():
        try:
            check_fraction(name, value)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))


def need(batch: Any, *names: str) -> None:
    """Raises ``ValueError`` unless a batch is a dict that has these entries."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"the batch must be a dict with {', '.join(map(repr, names))}, got {type(batch).__name__}"
        )
    for name in names:
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}, which is needed here; it has {sorted(batch)}")


def check_tx(name: str, tx: Any) -> None:
    """Raises ``ValueError`` unless a value is an optax transformation."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        got = getattr(tx, "__name__", type(tx).__name__)
        raise ValueError(f"{name} must be an optax transformation, such as optax.adam(1e-3), got {got}")


def warn_if_probabilities(name: str, array: ArrayLike, *, axis: int = -1) -> None:
    """Warns, once per name, if an array of logits looks as if it held probabilities.

    It does if the first rows, about 64, are non-negative and each sums to 1. There must be at least two rows
    and two classes, and not all rows may be one-hot, which logits may well be. Traced arrays are not looked
    at, so a compiled call costs nothing, nor are arrays that are spread over several processes.

    Args:
      name: what the warning calls the array, such as ``"teacher_logits"``.
      array: ``[..., classes]``, any dtype.
      axis: the axis of the classes.
    """
    if name in _warned or isinstance(array, jax.core.Tracer) or not _looks_like_probabilities(array, axis):
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{name} look like probabilities: every row is non-negative and sums to 1. "
        "Give logits, or take the logarithm: jnp.log(p).",
        stacklevel=level,
    )
    _warned.add(name)  # not reached where a filter makes warnings errors: there, every call raises


def _looks_like_probabilities(array: ArrayLike, axis: int) -> bool:
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    elif not array.is_fully_addressable:
        return False
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.ndim < 2:
        return False
    classes = array.shape[axis]
    if array.size > 2**16:  # take a corner to the host: 64 rows, or somewhat more
        axis, wanted, corner = axis % array.ndim, 64, [slice(None)] * array.ndim
        for i in reversed(range(array.ndim)):
            if i != axis:
                corner[i] = slice(wanted)
                wanted = -(-wanted // array.shape[i])
        with jax.ensure_compile_time_eval():  # or, while a function is traced, the corner is traced too
            array = array[tuple(corner)]
    rows = np.moveaxis(np.asarray(array, np.float64), axis, -1).reshape(-1, classes)[:64]
    tolerance = max(1e-3, float(jnp.finfo(array.dtype).eps))
    if min(rows.shape) < 2 or not (rows >= 0).all() or (np.abs(rows.sum(-1) - 1) > tolerance).any():
        return False
    return not (rows.max(-1) == 1).all()


def takes(function: Callable[..., Any], name: str) -> bool:
    """Tells whether a function has a parameter of this name, such as an option of a loss."""
    return name in inspect.signature(function).parameters
