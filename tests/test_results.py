"""Tables, sentences and files against values written by hand; pictures by opening them again."""

import math

import numpy as np
import pytest
from harness import results as report


def model(errors, **figures):
    test = {"errors": errors, "accuracy": [1 - e / 1000 for e in errors], **figures}
    return {"parameters": 12345, "flops": 24690.0, "bytes": 49380, "test": test,
            "latency_ms": {"1": 0.0213, "256": 1.5}}  # fmt: skip


def make_results(scratch=(30, 34, 38), distilled=(20, 22, 27)):
    return {
        "experiment": "kd_mnist",
        "dataset": {"name": "digits", "source": "scikit-learn", "train": 1257, "validation": 180,
                    "test": 360},
        "config": {"temperature": 4.0, "loss": "kl", "omit_classes": [3]},
        "command": "python kd.py --a 1",
        "environment": {"jax": "0.10.0", "devices": ["cpu"]},
        "seconds": {"scratch": [1.0, 3.0], "total": 12.5},
        "models": {
            "teacher": model([10, 10, 10], f1=[0.99, 0.99, 0.99], agreement=None),
            "scratch": model(list(scratch), agreement=[0.95] * len(scratch)),
            "distilled": model(list(distilled), agreement=[0.98] * len(distilled)),
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([140, 148, 156], False, "148.0 ± 8.0"),
        ([137, 148.2, 160], False, "148 ± 12"),
        ([0.9741, 0.9752, 0.9763], True, "97.52 ± 0.11"),
        ([0.031, 0.0312, 0.0314], False, "0.03120 ± 0.00020"),
        ([1000, 3000], False, "2000 ± 1414"),
        ([98], False, "98"),
        ([0.0], False, "0"),
        ([0.98765], True, "98.77"),
        ([0.0312345], False, "0.0312"),
        ([1234.5], False, "1234"),
        ([5, 5, 5], False, "5 ± 0"),
        ([0.97, 0.97], True, "97.00 ± 0.00"),
        (np.float32([1, 2]), False, "1.50 ± 0.71"),
    ],
)
def test_mean_sd(values, percent, expected):
    assert report.mean_sd(values, percent=percent) == expected


def test_images_of_any_channels_can_be_drawn():
    whole, floats = np.uint8([0, 51, 255]), np.float32([-0.1, 0.2, 1.0])
    for images in (whole, floats):
        np.testing.assert_array_equal(report.drawable(images.reshape(1, 1, 1, 3)).ravel(), whole)
        drawn = report.drawable(images.reshape(1, 3, 1, 1))
        np.testing.assert_array_equal(drawn.ravel(), whole)
        assert (drawn.shape, drawn.dtype) == ((1, 3, 1, 1), np.uint8)
    two = report.drawable(np.float32([0.0, 0.4]).reshape(1, 1, 1, 2))
    assert (two.item(), two.dtype) == (51, np.uint8)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0]]])
def test_mean_sd_refuses(values):
    with pytest.raises(ValueError, match="expected finite values"):
        report.mean_sd(values)


def test_paired():
    mean, error, t = report.paired([30, 34, 38], [20, 22, 27])  # differences −10, −12, −11
    assert (mean, error, t) == pytest.approx((-11, 1 / math.sqrt(3), -11 * math.sqrt(3)))
    assert report.paired([1, 2], [3, 4]) == (2, 0, math.inf)
    assert report.paired([1, 2], [1, 2]) == (0, 0, 0)
    assert report.paired([5], [3]).mean == -2
    assert math.isnan(report.paired([5], [3]).t)
    with pytest.raises(ValueError, match="got 2 and 1"):
        report.paired([1, 2], [1])


