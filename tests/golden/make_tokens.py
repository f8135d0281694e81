"""Makes tokens.json: values and gradients of the reference implementations in PyTorch.

    python make_tokens.py --trl DIR --liger DIR --distillm DIR --distillkit DIR

The directories hold the packages trl (0.24.0) and liger_kernel (0.6.4), and checkouts of
jongwooko/distillm and arcee-ai/DistillKit. Inputs are drawn by :func:`draw`, as in the test. Where
the references force float32, it is read as float64: the constants are to test formulas.
"""

import argparse
import ast
import enum
import importlib
import json
import math
import sys
import types
from pathlib import Path

import numpy as np


def draw():
    """Hidden states, kernels, labels (−100 is padding) and three directions to take gradients in."""
    rng = np.random.default_rng(7)
    student, teacher = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 6))
    kernels = rng.normal(size=(4, 11)), rng.normal(size=(6, 11))
    labels = rng.integers(0, 11, size=(2, 5))
    labels[1, 3:] = -100
    return student, teacher, kernels, labels, rng.normal(size=(3, 2, 5, 11))


def functions(path, names, **namespace):
    """Some functions of a file, found also inside a class, without running what it imports."""
    source = path.read_text().replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    wanted = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    for node in wanted:
        node.decorator_list = []
    exec(compile(ast.Module(wanted, []), path.name, "exec"), namespace)
    return namespace


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("trl", "liger", "distillm", "distillkit"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()

    import torch

    torch.set_default_dtype(torch.float64)
    hidden_s, hidden_t, kernels, labels, directions = draw()
    labels = torch.tensor(labels)
    student, teacher = (torch.tensor(h @ k) for h, k in zip((hidden_s, hidden_t), kernels, strict=True))
    imports = {"torch": torch, "F": torch.nn.functional}
    constants = {}

    def record(name, fn):
        x = student.clone().requires_grad_()
        value = fn(x)
        value.backward()
        along = (x.grad.numpy() * directions).sum((1, 2, 3))
        constants[name] = [value.item(), *along.tolist()]

    trl = functions(options.trl / "trl" / "trainer" / "gkd_trainer.py", ["generalized_jsd_loss"], **imports)[
        "generalized_jsd_loss"
    ]
    for beta in (0, 0.1, 0.5, 0.9, 1):
        for t in (1.0, 2.0):
            record(
                f"trl {beta} {t}", lambda x, beta=beta, t=t: trl(x, teacher, labels, beta=beta, temperature=t)
            )
    record("trl no labels", lambda x: trl(x, teacher))

    names = ["forward_kl", "reverse_kl", "js_distance", "skewed_forward_kl", "skewed_reverse_kl"]
    distillm = functions(options.distillm / "distillm" / "losses.py", names, **imports)
    for name in names:
        record(f"distillm {name}", lambda x, name=name: distillm[name](x, teacher, {"label": labels}))

    missing = enum.Enum("MissingProbabilityHandling", ["ZERO", "SYMMETRIC_UNIFORM"])
    folder = options.distillkit / "distillkit" / "lossfuncs"
    kit = functions(
        folder / "common.py", ["get_logprobs", "get_target_logprobs"],
        math=math, MissingProbabilityHandling=missing, **imports,
    )  # fmt: skip
    kit = functions(
        folder / "kl.py", ["log1mexp", "log_missing_prob", "sparse_kl_div_inner"],
        **{k: v for k, v in kit.items() if k != "__builtins__"},
    )  # fmt: skip
    top = torch.log_softmax(teacher, -1).topk(3)
    mask = (labels != -100).double()
    for handling in missing:
        for t in (1.0, 2.0):
            record(
                f"distillkit {handling.name} {t}",
                lambda x, handling=handling, t=t: kit["sparse_kl_div_inner"](
                    x, top.indices, top.values, mask, missing=handling, temperature=t
                ),
            )

    for package in ("liger_kernel", "liger_kernel.chunked_loss"):  # the real ones import Triton
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(options.liger / package.replace(".", "/"))]
    jsd = importlib.import_module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction

    def liger(name, labels, columns=11, **kwargs):
        x = torch.tensor(hidden_s.reshape(10, 4)).requires_grad_()
        w = torch.tensor(kernels[0].T[:columns].copy()).requires_grad_()
        fixed = torch.tensor(hidden_t.reshape(10, 6)), torch.tensor(kernels[1].T.copy())
        value = jsd.apply(
            x, w, *fixed, labels.reshape(10), None, None, 0.0, 1.0, kwargs.get("beta", 0.5),
            -100, kwargs.get("temperature", 1.0), False, 4,
        )  # fmt: skip
        if isinstance(value, tuple):
            value = value[0]
        value.backward()
        constants[name] = [value.item(), x.grad.square().sum().item(), w.grad.square().sum().item()]

    every = labels.clamp(min=0)
    for beta in (0.1, 0.5):
        liger(f"liger {beta}", every, beta=beta)
    liger("liger temperature 2", every, temperature=2.0)
    liger("liger padded", labels)
    liger("liger 9 of 11 columns", every % 9, columns=9)

    target = Path(__file__).with_name("tokens.json")
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in constants.items())
    target.write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    main()
