"""Writes a model to a file, and reads it where the code of its network is not there."""

import contextlib
import hashlib
import itertools
import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from distill_jax import _files
from distill_jax._model import Model, PyTree, check_inputs, check_model
from distill_jax.models._containers import build, describe, leaf_names

FORMAT = "distill_jax model 1"
PLATFORMS = ("cpu", "cuda", "tpu")
DESCRIPTION = "model.json"
MODES = ("evaluation", "training")


def save(path: str | Path, model: Model, x: PyTree) -> None:
    """Writes a model to a file, its arrays and its program: :func:`load` needs no code of the network.

    The arrays are stored bit for bit as JAX holds them, each with a SHA-256. The program is stored by
    ``jax.export`` for CPU, CUDA and TPU, once for evaluation and once for training with a random key, each
    with its gradient. It takes any batch size. Where a program cannot be exported for any batch size or
    for all platforms, a warning says so, and it takes the batch size of ``x``, or runs on this platform
    only. Where the model has no training mode, a warning says so, and the loaded model has none.

    Args:
      path: the file. An older saved model there is replaced; anything else is not overwritten.
      model: any model: of a library or a plain function, pruned, factorised, composed.
      x: a batch of inputs; only its shapes and dtypes are used.

    Raises:
      ValueError: if ``path`` is something else than a saved model, or an array of the model is a random
        key.

    >>> import tempfile
    >>> from distill_jax.models import from_function
    >>> path = Path(tempfile.mkdtemp()) / "doubler.model"
    >>> save(path, from_function(lambda w, x: w * x, jnp.array([2.0])), jnp.ones((1, 1)))
    >>> load(path)(jnp.array([[3.0], [4.0]]))
    Array([[6.],
           [8.]], dtype=float32)
    """
    for note in write(path, model, x):
        warnings.warn(note, stacklevel=2)


