"""Hugging Face hub: models with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``; a converter.

    >>> from revbifpn.adapters.hub import RevBiFPN
    >>> model = RevBiFPN.by_arch("revbifpn_s0", classes=10)
    >>> model.save_pretrained("my-model")
    >>> model = RevBiFPN.from_pretrained("my-model")

A saved model is a folder, or a repository on the hub: ``config.json`` with the constructor's arguments,
``model.safetensors`` under the published names, ``README.md`` as its card. :class:`RevBiFPN`, on fused kernels, and
:class:`PlainRevBiFPN` read each other's.

    python -m revbifpn.adapters.hub convert revbifpn_s0.pth.tar --arch revbifpn_s0 --output revbifpn_s0
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise ImportError(
        f"revbifpn.adapters.hub needs huggingface_hub ({error}): pip install 'revbifpn-fast[hub]'"
    ) from error

from revbifpn import fast
from revbifpn import model as plain
from revbifpn.checkpoints import CheckpointError, load_checkpoint, load_published, save_checkpoint
from revbifpn.configs import CONFIGS, Config, get_config
from revbifpn.streams import StreamFormat

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_DTYPE, _LEVELS = "dtype", "out_levels"  # what a config has beside arguments of the constructor
PUBLISHED_CODE = "https://github.com/CerebrasResearch/RevBiFPN"
_SIGNATURE = inspect.signature(plain.RevBiFPN)
_LAYERS = {
    f"torch.nn.{name}": layer
    for name, layer in vars(nn).items()
    if isinstance(layer, type) and issubclass(layer, nn.Module)
}

M = TypeVar("M", bound="HubModel")


# Models -----------------------------------------------------------------------------------------


class HubModel(PyTorchModelHubMixin, plain.RevBiFPN):
    """Mixin of a :class:`revbifpn.RevBiFPN` that remembers its arguments, for the hub.

    ``save_pretrained(folder)`` and ``push_to_hub("user/name")`` are those of
    :class:`huggingface_hub.PyTorchModelHubMixin`. What they write makes the same model again, bit for bit, dtype
    included. Layers given as ``norm_fn``, ``act_fn`` and ``se_sig_act`` are saved by name, hence classes of
    :mod:`torch.nn`. Whether norms are frozen is not saved.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _SIGNATURE.bind(*args, **kwargs)
        given.apply_defaults()
        super().__init__(*args, **kwargs)
        self._arguments = dict(given.arguments)

    @classmethod
    def by_arch(
        cls: type[M],
        arch: str,
        pretrained: bool = False,
        progress: bool = False,
        strict: bool = True,
        **overrides: Any,
    ) -> M:
        """A published scale; see :class:`revbifpn.model.ByArch` for the arguments."""
        config = get_config(arch)
        model = cls(**(config.arguments() | overrides))
        if pretrained:
            load_published(model, config, progress=progress, strict=strict)
        return model

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments of the model as it is now: attributes that may be set, and the classifier's size."""
        now: dict[str, Any] = {
            "reversible": None,
            "disable_rev": self.disable_rev,
            "disable_recomp": self.disable_recomp,
            "stream": self.stream,
            "retain_graph": self.retain_graph,
            "pad": self.pad,
        }
        if self.head is None:
            now["classes"] = None
        elif isinstance(self.head.fc, nn.Linear):
            now["classes"] = self.head.fc.out_features
        return self._arguments | now

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        strict: bool = True,
        **overrides: Any,
    ) -> M:
        """The model of a folder or of a repository on the hub, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder, or a repository as in ``"user/name"``.
            force_download, token, cache_dir, local_files_only, revision: see :func:`huggingface_hub.hf_hub_download`.
            strict: see :func:`revbifpn.load_checkpoint`.
            overrides: constructor arguments that replace the saved ones, such as ``stream``; with ``strict=False``
                also those that change parameters, such as ``classes``.

        Raises:
            OSError: no such folder, file or repository.
            CheckpointError: a file is damaged or does not fit; the message says what.
        """
        name = os.fspath(pretrained_model_name_or_path)

        def locate(file: str) -> Path:
            if os.path.isdir(name):
                return Path(name, file)
            return Path(
                hf_hub_download(
                    name,
                    file,
                    force_download=force_download,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    revision=revision,
                )
            )

        arguments, dtype, levels = _read_config(locate(CONFIG))
        model = cls(**(arguments | overrides)).to(dtype)
        if levels is not None:
            model.prune_intermediate_layers(levels)
        load_checkpoint(model, locate(WEIGHTS), strict=strict)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.head is not None and not isinstance(self.head.fc, nn.Linear):
            raise ValueError(
                f"head.fc: expected a Linear, as the constructor makes it, got {type(self.head.fc).__name__}; "
                "reset_classifier(classes) makes one, and revbifpn.save_checkpoint saves the weights alone"
            )
        config = {name: _encode(name, value) for name, value in self.arguments.items()}
        dtypes = {parameter.dtype for parameter in self.parameters()}
        if len(dtypes) > 1:
            raise ValueError(
                f"model: expected parameters of one dtype, got {sorted(map(str, dtypes))}; convert them, as in "
                "model.float()"
            )
        config[_DTYPE] = str(dtypes.pop()).removeprefix("torch.")
        if len(self.out_levels) < self.levels:
            config[_LEVELS] = list(self.out_levels)
        save_checkpoint(self, save_directory / WEIGHTS)
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """A card for weights of your own; edit what it cannot know."""
        return _card(kwargs.get("model_name", "RevBiFPN"), bool(self.arguments["classes"]))


