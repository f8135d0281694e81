"""Makes three image data sets that have no config of their own, to try how kd_mnist chooses its settings.

    python experiments/benchmarks/make_image_sets.py linear                    # random pixels, a linear teacher
    python experiments/benchmarks/make_image_sets.py mnist14                   # MNIST at 14×14 with noise; needs MNIST
    python experiments/benchmarks/make_image_sets.py glyphs --fonts DIRECTORY  # digits in the fonts of a directory

Each is written to DATA.npz with x_train, y_train, x_test and y_test, for `kd_mnist.py --dataset DATA.npz`. The test
glyphs are in font families that no training glyph is in.
"""

import argparse
import collections
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distill_jax import data

DIGITS = "0123456789"


def linear() -> dict[str, np.ndarray]:
    """Draws 8×8 random pixels whose class is that of a noisy linear map: a student has nothing to learn from others."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 10))
    x = rng.integers(0, 256, (8000, 8, 8)).astype(np.uint8)
    y = ((x.reshape(-1, 64) / 127.5 - 1) @ weights + rng.gumbel(size=(8000, 10))).argmax(-1)
    return {"x_train": x[:5000], "y_train": y[:5000], "x_test": x[5000:], "y_test": y[5000:]}


def mnist14() -> dict[str, np.ndarray]:
    """Takes 6,000 training images of MNIST and all test images, at half the resolution and with noise."""
    mnist, rng = data.load("mnist"), np.random.default_rng(0)

    def small(images: np.ndarray) -> np.ndarray:
        x = images[..., 0].astype(np.float32).reshape(-1, 14, 2, 14, 2).mean((2, 4))
        return np.clip(x + rng.normal(0, 40, x.shape), 0, 255).astype(np.uint8)

    rows = rng.permutation(len(mnist.train.label))[:6000]
    return {
        "x_train": small(mnist.train.image[rows]),
        "y_train": mnist.train.label[rows].astype(np.int64),
        "x_test": small(mnist.test.image),
        "y_test": mnist.test.label.astype(np.int64),
    }


def glyphs(fonts: Path) -> dict[str, np.ndarray]:
    """Renders the ten digits in all fonts of a directory, each distorted; three quarters of the families train."""
    rng = np.random.default_rng(0)
    families = faces(fonts)
    names = sorted(families)
    rng.shuffle(names)
    cut = int(len(names) * 0.75)
    made = {}
    for split, chosen, copies in (("train", names[:cut], 1), ("test", names[cut:], 2)):
        usable = [font for name in chosen for path in families[name] if (font := load_font(path)) is not None]
        pairs = [(font, c) for font in usable for _ in range(copies) for c in range(len(DIGITS))]
        images = [distorted(font, DIGITS[c], rng) for font, c in pairs]
        order = rng.permutation(len(images))
        made[f"x_{split}"] = np.stack(images)[order]
        made[f"y_{split}"] = np.array([c for _, c in pairs], np.int64)[order]
        print(f"{split}: {len(chosen)} families, {len(usable)} faces, {len(images)} images")
    return made


def faces(fonts: Path) -> dict[str, list[Path]]:
    """Lists the font files of a directory by family, which is the first word of a face's name."""
    found, seen = collections.defaultdict(list), set()
    for path in sorted(fonts.rglob("*")):
        if path.suffix.lower() not in (".ttf", ".otf"):
            continue
        try:
            name: Any = ImageFont.truetype(str(path), 40).getname()
        except OSError:
            continue
        if name not in seen:
            seen.add(name)
            found[name[0].split()[0] if name[0] else "?"].append(path)
    return found


def load_font(path: Path) -> ImageFont.FreeTypeFont | None:
    """Loads a font; None if a digit is blank, or looks like another one or like a character that is missing."""
    font = ImageFont.truetype(str(path), 40)
    try:
        drawn = [np.asarray(drawing(font, character)) for character in (*DIGITS, "\ue7f3")]
    except (OSError, ValueError):
        return None
    if any(image.sum() == 0 for image in drawn[:-1]) or len({image.tobytes() for image in drawn}) < len(
        DIGITS
    ):
        return None
    return font


def drawing(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """Draws a character, white on black."""
    image = Image.new("L", (96, 96), 0)
    ImageDraw.Draw(image).text((24, 24), character, font=font, fill=255)
    return image


def distorted(
    font: ImageFont.FreeTypeFont, character: str, rng: np.random.Generator, side: int = 28, noise: float = 30
) -> np.ndarray:
    """Renders a character rotated, sheared, stretched and moved at random, with another contrast and noise."""
    image = drawing(font, character)
    left, top, right, bottom = image.getbbox() or (0, 0, 96, 96)
    scale = max(right - left, bottom - top) / (side * rng.uniform(0.5, 0.85))
    angle, shear, stretch = np.deg2rad(rng.uniform(-18, 18)), rng.uniform(-0.35, 0.35), rng.uniform(0.75, 1.3)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag([stretch, 1 / stretch]) * scale
    centre = np.array([(left + right) / 2, (top + bottom) / 2])
    move = centre - matrix @ (np.array([side / 2, side / 2]) + rng.uniform(-3, 3, 2))
    coefficients = (*matrix[0], move[0], *matrix[1], move[1])
    small = image.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    x = np.asarray(small, np.float32) * rng.uniform(0.4, 1)
    x = x + rng.normal(0, noise, x.shape) + rng.uniform(0, 50)
    return np.clip(x, 0, 255).astype(np.uint8)


def main() -> None:
    """Reads the command line and writes the data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=("linear", "mnist14", "glyphs"), help="which data set to make")
    parser.add_argument("--fonts", type=Path, help="directory with .ttf and .otf files, for glyphs")
    options = parser.parse_args()
    if options.set == "glyphs" and not (options.fonts and options.fonts.is_dir()):
        parser.error(f"--fonts must be a directory with font files, got {options.fonts}")
    made: dict[str, Any] = {"linear": linear, "mnist14": mnist14, "glyphs": lambda: glyphs(options.fonts)}[
        options.set
    ]()
    np.savez_compressed(f"{options.set}.npz", **made)
    print(f"{options.set}.npz: {len(made['y_train'])} training and {len(made['y_test'])} test images")


if __name__ == "__main__":
    main()
