"""Checkpoints: a pytree and some JSON, saved by Orbax in the background, completely or not at all."""

import errno
import hashlib
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from distill_jax._checks import is_key
from distill_jax._files import seal, unseal
from distill_jax._model import PyTree
from distill_jax.weights.structure import by_path


def _flat(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by path, and random keys as their data; no name depends on a container's type."""
    flat = by_path(tree)
    if len(flat) != len(jax.tree.leaves(tree)):
        raise ValueError("two leaves of the tree have the same path when written with dots")
    return {path: jax.random.key_data(x) if is_key(x) else x for path, x in flat.items()}


def _describe(flat: dict[str, Any]) -> dict[str, str]:
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in flat.items()}


DAMAGED = ".damaged-"  # what follows the step in the name of a directory that was set aside
ROW = 1024  # words of four bytes per sum
FACTORS = np.frombuffer(hashlib.shake_256(b"").digest(8 * ROW), np.uint64) | np.uint64(1)


def digest(array: np.ndarray) -> str:
    """Computes 64 hexadecimal digits that change when the contents of an array change.

    SHA-256 of all bytes would take a quarter of the time of a save. So each row of 4,096 bytes is first reduced to one
    number, the sum of its words of 32 bits times fixed odd numbers of 64 bits, modulo 2⁶⁴, and SHA-256 is taken of
    these sums. A changed word always changes the sum of its row, since an odd factor has an inverse; several
    changed words in one row escape with a probability of at most 2⁻³². (The words must be shorter than the
    factors: of two words of 64 bits, a change of both signs would always escape.)

    >>> digest(np.zeros(3)) == digest(np.array([0.0, 0.0, 1e-300]))
    False
    """
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = len(data) - len(data) % (4 * ROW)
    sums = np.einsum("ij,j->i", data[:whole].view(np.uint32).reshape(-1, ROW), FACTORS)
    return hashlib.sha256(sums.tobytes() + data[whole:].tobytes()).hexdigest()


def tree_differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Lists where the leaves of two trees differ, one line per path.

    Args:
      found: path → ``"dtype[shape]"`` of the first tree.
      expected: path → ``"dtype[shape]"`` of the second tree.

    Returns:
      The lines; none if the trees are alike.
    """
    return [
        f"{path}: {found.get(path, 'absent')}, expected {expected.get(path, 'absent')}"
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    ]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rpartition(": ")[2]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps tracebacks from the terminal that TensorStore's threads write when they end after a failure."""
    hook = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = filtered
    try:
        yield
    finally:
        sys.unraisablehook = hook


class OtherModelError(ValueError):
    """A checkpoint holds other arrays than those that were asked for."""


class _DamagedError(Exception):
    """A checkpoint is not as it was saved."""


