"""Pruning by the optimizer: exact counts, zeros that stay, N:M, every way to run a step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax import data, metrics, train
from distill_jax.compress.sparsity import (
    SparsityState,
    apply_masks,
    frozen,
    mask_of,
    polynomial,
    report,
    sparsify,
    sparsity,
    sparsity_at,
)
from distill_jax.models import build, from_function

SCHEDULE = {"begin": 2, "end": 17, "every": 4}  # removals at 2, 6, 10, 14 and 17


def make_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 4, 6), "dense": (24, 7), "head": (7, 3)}
    params = {
        name: {"kernel": rng.normal(size=shape) * scale, "bias": rng.normal(size=shape[-1])}
        for (name, shape), scale in zip(shapes.items(), (1.0, 0.3, 2.0), strict=True)
    }
    params["norm"] = {"scale": np.ones(6)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def random_gradients(params, step):
    rng = np.random.default_rng([7, step])
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def history(tx, params, steps=22):
    """Parameters and masks after each step with random gradients, by a jitted update."""

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, kept = tx.init(params), []
    for number in range(steps):
        params, state = step(params, state, random_gradients(params, number))
        kept.append(jax.tree.map(np.asarray, (params, mask_of(state))))
    return kept


def kernels(tree):
    return {name: layer["kernel"] for name, layer in tree.items() if "kernel" in layer}


def expected_sparsity(step, final, initial=0.0, begin=2, end=17, power=3.0):
    """Equation 1 of Zhu and Gupta in float64."""
    if step < begin:
        return 0.0
    way = min((step - begin) / (end - begin), 1.0)
    return final + (initial - final) * (1 - way) ** power


def last_removal(step):
    return max((t for t in (2, 6, 10, 14, 17) if t <= step), default=-1)


ADAM_DECAY = optax.adamw(0.05, weight_decay=0.1)
TRANSFORMATIONS = {
    "sgd with momentum": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adam and weight decay": ADAM_DECAY,
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
}


@pytest.mark.parametrize(("initial", "power"), [(0.0, 3.0), (0.3, 1.0)])
def test_the_schedule_is_equation_1(initial, power):
    schedule = polynomial(0.9, **SCHEDULE, initial=initial, power=power)
    for step in range(25):
        expected = expected_sparsity(step, 0.9, initial, power=power)
        np.testing.assert_allclose(sparsity_at(schedule, step), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "score", "dtype"),
    [
        *((name, "magnitude", jnp.float32) for name in TRANSFORMATIONS),
        ("adam and weight decay", "saliency", jnp.float32),
        ("sgd with momentum", "saliency", jnp.bfloat16),
    ],
)
def test_counts_zeros_and_masks_at_every_step(name, score, dtype):
    """The three promises: the schedule's count to 1/size, exact zeros, monotone masks."""
    tx = sparsify(TRANSFORMATIONS[name], polynomial(0.8, **SCHEDULE, initial=0.1), score=score)
    before = dict.fromkeys(kernels(make_params()), np.True_)
    for step, (params, masks) in enumerate(history(tx, make_params(dtype))):
        wanted = 0.0 if step < 2 else expected_sparsity(last_removal(step), 0.8, 0.1)
        for key, mask in kernels(masks).items():
            weights = params[key]["kernel"]
            assert weights.dtype == dtype
            assert abs((~mask).sum() - wanted * mask.size) <= 0.5 + 1e-3
            assert (weights[~mask] == 0).all()
            if dtype == jnp.float32:  # in bfloat16 a living weight may meet zero on its way
                assert (weights[mask] != 0).all()
            assert not (mask & ~before[key]).any()
            before[key] = mask
        assert all((params[key]["bias"] != 0).all() for key in before)
        assert (params["norm"]["scale"] != 0).all()
        assert isinstance(masks["norm"]["scale"], optax.MaskedNode)


