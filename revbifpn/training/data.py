"""Images and targets, from disk to batches.

Which samples make up batch k of an epoch, and how each of them is augmented, depends on nothing but ``--seed``, the
epoch and k: not on the number of data workers, not on where a run was interrupted, and not on the number of processes,
which take the batches of one sequence in turns (process r of R takes k = r, R + r, 2 R + r, ...). That is why a run can
go on in the middle of an epoch as if nothing had happened, and why two processes train on what one process with twice
the accumulation trains on.
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from revbifpn.training.errors import DataError, OptionError, SaveError

IGNORED = -1  # a target that counts in no loss and no metric
Key = tuple[int, int, bool]  # epoch, index, whether the sample counts
Transform = Callable[[Image.Image, Any], tuple[Tensor, Any]]
REMEDY = "replace or delete it, or train on the others with --on-corrupt skip"


class Source(Protocol):
    """Images and targets by index; ``load`` raises :class:`DataError` with the file's name."""

    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, Any]: ...


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """The CPU generators of Python, NumPy and PyTorch start from ``numbers``; afterwards they are as they were."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # those of other devices stay
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def open_image(file: Path | bytes, name: str, *, in_chans: int = 3) -> Image.Image:
    """An image of 8 bits in RGB, or grey for one channel.

    Raises:
        DataError: no image can be read, or it has more than 8 bits, which a conversion would clip.
    """
    image = _read(file, name)
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"{name}: mode {image.mode}, more than 8 bits per channel, which a conversion to 8 bits would clip; scale "
            "it to 8 bits in a copy of the data set (with Pillow: image.point(lambda v: v / 256).convert('L')), or "
            "train on the others with --on-corrupt skip"
        )
    return image.convert("L" if in_chans == 1 else "RGB")


def open_mask(file: Path | bytes, name: str, classes: int | None, ignored: int = 255) -> Image.Image:
    """A mask of class numbers, grey or with a palette; ``ignored`` in it is counted nowhere.

    Raises:
        DataError: no mask can be read, it has colours, or a number that is no class.
    """
    mask = _read(file, name)
    if mask.mode not in ("L", "P", "1"):
        raise DataError(f"{name}: mode {mask.mode}; expected a mask of 8 bits, one class number per pixel: {REMEDY}")
    largest = max((v for v in np.unique(np.asarray(mask)).tolist() if v != ignored), default=0)
    if classes is not None and largest >= classes:
        raise DataError(
            f"{name}: class {largest} is out of range, there are {classes} classes, counted from 0; correct the mask, "
            f"raise --classes, or mark pixels that are no class with {ignored}"
        )
    return mask


def _read(file: Path | bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # damaged files raise any of them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: no image can be read: {reason}; {REMEDY}") from None
    return image


class Samples(Dataset):
    """Transformed samples of a source, by :data:`Key`.

    Args:
        source: images and targets.
        transform: ``transform(image, target) -> (tensor, target)``, random numbers included.
        seed: of the random numbers, with epoch and index.
        train: a sample that cannot be read gives way to the next one; in validation it counts for nothing.
        on_corrupt: ``"raise"`` or ``"skip"``.
        skipped: a file to which the message about every sample that was skipped is appended.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        seed: int,
        train: bool,
        on_corrupt: str = "raise",
        skipped: Path | None = None,
    ) -> None:
        self.source, self.transform, self.seed, self.train = source, transform, seed, train
        self.on_corrupt, self.skipped = on_corrupt, skipped

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, Any]:
        epoch, index, counts = key
        for step in range(len(self)):
            try:
                image, target = self.source.load((index + step) % len(self))
            except DataError as error:
                if self.on_corrupt == "raise":
                    raise
                note(self.skipped, error)
                counts = counts and self.train
                continue
            with seeded(self.seed, epoch, index):
                return self.finish(self.transform(image, target), counts)
        raise DataError(f"none of the {len(self)} images can be read; the reasons are in {self.skipped}")

    def finish(self, sample: tuple[Tensor, Any], counts: bool) -> tuple[Tensor, Any]:
        """Tensors; a target that counts nowhere says so."""
        return finish(sample, counts)


def note(path: Path | None, error: Exception) -> None:
    """One line more, of one write, so that data workers do not mix theirs."""
    if path is None:
        return
    try:
        with path.open("a") as file:
            file.write(" ".join(str(error).split()) + "\n")
    except OSError as cause:
        raise SaveError(f"{path}: cannot be written: {cause.strerror}; make room, and add --resume") from cause


