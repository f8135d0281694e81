"""Prune, merge, select, inject: budgets are met, duplicates vanish, what is saved can be loaded."""

import functools
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_units_architectures import compiled, conv, lstm, numbers, shapes

from distill_jax import metrics, models
from distill_jax.compress import units
from distill_jax.compress.units import costs, scores
from distill_jax.compress.units._trace import roles
from distill_jax.models import Model, from_function
from distill_jax.train.checkpoints import Checkpoints


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"] + p["c"]) @ p["b"]) @ p["d"]


def traced(a=12, b=20):
    model = from_function(mlp, shapes(a=(3, a), c=(a,), b=(a, b), d=(b, 2)))
    return model, units.trace(model, numbers(np.zeros((1, 3))))


# --- prune ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("across", ["network", "group"])
@pytest.mark.parametrize(
    ("of", "budget"), [(costs.share, 0.5), (costs.parameters, 150), (costs.flops, 300), (costs.share, 1.0)]
)
def test_budgets_are_met_and_nothing_more_goes(of, budget, across):
    model, graph = traced()
    given = scores.l2(graph, model)
    kept = units.prune(graph, given, budget, of=of, across=across)
    assert of(graph, kept) <= budget
    for name, indices in kept.items():
        assert set(indices) == set(np.argsort(-given[name])[: len(indices)].tolist())
    if budget == 1.0:
        assert kept == {"a": list(range(12)), "b": list(range(20))}
    elif across == "network":
        # The removed unit of the highest score fits in no more
        gone = [(given[n][i], n, i) for n in kept for i in set(range(len(given[n]))) - {*kept[n]}]
        _, name, unit = max(gone)
        assert of(graph, kept | {name: sorted([*kept[name], unit])}) > budget
        assert max(gone)[0] <= min(given[n][i] for n in kept for i in kept[n] if len(kept[n]) > 1)
    else:
        shares = [len(indices) / len(given[name]) for name, indices in kept.items()]
        assert abs(shares[0] - shares[1]) < 0.1


def test_no_group_is_emptied_and_sizes_are_multiples():
    _, graph = traced()
    given = {"a": np.zeros(12), "b": np.ones(20)}
    least = units.prune(graph, given, 2 / 32)
    assert least == {"a": [0], "b": [0]}
    assert [len(i) for i in units.prune(graph, given, 0.55, multiple=8).values()] == [8, 8]
    assert [len(i) for i in units.prune(graph, given, 0.9, multiple=8).values()] == [8, 20]
    with pytest.raises(ValueError, match="with 16 units per group"):
        units.prune(graph, {"a": given["a"]}, 0.5, multiple=16)


def test_a_measured_latency_is_a_cost_like_any_other():
    _, graph = traced()
    asked = []

    def milliseconds(graph, kept):
        asked.append(costs.latency(graph, kept, repeats=2))
        return costs.share(graph, kept) * 4

    kept = units.prune(graph, {"b": np.arange(20.0)}, 1.0, of=milliseconds)
    assert kept == {"b": list(range(15, 20))}
    assert all(0 < t < 1e4 for t in asked)
    assert len(asked) < 9


def test_the_report_counts_before_and_after():
    _, graph = traced()
    found = units.report(graph, {"a": range(6)}, repeats=2)
    assert found["units"] == (32, 26)
    assert found["parameters"] == (36 + 12 + 240 + 40, 18 + 6 + 120 + 40)
    assert found["bytes"] == tuple(4 * n for n in found["parameters"])
    before, after = found["flops"]
    assert 2 * (36 + 240 + 40) <= before <= 2 * (36 + 240 + 40) + 100
    assert before - after == pytest.approx(2 * (18 + 120), abs=30)
    assert min(found["latency_ms"]) > 0


@pytest.mark.parametrize("unroll", [0, 1, 2])
def test_a_loops_body_counts_as_often_as_it_runs(unroll):
    def fn(p, x):
        def cell(h, _):
            return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), h, None, 3)[0], None

        h = jax.lax.scan(cell, x @ p["a"], None, 5, unroll=unroll)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda h: cell(h, None)[0], jnp.sin, h) @ p["b"]

    graph = units.trace(from_function(fn, shapes(a=(3, 8), w=(8, 8), b=(8, 2))), np.zeros((1, 3)))
    for kept, n in [({}, 8), ({"a": range(4)}, 4)]:
        products = 2 * n * (3 + 18 * n + 2)
        assert products <= costs.flops(graph, kept) <= products + 150


