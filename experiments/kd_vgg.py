"""A VGG network made small: distillation with temperature, pruning while it learns, fine-tuning.

Pre-trains a teacher and stores its soft labels. Then distils a small convolutional network from them
twice, from the same initial parameters and in the same order of examples: dense, and with a rising
share of its weights removed while it learns. Both are fine-tuned for the same number of epochs, the
sparse one with its masks fixed. Repeats that over seeds, evaluates on the test set once, at the end.

    python experiments/kd_vgg.py                       # minutes on a laptop
    python experiments/kd_vgg.py --preset cifar10      # hours on a GPU
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax
from harness import report, runs, study  # fmt: skip
from harness.options import Count, Dropout, Options, Positive, Share, Whole, parse
from harness.study import Trained
from harness.training import Lab, adam, arrays, begin, jittered, prepare, work

from distill_jax import _files, data, models, train
from distill_jax.compress import sparsity


@dataclass(frozen=True)
class Config(Options):
    """Options. The defaults shown are those of the preset quick on MNIST."""

    preset: Literal["quick", "cifar10"] = "quick"
    """quick: a narrow VGG-8 on the first images of MNIST, minutes on two cores; cifar10: VGG-13 on
    CIFAR-10, for a GPU"""
    seeds: Count = 5
    """how many repetitions, each with its own teacher"""
    train_examples: Count | None = 6000
    """how many training examples to use, the first ones (default: all that --validation leaves)"""
    teacher: str = "vgg8:0.25"
    """such as vgg8:0.25 or convnet:16,32"""
    student: str = "convnet:16,32"
    """likewise"""
    temperature: Positive = 4.0
    """T, softens the predictions of both"""
    alpha: Share = 0.1
    """the labels' share of the distilled students' loss; the rest is the teacher's"""
    sparsity: Share = 0.8
    """the fraction of the kernels' weights that is removed"""
    score: Literal["magnitude", "saliency"] = "magnitude"
    """which weights go: the smallest, or those whose loss the gradient says matters least"""
    ranking: Literal["uniform", "global"] = "global"
    """whether each kernel loses the same fraction, or all are ranked together, which spares the
    small first and last ones"""
    pattern: str = ""
    """such as 2:4, where two of four neighbouring inputs stay; the sparsity must be that of it"""
    dense_leaves: tuple[str, ...] = ()
    """regular expressions for the paths of kernels that stay dense, such as head"""
    prune_begin: Share = 0.1
    """where in the distillation pruning begins, as a fraction of its steps"""
    prune_end: Share = 0.6
    """and where it has reached --sparsity"""
    prune_every: Count = 20
    """steps between removals"""
    epochs: Count = 20
    """of the distillation"""
    learning_rate: Positive = 3e-3
    """the students', at its highest: a rise over one epoch, then a cosine to 0 (Adam)"""
    fine_tune_epochs: Count = 8
    """after it, with fixed masks"""
    fine_tune_learning_rate: Positive = 1e-3
    """likewise"""
    fine_tune_alpha: Share = 0.1
    """the labels' share of the loss in fine-tuning"""
    batch_size: Count = 64
    """examples a step of the students"""
    teacher_epochs: Count = 12
    """the teacher's"""
    teacher_learning_rate: Positive = 2e-3
    """the teacher's"""
    teacher_batch_size: Count = 64
    """the teacher's"""
    dropout: Dropout = 0.2
    """of the teacher's hidden units"""
    jitter: Whole = 2
    """pixels by which the teacher's training images are shifted at random"""
    check: bool = False
    """exit 1 unless the sparse student loses at most 0.3 points of the dense one's test accuracy"""


# How the other presets differ.
SMALL_IMAGES: dict[str, Any] = {
    "train_examples": None, "teacher": "convnet:16,32", "student": "convnet:8,16",
    "epochs": 60, "fine_tune_epochs": 20, "teacher_epochs": 80, "jitter": 1, "learning_rate": 1e-2,
}  # fmt: skip
CIFAR10: dict[str, Any] = {
    "dataset": "cifar10", "train_examples": None, "teacher": "vgg13:1",
    "student": "convnet:32,64,128", "epochs": 120, "fine_tune_epochs": 40,
    "teacher_epochs": 160, "teacher_learning_rate": 1e-3, "teacher_batch_size": 128,
    "batch_size": 128, "prune_every": 100, "jitter": 4,
}  # fmt: skip
DEFAULTS = {("quick", True): SMALL_IMAGES, ("cifar10", False): CIFAR10}

DENSE, SPARSE = "distilled, fine-tuned", "sparse, fine-tuned"
POINTS = 0.3

