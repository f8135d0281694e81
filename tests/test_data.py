"""Data sets by name and of one's own arrays: where they are found, and what is refused."""

import contextlib
import gzip
import hashlib
import io
import os
import pwd
import string
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.registered import skip_registration

from distill_jax import data
from distill_jax.data import _cache, _idx, _tfds
from distill_jax.data._groups import join

SHARED = Path(__file__).resolve().parents[2] / "shared" / "tfds"
STEMS = _idx.FILES


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with no data of its own, and no proxy between it and the loopback server."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no-tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")


def tiny(train=40, test=10, shape=(5, 4), seed=0):
    rng = np.random.default_rng(seed)
    return {
        "train_image": rng.integers(0, 256, (train, *shape), np.uint8),
        "train_label": (np.arange(train, dtype=np.uint8) * 7 + 3) % 10,
        "test_image": rng.integers(0, 256, (test, *shape), np.uint8),
        "test_label": np.arange(test, dtype=np.uint8)[::-1] % 10,
    }


def idx(array):
    head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.tobytes()


def write(folder, arrays, gz=False, rename=lambda name: name):
    folder.mkdir(parents=True, exist_ok=True)
    for key, array in arrays.items():
        content = gzip.compress(idx(array)) if gz else idx(array)
        (folder / (rename(STEMS[key]) + (".gz" if gz else ""))).write_bytes(content)
    return folder


def whole(dataset):
    """Train and validation put together again, in the order of the file."""
    ids = np.concatenate([dataset.train.id, dataset.validation.id])
    order = np.argsort(ids)
    np.testing.assert_array_equal(ids[order], np.arange(len(ids)))
    parts = zip(dataset.train[1:], dataset.validation[1:], strict=True)
    return [np.concatenate(part)[order] for part in parts]


def assert_is(dataset, arrays):
    image, label = whole(dataset)
    np.testing.assert_array_equal(image[..., 0], arrays["train_image"])
    np.testing.assert_array_equal(label, arrays["train_label"])
    np.testing.assert_array_equal(dataset.test.image[..., 0], arrays["test_image"])
    np.testing.assert_array_equal(dataset.test.label, arrays["test_label"])
    np.testing.assert_array_equal(dataset.test.id, len(label) + np.arange(len(dataset.test.id)))


# Splits and digits


def test_digits_has_every_scan_once_and_its_counts():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert (digits.name, digits.source) == ("digits", "scikit-learn's embedded digits")
    assert digits.classes == 10
    assert digits.class_names == tuple("0123456789")
    splits = (digits.train, digits.validation, digits.test)
    assert [len(s.id) for s in splits] == [1081, 216, 500]
    ids = np.concatenate([s.id for s in splits])
    np.testing.assert_array_equal(np.sort(ids), np.arange(1797))
    for split in splits:
        n = len(split.id)
        assert split.id.shape == split.label.shape == (n,)
        assert split.image.shape == (n, 8, 8, 1)
        assert [x.dtype for x in split] == [np.int64, np.uint8, np.int32]
        assert (np.diff(split.id) > 0).all()
        assert set(split.label) == set(range(10))
    scans = load_digits()
    theirs = as_set(np.round(scans.images * (255 / 16)).astype(np.uint8), scans.target)
    assert theirs == as_set(*(np.concatenate(x) for x in list(zip(*splits, strict=True))[1:]))
    assert digits.train.image.max() == 255


def test_the_seed_moves_validation_data_but_not_ids_and_test_data():
    a, b = data.load("digits", seed=0), data.load("digits", seed=1)
    for x, y in zip(a.test, b.test, strict=True):
        np.testing.assert_array_equal(x, y)
    assert 0 < len(np.intersect1d(a.validation.id, b.validation.id)) < 216
    for x, y in zip(whole(a), whole(b), strict=True):
        np.testing.assert_array_equal(x, y)
    again = data.load("digits", seed=1)
    np.testing.assert_array_equal(b.validation.id, again.validation.id)


def test_the_carve_never_changes():
    """Soft labels are kept by id: a change of the carve would give them to other images."""
    digits = data.load("digits")
    assert digits.validation.id[:5].tolist() == [1, 5, 8, 9, 14]
    assert digits.test.label[:10].tolist() == [1, 2, 4, 5, 6, 9, 4, 7, 8, 9]


@pytest.mark.parametrize("size", [1, 297, np.int64(1296)])
def test_validation_of_a_given_size(size):
    digits = data.load("digits", validation=size)
    assert len(digits.validation.id) == size
    assert len(digits.train.id) == 1297 - size


@pytest.mark.parametrize("size", [0, -1, 1297, 0.2, "10"])
def test_validation_of_a_bad_size(size):
    with pytest.raises(ValueError, match=r"validation must be from 1 to 1296 .* got "):
        data.load("digits", validation=size)