class RevBiFPN(HubModel, fast.RevBiFPN):
    """:class:`revbifpn.fast.RevBiFPN` for the hub; see :class:`HubModel`."""


class PlainRevBiFPN(HubModel):
    """:class:`revbifpn.RevBiFPN` for the hub; see :class:`HubModel`."""


# config.json ------------------------------------------------------------------------------------


def _encode(name: str, value: Any) -> Any:
    """An argument as JSON has it."""
    if isinstance(value, StreamFormat):
        return {"name": value.name, "fraction_bits": list(value.fraction_bits)}
    if isinstance(value, type) and value in _LAYERS.values():
        return f"torch.nn.{value.__name__}"
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise ValueError(
            f"{name}: expected numbers, strings, lists, dicts, or a class of torch.nn, as {CONFIG} can name them, got "
            f"{value!r}; revbifpn.save_checkpoint saves the weights alone"
        ) from None


def _decode(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        if value not in _LAYERS:
            raise ValueError(f"expected a layer of torch.nn, got {value!r}")
        return _LAYERS[value]
    if isinstance(value, dict) and value.keys() == {"name", "fraction_bits"}:
        return StreamFormat(value["name"], tuple(value["fraction_bits"]))
    return value


def _read_config(path: Path) -> tuple[dict[str, Any], torch.dtype, list[int] | None]:
    """Constructor arguments, the parameters' dtype, and the levels of a pruned pyramid."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got {type(config).__name__}")
        dtype = getattr(torch, str(config.pop(_DTYPE, "float32")), None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError("dtype: expected a floating-point dtype of torch")
        levels = config.pop(_LEVELS, None)
        if not (levels is None or isinstance(levels, list) and all(type(level) is int for level in levels)):
            raise ValueError(f"{_LEVELS}: expected a list of integers, got {levels!r}")
        if unknown := sorted(config.keys() - _SIGNATURE.parameters.keys()):
            raise ValueError(f"no arguments of RevBiFPN: {', '.join(unknown)}")
        return {name: _decode(value) for name, value in config.items()}, dtype, levels
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are
        raise CheckpointError(
            f"{path}: damaged, or written for another model or by a newer revbifpn: {error}"
        ) from error


# Cards and the converter ------------------------------------------------------------------------


def _card(name: str, classifies: bool, config: Config | None = None) -> ModelCard:
    """README.md; with a ``config`` the weights are the published ones of that scale."""
    data = ModelCardData(
        model_name=name,
        library_name="revbifpn-fast",
        license="bsd-3-clause" if config else None,
        pipeline_tag="image-classification" if classifies else "image-feature-extraction",
        tags=["arxiv:2206.14098", "pytorch", "reversible", "revbifpn"],
        datasets=["imagenet-1k"] if config else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="imagenet-1k",
                dataset_name="ImageNet-1k",
                metric_type="accuracy",
                metric_name="Top-1 accuracy (as published)",
                metric_value=config.top1,
            )
        ]
        if config
        else None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{_ABOUT.format(name=name)}{_published(config) if config else ''}")


_ABOUT = """
# {name}

A RevBiFPN, the fully reversible bidirectional feature pyramid network
([Chiley et al., arXiv 2206.14098](https://arxiv.org/abs/2206.14098)): a backbone of four resolutions that trains in the
memory of its outputs, since backward recomputes activations.

```bash
pip install 'revbifpn-fast[hub]'
```

```python
from revbifpn.adapters.hub import RevBiFPN

model = RevBiFPN.from_pretrained("this repository, or its folder")
backbone = RevBiFPN.from_pretrained("this repository, or its folder", strict=False, classes=None)  # strides 4 to 32
```
"""


def _published(config: Config) -> str:
    return f"""
## Weights

The published ImageNet-1k checkpoint `{config.url.rpartition("/")[2]}` of [the authors' code]({PUBLISHED_CODE}) (BSD
3-Clause), with every value as it was there (sha256 of that file: `{config.sha256}`).

| parameters | training resolution | ImageNet-1k top-1, as published |
|---|---|---|
| {config.parameters:,} | {config.resolution} x {config.resolution} | {config.top1} % |

```bibtex
@article{{chiley2022revbifpn,
  title={{RevBiFPN: The Fully Reversible Bidirectional Feature Pyramid Network}},
  author={{Chiley, Vitaliy and Thangarasa, Vithursan and Gupta, Abhay and Samar, Anshul and Hestness, Joel and
          DeCoste, Dennis}},
  journal={{arXiv preprint arXiv:2206.14098}},
  year={{2022}}
}}
```
"""


def convert(
    file: str | os.PathLike[str],
    arch: str,
    output: str | os.PathLike[str],
    *,
    published: bool = True,
    **overrides: Any,
) -> Path:
    """Make a folder for :meth:`HubModel.from_pretrained`, or for the hub, from a checkpoint file.

    Args:
        file: the published file of that scale, or with ``published=False`` one of your own training.
        arch: ``"revbifpn_s0"`` to ``"revbifpn_s6"``.
        output: the folder; files of these names in it are replaced.
        published: demand the published file's sha256; the card then has its accuracy.
        overrides: constructor arguments that the file was trained with, such as ``classes``.

    Returns:
        The folder.

    Raises:
        OSError: the file cannot be read, or the folder not be written.
        CheckpointError: the file has another hash, is damaged, or does not fit; nothing is written.
        ValueError: there is no such scale.
    """
    config = get_config(arch)
    model = PlainRevBiFPN.by_arch(arch, **overrides)
    load_checkpoint(model, file, sha256=config.sha256 if published else None)
    folder = Path(output)
    (folder / CARD).unlink(missing_ok=True)  # else the mixin keeps it
    model.save_pretrained(folder, model_card_kwargs={"model_name": arch})
    if published:
        _card(arch, True, config).save(folder / CARD)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m revbifpn.adapters.hub", description="RevBiFPN on Hugging Face's hub."
    )
    commands = parser.add_subparsers(required=True, metavar="convert")
    command = commands.add_parser(
        "convert", help="a checkpoint file into a folder for the hub: safetensors, config, card"
    )
    command.add_argument("file", help="as published (revbifpn_s0.pth.tar), or your own")
    command.add_argument("--arch", required=True, choices=CONFIGS, metavar="ARCH", help=", ".join(CONFIGS))
    command.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    command.add_argument("--unpublished", action="store_true", help="a file of your own training: any sha256 will do")
    command.add_argument("--classes", type=int, default=1000, help="of that training; 0: no head (default: 1000)")
    options = parser.parse_args(arguments)
    try:
        folder = convert(
            options.file,
            options.arch,
            options.output,
            published=not options.unpublished,
            classes=options.classes or None,
        )
    except (CheckpointError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
