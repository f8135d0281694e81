"""What every exported file says of itself, and what no file can hold."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

import distill_jax
from distill_jax import _files, _jaxpr
from distill_jax._checks import check_sequence, is_key, shown
from distill_jax._model import Model, PyTree, check_inputs, check_model
from distill_jax.export._kernels import grid_of, kernels_of

Facts = str | Mapping[str, Any]

DRAWS = {"random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32"}


def facts(
    model: Model,
    x: PyTree,
    labels: Sequence[str] | None,
    preprocessing: Facts | None,
    provenance: Facts | None,
) -> dict[str, Any]:
    """Checks that a file can hold a model, and returns what the file says beside its network, for JSON.

    Args:
      model: the model.
      x: a batch of inputs.
      labels: the names of the classes, or None.
      preprocessing: how an input is made, or None.
      provenance: where the network comes from, or None.

    Returns:
      These three, the SHA-256 of the parameters and the state, the bits of kernels that are integers, and the version
      of this library.

    Raises:
      ValueError: if evaluation draws random numbers, changes the state or calls Python, the labels are not
        one name for each class, or one of the others cannot be written as JSON.
    """
    check_model("model", model)
    check_inputs("x", x)
    outputs = jax.tree.leaves(_evaluation(model, x))
    if labels is not None:
        check_sequence("labels", labels, "names")
        if wrong := [label for label in labels if not isinstance(label, str)]:
            raise ValueError(
                f"labels must be names of classes, got {shown(wrong[0])}: write numbers as '0', '1', ..."
            )
        shapes = [output.shape for output in outputs]
        if len(shapes) != 1 or shapes[0][-1:] != (len(labels),):
            raise ValueError(
                f"labels must be one name for each class, got {len(labels)} for outputs of {shapes}"
            )
    stated = {"labels": labels, "preprocessing": preprocessing, "provenance": provenance}
    for name in ("preprocessing", "provenance"):
        if not isinstance(stated[name], str | Mapping | None):
            raise ValueError(
                f"{name} must be a text or a dict of what is to be said, got {shown(stated[name])}"
            )
    plain: dict[str, Any] = _files.plain(stated)
    integers = {
        path: {"weights": kernel.bits, "inputs": 8 if grid_of(kernel) else None}
        for path, kernel in kernels_of(model).items()
    }
    return {**plain, "digest": digest(model), "integers": integers, "distill_jax": distill_jax.__version__}


def digest(model: Model) -> str:
    """Returns the SHA-256 of the paths, dtypes, shapes and bytes of a model's parameters and state."""
    found = hashlib.sha256()
    tree = {"params": model.params, "state": model.state}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if is_key(leaf):
            raise ValueError(
                f"model: {jax.tree_util.keystr(path)} is a random key, which a file cannot hold: keep it out of the "
                "state"
            )
        array = np.asarray(leaf)
        found.update(json.dumps([jax.tree_util.keystr(path), str(array.dtype), array.shape]).encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _evaluation(model: Model, x: PyTree) -> PyTree:
    """Returns the shapes of the outputs; raises ``ValueError`` if evaluation is no function of arrays alone."""

    def run(params: PyTree, state: PyTree, x: PyTree) -> Any:
        return model.apply_fn(params, state, x)

    program, (outputs, after) = _jaxpr.trace(run, model.params, model.state, x)
    used = _jaxpr.primitives(program)
    if drawn := sorted(used & DRAWS):
        raise ValueError(
            f"model: its evaluation draws random numbers ({', '.join(drawn)}), which a file would repeat at each "
            "call: leave dropout and noise to training mode, and keep fixed random numbers among the parameters"
        )
    if called := sorted(name for name in used if "callback" in name or name == "debug_print"):
        raise ValueError(
            f"model: its evaluation calls Python ({', '.join(called)}), which a file cannot hold: remove the call"
        )
    before = jax.tree_util.tree_leaves_with_path(model.state)
    structure: Any = jax.tree.structure(after)
    if structure != jax.tree.structure(model.state):
        raise ValueError(
            "model: its evaluation changes the structure of the state: return the state as it is"
        )
    first = len(program.jaxpr.invars) - len(before) - len(jax.tree.leaves(x))
    given = program.jaxpr.invars[first : first + len(before)]
    origins = _origins(program.jaxpr)
    returned = [origins[i] for i in range(len(origins) - len(before), len(origins))]
    for (path, _), old, new in zip(before, given, returned, strict=True):
        if old is not new:
            raise ValueError(
                f"model: its evaluation changes the state at {jax.tree_util.keystr(path)}, which a file cannot "
                "remember: return the state as it was given where key is None"
            )
    return outputs


def _origins(jaxpr: Any) -> list[Any]:
    """Follows each result of a program back through calls and copies, to the value that it is."""
    same: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        inputs = [atom if isinstance(atom, Literal) else same.get(atom, atom) for atom in eqn.invars]
        if eqn.primitive.name in ("copy", "copy_p", "stop_gradient"):
            same[eqn.outvars[0]] = inputs[0]
        elif body := _jaxpr.body_of(eqn):
            given = dict(zip(body[0].invars, inputs, strict=True))
            for output, origin in zip(eqn.outvars, _origins(body[0]), strict=True):
                if not isinstance(origin, Literal) and origin in given:
                    same[output] = given[origin]
    return [atom if isinstance(atom, Literal) else same.get(atom, atom) for atom in jaxpr.outvars]