def skipped_names(path: Path) -> list[str]:
    """The samples that were skipped, each once."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list(dict.fromkeys(line.partition(": ")[0] for line in lines))


def finish(sample: tuple[Tensor, Any], counts: bool) -> tuple[Tensor, Tensor]:
    image, target = sample[0], torch.as_tensor(sample[1], dtype=torch.int64)
    return image, target if counts else torch.full_like(target, IGNORED)


class Batches(Sampler[list[Key]]):
    """The keys of this process's batches, of an epoch that all processes cut in the same way.

    In training samples are shuffled, and those left over after whole groups (a batch for each process and each step of
    the accumulation) wait for another epoch. In validation every sample counts once: batches are filled up with samples
    that do not count, so that every process has as many batches as the others.

    Args:
        samples: in the data set.
        batch: samples per batch.
        rank, world: this process, and how many there are.
        group: batches per process that belong together.
        seed: of the order.
        train: shuffled and whole groups only.
    """

    def __init__(
        self, samples: int, batch: int, *, rank: int = 0, world: int = 1, group: int = 1, seed: int = 0, train: bool
    ) -> None:
        self.samples, self.batch, self.rank, self.world, self.seed, self.train = (
            samples,
            batch,
            rank,
            world,
            seed,
            train,
        )
        whole = samples // (batch * world * group) * group
        self.batches = whole if train else math.ceil(samples / (batch * world))
        if not self.batches:
            needed = batch * world * group
            raise OptionError(
                f"--batch {batch}, {world} processes and --accumulate {group} need {needed} images for one step, the "
                f"data set has {samples}: lower --batch or --accumulate"
            )
        self.epoch = self.position = 0

    @property
    def sampler(self) -> Batches:
        """Where a trainer looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        if self.position >= self.batches:
            self.epoch, self.position = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        )
        order = torch.randperm(self.samples, generator=generator).tolist() if self.train else range(self.samples)
        while self.position < self.batches:
            start = (self.position * self.world + self.rank) * self.batch
            self.position += 1
            places = range(start, start + self.batch)
            yield [(self.epoch, order[p % self.samples], p < self.samples) for p in places]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


# Sources ----------------------------------------------------------------------------------------


class ImageFolder:
    """``FOLDER/CLASS/IMAGE``, as torchvision's.

    Args:
        folder: of one split.
        classes: those of the training split, whose numbers this split's classes have; None: this is it.

    Raises:
        DataError: the folder is missing, a class is empty, or one is not in ``classes``.
    """

    def __init__(self, folder: Path, classes: Sequence[str] | None = None, *, in_chans: int = 3) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self.folder, self.in_chans = folder, in_chans
        found = subfolders(folder)
        if not found:
            raise DataError(f"{folder}: has no folders; expected one for each class, with its images")
        self.classes = found if classes is None else list(classes)
        check_known(found, self.classes, folder)
        self.samples: list[tuple[Path, int]] = []
        for name in found:
            files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            if not files:
                raise DataError(
                    f"{folder / name}: an empty class, no file ends in {', '.join(IMG_EXTENSIONS)}: add images, or "
                    "remove the folder (and the class's folder in the other split)"
                )
            self.samples += [(path, self.classes.index(name)) for path in files]

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return open_image(path, str(path), in_chans=self.in_chans), label


def check_known(found: Sequence[str], classes: Sequence[str], split: Path | str) -> None:
    """Every class of a split is one of the training split."""
    if unknown := [name for name in found if name not in classes]:
        raise DataError(
            f"{Path(split, unknown[0])}: class {unknown[0]!r} appears only in this split, and nothing is trained on it "
            f"({len(unknown)} such classes): remove it, or add images of it to the training split"
        )


