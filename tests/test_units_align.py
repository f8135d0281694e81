"""The order of units: it never changes what a network computes, and a lost one is found again."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from flax import nnx
from test_units_architectures import (
    block_shapes,
    compiled,
    conv,
    dense,
    language_model,
    layer_norm,
    numbers,
    shapes,
)

from distill_jax import data, losses, models, train, weights
from distill_jax.compress import units
from distill_jax.models import from_function


def network(model, shape):
    """A model of random numbers, and an input."""
    return numbers(model), numbers(np.zeros((2, *shape)), 5)


def mlp():
    return network(models.build("mlp:8,7", (3, 3, 1), 4, jax.random.key(0)), (3, 3, 1))


def convnet():
    module = models.ConvNet(
        (8, 8, 2), 3, channels=(4, 5), hidden=6, kernel=3, batch_norm=True, rngs=nnx.Rngs(0)
    )
    return network(models.from_nnx(module), (8, 8, 2))


def resnet():
    return network(models.build("resnet8:0.3", (8, 8, 2), 3, jax.random.key(0)), (8, 8, 2))


def transformer():
    norm = {"scale": (6,), "bias": (6,)}
    each = block_shapes(6, 4, 2, 3, 7)
    p = shapes(embedding=(11, 6), positions=(5, 6), block0=each, block1=each, norm=norm)
    return from_function(language_model, p), np.arange(10).reshape(2, 5)


def scanned():
    """Layers in a loop, and a recurrent kernel of which both axes are of one group."""
    p = shapes(first=(4, 6), loop={"w": (6, 5), "v": (5, 6)}, norm={"scale": (6,), "bias": (6,)})
    p |= shapes(recurrent=(6, 6), last=(6, 2))
    p["loop"] = jax.tree.map(lambda x: np.stack([x, -x[::-1]]), p["loop"])

    def fn(p, x):
        h, _ = jax.lax.scan(lambda h, q: (h + jnp.tanh(h @ q["w"]) @ q["v"], None), x @ p["first"], p["loop"])
        h, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["recurrent"] + h), None), h, None, 3)
        return layer_norm(p["norm"], h) @ p["last"]

    return from_function(fn, p), numbers(np.zeros((2, 4)), 5)


def grouped():
    """A position of two groups, channels' groups and the places in them; channels first at the end."""
    p = shapes(a=(3, 3, 2, 6), b=(3, 3, 2, 9), w=(144, 7), v=(7, 3), c={"w": (7, 6), "b": (6,)})

    def fn(p, x):
        x = conv(p["b"], jnp.tanh(conv(p["a"], x)), groups=3)
        x = jnp.tanh(x.transpose(0, 3, 1, 2).reshape(len(x), -1) @ p["w"])
        gate, up = jnp.split(dense(p["c"], x), 2, -1)
        return (x @ p["v"]) * jax.nn.silu(gate) + up

    return from_function(fn, p), numbers(np.zeros((2, 4, 4, 2)), 5)


NETWORKS = {f.__name__: f for f in (mlp, convnet, resnet, transformer, scanned, grouped)}


def random_orders(graph, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.permutation(graph.groups[name].size) for name in units.permutable(graph)}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_does_not_depend_on_the_order_and_a_lost_order_is_found(name):
    with jax.enable_x64(True):
        model, x = NETWORKS[name]()
        graph = units.trace(model, x)
        free = [name for name, group in graph.groups.items() if group.free]
        assert len(free) >= 2
        assert list(units.permutable(graph)) == free
        orders = random_orders(graph)
        shuffled = units.permute(graph, model, orders)
        expected = compiled(model, x)
        np.testing.assert_allclose(
            compiled(shuffled, x), expected, rtol=1e-5, atol=1e-9 * np.abs(expected).max()
        )
        changed = [
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(shuffled), strict=True)
        ]
        assert sum(changed) > len(changed) / 2
        back = units.permute(graph, shuffled, units.match_weights(graph, shuffled, model))
        jax.tree.map(np.testing.assert_array_equal, back, model)


