"""What holds for every public loss, eagerly, compiled and mapped; what does not is in loss_contract.toml.

The losses are found by inspection: one without an entry in ``LOSSES`` fails the test. An exception that is not
one, because the rule holds after all, fails it too. The site shows the same file.
"""

import functools
import inspect
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses
from distill_jax.losses import tokens

CONTRACT = tomllib.loads(Path(__file__).with_name("loss_contract.toml").read_text(encoding="utf-8"))
EXAMPLES, POSITIONS, UNITS = 4, 6, 5  # a unit is a class of logits or a channel of features
LOGITS, FEATURES = (EXAMPLES, UNITS), (EXAMPLES, POSITIONS, UNITS)
LABELS = np.arange(EXAMPLES) % (UNITS - 1)  # the last class may be masked


class Entry(NamedTuple):
    """How a loss is called: ``call(student, teacher, where, **options)``, and what it compares."""

    call: object
    shape: tuple = FEATURES
    teacher: bool = True


def logits_of(loss):
    return Entry(lambda s, t, w, **o: loss(s, t, where=w, **o), LOGITS)


def logits_and_labels(loss):
    return Entry(lambda s, t, w, **o: loss(s, t, LABELS[: len(s)], where=w, **o), LOGITS)


def labels_of(loss, **given):
    def call(s, t, w, **options):
        return loss(s, LABELS[: len(s)], where=w, **(given | options))

    return Entry(call, LOGITS, teacher=False)


def features_of(loss):
    return Entry(lambda s, t, w, **o: loss(s, t, where=w, **o))


def fsp(s, t, w, **options):
    return losses.fsp((s, 2 * s[..., ::-1]), (t, 2 * t[..., ::-1]), where=w, **options)


def crd(s, t, w, **options):
    state = losses.crd_init(jax.random.key(0), 9, POSITIONS * UNITS)
    batch = len(s)
    negatives = np.tile(np.arange(5, 8), (batch, 1))
    return losses.crd(s, t, state, np.arange(batch), negatives, where=w, **options)[0]


def bucketed(s, t, w, **options):
    return tokens.bucketed(losses.kl)(s, tokens.top_k(t, 2, where=w), where=w, **options)


def other_cross_entropy(s, t, w):
    indices = np.tile(np.array([0, 2]), (len(s), 1))
    return tokens.other_cross_entropy(s, LABELS[: len(s)], indices, where=w)


def sequence(s, t, w, **options):
    return tokens.sequence(losses.kl, **options)(s, t, tokens=w[:, None] & np.ones(POSITIONS, bool))


def chunked(s, t, w, chunk=7, reduce=None):
    kernel = np.eye(UNITS, dtype=np.float32)
    loss = tokens.sequence(tokens.chunked(losses.kl, chunk=chunk, reduce=reduce))
    where = w[:, None] & np.ones(POSITIONS, bool)
    return loss(s, t, tokens=where, student_kernel=kernel, teacher_kernel=kernel)


def per_sequence(s, t, w, **options):
    return tokens.per_sequence(s[..., 0], where=w[:, None], **options)