def test_flops_that_are_not_known_are_an_error(monkeypatch):
    def fn(p, x):
        h = jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x @ p["a"])
        )[1]
        return h @ p["b"]

    model = from_function(fn, shapes(a=(3, 8), w=(8, 8), b=(8, 2)))
    graph = units.trace(model, np.zeros((1, 3)))
    with pytest.raises(ValueError, match="has a while loop"):
        costs.flops(graph, {})
    assert "flops" not in units.report(graph, {}, repeats=1)
    _, graph = traced()
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    with pytest.raises(ValueError, match="XLA counts no FLOPs"):
        units.prune(graph, {"a": np.ones(12)}, 100, of=costs.flops)


def test_model_state_is_no_parameter():
    def apply_fn(params, state, x, *, key=None):
        return jnp.tanh(x @ params["a"] - state["mean"]) @ params["b"], state

    model = Model(apply_fn, shapes(a=(3, 4), b=(4, 2)), shapes(mean=(4,)))
    graph = units.trace(model, np.zeros((1, 3)))
    found = units.report(graph, {"a": [0, 2, 3]}, repeats=1)
    assert found["parameters"] == (20, 15)
    (expected,) = metrics.costs([jax.tree.map(jnp.asarray, model)], np.zeros(3), repeats=1)
    assert (expected["parameters"], expected["bytes"]) == (20, found["bytes"][0])
    kept = units.prune(graph, {"a": np.arange(4.0)}, 15, of=costs.parameters)
    assert kept == {"a": [1, 2, 3]}


# --- merge ---------------------------------------------------------------------------------------


def split_units(graph, model, name, of, rng):
    """A network that does the same with more units: unit i of it is unit ``of[i]`` of this one."""
    share = rng.uniform(0.2, 1, len(of))
    share /= np.bincount(of, share)[of]
    role = roles.roles(graph)[name]

    def one(leaf, path):
        for slices, scale in ((role.incoming, np.ones(len(of))), (role.outgoing, share)):
            for s in slices:
                if s.path == path:
                    size = graph.groups[name].size
                    blocks = np.moveaxis(leaf, s.axis, 0)
                    places = roles.positions(s.index, size)
                    inner = 1 if places.shape[1] == 1 else places[0, 1] - places[0, 0] != 1
                    grown = blocks[places][of]
                    grown = grown * scale.reshape(-1, *[1] * (grown.ndim - 1))
                    grown = np.moveaxis(grown, 1, 0) if inner else grown
                    leaf = np.moveaxis(grown.reshape(-1, *blocks.shape[1:]), 0, s.axis)
        return leaf

    return model.replace(params={name: one(leaf, name) for name, leaf in model.params.items()})


def flat(p, x):
    x = jax.nn.relu(conv(p["a"], x) * p["s"] + p["t"])
    return jnp.tanh(x.reshape(len(x), -1) @ p["w"]) @ p["v"]


def gated(p, x):
    gate, up = jnp.split(x @ p["g"], 2, -1)
    return (jax.nn.silu(gate) * up) @ p["o"]


MERGED = {
    "dense": (mlp, {"a": (3, 4), "c": (4,), "b": (4, 5), "d": (5, 2)}, (6, 3), ["a", "b"]),
    "conv": (
        flat,
        {"a": (3, 3, 2, 3), "s": (3,), "t": (3,), "w": (27, 4), "v": (4, 2)},
        (2, 3, 3, 2),
        ["a", "w"],
    ),
    "gated": (gated, {"g": (3, 8), "o": (4, 3)}, (6, 3), ["g"]),
    "lstm": (lstm, {"wx": (3, 12), "wh": (3, 12), "b": (12,), "out": (3, 2)}, (4, 2, 3), ["wx"]),
}


