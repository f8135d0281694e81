"""Image classification data as NumPy arrays: :func:`load` by name or file, :func:`from_arrays` for your own.

Nothing here needs TensorFlow, and nothing needs scikit-learn or TensorFlow Datasets (TFDS) until data is
asked for that comes from them: ``pip install 'distill_jax[data]'`` installs both.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, is_integer
from distill_jax.data import _glyphs, _idx, _spoken, _tfds
from distill_jax.data._cache import Arrays, cached
from distill_jax.data._errors import DataError, one_line

_NPZ = ("x_train", "y_train", "x_test", "y_test")
Found = tuple[str, Arrays, tuple[str, ...]]  # source, arrays, names of the classes


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


def load(
    name: str | Path = "auto",
    *,
    data_dir: str | Path | None = None,
    validation: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    download: bool = True,
    size: int | None = None,
) -> Dataset:
    """Loads a data set of images with one label each.

    An example's id is its position in the source's training data or, for a test example, the number of
    training examples plus its position in the test data. So ids do not depend on ``validation`` and
    ``seed``. They do depend on the source: TFDS stores MNIST in another order than the IDX files.

    Args:
      name: which data set.

        - ``"digits"``: scikit-learn's 1,797 scans of 8×8 pixels, always at hand; a fixed 500 of them are
          the test data.
        - ``"mnist"``, ``"fashion_mnist"`` or ``"kmnist"``: from IDX files, from data that TFDS has
          prepared, or by download.
        - ``"glyphs"``: the characters 0-9, A-Z and a-z, rendered from the fonts in ``data_dir`` or of the
          system. Test and validation data are font families that are not in the training data. With few
          fonts it falls back on the three designs that matplotlib ships; ``source`` then says so.
        - ``"spoken"``: the characters 0-9 and A-Z, spoken by the voices of espeak-ng and flite; test and
          validation data are voices that are not in the training data, and ``people`` are recordings of real
          people, as far as their packages are installed. Each sound is resampled to 8 kHz, freed of silence at
          both ends, scaled to the peak 1, centred among zeros in 7,936 samples (0.992 s), and drawn by
          :func:`sound.mel_image`. ``"spoken/waveform"`` gives the 7,936 samples.
        - any other image classification of TFDS that has been prepared, such as ``"cifar10"`` or
          ``"emnist/byclass"``. (TFDS stores EMNIST's pictures transposed; here they are upright.)
        - any classification of sounds of at most a second of TFDS that has been prepared, such as
          ``"speech_commands"``, centred in one second and drawn by :func:`sound.mel_image`. Validation data is
          TFDS's own, where it has some.
        - ``"auto"``: MNIST where it can be had, else digits; ``source`` then says why.
        - a path that ends in ``.npz``: your own data, a file of ``numpy.savez`` with the arrays
          ``x_train``, ``y_train``, ``x_test``, ``y_test`` and optionally ``class_names``;
          :func:`from_arrays` says what they must look like.
      data_dir: the folder to read from: one with the IDX files (plain or ``.gz``; also in ``<name>`` or
        ``<name>/raw`` below it), one with data that TFDS has prepared, or one with fonts. If it is given and does not
        hold the data set, that is an error: nothing is downloaded or taken from elsewhere. By default
        ``TFDS_DATA_DIR`` or TFDS's own folder, then a download.
      validation: number of training examples to take as validation data; by default a sixth of them, at
        most 5,000. Of glyphs and voices, whole groups are taken until there are so many. It cannot be given
        where the source has validation data of its own.
      seed: chooses which training examples these are.
      cache_dir: where decoded, rendered and downloaded data is kept; by default ``distill_jax`` in
        ``XDG_CACHE_HOME`` or ``~/.cache``.
      download: whether MNIST, Fashion-MNIST and KMNIST may be downloaded.
      size: height and width of the images. Glyphs and spectrograms are drawn in that size, by default 32; other
        images are centred in that size and surrounded by 0, by default they are kept as they are.

    Returns:
      The data set; the examples of each split are in the order of their ids.

    Raises:
      ValueError: for an argument that is not valid, and as :class:`DataError` for data that was not found
        or is damaged.
      ModuleNotFoundError: if the package that holds the data is not installed; the message names it.

    >>> digits = load("digits")
    >>> digits.train.image.shape, digits.validation.image.shape, digits.test.image.shape
    ((1081, 8, 8, 1), (216, 8, 8, 1), (500, 8, 8, 1))
    """
    if size is not None:
        check_count("size", size, least=8)
        if name == "spoken/waveform":
            raise ValueError(
                f"size must not be given for 'spoken/waveform', which are no pictures; got {size}"
            )
    if data_dir is not None:
        data_dir = _expand(data_dir)
        if not data_dir.is_dir():
            raise ValueError(f"data_dir must be an existing folder, got {str(data_dir)!r}")
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "distill_jax"
    cache = Path(cache_dir)

    own, spoken = str(name).endswith(".npz"), name in ("spoken", "spoken/waveform")
    if data_dir is not None and (own or spoken or name == "digits"):
        where = "is a file" if own else "is synthesised" if spoken else "comes with scikit-learn"
        raise ValueError(
            f"data_dir must not be given for {str(name)!r}, which {where}; got {str(data_dir)!r}"
        )
    if own:
        return _centred(_load_npz(_expand(name), validation=validation, seed=seed), size)

    name = str(name)
    if name == "glyphs":
        source, arrays = _glyphs.find(data_dir, cache, size or _glyphs.SIZE)
        return _split(name, source, arrays, _glyphs.CHARACTERS, validation, seed)
    if spoken:
        source, arrays = _spoken.find(cache)
        draw = _spoken.floats if name != "spoken" else lambda x: _spoken.pictures(x, size or _spoken.SIZE)
        arrays |= {key: draw(arrays[key]) for key in ("train_image", "test_image", "people_image")}
        return _split(name, source, arrays, _spoken.CHARACTERS, validation, seed)
    tried: list[str] = []
    wanted = "mnist" if name == "auto" else name
    found = (
        None if name == "digits" else _find(wanted, data_dir, cache, download, tried, size or _spoken.SIZE)
    )
    if found is None and (data_dir is not None or name not in ("auto", "digits")):
        raise DataError(f"{wanted} was not found: {'; '.join(tried)}. {_advice(wanted)}")
    if found is None:
        found, wanted = _digits(), "digits"
        tried = ["MNIST was not found: " + "; ".join(tried)] if tried else []
    source, arrays, class_names = found
    source += f" ({'; '.join(tried)})" if tried else ""
    return _centred(_split(wanted, source, arrays, class_names, validation, seed), size)


def _centred(dataset: Dataset, size: int | None) -> Dataset:
    """Surrounds the images by 0, so that they have ``size`` rows and columns."""
    height, width, _ = dataset.image_shape
    if size is None or height == width == size:
        return dataset
    if max(height, width) > size:
        raise ValueError(
            f"size must be at least that of {dataset.name}'s images, {height}×{width}, got {size}"
        )
    above, before = (size - height) // 2, (size - width) // 2
    pad = ((0, 0), (above, size - height - above), (before, size - width - before), (0, 0))
    splits = {part: getattr(dataset, part) for part in ("train", "validation", "test")}
    return dataset._replace(
        **{part: split._replace(image=np.pad(split.image, pad)) for part, split in splits.items()}
    )


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


def _expand(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # a user without a home directory, as in some containers
        raise ValueError(f"{path}: {error}: give a path without ~") from None


def _load_npz(path: Path, *, validation: int | None, seed: int) -> Dataset:
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
    return _split(name, source, arrays, tuple(map(str, class_names)), validation, seed)


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


def _split(
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


def _digits() -> Found:
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "the data set digits comes with scikit-learn: pip install 'distill_jax[data]'"
        )
    # Read as load_digits reads it, without the second or more that importing scikit-learn takes
    file = Path(found.origin).with_name("datasets") / "data" / "digits.csv.gz"
    table = np.loadtxt(file, np.uint8, delimiter=",")
    image = np.round(table[:, :64].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    label = table[:, 64].astype(np.int32)
    order = np.random.RandomState(0).permutation(len(label))
    arrays: Arrays = {}
    for split, ids in ("train", np.sort(order[500:])), ("test", np.sort(order[:500])):
        arrays |= {f"{split}_image": image[ids], f"{split}_label": label[ids]}
    return "scikit-learn's embedded digits", arrays, tuple("0123456789")


def _find(
    name: str, data_dir: Path | None, cache: Path, download: bool, tried: list[str], size: int
) -> Found | None:
    """Looks in every place for ``name``, noting in ``tried`` where it is not; damage is an error."""
    family = _idx.FAMILY.get(name)
    if family and data_dir is not None and (found := _idx.find(name, data_dir)):
        return f"IDX files in {found[0]}", found[1], family.class_names
    if _tfds.installed():
        prepared = _tfds.look(name, data_dir)
        if prepared.ready:
            arrays = _tfds.read(name, prepared, cache, size)
            return f"prepared by TensorFlow Datasets in {prepared.folder}", arrays, prepared.class_names
        missing = f"not prepared by TensorFlow Datasets in {prepared.folder}"
    elif family:
        missing = _tfds.MISSING
    else:
        raise ModuleNotFoundError(f"{name!r} would be read with TensorFlow Datasets. {_tfds.MISSING}")
    if family and data_dir is not None:
        tried.append(f"no IDX files ({_idx.FILES['train_image']}.gz and three more) in {data_dir}")
    tried.append(missing)
    if family is None or data_dir is not None:
        return None
    try:
        fetch = functools.partial(_fetch, name, download)
        arrays = cached(cache, f"{name} {family.url}", json.dumps(family.sha256), fetch)
    except DataError as error:
        tried.append(str(error))
        return None
    return f"downloaded from {family.url}", arrays, family.class_names


def _fetch(name: str, download: bool) -> Arrays:
    if not download:
        raise DataError("not downloaded, as download=False")
    return _idx.download(name)


def _advice(name: str) -> str:
    """Says how a data set that was not found can be had."""
    prepare = (
        f"tfds.builder({name!r}, file_format='array_record', data_dir=...).download_and_prepare() where "
        "TensorFlow is installed, and pass data_dir"
    )
    if name not in _idx.FAMILY:
        return f"To have it, run {prepare}"
    files = ", ".join(f"{file}.gz" for file in _idx.FILES.values())
    return f"To have it, put {files} from {_idx.FAMILY[name].url} into a folder and pass it as data_dir; or {prepare}"