def test_where_the_order_matters_is_found_out():
    """All of these are free, and can be pruned; but not put into another order."""

    def free(fn, rows):
        params = shapes(a=(3, 6), b=(rows, 2))
        model = from_function(lambda p, x: fn(jnp.tanh(x @ p["a"]), p), params)
        graph = units.trace(model, numbers(np.ones((2, 3))))
        (name,) = [name for name, group in graph.groups.items() if group.free]
        return graph, name

    def crossed(h, p):  # units {0, 3}, {1, 4}, {2, 5}; of the second pair the later one is the gate
        u, v = h[:, :3], h[:, 3:]
        gate = jnp.concatenate([u[:, :1], v[:, 1:2], u[:, 2:]], 1)
        rest = jnp.concatenate([v[:, :1], u[:, 1:2], v[:, 2:]], 1)
        return (jnp.exp(gate) * rest) @ p["b"]

    for fn, rows in [
        (lambda h, p: jnp.cumsum(h, 1) @ p["b"], 6),
        (crossed, 3),
        (lambda h, p: (h[:, ::2] * h[:, 1::2][:, ::-1] ** 2) @ p["b"], 3),
    ]:
        graph, name = free(fn, rows)
        assert units.permutable(graph) == ()
        size = graph.groups[name].size
        tree = {path: np.zeros(s.shape) for path, s in graph.shapes.items()}
        with pytest.raises(ValueError, match="the results are others"):
            units.permute(graph, tree, {name: np.roll(range(size), 1)})
        units.permute(graph, tree, {name: range(size)})  # nothing moves
        with pytest.raises(ValueError, match="the order of its units matters"):
            units.match_weights(graph, tree, tree, groups=[name])
        assert units.match_weights(graph, tree, tree) == {}
    graph, name = free(lambda h, p: (h[:, ::2] * h[:, 1::2] ** 2) @ p["b"], 3)
    assert units.permutable(graph) == (name,)


def test_a_wrong_order_is_refused():
    model, x = mlp()
    graph = units.trace(model, x)
    name = units.permutable(graph)[0]
    for orders, message in [
        ({"none": [0]}, "'none' is no group"),
        ({name: [0, 1]}, "must hold each of 0 … 7 once"),
        ({name: [0, 0, 1, 2, 3, 4, 5, 6]}, "must hold each of 0 … 7 once"),
        ({name: np.arange(8) + 0.5}, "must hold each of 0 … 7 once"),
        ({"dense.2.kernel": [1, 0, 2, 3]}, "not free: a result"),
    ]:
        with pytest.raises(ValueError, match=message):
            units.permute(graph, model, orders)
    other = jax.tree.map(lambda x: x[..., :3], model)
    with pytest.raises(ValueError) as error:
        units.match_weights(graph, other, model)
    for i in range(3):
        assert f"dense.{i}.kernel" in str(error.value)
    broken = jax.tree.map(np.copy, model)
    broken.params["dense"][1]["bias"][0] = np.nan
    with pytest.raises(ValueError, match="not finite in the model"):
        units.match_weights(graph, broken, model)
    with pytest.raises(ValueError, match=r"x: a batch of the shapes .* was traced"):
        units.match_activations(graph, model, model, x[:1])


def test_states_follow_their_parameters():
    model, x = convnet()
    graph = units.trace(model, x)
    orders = random_orders(graph)
    whole = units.permute(graph, model, orders)
    parts = units.permute(graph, {"params": model.params, "state": model.state}, orders)
    jax.tree.map(np.testing.assert_array_equal, {"params": whole.params, "state": whole.state}, parts)
    assert not np.array_equal(whole.state["norm"][0]["var"], model.state["norm"][0]["var"])
    # Parameters alone suffice to find the order
    found = units.match_weights(graph, whole.params, model.params)
    jax.tree.map(np.testing.assert_array_equal, units.permute(graph, whole, found), model)


def smooth():
    """Convolutions without dead units, channels first when they are flattened."""
    p = shapes(a=(3, 3, 2, 6), b=(3, 3, 6, 5), w=(80, 7), v=(7, 3))

    def fn(p, x):
        x = jnp.tanh(conv(p["b"], jnp.tanh(conv(p["a"], x))) / 8)
        return jnp.tanh(x.transpose(0, 3, 1, 2).reshape(len(x), -1) @ p["w"] / 8) @ p["v"]

    return from_function(fn, p), numbers(np.zeros((2, 4, 4, 2)), 5)


@pytest.mark.parametrize("make", [mlp, smooth])
def test_an_order_is_found_from_activations(make):
    model, x = make()
    x = numbers(np.zeros((32, *x.shape[1:])), 7)
    graph = units.trace(model, x)
    shuffled = units.permute(graph, model, random_orders(graph))
    found = units.match_activations(graph, shuffled, model, x)
    jax.tree.map(np.testing.assert_array_equal, units.permute(graph, shuffled, found), model)


