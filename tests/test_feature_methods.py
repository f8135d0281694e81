"""Feature methods: any features against any others, masks, keys, and what each method promises."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import features, losses

B = 6
NETS = {
    "mlp": [(B, 20), (B, 12), (B, 10)],
    "cnn": [(B, 8, 8, 4), (B, 4, 4, 8), (B, 2, 2, 10)],
    "mixed": [(B, 7, 7, 4), (B, 4, 4, 12), (B, 10)],
    "sequence": [(B, 9, 5), (B, 9, 5), (B, 9, 10)],
}
BUILDERS = {
    "activation_boundary": lambda: features.project(losses.activation_boundary, always=True),
    "attention_transfer": lambda: features.project_maps(losses.attention_transfer),
    "cat_kd": features.cat_kd,
    "cka": lambda: features.relation(losses.cka),
    "factor_transfer": features.factor_transfer,
    "fsp": features.fsp,
    "hint": lambda: features.project(losses.hint),
    "mgd": features.mgd,
    "nst": lambda: features.project_maps(losses.nst),
    "ofd": features.ofd,
    "review_kd": features.review_kd,
    "semckd": features.semckd,
    "simkd": features.simkd,
    "vid": features.vid,
}
PAIRS = [("mlp", "cnn"), ("cnn", "mlp"), ("cnn", "mixed"), ("sequence", "cnn"), ("mlp", "mlp")]
KEY = jax.random.key(0)
parametrize = functools.partial(pytest.mark.parametrize, "name")


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def build(name, student, teacher, seed=0):
    part = BUILDERS[name]()
    init = jax.jit(lambda key: part.init(key, NETS[student], NETS[teacher]))
    return part, init(jax.random.key(seed))


@parametrize(BUILDERS)
def test_any_network_into_any_other(name):
    """Finite, a gradient for the student, and a value that a step against the gradient lowers."""
    parts = {pair: BUILDERS[name]() for pair in PAIRS}

    @jax.jit
    def init(key):
        return {(s, t): part.init(key, NETS[s], NETS[t]) for (s, t), part in parts.items()}

    params = init(KEY)
    students = {pair: draw(NETS[pair[0]]) for pair in PAIRS}
    teachers = {pair: draw(NETS[pair[1]], seed=1) for pair in PAIRS}

    @jax.jit
    def step(params, students):
        def total(variables):
            values = {
                pair: part.apply(
                    variables[0][pair], variables[1][pair], teachers[pair], key=jax.random.key(1)
                )
                for pair, part in parts.items()
            }
            return sum(v.mean() for v in values.values()), values

        (_, values), gradients = jax.value_and_grad(total, has_aux=True)((params, students))
        return values, gradients

    values, (by_params, by_student) = jax.device_get(step(params, students))
    params = jax.device_get(params)

    def lowered(pair):
        gradients = by_params[pair], by_student[pair]
        size = np.sqrt(sum(float(np.sum(g**2)) for g in jax.tree.leaves(gradients)))
        variables = params[pair], students[pair]
        return jax.tree.map(lambda x, g: x - np.float32(3e-3 / size) * g, variables, gradients)

    moved = {pair: lowered(pair) for pair in PAIRS}
    after, _ = jax.device_get(step(*({pair: m[i] for pair, m in moved.items()} for i in (0, 1))))
    for pair in PAIRS:
        assert values[pair].shape == (B,)
        assert values[pair].dtype == jnp.float32
        assert after[pair].mean() < values[pair].mean(), pair
        for g in jax.tree.leaves((by_params[pair], by_student[pair])):
            assert np.isfinite(g).all(), pair
        assert any(np.any(g) for g in jax.tree.leaves(by_student[pair])), pair


@parametrize(BUILDERS)
def test_parameters(name):
    part = BUILDERS[name]()
    shapes = [[(n, *s[1:]) for s in NETS["cnn"]] for n in (1, 256)]
    init = jax.jit(lambda key: [part.init(key, s, NETS["mixed"]) for s in shapes])  # no batch size in them
    (small, large), (other, _) = jax.device_get([init(KEY), init(jax.random.key(1))])
    assert jax.tree.structure(small) == jax.tree.structure(large)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        np.testing.assert_array_equal(a, b)
    leaves = zip(jax.tree.leaves(small), jax.tree.leaves(other), strict=True)
    assert not small or any(np.any(a != b) for a, b in leaves)
    for leaf in jax.tree.leaves(small):
        assert leaf.dtype == jnp.float32
        assert leaf.size <= 9 * 12 * 12


@parametrize(BUILDERS)
def test_examples_that_do_not_count(name):
    """They have value 0, and neither reach the others nor get a gradient; bfloat16 comes in."""
    part, params = build(name, "cnn", "mixed")
    student = [x.astype(jnp.bfloat16) for x in draw(NETS["cnn"])]
    teacher = [x.astype(jnp.bfloat16) for x in draw(NETS["mixed"], seed=1)]
    where = np.arange(B) < B - 2
    shorter = [[x[: B - 2] for x in features] for features in (student, teacher)]
    kept = {}
    if name == "mgd":
        kept = {"masks": [np.ones((1, 1)), np.ones((1, 1)), np.array([[1.0] * 5 + [0.0] * 5])]}
    expected = jax.jit(functools.partial(part.apply, **kept))(params, *shorter)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def total(params, student, teacher):
        values = part.apply(params, student, teacher, where=where, **kept)
        return values.sum(), values

    for x in (*student, *teacher):
        x[B - 2 :] = np.nan
    (_, values), gradients = jax.device_get(total(params, student, teacher))
    np.testing.assert_allclose(values[: B - 2], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(values[B - 2 :], 0)
    assert values.dtype == jnp.float32
    for g in gradients:
        assert np.isfinite(np.asarray(g, np.float32)).all()
        assert not np.any(np.asarray(g[B - 2 :], np.float32))


@parametrize(BUILDERS)
def test_zero_features(name):
    part, params = build(name, "cnn", "mixed")
    zero = [np.zeros(shape, np.float32) for shape in NETS["cnn"]]
    teacher = draw(NETS["mixed"])

    @jax.jit
    @jax.value_and_grad
    def total(variables, teacher):
        return part.apply(*variables, teacher, key=KEY).sum()

    for target in (teacher, [0 * t for t in teacher]):
        value, gradients = total((params, zero), target)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


SPATIAL = ["activation_boundary", "attention_transfer", "factor_transfer", "hint", "mgd", "nst", "ofd",
           "simkd", "vid"]  # fmt: skip


@parametrize(SPATIAL)
def test_padded_sequences(name):
    """One mask per layer: what is cut off and what is masked are the same."""
    part = BUILDERS[name]()
    shapes = [[(2, 9, 3)], [(2, 9, 4)]]
    params = jax.jit(lambda key: part.init(key, *shapes))(KEY)
    student, teacher = (draw(shape, seed=i) for i, shape in enumerate(shapes))
    options = {"masks": [np.ones((2, 1, 1))]} if name == "mgd" else {}
    apply = functools.partial(part.apply, **options)
    expected = jax.jit(apply)(params, [student[0][:, :6]], [teacher[0][:, :6]])
    student[0][:, 6:] = np.nan
    teacher[0][:, 6:] = np.nan
    where = [(np.arange(9) < 6)[None]]
    values = jax.jit(functools.partial(apply, where=where))(params, student, teacher)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


# --- what each promises ----------------------------------------------------------------------


def test_project_is_the_identity_where_shapes_agree():
    shapes = NETS["cnn"]
    student, teacher = draw(shapes), draw(shapes, seed=1)
    part = features.project(losses.hint)
    params = part.init(KEY, shapes, shapes)
    assert params == {}
    expected = sum(losses.hint(s, t) for s, t in zip(student, teacher, strict=True))
    np.testing.assert_allclose(part.apply(params, student, teacher), expected, rtol=1e-6)
    always = features.project(losses.hint, always=True).init(KEY, shapes, shapes)
    assert {k: v["kernel"].shape for k, v in always.items()} == {
        "layer0": (4, 4), "layer1": (8, 8), "layer2": (10, 10),
    }  # fmt: skip


def test_project_pools_or_resizes():
    student, teacher = draw([(2, 4, 4, 3)]), draw([(2, 2, 2, 3)], seed=1)
    pooled = student[0].reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
    value = features.project(losses.hint).apply({}, student, teacher)
    np.testing.assert_allclose(value, losses.hint(pooled, teacher[0]), rtol=1e-5)
    upwards = features.project(losses.hint, space="resize").apply({}, teacher, student)
    resized = jax.image.resize(teacher[0], (2, 4, 4, 3), "linear")
    np.testing.assert_allclose(upwards, losses.hint(resized, student[0]), rtol=1e-6)
    flat = features.project(losses.hint).apply({}, student, [teacher[0].mean((1, 2))])
    np.testing.assert_allclose(flat, losses.hint(student[0].mean((1, 2)), teacher[0].mean((1, 2))), rtol=1e-5)


def test_vid_learns_the_variance():
    part = features.vid(initial_variance=5.0)
    params = part.init(KEY, [(4, 3)], [(4, 5)])
    variance = jax.nn.softplus(params["layer0"]["alpha"]) + 1e-5
    np.testing.assert_allclose(variance, 5, rtol=1e-6)
    student, teacher = draw([(4, 3)]), draw([(4, 5)], seed=1)
    gradient = jax.grad(lambda p: part.apply(p, student, teacher).mean())(params)
    assert np.all(gradient["layer0"]["alpha"] != 0)


def test_the_paraphraser_sees_reconstruction_alone():
    part = features.factor_transfer(reconstruction=0.0)
    params = part.init(KEY, [(4, 3)], [(4, 5)])
    student, teacher = draw([(4, 3)]), draw([(4, 5)], seed=1)
    gradient = jax.grad(lambda p: part.apply(p, student, teacher).sum())(params)["layer0"]
    assert params["layer0"]["paraphraser"]["kernel"].shape == (5, 3)
    assert not np.any(gradient["paraphraser"]["kernel"])
    assert np.any(gradient["translator"]["kernel"])


def test_mgd_masks():
    part = features.mgd(masked=0.5)
    shapes = [(2, 4, 4, 3)]
    params = part.init(KEY, shapes, shapes)
    student, teacher = draw(shapes), draw(shapes, seed=1)
    with pytest.raises(ValueError, match="give apply key="):
        part.apply(params, student, teacher)
    one, two = (part.apply(params, student, teacher, key=jax.random.key(i)) for i in (0, 1))
    assert np.any(one != two)
    np.testing.assert_array_equal(one, part.apply(params, student, teacher, key=jax.random.key(0)))
    whole = part.apply(params, student, teacher, masks=[np.ones((1, 1, 1, 1))])
    unmasked = features.mgd(masked=0.0).apply(params, student, teacher, key=KEY)
    np.testing.assert_allclose(whole, unmasked, rtol=1e-6)
    dropped = features.mgd(masked=1.0, mask="channels").apply(params, student, teacher, key=KEY)
    np.testing.assert_allclose(dropped, np.square(teacher[0]).sum((1, 2, 3)), rtol=1e-5)


def test_mgd_of_its_authors():
    folder = Path(__file__).parent / "golden"
    spec = importlib.util.spec_from_file_location("make_features", folder / "make_features.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs = module.features_inputs()
    constants = json.loads((folder / "features.json").read_text())["mgd MGD"]
    rng = np.random.default_rng(7)
    shapes = {"map": (6, 4, 1, 1), "first": (6, 6, 3, 3), "second": (6, 6, 3, 3)}
    drawn = {
        name: {
            "kernel": np.moveaxis(rng.normal(size=shape) / 4, (2, 3), (0, 1)).swapaxes(2, 3),
            "bias": rng.normal(size=shape[0]) / 4,
        }
        for name, shape in shapes.items()
    }
    drawn["map"]["kernel"] = drawn["map"]["kernel"][0, 0]
    mask = rng.random((2, 6, 1, 1)).transpose(0, 2, 3, 1) >= 0.5
    params = {"map": {"layer0": drawn.pop("map")}, "generate": {"layer0": drawn}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    student, teacher = (inputs[name].astype(np.float32) for name in ("student", "wide"))

    def loss(s):
        return features.mgd().apply(params, [s], [teacher], masks=[mask]).mean()

    value, gradient = jax.value_and_grad(loss)(student)
    np.testing.assert_allclose(value, constants["value"], rtol=2e-6)
    np.testing.assert_allclose(jnp.linalg.norm(gradient.ravel()), constants["norm"], rtol=2e-6)


def test_simkd_features_are_what_was_trained():
    shapes = [(2, 4, 4, 3)], [(2, 2, 2, 6)]
    part = features.simkd()
    params = part.init(KEY, *shapes)
    student = draw(shapes[0])
    seen = features.simkd_features(params["layer0"], student[0], shapes[1][0])
    assert seen.shape == (2, 6)

    def loss(bias):
        target = jnp.broadcast_to(bias, shapes[1][0])
        return part.apply(params, student, [target]).sum()

    # the mean squared error to a constant map is flat where the constant is the projected mean
    gradient = jax.grad(loss)(jnp.mean(seen, 0))
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_semckd_attends_to_the_teachers_layers():
    """Layers may differ in number, and with a high temperature the attention is even."""
    shapes = NETS["cnn"][:2], NETS["mixed"]
    part = features.semckd(temperature=1e6)
    params = part.init(KEY, *shapes)
    student, teacher = draw(shapes[0]), draw(shapes[1], seed=1)
    value = part.apply(params, student, teacher)
    project = features.project(losses.hint, always=True)
    expected = sum(
        project.apply({"layer0": params["map"][f"layer{i}to{j}"]}, [s], [t])
        for i, s in enumerate(student)
        for j, t in enumerate(teacher)
    )
    np.testing.assert_allclose(value, expected / 6, rtol=1e-4)


def test_cat_kd_reads_features_by_the_teachers_classifier():
    student, teacher, kernel = *draw([(2, 4, 4, 10), (2, 4, 4, 6)]), draw([(6, 10)])[0]
    part = features.cat_kd(teacher_kernel=kernel)
    params = part.init(KEY, [student.shape], [teacher.shape])
    assert params == {}  # the student's ten channels are its classes
    maps = features.class_activation_maps(teacher, kernel)
    value = part.apply(params, [student], [teacher])
    np.testing.assert_allclose(value, losses.cat_kd(student, maps), rtol=1e-6)
    params = part.init(KEY, [(2, 4, 4, 3)], [teacher.shape])
    assert params["layer0"]["kernel"].shape == (3, 10)


def test_flat_layers_are_maps_over_units():
    student, teacher = draw([(3, 5)]), draw([(3, 5)], seed=1)
    value = features.project_maps(losses.attention_transfer).apply({}, student, teacher)
    expected = losses.attention_transfer(student[0][..., None], teacher[0][..., None])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.all(value > 0)


# --- misuse ----------------------------------------------------------------------------------


def test_errors_say_what_is_wrong():
    part = features.project(losses.hint)
    maps, smaller = draw([(2, 4, 4, 3)]), draw([(2, 2, 2, 3)])
    with pytest.raises(ValueError, match="must have the same number of layers, at least 1, got 1 and 2"):
        part.apply({}, maps, maps * 2)
    with pytest.raises(ValueError, match="at least 2, got 1 and 1"):
        features.fsp().init(KEY, [(2, 3)], [(2, 3)])
    with pytest.raises(ValueError, match="put a single layer into a list"):
        part.apply({}, maps[0], maps[0])
    with pytest.raises(ValueError, match="layer 0: where must have shape"):
        part.apply({}, maps, smaller, where=[np.ones((2, 4, 4), bool)])
    with pytest.raises(ValueError, match="one mask per layer, 1 in all, got 2"):
        part.apply({}, maps, maps, where=[None, None])
    with pytest.raises(ValueError, match="does not keep positions apart"):
        features.relation(losses.cka).apply({}, maps, maps, where=np.ones((2, 4, 4), bool))
    with pytest.raises(ValueError, match="space must be 'pool' or 'resize', got 'crop'"):
        features.project(losses.hint, space="crop")
    with pytest.raises(ValueError, match="initial_variance"):
        features.vid(initial_variance=0.0)
    with pytest.raises(ValueError, match="mask must be"):
        features.mgd(mask="pixels")
    with pytest.raises(ValueError, match="margin must have one entry per layer, 1 in all, got 2"):
        features.ofd(margin=[0.0, 0.0]).apply(
            features.ofd().init(KEY, [(2, 3)], [(2, 3)]), draw([(2, 3)]), draw([(2, 3)])
        )


def test_a_relation_compares_pooled_features_or_whole_ones():
    student, teacher = draw([(B, 4, 4, 3)]), draw([(B, 5)], seed=1)
    pooled = features.relation(losses.pkt, pool=True).apply({}, student, teacher)
    np.testing.assert_allclose(pooled, losses.pkt(student[0].mean((1, 2)), teacher[0]), rtol=1e-5)
    whole = features.relation(losses.pkt).apply({}, student, teacher)
    np.testing.assert_array_equal(whole, losses.pkt(student[0], teacher[0]))
