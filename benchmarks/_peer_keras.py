"""Distil with Keras 3 on torch, as a user of `keras.distillation.Distiller` writes it: python _peer_keras.py FILE.json.

It runs in the interpreter of peers.py's `--peers` and needs nothing of logitcache.
"""

import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

setting = json.loads(Path(sys.argv[1]).read_text())
keras.utils.set_random_seed(setting["seed"])
shape = (3, setting["side"], setting["side"])


def classifier(name: str, weights: str | None = None) -> keras.Model:
    """Return a network of torchvision as a model of Keras."""
    module = torchvision.models.get_model(name, weights=None, num_classes=setting["classes"])
    if weights:
        module.load_state_dict(torch.load(weights, weights_only=True))
    layer = keras.layers.TorchModuleWrapper(module, output_shape=(None, setting["classes"]))
    return keras.Sequential([keras.Input(shape), layer])


def loader(split: str, *augmentations: v2.Transform) -> DataLoader:
    """Return batches of class folders."""
    steps = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(setting["mean"], setting["std"])]
    folder = ImageFolder(Path(setting["images"]) / split, v2.Compose([v2.ToImage(), *augmentations, *steps]))
    return DataLoader(folder, setting["batch"], shuffle=bool(augmentations))


teacher_name, student_name = setting["networks"]
# The default, loss="kl_divergence", is a function in Keras 3.15.1 and is given logits in place of probabilities.
logits = keras.distillation.LogitsDistillation(setting["temperature"], keras.losses.KLDivergence())
distiller = keras.distillation.Distiller(
    teacher=classifier(teacher_name, setting["teacher"]),
    student=classifier(student_name),
    distillation_losses=logits,
    student_loss_weight=setting["labels_weight"],
)
distiller.compile(
    optimizer=keras.optimizers.SGD(
        setting["lr"], momentum=setting["momentum"], nesterov=True, weight_decay=setting["weight_decay"]
    ),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
crop = v2.RandomResizedCrop(setting["side"], scale=setting["scale"])
history = distiller.fit(
    loader("train", crop, v2.RandomHorizontalFlip()),
    epochs=setting["epochs"],
    validation_data=loader("validation"),
    verbose=2,
)
print("\n" + json.dumps({"top1": history.history["val_accuracy"][-1]}))
