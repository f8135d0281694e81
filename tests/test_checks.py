"""What the checks of arguments let pass: valid input must not be refused, nor copied from a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax import _checks, losses
from distill_jax.compress import search
from distill_jax.models import from_function


def test_integers_on_a_device_are_not_copied(monkeypatch):
    ids = jnp.arange(3)
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        _checks.check_integers("ids", ids)
    monkeypatch.setattr(_checks.np, "asarray", lambda x: pytest.fail("was copied"))
    _checks.check_integers("ids", ids)


def test_integers_of_64_bits_without_sign_must_fit():
    _checks.check_integers("ids", np.array([1], np.uint64))
    for ids in (np.array([2**63], np.uint64), [2**63]):
        with pytest.raises(
            ValueError, match="ids must be integers of at most 63 bits, got 9223372036854775808"
        ):
            _checks.check_integers("ids", ids)


@pytest.mark.parametrize("value", [[0.5], (0.5,), range(1), np.array([0.5]), jnp.array([0.5])])
def test_sequences(value):
    _checks.check_sequence("shares", value, "shares")


@pytest.mark.parametrize("value", ["ab", {0.5}, 0.5, np.float32(0.5), np.ones((1, 1)), iter([0.5])])
def test_what_is_no_sequence(value):
    with pytest.raises(ValueError, match="shares must be a list of shares, got"):
        _checks.check_sequence("shares", value, "shares")


@pytest.mark.parametrize(
    "value", [None, 0, "ab", [[1], [2, 3]], np.zeros(2), jax.random.split(jax.random.key(0))]
)
def test_what_is_no_key(value):
    with pytest.raises(ValueError, match="key must be one random key"):
        _checks.check_key("key", value)


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0), np.zeros(2, np.uint32)])
def test_keys(key):
    _checks.check_key("key", key)
    jax.jit(lambda key: _checks.check_key("key", key))(key)


def test_functions_compiled_by_jax_and_flax():
    for compiled in (jax.jit, nnx.jit):
        function = compiled(lambda params, x: params * x)
        _checks.check_function("fn", function, "params, x")
        assert from_function(function, 2.0)(3.0) == 6
    with pytest.raises(ValueError, match="got a Linear"):
        _checks.check_function("fn", nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "x")


def test_an_axis_may_be_an_integer_of_numpy():
    x = np.zeros((2, 3), np.float32)
    assert losses.kl(x, x, axis=np.int64(1)).shape == (2,)
    with pytest.raises(ValueError, match="axis must be an integer"):
        losses.kl(x, x, axis=True)


def test_shares_may_be_an_array():
    def attempt(edit):
        return 1 / edit.share, 100 * edit.share

    options = {"operators": ["prune"], "budget": 2.0, "refinements": 0}
    found = search.find_smallest(attempt, (1.0, 100.0), shares=np.array([0.5, 0.25]), **options)
    assert list(found.trials) == ["prune 0.5", "prune 0.25"]
    with pytest.raises(ValueError, match="operators and shares"):
        search.find_smallest(attempt, (1.0, 100.0), shares=np.array([]), **options)
