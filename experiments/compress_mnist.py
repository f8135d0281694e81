"""A trained network made smaller: units pruned, merged or selected, as few left as a budget allows.

Trains the original, then goes round: edit → evaluate on validation data against the original → adjust →
repeat. Every smaller network is fine-tuned by distillation from the original. At each share of units:
one-shot (from the original at once) by each operator, iteratively (each network from the one before),
and a network of the same size that starts at random ("fresh"). The smallest whose validation loss is
within the budget is searched between the shares tried, and named. The test set is for the report.

    python experiments/compress_mnist.py                              # 784-128-10
    python experiments/compress_mnist.py --original mlp:1200,1200
    python experiments/compress_mnist.py --original convnet:16,32
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from harness import pictures, report, runs, study  # fmt: skip
from harness.options import Amount, Count, Dropout, Options, Positive, Share, Whole, parse
from harness.study import Trained
from harness.training import Lab, adam, arrays, begin, jittered, plain, prepare, work

from distill_jax import _files, data, losses, metrics, models, teachers, train
from distill_jax.compress import units

OPERATORS = ("prune", "merge", "select", "prune+merge", "fresh")
SCORES = ("l1", "l2", "taylor", "fisher", "apoz", "mean_activation", "fpgm", "lamp", "random")
FIGURES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "F1": "f1"}


@dataclass(frozen=True)
class Config(Options):
    """Options. The defaults shown are those on MNIST."""

    seeds: Count = 3
    """how many repetitions, each with its own original"""
    original: str = "mlp:128"
    """such as mlp:128, mlp:1200,1200 or convnet:16,32"""
    epochs: Count = 15
    """the original's"""
    tuning_epochs: Count = 20
    """of fine-tuning after each edit"""
    dropout: Dropout = 0.2
    """of the original's hidden units"""
    learning_rate: Positive = 3e-3
    """Adam's, at its highest: a rise over one epoch, then a cosine to 0"""
    batch_size: Count = 128
    """examples a step"""
    jitter: Whole = 0
    """pixels by which training images are shifted at random; the original labels the shifted ones"""
    operators: tuple[str, ...] = OPERATORS
    """of prune, merge, select, prune+merge and fresh"""
    iterative: tuple[str, ...] = ("prune", "merge")
    """those that are also applied step by step"""
    shares: tuple[float, ...] = (0.5, 0.3, 0.18, 0.11, 0.065)
    """of the units that stay, falling"""
    multiple: Count = 1
    """widths are rounded up to multiples of this: 49 units need not be faster than 56"""
    refinements: Whole = 2
    """further shares, between the smallest network within the budget and the next smaller one"""
    budget: Amount = 0.02
    """nats by which the validation loss may exceed the original's, on the mean over seeds"""
    score: str = "l1"
    """by which units are pruned, and weighted when merged: l1, l2, taylor, fisher, apoz,
    mean_activation, fpgm, lamp or random"""
    likeness: Literal["activations", "weights"] = "activations"
    """by which units are merged"""
    examples: Count = 1024
    """training examples on which units are scored and compared"""
    temperature: Positive = 4.0
    """T, of the distillation"""
    alpha: Share = 0.1
    """the labels' share of the fine-tuning loss; the rest is the original's"""
    check: bool = False
    """exit 1 unless a smaller network is within the budget, and one of half the units (of the test
    accuracy) within 0.3 points of the original"""


DEFAULTS: dict[tuple[str, bool], dict[str, Any]] = {("", True): {
    "epochs": 60, "tuning_epochs": 40, "batch_size": 32, "learning_rate": 3e-3,
}}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses values that cannot be meant, before anything is trained or written."""
    config.fit(len(dataset.train.id), "batch_size", "examples")
    config.among("operators", OPERATORS)
    config.among("iterative", OPERATORS[:-1])
    config.among("score", SCORES)
    config.need("operators", bool(config.operators), "name at least one")
    falling = all(a > b for a, b in itertools.pairwise((0.999, *config.shares, 0.0)))
    config.need("shares", bool(config.shares) and falling, "fall and lie between 0 and 1")
    kind = config.original.partition(":")[0]
    config.need("original", kind in ("mlp", "convnet"), "be mlp:… or convnet:…")
    try:
        widths_at(config, dataset, config.shares[-1])
    except ValueError as error:
        raise ValueError(f"--shares {config.shares[-1]:g} is too little: {error}") from None


def build(config: Config, dataset: data.Dataset, description: str, seed: int) -> models.Model:
    """Builds a network of the original's kind; ``convnet:16,32/128`` has a dense layer of 128 units."""
    kind, _, hidden = description.partition("/")
    shape: Any = dataset.train.image.shape[1:]
    options: dict[str, Any] = {"hidden": int(hidden)} if hidden else {}
    original = description == config.original
    return models.build(
        kind, shape, dataset.classes, jax.random.fold_in(jax.random.key(seed), not original),
        dropout=config.dropout if original else 0.0, **options,
    )  # fmt: skip


