"""The networks and training steps of bench_step.py in PyTorch, torchdistill and Keras, as their users write them."""

from __future__ import annotations

import itertools
from typing import Any

from step_ours import CLASSES, LEARNING_RATE, MOMENTUM, PAIRS, VARIANTS, Variants, make_arrays

# Peer → its package, and what pip installs
PEERS = {
    "torch-eager": ("torch", "torch"),
    "torch-compile": ("torch", "torch"),
    "keras": ("keras", "keras"),
    "torchdistill": ("torchdistill", "torchdistill torchvision"),
}


def torch_network(description: str, shape: tuple[int, int, int]) -> Any:
    """Builds the same network in PyTorch, written as its users write it."""
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    def dense(*sizes):
        layers: list[Any] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return layers[:-1]

    def unit(a, b, stride=1, bias=False):
        return [nn.Conv2d(a, b, 3, stride, 1, bias=bias), nn.BatchNorm2d(b), nn.ReLU()]

    class Residual(nn.Module):
        def __init__(self, a, b, stride):
            super().__init__()
            self.body = nn.Sequential(*unit(a, b, stride), *unit(b, b)[:-1])
            self.shortcut = nn.Identity()
            if stride != 1 or a != b:
                self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

        def forward(self, x):
            return F.relu(self.body(x) + self.shortcut(x))

    class Rows(nn.Module):
        def __init__(self, width, depth):
            super().__init__()
            self.embed, self.head = nn.Linear(shape[1], width), nn.Linear(width, CLASSES)
            self.blocks = nn.Sequential(
                *(
                    nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
                    for _ in range(depth)
                )
            )

        def forward(self, x):
            return self.head(self.blocks(self.embed(x[:, 0])).mean(1))

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    family, _, sizes = description.partition(":")
    height, width, channels = shape
    if family.startswith("vgg"):
        widths = [round(c * float(sizes)) for c in (64, 128, 256, 512, 512)]
        layers: list[Any] = []
        for i, (a, b) in enumerate(zip([channels, *widths], widths, strict=False)):
            layers += [*([nn.MaxPool2d(2)] if 1 <= i <= 3 else []), *unit(a, b, bias=True)]
        return nn.Sequential(*layers, Mean(), nn.Linear(widths[-1], CLASSES))
    if family.startswith("resnet"):
        layers, a = unit(channels, 32), 32
        for i, b in enumerate((64, 128, 256)):
            for j in range((int(family[6:-2]) - 2) // 6):
                layers.append(Residual(a, b, 2 if i and not j else 1))
                a = b
        return nn.Sequential(*layers, Mean(), nn.Linear(a, CLASSES))
    numbers = [int(size) for size in sizes.split(",")]
    if family == "mlp":
        return nn.Sequential(nn.Flatten(), *dense(height * width * channels, *numbers, CLASSES))
    if family == "transformer":
        return Rows(*numbers)
    convolutions = [
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
    ]
    flat = height // 2 * (width // 2) * 64
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *dense(flat, *numbers, CLASSES))


def torch_variants(pair: str, compiled: bool) -> Variants:
    """Builds the timed functions in PyTorch."""
    import torch
    from torch.nn import functional as F  # noqa: N812

    *descriptions, shape, _ = PAIRS[pair]
    arrays = {name: torch.from_numpy(values) for name, values in make_arrays(shape).items()}
    images = arrays["image"].permute(0, 3, 1, 2).contiguous()
    labels = arrays["label"].long()
    teacher = torch_network(descriptions[0], shape).eval()

    def kl(logits, targets, temperature=4.0):
        student = F.log_softmax(logits / temperature, -1)
        target = F.log_softmax(targets / temperature, -1)
        kl_div = F.kl_div(student, target, reduction="batchmean", log_target=True)
        return temperature**2 * kl_div

    def variant(name):
        student = torch_network(descriptions[1], shape)
        optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE, momentum=MOMENTUM)

        def loss_of(x, y, stored):
            if name == "plain":
                return F.cross_entropy(student(x), y)
            if name == "online":
                with torch.no_grad():
                    stored = teacher(x)
            return kl(student(x), stored)

        loss_of = torch.compile(loss_of) if compiled else loss_of

        def run(order):
            for rows in torch.from_numpy(order).long():
                optimizer.zero_grad(set_to_none=True)
                loss_of(images[rows], labels[rows], arrays["teacher"][rows]).backward()
                optimizer.step()

        return run

    forward = torch.compile(teacher) if compiled else teacher

    def run_teacher(order):
        with torch.no_grad():
            for rows in torch.from_numpy(order).long():
                forward(images[rows]).mean()

    return {**{name: variant(name) for name in VARIANTS[:3]}, "teacher forward": run_teacher}


