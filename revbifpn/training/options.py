"""The command line, and files of options."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import Any

import torch

from revbifpn.configs import CONFIGS
from revbifpn.training.errors import OptionError

Options = argparse.Namespace
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZER_STATES = {"sgd": 1, "momentum": 1, "lion": 1, "rmsprop": 2}  # tensors per parameter; others: 2


def size(text: str) -> int:
    """Bytes of ``12GB``, ``800 MB`` or ``11.5GiB``."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGT])(i?)B", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size such as 12GB or 11.5GiB, got {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** (" KMGT".index(found[2])))


def _assignment(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", type=Path, help="a YAML file of options; those on the command line come first")

    g = p.add_argument_group("data")
    g.add_argument("--data", type=Path, help="a folder with train and val (README of the script)")
    g.add_argument("--dataset", help="torchvision/STL10, or a name of timm.data.create_dataset; --data is its root")
    g.add_argument("--shards", help="tar files to train on, train-{0000..0146}.tar or pipe:...")
    g.add_argument("--val-shards", help="tar files to evaluate on")
    g.add_argument("--samples", type=int, help="in the shards to train on, per epoch")
    g.add_argument("--classes", type=int, help="how many, where the data does not say")
    g.add_argument(
        "--workers", type=int, default=4, help="processes that read images, for each that trains (default 4)"
    )
    g.add_argument(
        "--on-corrupt", choices=("raise", "skip"), default="raise", help="what to do with an unreadable image"
    )

    g = p.add_argument_group("model")
    g.add_argument("--arch", default="revbifpn_s0", choices=sorted(CONFIGS))
    g.add_argument("--model-kwargs", nargs="*", type=_assignment, default=[], metavar="NAME=VALUE", help="of RevBiFPN")
    g.add_argument("--pretrained", action="store_true", help="published ImageNet weights")
    g.add_argument("--weights", type=Path, help="a file of weights; another number of classes gets a new classifier")
    g.add_argument("--stream", choices=("float32", "fixed32", "fixed16"), help="docs/streams.md")
    g.add_argument("--stored", action="store_true", help="store activations instead of recomputing them")
    g.add_argument("--freeze-norms", action="store_true", help="keep the norms' statistics and parameters")
    g.add_argument("--in-chans", type=int, default=3, choices=(1, 3), help="grey or colour images")

    g = p.add_argument_group("images")
    g.add_argument("--resolution", type=int, help="pixels (default: that of the scale)")
    g.add_argument("--min-scale", type=float, default=0.08, help="smallest share of the image in a random crop")
    g.add_argument("--hflip", type=float, default=0.5)

    g = p.add_argument_group("step")
    g.add_argument("--batch", type=int, help="images for each process and step (default 32)")
    g.add_argument("--max-memory", type=size, help="such as 12GB: the largest batch whose estimate fits")
    g.add_argument("--accumulate", type=int, default=1, help="batches per update")
    g.add_argument("--precision", choices=DTYPES, default="float32")
    g.add_argument("--epochs", type=int, default=100)
    g.add_argument("--opt", default="adamw", help="an optimizer of timm")
    g.add_argument("--lr", type=float, default=1e-3)
    g.add_argument("--weight-decay", type=float, default=0.05)
    g.add_argument("--layer-decay", type=float, help="factor of the learning rate from one layer to the one before")
    g.add_argument("--sched", default="cosine", help="a schedule of timm")
    g.add_argument("--warmup-epochs", type=int, default=0)
    g.add_argument("--clip-norm", type=float)
    g.add_argument("--smoothing", type=float, default=0.0, help="of labels")
    g.add_argument("--ema", type=float, help="decay of an average of the weights, such as 0.9998, which is evaluated")
    g.add_argument("--optimizer-in-backward", action="store_true", help="update each weight when its gradient arrives")
    g.add_argument("--graphed", action="store_true", help="a step as a CUDA graph (revbifpn.GraphedStep)")
    g.add_argument("--compile", action="store_true", help="torch.compile")

    g = p.add_argument_group("processes")
    g.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    g.add_argument("--devices", type=int, default=1, help="processes on this machine; torchrun says it by itself")
    g.add_argument("--nodes", type=int, default=1)
    g.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    g.add_argument("--sync-norms", action="store_true", help="SyncBatchNorm")
    g.add_argument("--compress", choices=("bfloat16", "float16", "powersgd"), help="gradients on their way, with ddp")

    g = p.add_argument_group("run")
    g.add_argument("--output", type=Path, required=True, help="a folder for checkpoints, logs, plots and the model")
    g.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.ckpt if there is one")
    g.add_argument("--save-every", type=int, default=500, help="steps; after every epoch in any case (default 500)")
    g.add_argument("--log-every", type=int, default=10, help="steps (default 10)")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--export", nargs="*", choices=("safetensors", "onnx"), default=["safetensors"])
    g.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="a progress bar")
    p.set_defaults(**defaults)
    return p


