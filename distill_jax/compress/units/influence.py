"""How much each residual block matters: what it does to its input, or what the network loses without it."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_choice, check_function, check_sequence
from distill_jax._model import ApplyFn, Model, PyTree, check_inputs, check_model
from distill_jax.compress.units._trace.branches import run, run_layers
from distill_jax.compress.units._trace.program import Step, bind
from distill_jax.compress.units.depth import Network
from distill_jax.compress.units.edited_functions import Like
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.shallow import Branches, ProgramWithBlocks, trace_blocks
from distill_jax.losses import kl

Loss = Callable[[Model, Any], Any]
Measure = Callable[[Model, Any], np.ndarray]


def block_influence(
    graph: UnitGraph, model: Model, batches: Sequence[Any], *, how: Literal["cosine", "kl"] | Loss = "cosine"
) -> dict[str, float]:
    """Measures how much each residual block matters, by running the network.

    ``"cosine"`` is block influence, the mean of 1 − cos(x, x + f(x)) over vectors along the last axis, which are the
    features. It takes one run. The others leave out one block after another: ``"kl"`` is the mean divergence of the
    outputs, which are logits, from those of the whole network; a loss function gives the increase of that loss.
    They see what the rest of the network makes of the change, so they are more reliable. All compile once.

    Influences change when blocks go. To look again, drop some, trace the smaller network, and measure that.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure.
      batches: batches of inputs, of one size, of which the mean is taken; where ``how`` is a function, what it takes.
      how: ``"cosine"``, ``"kl"``, or ``(model, batch) -> loss``, a number.

    Returns:
      Block → influence, in the order of the network. 0 is none; negative where a loss is lower without the block.

    Raises:
      ValueError: if an argument is not what is said above; if there are no batches, or a number is not finite; if
        outputs are not one array of logits for ``"kl"``.

    References:
      Men et al., `ShortGPT: Layers in Large Language Models are More Redundant Than You Expect`, 2024
      (arXiv 2403.03853), Eq. 1.
    """
    check_model("model", model)
    check_sequence("batches", batches, "batches")
    if not len(batches):
        raise ValueError("batches: give at least one batch, got none")
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(batch)] for batch in batches]
    if wrong := [each for each in shapes if each != shapes[0]]:
        raise ValueError(
            f"batches must be of one size, as their mean is taken, got shapes {shapes[0]} and {wrong[0]}"
        )
    if isinstance(how, str):
        check_choice("how", how, ("cosine", "kl"))
        for x in batches:
            check_inputs("batches", x)
    else:
        check_function("how", how, "model, batch")
    blocks = Network(graph).branches
    measure = _angles(blocks) if how == "cosine" else _losses(blocks, how)
    found = np.mean([measure(model, batch) for batch in batches], 0)
    if not np.isfinite(found).all():
        bad = [name for name, value in zip(blocks, found, strict=True) if not np.isfinite(value)]
        raise ValueError(
            f"batches: the influences of {bad} are not finite: look for NaN in inputs and parameters"
        )
    return dict(zip(blocks, found.tolist(), strict=True))


def _angles(blocks: Branches) -> Measure:
    """Makes a function that computes block influence."""

    @jax.jit
    def measure(model: Model, x: PyTree) -> list[jax.Array]:
        network = _trace_blocks(model.apply_fn, (model.params, model.state), x, None, blocks)
        seen: dict[tuple[int, int | None], jax.Array] = {}
        wanted = [network.branches[name] for name in blocks]
        branches = {branch.key: branch for branch in wanted}

        def change(step: Step, operands: list[Any]) -> Any:
            branch = branches.get(step.outputs[0])
            if branch is None:
                return None
            if branch.row is None:
                results = bind(step, operands)
                seen[branch.key, None] = _angle(operands[step.inputs.index(branch.stays)], results[0])
                return results

            def after(old: Any, new: Any, _: Any) -> Any:
                return new, _angle(old[branch.stays], new[branch.stays])

            *results, angles = run_layers(step, operands, after=after)
            seen.update({(branch.key, row): angle for row, angle in enumerate(angles)})
            return results

        leaves = [*map(jnp.asarray, jax.tree.leaves((model.params, model.state, x)))]
        run(network.program, leaves, change, remat=False)
        return [seen[branch.key, branch.row] for branch in wanted]

    return lambda model, batch: np.array(measure(model, batch), np.float64)


def _angle(old: jax.Array, new: jax.Array) -> jax.Array:
    """Computes the mean of 1 − cos between vectors along the last axis; 0 between zeros."""
    old, new = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (old, new))
    norms = jnp.linalg.norm(old, axis=-1), jnp.linalg.norm(new, axis=-1)
    product = norms[0] * norms[1]
    none = product == 0  # not "> 0", which NaN is not either
    cosine = jnp.where(none, norms[0] == norms[1], (old * new).sum(-1) / jnp.where(none, 1, product))
    return 1 - cosine.mean()


def _losses(blocks: Branches, how: Loss | str) -> Measure:
    """Makes a function that leaves out one block after another, and computes by how much a loss rises."""

    @jax.jit
    def measure(model: Model, batch: Any, open_: jax.Array) -> jax.Array:
        gated = model.replace(apply_fn=_GatedFn(model.apply_fn, blocks, open_))
        if callable(how):
            return how(gated, batch)
        x, whole = batch
        return kl(gated(x), whole).mean()

    def measured(model: Model, batch: Any) -> np.ndarray:
        if not callable(how):
            batch = batch, _logits(model, batch)
        masks = [np.ones(len(blocks), bool), *~np.eye(len(blocks), dtype=bool)]
        whole, *without = (float(measure(model, batch, mask)) for mask in masks)
        return np.array(without) - whole

    return measured


@jax.jit
def _outputs(model: Model, x: PyTree) -> PyTree:
    return model(x)


def _logits(model: Model, x: PyTree) -> jax.Array:
    outputs = _outputs(model, x)
    if not isinstance(outputs, jax.Array) or outputs.ndim == 0:
        raise ValueError(
            f"how: 'kl' needs a model whose output is one array of logits, got {jax.tree.structure(outputs)}: give a "
            "function (model, batch) -> loss"
        )
    return outputs


class _GatedFn:
    """A network's function with a gate at each block: where it is closed, the branch is zero.

    Args:
      apply_fn: the function.
      blocks: the blocks.
      open_: bool ``[blocks]``, which of them are computed.
    """

    def __init__(self, apply_fn: ApplyFn, blocks: Branches, open_: jax.Array):
        self.apply_fn, self.blocks, self.open = apply_fn, blocks, open_

    def __call__(self, params: PyTree, state: PyTree, x: PyTree, *, key: jax.Array | None = None) -> Any:
        """Computes the outputs and the state."""
        network = _trace_blocks(self.apply_fn, (params, state), x, key, self.blocks)
        wanted = [network.branches[name] for name in self.blocks]
        branches = {branch.key: branch for branch in wanted}

        def change(step: Step, operands: list[Any]) -> Any:
            branch = branches.get(step.outputs[0])
            if branch is None:
                return None
            gates = self.open[np.array([other.key == branch.key for other in wanted])]
            if branch.row is not None:
                return run_layers(step, operands, extra=gates, after=_through)
            stays = operands[step.inputs.index(branch.stays)]
            return [jnp.where(gates[0], bind(step, operands)[0], stays)]

        leaves = [*map(jnp.asarray, jax.tree.leaves((params, state, x, key)))]
        results = jax.tree.unflatten(
            jax.tree.structure(network.results), run(network.program, leaves, change)
        )
        return (results, state) if key is None else results


def _through(old: list[Any], new: list[Any], gate: Any) -> Any:
    return [jnp.where(gate, b, a) for a, b in zip(old, new, strict=True)], ()


def _trace_blocks(
    apply_fn: ApplyFn, arrays: PyTree, x: PyTree, key: Any, blocks: Branches
) -> ProgramWithBlocks:
    arrays, x, key = jax.tree.map(lambda leaf: Like(jnp.shape(leaf), jnp.result_type(leaf)), (arrays, x, key))
    return trace_blocks(apply_fn, arrays, x, key, blocks)