def write(
    path: str | Path,
    model: Model,
    x: PyTree,
    *,
    modes: Sequence[str] = MODES,
    about: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes the file of :func:`save`: with its training program, or without it and compressed.

    Args:
      path: the file.
      model: the model.
      x: a batch of inputs; only its shapes and dtypes are used.
      modes: the programs to write, ``("evaluation", "training")`` or ``("evaluation",)``. With evaluation
        alone the program has no gradient, and the file is compressed.
      about: what else the description in the file says, for JSON.

    Returns:
      What the programs cannot do, one sentence each.

    Raises:
      ValueError: as :func:`save` does.
    """
    check_model("model", model)
    check_inputs("x", x)
    path = Path(path)
    check_target(path, _is_saved(path), "saved model")
    if "training" not in modes and path.exists() and "training" in read(path)[0]["programs"]:
        raise ValueError(
            f"path: {path} is a saved model that can be trained, which an export cannot: choose another path"
        )
    x = jax.eval_shape(lambda x: x, x)
    leaves, structure = jax.tree.flatten((model.params, model.state))
    names = [
        jax.tree_util.keystr(key)
        for key, _ in jax.tree_util.tree_leaves_with_path({"params": model.params, "state": model.state})
    ]
    for name, leaf in zip(names, leaves, strict=True):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.extended):
            raise ValueError(
                f"model: {name} is a random key, which cannot be saved: keep it out of the state"
            )
    arrays = [np.asarray(jnp.asarray(leaf)) for leaf in leaves]
    files = {f"arrays/{i}": array.tobytes() for i, array in enumerate(arrays)}
    programs, notes = {}, []
    for mode in modes:
        try:
            programs[mode], files[mode], note = _export(model, structure, leaves, x, mode, modes)
            notes += [note] if note else []
        except Exception as error:  # Whatever the model raises: it has no training mode
            if mode == "evaluation":
                raise
            notes.append(f"the training program cannot be saved, and the loaded model has none: {error}")
    description = {
        "format": FORMAT,
        "jax": jax.__version__,
        **(about or {}),
        "parameters": len(jax.tree.leaves(model.params)),
        "params": describe(model.params),
        "state": describe(model.state),
        "x": describe(x),
        "x arrays": [
            {"name": name, "shape": leaf.shape, "dtype": str(leaf.dtype)}
            for name, leaf in zip(leaf_names("x", x), jax.tree.leaves(x), strict=True)
        ],
        "arrays": [
            {"name": name, "shape": array.shape, "dtype": str(array.dtype)}
            for name, array in zip(names, arrays, strict=True)
        ],
        "programs": programs,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    text = json.dumps(_files.plain(description), ensure_ascii=False).encode()
    compression = zipfile.ZIP_STORED if "training" in modes else zipfile.ZIP_DEFLATED

    def write_archive(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            archive.comment = hashlib.sha256(text).hexdigest().encode()
            for name, data in {DESCRIPTION: text, **files}.items():
                archive.writestr(zipfile.ZipInfo(name), data, compression, 9)

    _files.write_atomically(path, write_archive)
    return notes


def check_target(path: Path, same_kind: bool, kind: str) -> None:
    """Raises ``ValueError`` unless a file may be written: its directory exists, and it replaces one of its kind."""
    if not path.parent.is_dir():
        raise ValueError(f"path: the directory {path.parent} does not exist: make it first")
    if path.exists() and not same_kind:
        raise ValueError(f"path: {path} exists and is no {kind}: choose another path, or remove it")


def load(path: str | Path) -> Model:
    """Reads a model that :func:`save` wrote, without the code of its network.

    The model runs in evaluation and training mode, under ``jit`` and ``grad``; it can be fine-tuned and saved
    again. (From a file of :func:`distill_jax.export.stablehlo` it evaluates alone, without gradients.) Its program is
    closed: ``vmap`` over models, ``features.capture`` and ``units.trace`` cannot look
    into it. So prune and factorise before saving.

    Args:
      path: the file.

    Returns:
      The model. Dicts, lists and tuples in its parameters and state are as they were. Other containers,
      such as named tuples or :class:`~distill_jax.compress.low_rank.Factors`, have become dicts of their
      arrays, so that each array has the same path as before.

    Raises:
      ValueError: if the file is no saved model, is damaged, or holds 64-bit arrays where JAX has them
        disabled.
    """
    description, files = read(path)
    leaves = []
    for i, array in enumerate(description["arrays"]):
        dtype = jnp.dtype(array["dtype"])
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"path: {path} holds {array['name']} in {dtype}, which JAX has disabled: call "
                "jax.config.update('jax_enable_x64', True) first"
            )
        values = np.frombuffer(files[f"arrays/{i}"], dtype).reshape(array["shape"])
        leaves.append(jnp.asarray(values))
    count = description["parameters"]
    params = build(description["params"], leaves[:count])
    state = build(description["state"], leaves[count:])
    programs = {mode: export.deserialize(bytearray(files[mode])) for mode in description["programs"]}
    return Model(_LoadedFn(description, programs), params, state)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Reads the description and the parts of a file that :func:`write` wrote, and checks their digests.

    Args:
      path: the file.

    Returns:
      The description, and the bytes of each part by name.

    Raises:
      ValueError: if the file is no saved model, of another version of the format, or damaged.
    """
    path = Path(path)
    if not _is_saved(path):
        raise ValueError(f"path: {path} is no saved model: expected a file of models.save or of export")
    try:
        with zipfile.ZipFile(path) as archive:
            text, digest = archive.read(DESCRIPTION), archive.comment.decode()
            files = {name: archive.read(name) for name in archive.namelist()}
    except Exception as error:  # zipfile raises errors of a dozen types for a damaged file
        raise ValueError(f"path: {path} is damaged: {' '.join(str(error).split())}") from None
    _check(path, DESCRIPTION, text, digest)
    description = json.loads(text)
    if description["format"] != FORMAT:
        raise ValueError(
            f"path: {path} has the format {description['format']!r}, but this version reads {FORMAT!r}: load it with "
            "the version of distill_jax that wrote it, and save it anew"
        )
    for name, digest in description["sha256"].items():
        _check(path, name, files.get(name, b""), digest)
    return description, files


class _LoadedFn:
    """The ``apply_fn`` of a loaded model: checks what it is given, and calls the stored programs."""

    def __init__(self, description: dict[str, Any], programs: dict[str, export.Exported]):
        self.description = description
        self.programs = programs
        count = description["parameters"]
        numbers = range(len(description["arrays"]))
        params = build(description["params"], numbers[:count])
        state = build(description["state"], numbers[count:])
        # The number that each array had when the model was saved: dicts have another order than their owners
        self.order, self.structure = jax.tree.flatten((params, state))

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: jax.Array | None = None
    ) -> tuple[Any, PyTree]:
        structure: Any
        given, structure = jax.tree.flatten((params, state))
        if structure != self.structure:
            raise ValueError(
                f"params and state must have the structure that was saved, {self.structure}, got {structure}"
            )
        arrays = dict(zip(self.order, map(jnp.asarray, given), strict=True))
        leaves = [arrays[number] for number in sorted(arrays)]
        for leaf, saved in zip(leaves, self.description["arrays"], strict=True):
            if leaf.shape != tuple(saved["shape"]) or leaf.dtype != saved["dtype"]:
                raise ValueError(
                    f"{saved['name']} must be {saved['dtype']} {tuple(saved['shape'])}, as it was saved, got "
                    f"{leaf.dtype} {leaf.shape}"
                )
        mode = MODES[key is not None]
        if mode not in self.programs:
            raise ValueError("key: the model was saved without a training mode: call it without a key")
        program = self.programs[mode]
        outputs = self.description["programs"][mode]["outputs"]
        if key is None:
            return build(outputs, program.call(leaves, self.inputs(x, mode))), state
        results = program.call(leaves, self.inputs(x, mode), _key_data(key))
        count = len(results) - (len(leaves) - self.description["parameters"])
        return build(outputs, results[:count]), build(self.description["state"], results[count:])

    def inputs(self, x: PyTree, mode: str) -> list[jax.Array]:
        """The arrays of x, checked against what was saved."""
        structure = jax.tree.structure(build(self.description["x"], range(len(self.description["x arrays"]))))
        given: Any = jax.tree.structure(x)
        if given != structure:
            raise ValueError(f"x must have the structure {structure}, got {given}")
        any_batch = self.description["programs"][mode]["any batch size"]
        arrays = [jnp.asarray(leaf) for leaf in jax.tree.leaves(x)]
        for array, saved in zip(arrays, self.description["x arrays"], strict=True):
            shape = tuple(saved["shape"])
            fits = array.shape == shape
            if any_batch and array.ndim == len(shape):
                fits = array.shape[1:] == shape[1:]
            if not fits or array.dtype != saved["dtype"]:
                expected = ", ".join(map(str, ("batch", *shape[1:]) if any_batch else shape))
                raise ValueError(
                    f"x must be {saved['dtype']} [{expected}], as in the {mode} program that was saved, got "
                    f"{array.dtype} {list(array.shape)}"
                )
        return arrays


