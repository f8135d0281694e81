"""Makes ``features.json``: what the reference implementations say of the inputs of ``features_inputs``.

    python tests/golden/make_features.py --torchdistill DIR --repdistiller DIR --mdistiller DIR \
        --simkd DIR --mgd DIR --catkd DIR

Each directory is a checkout of that project (yoshitomo-matsubara/torchdistill, HobbitLong/RepDistiller,
megvii-research/mdistiller, DefangChen/SimKD, yzd-v/MGD, GzyAftermath/CAT-KD). Only the functions named
below are taken out of their files, since the modules around them import more than PyTorch. Everything
is in float64. Gradients are those for the student's features.
"""

import argparse
import ast
import json
import math
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def features_inputs():
    """Float64 features in the layout of this library, drawn in a fixed order from one seed."""
    rng = np.random.default_rng(20240)
    shapes = {
        "student": (2, 5, 5, 4),
        "teacher": (2, 5, 5, 4),
        "wide": (2, 5, 5, 6),
        "small": (2, 3, 3, 4),
        "small_teacher": (2, 3, 3, 4),
        "gamma": (4,),
        "beta": (4,),
        "weights": (2, 2, 2),
        "first": (3, 3, 4, 4),
        "second": (3, 3, 4, 4),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def excerpt(path, names, **namespace):
    """The named functions and classes of a Python file, without its imports."""
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names
    ]
    for node in tree.body:
        node.decorator_list = []
    exec(compile(tree, str(path), "exec"), namespace)
    return types.SimpleNamespace(**{name: namespace[name] for name in names})


