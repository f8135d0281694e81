"""Many students in one compiled program: seeds and hyper-parameters side by side.

The steps of small networks are mostly overhead, which students that are trained side by side share, and the
program is compiled once for all. The students are stacked: every array of their models and training states has a
first axis of students. Hyper-parameters are arrays ``[students]`` that the program takes as arguments.

>>> import jax
>>> import jax.numpy as jnp
>>> import numpy as np
>>> import optax
>>> from distill_jax import models, train
>>> values = grid(learning_rate=(0.1, 0.3), smoothing=(0.0, 0.1))
>>> def make_step(learning_rate, smoothing):
...     objective = train.supervised(label_smoothing=lambda step: smoothing)
...     return train.make_train_step(objective, optax.sgd(learning_rate))
>>> model = models.from_function(lambda w, x: x @ w, jnp.zeros((2, 3)))
>>> keys = jax.vmap(jax.random.key)(jnp.arange(4))
>>> students = Students(init_states(repeat(model, 4), optax.sgd(0.1), keys), values)
>>> data = {"image": np.eye(2, dtype=np.float32), "label": np.arange(2)}
>>> done = fit(students, make_epoch(make_step), data, epochs=5, batch_size=2, seeds=[0] * 4)
>>> done.model.params.shape, done.history["loss"].shape
((4, 2, 3), (5, 4))

Each student learns what it would learn in a run by itself (to the rounding of float32), given its key and its
seed of the shuffling; keys must be of JAX's default implementation, since ``rbg`` draws other numbers under
``vmap``.
"""

from distill_jax.train.sweeps.loop import fit, halve
from distill_jax.train.sweeps.stacks import Students, as_one, grid, init_states, repeat, stack, take
from distill_jax.train.sweeps.steps import each, make_epoch

__all__ = [
    "Students", "as_one", "each", "fit", "grid", "halve", "init_states", "make_epoch", "repeat", "stack", "take",
]  # fmt: skip
