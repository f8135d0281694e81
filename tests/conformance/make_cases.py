"""Writes cases.json: inputs, and the expected values and gradients in 50 digits, straight from the definitions.

    python tests/conformance/make_cases.py          # needs mpmath

Nothing here uses distill_jax. A class exists where its logit is above −inf and ``where`` is true. Gradients are
central differences with a step of 1e-20, in 60 digits, so they do not depend on formulas derived by hand.
"""

import json
import random
from pathlib import Path

import mpmath
import numpy as np
from mpmath import mp, mpf

mp.dps = 60
INF = float("inf")
NAN = float("nan")

# --- definitions -----------------------------------------------------------------------------


def log_softmax(logits, temperature=1.0, where=None):
    """Log-probabilities of the classes that exist, {class: log p}."""
    exists = [i for i, z in enumerate(logits) if z != -INF and (where is None or where[i])]
    softened = {i: mpf(logits[i]) / mpf(temperature) for i in exists}
    peak = max(softened.values(), default=0)
    total = mp.log(mp.fsum(mp.exp(z - peak) for z in softened.values())) if softened else mpf(0)
    return {i: z - peak - total for i, z in softened.items()}


def divergence(a, b):
    """KL(a‖b) of {class: log-probability}."""
    if any(i not in b for i in a):
        return mpf("inf")
    return mp.fsum(mp.exp(a[i]) * (a[i] - b[i]) for i in a)


def mixture(share, a, b):
    """log(share·a + (1 − share)·b), class by class."""
    both = {}
    for i in {*a, *b}:
        m = mpf(share) * (mp.exp(a[i]) if i in a else 0) + (1 - mpf(share)) * (mp.exp(b[i]) if i in b else 0)
        if m > 0:
            both[i] = mp.log(m)
    return both


def kl(student, teacher, temperature=1.0, where=None):
    p, q = log_softmax(teacher, temperature, where), log_softmax(student, temperature, where)
    return mpf(temperature) ** 2 * divergence(p, q)


def reverse_kl(student, teacher, **options):
    return kl(teacher, student, **options)


def jensen_shannon(student, teacher, beta=0.5, temperature=1.0, where=None):
    p, q = log_softmax(teacher, temperature, where), log_softmax(student, temperature, where)
    m = mixture(beta, p, q)
    value = mpf(0)
    if beta > 0:
        value += mpf(beta) * divergence(p, m)
    if beta < 1:
        value += (1 - mpf(beta)) * divergence(q, m)
    return mpf(temperature) ** 2 * value


def skew_kl(student, teacher, alpha=0.1, temperature=1.0):
    p, q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return mpf(temperature) ** 2 * divergence(p, mixture(alpha, p, q))


def skew_reverse_kl(student, teacher, **options):
    return skew_kl(teacher, student, **options)


def total_variation(student, teacher, temperature=1.0):
    p, q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return mp.fsum(abs(mp.exp(p[i]) - mp.exp(q[i])) for i in p) / 2


def soft_cross_entropy(student, teacher, temperature=1.0, where=None):
    p, q = log_softmax(teacher, temperature, where), log_softmax(student, temperature, where)
    if any(i not in q for i in p):
        return mpf("inf")
    return -(mpf(temperature) ** 2) * mp.fsum(mp.exp(p[i]) * q[i] for i in p)


def cross_entropy(student, labels, label_smoothing=0.0, where=None):
    """``labels`` is a class, or one probability per class."""
    q = log_softmax(student, 1.0, where)
    targets = labels if isinstance(labels, list) else [float(i == labels) for i in range(len(student))]
    smoothing = mpf(label_smoothing)
    targets = [
        (1 - smoothing) * mpf(y) + (smoothing / len(q) if i in q else 0) for i, y in enumerate(targets)
    ]
    if any(y > 0 and i not in q for i, y in enumerate(targets)):
        return mpf("inf")
    return -mp.fsum(y * q[i] for i, y in enumerate(targets) if y > 0)


def cross_entropy_smoothed_over_existing(student, **options):
    return cross_entropy(student, **options)


def logit_adjusted(student, labels, prior, tau=1.0):
    shifted = [-INF if n == 0 else z + mpf(tau) * mp.log(n) for z, n in zip(student, prior, strict=True)]
    return cross_entropy(shifted, labels)


def mean_squared_logits(student, teacher):
    both = [i for i in range(len(student)) if student[i] != -INF and teacher[i] != -INF]
    return mp.fsum((mpf(student[i]) - mpf(teacher[i])) ** 2 for i in both) / len(both)


def kd_and_labels(student, teacher, labels, alpha, temperature):
    """Mean over the batch of α·cross-entropy + (1 − α)·T²·KL."""
    terms = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        terms.append(mpf(alpha) * cross_entropy(s, y) + (1 - mpf(alpha)) * kl(s, t, temperature))
    return mp.fsum(terms) / len(terms)


def dkd(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0):
    sides = []
    for logits in (teacher, student):
        full = log_softmax(logits, temperature)
        others = log_softmax([-INF if i == labels else z for i, z in enumerate(logits)], temperature)
        rest = mp.log(mp.fsum(mp.exp(full[i]) for i in others))
        sides.append(({0: full[labels], 1: rest}, others))
    (binary_p, others_p), (binary_q, others_q) = sides
    terms = mpf(alpha) * divergence(binary_p, binary_q) + mpf(beta) * divergence(others_p, others_q)
    return mpf(temperature) ** 2 * terms


def standardised(logits, ddof):
    mean = mp.fsum(map(mpf, logits)) / len(logits)
    variance = mp.fsum((mpf(z) - mean) ** 2 for z in logits) / (len(logits) - ddof)
    return [(z - mean) / mp.sqrt(variance) if variance > 0 else mpf(0) for z in logits]


def standardised_kl(student, teacher, ddof, temperature):
    return kl(standardised(student, ddof), standardised(teacher, ddof), temperature)


def correlation_distance(a, b):
    a, b = ([x - mp.fsum(v) / len(v) for x in v] for v in (a, b))
    inner = mp.fsum(x * y for x, y in zip(a, b, strict=True))
    return 1 - inner / mp.sqrt(mp.fsum(x * x for x in a) * mp.fsum(y * y for y in b))


def dist(student, teacher):
    q, p = ([[mp.exp(x) for x in log_softmax(row).values()] for row in side] for side in (student, teacher))
    between = [correlation_distance(a, b) for a, b in zip(q, p, strict=True)]
    within = [correlation_distance(a, b) for a, b in zip(zip(*q), zip(*p), strict=True)]  # noqa: B905
    return mp.fsum(between) / len(between) + mp.fsum(within) / len(within)


