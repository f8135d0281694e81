"""Scores of units by what the loss says: its gradients, and estimates of its curvature."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from distill_jax import _jaxpr
from distill_jax._checks import check_count, check_function
from distill_jax._model import Model, PyTree, check_model, example_count
from distill_jax.compress._products import Kernel, Use, watched
from distill_jax.compress.units._trace.roles import positions, roles
from distill_jax.compress.units.editing import float_leaves
from distill_jax.compress.units.graph import Slice, UnitGraph, check_graph
from distill_jax.compress.units.injection import leaves_by_name
from distill_jax.compress.units.scoring import Normalise, Scores, normalised, sums
from distill_jax.weights.structure import path_name

LossOfExample = Callable[[Model, PyTree], jax.Array]


def taylor(graph: UnitGraph, model: PyTree, gradients: PyTree, *, normalise: Normalise = "mean") -> Scores:
    """Estimates how the loss changes without the unit, to first order: |Σ g·w|.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, or a tree of the structure of its ``params``.
      gradients: the gradients of the loss: a tree of the structure of ``params``, or a Model of them.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group, float64 ``[size]``.

    References:
      Molchanov et al., `Importance Estimation for Neural Network Pruning`, 2019 (squared there).
    """
    weights, slopes = float_leaves(graph, model), float_leaves(graph, gradients, argument="gradients")
    products = {path: w * slopes[path] for path, w in weights.items()}
    return normalised({n: np.abs(x) for n, x in sums(graph, products).items()}, normalise)


def fisher(graph: UnitGraph, model: PyTree, diagonal: PyTree, *, normalise: Normalise = "mean") -> Scores:
    """Estimates how the loss changes without the unit, to second order: ½ Σ h·w².

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, or a tree of the structure of its ``params``.
      diagonal: the diagonal h of the Hessian or of the Fisher matrix (:func:`squared_gradients`), as a
        tree of the structure of ``params``.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group, float64 ``[size]``.

    References:
      LeCun, Denker, Solla, `Optimal Brain Damage`, 1990; Theis et al., 2018 (the Fisher).
    """
    weights, curvature = float_leaves(graph, model), float_leaves(graph, diagonal, argument="diagonal")
    products = {path: w * w * curvature[path] for path, w in weights.items()}
    return normalised({n: x / 2 for n, x in sums(graph, products).items()}, normalise)


def squared_gradients(
    loss_fn: Callable[[Model, PyTree], jax.Array], model: Model, examples: PyTree, *, chunk: int = 64
) -> PyTree:
    """Averages the squared gradients of single examples: the diagonal of the empirical Fisher matrix.

    Args:
      loss_fn: ``(model, example) -> loss`` of one example, without a batch axis.
      model: the model. The gradients are those of its parameters.
      examples: a pytree of arrays ``[examples, ...]``.
      chunk: number of examples whose gradients are held at once.

    Returns:
      A tree of the structure of ``model.params``.

    >>> from distill_jax import models
    >>> model = models.from_function(lambda p, x: p * x, jnp.array(1.0))
    >>> squared_gradients(lambda model, x: model(x), model, jnp.array([1.0, 3.0])).item()
    5.0
    """
    check_function("loss_fn", loss_fn, "model, example")
    check_model("model", model)
    count = example_count("examples", examples)

    def loss(params: PyTree, example: Any) -> jax.Array:
        return loss_fn(model.replace(params=params), example)

    @jax.jit
    def total(part: PyTree) -> PyTree:
        gradients = jax.vmap(jax.grad(loss), (None, 0))(model.params, part)
        return jax.tree.map(lambda g: jnp.square(g).sum(0), gradients)

    parts = [total(part) for part in _parts(examples, chunk)]
    return jax.tree.map(lambda *sums: sum(sums[1:], sums[0]) / count, *parts)


def gates(
    graph: UnitGraph,
    model: Model,
    loss_fn: LossOfExample,
    examples: PyTree,
    *,
    order: Literal[1, 2] = 1,
    chunk: int = 64,
    normalise: Normalise = "mean",
) -> Scores:
    """Estimates how the loss of single examples changes if a unit, such as an attention head, is switched off.

    Each unit's value is multiplied by a gate m = 1 where the network uses it. To first order the loss changes by
    g = ∂L/∂m. The signs of examples do not cancel here, as they do in :func:`taylor`.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model.
      loss_fn: ``(model, example) -> loss`` of one example, without a batch axis.
      examples: a pytree of arrays ``[examples, ...]``.
      order: 1 for E|g|; 2 for ½·E[g²], in which the Fisher matrix of the gates stands for their Hessian.
      chunk: number of examples whose gradients are held at once.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group whose units are used by nothing but products with parameters, float64 ``[size]``.

    References:
      Michel, Levy, Neubig, `Are Sixteen Heads Really Better than One?`, 2019 (arXiv 1905.10650), Eq. 2 (order 1, of
      attention heads); Theis et al., `Faster Gaze Prediction with Dense Networks and Fisher Pruning`, 2018
      (arXiv 1801.05787), Eq. 7 (order 2).

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[1.0], [1.0]])}
    >>> model = models.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((2, 1)))
    >>> x = jnp.array([[1.0], [-3.0]])
    >>> units.scores.gates(graph, model, lambda model, x: model(x)[0], x, normalise="none")  # |x·1|, |x·2|
    {'a': array([2., 4.])}
    """
    _check(graph, model, loss_fn)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    outgoing = _outgoing(graph)

    def loss(ones: Mapping[str, jax.Array], params: PyTree, example: Any) -> jax.Array:
        def gated(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
            for name, slices in outgoing.items():
                for _, axis, index in (s for s in slices if s.path == path_name(path)):
                    factor = jnp.where(index >= 0, ones[name][index], 1).astype(leaf.dtype)
                    leaf = leaf * factor.reshape([-1 if a == axis else 1 for a in range(leaf.ndim)])
            return leaf

        return loss_fn(model.replace(params=jax.tree_util.tree_map_with_path(gated, params)), example)

    @jax.jit
    def total(params: PyTree, part: PyTree) -> dict[str, jax.Array]:
        ones = {name: jnp.ones(graph.groups[name].size) for name in outgoing}
        slopes = jax.vmap(jax.grad(loss), (None, None, 0))(ones, params, part)
        return {name: (jnp.abs(g) if order == 1 else g * g / 2).sum(0) for name, g in slopes.items()}

    found: Scores = {name: np.zeros(graph.groups[name].size) for name in outgoing}
    for part in _parts(examples, chunk):
        found = {
            name: found[name] + np.asarray(x, np.float64) for name, x in total(model.params, part).items()
        }
    return normalised({name: x / example_count("examples", examples) for name, x in found.items()}, normalise)


def kronecker(
    graph: UnitGraph,
    model: Model,
    loss_fn: LossOfExample,
    examples: PyTree,
    *,
    chunk: int = 64,
    normalise: Normalise = "none",
) -> Scores:
    """Estimates how the loss changes without a unit, to second order, by Kronecker factors: Kron-OBD.

    The Hessian of a kernel W ``[inputs, outputs]`` is taken to be A ⊗ G, with A = E[aaᵀ] of its inputs and
    G = E[ggᵀ] of the loss's gradients at its outputs. If the rows w_r of a unit's outgoing kernels become zero, the
    loss changes by ½ Σ A_rs · w_r G w_sᵀ over its rows r and s. Unlike the diagonal of :func:`fisher`, this sees how
    the weights of a unit act together. Of a convolution, A is the mean and G the sum over places (KFC).

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model.
      loss_fn: ``(model, example) -> loss`` of one example, without a batch axis. It calls the model outside of
        ``vmap``, loops and conditions.
      examples: a pytree of arrays ``[examples, ...]``.
      chunk: number of examples whose inputs and gradients are held at once.
      normalise: how the scores of a group are made comparable. The scores estimate a loss, so "none" compares them
        as they are.

    Returns:
      For each free group whose units are used by nothing but products with kernels (dense, or convolutions that
      are not grouped, outside of loops), float64 ``[size]``.

    Raises:
      ValueError: if ``loss_fn`` calls the model in a loop and the like, or a score is not finite.

    References:
      Wang et al., `EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis`, 2019 (arXiv 1905.05934),
      §3.2 (Kron-OBD, there of the weights of which a unit is made); Grosse, Martens, 2016 (arXiv 1602.01407), §3.1
      (KFC).

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[1.0], [1.0]])}
    >>> model = models.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((2, 1)))
    >>> x = jnp.array([[1.0], [-3.0]])
    >>> units.scores.kronecker(graph, model, lambda model, x: model(x)[0] ** 2 / 2, x)  # ½ · 5 · 45, and · 2²
    {'a': array([112.5, 450. ])}
    """
    _check(graph, model, loss_fn)
    kernels, taps = _taps(model, loss_fn, examples)
    # Group → its kernels, and the rows of its units there
    rows: dict[str, list[tuple[str, np.ndarray]]] = {}
    for name, slices in _outgoing(graph).items():
        size = graph.groups[name].size
        found_rows = [(s.path, _unit_rows(kernels[s.path], s, size)) for s in slices if s.path in kernels]
        known = [(path, places) for path, places in found_rows if places is not None]
        if len(known) == len(slices):
            rows[name] = known
    taps = {path: taps[path] for each in rows.values() for path, _ in each}

    def loss(taps: Mapping[str, list[_Tap]], model: Model, example: PyTree) -> jax.Array:
        rest = {path: iter(each) for path, each in taps.items()}
        return loss_fn(
            watched(
                model, lambda use: _tapped(use, next(rest[use.path])) if use.path in rest else use.output
            ),
            example,
        )

    @jax.jit
    def moments(model: Model, part: PyTree) -> tuple[dict[str, list[jax.Array]], dict[str, jax.Array]]:
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), taps)
        read = jax.vmap(jax.grad(loss), (None, None, 0))(zeros, model, part)
        inputs = {path: _joined(tap.inputs for tap in each) for path, each in read.items()}
        slopes = {path: _joined(tap.outputs for tap in each) for path, each in read.items()}
        blocks = {}
        for name, each in rows.items():
            own = [inputs[path][:, places] for path, places in each]
            blocks[name] = [jnp.einsum("nuk,nul->ukl", a, a) for a in own]
        return blocks, {path: g.T @ g for path, g in slopes.items()}

    total: Any = None
    for part in _parts(examples, chunk):
        here = jax.tree.map(lambda x: np.asarray(x, np.float64), moments(model, part))
        total = here if total is None else jax.tree.map(np.add, total, here)
    blocks, squares = total
    count = example_count("examples", examples)
    leaves = leaves_by_name(model)
    found = {}
    for name, each in rows.items():
        found[name] = np.zeros(graph.groups[name].size)
        for (path, places), block in zip(each, blocks[name], strict=True):
            weights = kernels[path].matrix(leaves[path])[places]
            slopes = np.einsum("uko,op,ulp->ukl", weights, squares[path] / count, weights, optimize=True)
            found[name] += (block / (count * kernels[path].positions) * slopes).sum((1, 2)) / 2
    return normalised(found, normalise)


class _Tap(NamedTuple):
    """Arguments of zeros whose gradients are the gradients of a kernel's outputs, and its inputs."""

    outputs: Any
    inputs: Any


