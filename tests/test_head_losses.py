"""Losses from hidden states in chunks of tokens, against the usual formulas in float64, on one device and on four."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import losses
from distill_jax.losses import tokens

SHAPE, WIDTHS, VOCABULARY, T = (2, 7), (8, 6), 12, 2.0


def draw(shape=SHAPE, seed=0):
    """Hidden states, kernels and biases of student and teacher, and a weight per token."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    networks = [(array(*shape, width), array(width, VOCABULARY), array(VOCABULARY)) for width in WIDTHS]
    return *networks, np.abs(array(*shape))


LABELS = np.arange(14).reshape(SHAPE) % VOCABULARY
MASK = np.arange(7) < np.array([[7], [3]])


# --- the usual formulas ----------------------------------------------------------------------


def kl(student, teacher):
    q, p = log_softmax(student), log_softmax(teacher)
    return jnp.sum(jnp.exp(p) * (p - q), -1)


def mixed(student, teacher, share):
    """KL(p‖m) and KL(q‖m) with m = share·p + (1 − share)·q."""
    q, p = log_softmax(student), log_softmax(teacher)
    m = jnp.log(share * jnp.exp(p) + (1 - share) * jnp.exp(q))
    return jnp.sum(jnp.exp(p) * (p - m), -1), jnp.sum(jnp.exp(q) * (q - m), -1)


def jensen_shannon(student, teacher):
    of_p, of_q = mixed(student, teacher, 0.1)
    return 0.1 * of_p + 0.9 * of_q


def with_other(student, teacher):
    """Of the teacher's three likeliest tokens, and the rest."""
    indices = np.argsort(-np.asarray(FIXED_TEACHER), -1)[..., :3]

    def bucket(z):
        p = jnp.exp(log_softmax(z))
        chosen = jnp.take_along_axis(p, indices, -1)
        return jnp.log(jnp.append(chosen, 1 - chosen.sum(-1, keepdims=True), -1))

    return kl(bucket(student), bucket(teacher))


def of_labels(student, teacher):
    log_q = log_softmax(T * student)
    return -0.9 * jnp.take_along_axis(log_q, LABELS[..., None], -1)[..., 0] - 0.1 * log_q.mean(-1)


def capped(hidden, kernel, bias, softcap):
    z = hidden @ kernel + bias
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


(_, _, _), (_H, _K, _B), _ = draw()
FIXED_TEACHER = capped(_H, _K, _B, 4.0)
TOP = tokens.top_k(FIXED_TEACHER, 3, temperature=T)

# The formula of softened logits; ours; what it compares with instead of the teacher's hidden states; its factor
CASES = {
    "kl": (kl, losses.kl, None, T**2),
    "reverse_kl": (lambda s, t: kl(t, s), losses.reverse_kl, None, T**2),
    "jensen_shannon": (jensen_shannon, functools.partial(losses.jensen_shannon, beta=0.1), None, T**2),
    "skew_kl": (lambda s, t: mixed(s, t, 0.1)[0], losses.skew_kl, None, T**2),
    "cross_entropy": (of_labels, functools.partial(losses.cross_entropy, label_smoothing=0.1), LABELS, 1.0),
    "top-k and OTHER": (with_other, tokens.bucketed(losses.kl), TOP, T**2),
}


@functools.cache
def expected(name):
    """Values and gradients of the weighted sum for hidden states, kernel and bias of the student, in float64."""
    formula, _, _, factor = CASES[name]
    student, teacher, weights = draw()
    with jax.enable_x64(True):

        def total(*student):
            logits = capped(*student, 5.0) / T, capped(*(np.float64(x) for x in teacher), 4.0) / T
            values = jnp.where(MASK, factor * formula(*logits), 0.0)
            return jnp.sum(weights * values), values

        run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
        (_, values), gradients = run(*(np.float64(x) for x in student))
        return np.asarray(values), [np.asarray(x) for x in gradients]


def ours(name, student, teacher, *, reduce=None, chunk=5, weights=None):
    _, loss, labels, factor = CASES[name]
    given = {"student_kernel": student[1:], "student_softcap": 5.0, "tokens": MASK}
    if factor != 1:
        given["temperature"] = T
    if labels is None:
        given |= {"teacher_kernel": teacher[1:], "teacher_softcap": 4.0}
        labels = teacher[0]
    if reduce:
        given["weights"] = weights
    return tokens.chunked(loss, chunk=chunk, reduce=reduce)(student[0], labels, **given)