class Checkpoints:
    """A directory that keeps the last checkpoints of a training.

    A checkpoint becomes visible when it is complete: a process that is killed while saving leaves the
    checkpoint before. Use the object as a context manager, or call :meth:`close`, so that the last save is
    finished. Each array and the JSON have a digest, so that damage is noticed: see :meth:`restore`.

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
        # Saves that a killed process did not finish. Orbax would delete them in a thread for which its close does not
        # wait, and which may then delete what the next object for this directory is writing
        for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(
                unfinished, ignore_errors=True
            )  # a directory may be read without permission to write
        policy = ocp.checkpoint_managers.LatestN(keep)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, save_root_metadata=False),
        )
        self._damaged: list[int] = []

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
        digests = {path: digest(x) for path, x in arrays.items()}
        described = seal({"info": info, "leaves": _describe(flat), "digests": digests})
        items = ocp.args.Composite(tree=ocp.args.StandardSave(arrays), json=ocp.args.JsonSave(described))
        with self._writing():
            self._set_aside()
            self._manager.save(step, args=items)

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint that is not damaged.

        Args:
          like: a pytree of the structure, shapes and dtypes that were saved; its values are not used.

        Returns:
          The saved arrays in the structure of ``like``, and the ``info``; None if there is no checkpoint.

        Warns:
          UserWarning: if a newer checkpoint is damaged; it is named. The next save renames its directory.

        Raises:
          ValueError: if all checkpoints are damaged, or the checkpoint has other leaves than ``like`` (each is
            named).
          OSError: if the system does not let it be read, for example for want of memory.
        """
        with quiet():
            return self._newest(_flat(like), like)

    def _newest(self, flat: dict[str, Any], like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        wrong: list[str] = []
        self._damaged.clear()
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                described = self._read_json(step)
                self._check_leaves(described["leaves"], flat)
                restored = self._read_arrays(step, flat, described["digests"])
            except _DamagedError as error:
                time.sleep(0.05)  # for the threads that are still reading, see quiet
                wrong.append(f"{step} ({error})")
                self._damaged.append(step)
                continue
            if wrong:
                warnings.warn(
                    f"in {self.directory}, damaged checkpoints are passed over: {', '.join(wrong)}; {step} is taken",
                    stacklevel=3,
                )
            leaves = [
                jax.random.wrap_key_data(restored[path], impl=jax.random.key_impl(x))
                if is_key(x)
                else restored[path]
                for path, x in zip(flat, jax.tree.leaves(like), strict=True)
            ]
            return jax.tree.unflatten(jax.tree.structure(like), leaves), described["info"]
        if wrong:
            raise ValueError(
                f"all checkpoints in {self.directory} are damaged: {', '.join(wrong)}. To begin anew, use another "
                "directory, or move this one away"
            )
        return None

    def _read_json(self, step: int) -> dict[str, Any]:
        with self._reading():
            args = ocp.args.Composite(json=ocp.args.JsonRestore())
            found = self._manager.restore(step, args=args)["json"]
        try:
            return unseal(found)
        except ValueError as error:
            raise _DamagedError(error) from None

    def _check_leaves(self, found: dict[str, str], flat: dict[str, Any]) -> None:
        wrong = tree_differences(found, _describe(flat))
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise OtherModelError(
                f"the checkpoint in {self.directory} is of another model or optimizer: "
                f"{'; '.join(wrong[:3])}{more}. Use another directory, or move this one away"
            )

    def _read_arrays(self, step: int, flat: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
        abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items()}
        with self._reading():
            args = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
            restored = self._manager.restore(step, args=args)["tree"]
            for path in flat:
                if digest(np.asarray(restored[path])) != digests[path]:
                    raise _DamagedError(f"{path} has another digest than when it was saved")
        return restored

    def _set_aside(self) -> None:
        """Renames the checkpoints that were found damaged, so that training can save those steps again."""
        for step in self._damaged:
            path = self.directory / str(step)
            path.rename(tempfile.mkdtemp(prefix=f"{step}{DAMAGED}", dir=self.directory))
        if self._damaged:
            self._manager.reload()
            self._damaged.clear()

    def close(self) -> None:
        """Waits until the running save is finished, and closes the directory."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns the various errors of reading into _DamagedError, or OSError where the system is the cause."""
        try:
            yield
        except _DamagedError:
            raise
        except Exception as error:  # of many types, from JSON, Orbax and TensorStore
            system = isinstance(error, OSError | MemoryError) and not isinstance(error, FileNotFoundError)
            if system or re.search("RESOURCE_EXHAUSTED|PERMISSION_DENIED", str(error)):
                message = f"a checkpoint could not be read ({_reason(error)})"
                raise OSError(errno.EIO, message, str(self.directory)) from error
            raise _DamagedError(f"{type(error).__name__} while reading it") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the various errors of a failed write, in this save or the one before, into an OSError."""
        try:
            yield
        except Exception as error:  # of several types, among them ValueError for a full disk
            time.sleep(0.05)  # for the threads that are still writing, see quiet
            message = f"a checkpoint could not be written ({_reason(error)})"
            raise OSError(errno.EIO, message, str(self.directory)) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
