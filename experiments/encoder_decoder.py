"""A model's function through a narrow code: encoder, code, decoder, and how little is lost.

With a linear original y = xW + b the best code of each width is known, and training is held to it. Of
a network three things are made: kernels become pairs of thin factors, fine-tuned on its predictions; it
is cut in two, with a few bytes a digit between a device and a server; and an autoencoder learns inputs
and outputs together. Every pair is trained in stages: encoder, decoder, both.

    python experiments/encoder_decoder.py                      # a linear map of 64 → 32, minutes
    python experiments/encoder_decoder.py --original mlp       # on MNIST where it can be had, or digits

The defaults shown are those of an mlp on MNIST; a convnet and small images have their own.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from harness import options, pictures, report, runs, study  # fmt: skip
from harness.options import Amount, Count, Dropout, Options, Positive, Share, Whole, parse
from harness.study import Trained
from harness.training import Lab, adam, arrays, begin, jittered, prepare

from distill_jax import _files, data, losses, metrics, models, teachers, train
from distill_jax.compress import bottleneck, linear_codes, low_rank
from distill_jax.features.capturing import layer_shapes


@dataclass(frozen=True)
class Config(Options):
    """Options. The defaults shown are those of an mlp on MNIST."""

    original: Literal["linear", "mlp", "convnet"] = "linear"
    """what is compressed"""
    dataset: str = "auto"
    """a network's: auto (MNIST where it can be had, else digits), or any that kd_mnist.py takes"""
    seeds: Count = 5
    """how many repetitions, each with its own network (of the linear map there is one)"""
    inputs: Count = 64
    """width of the linear original's inputs"""
    outputs: Count = 32
    """width of its outputs"""
    examples: Count = 8192
    """how many inputs to draw for training, and as many for validation and for testing"""
    ranks: tuple[Count, ...] = ()
    """widths of the linear codes (default: all)"""
    condition: Positive = 1000.0
    """by how much the widest direction that the linear inputs are drawn from exceeds the narrowest"""
    model: str = "mlp:1200,1200"
    """the network: a family and its widths, such as convnet:16,32"""
    encoder: str = "convnet:4,6"
    """the network on the device; the code is a further layer after it"""
    feature: str = "dense.1"
    """where a code enters the original: a layer's name"""
    budget: Positive = 0.15
    """the share of its parameters (or FLOPs) that the factorised network keeps"""
    of: Literal["parameters", "flops"] = "parameters"
    """what the budget counts"""
    codes: tuple[str, ...] = ("16x8", "8x4", "4x4", "4x2")
    """width × bits of the codes that are sent"""
    images: tuple[Count, ...] = (2, 32)
    """widths of the autoencoders' codes, of 32-bit numbers"""
    inputs_weight: Amount = 10.0
    """of the images' mean squared error in the autoencoders' loss"""
    temperature: Positive = 4.0
    """T, softens the predictions"""
    alpha: Share = 0.0
    """the labels' share of the loss; the rest is the original's"""
    original_epochs: Count = 20
    """epochs of the network's own training"""
    original_learning_rate: Positive = 1e-3
    """its rate, at its highest (Adam)"""
    dropout: Dropout = 0.2
    """of its hidden units, in training"""
    epochs: Count = 6
    """of the factorised network's"""
    learning_rate: Positive = 1e-3
    """of it, at its highest"""
    stage_epochs: Count = 8
    """the most epochs that a stage of a pair may take (linear: 1500)"""
    stage_learning_rate: Positive = 2e-3
    """of a stage, at its highest (linear: 0.01, constant)"""
    tolerance: Amount = 0.02
    """a stage has converged when the validation loss improves relatively by less than this (linear:
    1e-4)"""
    patience: Count = 2
    """within so many epochs (linear: 100)"""
    batch_size: Count = 128
    """examples a step; a linear original is trained on all at once"""
    jitter: Whole = 2
    """pixels by which training images are shifted at random; the original labels them as they are"""
    check: bool = False
    """exit 1 unless linear codes are within 0.1 % of the optimum, or the factorised network within
    0.15 points of the original"""

    @property
    def preset(self) -> str:
        """The name of the run's directory has it."""
        return self.original


