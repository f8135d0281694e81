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
from distill_jax.data.sound import mel_image

# The characters of EMNIST's classes; TFDS has their numbers only. Merged are those that are alike in both cases.
_MERGED = tuple(string.digits + string.ascii_uppercase + "abdefghnqrt")
_EMNIST = {
    "emnist/byclass": tuple(string.digits + string.ascii_letters.swapcase()),
    "emnist/bymerge": _MERGED,
    "emnist/balanced": _MERGED,
}
MISSING = "TensorFlow Datasets is not installed: pip install 'distill_jax[data]'"


class Prepared(NamedTuple):
    """One data set of images or sounds with a label each, prepared or not."""

    folder: Path  # where it is, or would be
    ready: bool
    class_names: tuple[str, ...]
    builder: Any
    rate: int | None = None  # samples per second, of sounds


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
      DataError: if TFDS does not know the name, or the data set is not images or sounds with a label each.
    """
    import tensorflow_datasets as tfds

    # TFDS reads the variable when it is imported; here it also holds if it was set since
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    try:
        with _quiet(), _without_tensorflow():
            builder = tfds.builder(name, data_dir=folder)
            parts = dict(builder.info.features.items())
    except Exception as error:  # of many types, for an unknown name, a missing configuration, …
        known = ["auto", "digits", *tfds.list_builders(with_community_datasets=False)]
        close = " or ".join(difflib.get_close_matches(str(name), known) or known[:2])
        why = " ".join(str(error).split()).partition(" Available datasets:")[0][:400]
        raise DataError(f"no data set {name!r}; did you mean {close}? {why}") from error
    image, sound, label = parts.get("image"), parts.get("audio"), parts.get("label")
    heard = isinstance(sound, tfds.features.Audio) and bool(sound.sample_rate) and len(sound.shape) == 1
    need(
        isinstance(label, tfds.features.ClassLabel)
        and (heard or (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8)),
        f"{name} is not image classification, nor of sounds",
        "a uint8 'image', or an 'audio' of one channel and a known rate, and a 'label' that is a class",
        ", ".join(f"{key}: {type(part).__name__}" for key, part in sorted(parts.items())),
    )
    names = _EMNIST.get(builder.info.full_name.rpartition("/")[0], tuple(label.names))  # type: ignore[union-attr]
    rate = int(sound.sample_rate) if heard else None  # type: ignore[union-attr]
    return Prepared(Path(builder.data_path), bool(builder.info.splits), names, builder, rate)


def read(name: str, prepared: Prepared, cache: Path, size: int) -> Arrays:
    """Decodes prepared data, or takes it from the cache as long as its files have not changed.

    Sounds are drawn ``size`` pixels high and wide.
    """
    folder = prepared.folder
    stats = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir())
    what = f"{prepared.builder.info.full_name} {folder.resolve()}"
    if prepared.rate:
        what += f" {size}"
    turned = ["upright"] if prepared.builder.name == "emnist" else []  # earlier versions cached it transposed
    return cached(cache, what, json.dumps([*stats, *turned]), lambda: decode(name, prepared, size))


def decode(name: str, prepared: Prepared, size: int) -> Arrays:
    """Decodes the splits ``train`` and ``test``; EMNIST, which TFDS stores transposed, upright.

    Sounds are drawn as log-mel spectrograms. Those of the split ``validation`` come last in the training data, and
    ``held_out`` marks them: its speakers are in no other split.

    Raises:
      DataError: if a split is missing, damaged or empty, its images are not of one size, or a sound is longer than
        a second.
    """
    arrays: Arrays = {}
    where = f"{name} in {prepared.folder}"
    splits = list(prepared.builder.info.splits)
    own = ["validation"] if prepared.rate and "validation" in splits else []
    for split in ("train", "test", *own):
        need(split in splits, where, f"split {split}", splits)
        images: list[np.ndarray] = []
        labels: list[int] = []
        try:
            with _quiet(), _without_tensorflow():
                records = prepared.builder.as_data_source(split)
                # In batches, since one by one takes more than twice as long
                for i in range(0, len(records), 500):
                    batch = records.__getitems__(list(range(i, min(i + 500, len(records)))))
                    labels += [x["label"] for x in batch]
                    if prepared.rate:
                        sounds = [x["audio"] for x in batch]
                        images += list(_spectrograms(sounds, prepared.rate, size, f"{where}, {split}"))
                        continue
                    for x in batch:
                        images.append(x["image"])
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
    if own:
        arrays["held_out"] = np.arange(len(arrays["train_label"]) + len(labels)) >= len(arrays["train_label"])
        for part in ("image", "label"):
            arrays[f"train_{part}"] = np.concatenate(
                [arrays[f"train_{part}"], arrays.pop(f"validation_{part}")]
            )
    check_arrays(arrays, len(prepared.class_names), dict.fromkeys(FILES, prepared.folder))
    return arrays


def _spectrograms(sounds: list[np.ndarray], rate: int, size: int, where: str) -> np.ndarray:
    """Draws 16-bit sounds of at most a second, centred in one: uint8 ``[n, size, size, 1]``."""
    padded = np.zeros((len(sounds), rate), np.float32)
    for row, samples in zip(padded, sounds, strict=True):
        need(len(samples) <= rate, where, f"sounds of at most a second, {rate} samples", len(samples))
        before = (rate - len(samples)) // 2
        row[before : before + len(samples)] = samples
    pictures = mel_image(padded / 32768, rate=rate, height=size, width=size)
    return np.round(255 * np.asarray(pictures)).astype(np.uint8)


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Keeps TFDS's feature of sounds from importing TensorFlow, which it needs for nothing that is done here."""
    from tensorflow_datasets.core.features import audio_feature

    decoder = audio_feature._EagerDecoder
    init = decoder.__init__
    try:
        decoder.__init__ = lambda self, file_format, np_dtype, shape: None
        yield
    finally:
        decoder.__init__ = init


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
