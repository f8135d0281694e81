"""Constants for Wanda and SparseGPT, from the authors' programs.

Needs PyTorch and checkouts of https://github.com/locuslab/wanda (8e8fc87) and https://github.com/IST-DASLab/sparsegpt
(147d215). Writes ``pruners.json`` beside this file. ::

    python tests/golden/make_pruners.py WANDA_DIR SPARSEGPT_DIR

What the programs need and do not use here (transformers, datasets, a GPU) is replaced by empty modules. All is computed
in float64. SparseGPT's code removes one weight more per block than it is asked for; it is asked for one less.
"""

import importlib
import itertools
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTHS, EXAMPLES, BATCH, BLOCK = (16, 24, 5), 60, 20, 8


def arrays():
    """Inputs and kernels ``[inputs, outputs]``, the same in test_one_shot.py: correlated, of unequal sizes."""
    rng = np.random.default_rng(20240626)
    x = rng.normal(size=(EXAMPLES, WIDTHS[0])) @ rng.normal(size=(WIDTHS[0], WIDTHS[0]))
    kernels = [rng.normal(size=shape) for shape in itertools.pairwise(WIDTHS)]
    return x.astype(np.float32), [kernel.astype(np.float32) for kernel in kernels]


class Block(nn.Module):
    """A layer as the programs see it: called with a mask and places, it returns a tuple."""

    def __init__(self, kernel, activation):
        super().__init__()
        self.dense, self.activation = nn.Linear(*kernel.shape, bias=False), activation
        self.dense.weight.data = torch.tensor(kernel.T, dtype=torch.float64)

    def forward(self, x, attention_mask=None, position_ids=None):
        return (self.activation(self.dense(x)),)


def blocks():
    _, (first, second) = arrays()
    return [Block(first, torch.relu), Block(second, nn.Identity())]


class Outputs(list):
    """In the place of one tensor for all samples, for the layers are of unequal widths."""

    def __setitem__(self, place, value):
        super().__setitem__(place, value[0])


def empty(name, **values):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(values)


def described(layers):
    """The new kernels ``[inputs, outputs]``."""
    return [layer.dense.weight.data.numpy().T.round(9).tolist() for layer in layers]


def wanda(prune, sparsity, n, m):
    layers = blocks()
    network = types.SimpleNamespace(
        config=types.SimpleNamespace(use_cache=False), hf_device_map={}, seqlen=1,
        model=types.SimpleNamespace(layers=layers),
    )  # fmt: skip
    x = torch.tensor(arrays()[0], dtype=torch.float64)
    count = EXAMPLES // BATCH

    def inputs(*_):
        return Outputs(x.reshape(count, BATCH, -1)), Outputs([None] * count), None, None

    prune.get_loaders = lambda *_, **__: (None, None)
    prune.prepare_calibration_input = inputs
    options = types.SimpleNamespace(nsamples=count, seed=0, sparsity_ratio=sparsity, use_variant=False)
    prune.prune_wanda(options, network, None, "cpu", prune_n=n, prune_m=m)
    return described(layers)


def sparsegpt(module, sparsity, n, m):
    layers, x = blocks(), torch.tensor(arrays()[0], dtype=torch.float64)
    for layer in layers:
        pruner = module.SparseGPT(layer.dense)
        for part in x.split(BATCH):
            pruner.add_batch(part, None)
        # All blocks are of one size here
        less = sparsity - 0.5 / (BLOCK * layer.dense.out_features)
        pruner.fasterprune(less, prunen=n, prunem=m, blocksize=BLOCK)
        with torch.no_grad():
            (x,) = layer(x)
    return described(layers)


def main():
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = lambda self: self  # what the programs round to float32 stays as it is
    torch.Tensor.type = lambda self, *_: self
    torch.cuda.synchronize = lambda: None
    empty("transformers", Conv1D=type("Conv1D", (), {}))
    empty("datasets", load_dataset=None)
    empty("quant")
    sys.path[:0] = sys.argv[1:3]
    prune, module = importlib.import_module("lib.prune"), importlib.import_module("sparsegpt")
    cases = {
        "0.5": (0.5, 0, 0),
        "0.75": (0.75, 0, 0),
        "2:4": (0.5, 2, 4),
        "4:8": (0.5, 4, 8),
        "1:4": (0.75, 3, 4),
    }
    found = {}
    for name, case in cases.items():
        found[name] = {"wanda": wanda(prune, *case), "sparsegpt": sparsegpt(module, *case)}
    Path(__file__).with_name("pruners.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