# What else than Config's defaults the command line starts from: original, whether images are small
DEFAULTS: Mapping[tuple[str, bool], Mapping[str, Any]] = {
    ("linear", False): {
        "stage_epochs": 1500, "stage_learning_rate": 1e-2, "tolerance": 1e-4, "patience": 100,
    },
    ("convnet", False): {
        "model": "convnet:16,32", "feature": "hidden", "budget": 0.3,
        "original_epochs": 8, "original_learning_rate": 2e-3,
    },
    ("mlp", True): {
        "model": "mlp:128,128", "encoder": "mlp:16", "jitter": 1, "original_epochs": 60,
        "epochs": 40, "stage_epochs": 40, "patience": 10, "batch_size": 64, "budget": 0.3,
    },
    ("convnet", True): {
        "model": "convnet:16,32", "encoder": "mlp:64", "feature": "hidden", "jitter": 1, "budget": 0.3,
        "original_epochs": 60, "original_learning_rate": 2e-3, "epochs": 40, "stage_epochs": 40,
        "patience": 10, "batch_size": 64,
    },
}  # fmt: skip

EXCESS, POINTS = 1e-3, 0.15
TUNED = "whitened SVD, distilled"
EPOCHS = "Epochs of the encoder's, the decoder's and the joint stage; *: ended at the maximum, not converged."


def stage_epochs(done: Sequence[Mapping[str, Any]]) -> str:
    """Writes how long the stages of a pair took, and where one ended before it had converged."""
    return "+".join(f"{stage['epochs']}{'' if stage['converged'] else '*'}" for stage in done)


COLUMNS: Mapping[str, report.Column] = {
    "parameters": report.count("parameters"),
    "FLOPs": report.count("flops"),
    "bytes of code": report.count("bytes_sent"),
    "device FLOPs %": lambda m: f"{100 * m['device_flops']:.1f}" if "device_flops" in m else None,
    "errors": report.score("errors"),
    "accuracy %": report.score("accuracy", percent=True),
    "agreement %": report.score("agreement", percent=True),
    "KL from original": report.score("teacher_kl"),
    "pixels' squared error": report.score("inputs_error"),
    "epochs of stages": lambda m: stage_epochs(m["stages"][0]) if "stages" in m else None,
}


def load(config: Config) -> data.Dataset | None:
    """Loads the data set of a network."""
    return None if config.original == "linear" else options.load(config)


def check(config: Config, dataset: data.Dataset | None) -> None:
    """Refuses values that cannot be meant, before anything is trained or written."""
    need = config.need
    need("tolerance", config.tolerance < 1, "be below 1")
    need("budget", config.budget <= 1, "be at most 1")
    need("condition", config.condition >= 1, "be at least 1")
    if dataset is None:
        need("validation", config.validation is None, "be left out: a linear original draws its own")
        widest = min(config.inputs, config.outputs)
        need("ranks", all(r <= widest for r in config.ranks), f"be at most {widest}")
        need("examples", config.examples > config.inputs, f"exceed --inputs, {config.inputs}")
        return
    config.fit(len(dataset.train.id), "batch_size")
    widths = [parse_code(code)[0] for code in config.codes]
    original = build(config, dataset, config.model, 0)
    build(config, dataset, config.encoder, 0)
    values = layer_shapes(*original, prepare(dataset.train.image[:1]))
    need("feature", config.feature in values, f"be one of {', '.join(values)}")
    size = values[config.feature].size
    need("codes", max(widths, default=1) <= size, f"be no wider than {config.feature}, {size}")


def parse_code(text: str) -> tuple[int, int]:
    """Reads ``"16x8"``: 16 values of 8 bits."""
    width, _, bits = text.partition("x")
    if not (width.isdecimal() and bits.isdecimal() and int(width) and 1 <= int(bits) <= 16):
        raise ValueError(f"--codes must be width x bits such as 16x8, of up to 16 bits, got {text!r}")
    return int(width), int(bits)


