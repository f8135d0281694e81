"""Rules of single primitives: which units they leave free, and that removing these equals silencing them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_units_architectures import numbers, shapes

from distill_jax.compress import units
from distill_jax.compress.units._trace import adapted, program, rules
from distill_jax.models import from_function

P = PartitionSpec


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


def free_units(fn, given, *, keep=False):
    """Traces a network, removes units of all groups that are free, and compares; returns their numbers of units."""
    params = shapes(**given)
    model, x = from_function(fn, params), numbers(np.zeros((2, 3)))
    graph = units.trace(model, x)
    assert not graph.notes
    groups = {name: group for name, group in graph.groups.items() if group.free}
    kept = {name: range(1, group.size) for name, group in groups.items() if group.exact_shrunk}
    if kept:
        assert units.verify(graph, model, kept, x, by=units.shrink) < 1e-12
    again = {name: kept[name] for name in kept if groups[name].runs}
    assert bool(again) == keep
    if again:
        assert units.verify(graph, model, again, x) < 1e-12
    return {name: group.size for name, group in groups.items()}


def hidden(p, x):
    return jnp.tanh(x @ p["a"])


def sequence(p, x):
    return jnp.einsum("bi,ito->bto", x, p["a"])


def interleaved(p, x):
    h = hidden(p, x)
    return jnp.stack([-h[:, 1::2], h[:, ::2]], -1).reshape(2, 8) * jnp.tile(p["c"], 2) @ p["b"]


def unstacked(p, x):
    q, k, v = jnp.unstack((x @ p["a"]).reshape(2, 3, -1), axis=1)
    return jnp.tanh(q * k + v) @ p["b"]


def noisy(p, x):
    noise = jax.random.normal(jax.random.split(jax.random.key(0))[1], (2, p["a"].shape[1]))
    return (hidden(p, x) + p["c"] * noise) @ p["b"]


INDICES = np.array([0, 1])
# Program, shapes of its parameters, the numbers of its free units, whether its own code runs with fewer
CASES = {
    "stack": (interleaved, {"a": (3, 8), "c": (4,), "b": (8, 2)}, {"a": 2}, False),
    "unstack": (unstacked, {"a": (3, 15), "b": (5, 2)}, {"a": 5}, True),
    "tile": (
        lambda p, x: jnp.tile(hidden(p, x), (1, 2)) * p["s"] @ p["b"],
        {"a": (3, 4), "s": (8,), "b": (8, 2)}, {"a": 4}, True,
    ),
    "segment_sum": (
        lambda p, x: jax.ops.segment_sum(hidden(p, x), np.array([1, 1]), 3) @ p["b"],
        {"a": (3, 4), "b": (4, 2)}, {"a": 4}, True,
    ),
    "segment_max": (
        lambda p, x: jax.ops.segment_max(hidden(p, x), INDICES, 2) @ p["b"],
        {"a": (3, 4), "b": (4, 2)}, {"a": 4}, True,
    ),
    "set": (
        lambda p, x: hidden(p, x).at[1].set(p["c"]) @ p["b"],
        {"a": (3, 4), "c": (4,), "b": (4, 2)}, {"a": 4}, True,
    ),
    "set for each example": (
        lambda p, x: jax.vmap(lambda h, i: h.at[i].set(p["c"]))(sequence(p, x), INDICES).sum(1) @ p["b"],
        {"a": (3, 3, 4), "c": (4,), "b": (4, 2)}, {"a": 4}, True,
    ),
    "times": (
        lambda p, x: hidden(p, x).at[INDICES[:1]].mul(jnp.cos(p["c"])).sum(-1)[:, None] * p["b"],
        {"a": (3, 4), "c": (4,), "b": (2,)}, {"a": 4}, True,
    ),
    "index of each example": (
        lambda p, x: jax.vmap(lambda h, i: h[i])(sequence(p, x), INDICES) @ p["b"],
        {"a": (3, 3, 4), "b": (4, 2)}, {"a": 4}, True,
    ),
    "take_along_axis": (
        lambda p, x: jnp.take_along_axis(sequence(p, x), INDICES[:, None, None], 1)[:, 0] @ p["b"],
        {"a": (3, 3, 4), "b": (4, 2)}, {"a": 4}, True,
    ),
    "fft": (
        lambda p, x: jnp.fft.rfft(hidden(p, x), axis=0).real @ p["b"],
        {"a": (3, 4), "b": (4, 2)}, {"a": 4}, True,
    ),
    "random numbers": (noisy, {"a": (3, 6), "c": (6,), "b": (6, 2)}, {"a": 6}, False),
    "ragged_dot": (
        lambda p, x: jax.lax.ragged_dot(hidden(p, x), p["b"], np.array([1, 1])),
        {"a": (3, 4), "b": (2, 4, 2)}, {"a": 4}, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_units_pass_through(name):
    fn, given, expected, keep = CASES[name]
    assert free_units(fn, given, keep=keep) == expected


SHARDED = {
    "data": lambda x, a, b: jnp.tanh(x @ a) @ b,
    "sum": lambda x, a, b: jax.lax.psum(jnp.tanh(x @ a) @ b, "d"),
    "gathered": lambda x, a, b: jax.lax.all_gather(jnp.tanh(x @ a), "d", axis=1, tiled=True) @ b,
    "scattered": lambda x, a, b: jnp.tanh(jax.lax.psum_scatter(x @ a, "d", scatter_dimension=1, tiled=True)) @ b,
    "exchanged": lambda x, a, b: jax.lax.all_to_all(jnp.tanh(x @ a), "d", 1, 0, tiled=True) @ b,
    "passed on": lambda x, a, b: jax.lax.ppermute(jnp.tanh(x @ a), "d", [(0, 1)]) @ b,
}  # fmt: skip
# How x, a and b are split, how the result is, the numbers of free units
SPECS = {
    "data": ((P("d"), P(), P()), P("d"), {"a": 6}),
    "sum": ((P(), P(None, "d"), P("d")), P(), {"a": 3}),
    "gathered": ((P(), P(None, "d"), P()), P(), {"a": 3}),
    "scattered": ((P(), P(), P("d")), P(None, "d"), {"a": 3}),
    "exchanged": ((P("d"), P(), P("d")), P("d"), {"a": 3}),
    "passed on": ((P("d"), P(), P()), P("d"), {"a": 6}),
}


@pytest.mark.parametrize("name", SPECS)
def test_sharded_programs(name, mesh):
    ins, out, expected = SPECS[name]
    mapped = jax.shard_map(SHARDED[name], mesh=mesh, in_specs=ins, out_specs=out, check_vma=False)
    given = {"a": (3, 6), "b": (6, 2)}
    assert free_units(lambda p, x: mapped(x, p["a"], p["b"]), given, keep=True) == expected


def test_units_with_random_numbers_of_their_own_cannot_be_merged():
    model, x = from_function(noisy, shapes(a=(3, 6), c=(6,), b=(6, 2))), numbers(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="random_bits gives each of its units other numbers"):
        units.merge(units.trace(model, x), model, {"a": 3})


def test_a_sharding_constraint_that_fewer_units_cannot_keep_is_left_out(mesh):
    def fn(p, x):
        return jax.lax.with_sharding_constraint(hidden(p, x), NamedSharding(mesh, P(None, "d"))) @ p["b"]

    given = {"a": (3, 6), "b": (6, 2)}
    assert free_units(fn, given, keep=True) == {"a": 6}
    model, x = from_function(fn, shapes(**given)), numbers(np.zeros((2, 3)))
    small = units.shrink(units.trace(model, x), model, {"a": range(5)})
    # Outside of jit, JAX refuses a constraint that an axis cannot keep
    np.testing.assert_allclose(small(x), hidden(small.params, x) @ small.params["b"], rtol=1e-12)


def test_what_is_found_by_numbers_is_frozen():
    """Along the axes that indices point into, and where the examples of a product are dealt out."""
    for fn, given in (
        (lambda p, x: hidden(p, x).at[:, np.array([0, 2])].set(1.0) @ p["b"], {"a": (3, 4), "b": (4, 2)}),
        (lambda p, x: hidden(p, x).at[:, :2].add(x[:, :2]) @ p["b"], {"a": (3, 4), "b": (4, 2)}),
        (lambda p, x: jax.ops.segment_sum(hidden(p, x).T, np.array([0, 1, 1, 0]), 2).T, {"a": (3, 4)}),
        (lambda p, x: jnp.fft.fft(hidden(p, x)).real @ p["b"], {"a": (3, 4), "b": (4, 2)}),
        (lambda p, x: sum(jnp.unstack(hidden(p, x), axis=1)), {"a": (3, 4)}),
        (lambda p, x: jax.lax.ragged_dot(hidden(p, x).T, p["b"], np.array([1, 3])), {"a": (3, 4), "b": (2, 2, 2)}),
    ):  # fmt: skip
        assert "a" not in free_units(fn, given)


def test_what_is_filled_in_where_an_index_is_outside_counts():
    """Rows that are not there are of ones, also for a unit that is silenced."""

    def fn(p, x, fill):
        rows = jnp.take(p["a"], np.array([0, 9]), axis=0, mode="fill", fill_value=fill)
        return rows.sum(-1) * x[:, 0]

    for fill, exact in ((1.0, False), (0.0, True)):
        model = from_function(lambda p, x, fill=fill: fn(p, x, fill), shapes(a=(3, 4)))
        (group,) = [g for g in units.trace(model, numbers(np.zeros((2, 3)))).groups.values() if g.free]
        assert group.exact_shrunk is exact


def kernel(x, scale, y):
    y[...] = jnp.tanh(x[...]) * scale[...] / 4


def gain(x, scale):
    """A kernel of which no rule is known."""
    return pallas.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(
        x, jnp.broadcast_to(scale, x.shape)
    )


def plain(x, scale, **_):
    return jnp.tanh(x) * scale / 4


@pytest.fixture
def registered(monkeypatch):
    """Forgets afterwards what a test registers."""
    for table in (program.OWN, rules.RULES, adapted.ADAPTED):
        monkeypatch.setitem(table, "pallas_call:kernel", None)
        del table["pallas_call:kernel"]


def network(p, x):
    return gain(x @ p["a"], p["c"]) @ p["b"]


def test_a_kernel_of_ones_own(registered):
    given = {"a": (3, 4), "c": (4,), "b": (4, 2)}
    graph = units.trace(from_function(network, shapes(**given)), numbers(np.zeros((2, 3))))
    assert graph.notes[0].startswith("no rule for pallas_call:kernel")
    assert not any(group.free for group in graph.groups.values())

    operands = [jax.ShapeDtypeStruct((3, 5), "float64")] * 2
    called = []
    for run in (None, lambda x, scale, **_: called.append(1) or gain(x, scale)):
        units.register_rule("pallas_call:kernel", plain, run=run)
        assert free_units(network, given, keep=True) == {"a": 4}
        found = units.check_rule(gain, *operands, programs=6)
        assert found == {f"operand {i}, axis {a}": "exactly" for i in range(2) for a in range(2)}
    assert called


WRONG = {
    "another function": (lambda x, scale, **_: x * scale, None, "differ by"),
    "zeros that are none": (plain, lambda x, scale, **_: gain(x, scale) + 1, "differ by"),
    "a number from a size": (plain, lambda x, scale, **_: gain(x, scale) * x.size, "differ by"),
    "another shape": (lambda x, scale, **_: x.sum(), None, r"gives float64\[\] where .* gives float64\[3, 5\]"),
    "sizes written in": (plain, lambda x, scale, **_: gain(x, scale).reshape(3, 5), "does not run"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_noticed(name, registered):
    reference, run, message = WRONG[name]
    units.register_rule("pallas_call:kernel", reference, run=run)
    with pytest.raises(ValueError, match=message):
        units.check_rule(gain, *[jax.ShapeDtypeStruct((3, 5), "float64")] * 2, programs=6)


def test_rules_are_for_primitives_without_one():
    with pytest.raises(ValueError, match="no rule for pallas_call:kernel"):
        units.check_rule(gain, *[jax.ShapeDtypeStruct((3, 5), "float64")] * 2)
    with pytest.raises(ValueError, match="the library has a rule for 'tanh'"):
        units.register_rule("tanh", jnp.tanh)


OPERATIONS = {
    "stack": (lambda a, b: jnp.stack([a, b], 1), (3, 4), (3, 4)),
    "unstack": (lambda a: jnp.unstack(a, axis=1), (4, 2, 3)),
    "tile": (lambda a: jnp.tile(a, (2, 1, 3)), (4, 1, 3)),
    "set": (lambda a, b: a.at[:, 1].set(b), (3, 4, 5), (3, 5)),
    "add": (lambda a, b: a.at[INDICES].add(b), (3, 4), (2, 4)),
    "times": (lambda a, b: a.at[INDICES].mul(b), (3, 4), (2, 4)),
    "least": (lambda a, b: a.at[INDICES].min(b), (3, 4), (2, 4)),
    "each its own": (jax.vmap(lambda a, b, i: a.at[i].set(b)), (2, 3, 4), (2, 4), INDICES),
    "take": (lambda a, i: jnp.take_along_axis(a, i[:, None, None], 1), (2, 3, 4), INDICES),
    "pad": (lambda a: jnp.pad(a, ((1, 0), (0, 2)), constant_values=2.0), (3, 4)),
    "filled": (lambda a: jnp.take(a, np.array([0, 9]), axis=0, mode="fill", fill_value=3), (3, 4)),
    "fft": (lambda a: jnp.abs(jnp.fft.rfft2(a, axes=(0, 1))), (3, 4, 5)),
    "ragged": (lambda a, b: jax.lax.ragged_dot(a, b, np.array([1, 2])), (3, 4), (2, 4, 5)),
    "complex": (lambda a, b: jax.lax.complex(a, b).real * b, (3, 4), (3, 4)),
}  # fmt: skip

# Axes of the operands that have removable units, and those of them whose zeros stay zeros in the results
AXES = {
    "stack": (4, 4), "unstack": (2, 2), "tile": (2, 2), "set": (4, 4), "add": (2, 2), "times": (2, 2), "least": (2, 2),
    "each its own": (2, 2), "take": (1, 1), "pad": (2, 0), "filled": (1, 0), "fft": (1, 1), "ragged": (3, 3),
    "complex": (4, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_rules_of_the_library(name):
    function, *given = OPERATIONS[name]
    operands = [jax.ShapeDtypeStruct(x, "float64") if isinstance(x, tuple) else x for x in given]
    found = units.check_rule(function, *operands, programs=8)
    assert set(found.values()) == {"exactly"}  # each in one of the programs at least
    drawn = {str(i): jnp.ones(x.shape) for i, x in enumerate(operands) if isinstance(given[i], tuple)}

    def sums(params, x):
        results = function(*[params.get(str(i), y) for i, y in enumerate(operands)])
        return x + sum(y.sum() for y in jax.tree.leaves(results))

    graph = units.trace(from_function(sums, drawn), jnp.ones(1))
    exact = {part[:2] for g in graph.groups.values() if g.free and g.exact_shrunk for part in g.slices}
    assert (len(found), len(exact)) == AXES[name]
