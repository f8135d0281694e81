"""Cuts a network in two, with a few bytes between a device and a server; and trains autoencoders beside it.

For each seed the program trains a network, the original. In a split network a small encoder on the device sends a
code of a few bytes, and the server continues with the original's last layers. An autoencoder learns the original's
predictions and its inputs together through one code. An encoder and its decoder are trained on the original's
predictions in three stages: first the encoder, then the decoder, then both.

    python experiments/split_network.py                    # mnist where it can be had, else digits
    python experiments/split_network.py digits             # minutes, no download
    python experiments/split_network.py mnist_convnet      # a convnet in the place of the MLP
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from harness import (
    Amount,
    Count,
    Positive,
    Run,
    Share,
    Trained,
    adam,
    arrays,
    jittered,
    labelled,
    mnist_or_digits,
    prepare,
    read,
    run_main,
)
from harness.networks import OriginalOptions, train_original
from split_network_report import COLUMNS, describe, draw, examples

from distill_jax import data, features, losses, metrics, models, train
from distill_jax.compress import codes


@dataclass(frozen=True)
class Config(OriginalOptions):
    """The options of the experiment."""

    encoder: str = "convnet:4,6"  # the network on the device; one more layer makes the code of its output
    feature: str = "dense.1"  # where a code enters the original: the name of a layer
    codes: tuple[str, ...] = ("16x8", "8x4", "4x4", "4x2")  # codes of split networks: width x bits
    widths: tuple[Count, ...] = (2, 32)  # widths of the autoencoders' codes, in 32-bit numbers
    inputs_weight: Amount = 10.0  # weight of the images' mean squared error in the autoencoders' loss
    temperature: Positive = 4.0  # temperature T that softens the predictions of all networks
    alpha: Share = 0.0  # weight of the labels in the loss; the original's predictions have 1 - alpha
    stage_epochs: Count = 8  # largest number of epochs of a stage
    stage_learning_rate: Positive = 2e-3  # highest learning rate of a stage (Adam, cosine schedule)
    tolerance: Share = 0.02  # least relative improvement of the validation loss that lets a stage continue
    patience: Count = 2  # number of epochs in which this improvement must be made


MNIST = Config(dataset="mnist")
MNIST_CONVNET = replace(
    MNIST, original="convnet:16,32", feature="hidden", original_epochs=8, original_learning_rate=2e-3
)
DIGITS = Config(
    dataset="digits", original="mlp:128,128", original_epochs=100, original_learning_rate=5e-3, encoder="mlp:16",
    stage_epochs=40, patience=10, batch_size=64, jitter=1,
)  # fmt: skip
DIGITS_CONVNET = replace(
    DIGITS, original="convnet:16,32", feature="hidden", original_learning_rate=2e-3, encoder="mlp:64"
)
CONFIGS = {
    "mnist": ("an MLP on MNIST: an hour per seed on two cores", MNIST),
    "mnist_convnet": ("a convnet on MNIST: an hour per seed on two cores", MNIST_CONVNET),
    "digits": ("an MLP on scikit-learn's digits, which need no download: two minutes per seed", DIGITS),
    "digits_convnet": ("a convnet on scikit-learn's digits: two minutes per seed", DIGITS_CONVNET),
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data or each other, before anything is trained or written."""
    config.need("tolerance", config.tolerance < 1, "be below 1")
    config.at_most(len(dataset.train.id), "batch_size")
    config.need(
        "codes", bool(config.codes or config.widths), "name at least one code where there are no --widths"
    )
    widest = max((read_code(code)[0] for code in config.codes), default=1)
    original = build(config.original, dataset, 0)
    build(config.encoder, dataset, 0)
    values = features.layer_shapes(original, prepare(dataset.train.image[:1]))
    config.among("feature", list(values))
    size = values[config.feature].size
    config.need("codes", widest <= size, f"be no wider than {config.feature}, {size}")


def read_code(text: str) -> tuple[int, int]:
    """Reads ``"16x8"``: 16 values of 8 bits."""
    width, _, bits = text.partition("x")
    if not (width.isdecimal() and bits.isdecimal() and int(width) and 1 <= int(bits) <= 16):
        raise ValueError(f"--codes must be width x bits such as 16x8, of up to 16 bits, got {text!r}")
    return int(width), int(bits)