# --- a linear original ---------------------------------------------------------------------------


def draw_linear(config: Config) -> tuple[dict[str, np.ndarray], data.Dataset]:
    """Draws W, b and correlated inputs in three splits, whose labels are the original's outputs."""
    rng = np.random.default_rng(0)
    size, outputs = config.inputs, config.outputs
    params = {"kernel": rng.normal(size=(size, outputs)), "bias": rng.normal(size=outputs)}
    mixing = rng.normal(size=(size, size)) * np.geomspace(1, 1 / config.condition, size)
    mean = rng.normal(size=size)

    def split(start):
        x = rng.normal(size=(config.examples, size)) @ mixing.T + mean
        y = linear_codes.affine(params, {}, x)[0]
        return data.Split(np.arange(start, start + config.examples), x, y)

    train, validation, test = (split(i * config.examples) for i in range(3))
    name = f"linear-{size}-{outputs}"
    return params, data.Dataset(name, "drawn with seed 0", train, validation, test, outputs, ())


def linear(config: Config) -> int:
    """Holds codes of all widths to the optimum; returns the exit status."""
    started = time.monotonic()
    params, dataset = draw_linear(config)
    out = begin("encoder_decoder", config, dataset)
    learning, validation, test = dataset.train, dataset.validation, dataset.test
    frame = linear_codes.coordinates(learning.image, learning.label)

    def fields(split):
        z, t = linear_codes.transform(frame, split.image, split.label)
        return {"image": z.astype(np.float32), "teacher": t.astype(np.float32)}

    roots = {s: linear_codes.root(getattr(dataset, s).image, centre=True) for s in ("train", "test")}
    best = {s: linear_codes.optimum(params["kernel"], root) for s, root in roots.items()}
    ranks = sorted(config.ranks or range(1, min(config.inputs, config.outputs) + 1))
    progress = runs.Progress(3 * len(ranks))
    rows = []
    for rank in ranks:

        def on_stage(name, rank=rank):
            return progress.stage(f"width {rank}, {name}", 1 / config.stage_epochs)

        done = train.train_stages(
            jax.random.key(rank),
            linear_codes.init_linear(jax.random.key(rank), frame.whiten.shape[1], rank, config.outputs),
            {"encoder": {}, "decoder": {}},
            functools.partial(train.encoder_decoder, linear_codes.affine, linear_codes.affine),
            fields(learning),
            fields(validation),
            tx=lambda steps: optax.adam(config.stage_learning_rate),
            epochs=config.stage_epochs,
            batch_size=len(learning.id),
            seed=rank,
            tolerance=config.tolerance,
            patience=config.patience,
            directory=out / f"width{rank}",
            save_seconds=config.save_seconds,
            on_stage=on_stage,
        )
        pair = linear_codes.fold(done.params, frame)
        learned = linear_codes.Linear(pair["encoder"]["kernel"], pair["decoder"]["kernel"])
        closed = linear_codes.reduced_rank(params["kernel"], roots["train"], rank)
        loss = {s: linear_codes.error(params["kernel"], root, learned) for s, root in roots.items()}
        exact = linear_codes.error(params["kernel"], roots["train"], closed)
        variance = best["train"][0]
        rows.append({
            "width": rank,
            "bytes": 4 * rank,
            "parameters": sum(p.size for p in jax.tree.leaves(pair)),
            "error": loss["train"] / variance,
            "optimum": best["train"][rank] / variance,
            "excess": (loss["train"] - best["train"][rank]) / variance,
            "closed form's excess": (exact - best["train"][rank]) / variance,
            "test error": loss["test"] / best["test"][0],
            "test optimum": best["test"][rank] / best["test"][0],
            "stages": [stage._asdict() for stage in done.stages],
        })  # fmt: skip
    progress.close()

    # Where the optimum is 0, what is left are rounding errors: they would only stretch the axis
    errors = [row["error"] * (row["optimum"] > 0) for row in rows]
    drawn = any(errors)
    if drawn:
        pictures.code_widths(
            out / "widths.png",
            [row["width"] for row in rows],
            {"trained": errors, "optimum": [row["optimum"] for row in rows]},
            ylabel="squared error / variance of y",
        )
    heads = ("width", "bytes", "parameters", "error", "optimum", "excess", "closed form's excess")
    table = [[*heads, "epochs of stages"]]
    for row in rows:
        cells = [f"{row[h]:{',' if h in heads[:3] else '.3g'}}" for h in heads]
        table.append([*cells, stage_epochs(row["stages"])])
    text = report.markdown(table)
    worst = max(row["excess"] for row in rows)
    # The last pair is the widest
    guesses, _ = linear_codes.compose(linear_codes.affine, linear_codes.affine)(
        pair, {"encoder": {}, "decoder": {}}, test.image[:5]
    )
    verdict = (
        f"Trained in three stages, codes of {len(rows)} widths are within {100 * worst:.2g} % of the "
        "optimum (of the outputs' variance)."
    )
    lines = [verdict, f"Test examples, first output: original and compressed (width {rank}):"]
    for y, guess in zip(test.label, guesses, strict=False):
        lines.append(f"  {y[0]: .6f}  {guess[0]: .6f}  difference {guess[0] - y[0]: .1e}")
    if config.inputs == config.outputs == 1:
        w, b = pair["encoder"]["kernel"] @ pair["decoder"]["kernel"], pair["decoder"]["bias"]
        lines.append(
            f"  y = wx + b: w {params['kernel'].item():.6f} learned as {w.item():.6f}, "
            f"b {params['bias'].item():.6f} as {b.item():.6f}"
        )
    results = {
        "experiment": "encoder_decoder", "config": config.recorded(), "widths": rows,
        "command": runs.command(),
        "environment": runs.environment(), "seconds": time.monotonic() - started,
    }  # fmt: skip
    _files.write_json(out / "results.json", results)
    body = "\n\n".join([
        "# A linear original through narrow codes", f"**{verdict}**", text,
        f"Error, optimum, excess: of the training data's outputs, relative to their variance. {EPOCHS}",
        "![Error against the width of the code](widths.png)" * drawn, "\n".join(lines[1:]),
        f"```sh\n{runs.command()}\n```\n",
    ])  # fmt: skip
    _files.write_atomically(out / "report.md", lambda tmp: tmp.write_text(body, encoding="utf-8"))
    print(f"\n{text}\n")
    print("\n".join(lines))
    print(f"Report with pictures: {out / 'report.md'}")
    if config.check and worst > EXCESS:
        print(f"check failed: the excess is above {100 * EXCESS:g} %", file=sys.stderr)
        return 1
    return 0


