"""Constants for the logit losses, from the methods' PyTorch implementations, in float64.

Needs PyTorch and checkouts of the repositories named by the options (a folder that holds the files
read below is enough). Writes ``logits.json`` beside this file. Only the named functions and classes
of a file are run, not its imports, so that nothing else has to be installed; a ``.cuda()`` does
nothing, and float32 is widened to float64. ::

    python tests/golden/make_logits.py --torchdistill DIR --mdistiller DIR --lskd DIR --dist-kd DIR \
        --distillm DIR --cls-kd DIR --tfkd DIR --distillkit DIR --class-balanced DIR --google DIR
"""

import argparse
import ast
import json
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional
from torch import nn

SEED, EXAMPLES, CLASSES = 20240607, 6, 7
COUNTS = [500, 220, 100, 45, 20, 9, 4]


def inputs():
    """The same draws as in test_golden_logits.py."""
    rng = np.random.default_rng(SEED)
    teacher = 2 * rng.normal(size=(EXAMPLES, CLASSES))
    student = teacher + rng.normal(size=(EXAMPLES, CLASSES))
    return student, teacher, rng.integers(0, CLASSES, EXAMPLES)


def load(path, *names, **extra):
    """Some functions and classes of a file, without its imports and decorators."""
    scope = {"torch": torch, "nn": nn, "F": torch.nn.functional, "np": np, **extra}
    body = []
    for node in ast.parse(Path(path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
            node.decorator_list = []
            body.append(node)
    missing = set(names) - {node.name for node in body}
    if missing:
        raise SystemExit(f"{path} holds no {sorted(missing)}")
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in (
        "torchdistill", "mdistiller", "lskd", "dist-kd", "distillm", "cls-kd", "tfkd", "distillkit",
        "class-balanced", "google",
    ):  # fmt: skip
        options.add_argument(f"--{name}", type=Path, required=True)
    at = options.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float64  # for references that cast
    torch.Tensor.float = torch.Tensor.double
    torch.Tensor.cuda = lambda self, *args: self
    student, teacher, labels = inputs()
    y, t = torch.tensor(labels), torch.tensor(teacher)
    result = {}

    def record(name, loss):
        s = torch.tensor(student, requires_grad=True)
        value = loss(s)
        (gradient,) = torch.autograd.grad(value, s)
        result[name] = {"value": value.item(), "gradient": gradient.flatten().tolist()}

    zoo = at.mdistiller / "mdistiller/distillers"
    md = load(zoo / "DKD.py", "dkd_loss", "_get_gt_mask", "_get_other_mask", "cat_mask")
    record("mdistiller dkd", lambda s: md.dkd_loss(s, t, y, 1.0, 8.0, 4.0))
    record("mdistiller dkd, extreme", lambda s: md.dkd_loss(300 * s, -300 * t, y, 1.0, 8.0, 4.0))
    record("mdistiller dkd, two classes", lambda s: md.dkd_loss(s[:, :2], t[:, :2], y % 2, 1.0, 8.0, 4.0))
    kd = load(zoo / "KD.py", "kd_loss")
    record("mdistiller kd", lambda s: kd.kd_loss(s, t, 4.0))

    lskd = load(at.lskd / "mdistiller/distillers/KD.py", "normalize", "kd_loss")
    record("lskd kd", lambda s: lskd.kd_loss(s, t, 2.0, True))
    ml = load(at.lskd / "mdistiller/distillers/MLKD.py", "normalize", "kd_loss", "bc_loss", "cc_loss")
    for name in ("kd", "bc", "cc"):
        loss = getattr(ml, f"{name}_loss")
        record(f"mlkd {name}", lambda s, loss=loss: sum(loss(s, t, x) for x in (4.0, 3.0, 5.0, 2.0, 6.0)))

    def wrapped(loss):
        return lambda s: loss({"": {"output": s}}, {"": {"output": t}}, targets=y)

    path = at.torchdistill / "torchdistill/losses/mid_level.py"
    td = load(
        path, "KDLoss", "DISTLoss", "LogitStdKDLoss",
        cosine_similarity=torch.nn.functional.cosine_similarity,
    )  # fmt: skip
    where = ("", "output", "", "output")
    record("torchdistill kd", wrapped(td.KDLoss(*where, temperature=4.0, alpha=0.0)))
    record("torchdistill lskd", wrapped(td.LogitStdKDLoss(*where, temperature=2.0, alpha=0.0)))
    for eps in (0.0, 1e-8):
        record(f"torchdistill dist, eps {eps}", wrapped(td.DISTLoss(*where, tau=2.0, eps=eps)))
    dist = load(
        at.dist_kd / "segmentation/losses/dist_kd.py",
        "cosine_similarity", "pearson_correlation", "logit_relation", "class_relation", "DIST",
    )  # fmt: skip
    record("dist", lambda s: dist.DIST(beta=1.0, gamma=2.0)(s, t))

    lm = load(at.distillm / "distillm/losses.py", "skewed_forward_kl", "skewed_reverse_kl", "tv_distance")
    batch = {"label": y}
    record("distillm skew_kl", lambda s: lm.skewed_forward_kl(s, t, batch, lam=0.1))
    record("distillm skew_reverse_kl", lambda s: lm.skewed_reverse_kl(s, t, batch, lam=0.1))
    record("distillm total_variation", lambda s: lm.tv_distance(s, t, batch))

    parts = at.cls_kd / "mmcls/distillation/losses"
    nkd = load(parts / "nkd.py", "NKDLoss").NKDLoss("", True, temp=2.0, gamma=1.5)
    record("cls_KD nkd", lambda s: nkd(s, t, y))
    wsld = load(parts / "wsld.py", "WSLDLoss").WSLDLoss("", True, 2.0, 1.0, CLASSES)
    wsld_forward = wsld.forward
    nn.LogSoftmax.__init__.__defaults__ = (1,)  # it leaves the axis out, which PyTorch warns of
    record("cls_KD wsld", lambda s: wsld_forward(s, t, y))

    tfkd = load(at.tfkd / "my_loss_function.py", "loss_kd_regularization")
    params = types.SimpleNamespace(reg_alpha=1.0, reg_temperature=20.0, multiplier=1.0)
    record("tfkd", lambda s: tfkd.loss_kd_regularization(s, y, params))

    kit = at.distillkit / "distillkit/lossfuncs"
    hinge = load(kit / "hingeloss.py", "sparse_hinge_loss").sparse_hinge_loss
    logistic = load(kit / "logistic_ranking.py", "sparse_logistic_ranking_loss")
    ids = torch.arange(CLASSES).expand(1, EXAMPLES, CLASSES)
    log_p = torch.log_softmax(t, -1)[None]
    record("distillkit hinge", lambda s: hinge(s[None], ids, log_p))
    record("distillkit hinge, margin 0.2", lambda s: hinge(s[None], ids, log_p, margin=0.2))
    record("distillkit logistic", lambda s: logistic.sparse_logistic_ranking_loss(s[None], ids, log_p))

    balanced = load(at.class_balanced / "class_balanced_loss.py", "CB_loss").CB_loss
    record("class-balanced", lambda s: balanced(y, s, COUNTS, CLASSES, "softmax", 0.999, 0.0))
    # The authors' code is TensorFlow's; the five of its functions that it calls, in PyTorch.
    tf = types.SimpleNamespace(
        math=types.SimpleNamespace(log=torch.log),
        cast=lambda x, dtype: torch.as_tensor(x, dtype=dtype),
        float32=torch.float64,
        reduce_mean=lambda x, axis: x.mean(axis),
        nn=types.SimpleNamespace(
            sparse_softmax_cross_entropy_with_logits=lambda labels, logits: torch.nn.functional.cross_entropy(
                logits, labels, reduction="none"
            )
        ),
    )
    adjusted = load(at.google / "logit_adjustment/utils.py", "build_loss_fn", tf=tf).build_loss_fn
    prior = np.array(COUNTS) / sum(COUNTS)
    record("logit_adjustment", lambda s: adjusted(True, prior, 1.5)(y, s))

    text = json.dumps(result, indent=1)
    Path(__file__).with_name("logits.json").write_text(
        text.replace(",\n   ", ", ").replace("[\n   ", "[").replace("\n  ]", "]") + "\n"
    )


if __name__ == "__main__":
    main()
