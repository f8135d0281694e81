"""What a search keeps of each network that it made, so that it continues after an interruption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_real
from distill_jax._model import Model, PyTree, check_model
from distill_jax.teachers import fingerprint
from distill_jax.train.checkpoints import Checkpoints, OtherModelError

ORIGINAL = "original"


class Kept:
    """A network's arrays, and what was found of it: those of the search before, if there was one.

    Args:
      directory: the directory of the search; None to keep nothing on the disk.
      name: the name of the network, which is that of its folder.
      made: the network before any training.

    Attributes:
      model: the network as it is now.
      info: what was found of it, as JSON; empty at first.

    Raises:
      ValueError: if the directory holds a network of this name that was made otherwise.
    """

    def __init__(self, directory: Path | None, name: str, made: Model):
        self.model, self.info = made, dict[str, Any]()
        self._folder, self._saves = None if directory is None else directory / name, 0
        if self._folder is None:
            return
        self._source = fingerprint((made.params, made.state))
        other = ValueError(
            f"directory: {directory} holds another search, in which {name!r} was another network: give another "
            "directory"
        )
        with Checkpoints(self._folder, keep=1) as checkpoints:
            try:
                stored = checkpoints.restore((made.params, made.state))
            except OtherModelError:
                raise other from None
        if stored is None:
            return
        (params, state), kept = jax.tree.map(jnp.asarray, stored[0]), stored[1]
        if kept["source"] != self._source:
            raise other
        self.model, self.info = made.replace(params=params, state=state), kept["info"]
        self._saves = kept["saves"]

    def add(self, model: Model, **found: Any) -> None:
        """Keeps the network as it is now, and adds what was found of it."""
        self.model, self.info = model, {**self.info, **found}
        self._saves += 1
        if self._folder is None:
            return
        kept = {"source": self._source, "saves": self._saves, "info": self.info}
        with Checkpoints(self._folder, keep=1) as checkpoints:
            checkpoints.save(self._saves, (model.params, model.state), kept)


def trained(name: str, train: Callable[[Model], Model], model: Model) -> Model:
    """Trains a model by a function of the caller's, of this name, and checks that its form is as before."""
    after = train(model)
    check_model(f"what {name} returns", after)
    if _shapes(after) != _shapes(model):
        raise ValueError(f"{name} must return a model with arrays of the shapes and dtypes that it was given")
    return model.replace(params=after.params, state=after.state)


def number(name: str, value: Any, of: str) -> float:
    """Returns the one number that a function of this name returned for a network, or raises ``ValueError``."""
    check_real(f"what {name} returns for {of!r}", value)
    if np.size(value) != 1:
        raise ValueError(f"{name} must return one number, got {np.shape(value)} numbers for {of!r}")
    return float(np.ravel(value)[0])


def _shapes(model: Model) -> PyTree:
    return jax.tree.map(lambda x: (np.shape(x), jnp.result_type(x)), (model.params, model.state))
