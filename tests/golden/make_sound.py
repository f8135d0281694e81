"""Makes sound.json: log-mel spectrograms in float64 by librosa (0.11.0) and torchaudio (2.11.0).

    python make_sound.py

The sound is drawn by :func:`draw`, as in the test.
"""

import json
from pathlib import Path

import numpy as np

CASES = {
    "librosa/32": {"n_fft": 512, "hop": 256, "mels": 32, "rate": 8000},
    "librosa/peak": {"n_fft": 256, "hop": 500, "mels": 13, "rate": 8000, "peak": True, "dynamic_range": 30.0},
    "librosa/band": {"n_fft": 300, "hop": 700, "mels": 7, "rate": 8000, "low": 300.0, "high": 3400.0, "scale": "htk"},
    "torchaudio/htk": {
        "n_fft": 400, "hop": 600, "mels": 20, "rate": 16000, "scale": "htk", "area": False, "padding": "reflect",
    },
    "torchaudio/slaney": {"n_fft": 256, "hop": 900, "mels": 11, "rate": 16000, "padding": "reflect"},
}  # fmt: skip


def draw():
    """A tone that rises from 100 to 3700 Hz and fades, and noise; float64 ``[7936]``."""
    t = np.arange(7936) / 8000
    noise = np.random.RandomState(5).normal(size=t.shape)
    return np.sin(2 * np.pi * (100 * t + 1800 * t**2)) * np.exp(-2 * t) + 0.02 * noise


def by_librosa(x, n_fft, hop, mels, rate, peak=False, dynamic_range=80.0, low=0.0, high=None, scale="slaney"):
    import librosa

    power = librosa.feature.melspectrogram(
        y=x, sr=rate, n_fft=n_fft, hop_length=hop, n_mels=mels, fmin=low, fmax=high, htk=scale == "htk"
    )
    return librosa.power_to_db(power, ref=np.max if peak else 1.0, top_db=dynamic_range)


def by_torchaudio(x, n_fft, hop, mels, rate, padding, scale="slaney", area=True):
    import torch
    import torchaudio

    torch.set_default_dtype(torch.float64)
    mel = torchaudio.transforms.MelSpectrogram(
        rate, n_fft=n_fft, hop_length=hop, n_mels=mels, mel_scale=scale, norm="slaney" if area else None
    )
    decibel = torchaudio.transforms.AmplitudeToDB("power", top_db=80.0)
    return decibel(mel(torch.tensor(x))).numpy()


def main():
    constants = {}
    for name, options in CASES.items():
        make = by_librosa if name.startswith("librosa") else by_torchaudio
        decibel = make(draw(), **options)
        # Of the large one every third band and frame
        kept = decibel[::3, ::3] if decibel.size > 1000 else decibel
        constants[name] = {"shape": decibel.shape, "decibel": np.round(kept, 6).tolist()}
    path = Path(__file__).with_name("sound.json")
    path.write_text(json.dumps(constants, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
