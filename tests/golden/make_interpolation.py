"""Constants for the interpolation of student and teacher: 100 steps of a tutorial's loop, corrected, in PyTorch.

Needs PyTorch. Writes ``interpolation.json`` beside this file. The loop is the text's (teacher step on
cross-entropy; the student's parameters move towards the teacher's by λ; the student's own step); its
sample code is mended in three places: each model has an optimizer of its own, the parameters are moved
one by one under ``no_grad``, and what comes out is evaluated. ::

    python tests/golden/make_interpolation.py                   # on drawn images
    python tests/golden/make_interpolation.py --mnist DIR       # and on MNIST, as prepared by TFDS
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

SEED, WIDTHS, RATE, LEARNING_RATE, BATCH, STEPS = 20240613, (784, 128, 10), 0.5, 0.01, 100, 100


def drawn():
    """Ten blurred prototypes and noise: uint8 images and labels, the same in test_interpolation.py."""
    rng = np.random.default_rng(SEED)
    prototypes = rng.uniform(0, 160, size=(10, 784))
    labels = rng.integers(0, 10, BATCH * STEPS)
    images = prototypes[labels] + rng.uniform(0, 95, size=(len(labels), 784))
    return images.astype(np.uint8), labels.astype(np.int32)


def start(seed):
    """Parameters before the first step: He normal kernels ``[inputs, outputs]``, zero biases."""
    rng = np.random.default_rng([SEED, seed])
    kernels = [rng.normal(size=(a, b)) * np.sqrt(2 / a) for a, b in itertools.pairwise(WIDTHS)]
    return [(kernel.astype(np.float32), np.zeros(kernel.shape[1], np.float32)) for kernel in kernels]


def network(parameters):
    layers = []
    for kernel, bias in parameters:
        layer = nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(kernel.T))
            layer.bias.copy_(torch.tensor(bias))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def run(images, labels):
    x = torch.tensor(images.reshape(len(images), -1) / 255.0)
    y = torch.tensor(labels.astype(np.int64))
    teacher, student = network(start(0)), network(start(1))
    criterion = nn.CrossEntropyLoss()
    teacher_optimizer = torch.optim.SGD(teacher.parameters(), lr=LEARNING_RATE)
    student_optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    result = {"teacher_loss": [], "loss": []}
    for i in range(STEPS):
        batch = slice(i * BATCH, (i + 1) * BATCH)
        teacher_optimizer.zero_grad()
        teacher_loss = criterion(teacher(x[batch]), y[batch])
        teacher_loss.backward()
        teacher_optimizer.step()

        with torch.no_grad():
            for theirs, ours in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.copy_(RATE * theirs + (1 - RATE) * ours)

        student_optimizer.zero_grad()
        loss = criterion(student(x[batch]), y[batch])
        loss.backward()
        student_optimizer.step()
        result["teacher_loss"].append(teacher_loss.item())
        result["loss"].append(loss.item())
    with torch.no_grad():
        # Of each parameter of the student: its norm, and its sum weighted by position
        for i, layer in enumerate(student[::2]):
            for name, value in (("kernel", layer.weight.T), ("bias", layer.bias)):
                flat = value.flatten()
                ramp = torch.linspace(-1, 1, len(flat))
                result[f"dense.{i}.{name}"] = [flat.norm().item(), (flat * ramp).sum().item()]
        result["logits"] = student(x[:2]).flatten().tolist()
    return result


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--mnist", type=Path, help="the data_dir of TFDS")
    at = options.parse_args()
    torch.set_default_dtype(torch.float64)
    path = Path(__file__).with_name("interpolation.json")
    result = json.loads(path.read_text()) if path.exists() else {}
    result["drawn"] = run(*drawn())
    if at.mnist:
        from distill_jax import data

        split = data.load("mnist", data_dir=at.mnist).train
        result["mnist"] = run(split.image[: BATCH * STEPS], split.label[: BATCH * STEPS])
    result = {
        name: {key: np.round(values, 8).tolist() for key, values in record.items()}
        for name, record in result.items()
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
