"""Reads and downloads the IDX files of MNIST, Fashion-MNIST and KMNIST."""

import gzip
import hashlib
import http.client
import math
import urllib.parse
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.data._cache import Arrays
from distill_jax.data._errors import DataError, need, one_line

FILES = {
    "train_image": "train-images-idx3-ubyte",
    "train_label": "train-labels-idx1-ubyte",
    "test_image": "t10k-images-idx3-ubyte",
    "test_label": "t10k-labels-idx1-ubyte",
}
TIMEOUT = 20.0  # seconds without an answer, or without progress


class Family(NamedTuple):
    """One data set that is distributed as four IDX files."""

    folders: tuple[str, ...]  # the names that its folder usually has
    class_names: tuple[str, ...]
    url: str
    sha256: dict[str, str]  # of the files compressed by gzip


FAMILY = {
    "mnist": Family(
        ("mnist", "MNIST"),
        tuple("0123456789"),
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        {
            "train_image": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train_label": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "test_image": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "test_label": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion_mnist": Family(
        ("fashion_mnist", "fashion-mnist", "FashionMNIST"),
        (
            "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
        ),
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train_image": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train_label": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "test_image": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "test_label": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "kmnist": Family(
        ("kmnist", "KMNIST"),
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        {
            "train_image": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "train_label": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "test_image": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "test_label": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        },
    ),
}  # fmt: skip


def find(name: str, root: Path) -> tuple[Path, Arrays] | None:
    """Reads the four files from the first folder, at or under ``root``, that has any of them.

    Looks in ``root/<name>/raw``, ``root/<name>``, ``root/raw`` and ``root``, for plain and for ``.gz``
    files.

    Raises:
      DataError: if some of the four files are missing, damaged, or do not belong together.
    """
    for folder in (*(root / f for f in FAMILY[name].folders), root):
        for place in (folder / "raw", folder):
            files = {
                key: path
                for key, file in FILES.items()
                for spelling in (file, file.replace("-idx", ".idx"))
                for path in (place / spelling, place / f"{spelling}.gz")
                if path.is_file()
            }
            missing = [file for key, file in FILES.items() if key not in files]
            if files:
                need(not missing, place, f"all four of {name}'s IDX files", f"no {', '.join(missing)}")
                contents = {key: _read(path) for key, path in files.items()}
                return place, _decode_all(files, contents, len(FAMILY[name].class_names))
    return None


def download(name: str) -> Arrays:
    """Downloads the four files, checks their sums, and decodes them; nothing is written.

    Raises:
      DataError: if a file cannot be had, or its SHA-256 sum is wrong.
    """
    family = FAMILY[name]
    files, contents = {key: Path(f"{file}.gz") for key, file in FILES.items()}, {}
    for key, path in files.items():
        url = family.url + path.name
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                contents[key] = answer.read()
        except (OSError, http.client.HTTPException) as error:
            host = urllib.parse.urlsplit(url).hostname
            raise DataError(f"not downloaded from {host}: {one_line(error)}") from error
        found = hashlib.sha256(contents[key]).hexdigest()
        need(found == family.sha256[key], url, f"SHA-256 {family.sha256[key]}", found)
    return _decode_all(files, contents, len(family.class_names))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {one_line(error)}") from error


def _decode(path: Path, data: bytes, kind: str) -> np.ndarray:
    """Decodes the IDX format: bytes 0, 0, 8 and the number of axes, then sizes, then data; ``path`` names it."""
    axes = {"image": 3, "label": 1}[kind]
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, {one_line(error)}") from error
    magic, start = bytes([0, 0, 8, axes]), 4 + 4 * axes
    need(data[:4] == magic, path, f"IDX {kind}s, which start with {magic.hex()}", repr(data[:4].hex()))
    need(len(data) >= start, path, f"{start} bytes of header", f"{len(data)} bytes (truncated)")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", axes, 4))
    size, rest = math.prod(shape), len(data) - start
    need(size > 0, path, f"{kind}s", f"none, shape {shape}")
    what = "truncated" if rest < size else "trailing bytes"
    need(rest == size, path, f"{size} bytes for {kind}s of shape {shape}", f"{rest} ({what})")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # writable


def _decode_all(files: dict[str, Path], contents: dict[str, bytes], classes: int) -> Arrays:
    arrays = {key: _decode(path, contents[key], key.split("_")[1]) for key, path in files.items()}
    count = {key: len(array) for key, array in arrays.items()}
    for split in ("train", "test"):
        images, labels = count[f"{split}_image"], count[f"{split}_label"]
        need(images == labels, files[f"{split}_label"], f"{images} labels, one per image", labels)
    need(
        count["train_image"] > count["test_image"],
        files["train_image"],
        f"more than {files['test_image'].name}'s {count['test_image']} images",
        f"{count['train_image']} (are train and test swapped?)",
    )
    for key, array in arrays.items():
        arrays[key] = array[..., None] if key.endswith("image") else array.astype(np.int32)
    check_arrays(arrays, classes, files)
    return arrays


def check_arrays(arrays: Arrays, classes: int, where: dict[str, Path]) -> None:
    """Checks that labels are 0 to ``classes`` − 1 and that all images have one shape.

    Raises:
      DataError: if not, naming the file or folder.
    """
    for key in ("train_label", "test_label"):
        low, high = arrays[key].min(), arrays[key].max()
        need(low >= 0 and high < classes, where[key], f"labels from 0 to {classes - 1}", f"{low} to {high}")
    train, test = (arrays[key].shape[1:] for key in ("train_image", "test_image"))
    need(train == test, where["test_image"], f"test images of the training images' shape {train}", test)
