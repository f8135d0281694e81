"""The spoken characters 0-9 and A-Z: synthetic voices by espeak-ng and flite, and recordings of real people."""

import concurrent.futures
import functools
import hashlib
import importlib.util
import json
import re
import shutil
import string
import subprocess
import tempfile
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.data._cache import Arrays, cached
from distill_jax.data._errors import DataError, need, one_line
from distill_jax.data._groups import join
from distill_jax.data.sound import mel_image

CHARACTERS = tuple(string.digits + string.ascii_uppercase)
RATE = 8000  # samples per second, as the recordings have
SAMPLES = 7936  # 0.992 s: 32 frames of hop 256
SIZE = 32  # pixels of a picture, by default
_VERSION = 2  # to be raised when the same programs and recordings give other sounds or groups
_TIMEOUT = 30.0  # seconds for one character, which takes 10 ms
_TRIES = 3  # for a machine that stands still now and then
_TEST = 0.2  # the share of espeak-ng's variants that are test voices
# Silence is what is weaker than so many decibels below the loudest 10 ms: as low as the noise of the sound allows,
# since the f of "eff" may be at -38
_QUIET = (-40.0, -25.0)
_LOUD = -14.0  # decibels: up to this, what is called silence grows until the sound is short enough
_ABOVE_NOISE = 10.0  # decibels
_MARGIN = 0.03  # seconds that are kept beyond
# espeak-ng speaks a character for itself as its name; flite must be given words, as "a" is an article to it
_WORDS = dict(zip(CHARACTERS, (
    "zero one two three four five six seven eight nine ay bee see dee ee eff gee aitch eye jay kay ell em en oh pea "
    "queue are ess tea you vee double_you ex why zee"
).replace("_", "-").split(), strict=True))  # fmt: skip
_ACCENTS = (
    "en", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-gb-x-rp", "en-029", "en-us-nyc",
)  # fmt: skip
# flite's voices and whose they are: kal and kal16 are one man; awb_time knows the words of the time alone
_FLITE = {"kal": "kal", "kal16": "kal", "awb": "awb", "rms": "rms", "slt": "slt"}
_FLITE_TEST = ("rms", "slt")
INSTALL = "apt-get install --no-install-recommends espeak-ng flite"


class Voice(NamedTuple):
    """One synthetic voice."""

    name: str  # such as "espeak-ng en-us+m3"
    group: str  # the person, or espeak-ng's variant in all its accents
    command: tuple[str, ...]  # without the file to write and the text
    words: bool  # whether the text is a word, or the character

    def say(self, character: str, path: Path) -> list[str]:
        """Returns the command that writes the character as a WAV file."""
        text = _WORDS[character].replace("-", " ") if self.words else character
        write = ["-o", str(path), "-t", text] if self.words else ["-w", str(path), text]
        return [*self.command, *write]


class Recordings(NamedTuple):
    """The recordings of one person."""

    name: str
    folder: Callable[[], Path | None]
    file: Callable[[str], str]  # from the character to the path in the folder
    characters: str
    install: str


def _captcha() -> Path | None:
    package = importlib.util.find_spec("captcha")
    places = package.submodule_search_locations if package else None
    return Path(places[0]) / "data" if places else None


_LETTERS = string.ascii_uppercase
RECORDINGS = (
    Recordings("captcha", _captcha, "{}/default.wav".format, "".join(CHARACTERS), "pip install captcha"),
    Recordings(
        "asterisk",
        lambda: Path("/usr/share/asterisk/sounds/en_US_f_Allison"),
        lambda c: f"{'digits' if c.isdigit() else 'letters'}/{c.lower()}.wav",
        "".join(CHARACTERS), "apt-get install asterisk-core-sounds-en-wav",
    ),
    Recordings(
        "klettres en", lambda: Path("/usr/share/klettres/en/alpha"), "{}.ogg".format, _LETTERS,
        "apt-get install klettres-data",
    ),
    Recordings(
        "klettres en_GB", lambda: Path("/usr/share/klettres/en_GB/alpha"), lambda c: f"{c.lower()}.ogg", _LETTERS,
        "apt-get install klettres-data",
    ),
    Recordings(
        "saytime", lambda: Path("/usr/share/saytime"), "{}.au".format, string.digits, "apt-get install saytime"
    ),
)  # fmt: skip


class UnusableError(Exception):
    """Says why a sound is dropped."""