def _tapped(use: Use, tap: _Tap) -> jax.Array:
    """Returns ``use.output``. Its derivative with respect to ``tap`` gives (gradients of the outputs, inputs)."""
    last = range(-len(use.axes), 0)
    moved = jnp.moveaxis(use.output, use.axes, last)
    outputs = _read(moved.reshape(tap.outputs.shape), use.rows(), tap)
    return jnp.moveaxis(outputs.reshape(moved.shape), last, use.axes)


@jax.custom_vjp
def _read(outputs: jax.Array, inputs: jax.Array, tap: _Tap) -> jax.Array:
    return outputs


def _read_backward(inputs: jax.Array, slopes: jax.Array) -> tuple[jax.Array, jax.Array, _Tap]:
    return slopes, jnp.zeros_like(inputs), _Tap(slopes, inputs)


_read.defvjp(lambda outputs, inputs, tap: (outputs, inputs), _read_backward)


def _taps(
    model: Model, loss_fn: LossOfExample, examples: PyTree
) -> tuple[dict[str, Kernel], dict[str, list[_Tap]]]:
    """Finds the kernels of a model, with all places of an example, and the shapes of the tap of each use.

    Each use is marked in the program of the loss, which shows whether it is computed once for each example.
    """
    kernels: dict[str, Kernel] = {}
    taps: dict[str, list[_Tap]] = {}
    marked: dict[str, tuple[int, ...]] = {}
    others: dict[str, str] = {}

    def note(use: Use) -> jax.Array:
        inputs = jax.eval_shape(use.rows)
        places = inputs.shape[0]
        before = kernels.get(use.path, use.kernel)
        kernels[use.path] = use.kernel._replace(positions=before.positions + places)
        outputs = jax.ShapeDtypeStruct((places, use.kernel.outputs), use.output.dtype)
        taps.setdefault(use.path, []).append(_Tap(outputs, inputs))
        mark = f"distill_jax tap {len(marked)}"
        marked[mark] = use.output.shape
        return checkpoint_name(use.output, mark)

    def found(jaxpr: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "name":
                yield eqn.params["name"], eqn.outvars[0].aval.shape
            elif body := _jaxpr.body_of(eqn):
                yield from found(body[0])

    example = jax.tree.map(lambda x: jnp.asarray(x)[0], examples)
    program, _ = _jaxpr.trace(lambda e: loss_fn(watched(model, note, others.setdefault), e), example)
    if not marked.items() <= set(found(program.jaxpr)):
        raise ValueError(
            "loss_fn must call the model outside of vmap, loops and conditions: there it is not known how often"
        )
    return {path: kernel for path, kernel in kernels.items() if path not in others}, taps


def _unit_rows(kernel: Kernel, outgoing: Slice, size: int) -> np.ndarray | None:
    """Finds the rows of a kernel's matrix that are of each unit, ``[size, any]``; None if units have unequally many."""
    if outgoing.axis not in kernel.summed:
        return None
    shape = [-1 if axis == outgoing.axis else 1 for axis in range(len(kernel.shape))]
    units = np.broadcast_to(outgoing.index.reshape(shape), kernel.shape)
    return positions(kernel.matrix(units)[:, 0].astype(int), size)


def _joined(parts: Iterable[jax.Array]) -> jax.Array:
    """Joins ``[examples, places, columns]`` of several uses to rows, in float32 or more."""
    rows = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in parts])
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))


def _outgoing(graph: UnitGraph) -> dict[str, tuple[Slice, ...]]:
    """Returns the slices by which units are used, of all groups that nothing but products with parameters uses."""
    found = roles(graph, alike=False)
    return {name: role.outgoing for name, role in found.items() if role.outgoing and not role.reason}


def _parts(examples: PyTree, chunk: int) -> Iterator[PyTree]:
    check_count("chunk", chunk)
    for i in range(0, example_count("examples", examples), chunk):
        yield jax.tree.map(lambda x, i=i: x[i : i + chunk], examples)


def _check(graph: UnitGraph, model: Model, loss_fn: LossOfExample) -> None:
    check_graph(graph)
    check_model("model", model)
    check_function("loss_fn", loss_fn, "model, example")