# --- a network -----------------------------------------------------------------------------------


def build(config: Config, dataset: data.Dataset, description: str, seed: int, **options: Any) -> models.Model:
    """Builds a network for the data set's images."""
    shape: Any = dataset.train.image.shape[1:]
    classes = options.pop("outputs", dataset.classes)
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return models.build(description, shape, classes, key, **options)


def train_original(config: Config, lab: Lab, seed: int) -> Trained:
    """The network that is compressed, from the labels."""
    model = build(config, lab.dataset, config.model, seed, dropout=config.dropout)
    return lab.train(
        "original",
        seed,
        model,
        train.supervised(model.apply_fn),
        arrays(lab.dataset.train),
        epochs=config.original_epochs,
        tx=adam(config.original_learning_rate, config.original_epochs),
        batch_size=config.batch_size,
        transform=jittered(config.jitter),
        order_seed=10_000 + seed,
        unit=1.0,
    )


def labelled(config: Config, original: Trained) -> Callable[..., Any]:
    """Makes the epoch's transform: jittered images, and what the original says of them."""
    label, jitter = teachers.make_label(original.apply_fn), jittered(config.jitter)
    return lambda variables, batch, key: label(variables, jitter(None, batch, key))


def factorise(config: Config, lab: Lab, seed: int, original: Trained) -> dict[str, Trained]:
    """Thin factors for the kernels, by plain and by whitened SVD, and the latter distilled."""
    apply_fn, (params, model_state) = original.apply_fn, original.variables
    images = prepare(lab.dataset.train.image[:4096])
    kernels = low_rank.kernels(apply_fn, params, model_state, images[:1])
    thin_fn = low_rank.factored(apply_fn)
    whitened = low_rank.layer_roots(apply_fn, params, model_state, images, batch=1024)
    made: dict[str, Trained] = {}
    for name, roots in {"SVD": None, "whitened SVD": whitened}.items():
        ranks = low_rank.allocate(params, kernels, config.budget, of=config.of, roots=roots)
        thin = low_rank.factorise(params, kernels, ranks, roots=roots)
        made[name] = lab.judge(thin_fn, (thin, model_state), {}, 0.0)
    made[TUNED] = lab.train(
        "factorised",
        seed,
        models.Model(thin_fn, thin, model_state),
        train.distill(thin_fn, temperature=config.temperature, alpha=config.alpha),
        arrays(lab.dataset.train),
        epochs=config.epochs,
        tx=adam(config.learning_rate, config.epochs),
        batch_size=config.batch_size,
        transform=labelled(config, original),
        context=original.variables,
        order_seed=20_000 + seed,
        unit=1.0,
    )
    return made