COUNTS, PRIOR = np.arange(1, UNITS + 1), np.full(UNITS, 1 / UNITS, np.float32)
LOGIT_PAIRS = [
    "dist", "jensen_shannon", "kl", "mean_squared_logits", "mlkd", "ranking_hinge", "ranking_logistic",
    "reverse_kl", "skew_kl", "skew_reverse_kl", "soft_cross_entropy", "total_variation",
]  # fmt: skip
FEATURE_PAIRS = [
    "activation_boundary", "attention_transfer", "cat_kd", "cka", "correlation_congruence", "factor_transfer",
    "hierarchical_context", "hint", "ickd", "info_nce", "nst", "ofd", "pkt", "rkd_angle", "rkd_distance",
    "similarity_preserving", "vid",
]  # fmt: skip
LOSSES = {
    **{name: logits_of(getattr(losses, name)) for name in LOGIT_PAIRS},
    **{name: logits_and_labels(getattr(losses, name)) for name in ("dkd", "nkd", "wsld")},
    **{name: labels_of(getattr(losses, name)) for name in ("cross_entropy", "teacher_free")},
    "class_balanced": labels_of(losses.class_balanced, counts=COUNTS),
    "logit_adjusted": labels_of(losses.logit_adjusted, prior=PRIOR),
    **{name: features_of(getattr(losses, name)) for name in FEATURE_PAIRS},
    "fsp": Entry(fsp),
    "crd": Entry(crd),
    "tokens.bucketed": Entry(bucketed, LOGITS),
    "tokens.chunked": Entry(chunked),
    "tokens.other_cross_entropy": Entry(other_cross_entropy, LOGITS, teacher=False),
    "tokens.per_sequence": Entry(per_sequence, teacher=False),
    "tokens.sequence": Entry(sequence),
    "tokens.uld": logits_of(tokens.uld),
}


def public():
    for prefix, module in (("", losses), ("tokens.", tokens)):
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                yield prefix + name, getattr(module, name)


FUNCTIONS = dict(public())


def test_every_public_loss_has_an_entry():
    assert FUNCTIONS.keys() == LOSSES.keys() | CONTRACT["no_loss"].keys()
    assert not LOSSES.keys() & CONTRACT["no_loss"].keys()


def exceptions(name):
    return {entry["case"] for entry in CONTRACT["exception"] if name in entry["losses"]}


def test_exceptions_name_losses_and_rules():
    for entry in CONTRACT["exception"]:
        assert set(entry["losses"]) <= LOSSES.keys()
        assert entry["case"] in CONTRACT["rules"]
        assert entry["reason"].endswith(".")


# --- values ----------------------------------------------------------------------------------


def inputs(entry):
    """Student, teacher and mask of each case."""
    rng = np.random.default_rng(0)
    teacher = (2 * rng.normal(size=entry.shape)).astype(np.float32)
    student = teacher + rng.normal(size=entry.shape).astype(np.float32)
    logits = entry.shape == LOGITS
    where = np.ones(LOGITS if logits else EXAMPLES, bool)
    masked, one = where.copy(), np.zeros(entry.shape, bool)
    out = (slice(None), -1) if logits else 1  # a class, or an example
    masked[out] = False
    one[1, ..., 0] = True

    def fill(value, place=out):
        copies = student.copy(), teacher.copy()
        for x in copies:
            x[place] = value
        return copies

    first, second = (np.where(np.arange(UNITS) == k, np.float32(1e4), 0) for k in (0, 1))
    far = [np.broadcast_to(x, entry.shape).astype(np.float32) for x in (first, second)]
    signs = np.sign(student)
    cases = {
        "plain": (student, teacher, where),
        "NaN in the student": (np.where(one, np.nan, student), teacher, where),
        "NaN in the teacher": (student, np.where(one, np.nan, teacher), where),
        "masked NaN": (*fill(np.nan), masked),
        "masked, ordinary": (*fill(0.5), masked),
        "all masked": (*fill(np.nan, ...), np.zeros_like(where)),
        "−inf in both": (*fill(-np.inf), where),
        "gap of 1e4": (*far, where),
        "float16 extremes": (65504 * signs, -65504 * signs[..., ::-1], where),
        "bfloat16 extremes": (1.69e38 * signs, -1.69e38 * signs[..., ::-1], where),
        "student = teacher": (teacher, teacher, where),
    }
    return {case: tuple(np.asarray(x, bool if i == 2 else np.float32) for i, x in enumerate(arrays))
            for case, arrays in cases.items()}, masked  # fmt: skip


