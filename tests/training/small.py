"""Small runs of the training scripts: a narrow network, a folder of generated images, processes of their own."""

import ctypes
import itertools
import os
import signal
import struct
import sys
import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.harness import scripts
from revbifpn.training.logs import read_curves

NETWORK = [
    "channels=[48,16,16,16]",
    "head_channels=[16,16,16,16]",
    "fc_features=32",
    "num_ext_layers=0",
    "inv_blk_rep=1",
]
CLASSIFICATION, SEGMENTATION = "train_classification", "train_segmentation"
_ports = itertools.count(20000 + os.getpid() % 20000)


def options(data: Path | None, output: Path, *more: object, epochs: int = 2) -> list[object]:
    """A run of a few steps on a CPU, every one of which is logged."""
    own = [] if data is None else ["--data", data]
    own += ["--output", output, "--resolution", 32, "--batch", 4, "--epochs", epochs, "--workers", 0]
    own += ["--device", "cpu", "--log-every", 1, "--save-every", 1, "--no-progress"]
    return [*own, *more, "--model-kwargs", *NETWORK]


def run(script: str, argv: Sequence[object], folder: Path, before: Any = None) -> tuple[int, str]:
    """Exit code and what was printed."""
    log = folder / f"{next(_ports)}.log"
    life = scripts.Life(script, argv, log, before=before)
    return life.wait(), life.output()


def group(script: str, argv: Sequence[object], folder: Path, **more: Any) -> list[scripts.Life]:
    """Two processes of one group."""
    return scripts.group(script, argv, folder, port=next(_ports), **more)


def outcome(folder: Path) -> tuple[list, dict[str, torch.Tensor]]:
    """Losses and scores by step, and the weights: two runs that did the same are equal in both."""
    curves = read_curves(folder / "metrics.csv")
    kept = {name: points for name, points in curves.items() if not name.startswith("memory/")}
    return sorted(kept.items()), load_file(folder / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit."""
    (curves, weights), (others, other_weights) = outcome(one), outcome(other)
    assert curves == others
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


# Data -------------------------------------------------------------------------------------------


def write_shards(folder: Path, counts: Sequence[int], labels: int | None = None) -> list[str]:
    """Grey images whose value is their number; label: the number modulo 3."""
    paths, number = [], 0
    for i, count in enumerate(counts):
        paths.append(str(folder / f"{i}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for _ in range(count):
                buffer = BytesIO()
                Image.new("L", (2, 2), number).save(buffer, "png")
                label = str(number % 3 if labels is None else labels).encode()
                for name, content in ((f"{number:04}.png", buffer.getvalue()), (f"{number:04}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
                number += 1
    return paths


def write_mnist(folder: Path, counts: Sequence[int], label: int | None = None) -> None:
    """Noise in MNIST's format, as torchvision reads it: so many images to train on, and to evaluate on."""
    place = folder / "MNIST" / "raw"
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "t10k"), counts, strict=True):
        labels = np.arange(count) % 10 if label is None else np.full(count, label)
        for name, array in (("images-idx3", rng.integers(0, 256, (count, 28, 28))), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (place / f"{split}-{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def write_voc(folder: Path, masks: Path) -> None:
    """Images and masks of ``make_patterns.write_masks`` as torchvision's VOCSegmentation reads them."""
    root = folder / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for split in ("train", "val"):
        names = []
        for image in sorted((masks / "images" / split).iterdir()):
            names.append(f"{split}{image.stem}")
            Image.open(image).save(root / "JPEGImages" / f"{names[-1]}.jpg")
            Image.open(masks / "masks" / split / image.name).save(root / "SegmentationClass" / f"{names[-1]}.png")
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))


# What happens to a run: called in its process before the script is -------------------------------


def logged(folder: Path) -> int:
    """The last step in ``metrics.csv``."""
    return max((points[-1][0] for points in read_curves(folder / "metrics.csv").values()), default=0)


def process_of_rank(rank: int, agent: int) -> int:
    """Of the processes that torchrun, ``agent``, started."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            words = (place / "environ").read_bytes().split(b"\0") if parent == agent else ()
        except OSError:  # it has ended
            continue
        if f"RANK={rank}".encode() in words:
            return int(place.name)
    raise LookupError(f"no process of rank {rank} among the children of {agent}")


def _at_step(number: int, action: Callable[[], object]) -> None:
    """``action()`` at the beginning of a step of this process."""
    from revbifpn.training.checkpoints import Saving

    steps = itertools.count(1)

    def on_train_batch_start(self: Saving, *_: Any) -> None:
        if next(steps) == number:
            action()

    Saving.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]


def killed_in_step_3() -> None:
    _at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))


def killed_in_step_5() -> None:
    _at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))


def terminated_in_step_3() -> None:
    _at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


def killed_while_writing() -> None:
    """In the fourth checkpoint, half of which is on the disk."""
    from revbifpn.training import checkpoints

    writes = itertools.count(1)
    ordinary = torch.save

    def save(content: Any, file: Any) -> None:
        if next(writes) == 4:
            file.write(b"half of a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        ordinary(content, file)

    checkpoints.torch.save = save


def full_disk() -> None:
    """No file may grow beyond what a checkpoint takes: a write fails as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def killed_in_step_3_of_rank_1() -> None:
    if os.environ["RANK"] == "1":
        killed_in_step_3()


def terminated_in_step_3_of_rank_1() -> None:
    if os.environ["RANK"] == "1":
        terminated_in_step_3()


def killed_data_worker() -> None:
    """A process that reads images kills itself at the sixth."""
    from torch.utils.data import get_worker_info

    from revbifpn.training.data import Samples

    ordinary, read = Samples.__getitem__, itertools.count(1)

    def item(self: Samples, key: Any) -> Any:
        if get_worker_info() is not None and next(read) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return ordinary(self, key)

    Samples.__getitem__ = item  # type: ignore[method-assign]


def permissions_hold() -> None:
    """For root, too, who may otherwise write anywhere (CAP_DAC_OVERRIDE, Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    words = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits
    assert libc.capget(header, words) == 0
    words[0] &= ~(1 << 1)
    assert libc.capset(header, words) == 0


def read_only_in_step_3() -> None:
    permissions_hold()
    folder = sys.argv[sys.argv.index("--output") + 1]
    _at_step(3, lambda: os.chmod(folder, 0o500))


def norms_synchronised_on_a_cpu() -> None:
    """nn.SyncBatchNorm takes CPU tensors, and the options let it."""
    from revbifpn.training import options
    from tests import sync_norm

    sync_norm.put(setattr)
    options.device = lambda o: "cuda"  # for the check alone


def without_a_compiler() -> None:
    """torch.compile traces as ever, and runs what it traced as it is."""
    from functools import partialmethod

    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # type: ignore
