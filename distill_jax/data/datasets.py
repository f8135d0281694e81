"""Image classification as NumPy arrays: :func:`load`, from a name to three splits.

Nothing here needs TensorFlow: data that TensorFlow Datasets (TFDS) has prepared as ArrayRecord is
decoded with Pillow, the IDX files of the MNIST family with NumPy, and TFDS's own download manager
fetches the latter and checks their sums.
"""

import contextlib
import difflib
import functools
import gzip
import hashlib
import json
import logging
import math
import numbers
import os
import tempfile
import threading
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

# The sets distributed as IDX files, and their folders: TFDS's name, the distributor's, torchvision's
_FOLDERS = {
    "mnist": ("mnist", "MNIST"),
    "fashion_mnist": ("fashion_mnist", "fashion-mnist", "FashionMNIST"),
    "kmnist": ("kmnist", "KMNIST"),
}
_FILES = {
    "train_image": "train-images-idx3-ubyte",
    "train_label": "train-labels-idx1-ubyte",
    "test_image": "t10k-images-idx3-ubyte",
    "test_label": "t10k-labels-idx1-ubyte",
}
# All use the same file names, so that only the content tells one from another: the first labels
_FIRST_LABELS = {"mnist": "5041921314", "fashion_mnist": "9003027255"}
_DEBIAN = Path("/usr/share/datasets")  # the files of Debian's package dataset-fashion-mnist
_REACH_SECONDS = 5.0  # for a server to answer at all
_STALL_SECONDS = 20.0  # for a download to go on

Arrays = dict[str, np.ndarray]  # the keys of _FILES
Found = tuple[str, Arrays, tuple[str, ...]]  # source, arrays, names of the classes


class DataError(ValueError):
    """Data that was not found, or is damaged; the message is one line for the user."""


class Split(NamedTuple):
    """Examples: ``id`` int64 ``[n]``, ``image`` uint8 ``[n, h, w, c]``, ``label`` int32 ``[n]``."""

    id: np.ndarray
    image: np.ndarray
    label: np.ndarray


