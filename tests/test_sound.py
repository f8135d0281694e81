"""Log-mel spectrograms against librosa and torchaudio, and what the augmentation of sound does."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_sound import CASES, draw

from distill_jax.data import sound

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("sound.json").read_text())
KEY, RATE = jax.random.key(0), 8000
TIME = np.arange(RATE) / RATE


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", CASES)
def test_log_mel_equals_librosa_and_torchaudio(name, dtype):
    with jax.enable_x64(dtype == np.float64):
        decibel = sound.log_mel(draw().astype(dtype), **CASES[name])
    assert decibel.dtype == dtype
    assert list(decibel.shape) == GOLDEN[name]["shape"]
    kept = decibel[::3, ::3] if decibel.size > 1000 else decibel
    near = 1e-6 if dtype == np.float64 else 1e-4
    np.testing.assert_allclose(kept, GOLDEN[name]["decibel"], atol=near, rtol=0)


def test_each_sound_of_a_batch_is_for_itself():
    one = draw().astype(np.float32)
    batch = np.stack([one, 1e-4 * one, 0 * one]).reshape(3, 1, -1)
    options = CASES["librosa/32"]
    decibel = sound.log_mel(batch, **options, frames=20)
    assert decibel.shape == (3, 1, 32, 20)
    np.testing.assert_allclose(decibel[0, 0], sound.log_mel(one, **options)[:, :20], atol=1e-5)
    np.testing.assert_allclose(decibel[2], -100)
    half = sound.log_mel(jnp.asarray(one, jnp.bfloat16), **options)
    assert half.dtype == jnp.float32


def test_mel_image():
    one = draw().astype(np.float32)
    image = sound.mel_image(np.stack([one, 1e-7 * one, 0 * one]), rate=RATE)
    assert image.shape == (3, 32, 32, 1)
    expected = sound.log_mel(one, rate=RATE, n_fft=512, hop=256, frames=32, peak=True)
    np.testing.assert_allclose(image[0, ..., 0], 1 + expected / 80, atol=1e-6)
    np.testing.assert_allclose(image[1], image[0], atol=1e-4)  # as loud as it may be
    assert not image[2].any()
    one[3000] = np.nan  # is not taken for silence
    assert np.isnan(sound.mel_image(one, rate=RATE)).any()
    # The tone rises, so its band does, and the picture spans the whole sound
    for size in (16, 48):
        tone = np.sin(2 * np.pi * (100 * TIME + 1800 * TIME**2))
        band = np.argmax(sound.mel_image(tone, rate=RATE, height=size, width=size)[..., 0], axis=0)
        assert (np.diff(band) >= 0).all()
        assert band[0] < size / 5
        assert band[-2] > 0.9 * size


def test_log_mel_has_a_gradient_also_of_silence():
    options = {"rate": RATE, "n_fft": 64, "hop": 32, "mels": 4}
    gradient = jax.jit(jax.grad(lambda x: sound.log_mel(x, **options, peak=True).sum()))
    x = np.random.default_rng(0).normal(size=128).astype(np.float32)
    with jax.enable_x64(True):
        wide, direction = x.astype(np.float64), np.cos(np.arange(128.0))
        near = [sound.log_mel(wide + s * direction, **options, peak=True).sum() for s in (1e-6, -1e-6)]
        np.testing.assert_allclose(gradient(wide) @ direction, (near[0] - near[1]) / 2e-6, rtol=1e-5)
    assert np.isfinite(gradient(np.zeros(128, np.float32))).all()


BAD = [
    (
        {"waveform": np.zeros(900, np.int16)},
        "waveform must be floats, got int16: divide 16-bit samples by 32768",
    ),
    ({"waveform": np.zeros((2, 0))}, r"waveform must be \[..., samples\] and not empty, got shape \(2, 0\)"),
    ({"rate": 0}, "rate must be positive"),
    ({"hop": 0}, "hop must be an integer of at least 1"),
    ({"n_fft": 2.5}, "n_fft must be an integer"),
    ({"frames": 32}, "waveform must have at least 7936 samples for 32 frames, got 900: pad"),
    ({"low": 100, "high": 5000}, r"0 ≤ low < high ≤ rate / 2 = 4000, got 100 and 5000"),
    ({"low": -1.0}, "0 ≤ low"),
    ({"scale": "bark"}, "scale must be one of 'slaney', 'htk', got 'bark'"),
    ({"padding": "edge"}, "padding must be one of"),
    ({"padding": "reflect", "n_fft": 2048}, "more than n_fft // 2 = 1024 samples to be mirrored, got 900"),
    (
        {"mels": 128, "n_fft": 128},
        "of 128 bands from 0 to 4000 Hz, [0-9]+ hold none of the freq.*n_fft=128, 62.5",
    ),
    ({"dynamic_range": -80.0}, "dynamic_range must be positive"),
    ({"floor": 0}, "floor must be positive"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_log_mel_refuses(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        sound.log_mel(**{"waveform": np.zeros(900, np.float32), "rate": RATE} | changes)
    assert "\n" not in str(error.value)


def test_mel_image_refuses():
    with pytest.raises(ValueError, match="waveform must have at least width - 1 = 31 samples, got 30"):
        sound.mel_image(np.zeros(30), rate=RATE)
    with pytest.raises(ValueError, match="width must be an integer of at least 2, got 1"):
        sound.mel_image(np.zeros(30), rate=RATE, width=1)
    assert sound.mel_image(np.zeros(31), rate=RATE).shape == (32, 32, 1)


# Augmentation


AUGMENTATIONS = {
    "speed": functools.partial(sound.random_speed, factor=1.2),
    "shift": functools.partial(sound.random_shift, samples=100),
    "gain": functools.partial(sound.random_gain, decibel=6.0),
    "noise": sound.random_noise,
}
NOTHING = {
    "speed": functools.partial(sound.random_speed, factor=1.0),
    "shift": functools.partial(sound.random_shift, samples=0),
    "gain": functools.partial(sound.random_gain, decibel=0.0),
    "noise": functools.partial(sound.random_noise, low=200.0, high=200.0),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_is_a_pure_function_of_its_key(name):
    augment = AUGMENTATIONS[name]
    waveform = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 700)), jnp.float32)
    out = augment(KEY, waveform)
    assert (out.shape, out.dtype) == (waveform.shape, waveform.dtype)
    np.testing.assert_array_equal(out, augment(KEY, waveform))
    assert not np.array_equal(out, augment(jax.random.key(1), waveform))
    changes = np.asarray(out - waveform).reshape(6, -1)
    assert len(np.unique(changes, axis=0)) == 6  # each sound is changed for itself
    assert augment(KEY, waveform.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(NOTHING[name](KEY, waveform), waveform, atol=1e-5)
    assert not augment(KEY, jnp.zeros((2, 50))).any()  # silence stays silent
    assert np.isfinite(jax.grad(lambda x: augment(KEY, x).sum())(jnp.zeros((2, 50)))).all()
    for bad, message in ((np.zeros((2, 9), int), "waveform must be floats"), ([1.0], "must be an array")):
        with pytest.raises(ValueError, match=message):
            augment(KEY, bad)
    with pytest.raises(ValueError, match="key must be one random key"):
        augment(3, waveform)


def test_speed_changes_the_pitch_by_at_most_the_factor():
    tone = jnp.asarray(np.tile(np.sin(2 * np.pi * 1000 * TIME) * np.hanning(RATE), (64, 1)), jnp.float32)
    faster = sound.random_speed(KEY, tone, 1.25)
    peak = np.argmax(np.abs(np.fft.rfft(faster)), axis=-1)  # 1 s long: in Hz
    assert peak.min() >= 799
    assert peak.max() <= 1251
    assert peak.min() < 840
    assert peak.max() > 1200
    # What Lanczos's kernel makes of a tone is a tone: little of the power lies elsewhere
    power = np.abs(np.fft.rfft(faster)) ** 2
    near = np.abs(np.arange(power.shape[1]) - peak[:, None]) < 10
    assert ((power * ~near).sum(1) / power.sum(1)).max() < 1e-3


def test_speed_finds_its_place_in_a_long_sound():
    """Among 2²⁰ samples, float32 numbers are an eighth of a sample apart."""
    samples, cycles = 2**20, 0.1
    tone = jnp.sin(2 * jnp.pi * (jnp.arange(samples) % 10) * cycles)
    draw = jax.random.uniform(KEY, (1,), minval=-1, maxval=1)
    middle = (samples - 1) / 2
    place = middle + (np.arange(samples) - middle) * np.exp(np.log(1.1) * np.float64(draw))
    inside = (place > 4) & (place < samples - 5)
    found = sound.random_speed(KEY, tone, 1.1)
    np.testing.assert_allclose(found[inside], np.sin(2 * np.pi * place * cycles)[inside], atol=0.01)


def test_shift_moves_by_whole_samples():
    click = jnp.zeros((200, 41)).at[:, 20].set(1)
    moved = np.asarray(sound.random_shift(KEY, click, 5))
    assert set(np.argmax(moved, axis=1)) == set(range(15, 26))
    assert (moved.sum(1) == 1).all()
    assert (np.asarray(sound.random_shift(KEY, jnp.ones((200, 41)), 5)).sum(1).min(), 36) == (36, 36)


def test_gain_is_uniform_in_decibels():
    gain = 20 * np.log10(np.asarray(sound.random_gain(KEY, jnp.ones((500, 1)), 6.0))[:, 0])
    assert np.abs(gain).max() <= 6.001
    assert gain.min() < -5.7
    assert gain.max() > 5.7
    assert np.abs(gain.mean()) < 0.6


def test_noise_has_the_ratio_and_the_tilt_that_were_asked_for():
    tone = jnp.asarray(np.tile(np.sin(2 * np.pi * 1000 * TIME), (100, 1)), jnp.float32)
    noise = np.asarray(sound.random_noise(KEY, tone, low=5.0, high=30.0, tilt=2.0)) - np.asarray(tone)
    ratio = -10 * np.log10((noise**2).mean(1) / 0.5)
    assert ratio.min() >= 4.99
    assert ratio.max() <= 30.01
    assert np.ptp(ratio) > 20
    power = np.abs(np.fft.rfft(noise)) ** 2
    slope = np.log(power[:, 30:60].mean(1) / power[:, 2000:3000].mean(1)) / np.log(2500 / 45)
    assert slope.min() > -0.2
    assert slope.max() < 2.2
    assert np.ptp(slope) > 1.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sound.random_speed(KEY, x, 0.8), "factor must be at least 1, got 0.8"),
        (lambda x: sound.random_shift(KEY, x, 1.5), "samples must be an integer of at least 0"),
        (lambda x: sound.random_gain(KEY, x, -1.0), "decibel must not be negative"),
        (
            lambda x: sound.random_noise(KEY, x, low=30.0, high=10.0),
            "low must be at most high, got 30.0 and 10.0",
        ),
        (lambda x: sound.random_noise(KEY, x, tilt=-1.0), "tilt must not be negative"),
    ],
)
def test_augmentation_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 50)))


# Augmentation of pictures

ON_PICTURES = {
    "warp": functools.partial(sound.random_warp, time=1.2, frequency=1.1, shift=2.0),
    "response": functools.partial(sound.random_response, decibel=6.0),
    "background": sound.random_background,
    "mask": functools.partial(sound.random_mask, time=4, frequency=4),
}
SAME = {
    "warp": sound.random_warp,
    "response": functools.partial(sound.random_response, decibel=0.0),
    "background": functools.partial(sound.random_background, low=200.0, high=200.0),
    "mask": sound.random_mask,
}


@pytest.mark.parametrize("name", ON_PICTURES)
def test_an_augmentation_of_pictures_is_a_pure_function_of_its_key(name):
    change = ON_PICTURES[name]
    picture = np.random.default_rng(0).uniform(0.1, 0.9, (2, 3, 24, 20, 1)).astype(np.float32)
    picture[..., 5, 5, 0] = 1.0  # the loudest pixel
    out = change(KEY, picture)
    assert (out.shape, out.dtype) == (picture.shape, picture.dtype)
    assert (out.min() >= 0, out.max() <= 1) == (True, True)
    np.testing.assert_array_equal(out, change(KEY, picture))
    assert not np.array_equal(out, change(jax.random.key(1), picture))
    changes = np.asarray(out - picture).reshape(6, -1)
    assert len(np.unique(changes, axis=0)) == 6  # each picture is changed for itself
    np.testing.assert_allclose(SAME[name](KEY, picture), picture, atol=1e-5)
    silent = change(KEY, jnp.zeros((2, 24, 20, 1), jnp.bfloat16))
    assert silent.dtype == jnp.bfloat16
    assert not silent.any()
    gradient = jax.jit(jax.grad(lambda x: change(KEY, x).sum()))(picture)
    assert np.isfinite(gradient).all()
    picture[0, 0, 0, 0] = np.nan  # is not taken for silence
    assert np.isnan(change(KEY, picture)[0, 0]).any()


def test_a_warp_stretches_time_about_the_middle_and_frequency_from_the_lowest_band():
    picture = jnp.zeros((300, 32, 33, 1)).at[:, 15, 16].set(1.0)  # band 16, counted from 1, in the middle
    bands, frames = np.arange(1, 33)[:, None], np.arange(33)

    def centres(**options):
        warped = np.asarray(sound.random_warp(KEY, picture, **options))[..., 0]
        total = warped.sum((1, 2))
        return ((warped * bands).sum((1, 2)) / total, (warped * frames).sum((1, 2)) / total)

    band, frame = centres(frequency=1.5, time=1.5)
    assert np.abs(frame - 16).max() < 0.01
    assert (16 / 1.5 - 0.5 < band.min() < 11.2, 23 < band.max() < 24.5) == (True, True)
    band, frame = centres(shift=3.0)
    assert np.abs(band - 16).max() < 0.01
    assert (12.99 < frame.min() < 13.2, 18.8 < frame.max() < 19.01) == (True, True)
    # A sound from frame 8 to frame 24 lasts at most 1.5 times as long, and at least that part
    long = jnp.zeros((300, 4, 33, 1)).at[:, :, 8:25].set(1.0)
    lasts = np.asarray(sound.random_warp(KEY, long, time=1.5))[:, 0, :, 0].sum(1) / 17
    assert (0.65 < lasts.min() < 0.7, 1.43 < lasts.max() < 1.51) == (True, True)


def test_a_response_is_a_smooth_curve_over_the_bands():
    picture = jnp.full((2000, 32, 4, 1), 0.5).at[:, 0, 0].set(0.0)
    curve = 80 * np.asarray(sound.random_response(KEY, picture, 6.0))[..., 1, 0]
    curve -= curve.mean(1, keepdims=True)
    assert 5.7 < curve.std() < 6.3
    assert np.abs(np.diff(curve, 2, axis=1)).max() < 3
    assert (
        np.abs(sound.random_response(KEY, picture, 6.0)).max((1, 2, 3)).min() > 0.9
    )  # the loudest is 1 again
    assert not sound.random_response(KEY, picture, 6.0)[:, 0, 0].any()


def test_a_background_is_as_loud_as_was_asked_for_and_its_power_is_added():
    picture = jnp.zeros((500, 16, 16, 1)).at[:, 3, 3].set(0.7)
    out = np.asarray(sound.random_background(KEY, picture, low=10.0, high=30.0, colour=0.0))[..., 0]
    np.testing.assert_allclose(out.max((1, 2)), 1, atol=1e-6)
    power = 10 ** (8 * (out - 1))
    power[:, 3, 3] = np.nan
    below = -10 * np.log10(np.nanmean(power, (1, 2)))  # the pixel itself is louder by the noise in it
    assert (9.5 < below.min() < 11.5, 28.5 < below.max() < 31) == (True, True)
    # χ² of four degrees of freedom: the standard deviation is 1/√2 of the mean
    assert np.nanstd(power, (1, 2)).mean() / np.nanmean(power, (1, 2)).mean() == pytest.approx(
        0.707, abs=0.05
    )
    # As loud as the sound itself, it doubles the mean power, and leaves the least pixel about as it is
    both = 10 ** (
        8 * np.asarray(sound.random_background(KEY, jnp.ones((64, 32, 32, 1)), low=0.0, high=0.0, colour=0))
    )
    assert np.mean(both.mean((1, 2, 3)) / both.min((1, 2, 3))) == pytest.approx(2, abs=0.1)


def test_a_mask_is_one_run_of_frames_and_one_of_bands():
    out = np.asarray(sound.random_mask(KEY, jnp.ones((400, 8, 10, 1)), time=3, frequency=8))[..., 0]
    frames, bands = ~out.any(1), ~out.any(2)
    kept = bands.sum(1) < 8  # else every frame is silent
    assert set(frames[kept].sum(1)) == {0, 1, 2, 3}
    assert set(bands.sum(1)) == set(range(9))
    np.testing.assert_array_equal(out, ~(frames[:, None, :] | bands[:, :, None]))
    for lost in (frames[kept], bands):  # one run has one beginning
        assert (np.diff(np.pad(lost, ((0, 0), (1, 0))).astype(int)) == 1).sum(1).max() == 1
    assert frames[kept].any(0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sound.random_warp(KEY, x, time=0.8), "time must be at least 1, got 0.8"),
        (lambda x: sound.random_warp(KEY, x, frequency=0.5), "frequency must be at least 1, got 0.5"),
        (lambda x: sound.random_warp(KEY, x, shift=-1.0), "shift must not be negative"),
        (lambda x: sound.random_response(KEY, x, -1.0), "decibel must not be negative"),
        (lambda x: sound.random_background(KEY, x, low=9.0, high=8.0), "low must be at most high, got 9.0 and 8.0"),
        (lambda x: sound.random_background(KEY, x, colour=-1.0), "colour must not be negative"),
        (lambda x: sound.random_mask(KEY, x, time=9), "time must be at most the size of the picture, 8, got 9"),
        (lambda x: sound.random_mask(KEY, x, frequency=1.5), "frequency must be an integer of at least 0"),
        (lambda x: sound.random_mask(KEY, x[0, :, :, 0]), "image must be"),
        (lambda x: sound.random_mask(KEY, x[:0]), "image must be"),
        (lambda x: sound.random_response(KEY, (255 * x).astype(jnp.uint8), 1.0), "image must be floats, got uint8"),
        (lambda x: sound.random_response(KEY, [1.0], 1.0), "image must be floats, got list"),
        (lambda x: sound.random_background(3, x), "key must be one random key"),
    ],
)  # fmt: skip
def test_augmentation_of_pictures_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 8, 8, 1)))
