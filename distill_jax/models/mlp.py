"""A multilayer perceptron."""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx

from distill_jax._checks import check_fraction, is_integer


class MLP(nnx.Module):
    """A multilayer perceptron: dense layers with ReLU between them, and dropout before each of them.

    Hinton, Vinyals and Dean 2015, §3, use ``(784, 1200, 1200, 10)`` for the teacher and
    ``(784, 800, 800, 10)`` for the student.

    Args:
      widths: the numbers of inputs, of units of each hidden layer, and of outputs.
      dropout: the fraction of each hidden layer's units that is dropped in training.
      input_dropout: the fraction of the inputs that is dropped in training.
      rngs: the random streams ``params`` (initial values: He normal) and ``dropout`` (masks).
    """

    def __init__(
        self, widths: Sequence[int], *, dropout: float = 0.0, input_dropout: float = 0.0, rngs: nnx.Rngs
    ):
        if len(widths) < 2 or not all(map(is_integer, widths)) or min(widths) < 1:
            raise ValueError(f"widths needs an input and an output width, all ≥ 1, got {widths}")
        check_fraction("dropout", dropout, without=1)
        check_fraction("input_dropout", input_dropout, without=1)
        rates = [input_dropout, *[dropout] * (len(widths) - 2)]
        he = nnx.initializers.he_normal()
        self.dense = nnx.List(
            nnx.Linear(a, b, kernel_init=he, rngs=rngs) for a, b in itertools.pairwise(widths)
        )
        self.dropout = nnx.List(nnx.Dropout(rate, rngs=rngs) for rate in rates)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, ...]``, flattened to ``[batch, widths[0]]``, to ``[batch, widths[-1]]``."""
        x = x.reshape(x.shape[0], -1)
        for i, (dense, dropout) in enumerate(zip(self.dense, self.dropout, strict=True)):
            x = dense(dropout(nnx.relu(x) if i else x))
        return x
