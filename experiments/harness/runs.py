"""The directory of a run, the environment it ran in, and errors in plain words."""

import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import jax

from distill_jax._files import seal, unseal, write_json
from distill_jax.train import keep_memory
from distill_jax.train.checkpoints import quiet
from harness import logs

LOCK = ".lock"
MARK = "a run of distill_jax"  # a key of config.json, and in pictures: by which a run is known as ours
# What a run writes, apart from pictures: paths in its directory
WRITTEN = re.compile(
    r"""
    \.lock | (config|choice|results)\.json | report\.md | \.[^/]+\.tmp
    | (seed\d+|all_seeds)/([^/]+/)?[^/]+\.jsonl
    | seed\d+/programs/[^/]+\.py
    | tensorboard/([^/]+/)+events\.out\.tfevents\.[^/]+
    | profile/plugins/profile/[^/]+/(perfetto_trace\.json\.gz|[^/]+\.(trace\.json\.gz|xplane\.pb))
    | seed\d+/files/(\.lock|[^/]+\.(model|onnx)(\.md)?|\.[^/]+\.tmp)
    | seed\d+/(labels|views)/([^/]+/)?(\.lock|store\.json|(ids|head|\d+)\.bin|\.[^/]+\.tmp)
    | (seed\d+|all_seeds|width\d+)/([^/]+/){1,2}\d+(\.damaged-\w+|\.orbax-checkpoint-tmp[^/]*)?/
      ((json|tree)(\.orbax-checkpoint-tmp[^/]*)?/|d/|ocdbt\.process_\d+/|array_metadatas/)*
      (_CHECKPOINT_METADATA|_METADATA|_sharding|metadata|commit_success\.txt
       |manifest\.ocdbt|[0-9a-f]{32}|process_\d+|[^/]+\.__lock)
    """,
    re.VERBOSE,
)
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
    again = saved.exists()
    if again:
        _check_config(saved, config, restart)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
        if restart and again:
            _clear(out)
        if restart or not again:
            write_json(saved, seal(config))
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


def files_of_run(out: Path) -> tuple[list[Path], list[str]]:
    """Lists the files that the run in a directory wrote, at any depth, and the names of all others there."""
    ours, others = [], []
    for folder, folders, files in os.walk(out):
        for name in [*files, *(name for name in folders if Path(folder, name).is_symlink())]:
            path = Path(folder, name)
            if _is_ours(out, path):
                ours.append(path)
            else:
                others.append(path.relative_to(out).as_posix())
    return ours, sorted(others)


