"""A small network made better by a big one: knowledge distillation on MNIST or digits.

Trains a teacher, stores its soft labels, and trains the same student twice, from the same initial
parameters and in the same order of examples: on the labels ("scratch"), and on the soft labels
("distilled"). Repeats that over seeds, evaluates on the test set once, at the end, and reports.

    python experiments/kd_mnist.py                        # a few minutes on a laptop
    python experiments/kd_mnist.py --preset hinton2015    # Hinton, Vinyals and Dean 2015, §3
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax
from harness import report, runs, study  # fmt: skip
from harness.options import Amount, Count, Dropout, Options, Positive, Share, Whole, parse
from harness.study import Trained
from harness.training import Lab, adam, arrays, begin, jittered, plain, prepare, work

from distill_jax import _files, data, losses, models, teachers, train

SOFT_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "kl": losses.kl,
    "reverse_kl": losses.reverse_kl,
    "jensen_shannon": losses.jensen_shannon,
    "soft_cross_entropy": losses.soft_cross_entropy,
}


@dataclass(frozen=True)
class Config(Options):
    """Options. The defaults shown are those of the preset quick on MNIST."""

    preset: Literal["quick", "hinton2015"] = "quick"
    """quick: minutes; hinton2015: section 3 of the paper, an hour or two on two cores"""
    seeds: Count = 5
    """how many repetitions, each with its own teacher"""
    teacher: str = "convnet:8,16"
    """such as mlp:1200,1200 or convnet:16,32"""
    student: str = "mlp:256"
    """likewise"""
    members: Count = 1
    """networks in the teacher, averaged"""
    temperature: Positive = 4.0
    """T, softens the predictions of both"""
    alpha: Share = 0.0
    """the labels' share of the distilled student's loss; the rest is the teacher's"""
    loss: Literal["kl", "reverse_kl", "jensen_shannon", "soft_cross_entropy"] = "kl"
    """against the teacher's predictions"""
    epochs: Count = 25
    """the students'"""
    learning_rate: Positive = 1e-3
    """the students', at its highest: a rise over one epoch, then a cosine to 0 (Adam)"""
    batch_size: Count = 64
    """examples a step of the students"""
    teacher_epochs: Count = 8
    """the teacher's"""
    teacher_learning_rate: Positive = 2e-3
    """the teacher's"""
    teacher_batch_size: Count = 128
    """the teacher's"""
    dropout: Dropout = 0.2
    """of the teacher's hidden units"""
    max_norm: Amount = 0.0
    """bound on the norm of a teacher unit's incoming weights; 0: none"""
    jitter: Whole = 2
    """pixels by which the teacher's training images are shifted at random"""
    patient: bool = False
    """also train a student whose jittered images the teacher labels online"""
    omit_classes: tuple[int, ...] = ()
    """also distil without any example of these classes, then shift their bias"""
    labels_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the stored soft labels"""
    select: Literal["last", "best"] = "last"
    """which epoch is the model: the last, or the best on validation data"""
    devices: Count = 1
    """devices to spread each batch over (on a CPU: one a core)"""
    check: bool = False
    """exit 1 unless the distilled student's mean test error is below the scratch student's"""


# How the other presets differ. Chosen on validation data; BUILD_NOTES.md has the figures.
SMALL_IMAGES: dict[str, Any] = {
    "student": "mlp:128", "members": 3, "epochs": 100, "learning_rate": 1e-2, "jitter": 1,
    "teacher": "convnet:16,32", "teacher_epochs": 100, "teacher_batch_size": 64,
}  # fmt: skip
HINTON_2015: dict[str, Any] = {
    "dataset": "mnist", "seeds": 3, "teacher": "mlp:1200,1200", "student": "mlp:800,800",
    "temperature": 20.0, "epochs": 30, "teacher_epochs": 120, "teacher_learning_rate": 1e-3,
    "dropout": 0.4, "max_norm": 1.5, "validation": 2000, "patient": True, "omit_classes": (3,),
}  # fmt: skip
DEFAULTS = {("quick", True): SMALL_IMAGES, ("hinton2015", False): HINTON_2015}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses values that cannot be meant, before anything is trained or written."""
    for name in ("batch_size", "teacher_batch_size"):
        whole = getattr(config, name) % config.devices == 0
        config.need(name, whole, f"be a multiple of --devices, {config.devices}")
    for kind in ("teacher", "student"):
        build(config, dataset, kind, 0)
    kept = int((~np.isin(dataset.train.label, config.omit_classes)).sum())
    config.fit(kept, "batch_size", "teacher_batch_size")
    known = all(0 <= c < dataset.classes for c in config.omit_classes)
    config.need(
        "omit_classes", known and len(set(config.omit_classes)) < dataset.classes - 1,
        f"name some of 0 to {dataset.classes - 1} and leave at least two",
    )  # fmt: skip


def bounded(
    tx: Callable[[int], optax.GradientTransformation], max_norm: float
) -> Callable[[int], optax.GradientTransformation]:
    """Bounds the norm of each unit's weights after the optimizer's step; 0: does not."""
    if not max_norm:
        return tx
    return lambda steps: optax.chain(tx(steps), train.max_norm(max_norm))


def build(config: Config, dataset: data.Dataset, kind: str, seed: int) -> models.Model:
    """Builds the teacher or the student with the initial parameters of a seed."""
    key = jax.random.fold_in(jax.random.key(seed), kind == "student")
    dropout = config.dropout if kind == "teacher" else 0.0
    shape: Any = dataset.train.image.shape[1:]
    return models.build(getattr(config, kind), shape, dataset.classes, key, dropout=dropout)


