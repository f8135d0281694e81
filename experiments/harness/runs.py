"""The directory of a run, the environment it ran in, and errors in plain words."""

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from distill_jax._files import write_json

LOCK = ".lock"
MARK = "a run of distill_jax"  # the key of config.json by which a directory is known as ours
_held: dict[Path, int] = {}


def open_run(out: str | Path, config: Mapping[str, Any], *, restart: bool = False) -> Path:
    """Makes the directory of a run, or opens the one that an interrupted run with this config left.

    Args:
      out: the directory.
      config: JSON values: everything that the results depend on.
      restart: delete what an earlier run left there instead of continuing it.

    Raises:
      ValueError: if ``out`` is a file, cannot be written, holds other files, or holds a run with another
        config (the message names the differences).
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a directory")
    saved = out / "config.json"
    ours = (LOCK, saved.name)
    foreign = out.is_dir() and any(file.name not in ours and file.suffix != ".tmp" for file in out.iterdir())
    if foreign and not saved.exists():
        raise ValueError(f"--out {out} is not empty and holds no run: name another directory")
    config = {MARK: 1, **json.loads(json.dumps(config))}
    if saved.exists():
        _check_config(saved, config, restart)
    if restart and out.is_dir() and (others := [path.name for path in out.iterdir() if not _is_ours(path)]):
        raise ValueError(
            f"--out {out} holds what the run did not write ({', '.join(sorted(others)[:3])}): move it away first, "
            "since --restart deletes the directory's contents"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
        if restart:
            for path in [path for path in out.iterdir() if path.name != LOCK]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if restart or not saved.exists():
            write_json(saved, config)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
    return out


def _lock(out: Path) -> None:
    """Locks the directory until this process ends: two processes in it would mix their checkpoints."""
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


def _is_ours(path: Path) -> bool:
    """Says whether a run writes such a file or directory at the top of its directory."""
    if path.is_dir():
        signs = ("_CHECKPOINT_METADATA", "store.json", "*orbax*")
        return not any(path.iterdir()) or any(any(path.rglob(sign)) for sign in signs)
    known = ("config.json", "results.json", "report.md", "choice.json", LOCK)
    return path.name in known or path.suffix in (".png", ".tmp")


def _check_config(saved: Path, config: Mapping[str, Any], restart: bool) -> None:
    """Refuses a directory that holds no run of ours, or a run with other options that is to be continued."""
    try:
        found = json.loads(saved.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or MARK not in found:
        raise ValueError(
            f"--out {saved.parent} holds a {saved.name} that is not of a run of distill_jax: name another directory"
        )
    differing = [
        f"{name} was {found.get(name)!r} and is {config.get(name)!r}"
        for name in sorted(found.keys() | config.keys())
        if found.get(name) != config.get(name)
    ]
    if differing and not restart:
        raise ValueError(
            f"--out {saved.parent} holds a run with other options: {'; '.join(differing)}. "
            "Name another directory, or pass --restart to delete that run"
        )


def config_digest(config: Mapping[str, Any]) -> str:
    """Computes eight hexadecimal digits that tell one configuration from another."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def file_name(name: str) -> str:
    """Makes a name for a file or directory of the name of a model, such as "without 3, shifted"."""
    return re.sub(r"[^\w.×+=-]+", "-", name)


def command() -> str:
    """Returns the command line of this process, ready to be pasted into a shell."""
    return shlex.join(["python", *sys.argv])


def environment() -> dict[str, Any]:
    """Lists versions, backend and devices, for results.json."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "distill_jax")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "devices": [str(device.device_kind) for device in jax.devices()],
    }


def run_main(main: Callable[[], int | None]) -> None:
    """Calls the main function of an experiment; a mistake of the user ends in one line and exit status 2."""
    # Orbax logs what it raises as well, with tracebacks
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
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
