"""Image and sound classification data as NumPy arrays, by the name of a data set or from a file.

Nothing here needs TensorFlow, and nothing needs scikit-learn or TensorFlow Datasets (TFDS) until data is
asked for that comes from them: ``pip install 'distill_jax[data]'`` installs both.
"""

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np

from distill_jax._checks import check_count
from distill_jax.data import _glyphs, _idx, _spoken, _tfds
from distill_jax.data._cache import Arrays, cached, folder_of
from distill_jax.data._errors import DataError
from distill_jax.data.arrays import load_npz
from distill_jax.data.splits import Dataset, make_dataset

Found = tuple[str, Arrays, tuple[str, ...]]  # source, arrays, names of the classes


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
    cache = folder_of(cache_dir)

    own, spoken = str(name).endswith(".npz"), name in ("spoken", "spoken/waveform")
    if data_dir is not None and (own or spoken or name == "digits"):
        where = "is a file" if own else "is synthesised" if spoken else "comes with scikit-learn"
        raise ValueError(
            f"data_dir must not be given for {str(name)!r}, which {where}; got {str(data_dir)!r}"
        )
    if own:
        return _centred(load_npz(_expand(name), validation=validation, seed=seed), size)

    name = str(name)
    if name == "glyphs":
        source, arrays = _glyphs.find(data_dir, cache, size or _glyphs.SIZE)
        return make_dataset(name, source, arrays, _glyphs.CHARACTERS, validation, seed)
    if spoken:
        source, arrays = _spoken.find(cache)
        draw = _spoken.floats if name != "spoken" else lambda x: _spoken.pictures(x, size or _spoken.SIZE)
        arrays |= {key: draw(arrays[key]) for key in ("train_image", "test_image", "people_image")}
        return make_dataset(name, source, arrays, _spoken.CHARACTERS, validation, seed)
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
    return _centred(make_dataset(wanted, source, arrays, class_names, validation, seed), size)


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


def _expand(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # a user without a home directory, as in some containers
        raise ValueError(f"{path}: {error}: give a path without ~") from None


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
