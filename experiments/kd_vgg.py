"""Makes a small network smaller still: distillation, pruning while it learns, fine-tuning.

For each seed the program trains a teacher and stores its soft labels. It trains the same student from the same
initial parameters on the labels ("scratch"), on the soft labels ("distilled"), and on the soft labels while a rising
share of its weights is removed ("sparse"). The last two are fine-tuned, the sparse one with its zeros fixed. For
comparison, the program also removes as many weights from the distilled student at once ("cut afterwards").

    python experiments/kd_vgg.py                         # mnist where it can be had, else digits
    python experiments/kd_vgg.py digits                  # a few minutes, no download
    python experiments/kd_vgg.py cifar10                 # hours on a GPU
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import numpy as np
import optax
from harness import (
    Count,
    Dropout,
    Options,
    Positive,
    Run,
    Share,
    Trained,
    Whole,
    adam,
    arrays,
    jittered,
    load,
    mnist_or_digits,
    plain,
    read,
    results,
    run_main,
)
from harness.networks import build
from harness.options import Allowed

from distill_jax import data, models, train
from distill_jax.compress import sparsity


def is_expression(text: str) -> bool:
    """Says whether a text is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


Expression = Annotated[str, Allowed("be regular expressions, such as head", is_expression)]
Pattern = Annotated[str, Allowed("be two numbers such as 2:4", re.compile(r"([1-9]\d*:[1-9]\d*)?$").match)]


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    train_examples: Count | None = None  # number of training examples to use, the first ones (default: all)
    teacher: str = "vgg8:0.25"  # teacher network, such as vgg8:0.25 or convnet:16,32
    student: str = "convnet:16,32"  # student network, such as convnet:16,32
    temperature: Positive = 4.0  # temperature T that softens the predictions of teacher and student
    alpha: Share = 0.1  # weight of the labels in the loss of distillation; the soft labels have 1 - alpha
    epochs: Count = 20  # number of epochs to distil each student
    learning_rate: Positive = 3e-3  # highest learning rate of distillation (Adam, cosine schedule)
    fine_tune_alpha: Share = 0.1  # weight of the labels in the loss of fine-tuning
    fine_tune_epochs: Count = 8  # number of epochs to fine-tune each distilled student
    fine_tune_learning_rate: Positive = 1e-3  # highest learning rate of fine-tuning (Adam, cosine schedule)
    batch_size: Count = 64  # number of examples per step of the students
    sparsity: Share = 0.8  # fraction of the weights in the student's kernels that is removed
    score: Literal["magnitude", "saliency"] = "magnitude"
    """which weights are removed first: those of smallest magnitude, or those whose removal would change the loss
    least, as estimated from the gradient"""
    ranking: Literal["uniform", "global"] = "global"
    """whether each kernel loses the same fraction of its weights, or the weights of all kernels are ranked together"""
    pattern: Pattern = ""
    """removal in a fixed pattern: 2:4 keeps two of four neighbouring inputs, and needs a sparsity of 0.5"""
    dense_leaves: tuple[Expression, ...] = ()
    """kernels that keep all their weights: regular expressions for their paths, such as head"""
    prune_begin: Share = 0.1  # where in the distillation pruning begins, as a fraction of its steps
    prune_end: Share = 0.6  # where in the distillation the sparsity is reached, as a fraction of its steps
    prune_every: Count = 20  # number of steps between two removals
    teacher_epochs: Count = 12  # number of epochs to train the teacher
    teacher_learning_rate: Positive = 2e-3  # highest learning rate of the teacher
    teacher_batch_size: Count = 64  # number of examples per step of the teacher
    dropout: Dropout = 0.2  # fraction of the teacher's hidden units that is dropped in training
    jitter: Whole = 2  # largest random shift of the teacher's training images, in pixels
    check: bool = False  # exit with status 1 if pruning costs more than 0.3 points of accuracy


MNIST = Config(dataset="mnist", train_examples=6000)
DIGITS = Config(
    dataset="digits", teacher="convnet:16,32", student="convnet:4,8", alpha=0.0, epochs=60, learning_rate=1e-2,
    fine_tune_alpha=0.0, fine_tune_epochs=20, sparsity=0.5, teacher_epochs=80, jitter=1,
)  # fmt: skip
CIFAR10 = Config(
    dataset="cifar10", teacher="vgg13:1", student="convnet:32,64,128", epochs=120, fine_tune_epochs=40,
    batch_size=128, prune_every=100, teacher_epochs=160, teacher_learning_rate=1e-3, teacher_batch_size=128, jitter=4,
)  # fmt: skip
CONFIGS = {
    "mnist": ("a narrow VGG-8 on 6000 images of MNIST: minutes on two cores", MNIST),
    "digits": ("scikit-learn's digits, which need no download: minutes on two cores", DIGITS),
    "cifar10": ("VGG-13 on CIFAR-10: hours on a GPU", CIFAR10),
}
DENSE, SPARSE = "distilled, fine-tuned", "sparse, fine-tuned"
POINTS = 0.3
COLUMNS: Mapping[str, results.Column] = {
    "parameters": results.count("parameters"),
    "not zero": results.count("nonzero"),
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "precision %": results.score("precision", percent=True),
    "agreement %": results.score("agreement", percent=True),
}


