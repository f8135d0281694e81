"""Clients that keep their examples: shards, averages of parameters and of predictions, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, models, train
from distill_jax.compress import units
from distill_jax.teachers import kinds
from distill_jax.train import federated, sweeps

LABELS = np.repeat(np.arange(4), [50, 80, 30, 40])


def one_line(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert re.search(word, message), message


def test_each_example_belongs_to_one_client_and_a_seed_repeats_the_shards():
    shards = federated.dirichlet_shards(LABELS, 5, 0.3, seed=1, least=3)
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(LABELS)))
    assert min(map(len, shards)) >= 3
    again = federated.dirichlet_shards(LABELS, 5, 0.3, seed=1, least=3)
    assert all(map(np.array_equal, shards, again))
    assert not all(map(np.array_equal, shards, federated.dirichlet_shards(LABELS, 5, 0.3, seed=2, least=3)))


@pytest.mark.parametrize(("concentration", "low", "high"), [(0.05, 0.6, 1.0), (1000.0, 0.25, 0.3)])
def test_the_concentration_says_how_much_clients_differ(concentration, low, high):
    labels = np.repeat(np.arange(4), 1000)
    shards = federated.dirichlet_shards(labels, 6, concentration, seed=0, least=10)
    largest = [np.bincount(labels[rows]).max() / len(rows) for rows in shards]
    assert low < np.mean(largest) < high


def test_clients_take_equal_numbers_of_steps_through_their_own_examples():
    shards = [np.array([0, 1, 2]), np.arange(10, 30)]
    order = federated.client_order(shards, steps=5, batch_size=4, seed=0, number=2)
    assert order.shape == (5, 2, 4)
    assert order.dtype == np.int32
    assert sorted(np.bincount(order[:, 0].ravel())) == [6, 7, 7]  # 20 places, 3 examples
    assert sorted(order[:, 1].ravel()) == list(range(10, 30))  # once each
    other = federated.client_order(shards, steps=5, batch_size=4, seed=0, number=3)
    assert not np.array_equal(order, other)


def test_shards_that_cannot_be_are_refused():
    one_line(lambda: federated.dirichlet_shards(LABELS, 300, 0.1, seed=0), "labels must be", "300 clients")
    one_line(
        lambda: federated.dirichlet_shards(LABELS, 4, 0.01, seed=0, least=45), "fewer than 45", "client \\d"
    )
    one_line(lambda: federated.dirichlet_shards(LABELS, 4, 0.0, seed=0), "concentration must be positive")
    order = {"steps": 1, "batch_size": 1, "seed": 0, "number": 0}
    empty = [np.arange(3), np.array([], np.int32)]
    one_line(lambda: federated.client_order(empty, **order), "client 1 has no examples")


def linear(seed):
    return models.from_function(_linear, jax.random.normal(jax.random.key(seed), (3, 4)))


def _linear(w, x):
    return x @ w


def test_clients_side_by_side_learn_what_each_would_learn_alone():
    rng = np.random.default_rng(0)
    data = {"image": rng.normal(size=(12, 3)).astype(np.float32), "label": rng.integers(0, 4, 12)}
    shards = [np.arange(4), np.arange(4, 12)]
    tx = optax.adam(0.1)
    step = train.make_train_step(train.supervised(), tx)
    order = federated.client_order(shards, steps=6, batch_size=2, seed=0, number=0)
    started = [linear(0), linear(1)]
    stacked, metrics = federated.make_local_training(step, tx)(
        sweeps.stack(started), data, order, jax.random.key(0)
    )
    assert metrics["loss"].shape == (2,)
    epoch = train.make_epoch(step)
    for i, model in enumerate(started):
        alone, _ = epoch(train.init_state(model, tx, jax.random.key(0)), data, order[:, i])
        np.testing.assert_allclose(stacked.params[i], alone.model.params, rtol=1e-5, atol=1e-6)


def test_averages_are_weighted_by_the_numbers_of_examples():
    clients = [linear(i) for i in range(3)]
    average = federated.average_models(clients, [10, 30, 60])
    expected = sum(share * client.params for share, client in zip((0.1, 0.3, 0.6), clients, strict=True))
    np.testing.assert_allclose(average.params, expected, rtol=1e-5)

    z = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    share = np.array([0.1, 0.3, 0.6])[:, None, None]
    np.testing.assert_allclose(federated.average_predictions(z), z.mean(0), rtol=1e-5, atol=1e-6)
    consensus = federated.average_predictions(z, [1, 3, 6], of="probabilities")
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(consensus), (share * p).sum(0), rtol=1e-5)


def with_nan(model):
    return model.replace(params=model.params.at[1, 2].set(jnp.nan))


def test_a_client_that_sends_nan_is_named_and_refused_or_left_out():
    clients = [linear(0), with_nan(linear(1)), linear(2)]
    one_line(
        lambda: federated.average_models(clients, [1, 1, 1]), "client 1 sent 1 of 12 numbers", "leave out"
    )
    one_line(lambda: federated.average_models(clients, [1, 1, 1], names=["a", "b", "c"]), "^b sent 1 of 12")
    average = federated.average_models(clients, [1, 5, 3], invalid="leave out")
    np.testing.assert_allclose(average.params, 0.25 * clients[0].params + 0.75 * clients[2].params, rtol=1e-5)

    z = [np.zeros((2, 3)), np.full((2, 3), np.inf), np.ones((2, 3))]
    one_line(lambda: federated.average_predictions(z), "client 1 sent 6 of 6")
    np.testing.assert_allclose(federated.average_predictions(z, [1, 9, 1], invalid="leave out"), 0.5)
    one_line(lambda: federated.average_predictions(z[1:2], invalid="leave out"), "client 0 sent 6 of 6")


def test_numbers_that_cannot_be_held_or_sent_are_as_bad_as_nan():
    z = [np.zeros((2, 3)), np.full((2, 3), 1e39)]  # infinite in float32
    one_line(lambda: federated.average_predictions(z), "client 1 sent 6 of 6")
    np.testing.assert_array_equal(federated.average_predictions(z, invalid="leave out"), 0)
    one_line(lambda: federated.average_models(z, [1, 1]), "client 1 sent 6 of 6")
    large = np.array([[4e4, -4e4, 0.0]])  # float16 holds these logits, but not all their log-probabilities
    fine, nan = np.zeros((1, 3)), np.full((1, 3), np.nan)
    for kind, z in ((kinds.Logits(), 2 * large), (kinds.Top(3), large)):
        send = functools.partial(federated.encode_predictions, [fine, z, nan], kind)
        one_line(
            send, "client 1 cannot be sent .*too large for float16.*client 2 sent 3 of 3", "leave it out"
        )
        sent = send(invalid="leave out")
        assert list(sent) == [0]
        jax.tree.map(np.testing.assert_array_equal, sent[0], kind.encode(fine, dtype="float16"))
        assert list(send(dtype="float32", invalid="leave out")) == [0, 1]


def test_each_stacked_client_needs_its_own_rows():
    step = train.make_train_step(train.supervised(), optax.sgd(0.1))
    train_clients = federated.make_local_training(step, optax.sgd(0.1))
    data = {"image": np.ones((4, 3), np.float32), "label": np.zeros(4, np.int32)}
    stacked, key = sweeps.stack([linear(0), linear(1)]), jax.random.key(0)
    for shape in ((2, 2), (2, 3, 2), (2, 1, 2)):  # of these, [2, 2] would train both on the same rows
        one_line(
            lambda shape=shape: train_clients(stacked, data, np.zeros(shape, int), key),
            "order must be rows \\[steps, clients, batch\\]", re.escape(str(shape)),
        )  # fmt: skip


def test_clients_that_do_not_fit_are_named():
    z = np.zeros((5, 3))
    one_line(
        lambda: federated.average_predictions([z, z[:, :2]]),
        "client 1 sent .*\\(5, 2\\), client 0 of \\(5, 3\\)",
    )
    one_line(lambda: federated.average_predictions([z, z[:4]]), "client 1 sent .*\\(4, 3\\)")
    pair = [z, z]
    for lists, words in (
        ([["a", "b", "c"], ["a", "b", "d"]], "client 1 has 3 classes, .*only one of them has c, d"),
        ([["a", "b", "c"], ["a", "b"]], "client 1 has 2 classes"),
        ([["a", "b", "c"], ["b", "a", "c"]], "client 1 has its classes in another order"),
        ([["a", "b"], ["a", "b"]], "class_names must have 3 names"),
    ):
        one_line(lambda lists=lists: federated.average_predictions(pair, class_names=lists), words)
    federated.average_predictions(pair, class_names=[["a", "b", "c"]] * 2)
    one_line(lambda: federated.average_models([linear(0), linear(1)], [3, 0]), "client 1 has no examples")
    one_line(lambda: federated.average_models([{"a": 1.0}, {"b": 1.0}], [1, 1]), "a: missing in client 1")
    one_line(lambda: federated.average_models([], []), "at least one client")
    one_line(lambda: federated.average_predictions(pair, [1, 2, 3]), "one number per client, 2")


@pytest.mark.parametrize("kind", [kinds.Logits(), kinds.Top(2, 1.0)])
def test_what_is_sent_is_counted_and_comes_back(kind):
    z = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32) * 2
    sent = kind.encode(z, dtype="float16")
    top = isinstance(kind, kinds.Top)
    assert federated.payload_bytes(sent) == 6 * (2 * 1 + 3 * 2 if top else 5 * 2)
    found = federated.dense(kind.decode(sent), 5)
    assert found.shape == (6, 5)
    if top:
        p = np.asarray(jax.nn.softmax(z))
        np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=2e-3)
        np.testing.assert_allclose(np.exp(found).max(-1), p.max(-1), rtol=2e-3)
        rest = np.sort(np.exp(found), -1)[:, :3]
        np.testing.assert_allclose(
            rest, np.sort(p, -1)[:, :3].mean(-1, keepdims=True).repeat(3, 1), rtol=1e-2
        )
    else:
        np.testing.assert_allclose(found, z, rtol=1e-3)
    one_line(lambda: federated.dense(kind.decode(sent), 1), "labels must")
    assert federated.payload_bytes(linear(0)) == 3 * 4 * 4


def test_parameters_of_different_types_are_counted_by_their_own_bytes():
    tree = {"a": jnp.zeros(3, jnp.bfloat16), "b": np.zeros(2, np.float64), "c": jnp.zeros((), jnp.int32)}
    assert federated.payload_bytes(tree) == 6 + 16 + 4
    assert federated.payload_bytes(linear(0).replace(state={"key": jax.random.key(0)})) == 12 * 4 + 8


def test_co_distillation_is_the_sum_of_both_losses():
    rng = np.random.default_rng(2)
    context = {
        "image": rng.integers(0, 255, (7, 3)).astype(np.uint8),
        "teacher": rng.normal(size=(7, 4)).astype(np.float32),
        "weight": np.array([1, 0, 1, 1, 0, 1, 1], np.float32),
    }
    own = {"image": rng.integers(0, 255, (5, 3)).astype(np.uint8), "label": rng.integers(0, 4, 5)}
    transform = federated.with_public(20, prepare=lambda x: x.astype(np.float32) / 255)
    batch = transform(context, own, jax.random.key(0))
    rows = [int(np.flatnonzero((context["teacher"] == t).all(-1))[0]) for t in batch["public"]["teacher"]]
    assert len(set(rows)) > 3
    np.testing.assert_allclose(batch["public"]["image"], context["image"][rows] / 255, rtol=1e-6)

    model, w, t = linear(3), 0.7, 2.0
    loss_fn = federated.co_distill(weight=w, temperature=t)
    loss, (_, metrics) = loss_fn(model, batch, key=None, step=jnp.int32(0))
    hard = losses.cross_entropy(model(batch["image"]), own["label"]).mean()
    soft = losses.kl(model(batch["public"]["image"]), batch["public"]["teacher"], temperature=t)
    weight = context["weight"][rows]
    expected = hard + w * (soft * weight).sum() / weight.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert {"hard", "soft", "error_rate"} == set(metrics)
    # Before there is a consensus, only the own examples count
    silent = {**batch, "public": {**batch["public"], "weight": jnp.zeros(20)}}
    np.testing.assert_allclose(loss_fn(model, silent, key=None, step=jnp.int32(0))[0], hard, rtol=1e-5)


def test_co_distilled_clients_learn_classes_of_which_they_have_no_example():
    labels = np.arange(40) % 4
    images = np.eye(4, dtype=np.float32)[labels] + 0.2  # what all share speaks for the classes that one knows
    shards = [np.flatnonzero(labels // 2 == client) for client in range(2)]  # classes 0 and 1; 2 and 3
    tx = optax.adam(0.1)
    train_clients = federated.make_local_training(
        train.make_train_step(federated.co_distill(), tx), tx, transform=federated.with_public(8)
    )
    clients = sweeps.repeat(models.from_function(_linear, jnp.zeros((4, 4))), 2)
    consensus, weight, lacking = np.zeros((40, 4), np.float32), np.zeros(40, np.float32), []
    for number in range(2):
        context = {"image": images, "teacher": consensus, "weight": weight}
        order = federated.client_order(shards, steps=20, batch_size=4, seed=0, number=number)
        data = {"image": images, "label": labels}
        clients, _ = train_clients(clients, data, order, jax.random.key(number), context)
        logits = np.asarray(images @ clients.params)
        right = logits.argmax(-1) == labels
        lacking.append([right[i][labels // 2 != i].mean() for i in range(2)])
        consensus, weight = federated.average_predictions(logits), np.ones(40, np.float32)
    assert max(lacking[0]) == 0
    assert min(lacking[1]) == 1


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"] + params["c"]


def wide_network(width, seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "a": jax.random.normal(keys[0], (3, width)),
        "b": jax.random.normal(keys[1], (width, 2)),
        "c": jnp.full(2, float(seed)),
    }
    return models.from_function(mlp, params)


@pytest.fixture(scope="module")
def wide():
    model = wide_network(6, 0)
    return model, units.trace(model, jnp.ones((1, 3)))


def test_unequal_widths_are_averaged_over_those_who_have_a_unit(wide):
    model, graph = wide
    whole, small = wide_network(6, 1), wide_network(2, 2)
    kept = {"a": [1, 4]}
    average = units.average_widths(graph, model, [whole, small], [{}, kept], [1, 3])
    share = np.where(np.isin(np.arange(6), kept["a"]), 0.25, 1.0)
    placed = np.zeros((3, 6))
    placed[:, kept["a"]] = small.params["a"]
    np.testing.assert_allclose(
        average.params["a"], share * whole.params["a"] + (1 - share) * placed, rtol=1e-5
    )
    np.testing.assert_allclose(average.params["c"], 0.25 * 1 + 0.75 * 2, rtol=1e-6)
    # What nobody has stays the server's
    alone = units.average_widths(graph, model, [small], [kept], [3])
    np.testing.assert_allclose(alone.params["b"][0], model.params["b"][0], rtol=1e-6)
    np.testing.assert_allclose(alone.params["b"][4], small.params["b"][1], rtol=1e-6)


def test_put_back_reverses_keep(wide):
    model, graph = wide
    kept = {"a": [0, 2, 5]}
    small = units.keep(graph, model, kept)
    back = units.put_back(graph, small, kept, jax.tree.map(jnp.zeros_like, model))
    silent = units.silence(graph, model, kept)
    jax.tree.map(np.testing.assert_array_equal, back.params, silent.params)
    one_line(
        lambda: units.put_back(graph, small, {"a": [0, 2]}, model), "small: a must have shape \\(3, 2\\)"
    )
    one_line(lambda: units.average_widths(graph, model, [small], [], [1]), "kept must have one entry")


def test_units_of_a_narrow_network_find_themselves_in_the_wide_one(wide):
    model, graph = wide
    shuffled = units.permute(graph, model, {"a": [3, 5, 0, 1, 2, 4]})
    small = units.keep(graph, shuffled, {"a": [0, 1, 4]})  # units 3, 5, 2 of the wide network
    found = units.match_widths(graph, small, {"a": [0, 1, 2]}, model)
    assert found.kept["a"].tolist() == [2, 3, 5]
    x = jnp.ones((4, 3))
    np.testing.assert_allclose(found.model(x), small(x), rtol=1e-5)
    np.testing.assert_array_equal(found.model.params["a"], model.params["a"][:, jnp.array([2, 3, 5])])
    average = units.average_widths(graph, model, [found.model], [found.kept], [1])
    np.testing.assert_allclose(average.params["a"], model.params["a"], rtol=1e-6)