def graph_of(model: Any, variables: tuple[Any, Any], images: np.ndarray) -> units.UnitGraph:
    """The units of a network of these parameters."""

    def fn(tree: Any, x: Any) -> Any:
        return model(tree["params"], tree["state"], x)[0]

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _tree(variables))
    return units.trace(fn, like, prepare(images))


def _tree(variables: tuple[Any, Any]) -> dict[str, Any]:
    return {"params": variables[0], "state": variables[1]}


def describe(config: Config, widths: Sequence[int]) -> str:
    """What rebuilds a network of these widths: of the hidden layers, in their order."""
    kind = config.original.partition(":")[0]
    if kind == "convnet":
        return f"convnet:{','.join(map(str, widths[:-1]))}/{widths[-1]}"
    return f"{kind}:{','.join(map(str, widths))}"


def score(
    config: Config, graph: units.UnitGraph, apply_fn: Any, variables: Any, batch: Any, seed: int
) -> dict[str, np.ndarray]:
    """How much each unit matters, on some training examples."""
    name, tree = config.score, _tree(variables)
    images = prepare(batch["image"])
    if name == "random":
        return units.scores.random(jax.random.key(seed), graph)
    if name in ("apoz", "mean_activation"):
        return getattr(units.scores, name)(graph, tree, images)
    if name in ("l1", "l2", "fpgm", "lamp"):
        return getattr(units.scores, name)(graph, variables[0])

    def loss(params, example):
        logits, _ = apply_fn(params, variables[1], example["image"][None])
        return losses.cross_entropy(logits, example["label"][None])[0]

    each = {"image": images, "label": batch["label"]}
    if name == "fisher":
        squares = units.scores.squared_gradients(loss, variables[0], each)
        return units.scores.fisher(graph, variables[0], squares)
    gradients = jax.jit(
        jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, each).mean())
    )(variables[0])  # fmt: skip
    return units.scores.taylor(graph, variables[0], gradients)


def widths_at(config: Config, dataset: data.Dataset, share: float) -> list[int]:
    """The widths of the hidden layers with a share of the original's units, in their order.

    At least two each: a single unit is no group, which a further step could make smaller.
    """
    model = build(config, dataset, config.original, 0)
    graph = graph_of(model.apply_fn, model[1:], dataset.train.image[:1])
    alike = {name: np.zeros(group.size) for name, group in graph.groups.items() if group.free}
    kept = units.prune(graph, alike, share, across="group", multiple=config.multiple)
    return [max(2, len(indices)) for indices in kept.values()]


def edit(
    config: Config,
    dataset: data.Dataset,
    operator: str,
    widths: Sequence[int],
    apply_fn: Callable[..., Any],
    variables: tuple[Any, Any],
    seed: int,
) -> tuple[Any, Any]:
    """Applies an operator: ``(params, model_state)`` with hidden layers of these widths."""
    rows = np.random.default_rng(seed).permutation(len(dataset.train.label))[: config.examples]
    batch = {name: values[rows] for name, values in arrays(dataset.train).items()}
    graph = graph_of(apply_fn, variables, batch["image"])
    names = [name for name, group in graph.groups.items() if group.free]
    if operator == "prune+merge":
        sizes = [graph.groups[name].size for name in names]
        halfway = [round((n * w) ** 0.5) for n, w in zip(sizes, widths, strict=True)]
        half = edit(config, dataset, "prune", halfway, apply_fn, variables, seed)
        return edit(config, dataset, "merge", widths, apply_fn, half, seed)
    student = build(config, dataset, describe(config, widths), seed)
    if operator == "fresh":
        return student.params, student.model_state
    small, tree = graph_of(student.apply_fn, student[1:], batch["image"]), _tree(variables)
    if operator == "select":
        kept = units.select(graph, small)
    else:
        scores = score(config, graph, apply_fn, variables, batch, seed)
        kept = units.select(graph, small, how=scores)
    if operator == "merge":
        alike = None
        if config.likeness == "activations":
            values = units.activations(graph, tree, prepare(batch["image"]))
            alike = {name: values[name].T for name in names}
        each = dict(zip(names, widths, strict=True))
        tree, kept = units.merge(graph, tree, each, likeness=alike, scores=scores)
    edited = units.keep(graph, tree, kept)
    return edited["params"], edited["state"]