def find(cache: Path) -> tuple[str, Arrays]:
    """Renders the synthetic voices and reads the recordings, or takes both from the cache.

    Returns:
      One line about the source, and the arrays: ``train_image``, ``test_image`` and ``people_image``, int16
      ``[n, samples]`` with the peak 32767; their labels; ``origin`` (the number of the voice, by example id,
      through the three in turn), ``origins`` (the voices' names), ``group`` (the voices' groups), ``groups``
      (their names) and ``dropped`` (lines).

    Raises:
      DataError: if espeak-ng is not installed or speaks with fewer than three variants.
    """
    versions, voices, missing = _voices()
    stats = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for person in RECORDINGS
        for _, path in _files(person)
        if path.is_file()
    ]
    can_read = importlib.util.find_spec("soundfile") is not None
    version = json.dumps([_VERSION, versions, [voice.name for voice in voices], stats, can_read])
    arrays = cached(cache, "spoken", version, functools.partial(_render, voices, missing))
    groups, people = len(arrays["groups"]), len(arrays["people_label"])
    synthetic = len(arrays["train_label"]) + len(arrays["test_label"])
    source = (
        f"{synthetic} sounds by {', '.join(versions)} and {people} recordings of people, {groups} groups of voices; "
        f"{len(arrays['dropped'])} were dropped"
    )
    lost = [person.install for person in RECORDINGS if not any(path.is_file() for _, path in _files(person))]
    lost += [] if can_read else ["pip install soundfile (to read klettres and saytime)"]
    if len(versions) < 2:
        lost.append("apt-get install flite")
    return source + (f" (for more: {'; '.join(dict.fromkeys(lost))})" if lost else ""), arrays


def pictures(waveforms: np.ndarray, size: int) -> np.ndarray:
    """Draws int16 waveforms ``[n, samples]`` as uint8 log-mel spectrograms ``[n, size, size, 1]``."""
    drawn = [
        np.asarray(mel_image(floats(waveforms[i : i + 512]), rate=RATE, height=size, width=size))
        for i in range(0, len(waveforms), 512)
    ]
    return np.round(255 * np.concatenate([np.zeros((0, size, size, 1)), *drawn])).astype(np.uint8)


def floats(waveforms: np.ndarray) -> np.ndarray:
    """Returns int16 waveforms as float32 from −1 to 1."""
    return waveforms.astype(np.float32) / 32767


def _voices() -> tuple[list[str], list[Voice], list[str]]:
    """Lists the programs with their versions, the voices, and lines about what is missing."""
    espeak, flite = shutil.which("espeak-ng"), shutil.which("flite")
    if espeak is None:
        raise DataError(f"the data set spoken is synthesised by espeak-ng, which is not installed: {INSTALL}")
    versions = [" ".join(_run([espeak, "--version"])[1].split()[:4]).removesuffix(" Data")]
    listed = _run([espeak, "--voices=variant"])[1].splitlines()
    variants = sorted({line.rpartition("!v/")[2].strip() for line in listed if "!v/" in line})
    variants = [name.partition("  ")[0] for name in variants]
    voices = []
    for i, variant in enumerate(variants):
        # Numbered copies of one design belong together; m1 and m2 are two men
        group = re.sub(r"(?<=\w\w)\d+$", "", variant)
        for accent in ("en-us", _ACCENTS[i % len(_ACCENTS)]):
            name = f"{accent}+{variant}"
            voices.append(Voice(f"espeak-ng {name}", f"espeak-ng {group}", (espeak, "-v", name), False))
    if flite is None:
        return versions, voices, ["flite: not installed; apt-get install flite"]
    versions.append("flite " + " ".join(re.findall(r"flite-(\S+)", _run([flite, "--version"])[1])[:1]))
    present = _run([flite, "-lv"])[1].split()
    for name, person in _FLITE.items():
        if name in present:
            voices.append(Voice(f"flite {name}", f"flite {person}", (flite, "-voice", name), True))
    absent = sorted(set(_FLITE) - set(present))
    return versions, voices, [f"flite {name}: flite does not have this voice" for name in absent]


def _run(command: list[str]) -> tuple[int, str, str]:
    """Runs a program: its exit status, output and errors."""
    for left in reversed(range(_TRIES)):
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=_TIMEOUT, check=False,
            )  # fmt: skip
            return done.returncode, done.stdout, done.stderr
        except (OSError, subprocess.SubprocessError) as error:
            if not left or not isinstance(error, subprocess.TimeoutExpired):
                # A fault of the machine, and not of a voice, so it must not end up in the cache
                raise DataError(f"{command[0]} cannot be run, {one_line(error)}: {INSTALL}") from error
    raise AssertionError