@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_data_dir_must_be_a_folder(tmp_path, name):
    (tmp_path / "file").touch()
    for bad in (tmp_path / "missing", str(tmp_path / "file")):
        with pytest.raises(ValueError, match="data_dir must be an existing folder, got"):
            data.load(name, data_dir=bad)


# IDX files


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", ""),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "fashion-mnist"),
        ("kmnist", "kmnist/raw"),
    ],
)
def test_idx_files(tmp_path, name, folder, gz):
    arrays = tiny()
    write(tmp_path / "d" / folder, arrays, gz)
    dataset = data.load(name, data_dir=tmp_path / "d", validation=8)
    assert_is(dataset, arrays)
    assert dataset.name == name
    assert dataset.source == f"IDX files in {tmp_path / 'd' / folder}"
    assert len(dataset.class_names) == dataset.classes == 10
    assert dataset.class_names[1] == {"mnist": "1", "fashion_mnist": "Trouser", "kmnist": "ki"}[name]
    assert all(x.flags.writeable for split in dataset[2:5] for x in split)


def test_idx_files_in_the_other_spelling(tmp_path):
    write(tmp_path / "d", tiny(), rename=lambda name: name.replace("-idx", ".idx"))
    assert_is(data.load("mnist", data_dir=tmp_path / "d"), tiny())


def test_a_gzip_file_without_its_ending_and_a_plain_one_with_it(tmp_path):
    folder = write(tmp_path / "d", tiny())
    plain = folder / STEMS["train_image"]
    plain.write_bytes(gzip.compress(plain.read_bytes()))
    (folder / STEMS["test_label"]).rename(folder / (STEMS["test_label"] + ".gz"))
    assert_is(data.load("mnist", data_dir=folder), tiny())


def test_the_folder_of_that_name_comes_first(tmp_path):
    write(tmp_path / "d", tiny(seed=1))
    write(tmp_path / "d" / "mnist", tiny(seed=2))
    assert_is(data.load("mnist", data_dir=tmp_path / "d"), tiny(seed=2))


def flip(content, position):
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


def swapped(arrays, a, b):
    return {**arrays, a: arrays[b], b: arrays[a]}


