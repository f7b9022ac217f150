"""A whole training step as one CUDA graph: forward, loss, backward and optimizer in a single launch.

    python examples/cuda_graph.py [--scale s0] [--batch 8] [--steps 50]

Small batches leave a GPU waiting for launches. The fused path neither synchronises nor reads the state of random
generators, so that its step can be captured as it is. Without a GPU the same step runs uncaptured.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from revbifpn import fast

WARM_UP = 3  # steps before the capture: kernels are compiled and tuned, the optimizer makes its state


class GraphedStep:
    """``step(images, labels) -> loss``, captured once and replayed from then on.

    Args:
        model, optimizer: on CUDA; the optimizer with ``capturable=True`` where it has such an argument.
        images, labels: of the shapes that every later call has.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.images, self.labels = images.clone(), labels.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.loss = self._step()

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss


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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(arguments.batch, 3, arguments.resolution, arguments.resolution, device=device)
    labels = torch.randint(10, (arguments.batch,), device=device)

    def eager(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    step = GraphedStep(model, optimizer, images, labels) if device.type == "cuda" else eager
    start = time.perf_counter()
    for _ in range(arguments.steps):
        loss = step(images, labels)
    value = loss.item()  # waits for the device
    seconds = (time.perf_counter() - start) / arguments.steps
    how = "one graph per step" if device.type == "cuda" else "no GPU: steps ran uncaptured"
    print(f"loss {value:.4f}, {arguments.batch / seconds:.1f} images/s on {device} ({how})")


if __name__ == "__main__":
    main()
