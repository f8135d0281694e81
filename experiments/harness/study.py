"""What a study of several models over several seeds found: results.json and its pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax import metrics
from distill_jax.data.datasets import Dataset
from distill_jax.train.loop import History
from harness import pictures, runs
from harness.options import Options


class Trained(NamedTuple):
    """A trained model, and what it says on validation and test images.

    Attributes:
      apply_fn: as in :class:`distill_jax.models.Model`.
      variables: ``(params, model_state)``.
      history: see :class:`distill_jax.train.Fit`.
      seconds: wall time of its training.
      validation_logits: float32 ``[validation examples, classes]``.
      test_logits: float32 ``[test examples, classes]``.
      opt_state: the optimizer's, after the last epoch; None of what was not trained.
    """

    apply_fn: Callable[..., Any]
    variables: tuple[Any, Any]
    history: History
    seconds: float
    validation_logits: np.ndarray
    test_logits: np.ndarray
    opt_state: Any = None


Study = Sequence[Mapping[str, Trained]]


def record(
    experiment: str,
    dataset: Dataset,
    models: Mapping[str, Any],
    *,
    config: Options,
    seconds: Mapping[str, Any],
    **further: Any,
) -> dict[str, Any]:
    """What results.json says of any experiment.

    Args:
      experiment: its name.
      dataset: of :func:`distill_jax.data.load`.
      models: name → what was found of it.
      config: the experiment's options.
      seconds: times, one or one a seed.
      **further: what else was found.
    """
    splits = {s: len(getattr(dataset, s).id) for s in ("train", "validation", "test")}
    return {
        "experiment": experiment,
        "dataset": {"name": dataset.name, "source": dataset.source, **splits},
        "config": config.recorded(),
        "command": runs.command(),
        "environment": runs.environment(),
        "seconds": dict(seconds),
        "models": dict(models),
        **further,
    }


def results(
    experiment: str,
    dataset: Dataset,
    trained: Study,
    *,
    config: Options,
    seconds: Mapping[str, float],
    prepare: Callable[[Any], Any],
    reference: str = "teacher",
) -> dict[str, Any]:
    """Evaluates every model on the test set: the contents of results.json.

    Args:
      experiment: its name.
      dataset: of :func:`distill_jax.data.load`.
      trained: for each seed its models by name; one is the reference, to which the others are held.
      config: the experiment's options.
      seconds: further times, beside those of the trainings.
      prepare: turns images uint8 ``[n, height, width, channels]`` into the models' input.
      reference: the name of that one.
    """
    test, validation = dataset.test, dataset.validation
    networks = [(first.apply_fn, *first.variables) for first in trained[0].values()]
    costs = metrics.costs(networks, prepare(test.image[:1])[0])
    models = {}
    for name, cost in zip(trained[0], costs, strict=True):
        figures = [
            metrics.evaluate(
                seed[name].test_logits, test.label, None if name == reference else seed[reference].test_logits
            )
            for seed in trained
        ]
        wrong = [metrics.errors(seed[name].validation_logits, validation.label) for seed in trained]
        models[name] = {
            **cost,
            "validation": {"errors": [float(values.sum()) for values in wrong]},
            "test": {figure: [f[figure] for f in figures] for figure in figures[0]},
        }
    times = {name: [seed[name].seconds for seed in trained] for name in trained[0]}
    return record(experiment, dataset, models, config=config, seconds=times | dict(seconds))


def draw(out: Path, dataset: Dataset, trained: Study, shown: Sequence[str]) -> dict[str, str]:
    """Draws the pictures of a report; those that show single models show the first seed's.

    Args:
      out: the directory.
      dataset: of :func:`distill_jax.data.load`.
      trained: as in :func:`results`.
      shown: names of the teacher and the students to show beside each other, the last one alone in
        the confusion matrix.

    Returns:
      title → file name.
    """
    first, test = trained[0], dataset.test
    # A model that was made from another by hand shares its history
    own = {id(model.history): name for name, model in list(first.items())[::-1]}.values()
    histories = {name: [seed[name].history for seed in trained] for name in first if name in own}
    pictures.learning_curves(
        out / "learning_curves.png", histories, validation_size=len(dataset.validation.id)
    )
    bins = {name: metrics.calibration_bins(first[name].test_logits, test.label) for name in shown}
    pictures.reliability(out / "reliability.png", bins)
    last = shown[-1]
    counts = metrics.confusion(first[last].test_logits, test.label)
    pictures.confusion(out / "confusion.png", counts, dataset.class_names, last)
    probabilities = {name: np.asarray(jax.nn.softmax(first[name].test_logits)) for name in shown}
    hesitant = np.argsort(probabilities[shown[0]].max(-1), kind="stable")[:12]
    pictures.gallery(
        out / "gallery.png",
        test.image[hesitant],
        test.label[hesitant],
        probabilities[shown[0]][hesitant],
        dataset.class_names,
        {name: probabilities[name][hesitant] for name in shown[1:]},
    )
    return {
        "Validation error and training loss against epoch; band: one standard deviation over "
        "seeds": "learning_curves.png",
        "Reliability on the test set, 15 bins of equal mass": "reliability.png",
        f"Confusion of the {last} student on the test set": "confusion.png",
        "The test images on which the teacher hesitates most, with its soft labels": "gallery.png",
    }