def spoil(key, change):
    """Damages one file after all have been written."""

    def apply(folder, gz):
        path = folder / (STEMS[key] + (".gz" if gz else ""))
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("gz", "damage", "file", "message"),
    [
        (False, spoil("train_image", lambda b: b[:-1]), "train_image", "800 .* found 799 .trunc"),
        (False, spoil("test_label", lambda b: b + b"\0"), "test_label", "10 bytes .*11 .trailing"),
        (False, spoil("train_image", lambda b: b[:9]), "train_image", "16 bytes of header"),
        (False, spoil("train_label", lambda b: b""), "train_label", "00000801, found ''"),
        (False, spoil("train_label", lambda b: flip(b, 2)), "train_label", "found '00001801'"),
        (False, spoil("test_image", lambda b: b"<html>"), "test_image", "00000803, found"),
        (True, spoil("train_image", lambda b: b[:-30]), "train_image", "cannot be read, EOFError"),
        (True, spoil("train_image", lambda b: flip(b, len(b) // 2)), "train_image", "cannot be "),
        (True, spoil("test_label", lambda b: flip(b, len(b) - 6)), "test_label", "CRC check failed"),
        (True, spoil("train_label", lambda b: b + b"more"), "train_label", "cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, gz, damage, file, message):
    folder = write(tmp_path / "d", tiny(), gz)
    data.load("mnist", data_dir=folder)
    damage(folder, gz)
    for name in ("mnist", "auto"):  # not passed over in silence either
        with pytest.raises(data.DataError, match=f"{STEMS[file]}.*{message}"):
            data.load(name, data_dir=folder)


@pytest.mark.parametrize(
    ("arrays", "file", "message"),
    [
        (swapped(tiny(), "train_image", "train_label"), "train_image", "00000803, .*'00000801'"),
        (swapped(tiny(), "test_image", "test_label"), "test_image", "00000803, .*'00000801'"),
        (swapped(tiny(), "train_image", "test_image"), "train_label", "10 labels.*, found 40"),
        ({**tiny(), "test_label": tiny()["train_label"]}, "test_label", "10 labels.*found 40"),
        (tiny(10, 40), "train_image", "more than t10k-.*'s 40 images, found 10"),
        (tiny(40, 40), "train_image", "are train and test swapped"),
        ({**tiny(), "train_label": np.full(40, 10, np.uint8)}, "train_label", "0 to 9, found 10 to 10"),
        ({**tiny(), "test_label": np.arange(1, 11, dtype=np.uint8)}, "test_label", "found 1 to 10"),
        ({**tiny(), "test_image": tiny(shape=(4, 5))["test_image"]}, "test_image", r"\(4, 5, 1\)"),
        (
            {**tiny(), "test_image": np.zeros((0, 5, 4), np.uint8)},
            "test_image",
            "expected images, found none",
        ),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, arrays, file, message):
    folder = write(tmp_path / "d", arrays)
    with pytest.raises(data.DataError, match=f"{STEMS[file]}: .*{message}"):
        data.load("mnist", data_dir=folder)


def test_a_missing_file_is_named(tmp_path):
    folder = write(tmp_path / "d", tiny())
    (folder / STEMS["test_label"]).unlink()
    with pytest.raises(data.DataError, match="no t10k-labels-idx1-ubyte"):
        data.load("mnist", data_dir=folder)


# Prepared by TensorFlow Datasets


def png(array):
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, "PNG")
    file.seek(0)
    return file


def prepare(folder, train, test=None, name="tiny_pictures", shape=(4, 5, 3), features=None, config=None):
    """Prepares a set with TFDS's own writer: lists of (image, label) for its splits."""
    features = features or {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(names=["cat", "dog", "owl"]),
    }
    splits = {"train": train, **({"test": test} if test is not None else {})}

    with skip_registration():

        class Pictures(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("3.1.0" if config else "1.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                for i, (image, label) in enumerate(splits[split]):
                    example = {"image": png(image), "label": label}
                    yield i, {key: example[key] for key in features}

        Pictures.name = name
    Pictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def pictures(n, shape=(4, 5, 3), classes=3):
    rng = np.random.default_rng(n)
    return [(rng.integers(0, 256, shape, np.uint8), i % classes) for i in range(n)]


def as_set(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often prepared data is decoded."""
    calls = []
    decode = _tfds.decode
    monkeypatch.setattr(_tfds, "decode", lambda *a: calls.append(1) or decode(*a))
    return calls


def prepare_sounds(folder, splits, rate=8000, shape=(None,)):
    """Prepares sounds as TFDS stores speech_commands: lists of (samples, label) for its splits."""
    dtype = mock.patch.object(tfds.features.Audio, "dtype", property(lambda self: self.np_dtype))
    with _tfds._without_tensorflow(), dtype, skip_registration():
        features = tfds.features.FeaturesDict({
            "audio": tfds.features.Audio(file_format="wav", sample_rate=rate, dtype=np.int16, shape=shape),
            "label": tfds.features.ClassLabel(names=["yes", "no", "_silence_"]),
        })  # fmt: skip

        class Sounds(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            name = "tiny_sounds"

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                for i, (sound, label) in enumerate(splits[split]):
                    yield i, {"audio": sound, "label": label}

        Sounds(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def sounds(n, seed):
    """Tones of 500 and 2,000 Hz and silence, of unequal lengths."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        time = np.arange(rng.integers(3000, 8001)) / 8000
        tone = 0 if i % 3 == 2 else 8000 * np.sin(2 * np.pi * (500, 2000)[i % 3] * time)
        found.append(((tone + 0 * time).astype(np.int16), i % 3))
    return found


def test_prepared_sounds(tmp_path, decoded):
    splits = {"train": sounds(30, 0), "validation": sounds(9, 1), "test": sounds(12, 2)}
    folder = prepare_sounds(tmp_path / "t", splits)
    dataset = data.load("tiny_sounds", data_dir=folder)
    assert (dataset.classes, dataset.class_names) == (3, ("yes", "no", "_silence_"))
    assert [len(split.id) for split in dataset[2:5]] == [30, 9, 12]
    np.testing.assert_array_equal(np.concatenate([split.id for split in dataset[2:5]]), np.arange(51))
    for part, split in zip(("train", "validation", "test"), dataset[2:5], strict=True):
        assert (split.image.dtype, split.image.shape[1:]) == (np.uint8, (32, 32, 1))
        expected = []
        for sound, label in splits[part]:
            padded = np.zeros(8000, np.float32)
            before = (8000 - len(sound)) // 2
            padded[before : before + len(sound)] = sound / 32768
            picture = data.sound.mel_image(padded, rate=8000)
            expected.append((np.round(255 * np.asarray(picture)).astype(np.uint8), label))
        assert as_set(*split[1:]) == as_set(*zip(*expected, strict=True))
        assert not split.image[split.label == 2].any()
    assert data.load("tiny_sounds", data_dir=folder, size=16).test.image.shape == (12, 16, 16, 1)
    data.load("tiny_sounds", data_dir=folder)
    assert len(decoded) == 2  # one of each size
    with pytest.raises(
        ValueError, match="validation must not be given for 'tiny_sounds', which has its own; got 5"
    ):
        data.load("tiny_sounds", data_dir=folder, validation=5)


def test_prepared_sounds_without_validation_data_and_too_long(tmp_path):
    folder = prepare_sounds(tmp_path / "t", {"train": sounds(12, 0), "test": sounds(6, 2)})
    assert [len(s.id) for s in data.load("tiny_sounds", data_dir=folder, validation=4)[2:5]] == [8, 4, 6]
    long = [(np.ones(8001, np.int16), 0)]
    folder = prepare_sounds(tmp_path / "u", {"train": sounds(6, 0), "test": long})
    with pytest.raises(
        data.DataError, match="test: expected sounds of at most a second, 8000 samples, found 8001"
    ):
        data.load("tiny_sounds", data_dir=folder)
    folder = prepare_sounds(tmp_path / "v", {"train": sounds(6, 0), "test": sounds(6, 1)}, rate=None)
    with pytest.raises(
        data.DataError, match=r"or an 'audio' of one channel and a known rate, .* found audio: Audio"
    ):
        data.load("tiny_sounds", data_dir=folder)


def test_emnist_is_turned_upright_and_its_classes_have_names(tmp_path, decoded):
    examples = pictures(12, (28, 28, 1), 62)
    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=62),
    }
    folder = prepare(tmp_path / "t", examples, examples, "emnist", features=features, config="byclass")
    for _ in range(2):  # decoded, and from the cache
        dataset = data.load("emnist/byclass", data_dir=folder, size=32)
        assert dataset.class_names == tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
        assert dataset.test.image.shape == (12, 32, 32, 1)
        turned = [
            (np.pad(image.swapaxes(0, 1), ((2, 2), (2, 2), (0, 0))), label) for image, label in examples
        ]
        assert as_set(*dataset.test[1:]) == as_set(*zip(*turned, strict=True))
    assert len(decoded) == 1


def test_prepared_pictures(tmp_path, monkeypatch, capfd):
    train, test = pictures(1203), pictures(9)
    folder = prepare(tmp_path / "t", train, test)
    capfd.readouterr()
    dataset = data.load("tiny_pictures", data_dir=folder)
    assert capfd.readouterr() == ("", "")  # no word about OpenCV
    assert dataset.train.image.shape == (1003, 4, 5, 3)
    assert dataset.validation.image.shape == (200, 4, 5, 3)
    assert (dataset.classes, dataset.class_names) == (3, ("cat", "dog", "owl"))
    assert dataset.source == f"prepared by TensorFlow Datasets in {folder}/tiny_pictures/1.0.0"
    # TFDS shuffles when it prepares, so that only the whole can be compared
    assert as_set(*whole(dataset)) == as_set(*zip(*train, strict=True))
    assert as_set(*dataset.test[1:]) == as_set(*zip(*test, strict=True))
    stored = tfds.builder("tiny_pictures", data_dir=folder).as_data_source("train")
    for i in (0, 600, 1202):
        np.testing.assert_array_equal(whole(dataset)[0][i], stored[i]["image"])

    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))  # after TFDS was imported
    assert len(data.load("tiny_pictures").test.id) == 9


def test_prepared_mnist_is_found_and_auto_takes_it(tmp_path):
    grey = {"shape": (28, 28, 1), "name": "mnist", "features": {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }}  # fmt: skip
    folder = prepare(tmp_path / "t", pictures(30, (28, 28, 1)), pictures(9, (28, 28, 1)), **grey)
    (folder / "mnist" / "1.0.0").rename(folder / "mnist" / "3.0.1")
    info = folder / "mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace('"1.0.0"', '"3.0.1"'))
    for name in ("mnist", "auto"):
        dataset = data.load(name, data_dir=folder, download=False)
        assert dataset.name == "mnist"
        assert dataset.source.startswith("prepared by TensorFlow Datasets in ")
        assert dataset.train.image.shape == (25, 28, 28, 1)


FEW, TALL = pictures(3), pictures(3, (6, 5, 3))
ANY_SIZE = {"shape": (None, None, 3)}
NO_IMAGE = {"features": {"label": tfds.features.ClassLabel(num_classes=3)}}
NO_CLASS = {
    "features": {"image": tfds.features.Image(shape=(4, 5, 3)), "label": tfds.features.Scalar(np.int64)}
}


@pytest.mark.parametrize(
    ("prepared", "message"),
    [
        (((FEW, FEW), NO_IMAGE), "is not image classification, .* found label: ClassLabel"),
        (((FEW, FEW), NO_CLASS), "is not image classification, .* found image: Image, label: Sca"),
        (((FEW + TALL, FEW), ANY_SIZE), r"train: expected images of one size, found .*, 3\) and "),
        (((FEW, TALL), ANY_SIZE), r"images' shape \(4, 5, 3\), found \(6, 5, 3\)"),
        (((FEW,), {}), r"expected split test, found \['train'\]"),
        (((FEW, [(FEW[0][0], -1)]), {}), "expected labels from 0 to 2, found -1 to -1"),
    ],
)
def test_other_prepared_sets_are_refused(tmp_path, prepared, message):
    folder = prepare(tmp_path / "t", *prepared[0], **prepared[1])
    with pytest.raises(data.DataError, match=f"tiny_pictures.*{message}"):
        data.load("tiny_pictures", data_dir=folder)
    assert not (tmp_path / "cache").exists()


def test_images_of_one_size_need_not_say_so(tmp_path):
    folder = prepare(tmp_path / "t", pictures(6), pictures(3), shape=(None, None, 3))
    assert data.load("tiny_pictures", data_dir=folder).train.image.shape == (5, 4, 5, 3)


def test_damaged_prepared_data(tmp_path):
    folder = prepare(tmp_path / "t", pictures(60), pictures(3))
    (file,) = folder.glob("*/*/*train.array_record*")
    good = file.read_bytes()
    for bad in (good[: len(good) // 2], flip(good, len(good) // 2)):
        file.write_bytes(bad)
        with pytest.raises(data.DataError, match=r"tiny_pictures in .* train cannot be read"):
            data.load("tiny_pictures", data_dir=folder)
    file.unlink()
    with pytest.raises(data.DataError, match="train cannot be read"):
        data.load("tiny_pictures", data_dir=folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar_10", "no data set 'cifar_10'; did you mean cifar10 or .* not found"),
        ("digit", "no data set 'digit'; did you mean digits"),
        ("emnist/nope", "no data set 'emnist/nope'; .*BuilderConfig nope not found"),
        ("../x", "no data set '../x'.*Parsing builder name string"),
        ("cifar10", "cifar10 was not found: not prepared .* To have it, run tfds.builder"),
        ("emnist/byclass", "emnist/byclass was not found: not prepared .*emnist/byclass/3"),
        ("mnist", "no IDX files .train-images-idx3-ubyte.gz and three more. in .*; not prepared.* put t"),
        ("ag_news_subset", "is not image classification"),
        ("speech_commands", "speech_commands was not found: not prepared .*speech_commands/"),
    ],
)
def test_a_name_that_cannot_be_had(tmp_path, name, message):
    with pytest.raises(data.DataError, match=message) as error:
        data.load(name, data_dir=tmp_path, download=False)
    assert "\n" not in str(error.value)


# The cache


@pytest.fixture
def prepared(tmp_path):
    return prepare(tmp_path / "t", pictures(24), pictures(6))


def test_a_cache_is_used_until_the_prepared_files_change(tmp_path, prepared, decoded):
    first = data.load("tiny_pictures", data_dir=prepared)
    (file,) = (tmp_path / "cache" / "distill_jax").iterdir()
    assert file.name.startswith("tiny_pictures-")
    assert file.suffix == ".npz"
    second = data.load("tiny_pictures", data_dir=prepared, validation=5, seed=3)
    assert len(decoded) == 1
    for x, y in zip(whole(first), whole(second), strict=True):
        np.testing.assert_array_equal(x, y)

    (record,) = prepared.glob("*/*/*test.array_record*")
    os.utime(record, ns=(1, 1))
    data.load("tiny_pictures", data_dir=prepared)
    assert len(decoded) == 2
    data.load("tiny_pictures", data_dir=prepared)
    assert len(decoded) == 2
    assert len(list(file.parent.iterdir())) == 1  # in the old one's place

    copy = prepare(tmp_path / "elsewhere", pictures(30), pictures(6))
    assert len(data.load("tiny_pictures", data_dir=copy).train.id) == 25
    data.load("tiny_pictures", data_dir=prepared)
    assert len(decoded) == 3  # the two are kept side by side

    data.load("tiny_pictures", data_dir=prepared, cache_dir=tmp_path / "other")
    assert len(list((tmp_path / "other").iterdir())) == 1


def test_a_damaged_cache_is_rebuilt_whatever_byte_it_is(tmp_path):
    arrays = {k: np.arange(4, dtype=np.uint8) + i for i, k in enumerate(STEMS)}
    calls = []

    def build():
        calls.append(1)
        return arrays

    _cache.cached(tmp_path, "x", "key", build)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    bad = [flip(good, i) for i in range(0, len(good), 11)]
    bad += [good[:n] for n in (0, 1, 100, len(good) // 2, len(good) - 1)] + [b"PK" + good[:70]]
    rebuilt = len(calls)
    for content in bad:
        path.write_bytes(content)
        found = _cache.cached(tmp_path, "x", "key", build)
        assert all((found[k] == arrays[k]).all() for k in STEMS)
        assert all(found[k].shape == (4,) for k in STEMS)
    assert len(calls) - rebuilt > len(bad) // 2  # the rest is padding and times of day
    path.write_bytes(good)
    calls.clear()
    _cache.cached(tmp_path, "x", "key", build)
    assert not calls
    _cache.cached(tmp_path, "x", "other key", build)
    assert calls


def test_a_damaged_byte_in_the_images_of_a_cache(tmp_path, prepared, decoded):
    first = data.load("tiny_pictures", data_dir=prepared)
    (path,) = (tmp_path / "cache" / "distill_jax").iterdir()
    content = path.read_bytes()
    position = content.index(first.test.image[0].tobytes())
    path.write_bytes(flip(content, position))
    second = data.load("tiny_pictures", data_dir=prepared)
    assert len(decoded) == 2
    np.testing.assert_array_equal(first.test.image, second.test.image)
    assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written(tmp_path, prepared, decoded):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"decoded data is not kept in .*file: ") as caught:
        dataset = data.load("tiny_pictures", data_dir=prepared, cache_dir=tmp_path / "file")
    assert len(dataset.test.id) == 6
    assert caught[0].filename == __file__


def test_a_user_without_a_home_directory(tmp_path, prepared, decoded, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert len(data.load("digits").test.id) == 500
    with pytest.warns(UserWarning, match=r"decoded data is not kept in ~/\.cache/distill_jax: RuntimeError"):
        data.load("tiny_pictures", data_dir=prepared)
    for call in (lambda: data.load("~/own.npz"), lambda: data.load("digits", data_dir="~")):
        with pytest.raises(
            ValueError, match=r"^~.*: Could not determine home directory.*: give a path without ~"
        ):
            call()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_stops_midway_leaves_nothing(tmp_path, prepared, monkeypatch, error):
    def savez(file, **arrays):
        file.write(b"PK half")
        raise error

    monkeypatch.setattr(np, "savez", savez)
    expected = (
        pytest.warns(UserWarning, match="disk full")
        if isinstance(error, OSError)
        else pytest.raises(KeyboardInterrupt)
    )
    with expected:
        data.load("tiny_pictures", data_dir=prepared)
    assert list((tmp_path / "cache" / "distill_jax").iterdir()) == []


# Downloads


class Server:
    """Serves files on loopback; ``mode`` says how badly."""

    def __init__(self, files):
        self.files, self.mode, self.asked = files, "well", []
        self.stop = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                self.end_headers()

            def do_GET(self):
                name = self.path.rpartition("/")[2]
                outer.asked.append(name)
                if outer.mode == "absent":
                    return self.send_error(404)
                content = outer.files[name]
                if outer.mode == "wrong" and "labels" in name:
                    content = flip(content, 20)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content[:50] if outer.mode in ("stall", "cut") else content)
                    self.wfile.flush()
                if outer.mode == "stall":
                    outer.stop.wait(20)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/d/"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.stop.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    contents = {key: gzip.compress(idx(array), mtime=0) for key, array in tiny().items()}
    server = Server({STEMS[key] + ".gz": content for key, content in contents.items()})
    sums = {key: hashlib.sha256(content).hexdigest() for key, content in contents.items()}
    family = _idx.FAMILY["mnist"]._replace(url=server.url, sha256=sums)
    monkeypatch.setitem(_idx.FAMILY, "mnist", family)
    yield server
    server.close()


def kept(tmp_path):
    folder = tmp_path / "cache" / "distill_jax"
    return list(folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_a_download_and_its_cache(tmp_path, server, name, capfd):
    dataset = data.load(name)
    assert_is(dataset, tiny())
    assert dataset.name == "mnist"
    assert dataset.source.startswith(f"downloaded from {server.url} (not prepared by Tens")
    assert sorted(server.asked) == sorted(server.files)
    assert capfd.readouterr() == ("", "")

    server.mode = "absent"
    again = data.load(name)
    assert_is(again, tiny())
    assert len(server.asked) == 4
    assert len(kept(tmp_path)) == 1
    assert_is(data.load(name, download=False), tiny())  # what is there is not downloaded

    (path,) = kept(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    server.mode = "well"
    assert_is(data.load(name), tiny())
    assert len(server.asked) == 8


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("wrong", "labels.*: expected SHA-256 .*, found "),
        ("absent", "not downloaded from 127.0.0.1: HTTPError: .*404"),
        ("cut", "not downloaded from 127.0.0.1: IncompleteRead"),
        ("stall", "not downloaded from 127.0.0.1: TimeoutError: timed out"),
    ],
)
def test_a_bad_download_is_refused_and_can_be_repeated(tmp_path, server, monkeypatch, mode, message):
    monkeypatch.setattr(_idx, "TIMEOUT", 0.2)
    server.mode = mode
    started = time.monotonic()
    with pytest.raises(data.DataError, match=f"mnist was not found: .*{message}"):
        data.load("mnist")
    assert time.monotonic() - started < 8
    dataset = data.load("auto")
    assert dataset.name == "digits"
    assert dataset.source.startswith("scikit-learn's embedded digits (MNIST was not found: not pr")
    assert kept(tmp_path) == []
    server.mode = "well"
    monkeypatch.setattr(_idx, "TIMEOUT", 20.0)
    assert_is(data.load("mnist"), tiny())


def test_without_a_network_it_fails_in_seconds(server, capfd):
    server.close()
    started = time.monotonic()
    with pytest.raises(data.DataError, match=r"not downloaded from 127\.0\.0\.1: URLError"):
        data.load("mnist")
    assert data.load("auto").name == "digits"
    assert time.monotonic() - started < 5
    assert capfd.readouterr() == ("", "")


# A data_dir that is named is the place, and no other


@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_a_data_dir_without_the_data_is_an_error(tmp_path, server, name):
    data.load("mnist")  # a download that is in the cache does not take its place either
    with pytest.raises(data.DataError) as error:
        data.load(name, data_dir=tmp_path)
    for part in ("mnist was not found: no IDX files (train-images-idx3-ubyte.gz and three more) in ",
                 f"{tmp_path}; not prepared by TensorFlow Datasets in {tmp_path}/mnist/3.0.1.",
                 "To have it, put ", "pass it as data_dir"):  # fmt: skip
        assert part in str(error.value)
    assert len(server.asked) == 4


@pytest.mark.parametrize(("name", "why"), [("digits", "comes with scikit-learn"), ("x.npz", "is a file")])
def test_a_data_dir_that_would_be_ignored_is_an_error(tmp_path, name, why):
    with pytest.raises(ValueError, match=f"data_dir must not be given for '{name}', which {why}"):
        data.load(name, data_dir=tmp_path)


# What "auto" chooses


def test_auto_takes_idx_files(tmp_path):
    folder = write(tmp_path / "d", tiny())
    dataset = data.load("auto", data_dir=folder)
    assert (dataset.name, dataset.source) == ("mnist", f"IDX files in {folder}")


def test_auto_without_anything_is_digits_and_says_why(tmp_path):
    dataset = data.load("auto", download=False)
    assert dataset.name == "digits"
    assert dataset.source == (
        "scikit-learn's embedded digits (MNIST was not found: not prepared by TensorFlow Datasets in "
        f"{tmp_path}/no-tfds/mnist/3.0.1; not downloaded, as download=False)"
    )


# Without the extras


def test_what_to_install_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert_is(data.load("mnist", data_dir=write(tmp_path / "d", tiny())), tiny())
    with pytest.raises(ModuleNotFoundError, match=r"'cifar10' would be read .* pip install 'distill_jax\[d"):
        data.load("cifar10")
    with pytest.raises(data.DataError, match=r"TensorFlow Datasets is not installed: pip install 'distill_j"):
        data.load("mnist", download=False)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn: pip install 'distill_jax\[data\]'"):
        data.load("digits")


# Arrays of one's own


def own(**changes):
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 256, (30, 5, 4), np.uint8), "labels": np.arange(30) % 3,
        "test_images": rng.integers(0, 256, (6, 5, 4), np.uint8), "test_labels": np.arange(6) % 3,
    }  # fmt: skip
    return arrays | changes


def test_own_arrays():
    arrays = own()
    dataset = data.from_arrays(**arrays, validation=7, seed=3, class_names=["a", "b", "c", "d"], name="mine")
    assert (dataset.name, dataset.source, dataset.classes) == ("mine", "given as arrays", 4)
    assert dataset.class_names == ("a", "b", "c", "d")
    assert_is(dataset, dict(zip(STEMS, arrays.values(), strict=True)))
    assert [x.dtype for x in dataset.train] == [np.int64, np.uint8, np.int32]
    assert len(dataset.validation.id) == 7
    assert dataset.image_shape == (5, 4, 1)


def test_own_floats_and_colours():
    images = np.linspace(0, 1, 12 * 5 * 4 * 3).reshape(12, 5, 4, 3)
    dataset = data.from_arrays(images, np.arange(12) % 2, images[:4], np.arange(4) % 2)
    np.testing.assert_array_equal(whole(dataset)[0], images.astype(np.float32))
    assert (dataset.classes, dataset.class_names) == (2, ("0", "1"))


BAD = [
    ({"images": np.zeros((30, 20), np.uint8)}, r"^images must be \[n, height, width\] or .* got shape \(30, 20"),
    ({"images": np.zeros((0, 5, 4), np.uint8)}, r"not empty, got shape \(0, 5, 4\)"),
    ({"images": np.zeros((30, 5, 4), int)}, "images must be uint8, or floats from 0 to 1, got int64"),
    ({"images": np.full((30, 5, 4), 255.0)}, "got floats from 255 to 255: rescale them"),
    ({"test_images": np.full((6, 5, 4), np.nan)}, "test_images must be finite, got 120 values that are not"),
    ({"test_images": np.zeros((6, 5, 4))}, r"test_images must be like images, uint8 .* got float32 \(5, 4, 1"),
    ({"test_images": np.zeros((6, 4, 5), np.uint8)}, r"like images, uint8 \(5, 4, 1\), got uint8 \(4, 5, 1"),
    ({"labels": np.arange(30.0) % 3}, r"labels must be integers \[n\], got float64 \(30,\)"),
    ({"labels": np.eye(3, dtype=int)[np.arange(30) % 3]}, r"\(30, 3\): use ravel\(\) for a column, argmax"),
    ({"labels": np.arange(29) % 3}, "labels must have one entry per image, 30, got 29"),
    ({"test_labels": np.arange(6) % 3 - 1}, "test_labels must count from 0, got -1"),
    ({"labels": np.arange(30) % 3 + 1}, "labels must hold every class from 0 to 3, got no example of 0: renum"),
    ({"test_labels": np.arange(6)}, "labels must hold every class from 0 to 5, got no example of 3, 4, 5"),
    ({"class_names": ["a", "b"]}, "labels must be from 0 to 1, got 2"),
    ({"labels": np.zeros(30, int), "test_labels": np.zeros(6, int)}, "at least two classes, got 1"),
    ({"validation": 30}, "validation must be from 1 to 29 of the 30 train examples, got 30"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_own_arrays_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        data.from_arrays(**own(**changes))
    assert "\n" not in str(error.value)


def npz(path, **changes):
    arrays = dict(zip(("x_train", "y_train", "x_test", "y_test"), own().values(), strict=True)) | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


def test_a_file_of_own_arrays(tmp_path):
    path = npz(tmp_path / "glyphs.npz", class_names=np.array(["a", "b", "c"]))
    for name in (path, str(path)):
        dataset = data.load(name, validation=7, seed=3)
        assert (dataset.name, dataset.source) == ("glyphs", f"arrays in {path}")
        assert dataset.class_names == ("a", "b", "c")
    again = data.from_arrays(**own(), validation=7, seed=3)
    for ours, theirs in zip(dataset[2:5], again[2:5], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x, y)


def test_files_of_own_arrays_that_are_refused(tmp_path):
    with pytest.raises(
        data.DataError, match=r"no file .*none.npz': expected one of numpy.savez with x_train, "
    ):
        data.load(tmp_path / "none.npz")
    with pytest.raises(data.DataError, match=r"less.npz: expected the arrays x_train, y_train, .* found x_t"):
        data.load(npz(tmp_path / "less.npz", y_test=None))
    with pytest.raises(data.DataError, match=r"bad.npz: x_train must be uint8, or floats .* got int64"):
        data.load(npz(tmp_path / "bad.npz", x_train=np.zeros((30, 5, 4), int)))
    for content in (b"", b"no zip file", (tmp_path / "bad.npz").read_bytes()[:300]):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(
            data.DataError, match=r"damaged.npz: expected a file of numpy.savez; it cannot be"
        ):
            data.load(tmp_path / "damaged.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(data.DataError, match=r"one.npz: expected a file of numpy.savez"):
        data.load(tmp_path / "one.npz")
    nothing = np.array([None])
    np.savez(tmp_path / "objects.npz", **dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), nothing))
    with pytest.raises(data.DataError, match=r"objects.npz: .* cannot be read, ValueError: Object arrays"):
        data.load(tmp_path / "objects.npz")


# Real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="no prepared MNIST beside the checkout")
def test_real_mnist(tmp_path):
    started = time.monotonic()
    mnist = data.load("mnist", data_dir=SHARED, cache_dir=tmp_path / "c")
    first = time.monotonic() - started
    assert [len(s.id) for s in mnist[2:5]] == [55_000, 5_000, 10_000]
    assert mnist.train.image.shape[1:] == (28, 28, 1)
    image, label = whole(mnist)
    # Known of MNIST: how many there are of each digit, and the mean and deviation of the pixels
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(label).tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test.label).tolist() == counts
    assert image.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert image.std() / 255 == pytest.approx(0.3081, abs=5e-5)
    assert label[:10].tolist() == [4, 1, 0, 7, 8, 1, 2, 7, 1, 6]  # in TFDS's order

    started = time.monotonic()
    again = data.load("mnist", data_dir=SHARED, cache_dir=tmp_path / "c")
    assert time.monotonic() - started < max(first / 2, 1)
    np.testing.assert_array_equal(again.validation.image, mnist.validation.image)


def test_a_fresh_interpreter_says_nothing(tmp_path, prepared):
    """Not of OpenCV, which TFDS misses, nor of TensorFlow, nor of anything deprecated."""
    code = """if True:
        import sys
        from distill_jax import data
        data.load("digits")
        data.load("tiny_pictures", data_dir=sys.argv[1])
        assert data.load("auto", download=False).name == "digits"
        assert "tensorflow" not in sys.modules
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(prepared)],
        env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "pairs", [["ba", "cb"], ["cb", "ba"], ["ca", "cb"], ["cb", "ca"], ["ab", "ab", "bc"]]
)
def test_groups_are_joined_through_others(pairs):
    assert join("abcd", map(tuple, pairs)) == {"a": "a", "b": "a", "c": "a", "d": "d"}
