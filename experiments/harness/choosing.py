"""The stages of a choice on validation data; see :mod:`harness.choose`."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax import data, teachers, train
from distill_jax.models import Model, build, predict
from harness import many, results
from harness.experiment import adam, arrays, jittered, labelled, plain, prepare

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TEMPERATURES, ALPHAS = (1.0, 2.0, 4.0, 8.0), (0.0, 0.5, 0.9)
DENSE = "mlp:800,800"  # the teacher if no convolutional network leads
BEST = 4  # number of students that stand for a way to label
FOLDS = 3  # number of parts of the training images, for labels of teachers that have not seen the image


@dataclasses.dataclass(frozen=True)
class Effort:
    """The work that a choice may cost; a number of epochs follows from the number of examples.

    Attributes:
      examples: the largest number of training examples used for the choice.
      student_images: the number of images that a student sees in all its epochs.
      student_epochs: the smallest and the largest number of epochs of a student.
      teacher_images: the number of images that one network of the teacher sees in all its epochs.
      teacher_epochs: the smallest and the largest number of epochs of a teacher.
    """

    examples: int = 10_000
    student_images: int = 200_000
    student_epochs: tuple[int, int] = (15, 100)
    teacher_images: int = 150_000
    teacher_epochs: tuple[int, int] = (6, 40)

    def epochs(self, kind: str, examples: int) -> int:
        """Computes the number of epochs of a "student" or a "teacher"."""
        fewest, most = getattr(self, f"{kind}_epochs")
        return min(max(getattr(self, f"{kind}_images") // examples, fewest), most)


def leads(wrong: np.ndarray, bar: np.ndarray) -> bool:
    """Says whether a model makes fewer errors than another by more than two standard errors.

    Args:
      wrong: whether the model errs, for each validation example, bool ``[examples]``.
      bar: whether the other model errs, for the same examples.

    >>> leads(np.arange(100) < 10, np.arange(100) < 30)
    True
    >>> leads(np.arange(100) < 10, np.arange(100) < 12)
    False
    """
    return results.paired(bar.tolist(), wrong.tolist()).t < -2


def folds(examples: int, seed: int) -> np.ndarray:
    """Divides examples at random into equal parts: the number of its part for each, int ``[examples]``."""
    return np.random.RandomState(seed).permutation(examples) % FOLDS


def _part(split: data.Split, rows: np.ndarray) -> data.Split:
    return data.Split(*(field[rows] for field in split))


class Choosing:
    """A choice in progress. Each stage is a method; what it chooses goes into ``config``."""

    def __init__(
        self, config: Any, fixed: Sequence[str], dataset: data.Dataset, effort: Effort, say: Callable[[str], Any]
    ):  # fmt: skip
        self.config, self.fixed, self.effort, self.say = config, fixed, effort, say
        self.shape, self.classes = dataset.image_shape, dataset.classes
        self.all = len(dataset.train.label)
        self.used = min(self.all, effort.examples)
        rows = np.random.RandomState(0).permutation(self.all)[: self.used]
        self.train, self.validation = _part(dataset.train, np.sort(rows)), dataset.validation
        self.tried: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.rates: dict[int, float] = {}  # largest shift of the images → the best learning rate
        self.started = time.monotonic()

    def note(self, line: str) -> None:
        """Adds a line to the account, and prints it with the time."""
        self.lines.append(line)
        self.say(f"[{time.monotonic() - self.started:4.0f} s] {line}")

    def options(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Lists the values of an option to try: the user's alone, where it is set."""
        return [getattr(self.config, name)] if name in self.fixed else list(values)

    def take(self, **options: Any) -> None:
        """Sets options, except those that the user has set."""
        free = {name: value for name, value in options.items() if name not in self.fixed}
        self.config = dataclasses.replace(self.config, **free)

    def judge(self, model: Model, **what: Any) -> np.ndarray:
        """Records the validation errors of a model: bool ``[examples]``, or ``[examples, students]``."""
        top = predict(model, self.validation.image, prepare=prepare).argmax(-1)
        wrong = top != self.validation.label.reshape(-1, *[1] * (top.ndim - 1))
        for place, errors in enumerate(wrong.reshape(len(wrong), -1).sum(0).tolist()):
            own = {name: v[place] if isinstance(v, list) else v for name, v in what.items()}
            self.tried.append({**own, "validation_errors": errors})
        return wrong

    def against(self, wrong: np.ndarray, bar: np.ndarray) -> str:
        """Describes how far a model is below the bar, with the standard error of the paired difference."""
        mean, error, _ = results.paired(wrong.tolist(), bar.tolist())
        side = "below" if mean >= 0 else "above"
        difference = f"{abs(mean) * len(bar):.0f} ± {error * len(bar):.0f}"
        return f"{wrong.sum()} validation errors, {difference} {side} the bar"

    def sizes(self) -> None:
        """Sets what depends on nothing but the sizes of the images and of the data set."""
        large = min(self.shape[:2]) >= 16
        student, teacher, shift = ("mlp:256", "convnet:8,16", 2) if large else ("mlp:128", "convnet:16,32", 1)
        self.take(
            student=student, epochs=self.effort.epochs("student", self.used), student_jitter=shift,
            teacher=teacher, teacher_epochs=self.effort.epochs("teacher", self.used), teacher_learning_rate=2e-3,
            teacher_batch_size=64, dropout=0.3,
        )  # fmt: skip
        self.note(
            f"The choice uses {self.used:,} of {self.all:,} training images and {len(self.validation.label):,} "
            f"validation images. Student: {self.config.student}, {self.config.epochs} epochs."
        )

    def students(
        self, objective: Any, settings: Any, examples: Any, transform: Any, context: Any = None
    ) -> Model:
        """Trains many students; see :func:`harness.many.train_many`."""
        student = build(self.config.student, self.shape, self.classes, jax.random.key(0))
        return many.train_many(
            student, objective, settings, examples, epochs=self.config.epochs, seed=0,
            batch_size=self.config.batch_size, transform=transform, context=context,
        )  # fmt: skip

    def scratch(self) -> np.ndarray:
        """Stage 1. Returns the errors of the best scratch student, the bar; keeps the best learning rates."""
        rates, best = self.options("learning_rate", LEARNING_RATES), []
        for shift in dict.fromkeys((0, self.config.student_jitter)):
            settings = {"learning_rate": rates}
            model = self.students(
                lambda setting: train.supervised(), settings, arrays(self.train), jittered(shift)
            )
            wrong = self.judge(model, stage="scratch", shift=shift, learning_rate=rates)
            place = int(wrong.sum(0).argmin())
            best.append((int(wrong[:, place].sum()), shift, wrong[:, place]))
            self.rates[shift] = rates[place]
            shown = f"images shifted by up to {shift} pixels" if shift else "images as they are"
            self.note(
                f"Scratch student, {shown}: {best[-1][0]} validation errors, learning rate {rates[place]:g}."
            )
        return min(best)[2]

    def network(self, number: int, split: data.Split) -> Model:
        """Trains one network of the teacher."""
        config, key = self.config, jax.random.key(1000 + number)
        steps = len(split.label) // config.teacher_batch_size
        return many.fit(
            build(config.teacher, self.shape, self.classes, key, dropout=config.dropout), train.supervised(),
            adam(config.teacher_learning_rate, config.teacher_epochs, steps), arrays(split), seed=1000 + number,
            epochs=config.teacher_epochs, batch_size=config.teacher_batch_size, transform=jittered(config.jitter),
        )  # fmt: skip

    def teacher(self, bar: np.ndarray) -> tuple[Model, bool]:
        """Stage 2. Returns the best teacher, and whether it leads; takes its options."""
        found: list[Any] = []

        names = ("teacher", "jitter", "teacher_epochs", "members")

        def attempt(**options):
            self.take(**options)
            config = self.config
            what = {name: getattr(config, name) for name in names}
            networks = [self.network(number, self.train) for number in range(config.members)]
            model = teachers.ensemble(*networks) if len(networks) > 1 else networks[0]
            wrong = self.judge(model, stage="teacher", **what)
            self.note(
                f"Teacher: {config.members} × {config.teacher}, {config.teacher_epochs} epochs, images shifted by "
                f"up to {config.jitter} pixels: {self.against(wrong, bar)}."
            )
            found.append((int(wrong.sum()), len(found), what, model, leads(wrong, bar)))

        for jitter in self.options("jitter", (0, self.config.student_jitter)):
            attempt(jitter=jitter, members=1)
        # While none leads: a dense network, the best one trained twice as long, three such networks together
        longer = {"teacher_epochs": 2 * self.config.teacher_epochs}
        for change in ({"teacher": DENSE, "jitter": 0}, longer, {"members": 3}):
            if not min(found)[4] and not set(change) & set(self.fixed):
                attempt(**{**min(found)[2], **change})
        _, _, what, model, leading = min(found)
        self.take(**what)
        return model, leading

    def held_out(self) -> np.ndarray:
        """Labels each training image with a network that was trained without it."""
        fold, logits = folds(self.used, 0), np.empty((self.used, self.classes), np.float32)
        for number in range(FOLDS):
            network = self.network(100 + number, _part(self.train, fold != number))
            logits[fold == number] = predict(network, self.train.image[fold == number], prepare=prepare)
        return logits

    def labels(self, teacher: Model, bar: np.ndarray) -> None:
        """Stages 3 and 4. Tries each way to label with each temperature and α."""
        grid = itertools.product(self.options("temperature", TEMPERATURES), self.options("alpha", ALPHAS))
        temperatures, alphas = map(list, zip(*grid, strict=True))
        settings = {"temperature": temperatures, "alpha": alphas}

        def objective(setting):
            return train.distill(
                temperature=lambda step: setting["temperature"], alpha=lambda step: setting["alpha"]
            )

        found: list[Any] = []
        for way in self.options("labels", ("stored", "held-out", "online")):
            examples, transform, rate = arrays(self.train), plain, self.rates[0]
            if way == "stored":
                examples["teacher"] = predict(teacher, self.train.image, prepare=prepare)
            elif way == "held-out":
                examples["teacher"] = self.held_out()
            else:
                transform = labelled(jittered(self.config.student_jitter))
                rate = self.rates[self.config.student_jitter]
            rates = {"learning_rate": [rate] * len(alphas)}
            model = self.students(objective, settings | rates, examples, transform, teacher)
            wrong = self.judge(model, stage="student", labels=way, **settings)
            place = int(wrong.sum(0).argmin())
            chosen = {
                "labels": way, "temperature": temperatures[place], "alpha": alphas[place], "learning_rate": rate
            }  # fmt: skip
            errors = np.sort(wrong.sum(0))
            # A single best student of each way would be luck in part
            found.append((errors[:BEST].mean(), len(found), chosen, wrong[:, place]))
            self.note(
                f"Labels {way}: {errors[0]} to {errors[-1]} validation errors, the best {BEST} students "
                f"{found[-1][0]:.1f} on average; the fewest with T = {temperatures[place]:g}, α = {alphas[place]:g}."
            )
        _, _, chosen, wrong = min(found)
        self.take(**chosen)
        what = f"labels {chosen['labels']}, T = {chosen['temperature']:g}, α = {chosen['alpha']:g}"
        self.note(f"Chosen: {what}: {self.against(wrong, bar)}.")
        if not leads(wrong, bar):
            self.note("On validation data this student is not clearly better than the scratch student.")

    def whole(self) -> None:
        """Sets the numbers of epochs for all training images, where the choice used a part of them."""
        times = self.config.teacher_epochs // self.effort.epochs("teacher", self.used)
        epochs = max(1, times) * self.effort.epochs("teacher", self.all)
        self.take(epochs=self.effort.epochs("student", self.all), teacher_epochs=epochs)