def staged(
    config: Config,
    lab: Lab,
    seed: int,
    name: str,
    original: Trained,
    encoder: models.Model,
    decoder: models.Model,
    **options: Any,
) -> tuple[Trained, list[dict[str, Any]]]:
    """Trains an encoder and a decoder in stages: the compressed model, and how the stages went."""
    done = train.train_stages(
        jax.random.key(seed, impl="rbg"),
        {"encoder": encoder.params, "decoder": decoder.params},
        {"encoder": encoder.model_state, "decoder": decoder.model_state},
        functools.partial(
            train.encoder_decoder,
            encoder.apply_fn,
            decoder.apply_fn,
            soft=functools.partial(losses.kl, temperature=config.temperature),
            alpha=config.alpha,
            **options,
        ),
        arrays(lab.dataset.train),
        arrays(lab.dataset.validation) | {"teacher": original.validation_logits},
        tx=adam(config.stage_learning_rate, config.stage_epochs),
        epochs=config.stage_epochs,
        batch_size=config.batch_size,
        seed=30_000 + seed,
        tolerance=config.tolerance,
        patience=config.patience,
        transform=labelled(config, original),
        context=original.variables,
        prepare=prepare,
        directory=lab.out / f"seed{seed}" / name,
        save_seconds=lab.save_seconds,
        on_stage=lambda stage: lab.progress.stage(f"seed {seed + 1}, {name}, {stage}", 1.0),
    )
    code = {"code": options["code"]} if "code" in options else {}
    apply_fn = linear_codes.compose(encoder.apply_fn, decoder.apply_fn, **code)
    if "inputs_weight" in options:
        apply_fn = bottleneck.outputs_only(apply_fn)
    variables = (done.params, done.model_state)
    trained = lab.judge(apply_fn, variables, done.history, done.seconds)
    return trained, [stage._asdict() for stage in done.stages]