def subfolders(folder: Path) -> list[str]:
    """Names, sorted; those that begin with a dot are left out."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed: {error.strerror}; expected a folder with one for each class"
        ) from None


class MaskFolder:
    """``FOLDER/images/SPLIT/NAME.*`` with a mask ``FOLDER/masks/SPLIT/NAME.png`` for each.

    Raises:
        DataError: a folder or a mask is missing, or there are no images.
    """

    def __init__(self, folder: Path, split: str, classes: int, *, in_chans: int = 3) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        images, masks = folder / "images" / split, folder / "masks" / split
        self.in_chans, self.classes = in_chans, [str(i) for i in range(classes)]
        if not images.is_dir():
            raise DataError(f"{images}: there is no such folder; expected images there, and their masks in {masks}")
        files = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise DataError(f"{images}: no file ends in {', '.join(IMG_EXTENSIONS)}")
        self.samples = [(p, masks / p.relative_to(images).with_suffix(".png")) for p in files]
        if missing := [mask for _, mask in self.samples if not mask.exists()]:
            raise DataError(
                f"{missing[0]}: there is no such mask, nor {len(missing) - 1} others; every image needs one of its name"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, Image.Image]:
        path, mask_path = self.samples[index]
        image = open_image(path, str(path), in_chans=self.in_chans)
        mask = open_mask(mask_path, str(mask_path), len(self.classes))
        if mask.size != image.size:
            raise DataError(f"{mask_path}: {mask.size} pixels, its image {path} has {image.size}; {REMEDY}")
        return image, mask


class Named:
    """A dataset of timm (``"torch/cifar10"``, ``"hfds/..."``) or a class of torchvision (``"torchvision/STL10"``).

    Args:
        name: as above.
        root: its folder.
        classes: how many; None: as many as the dataset names.
        training: the training split, whose numbers this one's classes have; None: this is it.
        masks: targets are masks, not labels.

    Raises:
        OptionError: there is no such dataset, it is a stream, or its number of classes is unknown.
        DataError: a class is not in the training split.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        *,
        classes: int | None,
        training: Named | None = None,
        masks: bool = False,
        in_chans: int = 3,
    ) -> None:
        train = training is None
        self.name, self.masks, self.in_chans = f"{name} {'train' if train else 'val'}", masks, in_chans
        self.dataset = _torchvision(name, root, train) if name.startswith("torchvision/") else _timm(name, root, train)
        self.names = _class_names(self.dataset)
        if classes is None and self.names is None:
            raise OptionError(f"--dataset {name}: it does not say how many classes it has; give --classes")
        counted = [str(i) for i in range(classes or 0)]
        self.classes = self.names if self.names and classes in (None, len(self.names)) else counted
        self.numbers: list[int] | None = None  # of the training split, by this one's
        if training is not None:
            self.classes = training.classes
            if self.names is not None and training.names == training.classes:
                check_known(self.names, self.classes, self.name)
                self.numbers = [self.classes.index(n) for n in self.names]

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, Any]:
        """Read here where the dataset names its files: some skip damaged images, and clip those of 16 bits."""
        from torchvision.datasets import DatasetFolder

        if isinstance(self.dataset, DatasetFolder):
            path, target = self.dataset.samples[index]
            return open_image(Path(path), path, in_chans=self.in_chans), self._target(target, path)
        name = f"{self.name}[{index}]"
        reader = getattr(self.dataset, "reader", None)  # timm's
        try:
            if reader is not None:
                name = str(reader.filename(index, absolute=True) or name)
                file, target = reader[index][:2]
                with file:
                    image = open_image(file.read(), name, in_chans=self.in_chans)
                return image, self._target(target, name)
            image, target = self.dataset[index]
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{name}: cannot be read: {error}; {REMEDY}") from None
        return as_image(image, name, self.in_chans), self._target(target, name)

    def _target(self, target: Any, name: str) -> Any:
        if self.masks:
            return open_mask(_png(target), f"{name}'s mask", len(self.classes))
        label = checked_label(target, name, len(self.classes if self.numbers is None else self.numbers))
        return label if self.numbers is None else self.numbers[label]


def _class_names(dataset: Any) -> list[str] | None:
    """By their numbers."""
    names = getattr(dataset, "classes", None)
    if names is None:
        numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
        names = sorted(numbers, key=numbers.get) if numbers else None
    return None if names is None else [str(name) for name in names]


def as_image(image: Image.Image, name: str, in_chans: int) -> Image.Image:
    """As :func:`open_image`, of what is open already."""
    return (
        open_image(_png(image), name, in_chans=in_chans)
        if image.mode.startswith(("I", "F"))
        else image.convert("L" if in_chans == 1 else "RGB")
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png" if not image.mode.startswith("F") else "tiff")
    return buffer.getvalue()


def checked_label(label: Any, name: str, classes: int) -> int:
    if isinstance(label, (bool, float)) or not 0 <= int(label) < classes:
        raise DataError(
            f"{name}: label {label} is out of range, there are {classes} classes, counted from 0: correct it, or raise "
            "--classes"
        )
    return int(label)


def _timm(name: str, root: Path, train: bool) -> Any:
    from timm.data import create_dataset

    if name.partition("/")[0].lower() in ("wds", "tfds", "hfids"):
        raise OptionError(f"--dataset {name}: is a stream, without positions to go on from; give --shards tar files")
    try:
        return create_dataset(name, root=str(root), split="train" if train else "validation", is_training=train)
    except (AssertionError, RuntimeError, OSError, ValueError, ImportError) as error:
        raise OptionError(f"--dataset {name}: cannot be opened in {root}: {error}") from error


def _torchvision(name: str, root: Path, train: bool) -> Any:
    """By the arguments that torchvision's datasets have for a split, one after another."""
    import inspect

    from torchvision import datasets

    kind = getattr(datasets, name.removeprefix("torchvision/"), None)
    if kind is None:
        raise OptionError(f"--dataset {name}: torchvision.datasets has none of that name")
    arguments = inspect.signature(kind).parameters
    splits: list[dict[str, Any]] = [{"train": train}] if "train" in arguments else []
    for argument in ("split", "image_set"):
        if argument in arguments:
            splits += [{argument: split} for split in (("train", "training") if train else ("val", "valid", "test"))]
    failed: Exception | None = None
    for split in splits:
        try:
            return kind(str(root), **split)
        except (RuntimeError, OSError, ValueError) as error:
            failed = failed or error
    raise OptionError(f"--dataset {name}: cannot be opened in {root}: {failed or 'it has no splits'}") from failed