COLUMNS: Mapping[str, report.Column] = {
    "parameters": report.count("parameters"),
    "not zero": report.count("nonzero"),
    "errors": report.score("errors"),
    "accuracy %": report.score("accuracy", percent=True),
    "precision %": report.score("precision", percent=True),
    "agreement %": report.score("agreement", percent=True),
}


def limited(config: Config, dataset: data.Dataset) -> data.Dataset:
    """The data set with the first of its training examples."""
    config.fit(len(dataset.train.id), "train_examples")
    first = data.Split(*(field[: config.train_examples] for field in dataset.train))
    return dataset._replace(train=first)


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses values that cannot be meant, before anything is trained or written."""
    config.fit(len(dataset.train.id), "batch_size", "teacher_batch_size")
    config.need(
        "prune_begin", config.prune_begin < config.prune_end,
        f"be less than --prune-end, {config.prune_end}",
    )  # fmt: skip
    for kind in ("teacher", "student"):
        build(config, dataset, kind, 0)
    # What concerns the student's kernels, such as a pattern that does not fit, shows here
    student = build(config, dataset, "student", 0)
    pruner(config, len(dataset.train.id), optax.identity()).init(student.params)


def build(config: Config, dataset: data.Dataset, kind: str, seed: int) -> models.Model:
    """Builds the teacher or the student with the initial parameters of a seed."""
    key = jax.random.fold_in(jax.random.key(seed), kind == "student")
    dropout = config.dropout if kind == "teacher" else 0.0
    shape: Any = dataset.train.image.shape[1:]
    return models.build(getattr(config, kind), shape, dataset.classes, key, dropout=dropout)


def pruner(
    config: Config, examples: int, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Wraps a student's optimizer so that it prunes."""
    # The last epoch's last step has number steps − 1, and must see the whole sparsity
    steps = config.epochs * (examples // config.batch_size)
    begin = int(config.prune_begin * (steps - 1))
    end = max(begin + 1, int(config.prune_end * (steps - 1)))
    if end >= steps:
        raise ValueError(
            f"the distillation has {steps} steps, too few to prune in: use a smaller --batch-size "
            "or more --epochs"
        )
    schedule = sparsity.polynomial(config.sparsity, begin=begin, end=end, every=config.prune_every)
    return sparsity.sparsify(
        tx,
        schedule,
        score=config.score,
        ranking=config.ranking,
        pattern=parse_pattern(config.pattern),
        exclude=config.dense_leaves,
    )


def parse_pattern(text: str) -> tuple[int, int] | None:
    """Reads ``"2:4"``; None of an empty text."""
    if not text:
        return None
    keep, _, group = text.partition(":")
    if not (keep.isdecimal() and group.isdecimal()):
        raise ValueError(f"--pattern must be two numbers such as 2:4, got {text!r}")
    return int(keep), int(group)


def train_teacher(config: Config, lab: Lab, seed: int, unit: float) -> Trained:
    """Stage 1: the teacher learns from the labels."""
    model = build(config, lab.dataset, "teacher", seed)
    return lab.train(
        "teacher",
        seed,
        model,
        train.supervised(model.apply_fn),
        arrays(lab.dataset.train),
        epochs=config.teacher_epochs,
        tx=adam(config.teacher_learning_rate, config.teacher_epochs),
        batch_size=config.teacher_batch_size,
        transform=jittered(config.jitter),
        order_seed=10_000 + seed,
        unit=unit,
    )


def train_students(config: Config, lab: Lab, seed: int, teacher: Trained) -> dict[str, Trained]:
    """Stages 2 to 4: soft labels; distillation, dense and with pruning; fine-tuning of both."""
    start = build(config, lab.dataset, "student", seed)
    labelled = arrays(lab.dataset.train) | {"teacher": lab.store_labels(seed, teacher)}
    examples = len(lab.dataset.train.id)

    def soft(alpha):
        return train.distill(start.apply_fn, temperature=config.temperature, alpha=alpha)

    def student(name, model, loss_fn, epochs, learning_rate, order_seed, wrap):
        return lab.train(
            name,
            seed,
            model,
            loss_fn,
            labelled,
            epochs=epochs,
            tx=lambda steps: wrap(adam(learning_rate, epochs)(steps)),
            batch_size=config.batch_size,
            order_seed=order_seed + seed,
            unit=1.0,
        )

    def distil(name, wrap=lambda tx: tx):
        return student(name, start, soft(config.alpha), config.epochs, config.learning_rate, 20_000, wrap)

    def fine_tune(name, distilled, wrap=lambda tx: tx):
        model = models.Model(start.apply_fn, *distilled.variables)
        loss_fn, rate = soft(config.fine_tune_alpha), config.fine_tune_learning_rate
        return student(name, model, loss_fn, config.fine_tune_epochs, rate, 30_000, wrap)

    hard = train.supervised(start.apply_fn)
    epochs = config.epochs + config.fine_tune_epochs
    scratch = student("scratch", start, hard, epochs, config.learning_rate, 20_000, lambda tx: tx)
    dense = distil("distilled")
    sparse = distil("sparse", lambda tx: pruner(config, examples, tx))
    masks = sparsity.mask_of(sparse.opt_state)
    return {
        "scratch": scratch,
        "distilled": dense,
        DENSE: fine_tune("distilled-fine-tuned", dense),
        "cut afterwards": cut(config, lab, dense),
        "sparse": sparse,
        SPARSE: fine_tune("sparse-fine-tuned", sparse, lambda tx: sparsity.frozen(tx, masks)),
    }


def cut(config: Config, lab: Lab, dense: Trained) -> Trained:
    """Removes from the dense distilled student the same share of weights, without training."""
    config = dataclasses.replace(config, prune_begin=0.0, prune_end=1.0, score="magnitude")
    examples = len(lab.dataset.train.id)
    tx = pruner(config, examples, optax.set_to_zero())
    params, model_state = dense.variables
    # Weights that do not move: pruned step by step or at once, it comes to the same
    last = config.epochs * (examples // config.batch_size) - 1
    state = tx.init(params)._replace(step=np.int32(last))
    masks = jax.jit(tx.update)(params, state, params)[1].masks
    variables = (sparsity.apply_masks(params, masks), model_state)
    return lab.judge(dense.apply_fn, variables, dense.history, 0.0)


def nonzero(trained: Trained) -> int:
    """Counts the parameters that are not zero."""
    return sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(trained.variables[0]))


def verdict(results: Mapping[str, Any]) -> str:
    """One sentence on what the sparse student lost against the dense one, in points of accuracy."""
    dense, sparse = (results["models"][name]["test"]["accuracy"] for name in (DENSE, SPARSE))
    difference = report.paired(dense, sparse)
    error = "" if math.isnan(difference.error) else f" ± {100 * difference.error:.2f}"
    return (
        f"Without {100 * results['config']['sparsity']:g} % of its weights, the distilled student's "
        f"test accuracy changes by {100 * difference.mean:+.2f}{error} points (mean and standard "
        f"error of the paired difference over seeds: {len(dense)})."
    ).replace("-", "−")


def main() -> int:
    """Runs the experiment; returns the exit status."""
    started = time.monotonic()
    config, dataset = parse(Config, __doc__, DEFAULTS)
    dataset = limited(config, dataset)
    check(config, dataset)
    out = begin("kd_vgg", config, dataset)

    # The unit of work is one epoch of a student
    works = [work(build(config, dataset, kind, 0), dataset) for kind in ("teacher", "student")]
    unit = works[0] / works[1]
    students = 3 * (config.epochs + config.fine_tune_epochs)
    progress = runs.Progress(config.seeds * (config.teacher_epochs * unit + students))
    lab = Lab(dataset, out, progress, config.seeds, save_seconds=config.save_seconds)
    trained = []
    for seed in range(config.seeds):
        teacher = train_teacher(config, lab, seed, unit)
        trained.append({"teacher": teacher, **train_students(config, lab, seed, teacher)})
    progress.close()

    results = study.results(
        "kd_vgg",
        dataset,
        trained,
        config=config,
        seconds={"total": time.monotonic() - started},
        prepare=prepare,
    )
    for name, model in results["models"].items():
        # A living weight may be zero by chance, so the counts of two seeds can differ
        model["nonzero"] = float(np.mean([nonzero(seed[name]) for seed in trained]))
    _files.write_json(out / "results.json", results)
    drawn = study.draw(out, dataset, trained, ("teacher", DENSE, SPARSE))
    leaves = sparsity.report(trained[0][SPARSE].variables[0])
    notes = [verdict(results), report.table(results, COLUMNS), f"```\n{leaves}\n```"]
    report.write_report(
        out, results, drawn, notes, baseline=DENSE, model=SPARSE, method="Pruning during distillation"
    )
    print()
    print(report.table(results, COLUMNS))
    print()
    print(leaves)
    print()
    print(report.summary(results, baseline="scratch", model=DENSE))
    print(verdict(results))
    print(f"Report with pictures: {out / 'report.md'}")
    dense, sparse = (np.mean(results["models"][n]["test"]["accuracy"]) for n in (DENSE, SPARSE))
    if config.check and sparse < dense - POINTS / 100:
        print(f"check failed: pruning costs more than {POINTS} points", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    runs.run_main(main)
