"""Exported files: they run without this library, say what they are, and refuse what they cannot hold."""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from distill_jax import export, models
from distill_jax.compress import units

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "export.md"
SHAPE = (8, 8, 1)
X = np.random.default_rng(0).normal(size=(256, *SHAPE)).astype("f4")


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(10)(linen.relu(linen.Dense(12)(x.reshape(x.shape[0], -1))))


def halved(model):
    graph = units.trace(model, X[:1])
    return units.keep(graph, model, units.prune(graph, units.scores.l2(graph, model), 0.5))


def made(name):
    if name == "linen, pruned":  # a KeptFn
        return halved(models.from_linen(LinenMLP(), jax.random.key(0), X[:1]))
    model = models.build(name.removesuffix(", pruned"), SHAPE, 10, jax.random.key(0))
    return halved(model) if name.endswith("pruned") else model


EXPORTS = [export.stablehlo]


@jax.jit
def run(model, x):
    return model(x)


NETWORKS = ("convnet:4", "mlp:12, pruned", "linen, pruned")

# A process that cannot import this library runs the program that the guide shows
FRESH = """
import sys
sys.modules["distill_jax"] = None
import numpy as np
program = open("program.py").read()
for i, size in ((i, size) for i in range(int(sys.argv[1])) for size in (1, 7, 256)):
    space = {"images": np.load("x.npy")[:size]}
    exec(program.replace("digits.model", f"{i}.model"), space)
    np.save(f"{i} {size}.npy", space["logits"])
"""


def shown(start):
    """The program of the guide that begins so."""
    (program,) = re.findall(rf"```python\n({start}.*?)```", GUIDE.read_text(), re.DOTALL)
    return program


def test_a_process_without_this_library_computes_exactly_the_same(tmp_path):
    found = [made(name) for name in NETWORKS]
    for i, model in enumerate(found):
        export.stablehlo(tmp_path / f"{i}.model", model, X[:2], labels=list("0123456789"))
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "program.py").write_text(shown("import json"))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(len(found))],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for i, model in enumerate(found):
        for size in (1, 7, 256):
            np.testing.assert_array_equal(np.load(tmp_path / f"{i} {size}.npy"), run(model, X[:size]))
        np.testing.assert_array_equal(models.load(tmp_path / f"{i}.model")(X[:2]), run(model, X[:2]))


def plain_model(scale=2.0):
    return models.from_function(lambda w, x: {"y": x["a"] @ w, "n": x["b"]}, scale * jnp.ones((3, 2)))


def test_a_file_says_what_it_is(tmp_path):
    x = {"a": np.ones((4, 3), "f4"), "b": np.ones((4, 1), np.int32)}
    preprocessing = {"a": {"mean": np.float32(0.5)}, "b": "as it is"}
    written = export.stablehlo(
        tmp_path / "m", plain_model(), x, preprocessing=preprocessing, provenance="drawn"
    )
    assert written == export.describe(tmp_path / "m")
    assert written["inputs"] == [
        {"name": "x.a", "shape": ["batch", 3], "dtype": "float32"},
        {"name": "x.b", "shape": ["batch", 1], "dtype": "int32"},
    ]
    assert written["outputs"] == [
        {"name": "y.n", "shape": ["batch", 1], "dtype": "int32"},
        {"name": "y.y", "shape": ["batch", 2], "dtype": "float32"},
    ]
    assert written["platforms"] == ["cpu", "cuda", "tpu"]
    assert written["preprocessing"] == {"a": {"mean": 0.5}, "b": "as it is"}
    assert (written["labels"], written["provenance"]) == (None, "drawn")
    assert written["bytes"] == (tmp_path / "m").stat().st_size
    other = export.stablehlo(tmp_path / "other", plain_model(3.0), x)
    assert len({written["digest"], other["digest"]}) == 2
    models.save(tmp_path / "saved", plain_model(), x)
    saved = export.describe(tmp_path / "saved")
    assert saved["inputs"] == written["inputs"]
    assert written["bytes"] < saved["bytes"] / 2


def test_two_exports_are_equal_and_hold_no_path(tmp_path):
    for name in ("a", "b"):
        export.stablehlo(tmp_path / name, made("mlp:12, pruned"), X[:2])
        if name == "a":
            jax.clear_caches()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        for name in archive.namelist():
            assert b".py" not in archive.read(name)


def test_a_batch_of_one_size_is_said_with_a_warning(tmp_path):
    model = models.from_function(lambda w, x: x * w * float(len(x)), jnp.ones(2))
    with pytest.warns(UserWarning, match=r"saved for batches of the shapes of x, \[\(3, 2\)\]"):
        written = export.stablehlo(tmp_path / "m", model, jnp.ones((3, 2)))
    assert written["inputs"][0]["shape"] == [3, 2]


def counting(params, state, x, *, key=None):
    return x * params, {"count": state["count"] + 1}


def noisy(params, state, x, *, key=None):
    return x * params + jax.random.normal(jax.random.key(0), x.shape), state


def printing(params, state, x, *, key=None):
    jax.debug.print("{}", params)
    return x * params, state


REFUSED = {
    counting: r"evaluation changes the state at \['count'\]",
    noisy: r"evaluation draws random numbers \(random_bits\)",
    printing: r"evaluation calls Python \(debug_",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
@pytest.mark.parametrize("call", EXPORTS)
def test_what_no_file_can_hold_is_refused(tmp_path, function, call):
    model = models.Model(function, jnp.ones(2), {"count": jnp.zeros(())})
    with pytest.raises(ValueError, match=REFUSED[function]):
        call(tmp_path / "m", model, jnp.ones((1, 2)))
    assert not list(tmp_path.iterdir())


def test_labels_and_facts_are_checked(tmp_path):
    path, x = tmp_path / "m", X[:1]
    model = made("mlp:4")
    for labels, message in (
        (["a", "b"], r"one name for each class, got 2 for outputs of \[\(1, 10\)\]"),
        (range(10), "must be names of classes, got 0: write numbers as '0'"),
        ("abc", "must be a list of names"),
    ):
        with pytest.raises(ValueError, match=message):
            export.stablehlo(path, model, x, labels=labels)
    with pytest.raises(ValueError, match="preprocessing must be a text or a dict"):
        export.stablehlo(path, model, x, preprocessing=3)
    with pytest.raises(ValueError, match=r"provenance\.a is nan"):
        export.stablehlo(path, model, x, provenance={"a": float("nan")})


def test_files_of_other_versions_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "m"
    export.stablehlo(path, made("mlp:4"), X[:1])
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["model.json"] = parts["model.json"].replace(b"distill_jax model 1", b"distill_jax model 9")
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = hashlib.sha256(parts["model.json"]).hexdigest().encode()
        for name, part in parts.items():
            archive.writestr(name, part)
    for read in (export.describe, models.load):
        with pytest.raises(ValueError, match=r"has the format 'distill_jax model 9', but this version reads"):
            read(path)
    for place in (len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            export.describe(path)
