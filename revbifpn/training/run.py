"""From options to a trained model: what both scripts do, in order."""

from __future__ import annotations

import atexit
import copy
import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import distributed, nn

from revbifpn import fast
from revbifpn.checkpoints import CheckpointError, load_checkpoint, published_file
from revbifpn.configs import get_config
from revbifpn.estimate import StepEstimator
from revbifpn.model import RevBiFPN
from revbifpn.training import report
from revbifpn.training.checkpoints import BEST, KEY, LAST, Saving, WholeFiles, check_same, plain, read
from revbifpn.training.data import skipped_names
from revbifpn.training.errors import OptionError, SaveError, Stopped, TrainingError
from revbifpn.training.loaders import Data
from revbifpn.training.logs import MetricsFile
from revbifpn.training.options import DTYPES, OPTIMIZER_STATES, Options, device, processes
from revbifpn.training.task import Task, Work

LIGHTNING = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
MAY_CHANGE = {  # options that may be others when a run goes on: its losses do not depend on them
    *("config", "output", "resume", "save_every", "log_every", "export", "progress", "pictures"),
    *("data", "dataset", "shards", "val_shards", "samples", "classes", "workers", "on_corrupt"),
    *("device", "devices", "nodes", "max_memory", "graphed", "compile", "stored", "optimizer_in_backward", "compress"),
    *("pretrained", "weights"),
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Outcome:
    """Of a run: the task, the model of its best epoch, and where everything is."""

    task: Task
    data: Data
    output: Path
    model: nn.Module


def backbone(options: Options, classes: int | None) -> RevBiFPN:
    """The network that the options describe, with weights from a file if they name one; None: without head.

    Raises:
        OptionError: the weights do not fit in more than the number of classes.
    """
    o = options
    arguments = get_config(o.arch).arguments() | o.model_kwargs
    torch.manual_seed(o.seed)
    model = fast.RevBiFPN(**arguments, classes=classes, in_chans=o.in_chans, stream=o.stream, reversible=not o.stored)
    path = published_file(get_config(o.arch), progress=True) if o.pretrained else o.weights
    if path is not None:
        load_weights(model, path)
    return model.freeze_norms() if o.freeze_norms else model


def load_weights(model: RevBiFPN, path: Path) -> None:
    """Everything in the file, save a classifier of other classes and a head that the model does not have."""
    try:
        load_checkpoint(model, path)
    except CheckpointError as error:
        rest = error.report
        if rest is None:
            raise OptionError(str(error)) from error
        classifier = all(name.startswith("head.fc.") for name in (*rest.mismatched, *rest.missing))
        no_head = all(name.startswith("head.") for name in rest.unexpected)
        if not (classifier and no_head) or (rest.unexpected and model.head is not None):
            raise OptionError(f"{error}: take the --arch and --model-kwargs that it was trained with") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which is about what was just found to be right
            load_checkpoint(model, path, strict=False)
    except OSError as error:
        raise OptionError(f"--weights: {error}") from error


def choose_batch(options: Options, model: nn.Module, samples: int) -> int | None:
    """Set ``options.batch``, from the memory if that is given; returns the bytes that are expected of a step.

    Raises:
        OptionError: nothing fits, or ``--batch`` does not.
    """
    o = options
    if o.max_memory is None:
        o.batch = o.batch or 32
        return None
    states = OPTIMIZER_STATES.get(o.opt, 2)
    kind = device(o)
    estimator = StepEstimator(model, o.resolution, DTYPES[o.precision], optimizer_states=states, device=kind)
    average = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) if o.ema else 0
    largest = estimator.largest_batch(o.max_memory - average)
    if not largest or (o.batch or 0) > largest:
        wanted = o.batch or 2  # one sample may be no batch, for the norms
        total = estimator.estimate(wanted).total + average
        raise OptionError(
            f"--batch {wanted} does not fit --max-memory: it takes {report.gigabytes(total)} by the estimate, "
            f"given are {report.gigabytes(o.max_memory)}; "
            + (
                f"--batch {largest} fits (--accumulate makes up for it)"
                if largest
                else "lower --resolution or take a smaller --arch"
            )
        )
    if o.batch is None:
        group = processes(o)[2] * o.accumulate
        o.batch = max(1, min(largest, samples // group))
        o.batch -= o.batch % 2 if o.batch > 1 else 0  # mixup pairs them
    estimate = estimator.estimate(o.batch)
    if not int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))):
        print(report.expectation(o.batch, estimate, average), flush=True)
    return estimate.total + average


def quiet() -> None:
    """Leave out advertisements, and remarks about what is meant to be so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        "'set_vital' is deprecated",
        ".*isinstance.treespec, LeafSpec",
        ".*does not have many workers",
        ".*in eval mode at the start of training",
        ".*`IterableDataset` has `__len__` defined",
    ):
        warnings.filterwarnings("ignore", text)


def strategy(options: Options) -> Strategy | str:
    if options.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=processes(options)[2], tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "auto" if processes(options)[2] == 1 else DDPStrategy()


def join(options: Options) -> None:
    """Make the group of torchrun's processes, with names of this attempt's own in the store.

    torchrun keeps one store over restarts: a process that comes first would find the address of one that has ended.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None or processes(options)[2] == 1 or distributed.is_initialized():
        return
    cuda = device(options) == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(distributed.rendezvous("env://"))
    store = distributed.PrefixStore(f"attempt{attempt}", store)
    distributed.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())


def prepare(options: Options) -> Path | None:
    """Make the folder; the checkpoint to go on from, if there is one.

    Raises:
        OptionError: the folder has a run already.
        SaveError: it cannot be written.
    """
    folder = options.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SaveError(f"--output {folder}: cannot be written: {error.strerror}; give a folder that can") from None
    last = folder / LAST
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not last.exists():
        return None
    if not (options.resume or restarted):
        raise OptionError(
            f"--output {folder}: has a run already, {last}; add --resume to go on with it, or give another"
        )
    return last