def _is_ours(out: Path, path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if path.parent == out and path.suffix == ".png":
        with path.open("rb") as file:
            return MARK.encode() in file.read(1000)
    return WRITTEN.fullmatch(path.relative_to(out).as_posix()) is not None


def _clear(out: Path) -> None:
    """Deletes what the run wrote, file by file, and the directories that are empty then."""
    ours, others = files_of_run(out)
    if others:
        raise ValueError(
            f"--out {out} holds what the run did not write ({', '.join(others[:3])}): move it away first, "
            "since --restart deletes the run"
        )
    for path in ours:
        if path.name not in (LOCK, "config.json"):  # without the mark, a second try would be refused
            path.unlink()
    for folder, _, _ in os.walk(out, topdown=False):
        with suppress(OSError):  # not empty
            Path(folder).rmdir()


def _check_config(saved: Path, config: Mapping[str, Any], restart: bool) -> None:
    """Refuses a directory that holds no run of ours, or a run with other options that is to be continued."""
    try:
        found = json.loads(saved.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or MARK not in found:
        raise ValueError(
            f"--out {saved.parent} holds a {saved.name} that is not of a run of distill_jax: name another directory"
        )
    if restart:
        return
    try:
        found = unseal(found)
    except ValueError as error:
        raise ValueError(
            f"{saved} is damaged ({error}): name another directory, or pass --restart to delete that run"
        ) from None
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
        "commit": commit(),
    }


def commit() -> str | None:
    """Names the commit of the code, with ``-dirty`` where files differ from it; None outside a clone or without git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or the request of the system to end (SIGTERM)."""


SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_stopped: list[int] = []  # the signals that came


def check_stopped() -> None:
    """Raises ``Stopped`` if a signal came whose exception was lost, for example in a callback that C code made."""
    if _stopped:
        raise Stopped


def _stop(number: int, frame: Any) -> None:
    _stopped.append(number)
    if len(_stopped) > 1:  # the second one does not wait for the checkpoint that is being saved
        _end(number)
    raise Stopped


def _raise_again(number: int, frame: Any) -> None:
    raise Stopped


def _unraisable(default: Callable[[Any], Any], lost: Any) -> None:
    """Raises the exception of a signal again, a moment later, if it was raised where Python ignores exceptions.

    Such places are finalisers, and the callbacks of the garbage collector, of which JAX has one.
    """
    if isinstance(lost.exc_value, Stopped):
        signal.setitimer(signal.ITIMER_REAL, 0.02)
    else:
        default(lost)


def _end(number: int) -> NoReturn:
    """Ends the process at once, with the exit status of a signal.

    Python's own way to end would crash where the signal came during a compilation: JAX goes on to compile in a thread
    of its own, with a client that Python has already destroyed. There is no way to wait for that thread.
    """
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    with suppress(Exception):
        sys.stdout.flush()
    message = f"{SIGNALS[signal.Signals(number)]}; the same command continues from the last checkpoint\n"
    os.write(2, message.encode())
    os._exit(128 + number)


def _keep_compiled() -> None:
    """Keeps compiled programs in the user's cache, so that a second start of an experiment compiles nothing.

    JAX is left alone where it was told of a directory, and where it would compress with zstandard, which has no
    checksum: then a damaged file could be run as it is.
    """
    unchecked = sys.version_info >= (3, 14) or find_spec("zstandard") is not None
    if jax.config.values["jax_compilation_cache_dir"] or unchecked:
        return
    with suppress(OSError, RuntimeError):  # nowhere to write, or no home
        directory = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill_jax" / "compiled"
        )
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            _delete_unfinished(directory)
            jax.config.update("jax_compilation_cache_dir", str(directory))
            jax.config.update("jax_compilation_cache_max_size", 2**30)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _delete_unfinished(directory: Path) -> None:
    """Deletes programs whose writer was killed: JAX would neither use nor replace them, and warn at each new one.

    JAX writes the time of the last use after the program itself.
    """
    for program in directory.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
            program.unlink(missing_ok=True)


@contextmanager
def _surroundings() -> Iterator[None]:
    """Signals, warnings and output as an experiment needs them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # else a terminal without "±" would stop the report
    # A signal that is ignored, as that of Ctrl-C is in the background of a script, stays ignored
    before = {each: signal.getsignal(each) for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN}
    format_before, hook_before = warnings.formatwarning, sys.unraisablehook
    for each in before:
        signal.signal(each, _stop)
    alarm_before = signal.signal(signal.SIGALRM, _raise_again)
    sys.unraisablehook = functools.partial(_unraisable, hook_before)
    warnings.formatwarning = lambda message, *args, **options: f"warning: {message}\n"
    try:
        yield
    finally:
        if _stopped:  # whatever other error came of it
            _end(_stopped[0])
        warnings.formatwarning, sys.unraisablehook = format_before, hook_before
        for each, handler in (before | {signal.SIGALRM: alarm_before}).items():
            signal.signal(each, handler)


@quiet()
def run_main(main: Callable[[], int | None]) -> None:
    """Calls the main function of an experiment; a mistake of the user ends in one line and exit status 2."""
    for name in ("absl", "asyncio"):  # Orbax logs what it raises as well, with tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    keep_memory()
    _keep_compiled()
    try:
        with _surroundings(), logs.pulse.beating(needed=not sys.stderr.isatty()):
            status = main()
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
