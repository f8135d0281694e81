"""A group is exact only if the network's own code, run with smaller arrays, computes what the silenced one does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import comparisons, widths
from test_units_architectures import numbers, shapes

from distill_jax.compress import units
from distill_jax.models import Model, from_function


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def traced(fn, x=(2, 6, 3), **params):
    model = from_function(fn, shapes(**params))
    return model, units.trace(model, numbers(np.zeros(x)))


@pytest.mark.parametrize("start", [110, 120])
def test_random_programs_that_read_widths(start):
    """``python tests/faults/widths.py`` tries thousands."""
    exact = 0
    for i in range(start, start + 10):
        rng = np.random.default_rng(i)
        fn, params, x, names = widths.program(rng)
        wrong, graph, _ = widths.check(fn, params, x, rng, sets=2)
        assert not wrong, (i, names)
        exact += sum(group.exact for group in graph.groups.values() if group.free)
    assert exact > 4


@pytest.mark.parametrize("name", comparisons.COMPARISONS)
def test_each_comparison_is_needed(name):
    comparison = comparisons.COMPARISONS[name]
    assert next(comparisons.programs(comparison, 1)) == []
    with comparisons.without(comparison):
        assert next(comparisons.programs(comparison, 1))


def either(h, a, b):
    return a if h.shape[-1] > 5 else b


def order(h, x):
    a, b = jnp.sin(h), jnp.cos(h)
    return either(h, a - b, b - a)


def constant_or_value(h, x):
    value = jnp.sin(x[:, :, :1])
    return h * either(h, value, np.full((2, 6, 1), 2.0)) + value


def window(h, *, stride=1, dilation=1, size=2):
    padding = ((0, 0), (0, dilation * (size - 1)), (0, 0))
    return jax.lax.reduce_window(
        h, 0.0, jax.lax.add, (1, size, 1), (1, stride, 1), padding, window_dilation=(1, dilation, 1)
    )


def convolved(h, x, **options):
    """The inputs, which have no units, convolved in a way that the units' number chooses."""
    kernel = np.arange(9.0).reshape(3, 3, 1)
    y = jax.lax.conv_general_dilated(
        x, kernel, padding=[(4, 4)], dimension_numbers=("NWC", "WIO", "NWC"),
        window_strides=(options.get("stride", 1),), rhs_dilation=(options.get("dilation", 1),),
        lhs_dilation=(options.get("spread", 1),),
    )  # fmt: skip
    return h * y[:, :6]