def close(found, wanted, tolerance=1e-6):
    wanted = np.asarray(wanted, np.float64)
    return np.abs(np.asarray(found, np.float64) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_within_1e_6_of_float64(name):
    """With biases, softcaps, a temperature, and NaN at tokens that do not count; each value, their sum and mean."""
    student, teacher, weights = draw()
    spoilt = [
        (np.where(MASK[..., None], x[0], np.nan).astype(np.float32), *x[1:]) for x in (student, teacher)
    ]

    @jax.jit
    def run(student, teacher, weights):
        def each(*student):
            values = ours(name, student, teacher)
            return jnp.sum(weights * values), values

        def sums(*student):
            return ours(name, student, teacher, reduce="sum", weights=weights)

        def means(*student):
            return 3 * ours(name, student, teacher, reduce="mean", weights=weights)

        whole = ours(name, student, teacher, chunk=None)
        (_, values), gradients = jax.value_and_grad(each, (0, 1, 2), has_aux=True)(*student)
        return (
            (whole, values), gradients,
            jax.value_and_grad(sums, (0, 1, 2))(*student), jax.value_and_grad(means, (0, 1, 2))(*student),
        )  # fmt: skip

    both, gradients, (total, of_total), (mean, of_mean) = run(*spoilt, weights)
    values, wanted = expected(name)
    weight = (weights * MASK).sum()
    assert all(close(x, values) for x in both)
    assert close(total, (weights * values).sum())
    assert close(mean, 3 * (weights * values).sum() / weight)
    for found, factor in ((gradients, 1), (of_total, 1), (of_mean, 3 / weight)):
        for x, exact in zip(found, wanted, strict=True):
            assert x.dtype == jnp.float32
            assert close(x, factor * exact)
        np.testing.assert_array_equal(np.asarray(found[0])[~MASK], 0)


def test_chunks_of_any_size_and_the_teachers_gradient():
    student, teacher, weights = draw()

    @jax.jit
    def run(student, teacher, weights, temperature):
        def total(student, teacher, weights, temperature, chunk, reduce):
            value = tokens.chunked(losses.kl, chunk=chunk, reduce=reduce)(
                student[0], teacher[0], student_kernel=student[1:], teacher_kernel=teacher[1:],
                temperature=temperature, **({"weights": weights} if reduce else {}),
            )  # fmt: skip
            return value if reduce else jnp.sum(weights * value)

        return [
            jax.value_and_grad(total, (0, 1, 2, 3))(student, teacher, weights, temperature, *how)
            for how in ((None, None), (1, None), (5, None), (13, None), (14, None), (6, "sum"))
        ]

    plain, *others = run(student, teacher, weights, T)
    for other in others:
        for x, exact in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
            assert close(x, exact, 3e-6)


def test_tokens_that_fill_up_the_last_chunk_reach_no_gradient():
    student, _, _ = draw()

    @jax.jit
    def run(student):
        def total(student, chunk):
            loss = tokens.chunked(tokens.bucketed(losses.kl), chunk=chunk, reduce="sum")
            return loss(student[0], TOP, student_kernel=student[1:], temperature=T)

        return [jax.grad(total)(student, chunk) for chunk in (5, None)]

    chunks, plain = run(student)
    assert all(close(x, y, 3e-6) for x, y in zip(chunks, plain, strict=True))


def test_bfloat16_is_summed_in_float32():
    student, teacher, _ = draw((1, 64))
    low = [tuple(jnp.asarray(x, jnp.bfloat16) for x in network) for network in (student, teacher)]
    wide = [tuple(np.asarray(x, np.float64) for x in network) for network in low]

    def total(student, teacher, reduce):
        loss = tokens.chunked(losses.kl, chunk=1, reduce=reduce)
        value = loss(student[0], teacher[0], student_kernel=student[1:], teacher_kernel=teacher[1:])
        return jnp.sum(value), value

    @jax.jit
    def run(*networks):
        return [
            jax.grad(functools.partial(total, reduce=how), has_aux=True)(*networks) for how in (None, "sum")
        ]

    with jax.enable_x64(True):
        formula = jax.jit(jax.value_and_grad(lambda s, t: jnp.sum(kl(capped(*s, None), capped(*t, None)))))
        value, exact = formula(*wide)
        value, exact = np.asarray(value), [np.asarray(x) for x in exact]
    for gradients, values in run(*low):
        assert values.dtype == jnp.float32
        assert close(values.sum(), value)
        for x, wanted in zip(gradients, exact, strict=True):
            assert x.dtype == jnp.bfloat16
            error = np.asarray(x, np.float64) - wanted
            # Each is rounded at the end, and the gradient for the logits once
            assert np.sqrt((error**2).mean()) < 2**-9 * np.sqrt((wanted**2).mean()) * 1.5


def test_no_token_and_no_token_that_counts():
    student, teacher, _ = draw((2, 0))
    for reduce, shape in ((None, (2, 0)), ("sum", ()), ("mean", ())):
        loss = tokens.chunked(losses.kl, chunk=3, reduce=reduce)
        value = loss(student[0], teacher[0], student_kernel=student[1], teacher_kernel=teacher[1])
        assert value.shape == shape
        assert not np.any(value)
    student, teacher, _ = draw()
    loss = tokens.chunked(losses.kl, chunk=3, reduce="mean")

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(hidden, kernel):
        return loss(hidden, teacher[0], student_kernel=kernel, teacher_kernel=teacher[1], tokens=MASK & False)

    for x in jax.tree.leaves(run(student[0] * np.nan, student[1])):
        np.testing.assert_array_equal(x, 0)


def test_where_and_temperature_have_the_axes_of_the_logits():
    student, teacher, _ = draw()
    logits = [jnp.asarray(x[0] @ x[1]) for x in (student, teacher)]
    exists = np.arange(VOCABULARY) < 9
    small = tokens.chunked(losses.kl, chunk=3)

    @jax.jit
    def run():
        found = []
        for options in (
            {"where": exists[None, None]},
            {"where": MASK[..., None]},
            {"where": MASK[..., None] & exists, "hidden": np.where(MASK[..., None], student[0], np.nan)},
            {"temperature": 1 + LABELS[..., None]},
            {"temperature": np.full((1, 1, 1), 3.0)},
        ):
            hidden = options.pop("hidden", student[0])

            def each(hidden, kernel, options=options):
                values = small(
                    hidden, teacher[0], student_kernel=kernel, teacher_kernel=teacher[1], **options
                )
                return values.sum(), values

            gradients, chunks = jax.grad(each, (0, 1), has_aux=True)(hidden, student[1])
            found.append((chunks, losses.kl(*logits, **options), gradients))
        return found

    for chunks, whole, gradients in run():
        np.testing.assert_allclose(chunks, whole, rtol=1e-5, atol=1e-6)
        assert all(np.isfinite(x).all() for x in gradients)


def test_options_may_be_traced_where_the_loss_is_differentiated():
    student, teacher, _ = draw()
    exists, whole_number = jnp.arange(VOCABULARY) < 9, jnp.int32(2)

    def value(hidden, exists, temperature, chunk=3):
        return tokens.chunked(losses.kl, chunk=chunk, reduce="sum")(
            hidden, teacher[0], student_kernel=student[1], teacher_kernel=teacher[1], where=exists[None, None],
            temperature=temperature,
        )  # fmt: skip

    def repeated(hidden, exists, temperature):
        def step(total, _):
            return total + value(hidden, exists & (total < jnp.inf), temperature), None

        return jax.lax.scan(step, 0.0, length=1)[0]

    arguments = student[0], exists, whole_number
    found = jax.jit(lambda *x: [jax.grad(f)(*x) for f in (jax.jit(value), jax.checkpoint(value), repeated)])(
        *arguments
    )
    wanted = jax.grad(functools.partial(value, chunk=None))(*arguments)
    for each in found:
        np.testing.assert_allclose(each, wanted, rtol=1e-5, atol=1e-6)


# --- the vocabulary on several devices -------------------------------------------------------


SPREAD = {name: CASES[name] for name in ("kl", "reverse_kl", "jensen_shannon", "skew_kl", "cross_entropy")}


@pytest.mark.parametrize("axes", [("vocabulary",), ("batch", "vocabulary")])
def test_a_vocabulary_on_four_devices_is_that_of_one(axes):
    """Inside shard_map, by sums and maxima over the mesh; and by jit, which does the same by itself."""
    student, teacher, weights = draw()
    mesh = jax.make_mesh(
        (4,) if len(axes) == 1 else (2, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )
    rows = P(*axes[:-1])
    network = (rows, P(None, "vocabulary"), P("vocabulary"))

    def values(name, student, teacher, labels, reduce, chunk, weights, **options):
        _, loss, given, factor = SPREAD[name]
        options |= {"temperature": T} if factor != 1 else {}
        options |= {"weights": weights} if reduce else {}
        options |= {"teacher_kernel": teacher[1:], "teacher_softcap": 4.0} if given is None else {}
        return tokens.chunked(loss, chunk=chunk, reduce=reduce)(
            student[0], teacher[0] if given is None else labels, student_kernel=student[1:],
            student_softcap=5.0, **options,
        )  # fmt: skip

    def total(student, teacher, labels, weights, name, reduce, chunk=2, **options):
        value = values(name, student, teacher, labels, reduce, chunk, weights, **options)
        value = value if reduce else jnp.sum(weights * value)
        return jax.lax.psum(value, "batch") if options and len(axes) > 1 else value

    everything = [("kl", "sum"), *((name, None) for name in SPREAD)]
    if len(axes) > 1:
        everything = [("kl", "sum"), ("cross_entropy", None), ("kl", "sum", None)]

    def spread(student, teacher, labels, weights):
        def mapped(name, reduce, chunk=2):
            return jax.shard_map(
                functools.partial(total, name=name, reduce=reduce, chunk=chunk, axis_name="vocabulary"),
                mesh=mesh, in_specs=(network, network, rows, rows), out_specs=P(),
            )  # fmt: skip

        return [jax.value_and_grad(mapped(*how))(student, teacher, labels, weights) for how in everything]

    def whole(*arrays):
        return [jax.value_and_grad(total)(*arrays, *how) for how in everything]

    arrays = student, teacher, LABELS, weights
    placed = jax.device_put(
        arrays, jax.tree.map(lambda spec: NamedSharding(mesh, spec), (network, network, rows, rows))
    )
    wanted = jax.tree.leaves(jax.jit(whole)(*arrays))
    for found in (jax.jit(spread)(*placed), jax.jit(whole)(*placed)):
        assert all(close(x, y) for x, y in zip(jax.tree.leaves(found), wanted, strict=True))


def test_classes_that_exist_on_another_device_alone():
    student, teacher, _ = draw()
    mesh = jax.make_mesh((4,), ("vocabulary",), axis_types=(jax.sharding.AxisType.Auto,))
    exists = (np.arange(VOCABULARY) < 3) | ~MASK[..., None]  # of most tokens those of the first device alone
    columns = P(None, "vocabulary")

    def total(student_kernel, teacher_kernel, where, **options):
        return tokens.chunked(losses.kl, chunk=4, reduce="mean")(
            student[0], teacher[0], student_kernel=student_kernel, teacher_kernel=teacher_kernel, where=where,
            **options,
        )  # fmt: skip

    spread = jax.shard_map(
        functools.partial(total, axis_name="vocabulary"),
        mesh=mesh, in_specs=(columns, columns, P(None, None, "vocabulary")), out_specs=P(),
    )  # fmt: skip
    arrays = student[1], teacher[1], exists
    found, wanted = (jax.jit(jax.value_and_grad(f))(*arrays) for f in (spread, total))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, atol=1e-6)


def test_a_vocabulary_that_is_not_spread_is_refused():
    student, teacher, _ = draw()

    def run(student, teacher):
        return losses.kl(student[0] @ student[1], teacher[0] @ teacher[1], axis_name="vocabulary")

    mesh = jax.make_mesh((4,), ("vocabulary",), axis_types=(jax.sharding.AxisType.Auto,))
    network = (P(), P(None, "vocabulary"), P("vocabulary"))
    for check, specs in ((False, network), (True, P())):
        mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, specs), out_specs=P(), check_vma=check)
        with pytest.raises(ValueError, match=r"axis_name names the mesh axis .* check_vma must be True"):
            mapped(student, teacher)
    with pytest.raises(ValueError, match="do not vary over 'vocabulary'"):
        run(student, teacher)