def effort(config: Config, share: float) -> float:
    """The work of an epoch of fine-tuning, in epochs of the original, whose forward pass is a third."""
    return share + bool(config.jitter) / 3


class Search:
    """The loop of all seeds: edits, fine-tuning, figures of validation, what to try next.

    Args:
      config: the options.
      lab: where networks are trained.
      unit: the work of an epoch of the original, for the bar.
    """

    def __init__(self, config: Config, lab: Lab, unit: float):
        self.config, self.lab, self.unit = config, lab, unit
        # Of all smaller networks: it reads their widths from the arrays, and drops none
        small = dataclasses.replace(config, dropout=0.0)
        self.apply_fn = build(small, lab.dataset, config.original, 0).apply_fn
        self.trained: list[dict[str, Trained]] = []
        self.before: list[dict[str, dict[str, dict[str, float]]]] = []
        self.training: list[dict[str, np.ndarray]] = []  # of the fine-tuning
        self.tried: dict[str, tuple[str, bool, float]] = {}  # name → operator, iterative, share

    def begin(self) -> None:
        """Trains the originals, and stores their soft labels where the images stay as they are."""
        config, lab = self.config, self.lab
        training = arrays(lab.dataset.train)
        for seed in range(config.seeds):
            model = build(config, lab.dataset, config.original, seed)
            original = lab.train(
                "original", seed, model, train.supervised(model.apply_fn), training,
                epochs=config.epochs, tx=adam(config.learning_rate, config.epochs),
                batch_size=config.batch_size, order_seed=10_000 + seed, unit=self.unit,
                transform=jittered(config.jitter) if config.jitter else plain,
            )  # fmt: skip
            self.trained.append({"original": original})
            self.before.append({})
            stored = {} if config.jitter else {"teacher": lab.store_labels(seed, original)}
            self.training.append(training | stored)

    def attempt(self, operator: str, share: float, start: str = "original") -> str:
        """Edits and fine-tunes one network a seed; returns its name.

        Args:
          operator: of OPERATORS.
          share: of the original's units.
          start: the network it is made from, one already tried.
        """
        config, lab = self.config, self.lab
        iterative = start != "original"
        name = f"{operator}{', iterative' if iterative else ''} {share:.3g}"
        if name in self.tried:
            return name
        self.tried[name] = operator, iterative, share
        widths = widths_at(config, lab.dataset, share)
        for seed, models_ in enumerate(self.trained):
            large = models_[start]
            variables = edit(config, lab.dataset, operator, widths, large.apply_fn, large.variables, seed)
            model = models.Model(self.apply_fn, *variables)
            at_once = lab.judge(model.apply_fn, variables, {}, 0.0)
            self.before[seed][name] = {
                split: metrics.evaluate(logits, getattr(lab.dataset, split).label)
                for split, logits in (
                    ("validation", at_once.validation_logits), ("test", at_once.test_logits),
                )
            }  # fmt: skip
            models_[name] = lab.train(
                name.replace(", ", "-").replace(" ", "-"), seed, model,
                train.distill(
                    model.apply_fn, temperature=config.temperature, alpha=config.alpha
                ),
                self.training[seed], epochs=config.tuning_epochs,
                tx=adam(config.learning_rate, config.tuning_epochs), batch_size=config.batch_size,
                order_seed=20_000 + seed, unit=self.unit * effort(config, share),
                **self.labelling(seed),
            )  # fmt: skip
        return name

    def labelling(self, seed: int) -> dict[str, Any]:
        """How a batch of the fine-tuning is prepared: where it is shifted, the original labels it."""
        if not self.config.jitter:
            return {}
        original = self.trained[seed]["original"]
        label, shift = teachers.make_label(original.apply_fn), jittered(self.config.jitter)
        return {
            "transform": lambda variables, batch, key: label(variables, shift(None, batch, key)),
            "context": original.variables,
        }

    def loss(self, name: str) -> float:
        """Validation loss in nats, the mean over seeds."""
        label = self.lab.dataset.validation.label
        return float(
            np.mean([
                metrics.evaluate(models_[name].validation_logits, label)["nll"]
                for models_ in self.trained
            ])
        )  # fmt: skip

    def size(self, name: str) -> int:
        """Parameters of a network, of the first seed."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trained[0][name].variables[0]))

    def edited(self) -> list[str]:
        """The networks tried that have units of the original."""
        return [name for name, (operator, *_) in self.tried.items() if operator != "fresh"]

    def chosen(self) -> str:
        """The smallest network within the budget; of equals the one with the lowest loss."""
        limit = self.loss("original") + self.config.budget
        names = [name for name in self.edited() if self.loss(name) <= limit]
        return min(["original", *names], key=lambda name: (self.size(name), self.loss(name)))

    def run(self) -> str:
        """Tries the grid, then refines; returns the name of the network chosen."""
        config = self.config
        self.begin()
        for operator in config.operators:
            for share in config.shares:
                self.attempt(operator, share)
        for operator in config.iterative:
            start = self.attempt(operator, config.shares[0])
            for share in config.shares[1:]:
                start = self.attempt(operator, share, start)
        for _ in range(config.refinements):
            best = self.chosen()
            operator, iterative, share = self.tried.get(best, (config.operators[0], False, 1.0))
            smaller = [s for o, i, s in self.tried.values() if o == operator and i == iterative and s < share]
            if not smaller:
                break
            start = best if iterative else "original"
            self.attempt(operator, (share * max(smaller)) ** 0.5, start)
        best = self.chosen()
        if best != "original" and "fresh" in config.operators:
            self.attempt("fresh", self.tried[best][2])  # what the chosen one is held against
        return best


def claims(config: Config, search: Search, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What half the units, and a tenth of the operations, cost: of the best by validation of each.

    Returns:
      claim → ``model``, ``points`` of test accuracy lost (the mean over seeds), ``flops`` and
      ``latency_256`` as shares of the original's.
    """
    found = {}
    entries = results["models"]
    original = entries["original"]

    def flops(name: str) -> float:
        return entries[name]["flops"] / original["flops"]

    for claim, names in {
        "half of the units": [n for n in search.edited() if search.tried[n][2] == 0.5],
        "a tenth of the operations": [n for n in search.edited() if flops(n) <= 0.1],
    }.items():
        if not names:
            continue
        best = min(names, key=search.loss)
        lost = np.mean(original["test"]["accuracy"]) - np.mean(entries[best]["test"]["accuracy"])
        first = search.trained[0]
        pair: list[Any] = [(first[n].apply_fn, *first[n].variables) for n in (best, "original")]
        example = prepare(search.lab.dataset.test.image[:1])[0]
        ratio = metrics.speed_ratio(pair[0], pair[1], example, batch=256)
        found[claim] = {
            "model": best, "points": 100 * float(lost), "flops": flops(best), "latency_256": 1 / ratio,
        }  # fmt: skip
    return found