def torchdistill_variants(pair: str) -> Variants:
    """Builds the timed function in torchdistill, whose configuration is a dict."""
    import torch
    from torchdistill.core.distillation import DistillationBox

    teacher, student, shape, _ = PAIRS[pair]
    arrays = make_arrays(shape)
    images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(arrays["label"]).long()
    where = {
        f"{kind}_module_{part}": value
        for kind in ("student", "teacher")
        for part, value in (("path", "."), ("io", "output"))
    }
    loss = {"key": "KDLoss", "kwargs": {**where, "temperature": 4.0, "alpha": 0.0}}
    box = DistillationBox(
        torch_network(teacher, shape).eval(),
        torch_network(student, shape),
        dataset_dict={},
        train_config={
            "num_epochs": 1,
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only"},
            "optimizer": {"key": "SGD", "kwargs": {"lr": LEARNING_RATE, "momentum": MOMENTUM}},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}},
            },
        },
        device=torch.device("cpu"),
        device_ids=None,
        distributed=False,
        lr_factor=1.0,
    )

    def run(order):
        box.pre_epoch_process(epoch=0)
        for rows in torch.from_numpy(order).long():
            box.post_forward_process(box.forward_process(images[rows], labels[rows], supp_dict={}))

    return {"online": run}


def keras_network(description: str, shape: tuple[int, int, int]) -> Any:
    """Builds the same network in Keras."""
    import keras
    from keras import layers

    def unit(x, width, stride=1, bias=False):
        x = layers.Conv2D(width, 3, stride, padding="same", use_bias=bias)(x)
        return layers.BatchNormalization()(x)

    family, _, sizes = description.partition(":")
    x = inputs = keras.Input(shape)
    if family.startswith("vgg"):
        for i, width in enumerate(round(c * float(sizes)) for c in (64, 128, 256, 512, 512)):
            x = layers.MaxPooling2D()(x) if 1 <= i <= 3 else x
            x = layers.ReLU()(unit(x, width, bias=True))
        x = layers.GlobalAveragePooling2D()(x)
    elif family.startswith("resnet"):
        x = layers.ReLU()(unit(x, 32))
        for i, width in enumerate((64, 128, 256)):
            for j in range((int(family[6:-2]) - 2) // 6):
                stride = 2 if i and not j else 1
                body = unit(layers.ReLU()(unit(x, width, stride)), width)
                if not j:
                    x = layers.Conv2D(width, 1, stride, use_bias=False)(x)
                    x = layers.BatchNormalization()(x)
                x = layers.ReLU()(layers.Add()([x, body]))
        x = layers.GlobalAveragePooling2D()(x)
    elif family == "transformer":
        width, depth = (int(size) for size in sizes.split(","))
        x = layers.Dense(width)(layers.Reshape((shape[0], shape[1] * shape[2]))(x))
        for _ in range(depth):
            y = layers.LayerNormalization()(x)
            x = layers.Add()([x, layers.MultiHeadAttention(4, width // 4)(y, y)])
            y = layers.Dense(4 * width, "relu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, layers.Dense(width)(y)])
        x = layers.GlobalAveragePooling1D()(x)
    else:
        if family == "characters":
            for width in (32, 64):
                x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
            x = layers.MaxPooling2D()(x)
        x = layers.Flatten()(x)
        for size in sizes.split(","):
            x = layers.Dense(int(size), "relu")(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def keras_variants(pair: str) -> Variants:
    """Builds the timed function in Keras."""
    import keras

    *descriptions, shape, _ = PAIRS[pair]
    arrays = make_arrays(shape)
    distiller = keras.distillation.Distiller(
        *(keras_network(description, shape) for description in descriptions),
        keras.distillation.LogitsDistillation(temperature=4.0),
        student_loss_weight=0.0,
    )
    distiller.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def run(order):
        batches = ((arrays["image"][rows], arrays["label"][rows]) for rows in order)
        distiller.fit(batches, steps_per_epoch=len(order), shuffle=False, verbose=0)

    return {"online": run}