@pytest.mark.parametrize("kind", MERGED)
def test_units_that_were_doubled_and_split_are_merged_again(kind):
    fn, given, x, names = MERGED[kind]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        model, x = from_function(fn, shapes(**given)), numbers(np.zeros(x), 1)
        grown, sizes = model, {}
        for name in names:
            graph = units.trace(grown, x)
            size = graph.groups[name].size
            of = rng.permutation(np.concatenate([np.arange(size), rng.integers(0, size, 3)]))
            grown, sizes[name] = split_units(graph, grown, name, of, rng), size
        expected = compiled(model, x)
        np.testing.assert_allclose(compiled(grown, x), expected, rtol=1e-9)
        graph = units.trace(grown, x)
        for options in ({}, {"incoming": "best", "scores": scores.l2(graph, grown)}):
            merged, kept = units.merge(graph, grown, sizes, **options)
            small = units.keep(graph, merged, kept)
            assert jax.tree.map(np.shape, small.params) == jax.tree.map(np.shape, model.params)
            np.testing.assert_allclose(compiled(small, x), expected, rtol=1e-6)
            np.testing.assert_allclose(compiled(units.shrink(graph, merged, kept), x), expected, rtol=1e-6)


def test_what_is_alike_can_be_told_otherwise():
    model, graph = traced(a=4)
    params = model.params
    merged, kept = units.merge(graph, model, {"a": 2}, likeness={"a": np.eye(4)[[0, 1, 1, 0]]})
    assert kept == {"a": [0, 1]}
    merged = merged.params
    np.testing.assert_allclose(merged["b"][0], params["b"][0] + params["b"][3], rtol=1e-12)
    np.testing.assert_allclose(merged["a"][:, 1], params["a"][:, 1:3].mean(1), rtol=1e-12)
    weights = {"a": np.array([3.0, 0, 2, 1])}
    merged, kept = units.merge(
        graph, model, {"a": 2}, likeness={"a": np.eye(4)[[0, 1, 1, 0]]}, scores=weights
    )
    merged = merged.params
    assert kept == {"a": [0, 2]}
    a = params["a"]
    np.testing.assert_allclose(merged["a"][:, 0], 0.75 * a[:, 0] + 0.25 * a[:, 3], rtol=1e-12)
    np.testing.assert_allclose(merged["a"][:, 2], a[:, 2], rtol=1e-12)
    assert merged["d"] is params["d"]


# --- select and inject ---------------------------------------------------------------------------


def stack(p, x):
    x = x @ p["in"]
    for name in sorted(p["blocks"]):
        x = x + jax.nn.gelu(x @ p["blocks"][name]["u"]) @ p["blocks"][name]["v"]
    return x @ p["out"]


def stacked(width, hidden, layers):
    block = {"u": (width, hidden), "v": (hidden, width)}
    params = shapes(**{"in": (3, width), "blocks": {f"{i}": block for i in range(layers)}, "out": (width, 2)})
    model = from_function(stack, params)
    return model, units.trace(model, numbers(np.zeros((1, 3))))


def test_a_teachers_units_fit_into_a_student_of_fewer_layers():
    teacher, graph = stacked(8, 10, 4)
    student, small = stacked(4, 5, 2)
    layers = {"blocks.1": "blocks.3"}
    given = scores.l2(graph, teacher)
    best = {name: sorted(np.argsort(-given[name])[: (4 if name == "in" else 5)].tolist())
            for name in ("in", "blocks.0.u", "blocks.3.u")}  # fmt: skip
    for how, expected in [
        ("uniform", {"in": [0, 2, 4, 6], "blocks.0.u": [0, 2, 4, 6, 8], "blocks.3.u": [0, 2, 4, 6, 8]}),
        ("block", {"in": [0, 1, 2, 3], "blocks.0.u": list(range(5)), "blocks.3.u": list(range(5))}),
        (given, best),
    ]:  # fmt: skip
        kept = units.select(graph, small, how=how, layers=layers)
        assert kept == expected
    done = units.inject(student, units.keep(graph, teacher, kept), layers=layers)
    assert not done.kept
    assert done.taken["blocks.1.u"] == "blocks.3.u"
    params = teacher.params
    np.testing.assert_array_equal(
        done.model.params["blocks"]["1"]["u"],
        params["blocks"]["3"]["u"][np.ix_(kept["in"], kept["blocks.3.u"])],
    )
    # The function is that of the teacher with those units and layers alone
    rest = teacher.replace(params={
        "in": params["in"], "out": params["out"],
        "blocks": {"0": params["blocks"]["0"], "3": params["blocks"]["3"]},
    })  # fmt: skip
    two = units.trace(rest, numbers(np.zeros((1, 3))))
    x = numbers(np.zeros((5, 3)), 3)
    np.testing.assert_allclose(done.model(x), units.keep(two, rest, kept)(x), rtol=1e-5)