def limited(config: Config) -> data.Dataset:
    """Loads the data set, with the first of its training examples."""
    dataset = load(config)
    config.at_most(len(dataset.train.id), "train_examples")
    first = data.Split(*(field[: config.train_examples] for field in dataset.train))
    return dataset._replace(train=first)


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data or each other, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size", "teacher_batch_size")
    config.need("sparsity", config.sparsity < 1, "lie in [0, 1)")
    if numbers := pattern(config):
        kept, group = numbers
        expected = f"be two numbers such as 2:4, the first one smaller, of sparsity {config.sparsity:g}"
        config.need("pattern", kept < group and abs(1 - kept / group - config.sparsity) < 1e-6, expected)
    begins_first = config.prune_begin < config.prune_end
    config.need("prune_begin", begins_first, f"be less than --prune-end, {config.prune_end}")
    build(config, dataset, "teacher", 0)
    student = build(config, dataset, "student", 0)
    paths = [path for path in sparsity.sparsity(student.params) if path != "overall"]
    for expression in config.dense_leaves:
        found = any(re.search(expression, path) for path in paths)
        config.need("dense_leaves", found, f"each be found in some path of {', '.join(paths)}")
    # An axis that the pattern does not divide shows here
    pruning(config, optax.identity(), schedule(config, len(dataset.train.id))).init(student.params)