def parse(p: argparse.ArgumentParser, argv: list[str] | None) -> Options:
    """Options, those of ``--config`` included, that go together.

    Raises:
        OptionError: they do not.
    """
    first = p.parse_known_args(argv)[0]
    if first.config is not None:
        p.set_defaults(**_from_file(first.config, p))
    options = p.parse_args(argv)
    if isinstance(options.model_kwargs, list):
        options.model_kwargs = dict(options.model_kwargs)
    if options.resolution is None:
        options.resolution = CONFIGS[options.arch].resolution
    check(options)
    return options


def _from_file(path: Path, p: argparse.ArgumentParser) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise OptionError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise OptionError(f"{path}: expected 'name: value' lines of options")
    found = {str(name).replace("-", "_"): value for name, value in content.items()}
    known = {action.dest: action for action in p._actions}
    if unknown := sorted(found.keys() - known.keys()):
        raise OptionError(f"{path}: there is no option {', '.join(_flag(n) for n in unknown)}")
    for name, value in found.items():
        choices, values = known[name].choices, value if isinstance(value, list) else [value]
        if choices is not None and (wrong := [v for v in values if v not in choices]):
            listed = ", ".join(str(choice) for choice in choices)
            raise OptionError(f"{path}: {_flag(name)} {wrong[0]}: expected one of {listed}")
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check(o: Options) -> None:
    """Options that exclude one another."""
    if (o.data is None) == (o.shards is None):
        raise OptionError("give either --data, with or without --dataset, or --shards")
    if o.shards and not (o.val_shards and o.samples and o.classes):
        raise OptionError("--shards: streams have no length; give --samples, --classes and --val-shards as well")
    least = dict.fromkeys(("batch", "accumulate", "epochs", "log_every", "devices", "nodes", "resolution"), 1)
    least |= dict.fromkeys(("workers", "seed", "save_every", "warmup_epochs"), 0)
    for name, limit in least.items():
        if getattr(o, name) is not None and getattr(o, name) < limit:
            raise OptionError(f"{_flag(name)}: expected at least {limit}, got {getattr(o, name)}")
    if o.resolution % 32 and not o.model_kwargs.get("pad"):
        raise OptionError(f"--resolution {o.resolution}: expected a multiple of 32, or --model-kwargs pad=True")
    if o.pretrained and o.weights:
        raise OptionError("--pretrained and --weights: give one of them")
    several = processes(o)[2] > 1
    fsdp = o.strategy == "fsdp"
    in_backward = o.optimizer_in_backward and [
        (o.accumulate > 1, "--accumulate", "gradients are gone"),
        (o.precision == "float16", "--precision float16", "a GradScaler may have to skip the step; use bfloat16"),
        (o.clip_norm, "--clip-norm", "the norm is known after the last gradient"),
        (several or fsdp, "several processes", "gradients are summed after they arrive"),
        (o.compile, "--compile", "all gradients arrive at the end there"),
        (o.graphed, "--graphed", "a graph holds the whole update"),
    ]
    graphed = o.graphed and [
        (several or fsdp, "several processes", "see docs/recipes.md for GraphedStep with NCCL"),
        (o.compile, "--compile", "a reversible pass is compiled as an op that no graph holds"),
    ]
    sharded = fsdp and [
        (o.ema, "--ema", "sharded modules cannot be copied; use ddp"),
        (o.compress, "--compress", "use ddp; --precision bfloat16 sends 16 bits"),
        (o.precision == "float16", "--precision float16", "use bfloat16"),
        (o.compile, "--compile", "use ddp"),
    ]
    frozen = o.freeze_norms and [(o.sync_norms, "--sync-norms", "frozen norms have no statistics to share")]
    refused = {
        "--optimizer-in-backward": in_backward,
        "--graphed": graphed,
        "--strategy fsdp": sharded,
        "--freeze-norms": frozen,
    }
    for one, others in refused.items():
        for wrong, other, why in others or ():
            if wrong:
                raise OptionError(f"{one} and {other} do not go together: {why}")
    cuda = device(o) == "cuda"
    if o.sync_norms and not cuda:
        raise OptionError("--sync-norms: PyTorch's SyncBatchNorm trains on CUDA only")
    if o.compress == "bfloat16" and not cuda:
        raise OptionError("--compress bfloat16: PyTorch sends it by NCCL, between GPUs; on CPUs use float16")
    if o.compress and not several:
        raise OptionError("--compress: there is one process, which sends no gradients")


def device(o: Options) -> str:
    return o.device if o.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def processes(o: Options) -> tuple[int, int, int]:
    """Per machine, machines, and in all; torchrun's where it runs."""
    import os

    if "TORCHELASTIC_RUN_ID" in os.environ:
        here, all_ = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return here, all_ // here, all_
    return o.devices, o.nodes, o.devices * o.nodes
