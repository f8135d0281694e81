"""A dozen pairs of networks: every one as student and as teacher, every feature method."""

import method_matrix
import pytest

NAMES = list(method_matrix.NETWORKS)
METHODS = list(method_matrix.METHODS)
PAIRS = [(NAMES[i], NAMES[(i + 4) % len(NAMES)]) for i in range(len(NAMES))]
PAIRS += [("mlp", "vgg8"), ("convnet", "mobilenetv2"), ("linen", "mlp")]
CASES = [(*pair, tuple(METHODS[(2 * i + k) % len(METHODS)] for k in (0, 1))) for i, pair in enumerate(PAIRS)]


@pytest.mark.parametrize(("student", "teacher", "methods"), CASES)
def test_the_loss_falls_on_a_repeated_batch(student, teacher, methods):
    losses = method_matrix.train(student, teacher, methods)
    assert set(losses) == set(methods)
    assert not method_matrix.failures(losses)


def test_a_dozen_pairs_cover_every_network_and_every_method():
    students, teachers, methods = zip(*CASES, strict=True)
    assert set(students) == set(teachers) == set(NAMES)
    assert {name for names in methods for name in names} == set(METHODS)


def test_failures_are_seen():
    losses = {"risen": [1, 2, 3], "nan": [1, float("nan"), 0], "a rounding": [1, 1 - 1e-7], "fell": [3, 2, 1]}
    assert set(method_matrix.failures(losses)) == {"risen", "nan", "a rounding"}
