"""Makes models.json: sizes and outputs of the reference networks in PyTorch.

    python make_models.py --repdistiller DIR

DIR is a checkout of HobbitLong/RepDistiller. Weights and images are drawn from seeds by :func:`draw`
and :func:`images`, under the reference's names and in its layout; the test draws them again.
"""

import argparse
import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np

CLASSES = 5


def images():
    """Four images [4, 32, 32, 3]."""
    return np.random.default_rng(0).normal(size=(4, 32, 32, 3))


def draw(name, shape):
    """A parameter or running statistic by its name in PyTorch, in PyTorch's layout (OIHW, OI)."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
    if name.endswith((".weight", ".running_var")):
        return rng.uniform(0.5, 1.5, size=shape)
    return rng.normal(size=shape) * 0.1


def fingerprint(feature):
    """The root mean square of an array (NHWC), and a projection that depends on every position."""
    feature = np.asarray(feature, float)
    wave = np.cos(np.arange(feature.size)).reshape(feature.shape)
    return [float(np.sqrt((feature**2).mean())), float((feature * wave).sum())]


_SHUFFLE = [
    (r"^stem\.conv", "conv1"),
    (r"^stem\.norm", "bn1"),
    (r"^neck\.conv", "conv2"),
    (r"^neck\.norm", "bn2"),
    (r"^stages\.(\d+)\.blocks\.(\d+)", lambda m: f"layer{int(m[1]) + 1}.{m[2]}"),
    (r"norm(\d)", r"bn\1"),
    (r"^head", "linear"),
]
_INVERTED = {"conv1": 0, "norm1": 1, "conv2": 3, "norm2": 4, "conv3": 6, "norm3": 7}
# From our paths to the reference's names
RENAMES = {
    "vgg": [
        (r"^stem", "block0"),
        (r"^stages\.(\d+)", lambda m: f"block{int(m[1]) + 1}"),
        (r"blocks\.(\d+)\.conv", lambda m: f"{3 * int(m[1])}"),
        (r"blocks\.(\d+)\.norm", lambda m: f"{3 * int(m[1]) + 1}"),
        (r"^head", "classifier"),
    ],
    "resnet": [
        (r"^stem\.conv", "conv1"),
        (r"^stem\.norm", "bn1"),
        (r"^stages\.(\d+)\.blocks\.(\d+)", lambda m: f"layer{int(m[1]) + 1}.{m[2]}"),
        (r"shortcut\.conv", "downsample.0"),
        (r"shortcut\.norm", "downsample.1"),
        (r"norm(\d)", r"bn\1"),
        (r"^head", "fc"),
    ],
    "wrn": [
        (r"^stem", "conv1"),
        (r"^stages\.(\d+)\.blocks\.(\d+)", lambda m: f"block{int(m[1]) + 1}.layer.{m[2]}"),
        (r"shortcut", "convShortcut"),
        (r"^neck\.norm", "bn1"),
        (r"norm(\d)", r"bn\1"),
        (r"^head", "fc"),
    ],
    "mobilenetv2": [
        (r"^stem\.conv", "conv1.0"),
        (r"^stem\.norm", "conv1.1"),
        (r"^neck\.conv", "conv2.0"),
        (r"^neck\.norm", "conv2.1"),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.(\w+)", lambda m: f"blocks.{m[1]}.{m[2]}.conv.{_INVERTED[m[3]]}"),
        (r"^head", "classifier.0"),
    ],
    "shufflenetv1": _SHUFFLE,
    "shufflenetv2": _SHUFFLE,
}
VARIABLES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def reference_name(description, path):
    """The reference's name of our variable: ``stages.0.blocks.1.conv2.kernel``, say."""
    module, _, variable = path.rpartition(".")
    family = max((f for f in RENAMES if description.startswith(f)), key=len)
    for pattern, new in RENAMES[family]:
        module = re.sub(pattern, new, module)
    return f"{module}.{VARIABLES.get(variable, variable)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repdistiller", type=Path, required=True)
    sys.path.insert(0, str(parser.parse_args().repdistiller / "models"))

    import mobilenetv2
    import resnet
    import ShuffleNetv1
    import ShuffleNetv2
    import torch
    import vgg
    import wrn

    makers = {
        f"vgg{d}": lambda n, d=d: getattr(vgg, f"vgg{d}_bn")(num_classes=n) for d in (8, 11, 13, 16, 19)
    }
    for d in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4"):
        makers[f"resnet{d}"] = lambda n, d=d: getattr(resnet, f"resnet{d}")(num_classes=n)
    # The channels of DefangChen/SimKD's resnet110x2, which has the same class
    makers["resnet110x2"] = lambda n: resnet.ResNet(110, [16, 32, 64, 128], num_classes=n)
    for d, k in ((16, 1), (16, 2), (40, 1), (40, 2)):
        makers[f"wrn{d}-{k}"] = lambda n, d=d, k=k: wrn.WideResNet(d, n, k)
    for t, w in ((6, 0.5), (6, 1), (6, 1.4), (3, 0.5)):
        name = "mobilenetv2" + ("" if t == 6 else f"-t{t}") + ("" if w == 1 else f":{w}")
        makers[name] = lambda n, t=t, w=w: mobilenetv2.MobileNetV2(t, n, width_mult=w)
    makers["shufflenetv1"] = lambda n: ShuffleNetv1.ShuffleV1(num_classes=n)
    for w in (0.5, 1, 1.5):
        name = "shufflenetv2" + ("" if w == 1 else f":{w}")
        makers[name] = lambda n, w=w: ShuffleNetv2.ShuffleNetV2(w, n)

    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in make(100).parameters()) for name, make in makers.items()}

    def nhwc(x):
        return np.moveaxis(x.detach().numpy(), 1, -1)

    outputs = {}
    x = torch.tensor(np.ascontiguousarray(np.moveaxis(images(), -1, 1)))
    for name in ("vgg8", "resnet8", "wrn16-1", "mobilenetv2:0.5", "shufflenetv1", "shufflenetv2"):
        net = makers[name](CLASSES)
        state = {
            key: torch.tensor(draw(key, tuple(value.shape)))
            for key, value in net.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
        net.load_state_dict(state, strict=False)
        net.eval()
        with torch.no_grad():
            features, logits = net(x, is_feat=True)
            before, _ = net(x, is_feat=True, preact=True)
            net.train()
            trained = net(x)
        outputs[name] = {
            "features": [fingerprint(nhwc(f)) for f in features],
            "preactivations": [fingerprint(nhwc(f)) for f in before],
            "logits": logits.tolist(),
            "training_logits": trained.tolist(),
        }
    rounded = json.loads(
        json.dumps({"parameters": counts, "outputs": outputs}),
        parse_float=lambda text: float(f"{float(text):.9g}"),
    )
    Path(__file__).with_name("models.json").write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
