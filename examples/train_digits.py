"""Train a small RevBiFPN on scikit-learn's handwritten digits, upsampled to 64 x 64: minutes on two CPU cores.

pip install . scikit-learn matplotlib
python examples/train_digits.py --epochs 3 --plot digits.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from revbifpn import estimate_memory
from revbifpn.fast import RevBiFPN

TRAINED = 1437  # images; the other 360 are the test


def digits(size: int) -> tuple[Tensor, Tensor]:
    """Images ``[1797, 3, size, size]`` with zero mean and unit variance, and labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]  # [N, 1, 8, 8]
    images = F.interpolate(images, size=size, mode="bilinear").repeat(1, 3, 1, 1)
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def plot(path: Path, losses: list[float], accuracies: list[float]) -> None:
    """Loss of every step and test accuracy of every epoch, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(losses)
    left.set(xlabel="step", ylabel="training loss")
    right.plot(range(1, len(accuracies) + 1), accuracies, marker="o")
    right.set(xlabel="epoch", ylabel="test accuracy, %", xticks=range(1, len(accuracies) + 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stored", action="store_true", help="store activations instead of recomputing them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss and accuracy")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = digits(64)
    order = torch.randperm(len(images))
    train, test = order[:TRAINED], order[TRAINED:]
    model = RevBiFPN(channels=[48, 64, 80, 160], num_ext_layers=0, classes=10, reversible=not args.stored)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    losses, accuracies, began = [], [], time.perf_counter()
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
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            correct = sum((model(images[b]).argmax(1) == labels[b]).sum().item() for b in test.split(args.batch))
        accuracies.append(100 * correct / len(test))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}, test accuracy {accuracies[-1]:.1f} %", flush=True)
    peak = estimate_memory(model, args.batch, 64, device="cpu").activations
    kept = "stored" if args.stored else "recomputed"
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s; with activations {kept}, a step needs {peak / 2**20:.0f} MiB besides the parameters")
    if args.plot:
        plot(args.plot, losses, accuracies)
        print(f"written: {args.plot}")


if __name__ == "__main__":
    main()