def at_once(search: Search) -> dict[str, dict[str, list[float]]]:
    """Test and validation accuracy before any fine-tuning: name → split → a value a seed."""
    return {
        name: {
            split: [seed[name][split]["accuracy"] for seed in search.before]
            for split in ("validation", "test")
        }
        for name in search.tried
    }


def untuned_table(config: Config, before: Mapping[str, Any]) -> str:
    """Accuracy of equal sizes before fine-tuning: a row a share, a column an operator."""
    operators = [operator for operator in config.operators if operator != "fresh"]
    rows = [["units left", *operators]]
    for share in config.shares:
        cells = [before[f"{operator} {share:.3g}"]["test"] for operator in operators]
        rows.append([f"{share:.3g}", *(report.mean_sd(cell, percent=True) for cell in cells)])
    return report.markdown(rows)


def draw(config: Config, search: Search, results: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Draws the trade-offs of all operators, and the accuracy before fine-tuning."""
    entries = results["models"]
    series: dict[str, list[str]] = {}
    for name, (operator, iterative, _) in search.tried.items():
        # The first step of an iterative series is one-shot
        first = [f"{operator} {config.shares[0]:.3g}"] if iterative else []
        series.setdefault(operator + (", iterative" if iterative else ""), first).append(name)
    costs: dict[str, Callable[[Any], float]] = {
        "parameters": lambda m: m["parameters"],
        "FLOPs": lambda m: m["flops"],
        "ms at batch 1": lambda m: m["latency_ms"]["1"],
        "ms at batch 256": lambda m: m["latency_ms"]["256"],
    }
    pictures.tradeoffs(
        out / "tradeoffs.png",
        {
            figure: {
                line: 100 * np.array([entries[name]["test"][key] for name in names])
                for line, names in series.items()
            }
            for figure, key in FIGURES.items()
        },
        {
            cost: {line: np.array([of(entries[name]) for name in names])
                   for line, names in series.items()}
            for cost, of in costs.items()
        },
        (
            {f: 100 * float(np.mean(entries["original"]["test"][k])) for f, k in FIGURES.items()},
            {cost: of(entries["original"]) for cost, of in costs.items()},
        ),
    )  # fmt: skip
    before = results["before_tuning"]
    pictures.curves(
        out / "untuned.png", config.shares,
        {
            operator: 100 * np.array([before[f"{operator} {s:.3g}"]["test"] for s in config.shares]).T
            for operator in config.operators if operator != "fresh"
        },
        xlabel="share of the units left", ylabel="test accuracy before fine-tuning, %",
    )  # fmt: skip
    return {
        "Test figures against costs, after fine-tuning; bars: one standard deviation over seeds; "
        "cross: the original": "tradeoffs.png",
        "Test accuracy before any fine-tuning; band: one standard deviation over seeds": "untuned.png",
    }


def main() -> int:
    """Runs the experiment; returns the exit status."""
    started = time.monotonic()
    config, dataset = parse(Config, __doc__, DEFAULTS)
    check(config, dataset)
    out = begin("compress_mnist", config, dataset)
    unit = work(build(config, dataset, config.original, 0), dataset)
    shares = sum(effort(config, share) for share in config.shares)
    edits = shares * (len(config.operators) + len(config.iterative))
    edits += (config.refinements + 1) * effort(config, min(config.shares))
    progress = runs.Progress(config.seeds * unit * (config.epochs + config.tuning_epochs * edits))
    lab = Lab(dataset, out, progress, config.seeds, save_seconds=config.save_seconds)
    search = Search(config, lab, unit)
    best = search.run()
    progress.close()

    results = study.results(
        "compress_mnist", dataset, search.trained, config=config,
        seconds={"total": time.monotonic() - started}, prepare=prepare, reference="original",
    )  # fmt: skip
    for name, model in results["models"].items():
        model["validation"]["nll"] = search.loss(name)
    results["before_tuning"] = at_once(search)
    results["chosen"] = best
    results["claims"] = claims(config, search, results)
    _files.write_json(out / "results.json", results)
    drawn = draw(config, search, results, out)
    sentences = [summary(config, search, results), *(
        f"With {claim} ({c['model']}): {c['points']:+.2f} points of test accuracy lost, "
        f"{100 * c['flops']:.0f} % of the FLOPs, {c['latency_256']:.2f} of the time at batch 256."
        for claim, c in results["claims"].items()
    )]  # fmt: skip
    notes = [*sentences]
    if set(config.operators) - {"fresh"}:
        notes += [
            "Test accuracy in per cent before any fine-tuning, by the share of the units left:",
            untuned_table(config, results["before_tuning"]),
        ]
    twin = f"fresh {search.tried[best][2]:.3g}" if best != "original" else "original"
    twin = twin if twin in results["models"] else "original"
    method = "Compression" if twin == "original" else "Starting from units of the original"
    report.write_report(
        out, results, drawn, notes,
        baseline=twin, model=best, method=method,
    )  # fmt: skip
    columns = {"validation NLL": validation_loss, **report.COLUMNS, **report.FURTHER_COLUMNS}
    shown = ("parameters", "FLOPs", "ms at 1 / 256", "validation NLL", "accuracy %", "precision %",
             "recall %", "F1 %")  # fmt: skip
    print("\n" + report.table(results, {name: columns[name] for name in shown}))
    print("\n" + "\n\n".join(notes))
    print(f"Report with pictures: {out / 'report.md'}")
    half = results["claims"].get("half of the units")
    if config.check and (best == "original" or half is None or round(half["points"], 6) > 0.3):
        print("check failed: no smaller network is as good as asked for", file=sys.stderr)
        return 1
    return 0


def validation_loss(model: Mapping[str, Any]) -> str:
    """The column of the mean loss by which networks are chosen."""
    return f"{model['validation']['nll']:.4f}"


def summary(config: Config, search: Search, results: Mapping[str, Any]) -> str:
    """One sentence: which network was chosen, and what it costs."""
    best, entries = results["chosen"], results["models"]
    budget = f"{config.budget:g} nats of the original's validation loss, {search.loss('original'):.4f}"
    if best == "original":
        return f"No smaller network is within {budget}."
    parameters = [entries[name]["parameters"] for name in (best, "original")]
    accuracy = [
        report.mean_sd(entries[name]["test"]["accuracy"], percent=True) for name in (best, "original")
    ]
    return (
        f"Chosen: {best}, the smallest within {budget} ({search.loss(best):.4f}): "
        f"{parameters[0]:,} of {parameters[1]:,} parameters, test accuracy {accuracy[0]} % "
        f"(original: {accuracy[1]} %)."
    )


if __name__ == "__main__":
    runs.run_main(main)