@pytest.mark.parametrize(
    ("make", "message"), [(scanned, "reads the units of .*: use"), (grouped, "lie across each other")]
)  # fmt: skip
def test_what_activations_cannot_match(make, message):
    model, x = make()
    graph = units.trace(model, x)
    with pytest.raises(ValueError, match=message):
        units.match_activations(graph, model, model, x)


GROUPS = ("dense.0.kernel", "dense.1.kernel")


def weight_matching(ours, theirs, seed):
    """Git Re-Basin's algorithm for an MLP, its specification written by hand: kernels ``[in, out]``.

    π_i orders the units of layer i; kernel i has π_(i−1) along its first axis and π_i along its second.
    """
    rng, count = np.random.default_rng(seed), len(ours) - 1
    orders = [np.arange(b.size) for _, b in ours]
    improves = True
    while improves:
        improves = False
        for i in rng.permutation(count):
            before = orders[i - 1] if i else slice(None)
            gain = ours[i][0].T @ theirs[i][0][before] + np.outer(ours[i][1], theirs[i][1])
            gain += ours[i + 1][0] @ theirs[i + 1][0][:, orders[i + 1]].T
            _, best = scipy.optimize.linear_sum_assignment(gain, maximize=True)
            rows = np.arange(len(best))
            if gain[rows, best].sum() > gain[rows, orders[i]].sum() + 1e-12:
                orders[i], improves = best, True
    return orders[:-1]


def test_weight_matching_is_as_good_as_with_a_specification_by_hand():
    """Between unrelated networks, where no order is exact: ‖θ_reference − π(θ)‖² of both."""
    model = models.build("mlp:24,20", (4, 4, 1), 5, jax.random.key(0))
    graph = units.trace(model, np.zeros((1, 4, 4, 1)))
    given, reference = [], []
    for seed in range(5):
        ours, theirs = numbers(model.params, 2 * seed), numbers(model.params, 2 * seed + 1)
        layers = [
            [(each["kernel"], each["bias"]) for _, each in sorted(tree["dense"].items())]
            for tree in (ours, theirs)
        ]
        orders = weight_matching(*layers, seed)
        by_hand = units.permute(graph, theirs, dict(zip(GROUPS, orders, strict=True)))
        found = units.permute(graph, theirs, units.match_weights(graph, theirs, ours, seed=seed))

        def product(tree, ours=ours):
            return sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (tree, ours)), strict=True))

        reference.append(product(by_hand))
        given.append(product(found))
        assert product(found) > product(theirs)
    assert np.mean(given) >= np.mean(reference)


def mnist():
    directory = os.environ.get("TFDS_DATA_DIR")
    if not directory or not (Path(directory) / "mnist").is_dir():
        pytest.skip("TFDS_DATA_DIR holds no MNIST")
    return data.load("mnist", data_dir=directory), 128, 100, 4


def digits():
    return data.load("digits"), 64, 32, 30


@pytest.mark.parametrize("source", [digits, mnist])
def test_the_barrier_after_matching_is_no_higher_than_with_a_specification_by_hand(source):
    dataset, width, batch, epochs = source()
    image, label = (jnp.asarray(dataset.train.image, jnp.float32) / 255, jnp.asarray(dataset.train.label))
    test_image, test_label = dataset.test.image / np.float32(255), dataset.test.label
    tx = optax.adam(1e-3)
    shape = image.shape[1:]
    made = [models.build(f"mlp:{width},{width}", shape, 10, jax.random.key(seed)) for seed in range(4)]
    step = train.make_train_step(train.supervised(), tx)

    @jax.jit
    def fit(state, order):
        def body(state, rows):
            return step(state, {"image": image[rows], "label": label[rows]})[0], None

        return jax.lax.scan(body, state, order)[0].model

    @jax.jit
    def loss(model):
        return losses.cross_entropy(model(test_image), test_label).mean()

    trained = []
    for seed, model in enumerate(made):
        rng, count = np.random.default_rng(seed), len(label) // batch * batch
        order = np.concatenate([rng.permutation(len(label))[:count] for _ in range(epochs)])
        # One function for all, so that it is compiled once
        state = train.init_state(model.replace(apply_fn=made[0].apply_fn), tx, jax.random.key(seed))
        trained.append(fit(state, order.reshape(-1, batch)))
    graph = units.trace(trained[0], image[:1])
    figures = {"as trained": [], "by hand": [], "found": []}
    for seed in (0, 2):
        ours, theirs = (jax.tree.map(np.asarray, tree) for tree in trained[seed : seed + 2])
        layers = [
            [(each["kernel"], each["bias"]) for _, each in sorted(model.params["dense"].items())]
            for model in (ours, theirs)
        ]
        by_hand = dict(zip(GROUPS, weight_matching(*layers, seed), strict=True))
        found = units.match_weights(graph, theirs, ours)
        for name, orders in zip(figures, ({}, by_hand, found), strict=True):
            other = units.permute(graph, theirs, orders)
            middle = loss(weights.lerp(ours, other, 0.5))
            figures[name].append(float(middle - (loss(ours) + loss(other)) / 2))
    print(source.__name__, figures)
    assert np.mean(figures["found"]) <= np.mean(figures["by hand"]) + 0.01
    assert np.mean(figures["found"]) < 0.4 * np.mean(figures["as trained"])


