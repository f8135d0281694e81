"""Every network taught by every other, by every feature method: does the loss fall?

    python tests/method_matrix.py
    python tests/method_matrix.py --students vgg8 mlp --teachers linen --methods hint crd

Layers are named by ``match_layers`` alone. Of each pair and method, the student's and the method's
parameters take a few short steps against the gradient on one batch, the student's alone until the
loss has fallen; after a step that raises it they go back, and take shorter ones.
"""

import argparse
import functools
import math
import sys

import conftest  # noqa: F401  (programs that run a few times only are compiled fast)
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from tqdm import tqdm

from distill_jax import features, losses, models
from distill_jax.features.capturing import capture, layer_shapes
from distill_jax.features.matching import match_layers
from distill_jax.models import Model

NETWORKS = {
    "mlp": "mlp:32,24",
    "convnet": "convnet:8,16",
    "vgg8": "vgg8:0.25",
    "resnet8x4": "resnet8x4:0.25",
    "resnet20": "resnet20:0.5",
    "wrn16-2": "wrn16-2:0.25",
    "mobilenetv2": "mobilenetv2:0.25",
    "shufflenetv2": "shufflenetv2:0.25",
    "linen": "",
}
METHODS = {
    "hint": lambda: features.project(losses.hint),
    "attention_transfer": lambda: features.project_maps(losses.attention_transfer),
    "nst": lambda: features.project_maps(losses.nst),
    "activation_boundary": lambda: features.project(losses.activation_boundary, always=True),
    "ofd": features.ofd,
    "vid": features.vid,
    "factor_transfer": features.factor_transfer,
    "fsp": features.fsp,
    "cka": lambda: features.relation(losses.cka),
    "cat_kd": features.cat_kd,
    "review_kd": features.review_kd,
    "simkd": features.simkd,
    "mgd": features.mgd,
    "semckd": features.semckd,
    "similarity_preserving": lambda: features.relation(losses.similarity_preserving),
    "rkd": features.rkd,
    "pkt": lambda: features.relation(losses.pkt, pool=True),
    "correlation_congruence": features.correlation_congruence,
    "ickd": features.ickd,
    "info_nce": features.info_nce,
    "crd": lambda: features.crd(negatives=64),
}
STEPS, RATE = 5, 1e-3
LAYERS = None  # pairs of layers: as many as match_layers finds
BATCH, SHAPE, CLASSES = 8, (16, 16, 3), 10
IDS = np.arange(BATCH)  # of the examples, among twice as many
KEY = jax.random.key(0)


class LinenCNN(linen.Module):
    """A network that is not one of ours."""

    @linen.compact
    def __call__(self, x, train=False):
        for width in (12, 20):
            x = linen.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
        return linen.Dense(CLASSES)(x.mean((1, 2)))


@functools.cache
def images():
    return np.random.default_rng(0).normal(size=(BATCH, *SHAPE)).astype(np.float32)


@functools.cache
def network(name, side=0):
    """The model, its values' shapes by name; as student (0) and teacher (1) of other parameters."""
    key = jax.random.fold_in(KEY, 2 * list(NETWORKS).index(name) + side)
    if name == "linen":
        model = models.from_linen(LinenCNN(), key, images())
    else:
        model = models.build(NETWORKS[name], SHAPE, CLASSES, key)
    return model, layer_shapes(model, images())


@functools.cache
def pairing(student, teacher):
    """Which layer learns from which: two pairs at least, or FSP has no flow."""
    shapes = network(student)[1], network(teacher)[1]
    pairs = match_layers(*shapes, count=LAYERS)
    return pairs if len(pairs) > 1 else match_layers(*shapes, count=2)


def captured(name, side):
    """The model, which also gives the layers that any pairing names."""
    others = [(name, other) if side == 0 else (other, name) for other in NETWORKS]
    names = {pair[side] for two in others for pair in pairing(*two)}
    return capture(network(name, side)[0], sorted(names))


@functools.cache
def teacher_features(name):
    _, features = jax.jit(Model.__call__)(captured(name, 1), images())
    return jax.tree.map(np.asarray, features)


@functools.cache
def student_program(name):
    """``(params, cotangents) -> (features, gradient)``, in training mode; and cotangents of zero."""
    model = captured(name, 0)

    @jax.jit
    def run(params, cotangents, model):
        def features(params):
            return model.replace(params=params).apply(images(), key=KEY)[0][1]

        values, pull = jax.vjp(features, params)
        return values, pull(cotangents)[0]

    _, values = jax.eval_shape(model, images())
    zeros = {name: np.zeros(value.shape, value.dtype) for name, value in values.items()}
    return functools.partial(run, model=model), zeros


