"""Checkpoints: a pytree and some JSON, saved by Orbax in the background, completely or not at all."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from distill_jax._model import PyTree
from distill_jax.weights.structure import by_path


def _flat(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by path, and random keys as their data; no name depends on a container's type."""
    flat = by_path(tree)
    if len(flat) != len(jax.tree.leaves(tree)):
        raise ValueError("two leaves of the tree have the same path when written with dots")
    return {path: jax.random.key_data(x) if _is_key(x) else x for path, x in flat.items()}


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _describe(flat: dict[str, Any]) -> dict[str, str]:
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in flat.items()}


def tree_differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Lists where the leaves of two trees differ, one line per path.

    Args:
      found: path → ``"dtype[shape]"`` of the first tree.
      expected: path → ``"dtype[shape]"`` of the second tree.
    """
    return [
        f"{path}: {found.get(path, 'absent')}, expected {expected.get(path, 'absent')}"
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    ]


class Checkpoints:
    """A directory that keeps the last checkpoints of a training.

    A checkpoint becomes visible when it is complete: a process that is killed while saving leaves the
    checkpoint before. Use the object as a context manager, or call :meth:`close`, so that the last save is
    finished.

    Args:
      directory: the directory, which is created if it does not exist.
      keep: the number of checkpoints that are kept.

    >>> import tempfile
    >>> from distill_jax.models import from_function
    >>> model = from_function(lambda w, x: w * x, jax.numpy.float32(3.0))
    >>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
    ...     checkpoints.save(1, model, {"epoch": 1})
    ...     restored, info = checkpoints.restore(model.replace(params=jax.numpy.float32(0.0)))
    >>> float(restored(2.0)), info
    (6.0, {'epoch': 1})
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        self.directory = Path(directory).absolute()
        policy = ocp.checkpoint_managers.LatestN(keep)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, cleanup_tmp_directories=True, save_root_metadata=False
            ),
        )

    def save(self, step: int, tree: PyTree, info: dict[str, Any]) -> None:
        """Starts to save a checkpoint. After the call the arrays may be donated or changed.

        Args:
          step: the number of the checkpoint, higher than those before.
          tree: a pytree of arrays, such as a model or a training state.
          info: anything that JSON can hold.

        Raises:
          OSError: if this save, or the one before, could not be written; so does :meth:`close`.
        """
        flat = _flat(tree)
        # Copied to the host now: the caller's next step overwrites donated buffers
        arrays = {path: np.array(x) for path, x in flat.items()}
        described = {"info": info, "leaves": _describe(flat)}
        items = ocp.args.Composite(tree=ocp.args.StandardSave(arrays), json=ocp.args.JsonSave(described))
        with self._writing():
            self._manager.save(step, args=items)

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint.

        Args:
          like: a pytree of the structure, shapes and dtypes that were saved; its values are not used.

        Returns:
          The saved arrays in the structure of ``like``, and the ``info``; None if there is no checkpoint.

        Raises:
          ValueError: if the checkpoint is damaged, or has other leaves than ``like`` (each is named).
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        with self._reading(step):
            described = self._manager.restore(step, args=ocp.args.Composite(json=ocp.args.JsonRestore()))
        flat = _flat(like)
        wrong = tree_differences(described["json"]["leaves"], _describe(flat))
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise ValueError(
                f"the checkpoint in {self.directory} is of another model or optimizer: "
                f"{'; '.join(wrong[:3])}{more}. Use another directory, or delete this one"
            )
        abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items()}
        with self._reading(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
            )["tree"]
        leaves = [
            jax.random.wrap_key_data(restored[path], impl=jax.random.key_impl(x))
            if _is_key(x)
            else restored[path]
            for path, x in zip(flat, jax.tree.leaves(like), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), described["json"]["info"]

    def close(self) -> None:
        """Waits until the running save is finished, and closes the directory."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many types, from JSON, Orbax and TensorStore
            raise ValueError(
                f"the checkpoint {self.directory / str(step)} is damaged ({type(error).__name__}): "
                "delete it to go on from the one before"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the various errors of a failed write, in this save or the one before, into an OSError."""
        try:
            yield
        except Exception as error:  # of several types, among them ValueError for a full disk
            reason = " ".join(str(error).split()).rpartition(": ")[2]
            message = f"a checkpoint could not be written ({reason})"
            raise OSError(errno.EIO, message, str(self.directory)) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
