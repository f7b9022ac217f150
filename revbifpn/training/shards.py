"""Tar files of samples, as WebDataset writes them: data larger than a disk, read from front to back.

A sample is the files of one name: ``00012.jpg`` and ``00012.cls`` (a number in text), or ``00012.jpg`` and
``00012.png``, a mask. A URL may be a path with braces, ``train-{0000..0146}.tar``, or a command,
``pipe:curl -s https:...``.

Streams have no length, and samples no number. In training each process and data worker reads shards of its own, in an
order that ``--seed`` and the epoch give, and begins anew when it is through before the epoch is; samples are shuffled
in a buffer before anything is decoded, so that the way back to a position in the middle costs reading, but no decoding.
In validation all read all shards and take samples in turns.
"""

from __future__ import annotations

import math
import random
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from revbifpn.training.data import Transform, checked_label, finish, note, open_image, open_mask, seeded
from revbifpn.training.errors import DataError, OptionError

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff")
GIVE_UP = 10_000
Raw = dict[str, Any]


def expand(pattern: str) -> list[str]:
    """URLs by their braces.

    Raises:
        DataError: files that do not exist.
    """
    from webdataset.shardlists import expand_urls

    urls = list(expand_urls(pattern))
    if missing := [url for url in urls if ":" not in url and not Path(url).is_file()]:
        raise DataError(
            f"{missing[0]}: there is no such file; --shards {pattern} names {len(urls)}, {len(missing)} are missing"
        )
    return urls


class ShardSamples(IterableDataset):
    """Transformed samples of tar files.

    Args:
        urls: of the shards.
        classes: how many there are.
        transform, seed, train, on_corrupt, skipped: see :class:`revbifpn.training.data.Samples`.
        batch: samples per batch.
        batches: per process and epoch, in training.
        rank, world: this process, and how many there are.
        masks: targets are masks.
        buffer: samples that are shuffled among each other.
    """

    def __init__(
        self,
        urls: list[str],
        classes: int,
        transform: Transform,
        *,
        seed: int,
        train: bool,
        batch: int,
        batches: int = 0,
        rank: int = 0,
        world: int = 1,
        masks: bool = False,
        in_chans: int = 3,
        on_corrupt: str = "raise",
        skipped: Path | None = None,
        buffer: int = 1000,
    ) -> None:
        self.urls, self.classes, self.transform, self.seed, self.train = urls, classes, transform, seed, train
        self.batch, self.batches, self.rank, self.world, self.masks = batch, batches, rank, world, masks
        self.in_chans, self.on_corrupt, self.skipped, self.buffer = in_chans, on_corrupt, skipped, buffer
        self.epoch = self.drawn = self.given = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.drawn, self.given = epoch, 0, 0

    def __len__(self) -> int:
        if not self.train:
            raise TypeError("shards to evaluate on do not say how many samples they have")
        return self.batches * self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if self.train:
            yield from self._epoch(part, parts)
        else:
            yield from self._validation(self.rank * parts + part, self.world * parts)

    def _epoch(self, part: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
        wanted = len(range(part, self.batches, parts)) * self.batch
        if len(self.urls) < self.world * parts:
            raise OptionError(
                f"--shards: {len(self.urls)} files for {self.world} processes of {parts} data workers; each needs one: "
                "lower --workers, or write more shards"
            )
        stream = self._shuffled(self.rank * parts + part, self.world * parts)
        for _ in range(self.drawn):  # the way back to where a run was interrupted
            next(stream)
        unreadable = 0  # in a row
        while self.given < wanted:
            raw = next(stream)
            self.drawn += 1
            sample = self._sample(raw, True)
            if sample is not None:
                self.given, unreadable = self.given + 1, 0
                yield sample
            elif (unreadable := unreadable + 1) > GIVE_UP:
                raise DataError(f"{GIVE_UP} samples in a row cannot be read; the reasons are in {self.skipped}")

    def _shuffled(self, part: int, parts: int) -> Iterator[Raw]:
        """Without end."""
        order = random.Random(f"{self.seed} {self.epoch}")
        own = random.Random(f"{self.seed} {self.epoch} {part}")
        waiting: list[Raw] = []
        while True:
            urls = list(self.urls)
            order.shuffle(urls)
            for raw in self._raw(urls[part::parts]):
                waiting.append(raw)
                if len(waiting) >= self.buffer:
                    yield waiting.pop(own.randrange(len(waiting)))
            if not waiting:
                raise DataError(f"{', '.join(urls[part::parts])}: no samples in these shards")
            while waiting:  # a stream that ends is given out before it begins anew: every sample comes once
                yield waiting.pop(own.randrange(len(waiting)))

    def _validation(self, part: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
        last, total, given = None, 0, 0
        for total, raw in enumerate(self._raw(self.urls), 1):
            if (total - 1) % parts == part or last is None:
                sample = self._sample(raw, (total - 1) % parts == part)
                last = sample or last
                if sample is not None and (total - 1) % parts == part:
                    given += 1
                    yield sample
        if last is None:
            raise DataError(f"{', '.join(self.urls)}: no samples in these shards")
        for _ in range(math.ceil(total / parts) - given):  # as many for every process
            yield finish(last, False)

    def _raw(self, urls: list[str]) -> Iterator[Raw]:
        from webdataset.tariterators import tarfile_samples

        for url in urls:
            try:
                yield from tarfile_samples([{"url": url}])
            except (OSError, ValueError, EOFError, tarfile.TarError) as error:
                raise DataError(f"{url}: cannot be read as a tar file to its end: {error}; fetch it again") from None

    def _sample(self, raw: Raw, counts: bool) -> tuple[Tensor, Tensor] | None:
        name = f"{raw.get('__url__')}[{raw['__key__']}]"
        try:
            image = next((raw[e] for e in IMAGES if e in raw and not (self.masks and e == "png")), None)
            target = raw.get("png" if self.masks else "cls")
            if image is None or target is None:
                raise DataError(
                    f"{name}: expected an image and a .{'png' if self.masks else 'cls'} of that name, got "
                    f"{', '.join(sorted(k for k in raw if not k.startswith('__')))}"
                )
            opened = open_image(image, name, in_chans=self.in_chans)
            value = open_mask(target, name, self.classes) if self.masks else self._label(target, name)
        except DataError as error:
            if self.on_corrupt == "raise":
                raise
            note(self.skipped, error)
            return None
        with seeded(self.seed, self.epoch, zlib.crc32(raw["__key__"].encode())):
            return finish(self.transform(opened, value), counts)

    def _label(self, text: bytes, name: str) -> int:
        try:
            return checked_label(int(text), name, self.classes)
        except ValueError:
            raise DataError(f"{name}: its .cls is no number: {text[:20]!r}") from None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "drawn": self.drawn, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["epoch"] < self.epoch:
            return  # of an epoch that was through
        self.epoch, self.drawn, self.given = state["epoch"], state["drawn"], state["given"]
