"""Damages every kind of file of a label store, a data cache and a saved model, and counts what their readers notice.

    python tests/faults/flips_store.py --flips 1000 --seed 0

Each kind of file gets that many flipped bits and bytes, and it is also cut off, grown, emptied, deleted and replaced by
files of its like. Exits with 1 if anything else was read than had been written, or if an error was not one line that
names the place.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.damage import Tally, damages, outcome

from distill_jax import models, teachers
from distill_jax.data import _cache

ROWS, CLASSES, SHARD = 20, 5, 8
IDS = np.random.default_rng(0).permutation(1000)[:ROWS]
LOGITS = np.random.default_rng(1).normal(size=(ROWS, CLASSES)).astype(np.float32)


def write(path: Path, logits: np.ndarray = LOGITS, **options: Any) -> teachers.LabelStore:
    options = {
        "fingerprint": {"teacher": "t", "data": "d", "augmentation": "a"},
        "dtype": "float16",
        "shard_rows": SHARD,
    } | options
    return teachers.write_labels(path, IDS, lambda rows, *keys: logits[rows], **options)


def plain_store(folder: Path, flips: int, seed: int, tally: Tally) -> None:
    """Damages a store of logits."""
    names = {"store.json": "description", "ids.bin": "ids", "00001.bin": "labels"}
    store_files(folder / "plain", names, "store", flips, seed, tally)


def head_store(folder: Path, flips: int, seed: int, tally: Tally) -> None:
    """Damages a store of the hidden states of views, with the teacher's head."""
    views = teachers.Views(lambda key, image: image, count=2)
    kind = teachers.kinds.Hidden(LOGITS[:CLASSES, :3])
    names = {"store.json": "description", "head.bin": "head", "00001.bin": "labels"}
    store_files(folder / "head", names, "store of views", flips, seed, tally, kind=kind, views=views)


def store_files(
    folder: Path, names: dict[str, str], store: str, flips: int, seed: int, tally: Tally, **options: Any
) -> None:
    """Damages a store, and opens it or writes it again; what opens must give the labels."""
    path = folder / "store"
    expected = write(path, **options)[IDS]
    write(folder / "other", LOGITS + 1, **options)  # another teacher, of whom the same is said
    for name, part in names.items():
        what = f"{store}: {part}"
        file = path / name
        others = [folder / "other" / name, path / "00000.bin", path / "00002.bin"]
        for kind in damages(file, flips, seed=seed, others=others):
            opened = outcome(
                lambda: teachers.open_labels(path), lambda store: same(store, expected), names=str(path)
            )
            tally.add(f"{what}, opened", kind, opened)
            unchecked = outcome(
                lambda: teachers.open_labels(path, verify=False)[IDS[:1]], lambda _: True, names=str(path),
                refusals=(ValueError, KeyError),
            )  # fmt: skip
            if unchecked[0] == "raw":
                tally.add(f"{what}, opened with verify=False", kind, unchecked)
            rewritten = outcome(
                lambda: write(path, **options), lambda store: same(store, expected), names=str(path)
            )
            tally.add(f"{what}, written again", kind, rewritten)
    assert same(teachers.open_labels(path), expected)


def same(store: teachers.LabelStore, expected: np.ndarray) -> bool:
    return store.fingerprint == {"teacher": "t", "data": "d", "augmentation": "a"} and np.array_equal(
        store[IDS], expected
    )


def cache_file(folder: Path, flips: int, seed: int, tally: Tally) -> None:
    """Damages a cache of data: a reader finds it, and builds the arrays anew."""
    arrays = {"train_image": np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1), "train_label": np.arange(3)}
    for what in ("one", "two"):
        _cache.cached(
            folder / "cache", what, "version", lambda what=what: arrays if what == "one" else {"x": IDS}
        )
    file, other = (next((folder / "cache").glob(f"{what}-*.npz")) for what in ("one", "two"))
    built: list[int] = []
    build = lambda: built.append(1) or arrays  # noqa: E731
    for kind in damages(file, flips, seed=seed, others=[other]):
        built.clear()
        result = outcome(
            lambda: _cache.cached(folder / "cache", "one", "version", build), lambda x: alike(x, arrays)
        )
        tally.add("data cache", kind, ("found", "") if built and result[0] == "harmless" else result)
    assert len(list((folder / "cache").iterdir())) == 2


def alike(found: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> bool:
    return found.keys() == arrays.keys() and all(
        found[key].dtype == arrays[key].dtype and np.array_equal(found[key], arrays[key]) for key in arrays
    )


def model_file(folder: Path, flips: int, seed: int, tally: Tally) -> None:
    """Damages a saved model."""
    model = models.from_function(lambda w, x: x * w["a"] + w["b"], {"a": jnp.arange(2.0), "b": jnp.ones(2)})
    x = jnp.ones((1, 2))
    models.save(folder / "model", model, x)
    models.save(folder / "another", model.replace(params={"a": jnp.ones(2), "b": jnp.ones(2)}), x)
    (folder / "text").write_text("text")
    good = jax.tree.map(np.asarray, model.params)
    for kind in damages(folder / "model", flips, seed=seed, others=[folder / "text"]):
        result = outcome(
            lambda: models.load(folder / "model"),
            lambda loaded: alike(jax.tree.map(np.asarray, loaded.params), good),
            names=str(folder / "model"),
        )
        tally.add("saved model", kind, result)


PARTS: tuple[Callable[[Path, int, int, Tally], Any], ...] = (plain_store, head_store, cache_file, model_file)


def run(folder: Path, flips: int, seed: int = 0) -> Tally:
    """Damages every kind of file and returns the counts."""
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile and NumPy warn of what they then refuse
        for part in PARTS:
            part(folder, flips, seed, tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=1000, help="flipped bits and bytes per kind of file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = run(Path(folder), options.flips, options.seed)
    print(tally)
    sys.exit(1 if tally.bad else 0)


if __name__ == "__main__":
    main()