# --- misuse ----------------------------------------------------------------------------------


def test_misuse():
    student, teacher, weights = draw()
    given = {"student_kernel": student[1], "teacher_kernel": teacher[1]}
    loss = tokens.chunked(losses.kl, chunk=3)

    def refused(match, *args, loss=loss, **options):
        with pytest.raises(ValueError, match=match) as error:
            loss(*(args or (student[0], teacher[0])), **given | options)
        assert "\n" not in str(error.value)

    refused("weights need reduce='mean' or 'sum'", weights=weights)
    refused("student_softcap must be positive and finite, got 0", student_softcap=0.0)
    refused("teacher_softcap must be a number, got an array", teacher_softcap=np.ones(3))
    refused("teacher_softcap needs teacher_kernel", teacher_kernel=None, teacher_softcap=3.0)
    refused("where must have one axis per axis of the logits", where=np.ones((1, VOCABULARY), bool))
    refused("where must be bool", where=np.ones((1, 1, VOCABULARY)))
    refused("temperature must have one axis per axis of the logits", temperature=np.ones(7))
    refused("tokens must broadcast to", tokens=np.ones(3, bool))
    refused("student_kernel must be real numbers, got dtype bool", student_kernel=student[1] > 0)
    refused("student_hidden must be real numbers", student[0] > 0, teacher[0])
    refused("the bias of student_kernel must be real numbers", student_kernel=(student[1], student[2] > 0))
    with pytest.raises(ValueError, match="reduce must be one of None, 'mean', 'sum', got 'max'"):
        tokens.chunked(losses.kl, reduce="max")