def test_the_smallest_weights_after_the_inner_update_are_removed():
    """Against NumPy: SGD's step, then the k smallest |w|; saliency, the average of |w·g|."""
    params, begin = make_params(), 2
    one = {"begin": begin, "end": begin + 1, "initial": 0.37}
    for score in ("magnitude", "saliency"):
        tx = sparsify(optax.sgd(0.5), polynomial(0.37, **one), score=score, decay=0.9)
        w = {k: np.asarray(x, float) for k, x in kernels(params).items()}
        average = dict.fromkeys(w, 0.0)
        for step in range(begin + 1):
            g = kernels(random_gradients(params, step))
            average = {k: 0.9 * average[k] + 0.1 * abs(w[k] * g[k]) for k in w}
            w = {k: w[k] - 0.5 * np.asarray(g[k], float) for k in w}
        masks = kernels(history(tx, params, begin + 1)[-1][1])
        for k, mask in masks.items():
            value = abs(w[k]) if score == "magnitude" else average[k]
            gone = np.argsort(value.ravel())[: round(0.37 * value.size)]
            assert set(np.flatnonzero(~mask)) == set(gone)


def test_ties_are_counted_exactly():
    params = {"w": jnp.ones((10, 10)), "z": jnp.zeros((4, 5))}
    tx = sparsify(optax.sgd(0.0), polynomial(0.33, begin=0, end=1))
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert int((~state.masks["w"]).sum()) == 33
    assert int((~state.masks["z"]).sum()) == 7  # 6.6


def test_the_lowest_are_those_of_a_stable_sort():
    """Few distinct values, over all of float32's range, against NumPy."""
    values = np.float32([0, 1e-30, 1e-3, 1, 1.0000001, 7, 3e38])
    for seed, final in enumerate((0.001, 0.1, 0.25, 0.5, 0.77, 0.999)):
        rng = np.random.default_rng(seed)
        w = rng.choice(values, (9, 31)) * rng.choice([-1, 1], (9, 31)).astype("f4")
        tx = sparsify(optax.sgd(0.0), polynomial(final, begin=0, end=1))
        _, state = history_of_plain(tx, {"w": jnp.asarray(w)})
        gone = np.argsort(np.abs(w).ravel(), kind="stable")[: round(final * w.size)]
        np.testing.assert_array_equal(np.flatnonzero(~state.masks["w"]), np.sort(gone))


def test_global_ranking_removes_the_smallest_of_all():
    tx = sparsify(ADAM_DECAY, polynomial(0.7, **SCHEDULE), ranking="global")
    uniform = sparsify(ADAM_DECAY, polynomial(0.7, **SCHEDULE))
    size = sum(x.size for x in kernels(make_params()).values())
    for step, (params, masks) in enumerate(history(tx, make_params())):
        zeros = sum((~mask).sum() for mask in kernels(masks).values())
        assert abs(zeros - expected_sparsity(last_removal(step), 0.7) * size) <= 0.5 + 1e-3
        if step in (2, 6, 10, 14, 17):
            kept = np.concatenate([abs(x[x != 0]) for x in kernels(params).values()])
            assert kept.size == size - zeros
    shares = [(~mask).mean() for mask in kernels(masks).values()]
    assert max(shares) - min(shares) > 0.2  # or it would be the uniform one
    assert np.ptp([(~m).mean() for m in kernels(history(uniform, make_params())[-1][1]).values()]) < 0.05

    one_shot = sparsify(optax.sgd(0.0), polynomial(0.5, begin=0, end=1), ranking="global")
    params, masks = history(one_shot, make_params(), 2)[-1]
    everything = np.concatenate([np.abs(x).ravel() for x in kernels(make_params()).values()])
    cut = np.sort(everything)[round(0.5 * size)]
    for key, mask in kernels(masks).items():
        np.testing.assert_array_equal(mask, np.abs(make_params()[key]["kernel"]) >= cut)