def token_values(loss, student, other, tokens=None, weights=None, reduce="tokens", **options):
    """Values of tokens, reduced over the tokens that count."""
    sums, totals = [], []
    for b, sequence in enumerate(student):
        used = [i for i in range(len(sequence)) if tokens is None or tokens[b][i]]
        used = [i for i in used if weights is None or weights[b][i] != 0]
        weight = {i: mpf(1 if weights is None else weights[b][i]) for i in used}
        sums.append(mp.fsum(weight[i] * loss(sequence[i], other[b][i], **options) for i in used))
        totals.append(mp.fsum(weight.values()))
    if reduce == "sum":
        return mp.fsum(sums)
    if reduce == "tokens":
        return mp.fsum(sums) / mp.fsum(totals) if mp.fsum(totals) > 0 else mpf(0)
    means = [s / n if n > 0 else mpf(0) for s, n in zip(sums, totals, strict=True)]
    return mp.fsum(means) / len(means)


def kl_of_tokens(student, teacher, **options):
    return token_values(kl, student, teacher, **options)


def cross_entropy_of_tokens(student, labels, ignored, **options):
    tokens = [[label != ignored for label in sequence] for sequence in labels]
    return token_values(cross_entropy, student, labels, tokens=tokens, **options)


def top_k_kl(student, teacher, k, temperature=1.0):
    p, q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    chosen = sorted(p, key=lambda i: -p[i])[:k]

    def bucket(logs):
        rest = [mp.exp(x) for i, x in logs.items() if i not in chosen]
        return {**{i: logs[i] for i in chosen}, **({"other": mp.log(mp.fsum(rest))} if rest else {})}

    return mpf(temperature) ** 2 * divergence(bucket(p), bucket(q))


# Features: [batch][units], or [batch][height][width][channels]


def flat(x):
    return [y for part in x for y in flat(part)] if isinstance(x, list) else [mpf(x)]


def norm(x, p=2):
    return mp.fsum(abs(y) ** p for y in x) ** (mpf(1) / p) if any(x) else mpf(0)


def unit(x, p=2):
    size = norm(x, p)
    return [y / size if size > 0 else mpf(0) for y in x]


def less(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def dot(a, b):
    return mp.fsum(x * y for x, y in zip(a, b, strict=True))


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - mpf(1) / 2


def mean(values):
    values = list(values)
    return mp.fsum(values) / len(values)


def hint(student, teacher):
    return mean(x * x for x in less(flat(student), flat(teacher)))


def attention_transfer(student, teacher, mean_of_squares):
    values = []
    for s, t in zip(student, teacher, strict=True):
        maps = [unit([mp.fsum(mpf(c) ** 2 for c in place) for row in x for place in row]) for x in (s, t)]
        difference = less(*maps)
        values.append(mean(x * x for x in difference) if mean_of_squares else norm(difference))
    return mean(values)


def factor_transfer(student, teacher):
    """Order p = 1, the mean over units."""
    pairs = zip(student, teacher, strict=True)
    return mean(mean(abs(x) for x in less(unit(flat(s)), unit(flat(t)))) for s, t in pairs)


def similarity_preserving(student, teacher):
    grams = []
    for x in (student, teacher):
        rows = [flat(example) for example in x]
        grams.append([unit([dot(a, b) for b in rows]) for a in rows])
    return mp.fsum(norm(less(*rows)) ** 2 for rows in zip(*grams, strict=True)) / len(student) ** 2


def rkd_distance(student, teacher):
    """The mean also counts the distance of each example to itself; its mean distance is over distances > 0."""
    distances = []
    for x in (student, teacher):
        rows = [flat(example) for example in x]
        table = [norm(less(a, b)) for a in rows for b in rows]
        scale = mean(d for d in table if d > 0)
        distances.append([d / scale for d in table])
    return mean(huber(d) for d in less(*distances))


def rkd_angle(student, teacher):
    """The mean also counts the triplets in which an example occurs twice."""
    cosines = []
    for x in (student, teacher):
        rows = [flat(example) for example in x]
        table = []
        for a in rows:
            edges = [unit(less(b, a)) for b in rows]
            table += [
                dot(e, f) if i != j else mpf(0) for i, e in enumerate(edges) for j, f in enumerate(edges)
            ]
        cosines.append(table)
    return mean(huber(d) for d in less(*cosines))


def pkt(student, teacher):
    """Mean over examples of KL(p_i‖q_i); an example is its own neighbour."""
    neighbours = []
    for x in (teacher, student):
        rows = [flat(example) for example in x]
        kernel = [
            [mpf(1) if a is b and any(a) else (1 + dot(unit(a), unit(b))) / 2 for b in rows] for a in rows
        ]
        neighbours.append([{j: mp.log(k / mp.fsum(row)) for j, k in enumerate(row)} for row in kernel])
    return mean(divergence(p, q) for p, q in zip(*neighbours, strict=True))


def activation_boundary(student, teacher, margin):
    """Mean over examples of the sum over units."""
    pairs = zip(flat(student), flat(teacher), strict=True)
    return mp.fsum(max(margin - s if t > 0 else margin + s, mpf(0)) ** 2 for s, t in pairs) / len(student)


def vid(student, teacher, variance):
    pairs = zip(flat(student), flat(teacher), strict=True)
    return mean(((t - s) ** 2 / mpf(variance) + mp.log(mpf(variance))) / 2 for s, t in pairs)


def hierarchical_context(student, teacher):
    """Square maps [batch][n][n][channels] with n divisible by the resolutions 4, 2 and 1 below n."""
    size = len(student[0])

    def at(resolution):
        step, squares = size // resolution, []
        for s, t in zip(student, teacher, strict=True):
            for i in range(resolution):
                for j in range(resolution):
                    for c in range(len(s[0][0])):
                        places = [(i * step + a, j * step + b) for a in range(step) for b in range(step)]
                        squares.append(mean(mpf(s[y][x][c]) - mpf(t[y][x][c]) for y, x in places) ** 2)
        return mean(squares)

    levels = [size, *(k for k in (4, 2, 1) if k < size)]
    weights = [mpf(1) / 2**i for i in range(len(levels))]
    return mp.fsum(w * at(k) for w, k in zip(weights, levels, strict=True)) / mp.fsum(weights)


# --- values and gradients --------------------------------------------------------------------


def gradient(function, student):
    """Central differences; 0 at logits of −inf or NaN."""
    step = mpf(10) ** -20
    flat_student, shape = [], np.shape(student)
    flat_student = np.array(student, dtype=object).ravel()

    def at(index, shift):
        moved = flat_student.copy()
        moved[index] = mpf(moved[index]) + shift
        return function(moved.reshape(shape).tolist())

    slopes = np.zeros(flat_student.size, dtype=object)
    for i, x in enumerate(flat_student):
        if np.isfinite(float(x)):
            slopes[i] = (at(i, step) - at(i, -step)) / (2 * step)
    return slopes.reshape(shape).tolist()


GROUPS = []


def group(name, loss, cases, *, says, wrong, tolerance="float32", dtype="float32", grad=True, **options):
    """Adds cases ``(student, other inputs and options)`` of one kind.

    grad: whether to compare gradients; ``"finite"`` only asks that they are finite.
    """
    done = []
    for case in cases:
        given = {**options, **case}
        for key in ("student", "teacher"):
            if key in given:
                check_exact(given[key], dtype)
        inputs = {k: v for k, v in given.items() if k != "student"}
        function = globals()[loss]
        value = function(given["student"], **inputs)
        slopes = None
        if grad == "finite":
            slopes = "finite"
        elif grad and mpmath.isfinite(value):
            slopes = gradient(
                lambda s, inputs=inputs, function=function: function(s, **inputs), given["student"]
            )
        digits = 17 if dtype == "float64" else 8
        done.append({**case, "value": rounded(value, digits), "gradient": rounded(slopes, digits)})
    entry = {"name": name, "loss": loss, "dtype": dtype, "tolerance": tolerance, "says": says, "wrong": wrong}
    GROUPS.append({**entry, "options": options, "cases": done})


def check_exact(x, dtype):
    """Inputs must be numbers of the case's own type, or the reference would see other numbers than the library."""
    import ml_dtypes

    array = np.asarray(x, np.float64)
    cast = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float64)
    assert np.array_equal(array, cast, equal_nan=True), (x, dtype)