def test_a_student_of_fewer_layers_says_which_are_the_teachers():
    def graph_of(*sizes):
        params = {str(i): np.ones(pair, np.float32) for i, pair in enumerate(itertools.pairwise(sizes))}

        def fn(p, x):
            for i in range(len(p) - 1):
                x = jnp.tanh(x @ p[str(i)])
            return x @ p[str(len(p) - 1)]

        return units.trace(from_function(fn, params), np.zeros((1, sizes[0])))

    teacher, student = graph_of(3, 8, 4, 4), graph_of(3, 4, 4)
    # Without layers the student's outputs would be the teacher's second hidden layer, of equal shape
    with pytest.raises(ValueError, match=r"1, axis 1, has groups \[\], but the teacher's 1"):
        units.select(teacher, student)
    with pytest.raises(ValueError, match=r"1, axis 1, has groups \[\]"):  # one output is no unit
        units.select(graph_of(3, 8, 4, 1), graph_of(3, 4, 1))
    assert units.select(graph_of(3, 8, 4), graph_of(3, 1, 4)) == {"0": [0]}
    kept = units.select(teacher, student, layers={"1": "2"})
    assert kept == {"0": [0, 2, 4, 6], "1": [0, 1, 2, 3]}


def test_injection_says_what_it_took_and_what_it_kept():
    student = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(9), "c": np.zeros(2), "d": np.ones(1)}
    teacher = {"a": np.arange(24.0).reshape(4, 6), "b": np.ones(4), "c": np.ones((2, 1))}
    student, teacher = (
        Model(print, params, {"m": np.full(2, i)}) for i, params in enumerate((student, teacher))
    )
    done = units.inject(student, teacher)
    np.testing.assert_array_equal(done.model.params["a"], teacher.params["a"][::2, ::2])
    assert done.model.params["a"].dtype == np.float32
    assert done.taken == {"a": "a", "m": "m"}
    np.testing.assert_array_equal(done.model.state["m"], 1)
    assert done.model.params["d"] is student.params["d"]
    assert done.kept == {
        "b": "its shape (9,) does not fit into the teacher's (4,)",
        "c": "its shape (2,) does not fit into the teacher's (2, 1)",
        "d": "the teacher has no d",
    }
    assert str(done).splitlines()[0] == "a: from a"
    with pytest.raises(ValueError, match="nothing of it fits"):
        units.inject(Model(print, {"x": np.zeros(3)}), teacher)


# --- what follows --------------------------------------------------------------------------------