def broken(case, results, masked, logits):
    """Says what is wrong with the result of a case, or returns None."""
    values, *gradients = results[case]
    if case == "plain":
        if not all(np.isfinite(x).all() for x in results[case]):
            return "not finite"
    elif case.startswith("NaN"):
        if not np.isnan(values[1]):
            return "the NaN is hidden"
    elif case in ("masked NaN", "−inf in both"):
        if not np.allclose(values, results["masked, ordinary"][0], rtol=1e-5, atol=1e-7):
            return "the value depends on what is masked"
        hidden = (
            ~masked if logits else ~masked.reshape(-1, *(1,) * (gradients[0].ndim - 1) if gradients else ())
        )
        for g in gradients:
            if not np.isfinite(g).all() or (g * hidden).any():
                return "gradient where masked"
        if not logits and values[1] != 0:
            return "an excluded example has a value"
    elif case == "all masked":
        if any(x.any() for x in results[case]):
            return "value or gradient is not 0"
    elif case == "gap of 1e4":
        if not all(np.isfinite(x).all() for x in results[case]):
            return "not finite"
    elif "extremes" in case:
        if any(np.isnan(x).any() for x in results[case]):
            return "NaN"
    elif case == "student = teacher":
        for x, ordinary in zip(results[case], results["plain"], strict=True):
            if np.abs(x).max() > 1e-6 * max(1, np.abs(ordinary).max()):
                return "value or gradient is not 0"
    return None


def broken_rules(name):
    """The cases in which a rule does not hold, with the modes in which it does not."""
    entry = LOSSES[name]
    cases, masked = inputs(entry)

    def values_and_gradients(student, teacher, where):
        values, pull = jax.vjp(lambda *x: entry.call(*x, where), student, teacher)
        gradients = pull(jnp.ones_like(values))
        return values, *gradients[: 1 + entry.teacher]

    compiled = jax.jit(values_and_gradients)
    mapped = jax.jit(jax.vmap(values_and_gradients))(*map(np.stack, zip(*cases.values(), strict=True)))
    results = {
        "eager": {case: (entry.call(*map(jnp.asarray, x)),) for case, x in cases.items()},
        "jit": {case: compiled(*x) for case, x in cases.items()},
        "vmap": {case: [x[i] for x in mapped] for i, case in enumerate(cases)},
    }
    found = {}
    for mode, of_mode in results.items():
        of_mode = jax.tree.map(np.asarray, of_mode)
        for case in cases:
            if case == "NaN in the teacher" and not entry.teacher:
                continue
            if case == "−inf in both" and entry.shape != LOGITS:
                continue
            if case == "student = teacher" and not entry.teacher:
                continue
            wrong = broken(case, of_mode, masked, entry.shape == LOGITS)
            if wrong:
                found.setdefault(case, {})[mode] = wrong
    return found


@pytest.mark.filterwarnings("ignore:.*look like probabilities")
@pytest.mark.parametrize("name", LOSSES)
def test_rules_hold_eagerly_compiled_and_mapped(name):
    found = broken_rules(name)
    assert found.keys() == exceptions(name), f"{name}: {found}"


def test_dtypes():
    """Half precision is computed in float32; float32 stays float32 with x64 on, and float64 float64."""
    wrong = []
    for name, entry in LOSSES.items():
        where = jax.ShapeDtypeStruct(LOGITS if entry.shape == LOGITS else (EXAMPLES,), bool)
        for given, expected in (
            ("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64"),
        ):  # fmt: skip
            with jax.enable_x64(True):
                x = jax.ShapeDtypeStruct(entry.shape, given)
                value = jax.eval_shape(entry.call, x, x, where)
            if value.dtype != expected or value.shape != (EXAMPLES,):
                wrong.append((name, given, str(value.dtype), value.shape))
    assert not wrong, wrong


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_has_an_empty_result(name):
    entry = LOSSES[name]
    empty = jnp.zeros((0, *entry.shape[1:]))
    value = entry.call(empty, empty, jnp.ones((0, UNITS) if entry.shape == LOGITS else 0, bool))
    assert value.shape == (0,)
    assert value.dtype == jnp.float32


