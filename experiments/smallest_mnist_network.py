"""The networks of smallest_mnist.py, whose parameters are small integers, and the Python programs that they become.

A network is a chain of layers: ReLU, standardisation of the whole activation of an image (mean 0, variance 1), and a
convolution without padding, down to one pixel of as many channels as there are classes. Since standardisation undoes
every scale, the scales of the integers need not be stored.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import models
from distill_jax.compress import entropy_codes

BIAS = 4  # what the integer 1 of a bias adds to an output, where the integer 1 of a kernel multiplies
FLOOR = 1e-6  # added to the variance of an activation, which may be 0


class Layer(NamedTuple):
    """A convolution without padding.

    Attributes:
      size: height and width of the kernel.
      stride: the distance of the places at which it is applied.
      outputs: the number of output channels.
      rank: how many spatial kernels each input channel has, of which the outputs are mixed (1 is a depthwise and a
        pointwise convolution); 0 for a full kernel.
    """

    size: int
    stride: int
    outputs: int
    rank: int


@dataclass(frozen=True)
class Network:
    """The function of a network, (params, images ``[n, height, width, 1]``) → logits.

    Attributes:
      layers: the layers.
      limit: the largest absolute value of an integer; None computes with the parameters as they are.
    """

    layers: tuple[Layer, ...]
    limit: int | None

    def __call__(self, params: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """Computes the logits, ``[n, classes]``."""
        # The batch is the last axis: then few channels cost no time
        x = jnp.transpose(images, (3, 1, 2, 0))
        for layer, leaves in zip(self.layers, params["layers"], strict=True):
            found = {name: integers(leaf, self.limit) for name, leaf in leaves.items()}
            kernel = found["kernel"]
            if layer.rank:
                kernel = jnp.einsum("cijm,cmo->cijo", kernel, found["mix"])
            x = jax.nn.relu(x)
            x -= jnp.mean(x, (0, 1, 2), keepdims=True)
            x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), (0, 1, 2), keepdims=True) + FLOOR)
            patches = _patches(x, layer)
            y = kernel.reshape(-1, layer.outputs).T @ patches.reshape(kernel[..., 0].size, -1)
            x = y.reshape(-1, *patches.shape[-3:]) + BIAS * found["bias"][:, None, None, None]
        return jnp.exp(params["log_scale"]) * x.reshape(len(x), -1).T


def _patches(x: jax.Array, layer: Layer) -> jax.Array:
    """Cuts ``[channels, height, width, n]`` into patches, ``[channels, size², height, width, n]``."""
    channels, height, _, n = x.shape
    size, stride = layer.size, layer.stride
    if size == height:
        return x.reshape(channels, -1, 1, 1, n)
    end = (height - size) // stride * stride + 1
    places = itertools.product(range(size), repeat=2)
    return jnp.stack([x[:, i : i + end : stride, j : j + end : stride] for i, j in places], 1)


def integers(leaf: Mapping[str, jax.Array], limit: int | None) -> jax.Array:
    """Rounds weights to integers from −limit to limit, with the gradient of the values before rounding."""
    scaled = leaf["weight"] * jnp.exp(-leaf["log_step"])
    if limit is None:
        return scaled
    clipped = jnp.clip(scaled, -limit, limit)
    # In this order the value is an integer exactly
    return jax.lax.stop_gradient(jnp.round(clipped)) + (clipped - jax.lax.stop_gradient(clipped))


def make(layers: Sequence[Layer], limit: int | None, channels: int, key: jax.Array) -> models.Model:
    """Makes a network with random weights; the steps between integers are trained, too."""
    params = []
    for layer in layers:
        key, *keys = jax.random.split(key, 3)
        spatial = layer.size**2
        # The shape, and the number of inputs of an output
        shapes: dict[str, tuple[tuple[int, ...], int]] = {
            "kernel": ((channels, layer.size, layer.size, layer.outputs), channels * spatial)
        }
        if layer.rank:
            shapes["kernel"] = (channels, layer.size, layer.size, layer.rank), spatial
            shapes["mix"] = (channels, layer.rank, layer.outputs), channels * layer.rank
        leaves = {}
        for (name, (shape, inputs)), each in zip(shapes.items(), keys, strict=False):
            weight = jax.random.normal(each, shape) / np.sqrt(inputs)
            step = 2 * jnp.mean(jnp.abs(weight)) / np.sqrt(limit or 1)  # as in learned step size quantisation
            leaves[name] = {"weight": weight, "log_step": jnp.log(step)}
        log_scale = sum(leaf["log_step"] for leaf in leaves.values())  # of the last layer, at the end
        leaves["bias"] = {"weight": jnp.zeros(layer.outputs), "log_step": jnp.log(jnp.float32(0.1))}
        params.append(leaves)
        channels = layer.outputs
    return models.from_function(Network(tuple(layers), limit), {"layers": params, "log_scale": log_scale})


def freeze(model: models.Model) -> models.Model:
    """Replaces the weights of a network by its integers, so that it computes the same in every program."""

    def rounded(leaf):
        return {"weight": integers(leaf, network_of(model).limit), "log_step": jnp.zeros(())}

    layers = [{name: rounded(leaf) for name, leaf in leaves.items()} for leaves in model.params["layers"]]
    return model.replace(params={**model.params, "layers": layers})


def network_of(model: models.Model) -> Network:
    """Returns the function of a model from :func:`make`."""
    return model.apply_fn.fn  # type: ignore[attr-defined]


def size_of(params: Mapping[str, Any]) -> jax.Array:
    """Estimates the thousands of bytes of all integers, so that the estimate has a gradient: Σ log₂(1 + |q|)/8000."""
    leaves = [leaf for leaves in params["layers"] for leaf in leaves.values()]
    bits = [jnp.sum(jnp.log2(1 + jnp.abs(integers(leaf, None)))) for leaf in leaves]
    return jnp.sum(jnp.stack(bits)) / 8000


# --- files -------------------------------------------------------------------------------------------------------

# Reads the message as entropy_codes.decode does, then computes what Network computes, image by image
DECODER = """import sys,numpy as n
X=int.from_bytes(d.unused_data,"big")
def g(*s):
 global X;c=[1]*{levels};r=[]
 for _ in range(n.prod(s)):
  X,v=divmod(X,sum(c));q=0
  while v>=c[q]:v-=c[q];q+=1
  X=X*c[q]+v;c[q]+={step};r+=q-{limit},
 return n.reshape(r,s)