@pytest.mark.parametrize(
    ("scratch", "distilled", "expected"),
    [
        ((30, 34, 38), (20, 22, 27), "Distillation cut the test errors from 34.0 to 23.0 "
         "(−32 %, 3 seeds, paired t = −19.1)."),
        ((20, 22, 27), (30, 34, 38), "Distillation did not help: the test errors rose from 23.0 to "
         "34.0 (+48 %, 3 seeds, paired t = 19.1)."),
        ((100, 110, 90), (99, 100, 97), "Distillation made no clear difference: 98.7 test errors "
         "instead of 100.0 (−1.3 %, 3 seeds, paired t = −0.3, within two standard errors)."),
        ((30, 34), (20, 24), "Distillation cut the test errors from 32.0 to 22.0 "
         "(−31 %, 2 seeds, the same difference in each)."),
        ((148,), (98,), "Distillation cut the test errors from 148 to 98 "
         "(−34 %, one seed: the spread is not known)."),
        ((98,), (148,), "Distillation did not help: the test errors rose from 98 to 148 "
         "(+51 %, one seed: the spread is not known)."),
        ((5, 7), (7, 5), "Distillation left the test errors as they were: 6.0 (2 seeds)."),
        ((0,), (0,), "Distillation left the test errors as they were: 0 "
         "(one seed: the spread is not known)."),
        ((0, 0), (3, 3), "Distillation did not help: the test errors rose from 0.0 to 3.0 "
         "(+3, 2 seeds, the same difference in each)."),
        ((30, 33), (20, 24), "Distillation cut the test errors from 31.5 to 22.0 (−30 %, 2 seeds)."),
    ],
)  # fmt: skip
def test_summary(scratch, distilled, expected):
    assert report.summary(make_results(scratch, distilled)) == expected


def test_summary_of_other_models():
    results = make_results()
    results["models"] = {"dense": model([10.0]), "pruned": model([12.0])}
    sentence = report.summary(results, baseline="dense", model="pruned", method="Self-pruning")
    assert sentence.startswith("Self-pruning did not help: the test errors rose from 10 to 12 (+20 %")
    with pytest.raises(ValueError, match=r"no model 'scratch' .* only \['dense', 'pruned'\]"):
        report.summary(results)


@pytest.mark.parametrize(("teacher", "named"), [(20, True), (30, True), (31, True), (19, False)])
def test_a_teacher_that_does_not_lead_is_named(teacher, named):
    results = make_results()
    results["models"]["teacher"]["validation"] = {"errors": [teacher] * 3}
    results["models"]["scratch"]["validation"] = {"errors": [20] * 3}
    sentence = report.summary(results)
    assert ("The teacher is no better than the scratch student" in sentence) == named
    assert sentence.startswith("Distillation cut the test errors from 34.0 to 23.0")


def test_table():
    expected = """
| model     | parameters |     errors |   accuracy % |         F1 % |  agreement % | ms at 1 / 256 |
| --------- | ---------: | ---------: | -----------: | -----------: | -----------: | ------------: |
| teacher   |     12,345 |     10 ± 0 | 99.00 ± 0.00 | 99.00 ± 0.00 |            – | 0.0213 / 1.50 |
| scratch   |     12,345 | 34.0 ± 4.0 | 96.60 ± 0.40 |            – | 95.00 ± 0.00 | 0.0213 / 1.50 |
| distilled |     12,345 | 23.0 ± 3.6 | 97.70 ± 0.36 |            – | 98.00 ± 0.00 | 0.0213 / 1.50 |
"""
    assert report.table(make_results()) == expected.strip()


def test_table_of_other_columns():
    results = make_results()
    results["models"] = {"a|b": {"bytes": 4, "test": {"agreement": [None]}}, "c": {"flops": 7, "test": {}}}
    columns = {"bytes": report.count("bytes"), "flops": report.count("flops"),
               "same": report.score("agreement")}  # fmt: skip
    rows = report.table(results, columns).splitlines()
    assert rows[0] == "| model | bytes | flops |"  # no model has a value in the third column
    assert rows[2:] == ["| a\\|b  |     4 |     – |", "| c     |     – |     7 |"]


def test_report(tmp_path):
    (tmp_path / "curves 1.png").touch()
    results = make_results()
    headline = report.summary(results)
    report.write_report(tmp_path, results, {"Curves": "curves 1.png"}, ["A remark."], headline=headline)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in (
        "# kd_mnist on digits\n",
        f"**{report.summary(results)}**",
        report.table(results),
        "Test set, mean ± standard deviation over 3 seeds.",
        "\n\nA remark.\n\n",
        "Data: digits, scikit-learn; 1,257 train, 180 validation, 360 test examples.",
        "![Curves](curves%201.png)\n\n*Curves.*",
        '- temperature: `4.0`\n- loss: `"kl"`\n- omit_classes: `[3]`\n',
        '- devices: `["cpu"]`\n',
        "Seconds: scratch 2.0 ± 1.4, total 12.5.",
        "```sh\npython kd.py --a 1\n```\n",
    ):  # fmt: skip
        assert part in text
    with pytest.raises(ValueError, match=r"no picture 'b\.png'"):
        report.write_report(tmp_path, results, {"B": "b.png"}, headline=headline)
