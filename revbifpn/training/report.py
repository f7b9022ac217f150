"""What a run leaves behind: the model, curves, a confusion matrix, and memory as expected and as measured."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.export import Dim

from revbifpn.checkpoints import save_checkpoint
from revbifpn.estimate import MemoryEstimate
from revbifpn.export import export_onnx
from revbifpn.memory import PeakMemory
from revbifpn.model import RevBiFPN
from revbifpn.training.checkpoints import write_whole
from revbifpn.training.logs import read_curves
from revbifpn.training.options import Options


class Memory(Callback):
    """Measures a training step: on CUDA what the allocator hands out, over the run; elsewhere the tensors of one step.

    The step is the second one, when the optimizer has its state.

    Args:
        steps: measure a step where there is no allocator to ask; it takes a few seconds longer.
    """

    def __init__(self, *, steps: bool) -> None:
        self.steps = steps
        self.measured = 0
        self._meter: PeakMemory | None = None
        self._alive = 0
        self._steps = 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._steps += 1
        second = self._steps == trainer.accumulate_grad_batches + 1
        if trainer.strategy.root_device.type == "cuda" or not (self.steps and second):
            return
        module.zero_grad(set_to_none=True)
        tensors = [*module.parameters(), *module.buffers(), *batch, *(p.grad for p in module.parameters())]
        states = [t for state in trainer.optimizers[0].state.values() for t in state.values()]
        self._alive = sum(t.nbytes for t in (*tensors, *states) if isinstance(t, Tensor))
        self._meter = PeakMemory(trainer.strategy.root_device)
        self._meter.__enter__()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self.measured, self._meter = self._alive + self._meter.peak_bytes, None
        if trainer.strategy.root_device.type == "cuda":
            self.measured = torch.cuda.max_memory_allocated(trainer.strategy.root_device)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._meter = None

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        if self.measured:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            values = {"memory/step_gb": self.measured / 1e9, "memory/host_resident_gb": resident / 1e9}
            module.record(values, trainer.global_step)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def expectation(batch: int, estimate: MemoryEstimate, average: int) -> str:
    """A line for the terminal."""
    parts = {
        name: getattr(estimate, name) for name in ("activations", "images", "parameters", "gradients", "optimizer")
    }
    listed = ", ".join(f"{name} {gigabytes(count)}" for name, count in (parts | {"average": average}).items() if count)
    return f"batch {batch}: expects {gigabytes(estimate.total + average)} of memory for a step ({listed})"


def plot_curves(metrics: Path, output: Path, expected: int | None, measured: int) -> None:
    """Loss, score, learning rate and memory over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = read_curves(metrics)
    panels = [
        ("loss", [n for n in curves if n.endswith("/loss")]),
        ("validation", [n for n in curves if n.startswith("val/") and n != "val/loss"]),
        ("learning rate", [n for n in curves if n == "train/lr"]),
        ("memory, GB", [n for n in curves if n.startswith("memory/")]),
    ]
    panels = [(title, names) for title, names in panels if names]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (title, names) in zip(axes[0], panels, strict=True):
        for name in names:
            points = curves[name]
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
        if title.startswith("memory") and expected:
            axis.axhline(expected / 1e9, color="black", linestyle="--", label="expected of a step")
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize="small")
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_confusion(matrix: Tensor, classes: list[str], output: Path) -> None:
    """Shares of each true class, by rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    figure, axis = pyplot.subplots(figsize=(min(2 + 0.4 * len(classes), 14),) * 2, layout="constrained")
    axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axis.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 40:
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
    if len(classes) <= 15:
        for i, row in enumerate(matrix.tolist()):
            for j, count in enumerate(row):
                axis.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def export(model: nn.Module, options: Options) -> list[Path]:
    """``model.safetensors``, ``model.onnx``: what was asked for."""
    written = []
    if "safetensors" in options.export:
        written.append(options.output / "model.safetensors")
        save_checkpoint(model, written[-1])
    if "onnx" in options.export:
        written.append(options.output / "model.onnx")
        partial = options.output / "partial.onnx"
        _export_onnx(model, partial, options)
        write_whole(written[-1], lambda file: file.write(partial.read_bytes()))
        partial.unlink()
    return written


@torch.no_grad()
def _export_onnx(model: nn.Module, path: Path, options: Options) -> None:
    if isinstance(model, RevBiFPN):
        export_onnx(model, path, options.resolution, dynamic_batch=True)
        return
    image = torch.zeros(2, options.in_chans, options.resolution, options.resolution)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
    program = torch.onnx.export(
        model, (image,), dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False, **names
    )
    assert program is not None
    program.save(path)
