"""Pictures, by opening them again."""

import matplotlib
import numpy as np
import pytest
from harness import pictures
from harness.pictures import comparisons, style
from matplotlib.image import imread


def look(path, inches):
    """Opens a picture: its size is right, and it is drawn on."""
    pixels = imread(path)
    assert pixels.shape[:2] == tuple(round(200 * x) for x in reversed(inches))
    inked = np.mean(pixels[..., :3].min(-1) < 0.9)
    assert 0.01 < inked < 0.7
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return pixels


def history(seed, epochs, errors):
    rng, epoch = np.random.default_rng(seed), np.arange(1, epochs + 1)
    return {"epoch": epoch.tolist(), "loss": (2.3 * np.exp(-epoch / 4) + 1e-3).tolist(),
            "validation_errors": rng.poisson(errors + 150 * np.exp(-epoch / 3)).tolist()}  # fmt: skip


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("errors", [0, 50])
def test_learning_curves(tmp_path, seeds, errors):
    histories = {
        "teacher": [history(s, 30, errors) for s in range(seeds)],
        "scratch": [history(s, 20, errors + 5) for s in range(seeds)],
        "pruned": [history(s, 1, errors + 2) for s in range(seeds)],
    }
    before = dict(matplotlib.rcParams)
    pictures.learning_curves(tmp_path / "a.png", histories, validation_size=500)
    look(tmp_path / "a.png", (7, 2.7))
    assert dict(matplotlib.rcParams) == before


def test_learning_curves_of_nothing_wrong(tmp_path):
    flat = {"epoch": [1, 2, 3], "loss": [0.0, 0.0, 0.0], "validation_errors": [0, 0, 0]}
    pictures.learning_curves(tmp_path / "a.png", {"x": [flat]}, validation_size=10)
    look(tmp_path / "a.png", (7, 2.7))


def test_learning_curves_refuse_a_shorter_history(tmp_path):
    short = history(0, 5, 1) | {"loss": [1.0]}
    with pytest.raises(ValueError, match=r"loss of x, seed 1 must be \[epochs\] = \(5,\), got \(1,\)"):
        pictures.learning_curves(tmp_path / "a.png", {"x": [history(0, 5, 1), short]}, validation_size=9)


