"""One training step as Lightning runs it, with timm's optimizers, schedules, mixup and average."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import ConfusionMatrix, MeanMetric, MetricCollection

from revbifpn.graphed import GraphedStep
from revbifpn.model import RevBiFPN
from revbifpn.training.data import IGNORED
from revbifpn.training.errors import OptionError, TrainingError
from revbifpn.training.loaders import Data
from revbifpn.training.options import DTYPES, Options
from revbifpn.training.shards import ShardSamples


@dataclass(frozen=True)
class Work:
    """What a script trains: the parts in which classification and segmentation differ.

    Attributes:
        score: name of the metric that says which epoch is best; higher is better.
        metrics: ``metrics(classes)``, that take ``(outputs, targets)`` and ignore targets of :data:`IGNORED`.
        mix: ``mix(images, targets) -> (images, targets)`` on the device, with random numbers of NumPy; None: nothing.
    """

    score: str
    metrics: Callable[[int], MetricCollection]
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def compress(model: DistributedDataParallel, how: str) -> None:
    """Send gradients in 16 bits, or by PowerSGD once a hundred steps have shown what they are like.

    Lightning's strategy would register a hook on CUDA alone.
    """
    if how == "powersgd":
        model.register_comm_hook(
            powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=100), powerSGD_hook.powerSGD_hook
        )
        return
    hooks = {"bfloat16": default_hooks.bf16_compress_hook, "float16": default_hooks.fp16_compress_hook}
    model.register_comm_hook(None, hooks[how])


class OptimizerInBackward:
    """Updates each parameter when its gradient arrives, and frees the gradient.

    ``optimizer`` itself never steps: it owns the groups, which schedules change, and the state, which checkpoints hold.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        accepted = inspect.signature(type(optimizer)).parameters  # a class may have more defaults than arguments
        options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
        for group in optimizer.param_groups:
            for p in group["params"]:
                own = type(optimizer)([p], **options)
                p.register_post_accumulate_grad_hook(self._hook(own, group))

    def _hook(self, own: Optimizer, group: dict[str, Any]) -> Callable[[Tensor], None]:
        place = next(i for i, g in enumerate(self.optimizer.param_groups) if g is group)

        def update(p: Tensor) -> None:
            own.state = self.optimizer.state  # both are replaced when a checkpoint is loaded
            own.param_groups[0].update({k: v for k, v in self.optimizer.param_groups[place].items() if k != "params"})
            own.step()
            p.grad = None

        return update