@pytest.mark.parametrize(
    ("keep", "group", "ranking"), [(2, 4, "uniform"), (2, 4, "global"), (1, 3, "uniform"), (3, 8, "global")]
)
def test_n_of_m_live_along_the_inputs(keep, group, ranking):
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 24, 5)), jnp.float32)},
        "dense": {"kernel": jnp.asarray(rng.normal(size=(48, 7)) * 0.2, jnp.float32)},
    }
    tx = sparsify(
        ADAM_DECAY, polynomial(1 - keep / group, **SCHEDULE), pattern=(keep, group), ranking=ranking
    )
    before = dict.fromkeys(params, np.True_)
    for step, (weights, masks) in enumerate(history(tx, params)):
        total = 0
        for key, mask in kernels(masks).items():
            living = np.moveaxis(mask, -2, -1)
            living = living.reshape(*living.shape[:-1], -1, group).sum(-1)
            assert living.min() >= keep
            if step >= 17:
                assert (living == keep).all()
            assert not (mask & ~before[key]).any()
            before[key] = mask
            np.testing.assert_array_equal(weights[key]["kernel"] == 0, ~mask)
            wanted = expected_sparsity(last_removal(step), 1 - keep / group) * mask.size
            assert ranking == "global" or abs((~mask).sum() - wanted) <= 0.5 + 1e-3
            total += (~mask).sum() - wanted
        assert abs(total) <= 1.01


def test_within_a_group_the_smallest_go():
    params = {"w": jnp.array([[1.0, 8], [2, 7], [3, 6], [4, 5], [9, 1], [9, 2], [9, 3], [9, 4]])}
    tx = sparsify(optax.sgd(0.0), polynomial(0.5, begin=0, end=1), pattern=(2, 4))
    params, _ = history_of_plain(tx, params)
    np.testing.assert_array_equal(
        params["w"], [[0, 8], [0, 7], [3, 0], [4, 0], [0, 0], [0, 0], [9, 3], [9, 4]]
    )


def history_of_plain(tx, params, steps=2):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_excluded_leaves_keep_their_weights():
    tx = sparsify(ADAM_DECAY, polynomial(0.8, **SCHEDULE), exclude=("^head", r"conv\.kernel"))
    params, masks = history(tx, make_params())[-1]
    assert (params["head"]["kernel"] != 0).all()
    assert (params["conv"]["kernel"] != 0).all()
    assert len(jax.tree.leaves(masks)) == 1
    tx = sparsify(ADAM_DECAY, polynomial(0.5, **SCHEDULE), min_ndim=1, exclude=("scale",))
    params, _ = history(tx, make_params())[-1]
    assert (params["conv"]["bias"] == 0).sum() == 3
    assert (params["norm"]["scale"] != 0).all()


def test_the_inner_transformation_sees_only_living_weights():
    """A norm that is clipped by must not count the gradients of removed weights."""
    masks = {"w": jnp.array([True, False])}
    tx = frozen(optax.clip_by_global_norm(1.0), masks)
    params, gradients = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.5, 100.0])}
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [0.5, 0.0])


def test_updates_of_a_narrower_type_still_end_in_zero():
    """bfloat16 updates of float32 weights: −w rounded to bfloat16 would leave a remainder."""
    narrow = optax.stateless(lambda u, _: jax.tree.map(lambda x: x.astype(jnp.bfloat16), u))
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
    params, _ = history_of_plain(sparsify(narrow, polynomial(0.5, begin=0, end=1)), params)
    assert int((params["w"] == 0).sum()) == 32


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda u: u * factor, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = {"w": jnp.ones((2, 2))}
    for tx in (
        sparsify(scaled, polynomial(0.5, begin=5, end=6)),
        frozen(scaled, {"w": jnp.ones((2, 2), bool)}),
    ):
        updates, _ = tx.update(params, tx.init(params), params, factor=3.0)
        np.testing.assert_array_equal(updates["w"], 3 * np.ones((2, 2)))


# --- fine-tuning, finding masks, reports ---------------------------------------------------------


