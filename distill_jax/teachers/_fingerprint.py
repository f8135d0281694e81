"""Checksums of models and data sets."""

import hashlib

import jax
import numpy as np

from distill_jax._checks import is_key
from distill_jax._model import PyTree


def fingerprint(tree: PyTree) -> str:
    """Computes a checksum of a pytree: the SHA-256 of its paths, shapes, dtypes and bytes.

    The fingerprint of a model covers its parameters and its state, not its function: if the function may
    change, add an entry that names it.

    Args:
      tree: a pytree of arrays, numbers, strings and None, such as a model or a data set.

    Returns:
      64 hexadecimal digits.

    Raises:
      ValueError: if a leaf has no bytes that stay the same: objects, masked and structured arrays.

    >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": np.ones(2)})
    False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is None):
        name, kind = jax.tree_util.keystr(path), ""
        if leaf is None or isinstance(leaf, str):
            kind = type(leaf).__name__
            leaf = np.frombuffer((leaf or "").encode("utf-8", "surrogatepass"), np.uint8)
        elif is_key(leaf):
            kind, leaf = str(leaf.dtype), jax.random.key_data(leaf)
        array = _as_array(name, leaf)
        digest.update(f"{name} {kind or array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _as_array(name: str, leaf: object) -> np.ndarray:
    masked = isinstance(leaf, np.ma.MaskedArray)
    try:
        array = np.asarray(leaf)
    except Exception as error:  # of many types: whatever the object raises
        raise ValueError(
            f"tree{name} is no array: {type(error).__name__} for {type(leaf).__name__}"
        ) from None
    if masked or array.dtype.hasobject or array.dtype.fields:
        found = "a masked array" if masked else f"{type(leaf).__name__} of dtype {array.dtype}"
        raise ValueError(
            f"tree{name} is {found}, whose bytes are no fingerprint: give numbers or strings that say the same"
        )
    return array