def build(
    description: str, dataset: data.Dataset, seed: int, outputs: int | None = None, dropout: float = 0.0
) -> models.Model:
    """Builds a network for the images of the data set, by default with one output per class."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return models.build(description, dataset.image_shape, outputs or dataset.classes, key, dropout=dropout)


class Pair(NamedTuple):
    """An encoder and a decoder that were trained together.

    Attributes:
      trained: the compressed network, which returns predictions alone.
      stages: how its stages went, see :class:`distill_jax.train.Stage`.
      encoder: the encoder.
      bytes_sent: the size of the code of one example.
      whole: the encoder and the decoder together; an autoencoder's returns (predictions, images).
    """

    trained: Trained
    stages: list[dict[str, Any]]
    encoder: models.Model
    bytes_sent: int
    whole: models.Model


def train_pair(
    run: Run, seed: int, name: str, original: Trained, encoder: models.Model, decoder: models.Model,
    loss_options: Mapping[str, Any], **options: Any,
) -> train.Staged:  # fmt: skip
    """Trains an encoder and a decoder in stages on the original's predictions for shifted images."""
    config: Config = run.config
    soft = functools.partial(losses.kl, temperature=config.temperature)
    with ExitStack() as bars:

        def on_stage(stage: str) -> Any:
            bars.close()  # the bar of the stage before
            shown = f"seed {seed + 1}/{config.seeds}, {name}, {stage}"
            return bars.enter_context(run.progress(shown, config.stage_epochs, f"seed{seed}", name, stage))

        return train.train_stages(
            jax.random.key(seed, impl="rbg"), encoder, decoder,
            train.encoder_decoder(soft=soft, alpha=config.alpha, **loss_options), arrays(run.dataset.train),
            arrays(run.dataset.validation) | {"teacher": original.validation_logits},
            tx=lambda steps: adam(config.stage_learning_rate, config.stage_epochs, steps), epochs=config.stage_epochs,
            batch_size=config.batch_size, seed=30_000 + seed, tolerance=config.tolerance, patience=config.patience,
            transform=labelled(jittered(config.jitter)), context=original.model, prepare=prepare,
            directory=run.directory / f"seed{seed}" / name, save_seconds=config.save_seconds, on_stage=on_stage,
            **options,
        )  # fmt: skip


def split(config: Config, run: Run, seed: int, original: Trained, text: str) -> Pair:
    """Makes a split network: an encoder, a code of few bits, and a decoder from the original's last layers."""
    (width, bits), images = read_code(text), run.dataset.train.image
    encoder = build(config.encoder, run.dataset, 100 + seed, outputs=width)
    decoder = codes.make_decoder(original.model, config.feature, images[:2000], width, prepare=prepare)
    quantise = functools.partial(codes.quantise, bits=bits)
    done = train_pair(run, seed, f"split-{text}", original, encoder, decoder, {}, code=quantise)
    encoder = encoder.replace(params=done.model.params["encoder"], state=done.model.state["encoder"])
    sent = codes.pack(quantise(encoder(prepare(images[:1]))), bits=bits)
    trained = run.judge(done.model, done.history, done.seconds)
    return Pair(trained, [stage._asdict() for stage in done.stages], encoder, sent.shape[1], done.model)


def autoencoder(config: Config, run: Run, seed: int, original: Trained, width: int) -> Pair:
    """Makes an autoencoder, whose decoder returns predictions and images."""
    pixels = math.prod(run.dataset.image_shape)
    encoder = build(config.encoder, run.dataset, 200 + seed, outputs=width)
    predictions, images = (
        models.build(f"mlp:{hidden}", (1, 1, width), size, jax.random.key(300 + seed))
        for hidden, size in ((64, run.dataset.classes), (256, pixels))
    )
    decoder = codes.with_inputs(predictions, images)
    weights = {"inputs_weight": config.inputs_weight}
    done = train_pair(run, seed, f"autoencoder-{width}", original, encoder, decoder, weights)
    trained = run.judge(codes.outputs_only(done.model), done.history, done.seconds)
    return Pair(trained, [stage._asdict() for stage in done.stages], encoder, 4 * width, done.model)


def main() -> None:
    """Runs the experiment."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("split_network", name, config, check)
    splits = {code: "split, {} × {} bits".format(*read_code(code)) for code in config.codes}
    autoencoders = {width: f"autoencoder, {width}" for width in config.widths}
    trained: list[dict[str, Trained]] = []
    pairs: list[dict[str, Pair]] = []
    for seed in range(config.seeds):
        original = train_original(run, seed)
        made = {name: split(config, run, seed, original, code) for code, name in splits.items()}
        made |= {
            name: autoencoder(config, run, seed, original, width) for width, name in autoencoders.items()
        }
        trained.append({"original": original, **{name: pair.trained for name, pair in made.items()}})
        pairs.append(made)

    logits = run.test_logits(trained)
    found = run.evaluate(trained, logits, reference="original")
    test = run.dataset.test
    for name, pair in pairs[0].items():
        flops = metrics.costs([pair.encoder], prepare(test.image[0]), repeats=1)[0]["flops"]
        found["models"][name] |= {
            "bytes_sent": pair.bytes_sent,
            "stages": [made[name].stages for made in pairs],
            "device_flops": flops / found["models"]["original"]["flops"],
        }
    kept: dict[str, np.ndarray] = {}  # what the autoencoders of seed 1 make of the first test images
    for width, name in autoencoders.items():
        images = [models.predict(made[name].whole, test.image, prepare=prepare)[1] for made in pairs]
        wrong = [float(np.mean(np.square(x - prepare(test.image).reshape(x.shape)))) for x in images]
        found["models"][name]["test"]["inputs_error"] = wrong
        kept[f"width {width}"] = images[0][:12].reshape(12, *run.dataset.image_shape)

    drawn = draw(run, trained, found, list(splits.values()), kept)
    about = [describe(found, name) for name in pairs[0]]
    epochs = (
        "Epochs: of the encoder's, the decoder's and the joint stage (seed 1); a star marks a stage that ended at "
        "--stage-epochs before it had converged."
    )
    shown = {name: logits[0][name] for name in ("original", *list(pairs[0])[:1])}
    notes = [
        epochs,
        *(["\n".join(f"- {line}" for line in about[1:])] if about[1:] else []),
        examples(run, shown),
    ]
    run.finish(found, drawn, headline=about[0], notes=notes, columns=COLUMNS)


if __name__ == "__main__":
    run_main(main)