def test_frozen_keeps_the_zeros():
    tx = sparsify(ADAM_DECAY, polynomial(0.8, **SCHEDULE))
    params, masks = history(tx, make_params())[-1]
    for after, _ in history(frozen(optax.adamw(0.1), masks), params, 5):
        for key, mask in kernels(masks).items():
            np.testing.assert_array_equal(after[key]["kernel"] == 0, ~mask)
    assert (after["dense"]["kernel"] != params["dense"]["kernel"]).any()
    # Weights that were not yet zero are after one update
    after, _ = history(frozen(optax.adam(0.1), masks), make_params(), 1)[0]
    np.testing.assert_array_equal(after["conv"]["kernel"] == 0, ~masks["conv"]["kernel"])


def test_masks_are_found_in_nested_states():
    inner = sparsify(optax.adam(0.1), polynomial(0.5, begin=0, end=1))
    params = make_params()
    for tx in (inner, optax.chain(inner), optax.MultiSteps(inner, 2), optax.chain(inner, optax.identity())):
        masks = mask_of(tx.init(params))
        assert jax.tree.structure(masks) == jax.tree.structure(mask_of(inner.init(params)))
    for tx in (optax.adam(0.1), optax.chain(inner, inner)):
        with pytest.raises(ValueError, match="the state of one sparsify or frozen"):
            mask_of(tx.init(params))


def test_accumulated_by_optax_zeros_stay():
    tx = optax.MultiSteps(sparsify(ADAM_DECAY, polynomial(0.8, begin=1, end=4)), 2)
    for params, masks in history(tx, make_params(), 14):
        np.testing.assert_array_equal(params["conv"]["kernel"] == 0, ~masks["conv"]["kernel"])
    assert (params["conv"]["kernel"] == 0).mean() == pytest.approx(0.8, abs=1 / 216)


def test_reports():
    params = {"a": {"kernel": jnp.array([[0.0, 1], [0, 3]])}, "b": jnp.ones(4)}
    found = jax.jit(sparsity)(params)
    assert {k: float(v) for k, v in found.items()} == {"a.kernel": 0.5, "b": 0.0, "overall": 0.25}
    lines = report(params).splitlines()
    assert lines[0].split() == ["leaf", "shape", "weights", "zeros", "zeros", "%"]
    assert lines[1].split() == ["a.kernel", "2×2", "4", "2", "50.00"]
    assert lines[-1].split() == ["overall", "8", "2", "25.00"]
    tx = optax.chain(sparsify(optax.adam(0.1), polynomial(0.5, begin=0, end=1)))
    params, state = history_of_plain(tx, params)
    assert report(state) == report(mask_of(state))
    assert report(state).splitlines()[-1].split() == ["overall", "4", "2", "50.00"]
    assert float(sparsity(mask_of(state))["overall"]) == 0.5


def test_apply_masks():
    params = make_params()
    tx = sparsify(ADAM_DECAY, polynomial(0.8, **SCHEDULE))
    masks = history(tx, params)[-1][1]
    pruned = apply_masks(params, masks)
    np.testing.assert_array_equal(pruned["conv"]["kernel"] == 0, ~masks["conv"]["kernel"])
    np.testing.assert_array_equal(pruned["conv"]["bias"], params["conv"]["bias"])


# --- the train step, however it is run ----------------------------------------------------------

BATCH = {
    "image": jnp.asarray(np.random.default_rng(1).normal(size=(32, 12)), jnp.float32),
    "label": jnp.asarray(np.random.default_rng(2).integers(0, 3, 32), jnp.int32),
}