def _export(
    model: Model, structure: Any, leaves: list[Any], x: PyTree, mode: str, modes: Sequence[str]
) -> tuple[dict[str, Any], bytes, str]:
    """Exports one of the model's programs: returns a description, its bytes, and a note on what it cannot do."""
    x_structure: Any
    inputs, x_structure = jax.tree.flatten(x)
    found: dict[str, Any] = {}

    def run(leaves: list[Any], inputs: list[Any], *key_data: Any) -> list[Any]:
        params, state = structure.unflatten(leaves)
        key = jax.random.wrap_key_data(key_data[0], impl="threefry2x32") if key_data else None
        outputs, after = model.apply_fn(params, state, x_structure.unflatten(inputs), key=key)
        found.update(outputs=describe(outputs), names=leaf_names("y", outputs))
        if not key_data:
            return jax.tree.leaves(outputs)
        new: Any = jax.tree.structure(after)
        if new != jax.tree.structure(state):
            raise ValueError(
                f"training turns the state's structure {jax.tree.structure(state)} into "
                f"{new}, which cannot be saved"
            )
        return [*jax.tree.leaves(outputs), *jax.tree.leaves(after)]

    like = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    key_like = [jax.ShapeDtypeStruct((2,), np.uint32)] if mode == "training" else []
    problems = []
    for platforms, any_batch in itertools.product(
        (PLATFORMS, (export.default_export_platform(),)), (True, False)
    ):
        try:
            given = _any_batch(inputs) if any_batch else inputs
            with _without_source_lines():
                exported = export.export(jax.jit(run), platforms=platforms)(like, given, *key_like)
                data = bytes(exported.serialize(vjp_order=len(modes) - 1))
        except Exception as error:  # Whatever tracing or lowering raises: the next way may work
            problems.append(error)
            continue
        note = ""
        if problems:
            sizes = (
                "any batch size" if any_batch else f"batches of the shapes of x, {[i.shape for i in inputs]}"
            )
            note = (
                f"the {mode} program is saved for {sizes} on {', '.join(platforms)} only: {_why(problems[0])}"
            )
        arrays = [
            {
                "name": name,
                "shape": [n if isinstance(n, int) else str(n) for n in aval.shape],
                "dtype": str(aval.dtype),
            }
            for name, aval in zip(
                found.pop("names"), exported.out_avals, strict=False
            )  # the new state follows
        ]
        described = {"any batch size": any_batch, "platforms": platforms, "output arrays": arrays, **found}
        return described, data, note
    raise problems[-1]


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """Leaves the paths and lines of source code out of programs, so that equal models give equal bytes."""
    options: Any = jax.config  # its type does not name them
    before = options.jax_traceback_in_locations_limit
    options.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        options.update("jax_traceback_in_locations_limit", before)


def _why(error: Exception) -> str:
    """Says in one line why a program could not be exported."""
    text = " ".join(str(error).split())
    if "symbolic" in text or "_DimExpr" in text:
        return "it uses the batch size in a way in which JAX must know the number, such as to draw random numbers"
    return text


def _any_batch(inputs: list[Any]) -> list[Any]:
    """Returns the inputs' shapes with a symbol in place of the batch size."""
    if len({leaf.shape[:1] for leaf in inputs}) != 1 or not inputs[0].shape:
        raise ValueError("the arrays of x have no batch axis in common")
    (batch,) = export.symbolic_shape("batch")
    return [jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype) for leaf in inputs]


def _key_data(key: jax.Array) -> jax.Array:
    """Returns the numbers of a threefry key: those of the given key, or drawn from it if it is another."""
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if jax.random.key_impl(key) == "threefry2x32":
        return jax.random.key_data(key)
    return jax.random.bits(key, (2,), np.uint32)


def _is_saved(path: Path) -> bool:
    """Says whether a file is a saved model, whole or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # as in load
        return False
    return names[:1] == [DESCRIPTION] and MODES[0] in names


def _check(path: Path, name: str, data: bytes, expected: str) -> None:
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"path: {path} is damaged: the SHA-256 of {name} is not the one that was written")