class Task(LightningModule):
    """A model, its loss, optimizer, schedule, average and metrics.

    Args:
        model: gives logits ``[N, classes, ...]`` for images ``[N, C, H, W]``.
        work: see :class:`Work`.
        options: of the command line.
        data: its classes' names, and the optimizer steps per epoch.
    """

    def __init__(self, model: nn.Module, work: Work, options: Options, data: Data) -> None:
        super().__init__()
        self.model, self.work, self.options = model, work, options
        self.classes, self.updates = data.classes, data.updates
        classes = self.classes
        self.ema = ModelEmaV3(model, options.ema).requires_grad_(False) if options.ema else None
        self.metrics = work.metrics(len(classes))
        self.confusion = ConfusionMatrix(task="multiclass", num_classes=len(classes), ignore_index=IGNORED)
        self.validation_loss = MeanMetric()
        self.results: dict[str, float] = {}  # of the last validation
        self._losses: list[Tensor] = []  # since they were last logged
        self._step: GraphedStep | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The average, where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def score(self) -> float:
        return self.results.get(self.work.score, float("-inf"))

    @property
    def listed(self) -> str:
        """The results, for the terminal."""
        return ", ".join(f"{name} {value:.4g}" for name, value in self.results.items())

    # Set-up ------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.options.strategy != "fsdp" or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        dtype = DTYPES[self.options.precision]
        policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype)
        mesh = self.device_mesh["data_parallel"]
        for body in [m for m in self.model.modules() if isinstance(m, RevBiFPN)]:
            for block in body.rev_stack.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self._sharded = True

    def configure_optimizers(self) -> dict[str, Any]:
        o = self.options
        arguments: dict[str, Any] = {"lr": o.lr, "weight_decay": o.weight_decay, "layer_decay": o.layer_decay}
        if o.graphed and self.device.type == "cuda":  # learning rates are read on the device
            arguments |= {"fused": True} | ({"capturable": True} if "adam" in o.opt else {})
        if o.layer_decay and not hasattr(self.model, "group_matcher"):
            raise OptionError(f"--layer-decay: {type(self.model).__name__} does not say which layer is before which")
        try:
            optimizer = create_optimizer_v2(self.model, o.opt, **arguments)
        except (ValueError, TypeError, AssertionError) as error:
            raise OptionError(f"--opt {o.opt}: timm makes no such optimizer: {error}") from error
        try:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                o.sched,
                num_epochs=o.epochs,
                warmup_epochs=o.warmup_epochs,
                min_lr=o.lr * 1e-2,
                warmup_lr=o.lr * 1e-2,
                step_on_epochs=False,
                updates_per_epoch=self.updates,
            )
        except (ValueError, AssertionError) as error:
            raise OptionError(f"--sched {o.sched}: timm makes no such schedule: {error}") from error
        if o.optimizer_in_backward:
            OptimizerInBackward(optimizer)
        if o.sched == "none":
            return {"optimizer": optimizer}
        if o.sched == "plateau":
            raise OptionError("--sched plateau: follows epochs; take one that goes by steps, such as cosine")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_fit_start(self) -> None:
        seed = int(np.random.SeedSequence((self.options.seed, self.global_rank)).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)

    def on_train_start(self) -> None:
        o = self.options
        if o.graphed:
            optimizer = self.optimizers(use_pl_optimizer=False)
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            self._step = GraphedStep(
                self.model,
                self.loss,
                optimizer,
                scaler,
                self.ema.update if self.ema is not None else None,
                accumulate=o.accumulate,
                clip_norm=o.clip_norm,
            )
        if o.compile:
            self.model.compile()
        if o.compress:
            compress(self.trainer.strategy.model, o.compress)

    def on_train_epoch_start(self) -> None:
        samples = self.trainer.train_dataloader.dataset
        if isinstance(samples, ShardSamples):  # Lightning tells samplers alone
            samples.set_epoch(self.current_epoch)

    # A step ------------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, of class numbers or of shares of classes."""
        if targets.is_floating_point():
            return F.cross_entropy(outputs, targets)
        return F.cross_entropy(outputs, targets, ignore_index=IGNORED, label_smoothing=self.options.smoothing)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, targets = batch if self.work.mix is None else self.work.mix(*batch)
        loss = self.loss(self.model(images), targets) if self._step is None else self._step(images, targets)
        self._losses.append(loss.detach())
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._step is None:
            loss.backward(*args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if self._step is None:
            optimizer.zero_grad()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, closure: Callable[[], Any] | None = None
    ) -> None:
        if self._step is not None or self.options.optimizer_in_backward:
            if closure is not None:  # forward and backward, and the update with them
                closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        step = self.global_step + 1
        if self.ema is not None and self._step is None:
            self.ema.update(self.model, step)
        if step % self.options.log_every == 0:
            self._log(step, optimizer.param_groups[0]["lr"])

    def _log(self, step: int, lr: float) -> None:
        mean = self.trainer.strategy.reduce(torch.stack(self._losses).float().mean(), reduce_op="mean")
        self._losses.clear()
        loss = mean.item()
        self.log("loss", loss, prog_bar=True, logger=False)
        self.record({"train/loss": loss, "train/lr": lr}, step)
        if not np.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} in step {step}: lower --lr, add --clip-norm, or with --stream fixed16 look at "
                "docs/streams.md on its range; the last checkpoint is from before"
            )

    def record(self, values: dict[str, float], step: int) -> None:
        """Into the logs, and on the progress bar."""
        for logger in self.loggers:
            logger.log_metrics(values, step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["losses"] = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._losses = list(checkpoint["losses"].to(self.device).unbind())

    # Validation --------------------------------------------------------------------------------

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, targets = batch
        outputs = self.evaluated(images).float()
        counted = (targets != IGNORED).sum()
        if counted:
            self.validation_loss.update(F.cross_entropy(outputs, targets, ignore_index=IGNORED), counted)
            self.metrics.update(outputs, targets)
            self.confusion.update(outputs.argmax(1), targets)

    def computed(self) -> dict[str, float]:
        """Loss and scores of the validation that ends."""
        values = {"loss": self.validation_loss, **self.metrics}
        found = {name: metric.compute().item() for name, metric in values.items()}
        self.matrix = self.confusion.compute().cpu()
        for metric in (self.validation_loss, self.metrics, self.confusion):
            metric.reset()
        return found

    def on_validation_epoch_end(self) -> None:
        self.results = self.computed()
        if not self.trainer.sanity_checking and self.trainer.training is False and self.trainer.state.fn == "fit":
            self.record({f"val/{name}": value for name, value in self.results.items()}, self.global_step)
            self.print(f"epoch {self.current_epoch + 1}: {self.listed}")
