"""The arrays of a model in a file of the format safetensors, which many libraries read."""

from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._model import Model, check_model
from distill_jax.models import _safetensors
from distill_jax.models._containers import leaf_names
from distill_jax.models.files import check_target


def save_safetensors(path: str | Path, model: Model) -> None:
    """Writes the parameters and the state of a model to a file of the format safetensors, bit for bit.

    A tensor is named by its place, such as ``params.dense.0.kernel`` or ``state.norm.mean``. A kernel of integers or of
    factors is several, such as ``params.dense.0.kernel.stored`` and ``params.dense.0.kernel.scale``. The program is not
    in the file: :func:`distill_jax.models.save` writes both. It needs ``pip install 'distill_jax[text]'``.

    Args:
      path: the file. An older file of this format there is replaced; anything else is not overwritten.
      model: any model.

    Raises:
      ModuleNotFoundError: if the package safetensors is not installed.
      ValueError: if ``path`` is something else than such a file, two arrays would have one name, or the format has not
        the dtype of an array.
    """
    _safetensors.package()
    arrays, path = _leaves(model), Path(path)
    check_target(path, _safetensors.is_one(path), "file of safetensors")
    for name, array in arrays.items():
        if array.dtype not in _safetensors.DTYPES.values():
            raise ValueError(
                f"model: {name} is {array.dtype}, which safetensors files cannot hold: convert it, or keep it out"
            )
    _safetensors.write(path, {name: np.asarray(array) for name, array in arrays.items()})


def load_safetensors(path: str | Path, model: Model) -> Model:
    """Reads the parameters and the state of a model from a file of :func:`save_safetensors`.

    Args:
      path: the file.
      model: a model of the same structure, whose values are not used.

    Returns:
      The model with the arrays of the file, bit for bit.

    Raises:
      ModuleNotFoundError: if the package safetensors is not installed.
      ValueError: if the file does not exist, is damaged, lacks a tensor or holds another one, or a tensor has another
        shape or dtype than the model's.
    """
    _safetensors.package()
    expected, path = _leaves(model), Path(path)
    tensors = _safetensors.read(path)
    for words, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("holds, beyond the model,", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"path: {path} {words} {len(names)} tensor{'s' * (len(names) > 1)}, such as {min(names)}"
            )
    found = []
    for name, leaf in expected.items():
        shape, kind = tensors[name].shape, tensors[name].dtype
        if shape != leaf.shape or _safetensors.DTYPES.get(kind) != leaf.dtype:
            raise ValueError(
                f"path: tensor {name} of {path} is {kind} {shape}, expected {leaf.dtype} {leaf.shape}, as in the model"
            )
        found.append(jnp.array(tensors[name].read()))
    structure = jax.tree.structure((model.params, model.state))
    params, state = jax.tree.unflatten(structure, found)
    return model.replace(params=params, state=state)


def _leaves(model: Model) -> dict[str, jax.Array]:
    """Returns the arrays of a model by name, in the order of its tree."""
    check_model("model", model)
    names = leaf_names("params", model.params) + leaf_names("state", model.state)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"model: two arrays would have the name {twice[0]}: rename a key that has a dot in it"
        )
    leaves = jax.tree.leaves((model.params, model.state))
    return dict(zip(names, map(jnp.asarray, leaves), strict=True))