def train_teacher(config: Config, lab: Lab, seed: int, unit: float) -> Trained:
    """Trains the teacher: one network, or several that are averaged."""
    members = []
    for member in range(config.members):
        model = build(config, lab.dataset, "teacher", seed * config.members + member)
        members.append(
            lab.train(
                f"teacher{member}" if config.members > 1 else "teacher",
                seed,
                model,
                train.supervised(model.apply_fn),
                arrays(lab.dataset.train),
                epochs=config.teacher_epochs,
                tx=bounded(adam(config.teacher_learning_rate, config.teacher_epochs), config.max_norm),
                batch_size=config.teacher_batch_size,
                transform=jittered(config.jitter),
                order_seed=10_000 + seed * config.members + member,
                unit=unit,
            )
        )
    if len(members) == 1:
        return members[0]
    apply_fn = teachers.ensemble(*[member.apply_fn for member in members])
    params, states = zip(*[member.variables for member in members], strict=True)
    history = {
        name: np.mean([member.history[name] for member in members], 0).tolist() for name in members[0].history
    }
    return lab.judge(apply_fn, (params, states), history, sum(member.seconds for member in members))


def train_students(config: Config, lab: Lab, seed: int, teacher: Trained, unit: float) -> dict[str, Trained]:
    """Trains the students of one seed, all from one initialisation."""
    model = build(config, lab.dataset, "student", seed)
    soft = train.distill(
        model.apply_fn, temperature=config.temperature, alpha=config.alpha, soft=SOFT_LOSSES[config.loss]
    )

    def student(name, loss_fn, training, transform=plain, context=None, unit=unit):
        return lab.train(
            name,
            seed,
            model,
            loss_fn,
            training,
            epochs=config.epochs,
            tx=adam(config.learning_rate, config.epochs),
            batch_size=config.batch_size,
            transform=transform,
            context=context,
            order_seed=20_000 + seed,
            unit=unit,
        )

    training = arrays(lab.dataset.train)
    labelled = training | {"teacher": lab.store_labels(seed, teacher, dtype=config.labels_dtype)}
    students = {
        "scratch": student("scratch", train.supervised(model.apply_fn), training),
        "distilled": student("distilled", soft, labelled),
    }
    if config.patient:
        label, jitter = teachers.make_label(teacher.apply_fn), jittered(config.jitter)
        students["patient"] = student(
            "patient",
            soft,
            training,
            lambda variables, batch, key: label(variables, jitter(None, batch, key)),
            teacher.variables,
            unit * 2,
        )
    if config.omit_classes:
        kept = ~np.isin(lab.dataset.train.label, config.omit_classes)
        name = "without " + ", ".join(map(str, config.omit_classes))
        partial = {field: values[kept] for field, values in labelled.items()}
        students[name] = student(name.replace(", ", "-").replace(" ", "-"), soft, partial)
        students[name + ", shifted"] = shift_bias(config, lab.dataset, students[name])
    return students


def shift_bias(config: Config, dataset: data.Dataset, student: Trained) -> Trained:
    """Adds to the bias of the omitted classes what makes the fewest errors on validation data.

    Errors are constant between steps of the shift: the middle one of the best is taken.
    """
    omitted = np.isin(np.arange(dataset.classes), config.omit_classes)
    shifts = np.linspace(-5, 20, 1001)
    label = dataset.validation.label
    errors = [np.sum((student.validation_logits + shift * omitted).argmax(-1) != label) for shift in shifts]
    best = shifts[errors == np.min(errors)]
    add = np.float32(best[len(best) // 2]) * omitted
    return student._replace(
        apply_fn=lambda *args, **options: (student.apply_fn(*args, **options)[0] + add, args[1]),
        validation_logits=student.validation_logits + add,
        test_logits=student.test_logits + add,
    )


def main() -> int:
    """Runs the experiment; returns the exit status."""
    started = time.monotonic()
    config, dataset = parse(Config, __doc__, DEFAULTS)
    if config.devices > 1:
        train.use_cpu_devices(config.devices)
    check(config, dataset)
    out = begin("kd_mnist", config, dataset)

    # The unit of work is one epoch of a student
    work_of = [work(build(config, dataset, kind, 0), dataset) for kind in ("teacher", "student")]
    teacher_unit = work_of[0] / work_of[1]
    students = 2 + 2 * config.patient + bool(config.omit_classes)
    total = config.members * config.teacher_epochs * teacher_unit + students * config.epochs
    progress = runs.Progress(config.seeds * total)
    lab = Lab(dataset, out, progress, config.seeds, config.select, config.save_seconds, config.devices)
    trained = []
    for seed in range(config.seeds):
        teacher = train_teacher(config, lab, seed, teacher_unit)
        trained.append({"teacher": teacher, **train_students(config, lab, seed, teacher, 1.0)})
    progress.close()

    results = study.results(
        "kd_mnist",
        dataset,
        trained,
        config=config,
        seconds={"total": time.monotonic() - started},
        prepare=prepare,
    )
    _files.write_json(out / "results.json", results)
    drawn = study.draw(out, dataset, trained, ("teacher", "scratch", "distilled"))
    report.write_report(out, results, drawn)
    print()
    print(report.table(results))
    print()
    print(report.summary(results))
    print(f"Report with pictures: {out / 'report.md'}")
    test = {name: results["models"][name]["test"]["errors"] for name in ("scratch", "distilled")}
    if config.check and not np.mean(test["distilled"]) < np.mean(test["scratch"]):
        print("check failed: the distilled student is not better than scratch", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    runs.run_main(main)