def start(name, student_shapes, teacher_shapes):
    """The part, its parameters and its state: CRD's memory, of the last layer; none for others."""
    part = METHODS[name]()
    if isinstance(part, features.LearnedWithState):
        params = part.init(KEY, student_shapes[-1:], teacher_shapes[-1:])
        return part, params, part.init_state(KEY, examples=2 * BATCH)
    return part, part.init(KEY, student_shapes, teacher_shapes), ()


def apply(part, params, state, student, teacher):
    """The mean of the loss, and the state after."""
    if isinstance(part, features.LearnedWithState):
        values, state = part.apply(params, state, student[-1:], teacher[-1:], IDS, key=KEY)
    else:
        values = part.apply(params, student, teacher, labels=jnp.arange(BATCH) % 4, key=KEY)
    return values.mean(), state


def against(params, gradient, rate):
    """A step against the gradient, of a part of the parameters' own length."""

    def length(tree):
        return math.sqrt(sum(float(np.sum(np.square(x, dtype=float))) for x in jax.tree.leaves(tree)))

    size = length(gradient)
    if not 0 < size < math.inf:
        return params
    rate *= max(length(params), 1.0) / size
    return jax.tree.map(lambda x, g: np.asarray(x - rate * g, x.dtype), params, gradient)


def train(student, teacher, methods=tuple(METHODS)):
    """Distils each method's own copy of the student: the loss before and after each step."""
    names, teacher_names = zip(*pairing(student, teacher), strict=True)
    theirs = [teacher_features(teacher)[name] for name in teacher_names]
    run, zeros = student_program(student)
    shapes = [zeros[name].shape for name in names], [x.shape for x in theirs]
    started = {method: start(method, *shapes) for method in methods}
    params, states = ({m: part[i] for m, part in started.items()} for i in (1, 2))
    students = dict.fromkeys(methods, network(student)[0].params)

    @jax.jit
    def evaluate(params, states, ours):
        results = {}
        for method, (part, *_) in started.items():
            loss = jax.value_and_grad(functools.partial(apply, part), (0, 2), has_aux=True)
            results[method] = loss(params[method], states[method], ours[method], theirs)
        return results

    def features(students):
        values = {method: run(students[method], zeros)[0] for method in methods}
        return {method: [layers[name] for name in names] for method, layers in values.items()}

    # A memory takes its first examples, and then stays: it is part of the loss
    first = evaluate(params, states, features(students))
    states = {method: state for method, ((_, state), _) in first.items()}
    history = {method: [] for method in methods}
    best, rates = {}, dict.fromkeys(methods, RATE)
    for _ in range(STEPS + 1):
        for method, ((loss, _), gradients) in evaluate(params, states, features(students)).items():
            history[method].append(float(loss))
            if history[method][-1] <= min(history[method]):
                cotangents = zeros | dict(zip(names, gradients[1], strict=True))
                _, gradient = run(students[method], cotangents)
                best[method] = students[method], gradient, params[method], gradients[0]
            else:
                rates[method] /= 10
            ours, by_ours, learned_params, by_params = best[method]
            students[method] = against(ours, by_ours, rates[method])
            if history[method][0] > min(history[method]):
                params[method] = against(learned_params, by_params, rates[method])
    return history


def failures(history):
    """Which methods failed, and their losses."""
    return {
        method: values
        for method, values in history.items()
        if not (np.isfinite(values).all() and min(values) < (1 - 1e-6) * values[0])
    }


def table(counts, students, teachers):
    """The number of methods by student (rows) and teacher (columns)."""
    width = max(map(len, NETWORKS))
    rows = [["", *teachers], *([s, *(str(counts.get((s, t), "")) for t in teachers)] for s in students)]
    return "\n".join("  ".join(cell.rjust(width) for cell in row) for row in rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--teachers", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, help="pairs of layers (default: all that match)")
    options = parser.parse_args()
    global LAYERS
    LAYERS = options.layers
    counts, failed = {}, []
    pairs = [(student, teacher) for student in options.students for teacher in options.teachers]
    with tqdm(pairs) as progress:
        for student, teacher in progress:
            progress.set_description(f"{teacher} → {student}")
            bad = failures(train(student, teacher, options.methods))
            counts[student, teacher] = len(options.methods) - len(bad)
            for method, values in bad.items():
                failed.append(f"{teacher} → {student} by {method}: {values}")
                progress.write(failed[-1])
    print(f"\nMethods, of {len(options.methods)}, whose loss fell; students down, teachers across:")
    print(table(counts, options.students, options.teachers))
    print("\n".join(["", *failed]) if failed else "")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