def test_the_optimizers_state_follows_what_was_pruned():
    model, graph = traced()
    params, tx = model.params, optax.adam(0.1)
    x, y = numbers(np.zeros((8, 3)), 1), numbers(np.zeros((8, 2)), 2)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: ((mlp(p, x) - y) ** 2).mean())(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params))
    kept = units.prune(graph, scores.l1(graph, params), 0.5)
    pruned = step(units.keep(graph, params, kept), units.keep(graph, state, kept))
    silenced = step(units.silence(graph, params, kept), units.silence(graph, state, kept))
    for a, b in zip(jax.tree.leaves(pruned), jax.tree.leaves(units.keep(graph, silenced, kept)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


FRESH = """
import json, sys
import jax, numpy as np
from flax import linen
from distill_jax import models
from distill_jax.compress import units
from distill_jax.train.checkpoints import Checkpoints

class Net(linen.Module):
    width: int
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(self.width)(x))
        return linen.Dense(2)(x)

def build(width):
    return models.from_linen(Net(width), jax.random.key(0), np.zeros((1, 3)))

def large():
    model = build(8)
    return model, units.trace(model, np.zeros((1, 3)))

if __name__ == "__main__":
    model, graph = large()
    x = np.linspace(-1, 1, 3)[None].astype(np.float32)
    record = json.loads(open(sys.argv[1] + "/record.json").read())
    small = units.shrink(graph, model, record["kept"])
    with Checkpoints(sys.argv[1] + "/small") as saved:
        arrays, _ = saved.restore({"params": small.params})
    small = small.replace(**arrays)
    net = build(record["widths"]["Dense_0.kernel"]).replace(**arrays)
    print(json.dumps([np.asarray(each(x)).tolist() for each in (small, net)]))
"""


def test_a_fresh_process_loads_the_small_model(tmp_path):
    program = tmp_path / "fresh.py"
    program.write_text(FRESH)
    code: dict = {"__name__": "fresh"}
    exec(compile(FRESH, "fresh", "exec"), code)
    model, graph = code["large"]()
    kept = units.prune(graph, scores.l2(graph, model), 0.5)
    small = units.shrink(graph, model, kept)
    with Checkpoints(tmp_path / "small") as saved:
        saved.save(0, {"params": small.params}, {})
    record = units.architecture(graph, kept)
    assert record["widths"] == {"Dense_0.kernel": 4}
    assert record["shapes"]["Dense_1.kernel"] == [4, 2]
    (tmp_path / "record.json").write_text(json.dumps(record))
    run = [sys.executable, str(program), str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x = np.linspace(-1, 1, 3)[None].astype(np.float32)
    for outputs in json.loads(done.stdout.splitlines()[-1]):
        np.testing.assert_allclose(outputs, small(x), rtol=1e-6)


# --- misuse --------------------------------------------------------------------------------------


def refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cannot_be_meant_is_refused():
    model, graph = traced(a=4, b=6)
    two = {"a": np.ones(4)}
    normal = from_function(lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"], shapes(a=(3, 4), b=(4, 2)))
    softmax = units.trace(normal, np.zeros((1, 3)))
    prune, merge = functools.partial(units.prune, graph), functools.partial(units.merge, graph)
    for call, message in [
        (lambda: prune({}, 0.5), "scores are empty"),
        (lambda: prune({"z": np.ones(4)}, 0.5), "'z' is no group; there are"),
        (lambda: prune({"d": np.ones(2)}, 0.5), "'d' is not free: a result"),
        (lambda: prune({"a": np.ones(3)}, 0.5), r"must be \[4\] and finite, got shape \(3,\)"),
        (lambda: prune({"a": np.full(4, np.nan)}, 0.5), "finite, got .* that are not"),
        (lambda: prune(two, 0.1), "with 1 unit per group, still costs 0.25, more than 0.1"),
        (lambda: prune(two, float("nan")), "budget"),
        (lambda: prune(two, 0.5, multiple=0), "multiple must be an integer of at least 1"),
        (lambda: prune(two, 0.5, across="all"), "across must be"),
        (lambda: merge(model, {"z": 1}), "sizes: 'z' is no group"),
        (lambda: merge(model, {"a": 5}), r"must lie in 1 … 4, got 5"),
        (lambda: merge(model, {"a": 0}), r"must lie in 1 … 4, got 0"),
        (lambda: merge(model, {"a": 2}, incoming="sum"), "incoming must be"),
        (lambda: merge(model, {"a": 2}, likeness={"a": np.ones((3, 2))}), "likeness"),
        (lambda: merge(model, {"a": 2}, scores={"b": np.ones(6)}), r"none of \['a'\], only of"),
        (lambda: merge(model, {"a": 2}, scores={"a": np.ones(5)}), r"must be \[4\] and finite"),
        (lambda: merge(model, {"a": 2}, scores={"a": np.full(4, np.nan)}), "finite, got"),
        (lambda: merge(model, {"a": 2}, scores={"a": -np.ones(4)}), "must not be negative, got -1"),
        (lambda: units.merge(softmax, normal, {"a": 2}), "cannot be merged: reduce_max over it"),
        (lambda: units.select(graph, traced(a=5, b=6)[1]), "has 5 units where the teacher's a has 4"),
        (lambda: units.select(graph, traced(a=2, b=3)[1], how="block", block=2), "block must lie in"),
        (lambda: units.select(graph, traced(a=2, b=3)[1], how="best"), "how must be"),
        (lambda: units.select(graph, traced(a=2, b=3)[1], how=two), "no scores of 'b'"),
        (lambda: units.select(graph, stacked(2, 2, 1)[1]), "has no counterpart"),
    ]:  # fmt: skip
        refused(call, message)


def test_widths_of_a_built_model_rebuild_it():
    model = models.build("mlp:6", (2, 2, 1), 3, jax.random.key(0))
    graph = units.trace(model, np.zeros((1, 2, 2, 1)))
    kept = {"dense.0.kernel": [1, 4]}
    widths = units.architecture(graph, kept)["widths"]
    small = models.build(f"mlp:{widths['dense.0.kernel']}", (2, 2, 1), 3, jax.random.key(0))
    cut = units.keep(graph, model, kept)
    assert jax.tree.map(jnp.shape, cut.params) == jax.tree.map(jnp.shape, small.params)
