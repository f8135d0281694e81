"""What a run shows while it works: a line now and then, figures of each epoch in files, a profile on request."""

import contextlib
import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import tqdm

Figures = Mapping[str, float]
OnEpoch = Callable[[int, Figures], None]
QUIET_SECONDS = 30.0  # a run whose output is no terminal says something at least as often


class Sink(Protocol):
    """Where the figures of one training go."""

    def write(self, epoch: int, figures: Figures) -> None:
        """Takes the figures of one epoch; epochs that were written before, by an interrupted run, are replaced."""

    def close(self) -> None:
        """Writes what is still kept back."""


class JsonLines:
    """One line of JSON per epoch, ``{"epoch": 3, "loss": 0.12, ...}``.

    A run that continues from a checkpoint replaces the lines of the epochs that it repeats.

    Args:
      path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None

    def write(self, epoch: int, figures: Figures) -> None:
        """Writes one line, at once."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab+")
            self._file.truncate(self._kept(epoch))
        self._file.write(json.dumps({"epoch": epoch, **figures}).encode() + b"\n")
        self._file.flush()

    def _kept(self, epoch: int) -> int:
        """Returns the number of bytes of the lines of earlier epochs, up to one that a killed run left half written."""
        self._file.seek(0)
        size = 0
        for line in self._file:
            try:
                earlier = line.endswith(b"\n") and json.loads(line)["epoch"] < epoch
            except (
                ValueError,
                LookupError,
                TypeError,
            ):  # a damaged line: the figures are in the checkpoint, too
                earlier = False
            if not earlier:
                break
            size += len(line)
        return size

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class TensorBoard:
    """Event files that TensorBoard shows.

    Args:
      directory: the directory of the event files of this training.

    Raises:
      ValueError: if tensorboardX is not installed.
    """

    def __init__(self, directory: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError("--log tensorboard needs tensorboardX: pip install 'distill_jax[log]'") from None
        self._make = lambda epoch: SummaryWriter(str(directory), purge_step=epoch)
        self._writer: Any = None

    def write(self, epoch: int, figures: Figures) -> None:
        """Writes each figure as a scalar."""
        self._writer = self._writer or self._make(epoch)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Writes the rest."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases for each training; a continued training continues its run.

    Files are kept where ``WANDB_DIR`` says, by default in ``wandb/``; ``WANDB_MODE=offline`` sends nothing.

    Args:
      group: the name of the experiment's run, which its trainings share.
      name: the name of the training.

    Raises:
      ValueError: if wandb is not installed.
    """

    def __init__(self, group: str, name: str):
        try:
            import wandb
        except ImportError:
            raise ValueError("--log wandb needs wandb: pip install 'distill_jax[log]'") from None
        own = f"{group}-{name}".replace("/", "-").replace(" ", "-")
        self._run = wandb.init(
            project="distill_jax",
            group=group,
            name=name,
            id=own,
            resume="allow",
            settings=wandb.Settings(silent=True),  # else it prints a summary of each training
        )

    def write(self, epoch: int, figures: Figures) -> None:
        """Sends the figures; the epoch is their step."""
        self._run.log(dict(figures), step=epoch)

    def close(self) -> None:
        """Ends the run of Weights & Biases."""
        self._run.finish()


def open_sinks(names: Sequence[str], directory: Path, part: str) -> list[Sink]:
    """Opens the files of one training: always JSON lines, and what is named.

    Args:
      names: from "tensorboard" and "wandb".
      directory: the directory of the run.
      part: names the training, such as ``seed0/teacher``; its lines are in ``seed0/teacher.jsonl``.
    """
    sinks: list[Sink] = [JsonLines(directory / f"{part}.jsonl")]
    if "tensorboard" in names:
        sinks.append(TensorBoard(directory / "tensorboard" / part))
    if "wandb" in names:
        sinks.append(WeightsAndBiases(directory.name, part))
    return sinks


class Pulse:
    """Says what a run is doing, at least every 30 seconds, where the output is no terminal.

    A thread looks once a second whether a line is due: compilation, evaluation and long epochs print nothing
    themselves.
    """

    def __init__(self) -> None:
        self.doing = "starting"
        self._said = time.monotonic()
        self._ended = threading.Event()

    def say(self, line: str) -> None:
        """Prints a line now."""
        self._said = time.monotonic()
        print(line, flush=True)

    def _beat(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(1):
            if time.monotonic() - self._said > QUIET_SECONDS - 2:
                self.say(f"{self.doing} ({time.monotonic() - began:.0f} s since the start)")

    @contextlib.contextmanager
    def beating(self, needed: bool) -> Iterator[None]:
        """Starts the thread if ``needed``, and ends it."""
        if not needed:
            yield
            return
        thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()


pulse = Pulse()


def counter(shown: str) -> Callable[[int, int], None]:
    """Makes a ``progress`` for the functions that write stores of labels: it shows how much is done.

    Args:
      shown: what is being done, such as ``"the teacher's labels"``.
    """
    bar: tqdm.tqdm[Any] | None = None  # none where a complete store is found
    pulse.doing = shown

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            # Of a store that is continued, what was there took no time
            bar = tqdm.tqdm(
                total=total, initial=done, desc=shown, disable=None, leave=False, dynamic_ncols=True
            )
        bar.update(done - bar.n)
        pulse.doing = f"{shown}: {done} of {total}"
        if done == total:
            bar.close()
            pulse.doing = f"after {shown}"

    return progress


class Profile:
    """A profile of one epoch of a training, by JAX's profiler: the second one, in which nothing is compiled.

    Args:
      directory: where the trace is written, for TensorBoard's profile plugin, Perfetto or chrome://tracing.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._running = False

    def write(self, epoch: int, figures: Figures) -> None:
        """Starts after the first epoch of this process, and stops after the second."""
        if self._running:
            self.close()
        elif not self.directory.exists():
            jax.profiler.start_trace(str(self.directory), create_perfetto_trace=True)
            self._running = True

    def close(self) -> None:
        """Stops a trace that is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def profile_table(directory: Path, count: int = 10) -> str:
    """Makes a table of the operations of a profile that took the most time.

    Args:
      directory: of :class:`Profile`.
      count: the number of operations.
    """
    found = sorted(directory.rglob("perfetto_trace.json.gz"))
    if not found:
        return "There is no profile: it takes a training of at least two epochs that is not finished yet."
    with gzip.open(found[-1], "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            times[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    total = sum(times.values())
    lines = [f"| operation | calls | ms | share of {total / 1000:.0f} ms |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {calls[name]} | {time / 1000:.1f} | {time / total:.0%} |"
        for name, time in times.most_common(count)
    ]
    return "\n".join(
        [f"Profile of one epoch, in {directory} (open it in Perfetto or TensorBoard):", "", *lines]
    )
