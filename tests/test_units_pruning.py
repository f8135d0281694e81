"""Ways to share out what is pruned, and regularisers that make it small before."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_units_architectures import block, block_shapes, numbers, shapes
from test_units_edit import traced

from distill_jax.compress import units
from distill_jax.compress.units import costs, scores
from distill_jax.models import from_function


def sizes(kept):
    return {name: len(indices) for name, indices in kept.items()}


def test_each_group_gets_its_own_share():
    _, graph = traced()
    given = {"a": np.arange(12.0), "b": np.arange(20.0)}
    assert units.prune(graph, given, {"a": 0.25}) == {"a": [9, 10, 11], "b": list(range(20))}
    assert sizes(units.prune(graph, given, {"a": 0.3, "b": 0.5}, multiple=2)) == {"a": 2, "b": 10}
    with pytest.raises(ValueError, match="budget names"):
        units.prune(graph, {"a": given["a"]}, {"b": 0.5})
    with pytest.raises(ValueError, match="one number is needed"):
        units.prune(graph, given, {"a": 0.5}, of=costs.parameters)
    with pytest.raises(ValueError, match="with what most leaves"):
        units.prune(graph, given, {"a": 0.25}, most=0.5)
    with pytest.raises(ValueError, match="leave out across"):
        units.prune(graph, given, {"a": 0.25}, across="isomorphic")


@pytest.mark.parametrize("across", ["network", "group", "isomorphic"])
def test_no_group_loses_more_than_it_may(across):
    _, graph = traced()
    given = {"a": np.zeros(12), "b": np.ones(20)}  # without a bound, all of "a" would go first
    kept = units.prune(graph, given, 0.5, across=across, most={"a": 0.25})
    # The bias of "a" makes the two groups different kinds, which lose equal shares of what they may lose
    assert sizes(kept) == ({"a": 10, "b": 6} if across == "isomorphic" else {"a": 9, "b": 7})
    kept = units.prune(graph, given, 0.5, across=across, most=0.5)
    assert sizes(kept) == {"a": 6, "b": 10}
    with pytest.raises(ValueError, match="what most leaves"):
        units.prune(graph, given, 0.5, across=across, most=0.4)
    for wrong in (1.5, {"a": -0.1}, {"c": 0.5}):
        with pytest.raises(ValueError, match="most"):
            units.prune(graph, given, 0.9, across=across, most=wrong)


def two_blocks():
    parts = {"one": block_shapes(8, 4, 2, 3, 10), "two": block_shapes(8, 4, 2, 3, 10)}
    fn = lambda p, x: block(p["two"], block(p["one"], x @ p["first"], causal=False), causal=False) @ p["out"]  # noqa: E731
    model = from_function(fn, shapes(**parts, first=(4, 8), out=(8, 2)))
    return units.trace(model, np.zeros((2, 3, 4)))


def test_groups_of_one_kind_are_ranked_together():
    graph = two_blocks()
    hidden = [name for name in graph.groups if name.endswith("gate") and graph.groups[name].free]
    heads = [n for n, g in graph.groups.items() if g.free and n.endswith("q")]
    assert len(hidden) == len(heads) == 2
    # Heads have scores that no hidden unit reaches, and the second block higher ones than the first
    given = {name: np.arange(10.0) / 100 + i for i, name in enumerate(hidden)}
    given |= {name: np.arange(2.0) + 1000 + 100 * i for i, name in enumerate(heads)}
    plain = units.prune(graph, given, 0.6)
    assert [len(plain[n]) for n in heads] == [2, 2]
    kept = units.prune(graph, given, 0.6, across="isomorphic")
    assert [len(kept[n]) for n in heads] == [1, 2]
    assert len(kept[hidden[1]]) > len(kept[hidden[0]])
    assert costs.share(graph, kept) <= 0.6


def test_budgets_of_rounds_and_scores_of_batches():
    assert units.budgets(1 / 8, 3) == [1 / 2, 1 / 4, 1 / 8]
    assert units.budgets(0.3, 1, steps="linear") == [0.3]
    model, graph = traced()
    x = numbers(np.zeros((4, 1, 3)), 3)
    each = [scores.mean_activation(graph, model, row, normalise="none") for row in x]
    found = scores.average(iter(each), normalise="max")
    for name in ("a", "b"):
        mean = np.mean([one[name] for one in each], 0)
        np.testing.assert_allclose(found[name], mean / mean.max())
    for wrong, match in (([], "at least one"), ([each[0], {"a": each[0]["a"]}], "batch 1"), ([3], "dict")):
        with pytest.raises(ValueError, match=match):
            scores.average(wrong)


def test_group_lasso_is_the_proximal_step():
    model, graph = traced(4, 5)
    params, threshold = jax.tree.map(jnp.asarray, model.params), 0.65
    tx = units.group_lasso(graph, threshold)
    updates, _ = jax.jit(tx.update)(jax.tree.map(lambda p: 0.1 * p, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    # A unit of "a" is made of a column of a and an entry of c; one of "b" of a column of b
    for made, path in ((("a", "c"), "a"), (("b",), "b")):
        stack = lambda p, made=made: np.concatenate([np.atleast_2d(p[name]) for name in made])  # noqa: E731
        before, after = 1.1 * stack(params), stack(new)
        for v, w in zip(before.T, after.T, strict=True):
            amount = threshold * np.sqrt(len(v))
            # Where ½‖w − v‖² + amount·‖w‖ is smallest
            if np.linalg.norm(v) <= amount:
                assert not w.any()
            else:
                np.testing.assert_allclose(v - w, amount * w / np.linalg.norm(w), rtol=1e-4)
        assert (after == 0).all(0).any() or path == "b"
    np.testing.assert_allclose(new["d"], 1.1 * params["d"], rtol=1e-6)
    living = units.living(graph, new)
    assert living["a"] == np.flatnonzero(np.asarray(new["a"]).any(0) | (np.asarray(new["c"]) != 0)).tolist()
    assert units.living(graph, jax.tree.map(jnp.zeros_like, new)) == {"a": [0], "b": [0]}


def test_a_schedule_and_groups_of_a_penalty():
    model, graph = traced(4, 5)
    params = jax.tree.map(jnp.asarray, model.params)
    tx = optax.chain(optax.sgd(0.0), units.group_lasso(graph, lambda step: 0.1 * step, groups=["b"]))
    state, still = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    first, state = tx.update(still, state, params)
    second, state = tx.update(still, state, params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(first))
    assert np.asarray(second["b"]).all()
    assert not any(np.asarray(second[name]).any() for name in "acd")
    for wrong, match in (({"strength": -1.0}, "strength"), ({"groups": ["c"]}, "no free group")):
        with pytest.raises(ValueError, match=match):
            units.group_lasso(graph, **{"strength": 0.1, **wrong})
    with pytest.raises(ValueError, match="traced structure"):
        tx.init({"a": params["a"]})
    with pytest.raises(ValueError, match="needs the parameters"):
        units.group_lasso(graph, 0.1).update(still, units.PenaltyState(0))


def test_units_that_go_decay_ever_faster():
    model, graph = traced(4, 5)
    params = jax.tree.map(jnp.asarray, model.params)
    kept = {"a": [0, 2], "b": [1, 2, 3, 4]}
    tx = units.growing_decay(graph, kept, 0.1, every=2, ceiling=0.15)
    state, still, now = tx.init(params), jax.tree.map(jnp.zeros_like, params), params
    for _ in range(8):
        updates, state = jax.jit(tx.update)(still, state, now)
        now = optax.apply_updates(now, updates)
    rate = (1 - 0.1) ** 2 * (1 - 0.15) ** 4
    stays = units.position_masks(graph, kept)
    for path, before in params.items():
        mask = np.ones(before.shape, bool)
        for axis, lives in stays.get(path, {}).items():
            mask &= lives.reshape([-1 if a == axis else 1 for a in range(before.ndim)])
        np.testing.assert_allclose(now[path], np.where(mask, before, before * rate), rtol=1e-5)
    for wrong in ({"growth": -1.0}, {"every": 0}, {"ceiling": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            units.growing_decay(graph, kept, **{"growth": 0.1, **wrong})
