"""Data sets of a user's own arrays, which are checked first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from distill_jax.data._errors import DataError, one_line
from distill_jax.data.splits import Dataset, make_dataset

_NPZ = ("x_train", "y_train", "x_test", "y_test")


def from_arrays(
    images: ArrayLike,
    labels: ArrayLike,
    test_images: ArrayLike,
    test_labels: ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    validation: int | None = None,
    seed: int = 0,
    name: str = "own",
) -> Dataset:
    """Makes a data set of your own arrays, after checking them.

    Args:
      images: training images ``[n, height, width]`` or ``[n, height, width, channels]``, uint8, or
        floats from 0 to 1 (kept as float32). Rows of features must be reshaped to images, for instance
        to ``[n, 1, features, 1]``.
      labels: integers ``[n]``, from 0 to the number of classes − 1.
      test_images: test images, in the same form.
      test_labels: integers ``[m]``, in the same form.
      class_names: the names of the classes; by default their numbers. The number of classes is the
        number of names; without names it is the highest label + 1.
      validation: number of training examples to take as validation data; by default a sixth of them, at
        most 5,000.
      seed: chooses which training examples these are.
      name: the data set's name, for reports.

    Returns:
      The data set. Ids are positions: training examples count from 0, test examples go on after them.

    Raises:
      DataError: if an array has a wrong shape, dtype or value; the message says which and what to do.

    >>> images, labels = np.zeros((60, 8, 8), np.uint8), np.arange(60) % 10
    >>> own = from_arrays(images, labels, images[:20], labels[:20])
    >>> own.train.image.shape, own.validation.image.shape, own.classes
    ((50, 8, 8, 1), (10, 8, 8, 1), 10)
    """
    return _checked(
        dict(zip(("images", "labels", "test_images", "test_labels"),
                 (images, labels, test_images, test_labels), strict=True)),
        class_names, validation, seed, name, "given as arrays",
    )  # fmt: skip


def load_npz(path: Path, *, validation: int | None, seed: int) -> Dataset:
    """Reads a user's own arrays from a file of ``numpy.savez``, and makes a data set of them."""
    if not path.is_file():
        raise DataError(f"no file {str(path)!r}: expected one of numpy.savez with {', '.join(_NPZ)}")
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # of a dozen types, from NumPy and zipfile
        raise DataError(
            f"{path}: expected a file of numpy.savez; it cannot be read, {one_line(error)}"
        ) from error
    missing = [key for key in _NPZ if key not in arrays]
    if missing:
        raise DataError(
            f"{path}: expected the arrays {', '.join(_NPZ)}, found {', '.join(sorted(arrays)) or 'none'}"
        )
    names = arrays.get("class_names")
    return _checked(
        {f"{path}: {key}": arrays[key] for key in _NPZ},
        None if names is None else [str(class_name) for class_name in names.ravel()],
        validation, seed, path.stem, f"arrays in {path}",
    )  # fmt: skip


def _checked(
    given: dict[str, Any],
    class_names: Sequence[str] | None,
    validation: int | None,
    seed: int,
    name: str,
    source: str,
) -> Dataset:
    """Makes a data set of four arrays, given by the names that messages use for them."""
    x, y, x_test, y_test = given
    images = {key: _images(key, given[key]) for key in (x, x_test)}
    labels = {key: _labels(key, given[key]) for key in (y, y_test)}
    for image, label in ((x, y), (x_test, y_test)):
        if len(images[image]) != len(labels[label]):
            raise DataError(
                f"{label} must have one entry per image, {len(images[image])}, got {len(labels[label])}"
            )
    if images[x].shape[1:] != images[x_test].shape[1:] or images[x].dtype != images[x_test].dtype:
        raise DataError(
            f"{x_test} must be like {x}, {images[x].dtype} {images[x].shape[1:]}, got "
            f"{images[x_test].dtype} {images[x_test].shape[1:]}"
        )
    if class_names is None:
        classes = 1 + int(max(values.max() for values in labels.values()))
        absent = np.setdiff1d(np.arange(classes), labels[y])
        if len(absent):
            raise DataError(
                f"{y} must hold every class from 0 to {classes - 1}, got no example of "
                f"{', '.join(map(str, absent[:5]))}: renumber the classes, or give class_names"
            )
        class_names = tuple(map(str, range(classes)))
    if isinstance(class_names, str) or len(set(class_names)) < len(class_names):
        raise DataError(f"class_names must be a list of different names, got {class_names!r}")
    classes = len(class_names)
    for key, values in labels.items():
        if values.max() >= classes:
            raise DataError(f"{key} must be from 0 to {classes - 1}, got {values.max()}")
    if classes < 2:
        raise DataError(f"{y} must hold at least two classes, got {classes}")
    arrays = {
        "train_image": images[x], "train_label": labels[y],
        "test_image": images[x_test], "test_label": labels[y_test],
    }  # fmt: skip
    return make_dataset(name, source, arrays, tuple(map(str, class_names)), validation, seed)


def _array(name: str, given: Any) -> np.ndarray:
    if isinstance(given, np.ma.MaskedArray):
        raise DataError(f"{name} must be no masked array: fill or select it first")
    try:
        return np.asarray(given)
    except ValueError:
        raise DataError(f"{name} must be an array, got rows of unequal length") from None


def _images(name: str, given: Any) -> np.ndarray:
    images = _array(name, given)
    if images.ndim not in (3, 4) or not images.size:
        raise DataError(
            f"{name} must be [n, height, width] or [n, height, width, channels] and not empty, got shape "
            f"{images.shape}"
        )
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise DataError(f"{name} must be uint8, or floats from 0 to 1, got {images.dtype}")
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise DataError(f"{name} must be finite, got {np.sum(~np.isfinite(images))} values that are not")
        if images.min() < 0 or images.max() > 1:
            raise DataError(
                f"{name} must be uint8, or floats from 0 to 1, got floats from {images.min():g} to "
                f"{images.max():g}: rescale them"
            )
    return images.reshape(*images.shape, *[1] * (4 - images.ndim))


def _labels(name: str, given: Any) -> np.ndarray:
    labels = _array(name, given)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        advice = {2: ": use ravel() for a column, argmax(-1) for one-hot rows"}.get(labels.ndim, "")
        raise DataError(f"{name} must be integers [n], got {labels.dtype} {labels.shape}{advice}")
    if labels.size and labels.min() < 0:
        raise DataError(f"{name} must count from 0, got {labels.min()}")
    if labels.size and labels.max() > np.iinfo(np.int32).max:
        raise DataError(f"{name} must be the numbers of classes, got {labels.max()}: renumber the classes")
    return labels.astype(np.int32)
