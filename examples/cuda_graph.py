"""A whole training step as one CUDA graph: forward, loss, backward and optimizer in a single launch.

    python examples/cuda_graph.py [--scale s0] [--batch 8] [--steps 50]

Small batches leave a GPU waiting for launches; :class:`revbifpn.GraphedStep` replays them all at once. Without a GPU
the same step runs uncaptured.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from revbifpn import GraphedStep, fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="s0", choices=[f"s{i}" for i in range(7)])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = getattr(fast, f"revbifpn_{arguments.scale}")(classes=10).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    images = torch.randn(arguments.batch, 3, arguments.resolution, arguments.resolution, device=device)
    labels = torch.randint(10, (arguments.batch,), device=device)

    step = GraphedStep(model, F.cross_entropy, optimizer)
    for _ in range(4):  # the warm-up and the capture
        step(images, labels)
    start = time.perf_counter()
    for _ in range(arguments.steps):
        loss = step(images, labels)
        scheduler.step()
    value = loss.item()  # waits for the device
    seconds = (time.perf_counter() - start) / arguments.steps
    print(f"loss {value:.4f}, {arguments.batch / seconds:.1f} images/s on {device}, {step.captured} graphs")


if __name__ == "__main__":
    main()
