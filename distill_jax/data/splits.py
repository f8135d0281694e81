"""What a data set is, and how validation data are taken out of it."""

from typing import NamedTuple

import numpy as np

from distill_jax._checks import check_count, is_integer
from distill_jax.data._cache import Arrays


class Split(NamedTuple):
    """Examples of one split.

    Attributes:
      id: int64 ``[n]``, unique over the splits of a data set.
      image: ``[n, height, width, channels]``, uint8, or float32 from 0 to 1. Of sound as waveforms: float32
        ``[n, samples]``, from −1 to 1.
      label: int32 ``[n]``, from 0 to the number of classes − 1.
    """

    id: np.ndarray
    image: np.ndarray
    label: np.ndarray


class Origins(NamedTuple):
    """Where the examples of a data set come from: faces of fonts or voices, of which each gave many examples.

    ``origins.of[split.id]`` are the origins of a split's examples, ``origins.group[origins.of[split.id]]``
    their groups. No group is in two splits.

    Attributes:
      of: int32 ``[examples]``, by example id: the number of the example's origin.
      names: the names of the origins.
      group: int32 ``[origins]``: the number of each origin's group.
      group_names: the names of the groups.
      dropped: one line for each origin or example that was left out: its name, and why.
    """

    of: np.ndarray
    names: tuple[str, ...]
    group: np.ndarray
    group_names: tuple[str, ...]
    dropped: tuple[str, ...]


class Dataset(NamedTuple):
    """A data set in three splits.

    Attributes:
      name: the data set's name.
      source: one line that says where the data came from.
      train: the training data.
      validation: data for choosing, taken from the source's training data.
      test: the test data.
      classes: number of classes.
      class_names: the names of the classes.
      origins: where the examples come from; None where that is not known.
      people: more test data, recordings of people, where the other splits are synthetic; else None.
    """

    name: str
    source: str
    train: Split
    validation: Split
    test: Split
    classes: int
    class_names: tuple[str, ...]
    origins: Origins | None = None
    people: Split | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and number of channels of an image."""
        return self.train.image.shape[1:]


def make_dataset(
    name: str, source: str, arrays: Arrays, class_names: tuple[str, ...], validation: int | None, seed: int
) -> Dataset:
    """Takes validation data out of the training data, and gives every example its id."""
    n, m = len(arrays["train_label"]), len(arrays["test_label"])
    train = Split(np.arange(n), arrays["train_image"], arrays["train_label"])
    k = min(5_000, max(1, n // 6)) if validation is None else validation
    check_count("seed", seed, least=0)
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {seed}")
    if not (is_integer(k) and 0 < k < n):
        raise ValueError(f"validation must be from 1 to {n - 1} of the {n} train examples, got {k}")
    # NumPy promises the stream of its legacy generator for ever: ids must not move between splits
    random, origins, people = np.random.RandomState(seed), None, None
    if "origin" in arrays:
        names = {key: tuple(map(str, arrays[key])) for key in ("origins", "groups", "dropped")}
        origins = Origins(
            arrays["origin"], names["origins"], arrays["group"], names["groups"], names["dropped"]
        )
        group = origins.group[origins.of[:n]]
        numbers, sizes = np.unique(group, return_counts=True)
        turn = random.permutation(len(numbers))
        last = min(int(np.searchsorted(np.cumsum(sizes[turn]), k)), len(turn) - 2)
        held_out = np.isin(group, numbers[turn[: last + 1]])
    elif "held_out" in arrays:
        if validation is not None:
            raise ValueError(
                f"validation must not be given for {name!r}, which has its own; got {validation}"
            )
        held_out = arrays["held_out"]
    else:
        held_out = np.zeros(n, bool)
        held_out[random.permutation(n)[:k]] = True
    if len(arrays.get("people_label", ())):
        ids = np.arange(n + m, n + m + len(arrays["people_label"]))
        people = Split(ids, arrays["people_image"], arrays["people_label"])
    return Dataset(
        name=name,
        source=source,
        train=Split(*(field[~held_out] for field in train)),
        validation=Split(*(field[held_out] for field in train)),
        test=Split(np.arange(n, n + m), arrays["test_image"], arrays["test_label"]),
        classes=len(class_names),
        class_names=class_names,
        origins=origins,
        people=people,
    )
