"""Trains narrow codes of a linear map, and compares them with the best that is possible.

The original is y = xW + b. An encoder and a decoder, both linear, learn it through a code that is narrower than x and
y. For every width of the code the least possible error is known (reduced-rank regression). The pair is trained in
three stages, first the encoder, then the decoder, then both, and the program reports by how much the trained pair
exceeds the optimum.

    python experiments/linear_code.py                      # a map of 64 to 32 numbers: minutes
    python experiments/linear_code.py line                 # y = wx + b: seconds
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from harness import Count, Positive, Run, RunOptions, Share, pictures, read, results, run_main

from distill_jax import data, train
from distill_jax.compress import linear_codes


@dataclass(frozen=True)
class Config(RunOptions):
    """The options of the experiment."""

    inputs: Count = 64  # width of x, the input of the map
    outputs: Count = 32  # width of y, the output of the map
    examples: Count = 8192  # number of inputs to draw for training, for validation and for testing each
    condition: Positive = 1000.0  # ratio of the widest to the narrowest direction of the drawn inputs
    ranks: tuple[Count, ...] = ()  # widths of the codes (none given: all widths)
    epochs: Count = 1500  # largest number of epochs of a stage; each is one step on all examples
    learning_rate: Positive = 1e-2  # learning rate of all stages (Adam, constant)
    tolerance: Share = 1e-4  # least relative improvement of the validation loss that lets a stage continue
    patience: Count = 100  # number of epochs in which this improvement must be made
    check: bool = False  # exit with status 1 unless every code is within 0.1 % of the optimum


CONFIGS = {
    "matrix": ("a linear map of 64 to 32 numbers, codes of all widths: minutes on two cores", Config()),
    "line": ("the tutorial's line y = wx + b: seconds", Config(inputs=1, outputs=1, examples=500)),
}
EXCESS = 1e-3


def _figure(name: str) -> results.Column:
    return lambda model: f"{model[name]:.3g}"


COLUMNS: Mapping[str, results.Column] = {
    "bytes of code": results.count("bytes_sent"),
    "parameters": results.count("parameters"),
    "error": _figure("error"),
    "optimum": _figure("optimum"),
    "excess": _figure("excess"),
    "closed form's excess": _figure("closed form's excess"),
    "epochs of stages": lambda model: results.stage_epochs(model["stages"]),
}


def check(config: Config) -> None:
    """Refuses options that do not fit each other, before anything is trained or written."""
    widest = min(config.inputs, config.outputs)
    config.need("ranks", all(rank <= widest for rank in config.ranks), f"be at most {widest}")
    config.need("examples", config.examples > config.inputs, f"exceed --inputs, {config.inputs}")
    config.need("condition", config.condition >= 1, "be at least 1")
    config.need("tolerance", config.tolerance < 1, "be below 1")


def draw_map(config: Config) -> tuple[dict[str, np.ndarray], data.Dataset]:
    """Draws W and b, and three splits of correlated inputs x, whose labels are y = xW + b."""
    rng = np.random.default_rng(0)
    size, outputs = config.inputs, config.outputs
    params = {"kernel": rng.normal(size=(size, outputs)), "bias": rng.normal(size=outputs)}
    mixing = rng.normal(size=(size, size)) * np.geomspace(1, 1 / config.condition, size)
    mean = rng.normal(size=size)

    def split(start: int) -> data.Split:
        x = rng.normal(size=(config.examples, size)) @ mixing.T + mean
        y = x @ params["kernel"] + params["bias"]
        return data.Split(np.arange(start, start + config.examples), x, y)

    training, validation, test = (split(i * config.examples) for i in range(3))
    name = f"linear-{size}-{outputs}"
    return params, data.Dataset(name, "drawn with seed 0", training, validation, test, outputs, ())


def train_code(config: Config, run: Run, frame: linear_codes.Coordinates, rank: int) -> train.Staged:
    """Trains an encoder and a decoder of one width in three stages, in coordinates in which this is easy."""

    def fields(split: data.Split) -> dict[str, np.ndarray]:
        z, t = linear_codes.transform(frame, split.image, split.label)
        return {"image": z.astype(np.float32), "teacher": t.astype(np.float32)}

    encoder, decoder = linear_codes.init_linear(
        jax.random.key(rank), frame.whiten.shape[1], rank, config.outputs
    )
    return train.train_stages(
        jax.random.key(rank), encoder, decoder, train.encoder_decoder(), fields(run.dataset.train),
        fields(run.dataset.validation), tx=lambda steps: optax.adam(config.learning_rate), epochs=config.epochs,
        batch_size=config.examples, seed=rank, tolerance=config.tolerance, patience=config.patience,
        directory=run.directory / f"width{rank}", save_seconds=config.save_seconds,
    )  # fmt: skip


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, "matrix")
    check(config)
    params, dataset = draw_map(config)
    run = Run.start("linear_code", name, config, dataset=dataset)
    frame = linear_codes.coordinates(dataset.train.image, dataset.train.label)
    roots = {s: linear_codes.root(getattr(dataset, s).image, centre=True) for s in ("train", "test")}
    best = {split: linear_codes.optimum(params["kernel"], root) for split, root in roots.items()}
    variance = best["train"][0]
    rows: dict[str, dict[str, Any]] = {}
    widths = sorted(config.ranks or range(1, min(config.inputs, config.outputs) + 1))
    for rank in widths:
        done = train_code(config, run, frame, rank)
        pair = linear_codes.fold(done.model, frame)
        learned = linear_codes.Linear(pair.params["encoder"]["kernel"], pair.params["decoder"]["kernel"])
        closed = linear_codes.reduced_rank(params["kernel"], roots["train"], rank)
        loss = {split: linear_codes.error(params["kernel"], root, learned) for split, root in roots.items()}
        exact = linear_codes.error(params["kernel"], roots["train"], closed)
        row = rows[f"width {rank}"] = {
            "width": rank,
            "bytes_sent": 4 * rank,
            "parameters": sum(p.size for p in jax.tree.leaves(pair.params)),
            "error": loss["train"] / variance,
            "optimum": best["train"][rank] / variance,
            "excess": (loss["train"] - best["train"][rank]) / variance,
            "closed form's excess": (exact - best["train"][rank]) / variance,
            "test error": loss["test"] / best["test"][0],
            "test optimum": best["test"][rank] / best["test"][0],
            "stages": [stage._asdict() for stage in done.stages],
        }
        print(
            f"width {rank}: {results.stage_epochs(row['stages'])} epochs, error {row['error']:.3g}",
            flush=True,
        )

    drawn = {}
    # Where the optimum is 0, rounding errors are left, which would only stretch the axis
    errors = [row["error"] * (row["optimum"] > 0) for row in rows.values()]
    if any(errors):
        pictures.code_widths(
            run.directory / "widths.png", widths,
            {"trained": errors, "optimum": [row["optimum"] for row in rows.values()]},
            ylabel="squared error / variance of y",
        )  # fmt: skip
        caption = (
            "Error of the outputs against the width of the code, on log scales: trained in stages (circles), and the "
            "least that is possible (line). Widths whose optimum is 0 are left out"
        )
        drawn[caption] = "widths.png"
    worst = max(row["excess"] for row in rows.values())
    headline = (
        f"Trained in three stages, all codes are within {100 * worst:.2g} % of the optimum (per cent of the variance "
        f"of the outputs); number of widths: {len(rows)}."
    )
    notes = [
        "Error, optimum and excess: of the outputs for the training examples, relative to their variance. "
        "Closed form: reduced-rank regression. Epochs: of the encoder's, the decoder's and the joint stage; a star "
        "marks a stage that ended at --epochs before it had converged.",
        examples(params, pair, dataset, rank),
    ]
    run.finish(run.record(rows), drawn, headline=headline, notes=notes, columns=COLUMNS)
    return run.check(worst <= EXCESS, f"the excess is above {100 * EXCESS:g} %")


def examples(params: Mapping[str, np.ndarray], pair: Any, dataset: data.Dataset, rank: int) -> str:
    """Lists outputs of the original and of the compressed map; and w and b, where the map is a line."""
    lines = [f"Test examples, first output: original and compressed (width {rank}):"]
    for y, guess in zip(dataset.test.label, pair(dataset.test.image[:5]), strict=False):
        lines.append(f"    {y[0]: .6f}  {guess[0]: .6f}  difference {guess[0] - y[0]: .1e}")
    if params["kernel"].size == 1:
        w = pair.params["encoder"]["kernel"] @ pair.params["decoder"]["kernel"]
        b = pair.params["decoder"]["bias"]
        lines.append(
            f"    y = wx + b: w {params['kernel'].item():.6f} learned as {w.item():.6f}, "
            f"b {params['bias'].item():.6f} as {b.item():.6f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