def predictions(n, classes, sharpness, seed=0):
    """Labels, and probabilities that are right in most cases."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 4 * np.eye(classes)[labels]
    powers = np.exp(sharpness * logits)
    return labels, powers / powers.sum(-1, keepdims=True)


def test_reliability(tmp_path):
    bins = {}
    for sharpness, name in enumerate(("teacher", "scratch", "distilled", "patient"), 1):
        labels, probabilities = predictions(900, 10, sharpness)
        confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
        parts = np.array_split(np.argsort(confidence), 15)
        bins[name] = (np.array([confidence[part].mean() for part in parts]),
                      np.array([right[part].mean() for part in parts]),
                      np.array([len(part) for part in parts]))  # fmt: skip
    pictures.reliability(tmp_path / "a.png", bins)
    look(tmp_path / "a.png", (3.4, 4.4))
    with pytest.raises(ValueError, match=r"count of x must be \[bins\] = \(15,\), got \(2,\)"):
        pictures.reliability(tmp_path / "a.png", {"x": (*bins["teacher"][:2], np.ones(2))})


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_reliability_at_the_extremes(tmp_path, accuracy):
    bins = (np.array([0.1, 1.0]), np.full(2, accuracy), np.array([1, 1]))
    pictures.reliability(tmp_path / "a.png", {"x": bins})
    look(tmp_path / "a.png", (3.4, 4.4))


@pytest.mark.parametrize(("classes", "inches"), [(2, 3.4), (10, 3.4), (62, 7)])
def test_confusion(tmp_path, classes, inches):
    labels, probabilities = predictions(100 * classes, classes, 1)
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, probabilities.argmax(-1)), 1)
    names = [f"class {i}" for i in range(classes)] if classes == 2 else list(map(str, range(classes)))
    pictures.confusion(tmp_path / "a.png", counts, names, "student")
    look(tmp_path / "a.png", (inches, inches))


def test_confusion_colours_errors_alone(tmp_path):
    def coloured(counts):
        pictures.confusion(tmp_path / "a.png", np.array(counts), ["a", "b"])
        pixels = imread(tmp_path / "a.png")[..., :3]
        return np.mean(np.ptp(pixels, -1) > 0.2)

    assert coloured([[980, 0], [0, 990]]) == 0
    assert 0.1 < coloured([[980, 2], [0, 990]]) < 0.25  # a fourth of the field
    with pytest.raises(ValueError, match=r"matrix must be .* = \(2, 2\), got \(3, 3\)"):
        pictures.confusion(tmp_path / "a.png", np.eye(3), ["a", "b"])


def test_heat_map(tmp_path):
    values, faint = np.array([[31.0, 8.3, 12], [9, 40, 31]]), np.zeros((2, 3), bool)

    def coloured(faint, values=values):
        pictures.heat_map(
            tmp_path / "a.png", values, ["1", "4"], ["0", "0.5", "1"], xlabel="α", ylabel="T", label="errors",
            baseline=("scratch", 31.0), chosen=(0, 1), faint=faint,
        )  # fmt: skip
        pixels = look(tmp_path / "a.png", (3.4, 1.74))[..., :3]
        return np.mean(np.ptp(pixels[:, : int(0.7 * pixels.shape[1])], -1) > 0.1)

    assert coloured(faint) > 0.2
    assert coloured(~faint) == 0  # those that were stopped have no colour
    with pytest.raises(ValueError, match=r"values must be \[rows, columns\] = \(2, 3\), got \(3, 2\)"):
        coloured(faint, values.T)


def make_gallery(n=12, classes=10, channels=1):
    labels, teacher = predictions(n, classes, 0.3)
    images = np.random.default_rng(1).integers(0, 256, (n, 9, 8, channels), np.uint8)
    students = {name: predictions(n, classes, s)[1] for name, s in (("scratch", 2), ("distilled", 0.4))}
    return {"images": images, "labels": labels, "teacher_probabilities": teacher,
            "class_names": [str(i) for i in range(classes)], "students": students}  # fmt: skip


@pytest.mark.parametrize(
    ("n", "classes", "channels", "height"), [(12, 10, 1, 3.8), (16, 62, 3, 4.85), (1, 2, 1, 1.7)]
)
def test_gallery(tmp_path, n, classes, channels, height):
    pictures.gallery(tmp_path / "a.png", **make_gallery(n, classes, channels))
    look(tmp_path / "a.png", (7, height))


def test_gallery_prints_ink_on_white_and_long_names(tmp_path):
    given = make_gallery()
    given["images"] = np.zeros((12, 8, 8, 1), np.uint8)
    given["class_names"] = [f"a long name, {i}" for i in range(10)]
    pictures.gallery(tmp_path / "a.png", **given)
    pixels = look(tmp_path / "a.png", (7, 4.85))
    assert (pixels[150:190, 20:100, :3] == 1).all()  # inside the first image


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images", np.zeros((12, 8, 8), np.uint8), r"got uint8 \(12, 8, 8\)"),
        ("images", np.zeros((12, 8, 8, 1)), r"got float64 \(12, 8, 8, 1\)"),
        ("labels", np.zeros(3, int), r"labels must be \[n\] = \(12,\), got \(3,\)"),
        ("teacher_probabilities", np.ones((12, 3)), r"of teacher must be .* = \(12, 10\), got"),
        ("students", {"s": np.ones((12, 10))}, r"of s must sum to 1: pass softmax"),
    ],
)
def test_gallery_refuses(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        pictures.gallery(tmp_path / "a.png", **(make_gallery() | {name: value}))
    assert not list(tmp_path.iterdir())


def test_comparison(tmp_path):
    errors = {"scratch": [20, 22, 21], "better": [10, 13, 11], "unclear": [19, 25, 18]}
    pictures.comparison(tmp_path / "a.png", errors, baseline="scratch")
    look(tmp_path / "a.png", (3.4, 1.21))
    with pytest.raises(ValueError, match="baseline must be one of"):
        pictures.comparison(tmp_path / "b.png", errors, baseline="none")
    with pytest.raises(ValueError, match=r"errors of unclear must be \[seeds\] = \(3,\), got"):
        pictures.comparison(tmp_path / "b.png", errors | {"unclear": [1, 2]}, baseline="scratch")


def test_by_bytes(tmp_path):
    sizes = {"logits": [40, 20], "top-k": [8]}
    figures = {"errors, %": {"logits": np.ones((2, 3)), "top-k": np.full((1, 3), 2.0)}}
    pictures.by_bytes(tmp_path / "a.png", sizes, figures, levels={"scratch": {"errors, %": 3.0}})
    look(tmp_path / "a.png", (7, 2.7))
    with pytest.raises(ValueError, match=r"errors, % of top-k must be \[points, seeds\] = "):
        pictures.by_bytes(tmp_path / "a.png", sizes | {"top-k": [8, 9]}, figures, levels={})


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("lowest", [0.02, 0.9])
def test_curves(tmp_path, seeds, lowest):
    values = np.linspace(1, lowest, 4) * np.linspace(1, 1.2, seeds)[:, None]
    series = {"one": values, "another": values + 0.1}
    pictures.curves(tmp_path / "a.png", [10, 20, 50, 100], series, xlabel="x", ylabel="y", log_x=True)
    look(tmp_path / "a.png", (3.4, 2.7))
    with pytest.raises(ValueError, match=r"another must be \[seeds, points\] = "):
        pictures.curves(
            tmp_path / "b.png", [1, 2, 3, 4], series | {"another": values[:, :2]}, xlabel="x", ylabel="y"
        )


@pytest.mark.parametrize("seeds", [1, 3])
def test_tradeoffs(tmp_path, seeds):
    accuracy = {"prune": np.array([[98.0], [97.0]]) * np.ones(seeds), "fresh": np.full((1, seeds), 95.0)}
    costs = {
        "parameters": {"prune": np.array([5000, 100]), "fresh": np.array([100])},
        "ms": {"prune": np.array([0.12, 0.11]), "fresh": np.array([0.115])},
    }
    original = {"accuracy": 98.5}, {"parameters": 10_000, "ms": 0.13}
    pictures.tradeoffs(tmp_path / "a.png", {"accuracy": accuracy}, costs, original)
    look(tmp_path / "a.png", (7, 2.6))
    short = {"accuracy": accuracy | {"prune": np.ones((3, seeds))}}
    with pytest.raises(ValueError, match=r"accuracy of prune must be \[models, seeds\] = "):
        pictures.tradeoffs(tmp_path / "b.png", short, costs, original)


@pytest.mark.parametrize(
    ("low", "high"), [(0.11, 0.14), (95, 98), (0.7, 7000), (580, 11_000), (3, 25), (99, 101)]
)
def test_a_logarithmic_axis_has_three_ticks(low, high):
    axes = comparisons.Figure().subplots()
    axes.set(xscale="log", xlim=(low, high))
    comparisons.log_axis(axes.xaxis, low, high)
    ticks = axes.get_xticks()
    assert len(ticks) >= 3
    assert ((ticks >= low) & (ticks <= high)).all()
    texts = [axes.xaxis.get_major_formatter()(tick, 0) for tick in ticks]
    assert len(set(texts)) == len(texts)
    np.testing.assert_allclose(axes.get_xlim(), (low, high))


@pytest.mark.parametrize("seeds", [1, 3])
def test_code_widths(tmp_path, seeds):
    widths = [1, 2, 4, 8]
    errors = np.array([[0.3], [0.1], [0.02], [0.0]]) * np.linspace(1, 1.2, seeds)
    curves = {"trained": errors, "optimum": [0.3, 0.1, 0.02, 0.0]}
    pictures.code_widths(tmp_path / "a.png", widths, curves, ylabel="error", levels={"y": 0.01})
    look(tmp_path / "a.png", (3.4, 2.6))
    with pytest.raises(ValueError, match=r"optimum must be \[widths\] = \(4,\), got \(2,\)"):
        pictures.code_widths(tmp_path / "a.png", widths, curves | {"optimum": [1, 2]}, ylabel="error")


def test_reconstructions(tmp_path):
    images = np.random.default_rng(0).random((12, 8, 8, 1))
    pictures.reconstructions(tmp_path / "a.png", {"originals": images, "width 2": images**2})
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[:2] == (240, 1400)
    with pytest.raises(ValueError, match="width 2 must be"):
        pictures.reconstructions(tmp_path / "a.png", {"a": images, "width 2": images[:5]})


def test_models_look_different_and_reserved_looks_are_not_given_away():
    looks = style.looks_of([f"model {i}" for i in range(14)])
    assert len({str(look) for look in looks.values()}) == 14
    assert len({look["color"] for look in [*looks.values()][:8]}) == 8
    some = style.looks_of(["distilled", *(f"model {i}" for i in range(7))])
    assert len({str(look) for look in some.values()}) == 8
    assert some["distilled"] == style.looks_of(["distilled"])["distilled"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_frontier(tmp_path, seeds):
    rng = np.random.default_rng(0)
    errors = np.array([[1.5], [0.9], [1.1]]) + rng.uniform(0, 0.1, (3, seeds))
    measured = {"small": (np.array([800, 2000, 1200]), errors), "MLP": (np.array([1e6]), errors[:1])}
    pictures.frontier(tmp_path / "a.png", measured, {"someone": (3000, 0.8)})
    look(tmp_path / "a.png", (7, 3.6))
    with pytest.raises(ValueError, match=r"errors of small must be \[files, seeds\] = \(2,\), got \(3,\)"):
        pictures.frontier(tmp_path / "b.png", {"small": (np.array([1, 2]), errors)}, {})