# What code can take from a width of 8, and which comparison notices it
CASES = {
    "number": (lambda h, x: h / h.shape[-1], "computes a number"),
    "number in an array": (lambda h, x: h * np.full(h.shape[-1], h.shape[-1] ** 0.5), "computes a number"),
    "number for a value": (lambda h, x: h * either(h, x[:, :, :1], 2.0), "other operations|number"),
    "constant for a value": (constant_or_value, "computes a number"),
    "counted": (lambda h, x: h * jnp.ones(h.shape[-1]).sum(), "other shapes"),
    "operation": (lambda h, x: either(h, jnp.sin(h), jnp.tanh(h)), "other operations"),
    "order": (order, "another order"),
    "option": (lambda h, x: jnp.sin(h) ** (h.shape[-1] % 3 + 2), "another y in integer_pow"),
    "bound": (lambda h, x: h * x[:, h.shape[-1] % 5, None, :1], "another cut in slice"),
    "stride": (lambda h, x: h * x[:, :: 1 + h.shape[-1] % 2, :1].sum(1, keepdims=True), "in slice"),
    "halves": (lambda h, x: jnp.concatenate([jnp.sin(h[..., : h.shape[-1] // 2]), h[..., h.shape[-1] // 2 :]], -1),
               "another cut in slice|other operations"),
    "every other": (lambda h, x: jnp.concatenate([jnp.sin(h[..., ::2]), h[..., 1::2]], -1), "slice"),
    "window": (lambda h, x: window(h, size=2 + h.shape[-1] % 2)[:, :6], "in reduce_window_sum"),
    "window's stride": (lambda h, x: h + window(h, stride=1 + h.shape[-1] % 2)[:, :1], "reduce_window_sum"),
    "padding": (lambda h, x: h + jnp.pad(x[..., :1], ((0, 0), (h.shape[-1] % 5, 9), (0, 0)))[:, :6], "pad"),
    "reshape": (lambda h, x: jnp.tanh(h.reshape(2, 6, 4, -1).cumsum(3)).reshape(h.shape), "in cumsum|does not run"),
    "length": (lambda h, x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), h, None, h.shape[-1] // 2)[0], "length"),
    "in a loop": (lambda h, x: jax.lax.fori_loop(0, 3, lambda i, c: c / c.shape[-1], h), "number"),
    "in a choice": (lambda h, x: jax.lax.cond(x[0, 0, 0] > 0, lambda c: c / c.shape[-1], jnp.sin, h), "number"),
    "convolution's stride": (lambda h, x: convolved(h, x, stride=1 + h.shape[-1] % 2 // 2), None),
    "convolution's dilation": (lambda h, x: convolved(h, x, dilation=1 + h.shape[-1] % 2), "conv_general"),
    "convolution's spread": (lambda h, x: convolved(h, x, spread=1 + h.shape[-1] % 2), "conv_general"),
    "same program": (lambda h, x: h * jax.lax.reduce(x, 0.0, lambda a, b: a + b * 3, (1,))[:, None, :1], None),
    "program": (lambda h, x: h * jax.lax.reduce(x, 0.0, lambda a, b: a + b * h.shape[-1], (1,))[:, None, :1],
                "in reduce"),
    "same NaN": (lambda h, x: h * jnp.take(x[..., :1], np.arange(6), axis=1), None),
    "number of operands": (lambda h, x: h * jnp.concatenate([x] * either(h, 2, 3), -1)[..., :1], "other operations"),
    "number of results": (lambda h, x: h * jnp.split(jnp.sin(x), either(h, [1, 2], [1]), 2)[0], "other operations"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_code_takes_from_a_width_is_noticed(name):
    function, reason = CASES[name]
    _, graph = traced(lambda p, x: function(x @ p["a"], x) @ p["b"], a=(3, 8), b=(8, 2))
    groups = [group for group in graph.groups.values() if group.free]
    assert groups
    assert all(group.exact_shrunk for group in groups)
    if reason is None:
        assert all(group.exact and group.removable == "exactly" for group in groups)
    else:
        reasons = [group.reason for group in groups if not group.exact]
        assert reasons
        assert all(re.search(reason, found) for found in reasons), reasons
        assert "exactly, adapted" in str(graph)


@pytest.mark.parametrize(("size", "divisor"), [(24, 8), (45, 15), (12, 4)])
def test_a_check_that_a_size_is_divisible_hides_nothing(size, divisor):
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        if h.shape[-1] % divisor:
            raise ValueError(f"the width must be a multiple of {divisor}")
        return h / h.shape[-1] @ p["b"]

    _, graph = traced(fn, a=(3, size), b=(size, 2))
    group = graph.groups["a"]
    assert (group.exact, group.removable, group.runs) == (False, "exactly, adapted", False)
    assert "computes a number" in group.reason


def test_what_takes_fewer_units_of_two_groups_at_once_is_noticed():
    def fn(p, x):
        gain = 2.0 if max(p["a"].shape[1], p["b"].shape[1]) < 8 else 1.0
        x = jnp.tanh(x @ p["a"])
        x = jnp.tanh(x @ p["b"])
        return x @ p["c"] * gain

    _, graph = traced(fn, a=(3, 8), b=(8, 8), c=(8, 2))
    groups = [graph.groups[name] for name in "ab"]
    assert [(group.free, group.exact, group.exact_shrunk) for group in groups] == [(True, False, True)] * 2


def test_results_in_another_order_are_noticed():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"]) @ p["b"]
        results = jnp.sin(h), jnp.cos(h)
        return results if p["a"].shape[1] > 5 else results[::-1]

    _, graph = traced(fn, a=(3, 8), b=(8, 2))
    assert (graph.groups["a"].removable, "order" in graph.groups["a"].reason) == ("exactly, adapted", True)


def test_results_in_another_structure_are_noticed():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"]) @ p["b"]
        return {"even" if p["a"].shape[1] % 2 == 0 else "odd": h}

    _, graph = traced(fn, a=(3, 8), b=(8, 2))
    assert (graph.groups["a"].removable, "structure" in graph.groups["a"].reason) == (
        "exactly, adapted",
        True,
    )


def by_width(p, x):
    h = jnp.tanh(x @ p["a"])
    return h @ p["b"] / h.shape[-1] if h.shape[-1] % 2 else h @ p["b"]


def own(graph, model, kept):
    """The network's own code with the smaller arrays, whatever it does."""
    return units.keep(graph, model, kept).replace(apply_fn=model.apply_fn)


def test_verify_runs_both_networks():
    model, graph = traced(by_width, a=(3, 9), b=(9, 2))
    x, other = numbers(np.zeros((4, 6, 3)), 1), numbers(np.zeros((1, 1, 3)), 2)
    assert graph.groups["a"].removable == "exactly, adapted"
    for count, least in ((8, 1e-2), (5, 0.0)):
        kept = {"a": range(count)}
        assert units.verify(graph, model, kept, x, other) < 1e-12
        assert units.verify(graph, model, kept, x, other, by=own) > least
    plain = model.replace(apply_fn=from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {}).apply_fn)
    graph = units.trace(plain, x)
    assert units.verify(graph, plain, {"a": [0, 4]}, x) < 1e-12
    # The largest of all batches
    assert units.verify(graph, plain, {"a": [0, 4]}, x, by=lambda *given: plain) > 1e-2


def test_imaginary_parts_are_compared():
    model = from_function(
        lambda p, x: (x @ p["a"] @ p["b"]) * (1 + 1j * p["a"].shape[1]), shapes(a=(3, 6), b=(6, 2))
    )
    x = np.ones((2, 3))
    graph = units.trace(model, x)
    assert units.verify(graph, model, {"a": [0, 4]}, x) < 1e-6
    cut = lambda *given: units.keep(*given).replace(apply_fn=model.apply_fn)  # noqa: E731
    assert units.verify(graph, model, {"a": [0, 4]}, x, by=cut) > 0.1


@pytest.mark.parametrize("what", ["outputs", "state", "gradients"])
def test_verify_compares_training(what):
    """The network's own code computes something of a width in training alone."""

    @jax.custom_vjp
    def scaled(h):
        return h

    scaled.defvjp(lambda h: (h, None), lambda _, change: (change / change.shape[-1],))

    def apply_fn(params, state, x, *, key=None):
        h = x @ params["a"]
        if key is not None:
            state = {"last": h.mean(0) * (h.shape[-1] if what == "state" else 1)}
            h = h * h.shape[-1] if what == "outputs" else scaled(h) if what == "gradients" else h
        return h @ params["b"], state

    model = Model(apply_fn, shapes(a=(3, 6), b=(6, 2)), {"last": np.zeros(6)})
    x, kept, key = numbers(np.zeros((4, 3))), {"a": [0, 4]}, jax.random.key(0)
    graph = units.trace(model, x)
    assert units.verify(graph, model, kept, x, by=own) < 1e-12
    assert units.verify(graph, model, kept, x, by=own, key=key) > 0.1
    assert units.verify(graph, model, kept, x, key=key) < 1e-12


def test_verify_says_what_it_cannot_compare():
    model, graph = traced(by_width, a=(3, 9), b=(9, 2))
    x = numbers(np.zeros((2, 6, 3)))
    with pytest.raises(ValueError, match="at least one batch"):
        units.verify(graph, model, {})
    with pytest.raises(ValueError, match="not finite"):
        units.verify(graph, model, {"a": [0]}, x * np.nan)

    def written(p, x):
        return (x @ p["a"]).reshape(2, 6, 3, 3).sum(2) @ p["b"]

    model, graph = traced(written, a=(3, 9), b=(3, 2))
    with pytest.raises(ValueError, match="does not run with the smaller arrays"):
        units.verify(graph, model, {"a": [0, 1]}, x, by=own)

    def shaped(p, x):
        return (x @ p["a"] @ p["b"])[:, : p["a"].shape[1]]

    model, graph = traced(shaped, a=(3, 5), b=(5, 2))
    with pytest.raises(ValueError, match=r"outputs of shapes \[\(2, 3, 2\)\]"):
        units.verify(graph, model, {"a": [0, 1, 2]}, x, by=own)


def test_code_that_checks_shapes_is_asked_once_for_each_part_of_it():
    """However often a block is repeated, the number of traces is the same."""

    def fn(p, x):
        calls.append(1)
        for a, b in p["blocks"]:
            if a.shape != (3, 7):
                raise ValueError("a has another shape")
            x = x + jnp.tanh(x @ a) @ b
        return x @ p["last"]

    counts = []
    for depth in (2, 9):
        calls: list[int] = []
        params = {"blocks": [(np.ones((3, 7)), np.ones((7, 3)))] * depth, "last": np.ones((3, 2))}
        graph = units.trace(from_function(fn, params), np.ones((2, 3)))
        counts.append(len(calls))
        exact = [group for group in graph.groups.values() if group.free and group.exact]
        assert len(exact) == depth
        assert {group.removable for group in exact} == {"exactly, adapted"}
    assert counts[0] == counts[1] < 8


def check(h):
    raise ValueError("another width was expected")


@pytest.mark.parametrize(
    ("fails", "own"),
    [
        (lambda h: jnp.einsum("bd,bd->b", h, h[:, 1:]), False),
        (lambda h: h.reshape(7, -1), False),
        (lambda h: h + np.ones(7), False),
        (check, True),
    ],
)
def test_an_error_of_an_operation_is_no_check_of_shapes(fails, own):
    """Other sizes may fit by chance, so such a group is not exact."""

    def fn(p, x):
        h = x @ p["a"]
        return (h if h.shape[1] == 8 else fails(h)) @ p["b"]

    _, graph = traced(fn, x=(2, 3), a=(3, 8), b=(8, 2))
    group = graph.groups["a"]
    assert (group.exact, group.runs, group.exact_shrunk) == (own, False, True)
