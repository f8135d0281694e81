"""Reads data that TensorFlow Datasets (TFDS) has prepared as ArrayRecord; TensorFlow is not needed."""

import contextlib
import difflib
import json
import logging
import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.data._cache import Arrays, cached
from distill_jax.data._errors import DataError, need, one_line
from distill_jax.data._idx import FILES, check_arrays

# The characters of EMNIST's classes; TFDS has their numbers only. Merged are those that are alike in both cases.
_MERGED = tuple(string.digits + string.ascii_uppercase + "abdefghnqrt")
_EMNIST = {
    "emnist/byclass": tuple(string.digits + string.ascii_letters.swapcase()),
    "emnist/bymerge": _MERGED,
    "emnist/balanced": _MERGED,
}
MISSING = "TensorFlow Datasets is not installed: pip install 'distill_jax[data]'"


class Prepared(NamedTuple):
    """One data set of images with a label each, prepared or not."""

    folder: Path  # where it is, or would be
    ready: bool
    class_names: tuple[str, ...]
    builder: Any


def installed() -> bool:
    """Whether TFDS can be imported."""
    try:
        import tensorflow_datasets  # noqa: F401
    except ImportError:
        return False
    return True


def look(name: str, data_dir: Path | None) -> Prepared:
    """Looks for a prepared data set of that name.

    Raises:
      DataError: if TFDS does not know the name, or the data set is not images with a label each.
    """
    import tensorflow_datasets as tfds

    # TFDS reads the variable when it is imported; here it also holds if it was set since
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    try:
        with _quiet():
            builder = tfds.builder(name, data_dir=folder)
            parts = dict(builder.info.features.items())
    except Exception as error:  # of many types, for an unknown name, a missing configuration, …
        known = ["auto", "digits", *tfds.list_builders(with_community_datasets=False)]
        close = " or ".join(difflib.get_close_matches(str(name), known) or known[:2])
        why = " ".join(str(error).split()).partition(" Available datasets:")[0][:400]
        raise DataError(f"no data set {name!r}; did you mean {close}? {why}") from error
    image, label = parts.get("image"), parts.get("label")
    need(
        isinstance(image, tfds.features.Image)
        and isinstance(label, tfds.features.ClassLabel)
        and image.np_dtype == np.uint8,
        f"{name} is not image classification",
        "a uint8 'image' and a 'label' that is a class",
        ", ".join(f"{key}: {type(part).__name__}" for key, part in sorted(parts.items())),
    )
    names = _EMNIST.get(builder.info.full_name.rpartition("/")[0], tuple(label.names))  # type: ignore[union-attr]
    return Prepared(Path(builder.data_path), bool(builder.info.splits), names, builder)


def read(name: str, prepared: Prepared, cache: Path) -> Arrays:
    """Decodes prepared data, or takes it from the cache as long as its files have not changed."""
    folder = prepared.folder
    stats = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir())
    what = f"{prepared.builder.info.full_name} {folder.resolve()}"
    turned = ["upright"] if prepared.builder.name == "emnist" else []  # earlier versions cached it transposed
    return cached(cache, what, json.dumps([*stats, *turned]), lambda: decode(name, prepared))


def decode(name: str, prepared: Prepared) -> Arrays:
    """Decodes the splits ``train`` and ``test``; EMNIST, which TFDS stores transposed, upright.

    Raises:
      DataError: if a split is missing, damaged or empty, or its images are not of one size.
    """
    arrays: Arrays = {}
    where = f"{name} in {prepared.folder}"
    splits = list(prepared.builder.info.splits)
    for split in ("train", "test"):
        need(split in splits, where, f"split {split}", splits)
        images: list[np.ndarray] = []
        labels: list[int] = []
        try:
            with _quiet():
                records = prepared.builder.as_data_source(split)
                # In batches, since one by one takes more than twice as long
                for i in range(0, len(records), 500):
                    for x in records.__getitems__(list(range(i, min(i + 500, len(records))))):
                        images.append(x["image"])
                        labels.append(x["label"])
                        same = images[-1].shape == images[0].shape
                        sizes = f"{images[0].shape} and {images[-1].shape}"
                        need(same, f"{where}, {split}", "images of one size", sizes)
        except DataError:
            raise
        except Exception as error:  # of many types, from TFDS, ArrayRecord or Pillow
            raise DataError(f"{where}: {split} cannot be read, {one_line(error)}") from error
        need(images, f"{where}, {split}", "images", "none")
        stacked = np.stack(images)
        if prepared.builder.name == "emnist":
            stacked = np.ascontiguousarray(stacked.swapaxes(1, 2))
        arrays |= {f"{split}_image": stacked, f"{split}_label": np.array(labels, np.int32)}
    check_arrays(arrays, len(prepared.class_names), dict.fromkeys(FILES, prepared.folder))
    return arrays


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the user what TFDS logs about OpenCV, which is not needed."""
    logger = logging.getLogger("absl")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        yield
    finally:
        logger.setLevel(level)