def test_a_wider_teacher_is_brought_to_the_student():
    """Its strongest units are the student's, in another order, among weak ones."""
    small, wide = (
        models.build(f"convnet:{w}", (8, 8, 1), 3, jax.random.key(i)) for i, w in enumerate(("4,5", "6,9"))
    )
    x = np.zeros((1, 8, 8, 1))
    graphs = [units.trace(model, x) for model in (small, wide)]
    student = numbers(small)
    weak = jax.tree.map(lambda x: 1e-3 * x, numbers(wide.params, 1))
    orders = random_orders(graphs[0])
    source = units.permute(graphs[0], student, orders)
    rng = np.random.default_rng(3)
    strong = {
        name: np.sort(rng.choice(graphs[1].groups[name].size, graph.size, replace=False))
        for name, graph in graphs[0].groups.items()
        if graph.free
    }
    masks = units.position_masks(graphs[1], strong)

    def write(path, leaf, values):
        path = jax.tree_util.keystr(path, simple=True, separator=".")
        axes = [masks.get(path, {}).get(a, np.ones(n, bool)) for a, n in enumerate(leaf.shape)]
        leaf = leaf.copy()
        leaf[np.ix_(*axes)] = values
        return leaf

    teacher = wide.replace(params=jax.tree_util.tree_map_with_path(write, weak, source.params))
    scores = units.scores.l2(graphs[1], teacher)
    done = units.bring(graphs[0], student, graphs[1], teacher, how=scores)
    assert {name: list(kept) for name, kept in done.selected.items()} == {
        name: kept.tolist() for name, kept in strong.items()
    }
    jax.tree.map(np.testing.assert_array_equal, done.model, student)
    assert done.distance[0] > 1
    assert done.distance[1] == 0
    np.testing.assert_allclose(done.cosine[1], 1, rtol=1e-6)
    assert not done.kept
    text = str(done)
    for name in strong:
        assert name in text
    assert "aligned 0" in text
    selected = units.bring(graphs[0], student, graphs[1], teacher, how=scores, groups=())
    assert selected.distance[0] == selected.distance[1] == done.distance[0]
    with pytest.raises(ValueError, match="wider than the teacher") as error:
        units.bring(graphs[1], teacher, graphs[0], student)
    for path in ("convolution.0.kernel", "convolution.0.bias", "convolution.1.bias", "hidden.kernel"):
        assert path in str(error.value)
    assert "head" not in str(error.value)
    deeper = models.build("convnet:4,5,6", (8, 8, 1), 3, jax.random.key(0))
    graph = units.trace(deeper, x)
    with pytest.raises(ValueError, match="no counterpart"):
        units.bring(graph, deeper, graphs[1], teacher)


def test_layers_whose_units_do_not_correspond_are_refused():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    def network(a, b, classes):
        model = from_function(fn, shapes(a=(3, a), b=(a, b), c=(b, classes)))
        return units.trace(model, np.zeros((1, 3))), model

    teacher = network(6, 5, 2)
    one = units.bring(*network(4, 1, 2), *teacher)
    assert jax.tree.map(np.shape, one.model.params) == {"a": (3, 4), "b": (4, 1), "c": (1, 2)}
    with pytest.raises(ValueError, match="not free there") as error:
        units.bring(*network(4, 3, 1), *teacher)
    assert str(error.value).endswith("teacher's size; c: (3, 1) in the student, (3, 2) selected")