def train_pairs(
    config: Config, lab: Lab, seed: int, original: Trained
) -> tuple[dict[str, Trained], dict[str, Any]]:
    """The split network at every code, the autoencoder at every width; and facts about each."""
    dataset, made, facts = lab.dataset, {}, {}
    model = models.Model(original.apply_fn, *original.variables)
    pixels = math.prod(dataset.train.image.shape[1:])
    for text in config.codes:
        width, bits = parse_code(text)
        name = f"split, {width} × {bits} bits"
        encoder = build(config, dataset, config.encoder, 100 + seed, outputs=width)
        decoder = bottleneck.decoder(
            model, config.feature, dataset.train.image[:2000], width, prepare=prepare
        )
        quantise = functools.partial(linear_codes.quantise, bits=bits)
        directory = f"split-{text}"
        made[name], how = staged(config, lab, seed, directory, original, encoder, decoder, code=quantise)
        params, model_state = (part["encoder"] for part in made[name].variables)
        code, _ = encoder.apply_fn(params, model_state, prepare(dataset.test.image[:1]))
        sent = linear_codes.pack(quantise(code), bits=bits)
        facts[name] = {"stages": how, "bytes_sent": sent.shape[1], "encoder": encoder}
    for width in config.images:
        name = f"autoencoder, {width}"
        encoder = build(config, dataset, config.encoder, 200 + seed, outputs=width)
        heads = [
            models.build(f"mlp:{hidden}", (1, 1, width), size, jax.random.key(300 + seed))
            for hidden, size in ((64, dataset.classes), (256, pixels))
        ]
        decoder = models.Model(
            bottleneck.with_inputs(*(head.apply_fn for head in heads)),
            {"outputs": heads[0].params, "inputs": heads[1].params},
            {"outputs": heads[0].model_state, "inputs": heads[1].model_state},
        )
        made[name], how = staged(
            config, lab, seed, f"autoencoder-{width}", original, encoder, decoder,
            inputs_weight=config.inputs_weight,
        )  # fmt: skip
        both = linear_codes.compose(encoder.apply_fn, decoder.apply_fn)
        images = teachers.predict(
            lambda *args, both=both: (both(*args)[0][1], args[1]),
            *made[name].variables,
            dataset.test.image,
            prepare=prepare,
        )
        truth = prepare(dataset.test.image).reshape(len(images), -1)
        facts[name] = {
            "stages": how, "bytes_sent": 4 * width, "encoder": encoder, "images": images[:12],
            "inputs_error": float(np.mean(np.square(images - truth))),
        }  # fmt: skip
    return made, facts


def network(config: Config, dataset: data.Dataset) -> int:
    """Compresses a network in three ways; returns the exit status."""
    started = time.monotonic()
    out = begin("encoder_decoder", config, dataset)
    pairs = len(config.codes) + len(config.images)
    epochs = config.original_epochs + config.epochs + 3 * config.stage_epochs * pairs
    progress = runs.Progress(config.seeds * epochs)
    lab = Lab(dataset, out, progress, config.seeds, save_seconds=config.save_seconds)
    trained, facts = [], []
    for seed in range(config.seeds):
        original = train_original(config, lab, seed)
        thin = factorise(config, lab, seed, original)
        made, about = train_pairs(config, lab, seed, original)
        trained.append({"original": original, **thin, **made})
        facts.append(about)
    progress.close()

    results = study.results(
        "encoder_decoder",
        dataset,
        trained,
        config=config,
        seconds={"total": time.monotonic() - started},
        prepare=prepare,
        reference="original",
    )
    example = prepare(dataset.test.image[0])
    for name, first in facts[0].items():
        model = results["models"][name]
        model["bytes_sent"] = first["bytes_sent"]
        model["stages"] = [seed[name]["stages"] for seed in facts]
        encoder: models.Model = first["encoder"]
        device = metrics.costs([encoder], example, repeats=1)[0]["flops"]
        model["device_flops"] = device / results["models"]["original"]["flops"]
        if "inputs_error" in first:
            model["test"]["inputs_error"] = [seed[name]["inputs_error"] for seed in facts]
    results["models"][TUNED]["ranks"] = low_rank.ranks_of(trained[0][TUNED].variables[0])
    small, large = ((m.apply_fn, *m.variables) for m in (trained[0][TUNED], trained[0]["original"]))
    faster = {b: metrics.speed_ratio(small, large, example, batch=b) for b in (1, 256)}
    results["models"][TUNED]["times_as_fast"] = {str(b): ratio for b, ratio in faster.items()}
    _files.write_json(out / "results.json", results)

    drawn = draw(config, out, dataset, trained, facts, results)
    lines = verdict(results, faster)
    lines += compare(dataset, trained[0])
    notes = [*([EPOCHS] if facts[0] else []), "\n".join(f"    {line}" for line in lines)]
    columns = {h: c for h, c in COLUMNS.items() if any(map(c, results["models"].values()))}
    report.write_report(
        out, results, drawn, notes, columns=columns,
        headline=lines[0],
    )  # fmt: skip
    print(f"\n{report.table(results, columns)}\n")
    print("\n".join(lines))
    print(f"Report with pictures: {out / 'report.md'}")
    lost = points(results, TUNED)
    if config.check and lost > POINTS:
        print(f"check failed: factorising costs {lost:.2f} points, over {POINTS}", file=sys.stderr)
        return 1
    return 0