class Dataset(NamedTuple):
    """Three splits, and in ``source`` one line on where they came from and why from there."""

    name: str
    source: str
    train: Split
    validation: Split
    test: Split
    classes: int
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and number of channels of an image."""
        return self.train.image.shape[1:]


def load(
    name: str = "auto",
    *,
    data_dir: str | Path | None = None,
    validation: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    download: bool = True,
) -> Dataset:
    """Loads a data set of images with one label each.

    An example's id is its position in the source's train data, or, for a test example, the count of
    train data plus its position in the test data: unique over the splits, whatever ``validation``
    and ``seed`` are. Ids belong to a source: TFDS stores MNIST in another order than the IDX files.

    Args:
      name: ``"digits"``, scikit-learn's 1,797 scans of 8×8, always there, of which a fixed 500 are
        the test data; ``"mnist"``, ``"fashion_mnist"`` or ``"kmnist"``, from IDX files, prepared
        TFDS data or a download; any other TFDS image classification that was prepared, such as
        ``"cifar10"`` or ``"emnist/byclass"``; or ``"auto"``, MNIST where it can be had, else digits.
      data_dir: folder of the IDX files (plain or ``.gz``; also ``<name>`` or ``<name>/raw`` in it)
        or of prepared TFDS data; by default ``TFDS_DATA_DIR`` or TFDS's own.
      validation: how many train examples become validation data; by default a sixth, at most 5,000.
      seed: of the permutation whose first ``validation`` train examples are the validation data.
      cache_dir: where decoded and downloaded data is kept; by default ``distill_jax`` in
        ``XDG_CACHE_HOME`` or ``~/.cache``.
      download: whether to download one of the MNIST family that is not on this machine.

    Returns:
      The data set; the examples of each split are in the order of their ids.

    Raises:
      ValueError: for a bad argument, and as :class:`DataError` for data not found or damaged.

    >>> digits = load("digits")
    >>> digits.train.image.shape, digits.validation.image.shape, digits.test.image.shape
    ((1081, 8, 8, 1), (216, 8, 8, 1), (500, 8, 8, 1))
    """
    if data_dir is not None:
        data_dir = Path(data_dir).expanduser()
        if not data_dir.is_dir():
            raise ValueError(f"data_dir must be an existing folder, got {str(data_dir)!r}")
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "distill_jax"
    cache = Path(cache_dir).expanduser()

    tried: list[str] = []
    wanted = "mnist" if name == "auto" else name
    found = None if name == "digits" else _find(wanted, data_dir, cache, download, tried)
    if found is None and name not in ("auto", "digits"):
        idx = "put its four IDX files into data_dir, or " if name in _FOLDERS else ""
        raise DataError(
            f"{name} was not found: {'; '.join(tried)}. To have it, {idx}prepare it once where "
            f"TensorFlow is installed: tfds.builder({name!r}, file_format='array_record', "
            "data_dir=...).download_and_prepare()"
        )
    if found is None:
        found, wanted = _digits(), "digits"
        tried = ["MNIST was not found: " + "; ".join(tried)] if tried else []
    source, arrays, class_names = found

    n, m = len(arrays["train_label"]), len(arrays["test_label"])
    train = Split(np.arange(n), arrays["train_image"], arrays["train_label"])
    k = min(5_000, max(1, n // 6)) if validation is None else validation
    if not (isinstance(k, numbers.Integral) and 0 < k < n):
        raise ValueError(f"validation must be from 1 to {n - 1} of the {n} train examples, got {k}")
    # NumPy promises the stream of its legacy generator for ever: ids must not move between splits
    order = np.random.RandomState(seed).permutation(n)
    return Dataset(
        name=wanted,
        source=source + (f" ({'; '.join(tried)})" if tried else ""),
        train=Split(*(field[np.sort(order[k:])] for field in train)),
        validation=Split(*(field[np.sort(order[:k])] for field in train)),
        test=Split(np.arange(n, n + m), arrays["test_image"], arrays["test_label"]),
        classes=len(class_names),
        class_names=class_names,
    )


def _digits() -> Found:
    from sklearn.datasets import load_digits

    scans = load_digits()
    image = np.round(scans.images[..., None] * (255 / 16)).astype(np.uint8)
    label = scans.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(label))
    arrays: Arrays = {}
    for split, ids in ("train", np.sort(order[500:])), ("test", np.sort(order[:500])):
        arrays |= {f"{split}_image": image[ids], f"{split}_label": label[ids]}
    return "scikit-learn's embedded digits", arrays, tuple("0123456789")


def _find(name: str, data_dir: Path | None, cache: Path, download: bool, tried: list[str]) -> Found | None:
    """Looks in every place for ``name``, noting in ``tried`` where it is not; damage is an error."""
    builder, names = _builder(name, data_dir)
    version = builder.info.full_name
    idx = name in _FOLDERS
    if idx and data_dir is not None and (found := _find_idx(name, data_dir, names, tried)):
        return found
    if builder.info.splits:
        folder = Path(builder.data_path)
        stats = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir())
        decode = functools.partial(_decode, name, builder, len(names))
        arrays = _cached(cache, f"{version} {folder.resolve()}", json.dumps(stats), decode)
        return f"prepared by TensorFlow Datasets in {folder}", arrays, names
    tried.append(f"not prepared by TensorFlow Datasets in {builder.data_path}")
    if not idx:
        return None
    if _DEBIAN.is_dir() and (found := _find_idx(name, _DEBIAN, names, tried)):
        return found

    infos = {k: (u, i) for k, f in _FILES.items() for u, i in builder.url_infos.items() if f in u}
    host = urllib.parse.urlsplit(infos["train_image"][0]).hostname
    sums = json.dumps([info.checksum for _, info in infos.values()])
    fetch = functools.partial(_fetch, name, infos, len(names), download)
    try:
        return f"downloaded from {host}", _cached(cache, f"{version} {host}", sums, fetch), names
    except DataError as error:
        tried.append(str(error))
        return None


def _need(ok: Any, where: Any, expected: str, found: Any) -> None:
    if not ok:
        raise DataError(f"{where}: {expected} expected, found {found}")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _find_idx(name: str, root: Path, names: tuple[str, ...], tried: list[str]) -> Found | None:
    """Reads the four files from the first folder, at or under ``root``, that has any of them."""
    for folder in (*(root / f for f in _FOLDERS[name]), root):
        for place in (folder / "raw", folder):
            files = {
                key: path
                for key, file in _FILES.items()
                for spelling in (file, file.replace("-idx", ".idx"))
                for path in (place / spelling, place / f"{spelling}.gz")
                if path.is_file()
            }
            missing = [file for key, file in _FILES.items() if key not in files]
            if files:
                _need(not missing, place, f"all of {name}'s IDX files", f"no {', '.join(missing)}")
                return f"IDX files in {place}", _read_idx_files(name, files, len(names)), names
    tried.append(f"no IDX files in {root}")
    return None


def _read_idx(path: Path, kind: str) -> np.ndarray:
    """Reads one file of the MNIST format: bytes 0, 0, 8 and the number of axes, sizes, data."""
    axes = {"image": 3, "label": 1}[kind]
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, {_line(error)}") from error
    magic, start = bytes([0, 0, 8, axes]), 4 + 4 * axes
    _need(data[:4] == magic, path, f"IDX {kind}s, starting {magic.hex()},", f"{data[:4].hex()!r}")
    _need(len(data) >= start, path, f"{start} bytes of header", f"{len(data)} bytes (truncated)")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", axes, 4))
    size, rest = math.prod(shape), len(data) - start
    _need(size > 0, path, f"{kind}s", f"none, shape {shape}")
    what = "truncated" if rest < size else "trailing bytes"
    _need(rest == size, path, f"{size} bytes for {kind}s of shape {shape}", f"{rest} ({what})")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # writable


def _read_idx_files(name: str, files: dict[str, Path], classes: int) -> Arrays:
    arrays = {key: _read_idx(path, key.split("_")[1]) for key, path in files.items()}
    count = {key: len(array) for key, array in arrays.items()}
    for split in ("train", "test"):
        images, labels = count[f"{split}_image"], count[f"{split}_label"]
        _need(images == labels, files[f"{split}_label"], f"{images} labels, one an image,", labels)
    _need(
        count["train_image"] > count["test_image"],
        files["train_image"],
        f"more than {files['test_image'].name}'s {count['test_image']} images",
        f"{count['train_image']} (are train and test swapped?)",
    )
    _check(arrays, classes, files)
    first = "".join(str(label) for label in arrays["train_label"][:10])
    for other in _FIRST_LABELS.keys() - {name}:
        _need(first != _FIRST_LABELS[other], files["train_label"], f"{name}'s labels", f"{other}'s")
    for key, array in arrays.items():
        arrays[key] = array[..., None] if key.endswith("image") else array.astype(np.int32)
    return arrays


def _check(arrays: Arrays, classes: int, where: dict[str, Path]) -> None:
    for key in ("train_label", "test_label"):
        low, high = arrays[key].min(), arrays[key].max()
        good = low >= 0 and high < classes
        _need(good, where[key], f"labels from 0 to {classes - 1}", f"{low} to {high}")
    train, test = (arrays[key].shape[1:] for key in ("train_image", "test_image"))
    _need(train == test, where["test_image"], f"test images like train's, {train},", test)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the user what TFDS logs about OpenCV and about every try of a download."""
    loggers = [logging.getLogger(name) for name in ("absl", "urllib3.connectionpool")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _builder(name: str, data_dir: Path | None) -> tuple[Any, tuple[str, ...]]:
    """Returns TFDS's builder and the classes' names, if it is one of 8-bit images with a label."""
    import tensorflow_datasets as tfds

    # TFDS reads the variable when it is imported; here it holds also if it was set since
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
    _need(
        isinstance(image, tfds.features.Image)
        and isinstance(label, tfds.features.ClassLabel)
        and image.np_dtype == np.uint8,
        f"{name} is not image classification",
        "a uint8 'image' and a 'label' that is a class",
        ", ".join(f"{key}: {type(part).__name__}" for key, part in sorted(parts.items())),
    )
    return builder, tuple(label.names)  # type: ignore[union-attr]


def _decode(name: str, builder: Any, classes: int) -> Arrays:
    """Decodes the splits ``train`` and ``test`` of prepared data."""
    arrays: Arrays = {}
    where = f"{name} in {builder.data_path}"
    for split in ("train", "test"):
        _need(split in builder.info.splits, where, f"split {split}", list(builder.info.splits))
        images: list[np.ndarray] = []
        labels: list[int] = []
        try:
            with _quiet():
                records = builder.as_data_source(split)
                # In batches, since one by one takes more than twice as long
                starts = range(0, len(records), 500)
                for i in tqdm(starts, f"decoding {name} {split}", unit=" batches", disable=None):
                    for x in records.__getitems__(list(range(i, min(i + 500, len(records))))):
                        images.append(x["image"])
                        labels.append(x["label"])
                        same = images[-1].shape == images[0].shape
                        sizes = f"{images[0].shape} and {images[-1].shape}"
                        _need(same, f"{where}, {split}", "images of one size", sizes)
        except DataError:
            raise
        except Exception as error:  # of many types, from TFDS, ArrayRecord or Pillow
            raise DataError(f"{where}: {split} cannot be read, {_line(error)}") from error
        _need(images, f"{where}, {split}", "images", "none")
        arrays |= {f"{split}_image": np.stack(images), f"{split}_label": np.array(labels, np.int32)}
    _check(arrays, classes, dict.fromkeys(_FILES, builder.data_path))
    return arrays


def _reach(url: str) -> None:
    """Raises unless a server answers in seconds; in a thread, as looking up a name can take longer."""
    import requests

    host, failure = urllib.parse.urlsplit(url).hostname, ["no answer"]

    def ask() -> None:
        try:
            requests.head(url, timeout=_REACH_SECONDS).close()
            failure.clear()
        except Exception as error:
            failure[:] = [type(error).__name__]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_REACH_SECONDS)
    if failure:
        raise DataError(f"not downloaded, as {host} cannot be reached: {failure[0]}")