def _render(voices: list[Voice], missing: list[str]) -> Arrays:
    dropped = list(missing)
    first: dict[bytes, Voice] = {}  # by the digest of all sounds
    heard: dict[str, list[tuple[int, np.ndarray]]] = {}
    same: list[tuple[str, str]] = []  # groups of which two voices sound the same
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor() as pool:
        # The programs run as processes, so threads are enough
        spoken = pool.map(lambda i: _speak(voices[i], Path(folder) / str(i)), range(len(voices)))
        for voice, (sounds, why) in zip(voices, spoken, strict=True):
            dropped += why
            if sounds:
                digest = hashlib.sha256(b"".join(sound.tobytes() for _, sound in sounds)).digest()
                twin = first.setdefault(digest, voice)
                if twin is voice:
                    heard[voice.name] = sounds
                else:
                    dropped.append(f"{voice.name}: sounds as {twin.name} does")
                    same.append((voice.group, twin.group))
    group_of = join((voice.group for voice in voices), same)
    voices = [v._replace(group=group_of[v.group]) for v in voices if v.name in heard]
    test = _test_groups([voice.group for voice in voices])
    order = sorted(range(len(voices)), key=lambda i: voices[i].group in test)  # stable
    columns: dict[str, list[tuple[int, int, np.ndarray]]] = {"train": [], "test": [], "people": []}
    names: list[str] = []
    groups: list[str] = []
    for i in order:
        column = columns["test" if voices[i].group in test else "train"]
        column += [(len(names), label, sound) for label, sound in heard[voices[i].name]]
        names.append(voices[i].name)
        groups.append(voices[i].group)
    for person in RECORDINGS:
        sounds = list(_recorded(person, dropped))
        if sounds:
            columns["people"] += [(len(names), label, sound) for label, sound in sounds]
            names.append(person.name)
            groups.append(person.name)
    known = sorted(set(groups))
    arrays: Arrays = {}
    for key, rows in columns.items():
        arrays[f"{key}_image"] = np.array([sound for *_, sound in rows], np.int16).reshape(-1, SAMPLES)
        arrays[f"{key}_label"] = np.array([label for _, label, _ in rows], np.int32)
    return arrays | {
        "origin": np.array([origin for rows in columns.values() for origin, *_ in rows], np.int32),
        "origins": np.array(names),
        "group": np.array([known.index(group) for group in groups], np.int32),
        "groups": np.array(known),
        "dropped": np.array(dropped, np.str_),
    }


def _test_groups(groups: list[str]) -> set[str]:
    """Chooses the voices of the test data: two of flite's people, and variants of espeak-ng by a hash."""
    variants = sorted(
        {group for group in groups if group.startswith("espeak-ng ")},
        key=lambda name: hashlib.sha256(name.encode()).digest(),
    )
    need(
        len(variants) >= 3, "espeak-ng", "at least 3 variants of voices, to train, validate and test",
        f"{len(variants)} of which every character was spoken: {INSTALL}",
    )  # fmt: skip
    low = sum(hashlib.sha256(name.encode()).digest()[0] < 256 * _TEST for name in variants)
    return {*variants[: min(max(low, 1), len(variants) - 2)], *(f"flite {name}" for name in _FLITE_TEST)}


def _speak(voice: Voice, path: Path) -> tuple[list[tuple[int, np.ndarray]], list[str]]:
    """Renders the characters of a voice: (label, sound) of each, and lines about those that are dropped."""
    sounds, dropped = [], []
    for label, character in enumerate(CHARACTERS):
        try:
            command = voice.say(character, path)
            path.unlink(missing_ok=True)  # what a program does not write is not the character before
            status, _, said = _run(command)
            if status or not path.is_file():
                said = " ".join(said.split())[:100]
                raise UnusableError(f"{Path(command[0]).name} failed with status {status} {said}".strip())
            sounds.append((label, prepare(*read(path))))
        except UnusableError as why:
            dropped.append(f"{voice.name} {character}: {why}")
    return sounds, dropped


def _files(person: Recordings) -> Iterator[tuple[str, Path]]:
    folder = person.folder()
    if folder is not None:
        for character in person.characters:
            yield character, folder / person.file(character)