def main():
    import torch
    from scipy.stats import norm
    from torch import nn
    from torch.nn import functional

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("torchdistill", "repdistiller", "mdistiller", "simkd", "mgd", "catkd"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    space = {"torch": torch, "nn": nn, "F": functional, "np": np, "math": math, "norm": norm}

    mid_level = excerpt(
        args.torchdistill / "torchdistill/losses/mid_level.py",
        (
            *("FSPLoss", "ATLoss", "FTLoss", "AltActTransferLoss", "VIDLoss"),
            *("HierarchicalContextLoss", "_extract_feature_map"),
        ),
        **space,
        normalize=functional.normalize,
        adaptive_avg_pool2d=functional.adaptive_avg_pool2d,
        adaptive_max_pool2d=functional.adaptive_max_pool2d,
    )

    def zoo(name, of):
        return getattr(excerpt(args.repdistiller / f"distiller_zoo/{name}.py", (of,), **space), of)

    distillers = args.mdistiller / "mdistiller/distillers"
    ofd = excerpt(distillers / "OFD.py", ("feat_loss", "OFD"), **space, Distiller=object)
    review = excerpt(distillers / "ReviewKD.py", ("hcl_loss",), **space)
    cat = excerpt(args.catkd / "mdistiller/distillers/CAT_KD.py", ("CAT_loss", "_Normalize"), **space)
    sem = excerpt(args.simkd / "distiller_zoo/SemCKD.py", ("SemCKDLoss",), **space)
    mgd = excerpt(args.mgd / "cls/mmcls/distillation/losses/mgd.py", ("MGDLoss",), **space)

    inputs = {}
    for name, x in features_inputs().items():
        x = torch.from_numpy(x)
        inputs[name] = (x.movedim(-1, 1) if x.ndim == 4 else x).contiguous()
    i = types.SimpleNamespace(**inputs)
    constants = {}

    def record(name, loss, x):
        x = x.clone().requires_grad_()
        value = loss(x)
        value.backward()
        gradient = x.grad.movedim(1, -1)
        constants[name] = {
            "value": value.item(),
            # a fingerprint: the sum, the norm, and some entries of the gradient
            "sum": gradient.sum().item(),
            "norm": gradient.norm().item(),
            "entries": gradient.reshape(-1)[:: max(1, gradient.numel() // 6)].tolist(),
        }

    def io(**layers):
        return {name: {"output": value} for name, value in layers.items()}

    pair = {"io": "output", "path": "x"}
    pairs = {"p": {"student": pair, "teacher": pair}}

    def torchdistill(loss, teacher):
        return lambda s: loss(io(x=s), io(x=teacher))

    record("hint RepDistiller", lambda s: zoo("FitNet", "HintLoss")()(s, i.teacher), i.student)
    for mode in ("paper", "code"):
        loss = mid_level.ATLoss(pairs, mode=mode)
        record(f"attention torchdistill {mode}", torchdistill(loss, i.wide), i.student)
    attention = zoo("AT", "Attention")(p=4)
    record("attention RepDistiller p=4", lambda s: attention([s], [i.small])[0], i.student)
    for p in (1, 2):
        loss = mid_level.FTLoss(p=p, paraphraser_path="x", translator_path="x")
        record(f"factor torchdistill p={p}", torchdistill(loss, i.teacher), i.student)
    nst = zoo("NST", "NSTLoss")()
    record("nst RepDistiller", lambda s: nst([s], [i.wide])[0], i.student)
    record("nst RepDistiller few channels", lambda s: nst([s], [i.small])[0], i.student)
    matrix = mid_level.FSPLoss.compute_fsp_matrix
    record(
        "fsp torchdistill matrix, squared",
        lambda s: (matrix(s, i.small) - matrix(i.teacher, i.small_teacher)).square().sum() / 2,
        i.student,
    )
    fsp = zoo("FSP", "FSP")([(2, 4), (2, 4)], [(2, 4), (2, 4)])
    record("fsp RepDistiller", lambda s: fsp([s, i.small], [i.teacher, i.small_teacher])[0], i.student)
    boundary = mid_level.AltActTransferLoss(pairs, margin=0.7, reduction="mean")
    record("boundary torchdistill", torchdistill(boundary, i.teacher), i.student)
    boundaries = zoo("AB", "ABLoss")(3, margin=1.0)
    record(
        "boundary RepDistiller first of three", lambda s: boundaries([s] * 3, [i.teacher] * 3)[0], i.student
    )
    variance = i.gamma.square() + 0.1
    vid = mid_level.VIDLoss(pairs)
    record(
        "vid torchdistill", lambda s: vid(io(x=(s, variance.view(1, -1, 1, 1))), io(x=i.teacher)), i.student
    )
    vid = zoo("VID", "VIDLoss")(4, 4, 4)
    vid.regressor = nn.Identity()
    record("vid RepDistiller at the start", lambda s: vid(s, i.teacher), i.student)
    batchnorm = types.SimpleNamespace(weight=i.gamma, bias=i.beta)
    margins = types.SimpleNamespace()
    ofd.OFD.init_ofd_modules.__globals__["ConnectorConvBN"] = lambda *a, **k: None
    margins._align_list = lambda *lists: lists
    ofd.OFD.init_ofd_modules(margins, [4], [4], [batchnorm])
    margin = margins.margins[0].double()
    constants["ofd mdistiller margin"] = margin.reshape(-1).tolist()
    record("ofd mdistiller", lambda s: ofd.feat_loss(s, i.teacher, margin), i.student)
    record("review mdistiller", lambda s: review.hcl_loss([s], [i.teacher]), i.student)
    loss = mid_level.HierarchicalContextLoss("x", "output", "x", "output")
    record("review torchdistill", lambda s: loss({"x": {"output": (s, None)}}, io(x=i.teacher)), i.student)
    for normalise in (True, False):
        record(
            f"cat CAT-KD normalise={normalise}",
            lambda s, n=normalise: cat.CAT_loss(s, i.small, 2, n),
            i.student,
        )
    torch.Tensor.cuda = lambda self: self  # the loss allocates on a GPU
    weights = torch.softmax(i.weights, -1)
    record(
        "semckd SimKD",
        lambda s: sem.SemCKDLoss()(
            [[s, s], [i.wide, i.wide]], [[i.teacher, i.teacher * 2], [i.wide * 2, i.wide * 3]], weights
        ),
        i.student,
    )
    torch.manual_seed(0)
    part = mgd.MGDLoss(4, 6, "x", alpha_mgd=1.0, lambda_mgd=0.5)
    rng = np.random.default_rng(7)
    for parameter in part.parameters():  # redrawn by the test, in this order and layout
        parameter.data = torch.from_numpy(rng.normal(size=parameter.shape) / 4)
    mask = torch.from_numpy(rng.random((2, 6, 1, 1)))
    torch.rand = lambda *_: mask
    record("mgd MGD", lambda s: part(s, i.wide), i.student)

    (HERE / "features.json").write_text(json.dumps(constants, indent=1) + "\n")


if __name__ == "__main__":
    main()