def points(results: Mapping[str, Any], name: str) -> float:
    """How many points of accuracy a model lacks of the original's, in the mean over seeds."""
    a, b = (np.mean(results["models"][n]["test"]["accuracy"]) for n in ("original", name))
    return 100 * float(a - b)


def verdict(results: Mapping[str, Any], faster: Mapping[int, float]) -> list[str]:
    """What the factorised network and the split ones lose, and how fast the former is."""
    model, original = results["models"][TUNED], results["models"]["original"]
    lines = [
        f"Factorised to {100 * model['parameters'] / original['parameters']:.1f} % of its parameters, "
        f"the network loses {points(results, TUNED):.2f} points, and is {faster[1]:.2f} times as fast "
        f"at batch 1, {faster[256]:.2f} times at batch 256."
    ]
    for name, model in results["models"].items():
        if name.startswith("split"):
            lines.append(
                f"{name}: {model['bytes_sent']} B an example, {100 * model['device_flops']:.1f} % of "
                f"the FLOPs on the device, {points(results, name):.2f} points below the original."
            )
    return lines


def compare(dataset: data.Dataset, trained: Mapping[str, Trained]) -> list[str]:
    """The last lines: what the original and the compressed networks predict on test examples."""
    shown = ["original", TUNED, *[name for name in trained if name.startswith("split")][-1:]]
    lines = ["Test examples, predicted class and its probability:"]
    for i in range(5):
        parts = [f"true {dataset.class_names[dataset.test.label[i]]}"]
        for name in shown:
            p = np.asarray(jax.nn.softmax(trained[name].test_logits[i]))
            parts.append(f"{name}: {dataset.class_names[p.argmax()]} ({p.max():.3f})")
        lines.append("  " + "; ".join(parts))
    return lines


def draw(
    config: Config,
    out: Path,
    dataset: data.Dataset,
    trained: Sequence[Mapping[str, Trained]],
    facts: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
) -> dict[str, str]:
    """Draws the pictures: caption → file name."""
    wrong = {n: 100 * (1 - np.array(m["test"]["accuracy"])) for n, m in results["models"].items()}
    level = {"original": float(wrong["original"].mean())}
    drawn = {}
    tuned = {name: [seed[name].history for seed in trained] for name in ("original", TUNED)}
    pictures.learning_curves(out / "learning_curves.png", tuned, validation_size=len(dataset.validation.id))
    drawn["Training of the original, and fine-tuning of its factors"] = "learning_curves.png"
    if config.codes:
        names = sorted(
            (n for n in facts[0] if n.startswith("split")), key=lambda n: facts[0][n]["bytes_sent"]
        )
        pictures.code_widths(
            out / "bytes.png",
            [facts[0][name]["bytes_sent"] for name in names],
            {"split": [wrong[name] for name in names]},
            ylabel="test error, %",
            xlabel="bytes sent an example",
            levels=level,
        )
        drawn["Test error against the bytes that are sent"] = "bytes.png"
    if config.images:
        names = [n for n in facts[0] if n.startswith("autoencoder")]
        truth = prepare(dataset.test.image[:12])
        rows = {f"width {w}": facts[0][n]["images"].reshape(truth.shape)
                for w, n in zip(config.images, names, strict=True)}  # fmt: skip
        pictures.reconstructions(out / "reconstructions.png", {"test images": truth, **rows})
        drawn["Test images, and what the autoencoder's codes keep"] = "reconstructions.png"
    return drawn


def main() -> int:
    """Runs the experiment; returns the exit status."""
    config, dataset = parse(Config, __doc__, DEFAULTS, by="original", load=load)
    check(config, dataset)
    return linear(config) if dataset is None else network(config, dataset)


if __name__ == "__main__":
    runs.run_main(main)
