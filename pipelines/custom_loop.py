"""A training loop of one's own on a cache: nothing of logitcache but the loader and a loss.

logitcache precompute pipelines/fashion_mnist/precompute.yaml
python pipelines/custom_loop.py caches/fashion_mnist/train.zarr --epochs 16
"""

import argparse

import torch
from torch import nn

import logitcache as lc


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pixels into what this student wants."""
    return (images.float() / 255 - 0.286) / 0.353


def main() -> None:
    """Train a small student and print its loss and its agreement with the teacher, epoch by epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("--epochs", type=int, default=16)
    arguments = parser.parse_args()

    student = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    device = "cpu"

    cache = lc.open_cache(arguments.cache)  # verifies, or raises with the reason
    loader = cache.loader(batch_size=64)
    for epoch in range(arguments.epochs):
        agreed = 0
        for batch in loader.epoch(epoch):  # replays view epoch % cache.num_views
            batch = batch.to(device)
            logits = student(normalize(batch.images))
            loss = lc.losses.kl_divergence(logits, batch.targets, temperature=2.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            agreed += int((logits.argmax(1) == batch.targets.logits.argmax(1)).sum())
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, agrees with the teacher on {agreed / len(cache):.1%}")


if __name__ == "__main__":
    main()