def schedule(config: Config, examples: int) -> sparsity.Schedule:
    """Makes the schedule by which the sparsity rises during the distillation."""
    # The last step has the number steps - 1, and must see the whole sparsity
    steps = config.epochs * (examples // config.batch_size)
    begin = int(config.prune_begin * (steps - 1))
    end = max(begin + 1, int(config.prune_end * (steps - 1)))
    if end >= steps:
        raise ValueError(
            f"the distillation has {steps} steps, too few to prune in: use a smaller --batch-size or more --epochs"
        )
    return sparsity.polynomial(config.sparsity, begin=begin, end=end, every=config.prune_every)


def pruning(
    config: Config, tx: optax.GradientTransformation, schedule: sparsity.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it removes weights by a schedule, as the options say."""
    options: dict[str, Any] = {"score": config.score, "ranking": config.ranking}
    return sparsity.sparsify(tx, schedule, pattern=pattern(config), exclude=config.dense_leaves, **options)


def pattern(config: Config) -> tuple[int, int] | None:
    """Reads the pattern: ``(2, 4)`` for ``"2:4"``, None where there is none."""
    kept, _, group = config.pattern.partition(":")
    return (int(kept), int(group)) if config.pattern else None


def train_model(
    run: Run, name: str, seed: int, model: models.Model, loss_fn: train.LossFn, tx: optax.GradientTransformation,
    examples: Mapping[str, Any], *, epochs: int, batch_size: int, order: int, transform: Any = plain,
) -> Trained:  # fmt: skip
    """Trains one model, or takes it from the checkpoint of the run."""
    step = train.make_train_step(loss_fn, tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=transform)  # many steps in one call
    state = train.init_state(model, tx, run.key(seed, order))
    done = run.fit(name, seed, state, epoch, examples, epochs=epochs, batch_size=batch_size, order=order)
    return run.judge(done.model, done.history, done.seconds, done.state.opt_state)


def train_teacher(config: Config, run: Run, seed: int) -> Trained:
    """Trains the teacher on the labels of shifted images."""
    examples = arrays(run.dataset.train)
    steps = len(examples["label"]) // config.teacher_batch_size
    return train_model(
        run, "teacher", seed, build(config, run.dataset, "teacher", seed), train.supervised(),
        adam(config.teacher_learning_rate, config.teacher_epochs, steps), examples, epochs=config.teacher_epochs,
        batch_size=config.teacher_batch_size, order=10_000 + seed, transform=jittered(config.jitter),
    )  # fmt: skip


def train_students(config: Config, run: Run, seed: int, teacher: models.Model) -> dict[str, Trained]:
    """Trains the students of one seed: from scratch, distilled, distilled and pruned, and fine-tuned."""
    start = build(config, run.dataset, "student", seed)
    examples = arrays(run.dataset.train) | {"teacher": run.store_labels(seed, teacher)}
    steps = len(examples["label"]) // config.batch_size
    hard = train.supervised()
    soft = train.distill(temperature=config.temperature, alpha=config.alpha)
    tuning = train.distill(temperature=config.temperature, alpha=config.fine_tune_alpha)

    def learn(name, model, loss_fn, tx, epochs, order):
        options = {"epochs": epochs, "batch_size": config.batch_size, "order": order + seed}
        return train_model(run, name, seed, model, loss_fn, tx, examples, **options)

    def fine_tune(name, model, wrap=lambda tx: tx):
        tx = wrap(adam(config.fine_tune_learning_rate, config.fine_tune_epochs, steps))
        return learn(name, model, tuning, tx, config.fine_tune_epochs, 30_000)

    epochs = config.epochs + config.fine_tune_epochs
    tx = adam(config.learning_rate, config.epochs, steps)
    prune = pruning(config, tx, schedule(config, len(examples["label"])))
    scratch = learn("scratch", start, hard, adam(config.learning_rate, epochs, steps), epochs, 20_000)
    dense = learn("distilled", start, soft, tx, config.epochs, 20_000)
    sparse = learn("sparse", start, soft, prune, config.epochs, 20_000)
    masks = sparsity.mask_of(sparse.opt_state)
    return {
        "scratch": scratch,
        "distilled": dense,
        DENSE: fine_tune(DENSE, dense.model),
        "cut afterwards": cut(config, run, dense),
        "sparse": sparse,
        SPARSE: fine_tune(SPARSE, sparse.model, lambda tx: sparsity.frozen(tx, masks)),
    }


def cut(config: Config, run: Run, dense: Trained) -> Trained:
    """Removes as many weights, the smallest, from the distilled student at once, without further training."""
    at_once = sparsity.polynomial(config.sparsity, begin=0, end=1)
    tx = pruning(replace(config, score="magnitude"), optax.set_to_zero(), at_once)
    params = dense.model.params
    state = tx.init(params)
    for _ in range(2):  # the weights do not move; the schedule ends with the second step
        _, state = jax.jit(tx.update)(params, state, params)
    return run.judge(dense.model.replace(params=sparsity.apply_masks(params, state.masks)), dense.history)


def nonzero(trained: Trained) -> int:
    """Counts the parameters that are not zero."""
    return sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(trained.model.params))


def verdict(found: Mapping[str, Any]) -> str:
    """Says in one sentence what the sparse student lost against the dense one, in points of accuracy."""
    dense, sparse = (found["models"][name]["test"]["accuracy"] for name in (DENSE, SPARSE))
    difference = results.paired(dense, sparse)
    error = "" if math.isnan(difference.error) else f" ± {100 * difference.error:.2f}"
    removed = 100 * found["config"]["sparsity"]
    return (
        f"Pruning during distillation: without {removed:g} % of its weights, the distilled student's test accuracy "
        f"changes by {100 * difference.mean:+.2f}{error} points (mean and standard error of the paired difference; "
        f"number of seeds: {len(dense)})."
    ).replace("-", "−")


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("kd_vgg", name, config, check, limited(config))
    trained = []
    for seed in range(config.seeds):
        teacher = train_teacher(config, run, seed)
        trained.append({"teacher": teacher, **train_students(config, run, seed, teacher.model)})
    logits = run.test_logits(trained)
    found = run.evaluate(trained, logits)
    for model, entry in found["models"].items():
        # A weight that was not removed may be zero by chance, so the counts of two seeds can differ
        entry["nonzero"] = float(np.mean([nonzero(seed[model]) for seed in trained]))
    drawn = results.draw(run.directory, run.dataset, trained, logits, ("teacher", DENSE, SPARSE))
    leaves = sparsity.report(trained[0][SPARSE].model.params).splitlines()
    notes = [
        results.summary(found, model=DENSE, method="Distillation with fine-tuning"),
        "The parameters of the pruned and fine-tuned student of seed 1, and how many of them are zero:",
        "\n".join(f"    {line}" for line in leaves),
    ]
    run.finish(found, drawn, headline=verdict(found), notes=notes, columns=COLUMNS)
    dense, sparse = (np.mean(found["models"][n]["test"]["accuracy"]) for n in (DENSE, SPARSE))
    return run.check(sparse >= dense - POINTS / 100, f"pruning costs more than {POINTS} points of accuracy")


if __name__ == "__main__":
    run_main(main)
