"""A data set of the command line, and its loaders for each process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Generator
from torchdata.stateful_dataloader import StatefulDataLoader

from revbifpn.training.data import Batches, ImageFolder, MaskFolder, Named, Samples, Source, Transform
from revbifpn.training.errors import DataError, OptionError
from revbifpn.training.options import Options, processes
from revbifpn.training.shards import ShardSamples, expand


class Data(LightningDataModule):
    """Training and validation, from a folder, a data set by name, or tar files.

    Args:
        options: of the command line.
        transform: ``transform(train)`` gives a :data:`revbifpn.training.data.Transform`.
        masks: targets are masks of class numbers, not labels.
    """

    samples_class = Samples
    collate: Callable[[list[Any]], Any] | None = None  # samples to a batch; None: stacked

    def __init__(self, options: Options, transform: Callable[[bool], Transform], *, masks: bool = False) -> None:
        super().__init__()
        self.options, self.transform, self.masks = options, transform, masks
        self.skipped: Path = options.output / "skipped.txt"
        self.sources: dict[bool, Source] = {}
        self.urls: dict[bool, list[str]] = {}
        if options.shards:
            self.urls = {True: expand(options.shards), False: expand(options.val_shards)}
            self.classes = [str(i) for i in range(options.classes)]
            self.samples = options.samples
        else:
            self.sources[True] = self._open(None)
            self.classes = self.sources[True].classes
            self.sources[False] = self._open(self.sources[True])
            self.samples = len(self.sources[True])
        if len(self.classes) < 2:
            where = options.shards or options.dataset or options.data
            raise DataError(f"{where}: has {len(self.classes)} class; expected at least two to tell apart")

    def _open(self, training: Source | None) -> Source:
        """A split: that to train on, or the other of ``training``."""
        o, split = self.options, "train" if training is None else "val"
        if o.dataset:
            assert training is None or isinstance(training, Named)
            return Named(o.dataset, o.data, classes=o.classes, training=training, masks=self.masks, in_chans=o.in_chans)
        if self.masks:
            if o.classes is None:
                raise OptionError("--classes: give the number of classes in the masks")
            return MaskFolder(o.data, split, o.classes, in_chans=o.in_chans)
        return ImageFolder(o.data / split, None if training is None else training.classes, in_chans=o.in_chans)

    @property
    def batch(self) -> int:
        """Known once the memory is."""
        return self.options.batch

    def batches(self, rank: int = 0) -> Batches:
        """Those to train on, of one process."""
        o, world = self.options, processes(self.options)[2]
        return Batches(self.samples, self.batch, rank=rank, world=world, group=o.accumulate, seed=o.seed, train=True)

    @property
    def updates(self) -> int:
        """Optimizer steps per epoch."""
        return len(self.batches()) // self.options.accumulate

    def samples_of(self, train: bool) -> Samples:
        """Transformed samples, by index; not of tar files."""
        o = self.options
        return self.samples_class(
            self.sources[train],
            self.transform(train),
            seed=o.seed,
            train=train,
            on_corrupt=o.on_corrupt,
            skipped=self.skipped,
        )

    def _loader(self, train: bool) -> StatefulDataLoader:
        o, rank, world = self.options, self.trainer.global_rank, self.trainer.world_size
        arguments: dict[str, Any] = {
            "num_workers": o.workers,
            "pin_memory": self.trainer.strategy.root_device.type == "cuda",
            "collate_fn": self.collate,
            "multiprocessing_context": "fork" if o.workers and sys.platform == "linux" else None,  # they end with it
            "generator": Generator().manual_seed(o.seed),  # that of the step is left alone
        }
        if self.sources:
            batches = (
                self.batches(rank)
                if train
                else Batches(len(self.sources[False]), self.batch, rank=rank, world=world, train=False)
            )
            return StatefulDataLoader(self.samples_of(train), batch_sampler=batches, **arguments)
        samples = ShardSamples(
            self.urls[train],
            o.classes,
            self.transform(train),
            seed=o.seed,
            train=train,
            batch=self.batch,
            batches=len(self.batches(rank)) if train else 0,
            rank=rank,
            world=world,
            masks=self.masks,
            in_chans=o.in_chans,
            on_corrupt=o.on_corrupt,
            skipped=self.skipped,
        )
        samples.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # also of a run that goes on
        return StatefulDataLoader(samples, self.batch, **arguments)

    def train_dataloader(self) -> StatefulDataLoader:
        return self._loader(True)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._loader(False)
