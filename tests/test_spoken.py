"""The spoken characters, by programs that stand in for espeak-ng and flite, and by the real ones where they are."""

import importlib.util
import itertools
import os
import shutil
import sys
import wave

import numpy as np
import pytest

from distill_jax import data
from distill_jax.data import _spoken

RATE = 8000
REAL = {name: shutil.which(name) for name in ("espeak-ng", "flite")}

PROGRAM = """#!/bin/sh
case "$1" in
  --version) echo "{version}" ;;
  --voices=variant) cat "{folder}/variants" ;;
  -lv) echo "Voices available: kal slt" ;;
  *)
    echo x >> "{folder}/runs"
    case "$1" in -v) text="$5" ;; *) text="$6" ;; esac
    test -f "{folder}/$2/$text.wav" || {{ echo "no such   voice" >&2; exit 1; }}
    test -s "{folder}/$2/$text.wav" || exit 0
    cp "{folder}/$2/$text.wav" "$4" ;;
esac
"""


def tone(hertz, seconds=0.3, rate=RATE, loud=0.3):
    return loud * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write(path, sound, rate=RATE, width=2, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        scaled = 128 + 127 * sound if width == 1 else 2 ** (8 * width - 1) * sound * 0.999
        file.writeframes(scaled.astype({1: np.uint8, 2: "<i2", 4: "<i4"}[width]).tobytes())
    return path


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A machine with two programs, five variants of one and two voices of the other, for three characters."""
    folder = tmp_path / "voices"
    variants = ["f1", "Mr serious", "m1", "klatt", "klatt2"]
    for i, variant in enumerate(variants):
        for j, accent in enumerate(("en-us", _spoken._ACCENTS[sorted(variants).index(variant)])):
            for k, character in enumerate("0AZ"):
                sound = tone(300 + 500 * k + 20 * i + 7 * j, rate=22050)
                write(folder / f"{accent}+{variant}" / f"{character}.wav", sound, 22050)
    for i, voice in enumerate(("kal", "slt")):
        for k, word in enumerate(("zero", "ay", "zee")):
            write(folder / voice / f"{word}.wav", tone(310 + 500 * k + 20 * i, rate=16000), 16000)
    lines = [f" 5  variant         --/M      {v:18} !v/{v:18} " for v in variants]
    (folder / "variants").write_text("\n".join(["Pty Language  File", *lines]) + "\n")
    for name, version in (
        ("espeak-ng", "eSpeak NG text-to-speech: 9.9  Data at: x"),
        ("flite", "flite-8.8 x"),
    ):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PROGRAM.format(version=version, folder=folder))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(shutil, "which", lambda name: found if (found := str(tmp_path / "bin" / name)) and
                        os.path.exists(found) else None)  # not a real one elsewhere  # fmt: skip
    monkeypatch.setattr(_spoken, "CHARACTERS", ("0", "A", "Z"))
    monkeypatch.setattr(_spoken, "RECORDINGS", (
        _spoken.Recordings("anna", lambda: tmp_path / "anna", "{}.wav".format, "AZ", "pip install anna"),
        _spoken.Recordings("bert", lambda: tmp_path / "bert", "{}.ogg".format, "0", "apt-get install bert"),
    ))  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_voices_are_in_one_split_each(programs, tmp_path):
    write(tmp_path / "anna" / "A.wav", tone(820, rate=RATE, loud=0.01))
    write(tmp_path / "anna" / "Z.wav", tone(1320, rate=44100), 44100)
    spoken = data.load("spoken", validation=3)
    assert (spoken.classes, spoken.class_names) == (3, ("0", "A", "Z"))
    assert len(spoken.train.id) + len(spoken.validation.id) + len(spoken.test.id) == 36
    splits = (spoken.train, spoken.validation, spoken.test, spoken.people)
    np.testing.assert_array_equal(np.sort(np.concatenate([split.id for split in splits])), np.arange(38))
    origins = spoken.origins
    groups = [{origins.group_names[g] for g in origins.group[origins.of[split.id]]} for split in splits]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups)) == 7
    assert "flite slt" in groups[2]
    assert groups[3] == {"anna"}
    group_of = [origins.group_names[g] for g in origins.group]
    klatt = [name for name, group in zip(origins.names, group_of, strict=True) if group.endswith("klatt")]
    assert len(klatt) == 4  # klatt and klatt2, in two accents each
    for split in splits:
        assert [x.dtype for x in split] == [np.int64, np.uint8, np.int32]
        assert split.image.shape[1:] == (32, 32, 1)
        # The tones of 0, A and Z are in rising bands
        band = split.image[:, :, 16, 0].argmax(1)
        order = [band[split.label == label] for label in range(3) if (split.label == label).any()]
        assert all(a.max() < b.min() for a, b in itertools.pairwise(order))
    reader = "; pip install soundfile (to read klettres and saytime)"
    assert spoken.source == (
        "36 sounds by eSpeak NG text-to-speech: 9.9, flite 8.8 and 2 recordings of people, 7 groups of voices; "
        f"4 were dropped (for more: apt-get install bert{'' if importlib.util.find_spec('soundfile') else reader})"
    )
    assert origins.dropped == (
        *(f"flite {v}: flite does not have this voice" for v in ("awb", "kal16", "rms")),
        "bert: not installed; apt-get install bert",
    )
    assert [len(part.id) for part in data.load("spoken", validation=3, seed=5)[2:5]] == [
        len(p.id) for p in spoken[2:5]
    ]

    # Rendered once, drawn anew in another form
    runs = (programs / "runs").read_text()
    wide = data.load("spoken/waveform", validation=3)
    assert wide.train.image.shape[1:] == (7936,)
    assert (programs / "runs").read_text() == runs
    np.testing.assert_array_equal(wide.test.id, spoken.test.id)
    for sound in (*wide.test.image, *wide.people.image):
        assert np.abs(sound).max() == 1
        assert sound.dtype == np.float32
    drawn = data.sound.mel_image(wide.people.image, rate=8000)
    np.testing.assert_allclose(spoken.people.image, 255 * np.asarray(drawn), atol=0.51)
    assert data.load("spoken", size=16).test.image.shape[1:] == (16, 16, 1)
    # A damaged cache is rendered anew
    (file,) = (tmp_path / "cache" / "distill_jax").glob("spoken-*.npz")
    file.write_bytes(file.read_bytes()[:-100])
    again = data.load("spoken", validation=3)
    np.testing.assert_array_equal(again.test.image, spoken.test.image)
    assert len((programs / "runs").read_text()) == 2 * len(runs)


def test_what_is_dropped_is_listed(programs, tmp_path):
    first = programs / "en-us+f1"
    write(first / "0.wav", np.zeros(4000))
    (first / "A.wav").write_bytes((first / "A.wav").read_bytes()[:3000])
    (first / "Z.wav").write_bytes(b"")  # the program says nothing, and must not repeat A
    (programs / "en-us+klatt" / "Z.wav").unlink()
    for name in ("0", "A", "Z"):
        shutil.copy(programs / "en-us+m1" / f"{name}.wav", programs / "en-us+klatt2" / f"{name}.wav")
    write(tmp_path / "anna" / "A.wav", tone(800, rate=4000), 4000)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "0.ogg").write_bytes(b"no Ogg file")
    spoken = data.load("spoken")
    assert spoken.people is None
    dropped = dict(line.split(": ", 1) for line in spoken.origins.dropped)
    assert dropped["espeak-ng en-us+f1 0"] == "silent"
    assert dropped["espeak-ng en-us+f1 A"] == "truncated: it has 1478 of 6615 samples"
    assert dropped["espeak-ng en-us+f1 Z"] == "espeak-ng failed with status 0"
    assert dropped["espeak-ng en-us+klatt Z"] == "espeak-ng failed with status 1 no such voice"
    assert dropped["espeak-ng en-us+m1"] == "sounds as espeak-ng en-us+klatt2 does"
    assert dropped["anna A"] == "recorded at 4000 Hz; at least 8000 are needed"
    assert dropped["anna Z"].startswith("FileNotFoundError")
    assert "soundfile" in dropped["bert 0"] or "cannot be read" in dropped["bert 0"]
    assert len(dropped) == 11
    assert (
        len(spoken.origins.of) == len(spoken.train.id) + len(spoken.validation.id) + len(spoken.test.id) == 29
    )
    assert not any("\n" in line for line in spoken.origins.dropped)
    # Voices that sound the same cannot be in two splits
    group = dict(zip(spoken.origins.names, spoken.origins.group, strict=True))
    assert len({g for n, g in group.items() if n.endswith(("+m1", "+klatt2", "+klatt"))}) == 1


def test_programs_that_are_missing(programs, tmp_path):
    (tmp_path / "bin" / "flite").unlink()
    spoken = data.load("spoken")
    assert "flite: not installed; apt-get install flite" in spoken.origins.dropped
    assert "apt-get install flite" in spoken.source
    (programs / "variants").write_text(" 5  variant  --/M  m1  !v/m1\n 5  variant  --/M  f1  !v/f1\n")
    with pytest.raises(
        data.DataError, match=r"espeak-ng: expected at least 3 variants of voices, .* found 2"
    ):
        data.load("spoken")
    espeak = tmp_path / "bin" / "espeak-ng"
    espeak.write_text("no program")
    with pytest.raises(data.DataError, match=r"espeak-ng cannot be run, OSError: .*: apt-get install"):
        data.load("spoken")
    espeak.unlink()
    with pytest.raises(
        data.DataError, match="synthesised by espeak-ng, which is not installed: apt-get inst"
    ) as e:
        data.load("spoken")
    assert "\n" not in str(e.value)


def test_a_program_that_hangs_is_not_a_dropped_voice(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(_spoken, "_TIMEOUT", 0.1)
    (tmp_path / "bin" / "espeak-ng").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(5)\n")
    with pytest.raises(data.DataError, match=r"espeak-ng cannot be run, TimeoutExpired: "):
        data.load("spoken")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("spoken", {"data_dir": "."}, "data_dir must not be given for 'spoken', which is synthesised"),
        ("spoken", {"size": 4}, "size must be an integer of at least 8, got 4"),
        (
            "spoken/waveform",
            {"size": 32},
            "size must not be given for 'spoken/waveform', which are no pictures",
        ),
        ("spoken", {"validation": 0}, "validation must be from 1 to"),
    ],
)
def test_arguments_that_are_refused(programs, name, options, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, **options)


# One sound


def test_a_sound_is_resampled_freed_of_silence_and_centred():
    for rate in (8000, 22050, 44100):
        pad = np.zeros(rate // 2)
        sound = _spoken.prepare(0.1 + np.concatenate([pad, tone(1000, 0.3, rate), pad, pad]), rate)
        assert (sound.dtype, sound.shape) == (np.int16, (7936,))
        assert np.abs(sound.astype(int)).max() == 32767
        loud = np.flatnonzero(np.abs(sound) > 3000)
        assert abs(np.ptp(loud) - 0.3 * 8000) < 60
        assert abs(loud.mean() - 7936 / 2) < 60
        assert np.argmax(np.abs(np.fft.rfft(sound))) == round(1000 * 7936 / 8000)


def test_a_quiet_end_is_kept_unless_the_recording_is_noisy():
    quiet = np.concatenate([tone(500), tone(2000, 0.2, loud=0.3 * 10 ** (-35 / 20)), np.zeros(4000)])
    assert np.ptp(np.flatnonzero(_spoken.prepare(quiet, RATE))) > 0.49 * RATE
    noise = np.random.default_rng(0).normal(size=16000) * 0.3 * 10 ** (-35 / 20)
    noisy = np.concatenate([noise[:2500], tone(500), noise[:2500]])  # short enough as it is
    assert np.ptp(np.flatnonzero(_spoken.prepare(noisy, RATE))) < 0.4 * RATE


@pytest.mark.parametrize(
    ("sound", "rate", "message"),
    [
        (np.zeros(8000), RATE, "^silent$"),
        (np.full(8000, 0.5), RATE, "^silent$"),
        (np.zeros(0), RATE, r"too short: 0.000 s"),
        (tone(500, 0.04), RATE, r"too short: 0.040 s"),
        (
            np.concatenate([np.zeros(4000), tone(500, 0.02), np.zeros(4000)]),
            RATE,
            "too short: 0.0. s without",
        ),
        (tone(500, 1.2), RATE, "too long: 1.20 s without the silence, of at most 0.99"),
        (np.r_[tone(500), np.nan], RATE, "values that are not finite"),
        (tone(500), 7999, "recorded at 7999 Hz; at least 8000"),
    ],
)
def test_a_sound_that_cannot_be_used(sound, rate, message):
    with pytest.raises(_spoken.UnusableError, match=message):
        _spoken.prepare(sound, rate)


def test_wave_files(tmp_path):
    sound = tone(500)
    for width, near in ((1, 0.01), (2, 1e-3)):
        read, rate = _spoken.read(write(tmp_path / "x.wav", sound, 11025, width))
        assert rate == 11025
        np.testing.assert_allclose(read, sound, atol=near)
    stereo = write(tmp_path / "x.wav", np.stack([sound, 0 * sound], 1).ravel(), channels=2)
    np.testing.assert_allclose(_spoken.read(stereo)[0], sound / 2, atol=1e-3)
    with pytest.raises(_spoken.UnusableError, match="samples of 32 bits; 8 and 16 are read"):
        _spoken.read(write(tmp_path / "x.wav", sound, width=4))
    for content in (b"", b"RIFF", b"no sound at all", (tmp_path / "x.wav").read_bytes()[:40]):
        (tmp_path / "x.wav").write_bytes(content)
        with pytest.raises(_spoken.UnusableError, match=r"^cannot be read, \w+"):
            _spoken.read(tmp_path / "x.wav")


def test_truncated_files_of_other_kinds(tmp_path):
    """soundfile would return what is there, so this is found before it is asked."""
    ogg = b"".join(b"OggS\0" + bytes([last]) + bytes(20) + b"\2\3\4" + b"1234567" for last in (2, 4))
    sun = b".snd" + b"".join(n.to_bytes(4, "big") for n in (24, 6, 1, 8000, 1)) + b"123456"
    for name, content, cuts in (("x.ogg", ogg, (30, len(ogg) // 2, 40, 70)), ("x.au", sun, (11, 25, 29))):
        path = tmp_path / name
        for cut in (*cuts, len(content) - 1):
            path.write_bytes(content[:cut])
            with pytest.raises(
                _spoken.UnusableError, match=r"^truncated: the file ends before the sound does"
            ):
                _spoken.read(path)
        assert _spoken._is_whole(content)
    assert _spoken._is_whole(sun[:8] + b"\xff" * 4)  # of unknown length
    assert _spoken._is_whole(b"no header")


# The real programs and recordings


@pytest.mark.skipif(None in REAL.values(), reason="espeak-ng and flite are not both installed")
def test_real_voices(tmp_path):
    _, voices, _ = _spoken._voices()
    groups = {voice.group for voice in voices}
    assert len(groups) > 20
    for name in ("espeak-ng en-us+m3", "flite kal"):
        (voice,) = (voice for voice in voices if voice.name == name)
        sounds, dropped = _spoken._speak(voice, tmp_path / "sound")
        assert not dropped
        assert [label for label, _ in sounds] == list(range(36))
        length = np.array([np.ptp(np.flatnonzero(sound)) for _, sound in sounds]) / RATE
        assert length.max() < 0.9
        # "double u" is the longest letter
        assert length[_spoken.CHARACTERS.index("W")] == length[10:].max()


@pytest.mark.parametrize("person", _spoken.RECORDINGS, ids=[p.name for p in _spoken.RECORDINGS])
def test_real_recordings(person):
    files = [path for _, path in _spoken._files(person)]
    if not any(path.is_file() for path in files):
        pytest.skip(f"needs {person.install}")
    if files[0].suffix != ".wav":
        pytest.importorskip("soundfile")
    dropped: list[str] = []
    sounds = list(_spoken._recorded(person, dropped))
    assert not dropped
    if files[0].suffix == ".ogg":
        raw = [path.read_bytes() for path in files]
        assert not [r for r in raw if _spoken._is_whole(r[: len(r) // 2]) or not _spoken._is_whole(r)]
    assert len(sounds) == len(person.characters)