# --- arguments -------------------------------------------------------------------------------

POSITIVE = [0.0, -1.0, np.nan, np.inf, "warm", 1j, None]
FRACTION = [-0.1, 1.1, np.nan, "half", 1j, None]
COUNT = [0, -1, 1.5, True, "two"]
WORD = ["other"]
SWITCH = []  # true or false: no value is out of range
WRONG = {
    "alpha": FRACTION, "beta": FRACTION, "momentum": FRACTION, "probability": FRACTION,
    "label_smoothing": FRACTION,
    "temperature": POSITIVE, "variance": POSITIVE, "tau": [np.nan, np.inf, "t", 1j, None],
    "gamma": POSITIVE, "student_temperature": POSITIVE[:-1], "bandwidth": POSITIVE[:-1],
    "temperatures": [2.0, (), (0.0,), (np.nan,), "warm", None],
    "instance_weight": [np.nan, "w", 1j, None], "batch_weight": [np.nan, "w", 1j, None],
    "class_weight": [np.nan, "w", 1j, None],
    "margin": POSITIVE[:-1], "p": [0.5, -1, np.nan, np.inf, "two", None],
    "order": COUNT, "chunk": COUNT, "resolution": COUNT, "levels": [(0,), (1.5,), ("a",), 4, None],
    "kernel": WORD, "pool": WORD, "reduce": WORD, "soften": WORD,
    "weights": [np.float32(-1.0), "heavy", 1j],
    "counts": [-COUNTS, COUNTS[1:], 1j * COUNTS, "many"],
    "prior": [-PRIOR, PRIOR[1:], 1j * PRIOR, "flat"],
    "labels": [np.zeros(EXAMPLES), np.zeros(3, int), "cat"],
    "mean": SWITCH, "normalise": SWITCH, "include_self": SWITCH, "debiased": SWITCH, "symmetric": SWITCH,
}  # fmt: skip
# Where a keyword has another range than its namesakes
OTHER_RANGES = {
    ("ofd", "margin"): [1.0, np.nan, -np.inf, "low", 1j],
    ("ranking_hinge", "margin"): [-1.0, np.nan, np.inf, "wide", 1j],
    ("factor_transfer", "p"): [3, 0, np.nan, "two", None],
    ("dkd", "alpha"): [np.nan, "a", 1j, None], ("dkd", "beta"): [np.nan, "a", 1j, None],
    ("dist", "beta"): [np.nan, "a", 1j, None], ("dist", "gamma"): [np.nan, "a", 1j, None],
    ("nkd", "gamma"): [np.nan, "a", 1j, None],
}  # fmt: skip
ELSEWHERE = {"axis", "where", "axis_name"}  # the rules of values above, and the tests of each loss


def keywords(name):
    of_entry = {
        "tokens.bucketed": ["temperature"],
        "tokens.chunked": ["chunk", "reduce"],
        "tokens.sequence": ["reduce"],
    }
    if name in of_entry:
        return of_entry[name]
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    found = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
    return [k for k in found if k not in ELSEWHERE]


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_keywords_are_refused_in_one_line(name):
    entry = LOSSES[name]
    cases, _ = inputs(entry)
    accepted = []
    for keyword in keywords(name):
        for value in OTHER_RANGES.get((name, keyword), WRONG[keyword]):
            call = functools.partial(entry.call, **{keyword: value})
            try:
                jax.eval_shape(call, *cases["plain"])
            except ValueError as error:
                text = str(error)
                if keyword.rstrip("s") not in text or "\n" in text or len(text) > 300:
                    accepted.append((keyword, value, text))
            except Exception as error:
                accepted.append((keyword, value, repr(error)[:200]))
            else:
                accepted.append((keyword, value, "accepted"))
    assert not accepted, accepted