def net(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"] + params["c"]


def net_params(seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "a": jax.random.normal(a, (12, 16)) / 3,
        "b": jax.random.normal(b, (16, 3)) / 4,
        "c": jnp.zeros(3),
    }


OPTIONS = {
    "magnitude": {},
    "saliency, global": {"score": "saliency", "ranking": "global"},
    "2:4": {"pattern": (2, 4)},
}


def pruner(name):
    return sparsify(optax.adam(0.01), polynomial(0.5, begin=1, end=5, every=2), **OPTIONS[name])


def net_step(name, **options):
    return train.make_train_step(train.supervised(), pruner(name), **options)


def start(name, seed=0):
    return train.init_state(from_function(net, net_params(seed)), pruner(name), jax.random.key(seed))


def loop(step, state, steps=8):
    for _ in range(steps):
        state, _ = step(state, BATCH)
    return state


def shard_mapped(name, check_vma):
    return jax.jit(
        jax.shard_map(
            net_step(name, axis_name="batch"),
            mesh=train.data_mesh(4),
            in_specs=(P(), P("batch")),
            out_specs=(P(), P()),
            check_vma=check_vma,
        )
    )


def run_sharded(name):
    mesh = train.data_mesh(4)
    step, state = jax.jit(net_step(name)), jax.device_put(start(name), train.replicated(mesh))
    batch = jax.device_put(BATCH, train.sharded(mesh))
    for _ in range(8):
        state, _ = step(state, batch)
    return state


def run_sharded_weights(name):
    """The weights themselves, the masks and the moments lie over four devices."""
    mesh = train.data_mesh(4)

    def place(x):
        split = x.ndim == 2 and x.shape[0] % 4 == 0
        return jax.device_put(x, train.sharded(mesh) if split else train.replicated(mesh))

    return loop(jax.jit(net_step(name)), jax.tree.map(place, start(name)))


WAYS = {
    "scan": lambda name: jax.jit(
        lambda state: jax.lax.scan(lambda s, _: net_step(name)(s, BATCH), state, length=8)[0]
    )(start(name)),
    "accumulated": lambda name: loop(jax.jit(net_step(name, accumulate=4)), start(name)),
    "sharded batch": run_sharded,
    "sharded weights": run_sharded_weights,
    "shard_map, check_vma": lambda name: loop(shard_mapped(name, True), start(name)),
    "shard_map": lambda name: loop(shard_mapped(name, False), start(name)),
}


def arrays(state):
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


@functools.cache
def alone(name, seed=0):
    return arrays(loop(jax.jit(net_step(name)), start(name, seed)))


@pytest.mark.parametrize(
    ("way", "name"), [*((way, "saliency, global") for way in WAYS), ("sharded weights", "2:4")]
)
def test_every_way_prunes_the_same_weights(name, way):
    expected, found = alone(name), arrays(WAYS[way](name))
    chex.assert_trees_all_equal(found.opt_state.masks, expected.opt_state.masks)
    chex.assert_trees_all_close(found, expected, atol=2e-5)
    assert float(sparsity(mask_of(found.opt_state))["overall"]) == 0.5


def test_a_sweep_of_seeds_is_a_vmap():
    name = "saliency, global"
    starts = [start(name, seed) for seed in range(2)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    states = arrays(loop(jax.jit(jax.vmap(net_step(name), in_axes=(0, None))), states))
    for seed in range(2):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x, seed=seed: x[seed], states.opt_state.masks),
            alone(name, seed).opt_state.masks,
        )


def test_a_restored_run_ends_bit_identical(tmp_path):
    for name in ("magnitude", "saliency, global"):
        step = jax.jit(net_step(name))
        expected = loop(step, start(name), 8)
        half = loop(step, start(name), 4)
        assert 0 < float(sparsity(mask_of(half.opt_state))["overall"]) < 0.5
        with train.Checkpoints(tmp_path / name[:3]) as checkpoints:
            checkpoints.save(4, half, {})
        with train.Checkpoints(tmp_path / name[:3]) as checkpoints:
            restored, _ = checkpoints.restore(start(name, seed=9))
        assert isinstance(restored.opt_state, SparsityState)
        chex.assert_trees_all_equal(arrays(restored), arrays(half))
        chex.assert_trees_all_equal(arrays(loop(step, restored, 4)), arrays(expected))


def test_the_search_runs_only_when_due():
    """It stands in a branch of ``cond``, not in the step itself."""
    jaxpr = jax.make_jaxpr(net_step("magnitude"))(start("magnitude"), BATCH).jaxpr
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert names.count("cond") == 1
    assert not {"while", "scan", "sort", "cumsum"} & set(names)


# --- it still learns ----------------------------------------------------------------------------


