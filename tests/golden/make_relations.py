"""Makes relations.json: values and gradients of the reference implementations in PyTorch.

    python make_relations.py --repdistiller DIR --mdistiller DIR --torchdistill DIR

The directories are checkouts of HobbitLong/RepDistiller and megvii-research/mdistiller, and the one
that holds the package torchdistill (1.1.5). Inputs are drawn by :func:`draw`, as in the test.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np


def draw(seed):
    """Student and teacher features [6, 2, 2, 3] and [6, 3, 3, 3] (NHWC), and all of CRD's input."""
    rng = np.random.default_rng(seed)
    student = rng.normal(size=(6, 2, 2, 3))
    teacher = rng.normal(size=(6, 3, 3, 3)) + 0.5
    banks = rng.uniform(-1, 1, size=(2, 20, 3))
    banks /= np.linalg.norm(banks, axis=-1, keepdims=True)
    ids = rng.permutation(20)[:6]
    negatives = rng.integers(0, 20, size=(6, 8))
    return student, teacher, banks, ids, negatives


def load(name, path):
    """A single file as a module of the package ``reference``, without running its real package."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("repdistiller", "mdistiller", "torchdistill"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()

    import torch

    torch.set_default_dtype(torch.float64)
    for package in ("reference", "reference.zoo", "reference.md", "reference.crd"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    zoo, md = (options.repdistiller / "distiller_zoo", options.mdistiller / "mdistiller" / "distillers")
    # mdistiller's files import a base class, of which the functions used here need nothing
    sys.modules["reference.md._base"] = types.SimpleNamespace(Distiller=torch.nn.Module)
    rep = {name: load(f"reference.zoo.{name}", zoo / f"{name}.py") for name in ("SP", "RKD", "PKT")}
    mega = {name: load(f"reference.md.{name}", md / f"{name}.py") for name in ("SP", "RKD", "PKT")}
    memory = load("reference.crd.memory", options.repdistiller / "crd" / "memory.py")
    criterion = load("reference.crd.criterion", options.repdistiller / "crd" / "criterion.py")
    sys.path.insert(0, str(options.torchdistill))
    mid = importlib.import_module("torchdistill.losses.mid_level")

    student, teacher, banks, ids, negatives = draw(0)
    # The references take [batch, channels, height, width]
    nchw = [np.ascontiguousarray(np.moveaxis(x, -1, 1)) for x in (student, teacher)]
    results = {}

    def record(name, loss, *, maps=True):
        arrays = nchw if maps else [x.mean((2, 3)) for x in nchw]
        s, t = (torch.tensor(x) for x in arrays)
        s.requires_grad_()
        value = loss(s, t)
        value.sum().backward()
        gradient = s.grad.numpy()
        if maps:
            gradient = np.moveaxis(gradient, 1, -1)
        results[name] = {"value": value.item(), "gradient": gradient.ravel().tolist()}

    record("repdistiller/sp", rep["SP"].Similarity().similarity_loss)
    record("mdistiller/sp", mega["SP"].similarity_loss)
    for where, make in (
        ("repdistiller", lambda d, a: rep["RKD"].RKDLoss(d, a)),
        ("mdistiller", lambda d, a: lambda s, t: mega["RKD"].rkd_loss(s, t, False, 1e-12, d, a)),
        (
            "torchdistill",
            lambda d, a: (
                lambda s, t: mid.RKDLoss("x", "x", d, a, "mean")({"x": {"output": s}}, {"x": {"output": t}})
            ),
        ),
    ):
        record(f"{where}/rkd_distance", make(1.0, 0.0))
        record(f"{where}/rkd_angle", make(0.0, 1.0))
    # PKT and CRD without their epsilon of 1e-7
    record("repdistiller/pkt", lambda s, t: rep["PKT"].PKT.cosine_similarity_loss(s, t, eps=0.0), maps=False)
    record("mdistiller/pkt", lambda s, t: mega["PKT"].pkt_loss(s, t, eps=0.0), maps=False)
    record(
        "torchdistill/pkt",
        lambda s, t: mid.PKTLoss("x", "output", "x", "output", eps=0.0).cosine_similarity_loss(s, t),
        maps=False,
    )
    for kernel in ("gaussian", "bilinear"):
        config = {"type": kernel, "gamma": 0.4, "max_p": 3}
        loss = mid.CCKDLoss("x", "x", config, "sum")
        record(
            f"torchdistill/cc_{kernel}",
            lambda s, t, loss=loss: loss({"x": {"output": s}}, {"x": {"output": t}}),
            maps=False,
        )
    record("torchdistill/ickd", mid.ChSimLoss.batch_loss)

    memory.AliasMethod.cuda = lambda self: None  # of a sampler that is not used here
    criterion.eps = 0.0
    size = types.SimpleNamespace(s_dim=3, t_dim=3, feat_dim=3, n_data=20, nce_k=8, nce_t=0.07, nce_m=0.5)
    with contextlib.redirect_stdout(None):
        loss = criterion.CRDLoss(size)
        for embed in (loss.embed_s, loss.embed_t):
            embed.linear.weight.data = torch.eye(3)
            embed.linear.bias.data = torch.zeros(3)
        loss.contrast.memory_v1.copy_(torch.tensor(banks[0]))
        loss.contrast.memory_v2.copy_(torch.tensor(banks[1]))
        chosen = torch.tensor(np.concatenate([ids[:, None], negatives], 1))
        for step in range(2):  # the first sets Z, the second uses it and the memory
            record(
                f"repdistiller/crd_step{step}", lambda s, t: loss(s, t, torch.tensor(ids), chosen), maps=False
            )
    results["repdistiller/crd_memory"] = {
        "student": loss.contrast.memory_v1.ravel().tolist(),
        "teacher": loss.contrast.memory_v2.ravel().tolist(),
        "z": loss.contrast.params[2:4].tolist(),
    }
    path = Path(__file__).with_name("relations.json")
    rounded = json.loads(json.dumps(results), parse_float=lambda x: float(f"{float(x):.12g}"))
    path.write_text(json.dumps(rounded, indent=0, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
