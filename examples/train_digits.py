"""Train a small RevBiFPN on scikit-learn's handwritten digits, upsampled to 64 x 64: minutes on two CPU cores.

pip install . scikit-learn
python examples/train_digits.py --epochs 3
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from revbifpn.fast import RevBiFPN


def digits(size: int) -> tuple[Tensor, Tensor]:
    """Images ``[1797, 3, size, size]`` with zero mean and unit variance, and labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]  # [N, 1, 8, 8]
    images = F.interpolate(images, size=size, mode="bilinear").repeat(1, 3, 1, 1)
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stored", action="store_true", help="store activations instead of recomputing them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = digits(64)
    order = torch.randperm(len(images))
    train, test = order[:1437], order[1437:]
    model = RevBiFPN(channels=[48, 64, 80, 160], num_ext_layers=0, classes=10, reversible=not args.stored)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = args.epochs * (len(train) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(args.epochs):
        model.train()
        for batch in train[torch.randperm(len(train))].split(args.batch):
            if len(batch) < args.batch:
                continue
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            correct = sum((model(images[b]).argmax(1) == labels[b]).sum().item() for b in test.split(args.batch))
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {100 * correct / len(test):.1f} %", flush=True)


if __name__ == "__main__":
    main()