def _recorded(person: Recordings, dropped: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    files = list(_files(person))
    if not any(path.is_file() for _, path in files):
        dropped.append(f"{person.name}: not installed; {person.install}")
        return
    for character, path in files:
        try:
            yield CHARACTERS.index(character), prepare(*read(path))
        except (UnusableError, OSError) as error:
            why = str(error) if isinstance(error, UnusableError) else one_line(error)
            dropped.append(f"{person.name} {character}: {why}")


def read(path: Path) -> tuple[np.ndarray, int]:
    """Reads a sound file.

    Args:
      path: a WAV file of 8 or 16 bits, or with the package soundfile a file that this reads.

    Returns:
      Floats ``[samples]`` from −1 to 1, the mean of the channels, and the number of samples per second.

    Raises:
      UnusableError: if the file is damaged, truncated or of another kind. Of a file without a header, as saytime's,
        it is not known whether it is truncated.
    """
    if path.suffix in ("", ".wav"):
        try:
            with wave.open(str(path)) as file:
                rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
                expected, frames = file.getnframes(), file.readframes(file.getnframes())
        except (wave.Error, EOFError) as error:
            raise UnusableError(f"cannot be read, {one_line(error)}") from error
        found = len(frames) // (channels * width)
        if found != expected:
            raise UnusableError(f"truncated: it has {found} of {expected} samples")
        if width not in (1, 2):
            raise UnusableError(f"samples of {8 * width} bits; 8 and 16 are read")
        raw = np.frombuffer(frames, np.uint8 if width == 1 else "<i2").astype(np.float64)
        sound = ((raw - 128) / 128 if width == 1 else raw / 32768).reshape(-1, channels)
    else:
        if not _is_whole(path.read_bytes()):  # soundfile returns what is there without an error
            raise UnusableError("truncated: the file ends before the sound does")
        try:
            import soundfile
        except (ImportError, OSError):  # OSError: its library is missing
            raise UnusableError(f"{path.suffix} is read with soundfile: pip install soundfile") from None
        try:
            sound, rate = soundfile.read(path, always_2d=True)
        except (soundfile.SoundFileError, ValueError, TypeError) as error:
            raise UnusableError(f"cannot be read, {one_line(error)}") from error
    return sound.mean(1), rate


def _is_whole(raw: bytes) -> bool:
    """Says whether a Sun or Ogg file is as long as it says; other files are taken for whole."""
    if raw.startswith(b".snd"):
        offset, size = (int.from_bytes(raw[i : i + 4], "big") for i in (4, 8))
        return size == 0xFFFFFFFF or len(raw) >= offset + size  # the largest number: the length is not known
    if not raw.startswith(b"OggS"):
        return True
    page = raw[raw.rfind(b"OggS") :]  # must be marked as the last, and be there to the end of its segments
    if len(page) < 27:
        return False
    head = 27 + page[26]
    return bool(page[5] & 4) and len(page) >= head + sum(page[27:head])


def prepare(sound: np.ndarray, rate: int) -> np.ndarray:
    """Resamples a sound to 8 kHz, cuts silence off at both ends, scales the peak to 1, and centres it among zeros.

    Args:
      sound: floats ``[samples]``.
      rate: samples per second.

    Returns:
      int16 ``[7936]``, of which the largest magnitude is 32767.

    Raises:
      UnusableError: if the sound is silent or not finite, too short or too long, or was recorded at a lower rate.
    """
    if rate < RATE:
        raise UnusableError(f"recorded at {rate} Hz; at least {RATE} are needed")
    if not np.isfinite(sound).all():
        raise UnusableError("it has values that are not finite")
    if len(sound) and np.ptp(sound) == 0:
        raise UnusableError("silent")
    common = np.gcd(rate, RATE)
    sound = sound - (sound.mean() if len(sound) else 0)  # first, or the filter sees a step at each end
    if rate != RATE and len(sound):
        from scipy import signal  # takes a second to import

        sound = signal.resample_poly(sound, RATE // common, rate // common)
    frame = RATE // 100
    frames = len(sound) // frame
    if frames < 5:
        raise UnusableError(f"too short: {len(sound) / RATE:.3f} s")
    power = np.square(sound[: frames * frame]).reshape(frames, frame).mean(1)
    noise = 10 * np.log10(max(np.percentile(power, 5) / power.max(), 1e-9))
    margin, whole = int(_MARGIN * RATE), sound
    for quiet in np.arange(np.clip(noise + _ABOVE_NOISE, *_QUIET), _LOUD, 3):
        loud = np.flatnonzero(power > power.max() * 10 ** (quiet / 10))
        sound = whole[max(loud[0] * frame - margin, 0) : (loud[-1] + 1) * frame + margin]
        if len(sound) <= SAMPLES:
            break
    else:
        raise UnusableError(
            f"too long: {len(sound) / RATE:.2f} s without the silence, of at most {SAMPLES / RATE:.2f}"
        )
    if len(loud) < 5:
        raise UnusableError(f"too short: {len(loud) / 100:.2f} s without the silence")
    before = (SAMPLES - len(sound)) // 2
    padded = np.pad(sound, (before, SAMPLES - len(sound) - before))
    return np.round(padded * (32767 / np.abs(padded).max())).astype(np.int16)