def train(
    options: Options,
    data: Data,
    model: nn.Module,
    work: Callable[[list[str]], Work],
    task: type[Task] = Task,
) -> Outcome:
    """Train, evaluate after every epoch, and leave the model, logs and plots in ``--output``."""
    o = options
    per_machine, machines, _ = processes(o)
    last = prepare(o)
    expected = choose_batch(o, model, data.samples)
    about = plain(
        {name: value for name, value in vars(o).items() if name not in MAY_CHANGE}
        | {"samples": data.samples, "classes": data.classes}
    )
    quiet()
    step = 0
    if last is not None:
        found = read(last)
        check_same(found[KEY]["about"], about, last)
        step = found["global_step"]
        del found
    running = task(model, work(data.classes), o, data)
    metrics = MetricsFile(o.output / "metrics.csv", after=step)
    board = TensorBoardLogger(o.output, "tensorboard", version="", default_hp_metric=False, purge_step=step + 1)
    plainest = copy.deepcopy(model) if o.strategy == "fsdp" else None  # what sharded modules cannot be turned back to
    memory = report.Memory(steps=o.max_memory is not None)
    saving = Saving(o.output, about, every=o.save_every, agree=o.log_every, monitor=lambda: running.score)
    join(o)
    half_on_cpu = [MixedPrecision("16-mixed", "cpu")] if (o.precision, device(o)) == ("float16", "cpu") else []
    trainer = lightning.Trainer(
        accelerator="gpu" if device(o) == "cuda" else "cpu",
        devices=per_machine,
        num_nodes=machines,
        strategy=strategy(o),
        precision=None if half_on_cpu else LIGHTNING["float32" if o.strategy == "fsdp" else o.precision],
        max_epochs=o.epochs,
        accumulate_grad_batches=o.accumulate,
        gradient_clip_val=None if o.graphed else o.clip_norm,
        logger=[metrics, board],
        log_every_n_steps=o.log_every,
        callbacks=[memory, saving],
        plugins=[WholeFiles(), *half_on_cpu],
        sync_batchnorm=o.sync_norms,
        use_distributed_sampler=False,  # Batches deals them out
        enable_checkpointing=False,  # Saving does it
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=o.progress,
        default_root_dir=o.output,
    )
    trainer.fit(running, data, ckpt_path=last, weights_only=True)
    model = best(running, o.output, plainest)
    if plainest is None:
        trainer.validate(running, data, verbose=False)
    outcome = Outcome(running, data, o.output, model.cpu().eval())
    if trainer.is_global_zero:
        _finish(outcome, expected, memory.measured)
    return outcome


def best(task: Task, output: Path, plainest: nn.Module | None) -> nn.Module:
    """The model with the weights of the best epoch (their average, where there is one)."""
    path = output / BEST
    state = read(path)["state_dict"] if path.exists() else None
    if plainest is None:
        if state is not None:
            task.load_state_dict(state)
        return task.evaluated
    if state is not None:
        plainest.load_state_dict({n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")})
    return plainest


def _finish(outcome: Outcome, expected: int | None, measured: int) -> None:
    task, output = outcome.task, outcome.output
    if measured:
        compared = f", expected {report.gigabytes(expected)}" if expected else ""
        print(f"measured {report.gigabytes(measured)} of memory for a step{compared}")
    print(f"best epoch: {task.listed}")
    if names := skipped_names(outcome.data.skipped):
        print(f"{len(names)} images were skipped, the first is {names[0]}; all are in {outcome.data.skipped}")
    report.plot_curves(output / "metrics.csv", output / "curves.png", expected, measured)
    if hasattr(task, "matrix"):
        report.plot_confusion(task.matrix, task.classes, output / "confusion.png")
    for path in report.export(outcome.model, task.options):
        print(f"wrote {path}")


def entry(main: Callable[[list[str] | None], Any]) -> Callable[[list[str] | None], int]:
    """``main`` as a command: what goes wrong is one line and an exit code (:mod:`revbifpn.training.errors`)."""

    def command(argv: list[str] | None = None) -> int:
        signal.signal(signal.SIGTERM, _terminated)  # Saving takes over while there is something to save
        try:
            main(argv)
        except TrainingError as error:
            return _report(str(error), error.exit_code)
        except OSError as error:  # of logs, plots and exports; checkpoints say it themselves
            if error.errno not in FULL:
                raise
            where = f"{error.filename}: " if error.filename else ""
            remedy = "what was saved before is whole: make room, and start again with --resume"
            return _report(f"{where}cannot be written: {error.strerror}; {remedy}", SaveError.exit_code)
        except torch.OutOfMemoryError as error:
            return _report(f"out of memory: {first_line(error)}; give --max-memory, or lower --batch", 1)
        except RuntimeError as error:
            text = str(error)
            if found := re.search(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)", text):
                return _report(
                    f"the data worker {found[1]} died (killed, or out of memory): {first_line(error)}; what was saved "
                    "is whole: start again with --resume, and with fewer --workers if it comes again",
                    1,
                )
            if "onnection" in text and ("peer" in text or "reset" in text or "closed" in text):
                return _report(f"another process of the group ended: {first_line(error)}; start again with --resume", 1)
            raise
        return 0

    return command


def _terminated(*_: Any) -> None:
    print("SIGTERM: no step is lost; the same command with --resume goes on", file=sys.stderr, flush=True)
    raise SystemExit(Stopped.exit_code)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _report(text: str, code: int) -> int:
    if "Original Traceback" in text:  # of a data worker: the message is in the last line
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    print(text, file=sys.stderr, flush=True)
    return code