def _fetch(name: str, infos: dict[str, tuple[str, Any]], classes: int, download: bool) -> Arrays:
    """Downloads IDX files into a folder that is gone afterwards: only checked arrays are kept."""
    if not download:
        raise DataError("not downloaded, as download=False")
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    _reach(infos["train_image"][0])
    opener, retries = downloader._open_url, downloader.MAX_RETRIES
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _quiet():
        try:
            # TFDS sets no timeout, but hands on keywords to requests, and retries for minutes
            downloader._open_url = functools.partial(opener, timeout=_STALL_SECONDS)
            downloader.MAX_RETRIES = 2
            manager = tfds.download.DownloadManager(
                download_dir=folder,
                url_infos=dict(infos.values()),
                dataset_name=name,
                force_checksums_validation=True,
            )
            paths = manager.download({key: url for key, (url, _) in infos.items()})
        except Exception as error:
            raise DataError(f"not downloaded: {_line(error)}") from error
        finally:
            downloader._open_url, downloader.MAX_RETRIES = opener, retries
        return _read_idx_files(name, {key: Path(path) for key, path in paths.items()}, classes)


def _digest(key: str, arrays: Arrays) -> str:
    digest = hashlib.sha256(key.encode())
    for name in _FILES:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _cached(folder: Path, what: str, key: str, build: Callable[[], Arrays]) -> Arrays:
    """Returns what ``build`` makes, from a file if its digest fits ``key`` and its arrays."""
    stem = f"{what.split('/')[0]}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    path, partial = folder / f"{stem}.npz", folder / f"{stem}.{os.getpid()}.tmp"
    # Of a damaged file NumPy and zipfile raise errors of a dozen types; each means: build anew
    with contextlib.suppress(Exception), path.open("rb") as opened, np.load(opened) as saved:
        arrays = {name: saved[name] for name in _FILES}
        if str(saved["digest"]) == _digest(key, arrays):
            return arrays
    arrays = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, digest=_digest(key, arrays), **arrays)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"decoded data is not kept in {folder}: {_line(error)}", stacklevel=4)
    return arrays
