"""Malformed calls of data: loading, own arrays, augmentation, sound."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from faults.malformed_calls.material import (
    IMAGES,
    INF,
    KEY,
    MODEL,
    NAN,
    RNG,
    Case,
    X,
    folder,
    fresh,
    with_nan,
)

from distill_jax import data

# fmt: off

def of_data() -> Iterator[Case]:
    labels = np.arange(30) % 3
    images = RNG.uniform(size=(30, 4, 4, 1)).astype(np.float32)
    good = (images, labels, images, labels)

    def arrays(place: int, wrong: Any, **options: Any) -> Any:
        given: list[Any] = list(good)
        given[place] = wrong
        return data.from_arrays(*given, **options)

    for name, wrong in {
        "NaN": with_nan(images), "infinite": images / 0 if False else np.full_like(images, INF),
        "above 1": images * 255, "negative": images - 1, "int64": np.ones((30, 4, 4), int), "bool": images > 0.5,
        "complex": images + 1j, "masked": np.ma.masked_array(images, images > 0.9), "flat": images.reshape(30, 16),
        "none": images[:0], "short": images[:20], "five axes": images[None], "strings": images.astype(str),
        "objects": images.astype(object), "another size": images[:, :3], "a Model": MODEL, "None": None,
        "unequal rows": [[1.0], [1.0, 2.0]],
    }.items():
        for place, argument in ((0, "images"), (2, "test_images")):
            yield Case(f"data.from_arrays: {argument} {name}", "images|labels", lambda p=place, w=wrong: arrays(p, w))
    for name, wrong in {
        "floats": labels + 0.5, "negative": labels - 1, "one-hot": np.eye(3)[labels], "short": labels[:9],
        "bool": labels > 0, "strings": labels.astype(str), "a gap": labels * 2, "one class": labels * 0,
        "masked": np.ma.masked_array(labels, labels > 1), "huge": labels.astype(np.int64) + 2**40,
    }.items():
        yield Case(f"data.from_arrays: labels {name}", "labels", lambda w=wrong: arrays(1, w))
    for wrong in (0, -1, 30, 2.5, NAN, "5", True):
        yield Case(f"data.from_arrays: validation {wrong!r}", "validation",
                   lambda w=wrong: arrays(0, images, validation=w))
        yield Case(f"data.load: validation {wrong!r}", "validation",
                   lambda w=wrong: data.load("digits", validation=w if w != 30 else 10**6))
    for wrong in (-1, 1.5, NAN, "0", 2**40, None):
        yield Case(f"data.load: seed {wrong!r}", "seed", lambda w=wrong: data.load("digits", seed=w))
    yield Case("data.from_arrays: one name", "labels", lambda: arrays(0, images, class_names=["a"]))
    yield Case("data.from_arrays: names a string", "class_names", lambda: arrays(0, images, class_names="abc"))
    yield Case("data.from_arrays: names twice", "class_names", lambda: arrays(0, images, class_names=["a", "a", "b"]))
    yield Case("data.load: unknown", "no_such", lambda: data.load("no_such_data"))
    yield Case("data.load: empty", "name", lambda: data.load(""))
    yield Case("data.load: a number", "name", lambda: data.load(5))
    yield Case("data.load: None", "None", lambda: data.load(None))
    yield Case("data.load: a list", "name", lambda: data.load(["digits"]))
    yield Case("data.load: no folder", "data_dir", lambda: data.load("mnist", data_dir=fresh()))
    yield Case("data.load: digits with a folder", "data_dir", lambda: data.load("digits", data_dir=folder()))
    yield Case("data.load: an empty folder", "not found", lambda: data.load("mnist", data_dir=empty(fresh())))
    yield Case("data.load: no file", "no file", lambda: data.load(fresh().with_suffix(".npz")))

    def npz(**changes: Any) -> Any:
        path = fresh().with_suffix(".npz")
        named = dict(zip(("x_train", "y_train", "x_test", "y_test"), good, strict=True)) | changes
        np.savez(path, **{name: x for name, x in named.items() if x is not None})
        return data.load(path)

    yield Case("data.load: no y_test", "y_test", lambda: npz(y_test=None))
    yield Case("data.load: NaN in a file", "x_train", lambda: npz(x_train=with_nan(images)))
    yield Case("data.load: labels of floats", "y_train", lambda: npz(y_train=labels + 0.5))
    yield Case("data.load: complex images", "x_test", lambda: npz(x_test=images + 1j))
    yield Case("data.load: few names", "class|y_train", lambda: npz(class_names=np.array(["a"])))
    yield Case("data.load: objects", "numpy.savez", lambda: npz(x_train=images.astype(object)))

    def torn() -> Any:
        path = fresh().with_suffix(".npz")
        path.write_bytes(b"PK\x03\x04 nothing")
        return data.load(path)

    yield Case("data.load: a torn file", "cannot be read", torn)
    for wrong in (-1, 1.5, NAN, "2", None, True):
        yield Case(f"data.random_shift: {wrong!r}", "pixels", lambda w=wrong: data.random_shift(KEY, IMAGES, w))
    for name, call in {
        "shift": lambda x: data.random_shift(KEY, x, 1),
        "flip": lambda x: data.random_flip(KEY, x),
    }.items():
        yield Case(f"data.random_{name}: flat images", "images", lambda c=call: c(X))
        yield Case(f"data.random_{name}: one image", "images", lambda c=call: c(IMAGES[0]))
        yield Case(f"data.random_{name}: a list", "images", lambda c=call: c([1, 2]))
    yield Case("data.random_shift: an integer key", "key", lambda: data.random_shift(3, IMAGES, 1))
    yield Case("data.random_flip: arguments exchanged", "key", lambda: data.random_flip(IMAGES, KEY))


def of_sound() -> Iterator[Case]:
    heard = RNG.normal(size=(2, 600)).astype(np.float32)
    for argument in ("rate", "n_fft", "hop", "mels", "frames", "dynamic_range", "floor"):
        for wrong in (0, -1, NAN, "2", True, [1, 2]):
            yield Case(f"data.sound.log_mel: {argument} {wrong!r}", argument,
                       lambda a=argument, w=wrong: data.sound.log_mel(heard, **{"rate": 8000, a: w}))
    for wrong in (NAN, -1, 9000, "2", [1, 2]):
        for argument in ("low", "high"):
            yield Case(f"data.sound.log_mel: {argument} {wrong!r}", argument,
                       lambda a=argument, w=wrong: data.sound.log_mel(heard, rate=8000, **{a: w}))
    for wrong in ("bark", None, 3, []):
        yield Case(f"data.sound.log_mel: scale {wrong!r}", "scale",
                   lambda w=wrong: data.sound.log_mel(heard, rate=8000, scale=w))
        yield Case(f"data.sound.log_mel: padding {wrong!r}", "padding",
                   lambda w=wrong: data.sound.log_mel(heard, rate=8000, padding=w))
    for wrong in (0, 1, 1.5, "32", None, 4000):
        yield Case(f"data.sound.mel_image: width {wrong!r}", "width",
                   lambda w=wrong: data.sound.mel_image(heard, rate=8000, width=w))
    for name, call in {
        "log_mel": lambda x: data.sound.log_mel(x, rate=8000),
        "mel_image": lambda x: data.sound.mel_image(x, rate=8000),
        "random_speed": lambda x: data.sound.random_speed(KEY, x, 1.1),
        "random_shift": lambda x: data.sound.random_shift(KEY, x, 10),
        "random_gain": lambda x: data.sound.random_gain(KEY, x, 3.0),
        "random_noise": lambda x: data.sound.random_noise(KEY, x),
    }.items():
        for wrong in (np.zeros((2, 600), np.int16), np.zeros((2, 0), np.float32), np.zeros(600, complex), "x", None):
            yield Case(f"data.sound.{name}: {type(wrong).__name__} {getattr(wrong, 'dtype', wrong)}", "waveform",
                       lambda c=call, w=wrong: c(w))
    for wrong in (0.9, NAN, "2", None):
        yield Case(f"data.sound.random_speed: factor {wrong!r}", "factor",
                   lambda w=wrong: data.sound.random_speed(KEY, heard, w))
    for wrong in (-1, 1.5, True, None):
        yield Case(f"data.sound.random_shift: samples {wrong!r}", "samples",
                   lambda w=wrong: data.sound.random_shift(KEY, heard, w))
    for wrong in (-1.0, NAN, "2", None):
        yield Case(f"data.sound.random_gain: decibel {wrong!r}", "decibel",
                   lambda w=wrong: data.sound.random_gain(KEY, heard, w))
        yield Case(f"data.sound.random_noise: tilt {wrong!r}", "tilt",
                   lambda w=wrong: data.sound.random_noise(KEY, heard, tilt=w))
    yield Case("data.sound.random_noise: low above high", "low",
               lambda: data.sound.random_noise(KEY, heard, low=50.0))
    for name, call in {
        "random_warp": lambda x: data.sound.random_warp(KEY, x, time=1.1),
        "random_response": lambda x: data.sound.random_response(KEY, x, 3.0),
        "random_background": lambda x: data.sound.random_background(KEY, x),
        "random_mask": lambda x: data.sound.random_mask(KEY, x, time=2),
    }.items():
        for wrong in (np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 3), np.float32), heard, "x", None):
            yield Case(f"data.sound.{name}: {type(wrong).__name__} {getattr(wrong, 'dtype', wrong)}", "image",
                       lambda c=call, w=wrong: c(w))
    yield Case("data.sound.random_gain: arguments exchanged", "key",
               lambda: data.sound.random_gain(heard, KEY, 3.0))


def empty(path: Path) -> Path:
    path.mkdir()
    return path