i={channels};L=[]
for k,s,o,m in {layers}:L+=(k,s,{kernel},g(o)),;i=o
for x in n.load(sys.argv[1])/255:
 for k,s,w,b in L:x=x*(x>0);x-=x.mean();x=n.tensordot(\
n.lib.stride_tricks.sliding_window_view(x/(x.var()+{floor})**.5,(k,k),(0,1))[::s,::s],w,3)+{bias}*b
 print(x.argmax())
"""
FACTORS = 'n.einsum("cijm,cmo->cijo",g(i,k,k,m),g(i,m,o))'
FULL = "g(i,k,k,o)"
# What Python needs to read bytes within its source: they are the first 256 characters, of which five are escaped
HEAD, TAIL = b"#coding:l1\nimport zlib;d=zlib.decompressobj();exec(d.decompress('", b"'.encode('l1')))"
ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\0": "\\x00"}


class File(NamedTuple):
    """A network as a program.

    Attributes:
      weights: the coded integers.
      decoder: the source of the decoder, compressed by zlib.
      program: a Python program that contains both, and prints the class of each image of an ``.npy`` file.
    """

    weights: bytes
    decoder: bytes
    program: bytes


def arrays_of(model: models.Model) -> list[np.ndarray]:
    """Lists the integers of a network from :func:`freeze`, in the order in which they are coded."""
    names = ("kernel", "mix", "bias")
    leaves = [leaves[name] for leaves in model.params["layers"] for name in names if name in leaves]
    weights = [np.asarray(leaf["weight"]) for leaf in leaves]
    if any(np.any(weight != np.rint(weight)) for weight in weights):
        raise ValueError("model must be one from freeze, got weights that are not integers")
    return [weight.astype(np.int64) for weight in weights]


def write(model: models.Model, channels: int = 1) -> File:
    """Makes the program of a network from :func:`freeze`."""
    layers, limit = network_of(model).layers, network_of(model).limit
    assert limit is not None
    weights = entropy_codes.encode(arrays_of(model), limit=limit, check=0)
    source = DECODER.format(
        levels=2 * limit + 1,
        limit=limit,
        channels=channels,
        layers=str([tuple(layer) for layer in layers])[1:-1].replace(" ", ""),
        kernel=FACTORS if layers[0].rank else FULL,
        bias=BIAS,
        floor=f"{FLOOR:g}".replace("e-0", "e-"),
        step=entropy_codes.STEP,
    )
    decoder = zlib.compress(source.encode(), 9)
    literal = "".join(ESCAPES.get(c, c) for c in (decoder + weights).decode("latin-1"))
    return File(weights, decoder, HEAD + literal.encode("latin-1") + TAIL)


def classify(program: bytes, images: np.ndarray) -> np.ndarray:
    """Runs a program in a fresh process, which has nothing but it, Python and NumPy.

    Args:
      program: the program.
      images: uint8 ``[n, height, width, channels]``.

    Returns:
      The classes, int64 ``[n]``.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "smallest.py").write_bytes(program)
        np.save(Path(folder) / "images.npy", images)
        command = [sys.executable, "-I", "smallest.py", "images.npy"]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return np.array(done.stdout.split(), np.int64)
