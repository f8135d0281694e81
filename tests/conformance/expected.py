"""Fills the expected values and gradients into cases.json, straight from the definitions, with 60 digits.

    python tests/conformance/expected.py          # needs mpmath

To add a case, write its inputs into cases.json and run this. Nothing here uses distill_jax. A class exists where
its logit is above −inf and ``where`` is true. Gradients are central differences with a step of 1e-20, so they do not
depend on formulas derived by hand.
"""

import json
from pathlib import Path

import ml_dtypes
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


def kl_rows(student, teacher, temperature):
    """Mean over examples, with one temperature or one per example."""
    temperatures = temperature if isinstance(temperature, list) else [temperature] * len(student)
    return mean(kl(s, t, x) for s, t, x in zip(student, teacher, temperatures, strict=True))


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


def check_exact(x, dtype):
    """Inputs must be numbers of the case's own type, or the reference would see other numbers than the library."""
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


def number(x):
    """Reads the numbers that JSON does not have from strings."""
    if isinstance(x, list):
        return [number(y) for y in x]
    return float(x) if x in ("inf", "-inf", "nan") else x


def fill(group, case):
    """Sets value and gradient of one case. A gradient that says "finite" stays, and an infinite value has none."""
    given = {**group["options"], **case}
    inputs = {n: number(v) for n, v in given.items() if n not in ("student", "value", "gradient")}
    student = number(case["student"])
    for array in (student, inputs.get("teacher", [])):
        check_exact(array, group["dtype"])
    function = globals()[group["loss"]]
    digits = 17 if group["dtype"] == "float64" else 8
    value = function(student, **inputs)
    case["value"] = plain(rounded(value, digits))
    if not mpmath.isfinite(value):
        case["gradient"] = None
    elif case.get("gradient") != "finite":
        case["gradient"] = plain(rounded(gradient(lambda s: function(s, **inputs), student), digits))


def main():
    path = Path(__file__).with_name("cases.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ['{"tolerances": ' + json.dumps(data["tolerances"]) + ",", '"groups": [']
    for group in data["groups"]:
        cases = group.pop("cases")
        for case in cases:
            fill(group, case)
        body = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
        lines.append(f'{json.dumps(group, ensure_ascii=False)[:-1]}, "cases": [\n{body}]}}' + ",")
    lines[-1] = lines[-1][:-1]
    path.write_text("\n".join([*lines, "]}"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