def rounded(x, digits):
    if isinstance(x, list):
        return [rounded(y, digits) for y in x]
    if x is None or isinstance(x, str):
        return x
    number = float(mpmath.nstr(mpf(x), digits))
    return 0.0 if abs(number) < 1e-300 else number


def plain(x):
    """JSON has no infinities: they are strings. Whole numbers lose their '.0'."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, float):
        if not np.isfinite(x):
            return {INF: "inf", -INF: "-inf"}.get(x, "nan")
        return int(x) if x == int(x) and abs(x) < 1e6 else x
    return x


# --- inputs ----------------------------------------------------------------------------------

random.seed(0)


def draw(*shape, step=0.125, width=3.0):
    """Random multiples of ``step``, which every float type holds exactly."""
    if not shape:
        return random.randint(-int(width / step), int(width / step)) * step
    return [draw(*shape[1:], step=step, width=width) for _ in range(shape[0])]


def near(x, step, width=4):
    """``x`` with every number moved by up to ``width`` steps."""
    if isinstance(x, list):
        return [near(y, step, width) for y in x]
    return x + random.randint(-width, width) * step


def pairs(number, classes=4, *, width=3.0, step=0.125, **extra):
    options = [dict(zip(extra, values, strict=True)) for values in zip(*extra.values(), strict=True)]
    return [
        {
            "student": draw(classes, width=width, step=step),
            "teacher": draw(classes, width=width, step=step),
            **(options[i % len(options)] if options else {}),
        }
        for i in range(number)
    ]


def close(number, step, classes=4, **extra):
    cases = pairs(number, classes, **extra)
    for case in cases:
        case["student"] = near(case["teacher"], step)
        if case["student"] == case["teacher"]:
            case["student"][0] += step
    return cases


def with_values(cases, key, values):
    return [{**case, key: value} for case, value in zip(cases, values, strict=True)]


GAPS = [  # student, teacher
    ([10000.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    ([0.0, 10000.0, 0.0, 1.0], [10000.0, 0.0, 0.0, 1.0]),
    ([0.5, 0.0, -1.0, 2.0], [0.0, -10000.0, 0.0, 10000.0]),
    ([-10000.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.5, 0.0]),
    ([10000.0, 9999.0, 0.0, 0.0], [10000.0, 9998.0, 0.0, 0.0]),
]
ONE_HOT = [
    ([0.5, 0.25, -1.0, 0.0], [200.0, 0.0, 0.0, 0.0]),
    ([3.0, 0.0, 0.0, -2.0], [0.0, -150.0, -150.0, -150.0]),
    ([-4.0, 2.0, 0.0, 0.0], [500.0, 0.0, 1.0, 0.0]),
    ([60.0, 0.0, 0.0, 0.0], [60.0, 0.0, 1.0, 0.0]),
]
MASKED = [
    ([0.5, 1.0, -INF, 0.25], [1.0, 0.0, -INF, 2.0]),
    ([-INF, 1.0, -INF, 0.25], [-INF, 0.0, -INF, 2.0]),
    ([2.0, 1.0, 0.0, -INF], [2.0, 1.0, 0.5, -INF]),
    ([1.0, -INF, -INF, -INF], [3.0, -INF, -INF, -INF]),
    ([-INF, 1.0, 1.0, -3.0], [-INF, 100.0, 0.0, 0.0]),
]
TEACHER_MASKED = [
    ([0.5, 1.0, 2.0, 0.25], [1.0, 0.0, -INF, 2.0]),
    ([0.0, 1.0, -1.0, 0.5], [3.0, -INF, -INF, -INF]),
    ([0.0, 5.0, -1.0, 0.5], [1.0, -INF, -INF, 0.0]),
]
STUDENT_MASKED = [
    ([0.5, 1.0, -INF, 0.25], [1.0, 0.0, 0.5, 2.0]),
    ([-INF, 1.0, 0.0, 0.25], [1.0, 0.0, 0.5, 2.0]),
]
WHERE = [
    ([0.5, 1.0, 9.0, 0.25], [1.0, 0.0, -7.0, 2.0], [True, True, False, True]),
    ([0.5, 1.0, 10000.0, 0.25], [1.0, 0.0, -10000.0, 2.0], [True, True, False, True]),
    ([9.0, 1.0, -2.0, 0.25], [9.0, 0.0, 1.0, 2.0], [False, True, True, False]),
    ([0.5, 1.0, 4.0, 0.25], [1.0, 0.0, 4.0, -5.0], [True, False, False, False]),
]
WHERE_NAN = [
    ([0.5, 1.0, NAN, 0.25], [1.0, 0.0, NAN, 2.0], [True, True, False, True]),
    ([INF, 1.0, 0.5, 0.25], [0.0, 1.0, INF, 2.0], [False, True, False, True]),
]


def of(rows, *keys, **extra):
    keys = keys or ("student", "teacher")
    return [{**dict(zip(keys, row, strict=True)), **extra} for row in rows]


def same(number, **extra):
    cases = pairs(number, **extra)
    return [{**case, "student": case["teacher"]} for case in cases]


def build():
    build_kl()
    build_other_divergences()
    build_cross_entropies()
    build_tokens()
    build_more_logit_losses()
    build_features()


def build_kl():
    group(
        "kl, ordinary logits",
        "kl",
        pairs(8, temperature=[1.0, 2.0, 4.0, 0.5]),
        says="T²·KL(teacher‖student), Hinton's loss, for logits between −3 and 3.",
        wrong="The loss itself is another function than the documented one.",
    )
    group(
        "kl, gap of 1e4",
        "kl",
        of(GAPS[:3], temperature=1.0) + of(GAPS[2:], temperature=4.0),
        says="One logit is 10,000 away from the others, in the student, in the teacher or in both.",
        wrong="A network that is certain of a wrong class gets a wrong value or no gradient, just where it is most wrong.",
    )
    group(
        "kl, one-hot teacher",
        "kl",
        of(ONE_HOT),
        says="The teacher is so certain that the other probabilities are below the smallest float32.",
        wrong="A certain teacher gives NaN or a wrong value.",
    )
    group(
        "kl, −inf for both",
        "kl",
        of(MASKED[:4]) + of(MASKED[3:], temperature=2.0),
        says="Classes that do not exist have the logit −inf in student and teacher.",
        wrong="A class that neither has (an unused token, a masked action) makes the loss or the gradient NaN.",
    )
    group(
        "kl, −inf for the teacher",
        "kl",
        of(TEACHER_MASKED),
        says="The teacher excludes a class that the student has: p = 0, and 0·log 0 = 0.",
        wrong="A teacher that excludes a class makes the loss or the gradient NaN.",
    )
    group(
        "kl, −inf for the student",
        "kl",
        of(STUDENT_MASKED),
        says="The student excludes a class that the teacher has: the divergence is +inf by definition.",
        wrong="An impossible student looks like a possible one (finite), or like a broken one (NaN).",
    )
    group(
        "kl, where",
        "kl",
        of(WHERE, "student", "teacher", "where"),
        says="A mask says which classes exist; excluded logits may be anything finite.",
        wrong="Excluded classes change the value or get a gradient.",
    )
    group(
        "kl, where over NaN",
        "kl",
        of(WHERE_NAN, "student", "teacher", "where"),
        says="As before, but the excluded logits are NaN or inf.",
        wrong="A number that does not count spoils the gradient of those that do.",
    )
    group(
        "kl, student near teacher",
        "kl",
        close(3, 2.0**-9, temperature=[1.0]) + close(3, 2.0**-12, temperature=[1.0, 4.0, 1.0]),
        says="The student's logits differ from the teacher's by up to 1/128 or 1/1024; values near 1e-5 and 1e-7.",
        wrong="Near the end of training the reported loss is rounding noise, often 0 or negative. (The gradient usually is right.)",
        tolerance="two digits",
    )
    group(
        "kl, high temperature",
        "kl",
        pairs(6, temperature=[20.0, 100.0, 1000.0]),
        says="T is 20, 100 or 1000: probabilities are nearly equal, and T² multiplies the rounding error.",
        wrong="At high temperature the reported loss is rounding noise times T².",
        tolerance="two digits",
    )
    group(
        "kl, student = teacher",
        "kl",
        same(3, temperature=[1.0, 4.0, 20.0]),
        says="Student and teacher are equal: value 0, gradient 0.",
        wrong="The loss has no minimum at the teacher.",
    )
    shifted = pairs(3)
    for case, shift in zip(shifted, (8192.0, -8192.0, 65536.0), strict=True):
        case["student"] = [z + shift for z in case["student"]]
    group(
        "kl, a constant added to all logits",
        "kl",
        shifted,
        says="A constant of 8,192 or 65,536 is added to all logits of the student, which changes no probability.",
        wrong="The size of the logits, not only their differences, changes the loss.",
    )
    group(
        "kl, bfloat16",
        "kl",
        pairs(4, temperature=[1.0, 4.0]),
        dtype="bfloat16",
        tolerance="bfloat16",
        says="The logits are bfloat16; the tolerance allows a library to compute in bfloat16 throughout.",
        wrong="Half precision costs more than its own rounding.",
    )
    group(
        "kl, bfloat16, student near teacher",
        "kl",
        close(4, 2.0**-3, width=2.0, temperature=[1.0, 4.0]),
        dtype="bfloat16",
        tolerance="bfloat16 near",
        says="The logits are bfloat16 and differ by up to ½. The value must be right to 25 %.",
        wrong="The library computes in bfloat16: the value of a student that has learned a lot is noise.",
    )
    group(
        "kl, float16",
        "kl",
        pairs(3, temperature=[1.0, 4.0, 2.0]) + of([([30000.0, 0.0, 0.0, 0.0], [0.0, 30000.0, 0.0, 0.0])]),
        dtype="float16",
        tolerance="float16",
        says="The logits are float16, once with a gap of 30,000.",
        wrong="Half precision overflows or costs more than its own rounding.",
    )
    group(
        "kl, float64",
        "kl",
        pairs(2, temperature=[1.0, 4.0]) + close(2, 2.0**-3),
        dtype="float64",
        tolerance="float64",
        says="The logits are float64, and eleven digits must be right.",
        wrong="Double precision is lost on the way.",
    )
    group(
        "kl, a temperature per example",
        "kl_rows",
        [
            {"student": draw(3, 3), "teacher": draw(3, 3), "temperature": [1.0, 2.0, 4.0]},
            {"student": draw(2, 4), "teacher": draw(2, 4), "temperature": [4.0, 20.0]},
        ],
        says="Each example of the batch has its own temperature; the value is the mean over examples.",
        wrong="Examples are softened by each other's temperature.",
    )
    group(
        "kl, mean over the batch",
        "kl_rows",
        [{"student": draw(n, 3), "teacher": draw(n, 3), "temperature": 2.0} for n in (2, 3, 5)],
        says="The mean over the examples of a batch (not over examples and classes).",
        wrong="The loss depends on the number of classes or is summed.",
    )


def kl_rows(student, teacher, temperature):
    temperatures = temperature if isinstance(temperature, list) else [temperature] * len(student)
    return mean(kl(s, t, x) for s, t, x in zip(student, teacher, temperatures, strict=True))


def build_other_divergences():
    group(
        "reverse kl, ordinary logits",
        "reverse_kl",
        pairs(4, temperature=[1.0, 2.0]),
        says="T²·KL(student‖teacher).",
        wrong="The loss itself is another function than the documented one.",
    )
    group(
        "reverse kl, gap of 1e4",
        "reverse_kl",
        of(GAPS[:4]),
        says="One logit is 10,000 away from the others.",
        wrong="A network that is certain gets a wrong value or gradient.",
    )
    group(
        "reverse kl, −inf",
        "reverse_kl",
        of(MASKED[:3]) + of(STUDENT_MASKED) + of(TEACHER_MASKED[:1]),
        says="Classes of −inf for both; for the student alone (finite); for the teacher alone (+inf).",
        wrong="An excluded class makes the loss or the gradient NaN.",
    )
    group(
        "reverse kl, student near teacher",
        "reverse_kl",
        close(2, 2.0**-9),
        tolerance="two digits",
        says="Differences of logits up to 1/128.",
        wrong="The reported loss is rounding noise.",
    )
    beta = [0.1, 0.5, 0.9]
    group(
        "jensen-shannon, ordinary logits",
        "jensen_shannon",
        pairs(6, beta=beta * 2, temperature=[1.0, 1.0, 2.0] * 2),
        says="T²·[β·KL(teacher‖m) + (1 − β)·KL(student‖m)] with m = β·teacher + (1 − β)·student.",
        wrong="β weights the wrong side, or the loss is another function.",
    )
    group(
        "jensen-shannon, gap of 1e4",
        "jensen_shannon",
        with_values(of(GAPS), "beta", [0.5, 0.5, 0.1, 0.9, 0.5]),
        says="One logit is 10,000 away from the others; the value stays below log 2.",
        wrong="A bounded loss overflows or loses its gradient.",
    )
    group(
        "jensen-shannon, −inf",
        "jensen_shannon",
        with_values(
            of(MASKED[:3] + STUDENT_MASKED[:1] + TEACHER_MASKED[:2]), "beta", [0.5, 0.1, 0.9, 0.5, 0.5, 0.25]
        ),
        says="Classes of −inf for both, or for one alone: the value is finite in every case.",
        wrong="An excluded class makes the loss or the gradient NaN.",
    )
    group(
        "jensen-shannon, where",
        "jensen_shannon",
        with_values(of(WHERE[:2], "student", "teacher", "where"), "beta", [0.5, 0.1]),
        says="A mask says which classes exist.",
        wrong="Excluded classes change the value or get a gradient.",
    )
    group(
        "jensen-shannon, β of 0 and 1",
        "jensen_shannon",
        pairs(2, beta=[0.0, 1.0]),
        says="By the formula the value is 0 at both ends. (TRL documents KL and reverse KL for these two: see those groups.)",
        wrong="The ends of β are not those of the formula.",
    )
    group(
        "jensen-shannon, β near 0 and 1",
        "jensen_shannon",
        pairs(3, beta=[2.0**-10, 1 - 2.0**-10, 2.0**-20]),
        tolerance="four digits",
        says="β is 1/1024, 1 − 1/1024 or 1/1048576: the value is about β·KL.",
        wrong="A weight near the end of its range leaves rounding noise.",
    )
    group(
        "jensen-shannon, student near teacher",
        "jensen_shannon",
        close(3, 2.0**-9, beta=beta),
        tolerance="two digits",
        says="Differences of logits up to 1/128.",
        wrong="The reported loss is rounding noise.",
    )
    group(
        "jensen-shannon, high temperature",
        "jensen_shannon",
        pairs(2, temperature=[20.0, 100.0], beta=[0.5, 0.5]),
        tolerance="two digits",
        says="T is 20 or 100.",
        wrong="The reported loss is rounding noise times T².",
    )
    group(
        "jensen-shannon, bfloat16",
        "jensen_shannon",
        pairs(3, beta=beta),
        dtype="bfloat16",
        tolerance="bfloat16",
        says="The logits are bfloat16.",
        wrong="Half precision costs more than its own rounding.",
    )
    group(
        "skew kl",
        "skew_kl",
        pairs(3, alpha=[0.1, 0.5, 0.0])
        + with_values(of(GAPS[:2] + STUDENT_MASKED[:1]), "alpha", [0.1, 0.1, 0.25]),
        says="T²·KL(p‖α·p + (1 − α)·q): finite for every student.",
        wrong="The loss is another function, or not finite.",
    )
    group(
        "skew reverse kl",
        "skew_reverse_kl",
        pairs(2, alpha=[0.1, 0.5])
        + with_values(of(GAPS[:2] + TEACHER_MASKED[:1]), "alpha", [0.1, 0.1, 0.25]),
        says="T²·KL(q‖(1 − α)·p + α·q).",
        wrong="The loss is another function, or not finite.",
    )
    group(
        "total variation",
        "total_variation",
        pairs(2, temperature=[1.0, 2.0]) + of(GAPS[1:3]) + of(ONE_HOT[:1]),
        says="½·Σ|p − q|, without a factor T².",
        wrong="The loss is another function.",
    )


def build_cross_entropies():
    group(
        "soft cross-entropy, ordinary logits",
        "soft_cross_entropy",
        pairs(3, temperature=[1.0, 2.0, 4.0]),
        says="−T²·Σ p·log q with the teacher's p.",
        wrong="The loss is another function.",
    )
    group(
        "soft cross-entropy, gap of 1e4 and one-hot teacher",
        "soft_cross_entropy",
        of(GAPS[:3]) + of(ONE_HOT[:2]),
        says="One logit is 10,000 away, or the teacher's other probabilities are below the smallest float32.",
        wrong="A certain network gives a wrong value or NaN.",
    )
    group(
        "soft cross-entropy, −inf",
        "soft_cross_entropy",
        of(MASKED[:3]) + of(TEACHER_MASKED[:1]) + of(STUDENT_MASKED[:1]),
        says="Classes of −inf for both, for the teacher alone, and for the student alone (+inf).",
        wrong="An excluded class makes the loss or the gradient NaN.",
    )
    group(
        "soft cross-entropy, where",
        "soft_cross_entropy",
        of(WHERE[:3], "student", "teacher", "where"),
        says="A mask says which classes exist.",
        wrong="Excluded classes change the value or get a gradient.",
    )
    labelled = [{"student": draw(4), "labels": i % 4} for i in range(3)]
    group(
        "cross-entropy, ordinary logits",
        "cross_entropy",
        labelled,
        says="−log q of the label's class.",
        wrong="The loss is another function.",
    )
    extremes = [
        {"student": [10000.0, 0.0, 0.0, 0.0], "labels": 1},
        {"student": [10000.0, 0.0, 0.0, 0.0], "labels": 0},
        {"student": [-10000.0, 0.0, 1.0, 0.0], "labels": 0},
        {"student": [10000.0, 10000.0, 0.0, -10000.0], "labels": 0},
    ]
    group(
        "cross-entropy, gap of 1e4",
        "cross_entropy",
        extremes,
        says="The student is certain, rightly or wrongly.",
        wrong="A student that is certain of a wrong class gets a cut-off value or no gradient.",
    )
    group(
        "cross-entropy, −inf",
        "cross_entropy",
        [
            {"student": [0.5, -INF, 1.0, 0.0], "labels": 0},
            {"student": [-INF, -INF, 1.0, 0.0], "labels": 3},
            {"student": [-INF, 2.0, -INF, -INF], "labels": 1},
            {"student": [0.5, -INF, 1.0, 0.0], "labels": 1},
        ],
        says="Classes of −inf do not exist; if the label's own class does not, the value is +inf.",
        wrong="A masked class makes the loss or the gradient NaN.",
    )
    group(
        "cross-entropy, where",
        "cross_entropy",
        [
            {"student": [0.5, 7.0, 1.0, 0.0], "labels": 0, "where": [True, False, True, True]},
            {"student": [0.5, 10000.0, 1.0, 0.0], "labels": 3, "where": [False, False, True, True]},
            {"student": [0.5, NAN, 1.0, 0.0], "labels": 2, "where": [True, False, True, True]},
        ],
        says="A mask says which classes exist; excluded logits may be anything, once NaN.",
        wrong="Excluded classes change the value or get a gradient.",
    )
    soft = [[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.75, 0.0, 0.125, 0.125]]
    group(
        "cross-entropy, soft labels",
        "cross_entropy",
        [{"student": draw(4), "labels": y} for y in soft],
        says="Labels are probabilities, some of them 0.",
        wrong="The loss is another function.",
    )
    group(
        "cross-entropy, soft labels, extremes",
        "cross_entropy",
        [
            {"student": [10000.0, 0.0, 0.0, 1.0], "labels": soft[0]},
            {"student": [0.0, 10000.0, 0.0, 1.0], "labels": soft[1]},
            {"student": [0.0, 1.0, 0.5, -INF], "labels": soft[0]},
            {"student": [-INF, 1.0, 0.5, -INF], "labels": soft[1]},
        ],
        says="Gaps of 10,000, and classes of −inf whose label is 0 (0·log 0 = 0).",
        wrong="A class that neither the labels nor the network have makes the loss or the gradient NaN.",
    )
    group(
        "cross-entropy, label smoothing",
        "cross_entropy",
        [{"student": draw(4), "labels": i, "label_smoothing": x} for i, x in enumerate((0.1, 0.2, 1.0))]
        + [{"student": [10000.0, 0.0, 0.0, 0.0], "labels": 0, "label_smoothing": 0.1}],
        says="(1 − ε) for the label and ε shared by all classes.",
        wrong="ε is shared differently, or a gap cuts the value off.",
    )
    group(
        "cross-entropy, label smoothing over existing classes",
        "cross_entropy_smoothed_over_existing",
        [
            {"student": [0.5, -INF, 1.0, 0.0], "labels": 0, "label_smoothing": 0.1},
            {
                "student": [0.5, 3.0, 1.0, 0.0],
                "labels": 2,
                "label_smoothing": 0.2,
                "where": [True, False, True, False],
            },
        ],
        says="ε is shared by the classes that exist, so the value stays finite.",
        wrong="ε goes to classes that do not exist.",
    )
    group(
        "cross-entropy, bfloat16",
        "cross_entropy",
        [{"student": draw(4), "labels": i} for i in range(3)],
        dtype="bfloat16",
        tolerance="bfloat16",
        says="The logits are bfloat16.",
        wrong="Half precision costs more than its own rounding.",
    )
    group(
        "cross-entropy, float64",
        "cross_entropy",
        [{"student": draw(4), "labels": i} for i in range(2)],
        dtype="float64",
        tolerance="float64",
        says="The logits are float64, and eleven digits must be right.",
        wrong="Double precision is lost on the way.",
    )


def build_tokens():
    mask = [[True, True, False], [True, False, False]]

    def sequences(**extra):
        return {"student": draw(2, 3, 3), "teacher": draw(2, 3, 3), "tokens": mask, **extra}

    group(
        "padded tokens, mean over tokens",
        "kl_of_tokens",
        [sequences(temperature=t) for t in (1.0, 2.0)],
        reduce="tokens",
        says="KL per token, averaged over the tokens that count in the whole batch (3 of 6).",
        wrong="Padding is counted: the loss depends on how much padding a batch has.",
    )
    group(
        "padded tokens, sum",
        "kl_of_tokens",
        [sequences(temperature=1.0)],
        reduce="sum",
        says="KL summed over the tokens that count.",
        wrong="Padding is summed too.",
    )
    group(
        "padded tokens, mean over sequences",
        "kl_of_tokens",
        [sequences(temperature=t) for t in (1.0, 2.0)],
        reduce="sequences",
        says="The mean over sequences of each one's own mean over its tokens.",
        wrong="Long sequences weigh more than short ones, or padding is counted.",
    )

    def spoiled(value, **extra):
        case = sequences(temperature=1.0, **extra)
        for side in ("student", "teacher"):
            for b, i in ((0, 2), (1, 1), (1, 2)):
                case[side][b][i] = [value, value, 0.0]
        return case

    group(
        "padded tokens of any content",
        "kl_of_tokens",
        [spoiled(NAN), spoiled(INF), spoiled(-INF), spoiled(2.0**100)],
        reduce="tokens",
        says="The logits at padding are NaN, inf, −inf or huge. They do not count.",
        wrong="Whatever stands at padding spoils the loss or the gradient of the whole batch.",
    )
    empty = {**sequences(temperature=1.0), "tokens": [[True, True, True], [False, False, False]]}
    none = {**sequences(temperature=1.0), "tokens": [[False] * 3, [False] * 3]}
    group(
        "a sequence without any token",
        "kl_of_tokens",
        [empty, none],
        reduce="tokens",
        says="One sequence, or the whole batch, has no token that counts: it adds 0, with gradient 0.",
        wrong="0/0: one empty batch makes the parameters NaN.",
    )
    group(
        "weights of tokens",
        "kl_of_tokens",
        [
            {
                "student": draw(2, 3, 3),
                "teacher": draw(2, 3, 3),
                "weights": [[1.0, 0.5, 0.0], [2.0, 0.0, 1.0]],
                "temperature": t,
            }
            for t in (1.0, 2.0)
        ],
        reduce="tokens",
        says="Σ w·KL / Σ w with a weight per token, some of them 0.",
        wrong="The weights do not average.",
    )
    zero = {
        "student": draw(1, 3, 3),
        "teacher": draw(1, 3, 3),
        "weights": [[1.0, 0.0, 2.0]],
        "temperature": 1.0,
    }
    zero["student"][0][1], zero["teacher"][0][1] = [-INF, 0.0, 1.0], [0.0, 1.0, 0.0]
    broken = {
        "student": draw(1, 3, 3),
        "teacher": draw(1, 3, 3),
        "weights": [[1.0, 0.0, 2.0]],
        "temperature": 1.0,
    }
    broken["student"][0][1] = [NAN, NAN, NAN]
    group(
        "weight 0 over inf and NaN",
        "kl_of_tokens",
        [zero, broken],
        reduce="tokens",
        says="A token of weight 0 has an infinite loss, or NaN logits. It does not count.",
        wrong="0·inf: an example that was weighted out makes the loss NaN.",
    )
    labels = [[0, 2, -100], [1, -100, -100]]
    group(
        "labels that are ignored",
        "cross_entropy_of_tokens",
        [
            {"student": draw(2, 3, 3), "labels": labels, "reduce": "tokens"},
            {"student": draw(2, 3, 3), "labels": labels, "reduce": "sum"},
        ],
        ignored=-100,
        says="Cross-entropy with the label −100 at padding, averaged or summed over the other tokens.",
        wrong="Padding is counted.",
    )
    spoiled_labels = {"student": draw(2, 3, 3), "labels": labels, "reduce": "tokens"}
    spoiled_labels["student"][0][2] = [NAN] * 3
    nothing = {"student": draw(1, 2, 3), "labels": [[-100, -100]], "reduce": "tokens"}
    group(
        "labels that are ignored, extremes",
        "cross_entropy_of_tokens",
        [spoiled_labels, nothing],
        ignored=-100,
        says="The logits at padding are NaN; or no token counts at all (value 0, gradient 0).",
        wrong="Padding, or a batch of nothing but padding, makes the loss or the gradient NaN.",
    )
    group(
        "top-k labels with OTHER",
        "top_k_kl",
        [
            {"student": draw(5), "teacher": [2.0, 1.0, 0.5, -1.0, 0.0], "k": k, "temperature": t}
            for k, t in ((1, 1.0), (2, 1.0), (3, 2.0), (5, 1.0))
        ],
        says="KL over the teacher's k likeliest tokens and one class OTHER for the rest.",
        wrong="What was dropped counts differently.",
    )
    group(
        "top-k labels with OTHER, extremes",
        "top_k_kl",
        [
            {"student": [-30.0, -30.0, 0.0, 0.0, 0.0], "teacher": [2.0, 1.0, 0.5, -1.0, 0.0], "k": 2},
            {"student": [10000.0, 0.0, 0.0, 0.0, 0.0], "teacher": [2.0, 1.0, 0.5, -1.0, 0.0], "k": 1},
            {"student": [30.0, 0.0, 1.0, 0.5, 0.0], "teacher": [2.0, 1.0, 0.5, -1.0, 0.0], "k": 1},
            {"student": draw(5), "teacher": [40.0, 1.0, 0.5, -1.0, 0.0], "k": 1},
        ],
        says="The student gives the teacher's tokens, or OTHER, hardly any probability.",
        wrong="The loss of a student that is far off is cut off, or its gradient is lost.",
    )


def build_more_logit_losses():
    group(
        "squared logits",
        "mean_squared_logits",
        pairs(2) + of([([10000.0, 0.0, 1.0, 2.0], [0.0, 0.0, 1.0, 0.0])]),
        says="The mean over classes of the squared difference.",
        wrong="The mean is taken over something else.",
    )
    group(
        "squared logits, −inf for both",
        "mean_squared_logits",
        of(MASKED[:2]),
        says="Classes that neither has are left out of the mean.",
        wrong="−inf − (−inf) is NaN.",
    )
    batch = [
        {"student": draw(2, 3), "teacher": draw(2, 3), "labels": [0, 2], "alpha": a, "temperature": t}
        for a, t in ((0.5, 2.0), (0.1, 4.0), (1.0, 2.0), (0.0, 4.0), (0.0, 1.0))
    ]
    group(
        "labels and teacher together",
        "kd_and_labels",
        batch,
        says="α·cross-entropy + (1 − α)·T²·KL, averaged over the batch, for α of ½, 0.1, 1 and 0.",
        wrong="At one α the sum is not the documented one.",
    )
    group(
        "standardised logits (LSKD), ddof 1",
        "standardised_kl",
        pairs(2, temperature=[2.0, 4.0]),
        ddof=1,
        tolerance="four digits",
        says="KL of logits less their mean, divided by their standard deviation with n − 1, as in the authors' code.",
        wrong="The loss is another function.",
    )
    group(
        "standardised logits (LSKD), ddof 0",
        "standardised_kl",
        pairs(2, temperature=[2.0, 4.0]),
        ddof=0,
        tolerance="four digits",
        says="The same with n, as in the paper.",
        wrong="The loss is another function.",
    )
    group(
        "standardised logits (LSKD), all logits equal",
        "standardised_kl",
        [{"student": [1.0, 1.0, 1.0, 1.0], "teacher": [1.0, 0.0, 0.0, 2.0], "temperature": 2.0}],
        ddof=1,
        grad="finite",
        tolerance="four digits",
        says="A student whose last layer starts at zero has equal logits. The value is finite, and so must be the gradient.",
        wrong="The first step of training makes the parameters NaN.",
    )
    group(
        "decoupled distillation (DKD)",
        "dkd",
        [{**case, "labels": i} for i, case in enumerate(pairs(2))]
        + [
            {"student": [0.0, 1000.0, 3.0, 0.0], "teacher": [1000.0, 0.0, 3.0, 1.0], "labels": 0},
            {"student": [1.0, -1.0], "teacher": [0.5, 0.0], "labels": 0},
        ],
        says="T²·[α·KL of (label, not label) + β·KL among the other classes], once with a gap of 1,000.",
        wrong="The loss is another function, or NaN at a gap.",
    )
    group(
        "logit-adjusted cross-entropy",
        "logit_adjusted",
        [
            {"student": draw(4), "labels": 1, "prior": [8.0, 4.0, 2.0, 1.0]},
            {"student": draw(4), "labels": 3, "prior": [8.0, 4.0, 2.0, 1.0], "tau": 0.5},
            {"student": draw(4), "labels": 2, "prior": [8.0, 0.0, 2.0, 1.0]},
        ],
        says="Cross-entropy of z + τ·log π; once a class has prior 0.",
        wrong="A class without examples makes the loss NaN.",
    )
    group(
        "correlations (DIST)",
        "dist",
        [{"student": draw(3, 4), "teacher": draw(3, 4)} for _ in range(2)],
        tolerance="four digits",
        says="1 − Pearson's correlation of the probabilities, within examples plus within classes, at T = 1.",
        wrong="The loss is another function.",
    )
    teacher = draw(3, 4)
    group(
        "correlations (DIST), student near teacher",
        "dist",
        [{"student": near(teacher, 2.0**-9), "teacher": teacher}],
        tolerance="two digits",
        says="Differences of logits up to 1/128.",
        wrong="The reported loss is rounding noise.",
    )


def build_features():
    group(
        "features, mean squared error",
        "hint",
        [
            {"student": draw(2, 3), "teacher": draw(2, 3)},
            {"student": draw(1, 2, 2, 2), "teacher": draw(1, 2, 2, 2)},
        ],
        says="The mean over examples, positions and channels.",
        wrong="The mean is taken over something else.",
    )
    maps = [{"student": draw(2, 2, 2, 2), "teacher": draw(2, 2, 2, 2)} for _ in range(2)]
    group(
        "attention transfer",
        "attention_transfer",
        maps[:1],
        mean_of_squares=True,
        says="As in the authors' code: mean of squares.",
        wrong="The loss is another function.",
    )
    group(
        "attention transfer, norm",
        "attention_transfer",
        maps[1:],
        mean_of_squares=False,
        says="As in the paper: the norm of the difference.",
        wrong="The loss is another function.",
    )
    dead = {"student": [[[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]], "teacher": draw(1, 2, 2, 2)}
    group(
        "attention transfer, dead map",
        "attention_transfer",
        [dead],
        mean_of_squares=True,
        grad="finite",
        says="A map that is zero everywhere (dead ReLUs) has no direction; it counts as zero.",
        wrong="A dead layer makes the parameters NaN.",
    )
    equal = {"student": maps[1]["teacher"], "teacher": maps[1]["teacher"]}
    group(
        "attention transfer, norm, student = teacher",
        "attention_transfer",
        [equal],
        mean_of_squares=False,
        grad="finite",
        says="The norm has no derivative at 0, but the gradient must be finite.",
        wrong="The gradient is NaN at the goal.",
    )
    group(
        "factor transfer",
        "factor_transfer",
        [{"student": draw(2, 4), "teacher": draw(2, 4)} for _ in range(2)],
        says="Mean absolute difference of the normalised factors.",
        wrong="The loss is another function.",
    )
    group(
        "factor transfer, a factor of zero",
        "factor_transfer",
        [{"student": [[0.0] * 4, draw(4)], "teacher": draw(2, 4)}],
        grad="finite",
        says="A factor that is zero has no direction; it counts as zero.",
        wrong="One dead example makes the loss NaN.",
    )
    group(
        "similarity preserving (SP)",
        "similarity_preserving",
        [{"student": draw(3, 3), "teacher": draw(3, 4)}, {"student": draw(4, 2), "teacher": draw(4, 2)}],
        says="Gram matrices of the batch with rows of Euclidean length 1, as in the paper's Eq. 3.",
        wrong="Rows are normalised by another norm than the paper's.",
    )
    group(
        "similarity preserving (SP), an example of zeros",
        "similarity_preserving",
        [{"student": [[0.0, 0.0, 0.0], *draw(2, 3)], "teacher": draw(3, 3)}],
        grad="finite",
        says="An example whose features are all zero.",
        wrong="One dead example makes the gradient NaN.",
    )
    group(
        "relational, distances (RKD-D)",
        "rkd_distance",
        [{"student": draw(3, 2), "teacher": draw(3, 3)} for _ in range(2)],
        says="Distances relative to their mean, Huber's loss, mean over all pairs.",
        wrong="The loss is another function.",
    )
    base = [[64.0, 32.0], [64.0, 32.0], [64.0, 32.0]]
    group(
        "relational, distances (RKD-D), close examples",
        "rkd_distance",
        [{"student": near(base, 2.0**-7, 8), "teacher": draw(3, 2)}],
        tolerance="four digits",
        says="The student's features are near 70, and the examples 0.01 to 0.1 apart, as at the start of training.",
        wrong="Distances computed from x² + y² − 2xy are rounding noise.",
    )
    group(
        "relational, angles (RKD-A)",
        "rkd_angle",
        [{"student": draw(3, 2), "teacher": draw(3, 3)}, {"student": draw(4, 3), "teacher": draw(4, 3)}],
        says="Cosines of the angles of triplets, Huber's loss, mean over all triplets.",
        wrong="The loss is another function.",
    )
    group(
        "probabilistic transfer (PKT)",
        "pkt",
        [{"student": draw(3, 3), "teacher": draw(3, 4)}, {"student": draw(4, 2), "teacher": draw(4, 3)}],
        tolerance="four digits",
        says="KL between the neighbours of each example by cosine, an example being its own neighbour.",
        wrong="The loss is another function.",
    )
    group(
        "probabilistic transfer (PKT), an example of zeros",
        "pkt",
        [{"student": [[0.0, 0.0, 0.0], *draw(2, 3)], "teacher": draw(3, 3)}],
        grad="finite",
        tolerance="three digits",
        says="An example whose features are all zero.",
        wrong="One dead example makes the gradient NaN.",
    )
    group(
        "activation boundaries (AB)",
        "activation_boundary",
        [{"student": draw(2, 4), "teacher": draw(2, 4)} for _ in range(2)],
        margin=1.0,
        says="Squared distance to the margin on the teacher's side.",
        wrong="The loss is another function.",
    )
    group(
        "variational information (VID)",
        "vid",
        [{"student": draw(2, 4), "teacher": draw(2, 4), "variance": v} for v in (1.0, 0.25)],
        says="Negative log-likelihood of the teacher's features, mean over units.",
        wrong="The loss is another function.",
    )
    group(
        "hierarchical context (ReviewKD)",
        "hierarchical_context",
        [
            {"student": draw(1, 2, 2, 2), "teacher": draw(1, 2, 2, 2)},
            {"student": draw(1, 4, 4, 1), "teacher": draw(1, 4, 4, 1)},
        ],
        says="Squared error at several resolutions.",
        wrong="The loss is another function.",
    )


TOLERANCES = {  # [relative, absolute] of the value, and of the gradient relative to its largest entry
    "float32": [[1e-5, 1e-6], [1e-5, 1e-6]],
    "four digits": [[1e-4, 0], [1e-4, 1e-7]],
    "three digits": [[1e-3, 0], [1e-3, 1e-7]],
    "two digits": [[1e-2, 0], [1e-2, 0]],
    "bfloat16": [[0.1, 0.02], [0.1, 0.02]],
    "bfloat16 near": [[0.25, 0], [0.25, 0]],
    "float16": [[1e-2, 2e-3], [1e-2, 2e-3]],
    "float64": [[1e-11, 1e-13], [1e-11, 1e-13]],
}


def main():
    build()
    count = sum(len(g["cases"]) for g in GROUPS)
    lines = ['{"tolerances": ' + json.dumps(TOLERANCES) + ",", '"groups": [']
    for i, g in enumerate(GROUPS):
        cases = g.pop("cases")
        head = json.dumps(plain(g), ensure_ascii=False)[:-1]
        body = ",\n".join(json.dumps(plain(case), separators=(",", ":")) for case in cases)
        lines.append(f'{head}, "cases": [\n{body}]}}' + ("," if i + 1 < len(GROUPS) else ""))
    path = Path(__file__).with_name("cases.json")
    path.write_text("\n".join([*lines, "]}"]) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(GROUPS)} groups, {count} cases, {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