def test_a_pruned_student_still_learns_digits():
    """80 % sparse and as good as dense to two points, and better than pruned at the end."""
    digits = data.load("digits")
    images = jnp.asarray(digits.train.image, jnp.float32) / 16 / 16
    batch = {"image": images, "label": jnp.asarray(digits.train.label)}
    model = build("mlp:64", images.shape[1:], 10, jax.random.key(0))
    steps = 200

    def accuracy(tx, params=model.params):
        step = train.make_train_step(train.supervised(), tx)
        state = train.init_state(model.replace(params=params), tx, jax.random.key(0))
        state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, batch), s, length=steps))(state)
        logits = state.model(digits.test.image.astype(np.float32) / 256)
        return 1 - float(metrics.errors(logits, digits.test.label).mean()), state

    dense, trained = accuracy(optax.adam(1e-2))
    schedule = polynomial(0.8, begin=20, end=140, every=10)
    sparse, state = accuracy(sparsify(optax.adam(1e-2), schedule))
    assert dense > 0.93
    assert sparse > dense - 0.025
    found = sparsity(state.model.params)
    assert float(found["dense.0.kernel"]) == pytest.approx(0.8, abs=1 / 4096)
    # The same sparsity cut out of the dense network afterwards costs several times as much
    cut, _ = accuracy(optax.set_to_zero(), apply_masks(trained.model.params, smallest(trained.model.params)))
    assert sparse > cut + 0.02


def smallest(params):
    """Masks of the 20 % largest weights of each kernel."""
    tx = sparsify(optax.sgd(0.0), polynomial(0.8, begin=0, end=1))
    return mask_of(history_of_plain(tx, params)[1])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final": 1.0}, r"final must lie in \[0, 1\), got 1.0"),
        ({"final": -0.1}, "final must lie in"),
        ({"final": float("nan")}, "final must lie in"),
        ({"initial": 1.0}, "initial must lie in"),
        ({"initial": 0.6}, "initial must be at most final, 0.5, got 0.6"),
        ({"begin": 5}, "0 ≤ begin < end, got 5 and 5"),
        ({"begin": -1}, "begin must be an integer of at least 0, got -1"),
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"power": 0.0}, "power must be positive"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        polynomial(**({"final": 0.5, "begin": 0, "end": 5} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "size"}, "score must be one of .*'magnitude', 'saliency'.*got 'size'"),
        ({"ranking": "local"}, "ranking must be one of"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\)"),
        ({"exclude": "head"}, "exclude must be a sequence"),
        ({"exclude": ("head", "layer9")}, "'layer9' is found in no path; there are conv.bias, conv"),
        ({"exclude": ("kernel",)}, "no leaf is left to prune"),
        ({"min_ndim": 5}, "no leaf is left to prune"),
        ({"pattern": (4, 4)}, r"must satisfy 1 ≤ N < M, got \(4, 4\)"),
        ({"pattern": (0, 4)}, "must satisfy 1 ≤ N < M"),
        ({"pattern": (1, 4)}, "1:4 is a sparsity of 0.75, but the schedule's final is 0.5"),
        ({"pattern": (2, 4)}, r"axis -2 must be a multiple .*head.kernel \(7, 3\)"),
        ({"pattern": (2, 4), "axis": 3}, r"axis 3 .* not in .*dense.kernel"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        sparsify(optax.adam(0.1), polynomial(0.5, begin=0, end=5), **options).init(make_params())


def test_bad_masks_and_missing_parameters():
    params = make_params()
    tx = sparsify(optax.sgd(0.1), polynomial(0.5, begin=0, end=5))
    with pytest.raises(ValueError, match="pruning needs the parameters"):
        tx.update(params, tx.init(params))
    for masks, message in [
        ({"conv": jnp.ones(3, bool)}, "masks must have the structure of params"),
        (params, "masks must be bool arrays of the parameters' shapes; not so.*conv.bias"),
        (jax.tree.map(lambda p: jnp.ones(2, bool), params), "masks must be bool arrays"),
    ]:
        with pytest.raises(ValueError, match=message):
            frozen(optax.sgd(0.1), masks).init(params)
