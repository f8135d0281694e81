"""How programs are compiled for a CPU, and the memory of the process."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import _cpu, models, train


@pytest.fixture
def options(monkeypatch):
    """Asks for the options anew, in an environment without flags of its own."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    _cpu.compiler_options.cache_clear()
    yield train.compiler_options
    _cpu.compiler_options.cache_clear()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the options are for a CPU")
def test_convolutions_are_not_given_to_the_library(options):
    x, w = jnp.ones((32, 16, 16, 32)), jnp.ones((3, 3, 32, 32))

    def loss(w):
        names = ("NHWC", "HWIO", "NHWC")
        return jnp.sum(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=names) ** 2)

    def fusions(chosen):
        text = jax.jit(jax.grad(loss), compiler_options=chosen).lower(w).compile().as_text()
        bodies = re.findall(r"calls=(%?[\w.]+),[^\n]*__ynn_fusion", text)
        return sum("convolution(" in text.split(f"{body} (")[1].split("\n}")[0] for body in bodies)

    assert fusions(options()) == 0 < fusions(None)


def test_options_that_this_jax_does_not_know_are_left_out(options, monkeypatch):
    monkeypatch.setattr(_cpu, "_FUSIONS", "xla_cpu_no_such_option")
    assert options() is None


def test_flags_of_the_user_are_kept(options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert options() is None


def test_programs_of_the_library_are_compiled_with_them(monkeypatch):
    options = train.compiler_options()
    if jax.default_backend() == "cpu":
        assert options is not None
    seen = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **kwargs: seen.append(kwargs) or jit(f, **kwargs))
    tx = optax.sgd(0.1)
    model = models.build("mlp:4", (2, 2, 1), 3, jax.random.key(0))
    data = {"image": np.ones((4, 2, 2, 1), np.float32), "label": np.zeros(4, np.int32)}
    epoch = train.make_epoch(train.make_train_step(train.supervised(), tx))
    epoch(train.init_state(model, tx, jax.random.key(0)), data, np.array([[0, 1]]))
    train.make_validation(data)(model)
    ours = [kwargs for kwargs in seen if "compiler_options" in kwargs]
    assert len(ours) == 2  # the epoch and the validation
    assert all(kwargs["compiler_options"] == options for kwargs in ours)


def test_an_epoch_inside_of_a_jitted_function():
    tx = optax.sgd(0.1)
    model = models.build("mlp:4", (2, 2, 1), 3, jax.random.key(0))
    data = {"image": np.ones((4, 2, 2, 1), np.float32), "label": np.arange(4, dtype=np.int32) % 3}
    epoch = train.make_epoch(train.make_train_step(train.supervised(), tx))
    order = np.array([[0, 1], [2, 3]])

    def run(state):
        return epoch(jax.tree.map(jnp.copy, state), data, order)[1]

    state = train.init_state(model, tx, jax.random.key(0))
    expected = run(state)
    for inner in (jax.jit(run)(state), jax.jit(lambda: run(state))()):  # as an argument, and as a constant
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), inner, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_freed_memory_is_kept():
    program = """
import numpy as np, sys
from distill_jax import train
def faults():
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
taken = train.keep_memory()
np.ones(2**23)
print(taken, before, faults())
"""
    line = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    taken, before, after = line.split()
    if taken == "False":
        pytest.skip("this C library has no such settings")
    assert int(after) < 0.01 * int(before)
