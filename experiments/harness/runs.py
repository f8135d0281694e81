"""What every experiment needs around its training: a run directory, a progress bar, plain errors."""

import fcntl
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import tqdm

from distill_jax._files import write_json

LOCK = ".lock"
_held: dict[Path, int] = {}


def open_run(out: str | Path, config: Mapping[str, Any], *, restart: bool = False) -> Path:
    """Makes a run's directory, or opens the one that an interrupted run with this config left.

    Args:
      out: the directory.
      config: JSON values: all that the results depend on.
      restart: delete what an earlier run left there, instead of going on from it.

    Raises:
      ValueError: if ``out`` is a file, cannot be written, holds other files, or a run with another
        config (naming what differs).
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a directory")
    saved = out / "config.json"
    ours = (LOCK, saved.name)
    foreign = out.is_dir() and any(file.name not in ours and file.suffix != ".tmp" for file in out.iterdir())
    if foreign and not saved.exists():
        raise ValueError(f"--out {out} is not empty and holds no run: name another directory")
    config = json.loads(json.dumps(config))
    if saved.exists() and not restart:
        _refuse_other_config(saved, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
        if restart:
            for path in [path for path in out.iterdir() if path.name != LOCK]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not saved.exists():
            write_json(saved, config)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
    return out


def _lock(out: Path) -> None:
    """Holds the directory until this process ends: two in one would mix their checkpoints."""
    if out.resolve() in _held:
        return
    descriptor = os.open(out / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"another process is working in --out {out}: wait for it, or name another directory"
        ) from None
    _held[out.resolve()] = descriptor


def _refuse_other_config(saved: Path, config: Mapping[str, Any]) -> None:
    try:
        found = json.loads(saved.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{saved} is not JSON: pass --restart, or name another --out") from None
    differing = [
        f"{name} was {found.get(name)!r} and is {config.get(name)!r}"
        for name in sorted(found.keys() | config.keys())
        if found.get(name) != config.get(name)
    ]
    if differing:
        raise ValueError(
            f"--out {saved.parent} holds a run with other options: {'; '.join(differing)}. "
            "Name another directory, or pass --restart to delete that run"
        )


def config_digest(config: Mapping[str, Any]) -> str:
    """Eight hex digits that tell one configuration from another."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def command() -> str:
    """The command line of this process, to be pasted into a shell."""
    return shlex.join(["python", *sys.argv])


def environment() -> dict[str, Any]:
    """Versions, backend and devices, for results.json."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "distill_jax")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "devices": [str(device.device_kind) for device in jax.devices()],
    }


class Progress:
    """One bar over all the training of an experiment, with the time left.

    Args:
      total: the work in all, in any unit that is proportional to time.
    """

    def __init__(self, total: float):
        self._bar = tqdm.tqdm(
            total=total,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed} + {remaining} left{postfix}",
            dynamic_ncols=True,
            smoothing=0.1,
            disable=None,
            leave=False,
        )

    def stage(self, name: str, unit: float) -> Callable[[int, Mapping[str, float]], None]:
        """Begins a stage; returns the ``on_epoch`` of :func:`distill_jax.train.fit` for it.

        Args:
          name: what is shown.
          unit: the work of one epoch.
        """
        self._bar.set_description_str(name)
        done = 0

        def on_epoch(number: int, figures: Mapping[str, float]) -> None:
            nonlocal done
            shown = f"epoch {number}, loss {figures['loss']:.4f}"
            if "validation_errors" in figures:
                shown += f", validation errors {figures['validation_errors']:.0f}"
            self._bar.set_postfix_str(shown, refresh=False)
            work = (number - done) * unit
            if number - done > 1 and not self._bar.disable:
                self._bar.initial += work  # what a checkpoint restored says nothing about the speed
            self._bar.update(work)
            done = number

        return on_epoch

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


def run_main(main: Callable[[], int | None]) -> None:
    """Calls an experiment's main; what a user can mend ends as one line and exit status 2."""
    # Orbax logs what it raises as well, with tracebacks
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (ValueError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {_explain(error)}", file=sys.stderr)
        sys.exit(2)
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(status or 0)


def _explain(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    remedy = "free some space or name another --out, then run the same command again to go on"
    return f"{error.strerror or error}{where}: {remedy}"
