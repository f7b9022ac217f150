"""Checkpoint files: the published weights, and those of your own training.

A file is verified, read without running code of its own, and compared with the model before the first tensor is copied:
whatever goes wrong, the model keeps the values that it had.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from revbifpn.configs import CONFIGS, Config

State = Mapping[str, Tensor]
Shape = tuple[int, ...]

# Training scripts store the state dict under one of these, beside the optimizer's, the epoch and so on.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
# DistributedDataParallel and averaged copies put the one before every name, torch.compile the other.
_PREFIX = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
_CLASSIFIER = {"head.fc.weight", "head.fc.bias"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LoadReport:
    """What of a model and a checkpoint does not fit together.

    Attributes:
        missing: names in the model that the checkpoint lacks.
        unexpected: names in the checkpoint that the model lacks.
        mismatched: name -> (shape in the checkpoint, shape in the model), for names in both.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything fits, as ``strict=True`` demands."""
        return not (self.missing or self.unexpected or self.mismatched)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be had, cannot be read, or does not fit the model.

    Attributes:
        report: every name that does not fit, where that was the reason; else None.
    """

    def __init__(self, message: str, report: LoadReport | None = None) -> None:
        super().__init__(message)
        self.report = report


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True, sha256: str | None = None
) -> LoadReport:
    """Load a checkpoint file into ``model``.

    Takes files of ``torch.save`` (the published ``.pth.tar`` among them) and of safetensors, told apart by content: a
    state dict, bare or under ``"state_dict"``, ``"model"`` or ``"model_state_dict"``. The prefixes of
    DistributedDataParallel (``module.``) and ``torch.compile`` (``_orig_mod.``) are ignored, in the file's names and in
    the model's. Only tensors and plain containers are read (``weights_only=True``), on the CPU, then copied to the
    model's devices and dtypes.

    Args:
        model: takes the values in place.
        path: of the file.
        strict: demand that names and shapes are the same. With False, load what fits in name and shape, and warn once
            about the rest.
        sha256: of the file, 64 hexadecimal digits; checked before anything is read.

    Returns:
        What did not fit; empty if strict.

    Raises:
        OSError: the file is missing, a directory, or not readable.
        CheckpointError: the file has another hash, is empty, truncated or damaged, holds code, holds no state dict, or
            (strict) does not fit the model: then ``error.report`` has all names. The model is as it was.
        ValueError: ``sha256`` is not a hash, or the model is on the meta device.
    """
    path = Path(path)
    with path.open("rb") as file:
        if sha256 is not None:
            _verify(file, path, sha256)
        state = _state_dict(_deserialize(file, path), path)

    values = model.state_dict()
    if any(value.is_meta for value in values.values()):
        raise ValueError(
            "model: expected tensors with values, got the meta device; call model.to_empty(device=...) first"
        )
    own = _bare(values, "model")
    report = _compare(own, state)
    if not report.complete:
        reason = _explain(report, own, state, hint="; strict=False loads what fits" if strict else "")
        if strict:
            raise CheckpointError(f"{path}: {reason}", report)
        loaded = len(own) - len(report.missing) - len(report.mismatched)
        warnings.warn(f"{path}: loaded {loaded} of the model's {len(own)} tensors: {reason}", stacklevel=2)
    fitting = state.keys() - report.mismatched.keys()
    copied = {name: state[bare] for name, bare in zip(values, own, strict=True) if bare in fitting}
    model.load_state_dict(copied, strict=False)
    return report


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state dict of ``model`` under the published names.

    The file appears whole or not at all. Equal values give equal bytes, and :func:`load_checkpoint` returns every bit.

    Args:
        model: its parameters and buffers are written, from whatever device.
        path: safetensors if it ends in ``.safetensors``, else ``torch.save``. An existing file is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    state = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in _bare(model.state_dict(), "model").items()
    }
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            if path.suffix == ".safetensors":
                file.write(safetensors.torch.save(state, metadata={"format": "pt"}))
            else:
                torch.save(state, file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_published(model: nn.Module, config: Config, *, progress: bool = False, strict: bool = True) -> LoadReport:
    """Load the published ImageNet weights of a scale, downloading them once.

    The file lies in ``torch.hub.get_dir()/checkpoints`` (``TORCH_HOME`` moves it) and may be put there by hand. A
    download gets its final name only whole and with the right hash, so several processes may do this at once; the hash
    is checked again whenever the file is loaded. A file of that name with another hash is an error and never
    overwritten, since it is not this function's.

    Args:
        model: a model of that scale.
        config: of the scale.
        progress: show the download's progress on stderr.
        strict: see :func:`load_checkpoint`.

    Returns:
        What did not fit.

    Raises:
        CheckpointError: the download failed or has the wrong hash, the cache cannot be written, or as in
            :func:`load_checkpoint`.
    """
    return load_checkpoint(model, published_file(config, progress=progress), strict=strict, sha256=config.sha256)


def published_file(config: Config, directory: str | os.PathLike[str] | None = None, *, progress: bool = False) -> Path:
    """The published file of a scale, downloaded if it is not there; its hash is to be checked whenever it is loaded.

    Args:
        config: of the scale.
        directory: where it lies, by default ``torch.hub.get_dir()/checkpoints``.
        progress: show the download's progress on stderr.

    Raises:
        CheckpointError: the download failed or has the wrong hash, or the directory cannot be written.
    """
    directory = Path(torch.hub.get_dir(), "checkpoints") if directory is None else Path(directory)
    path = directory / config.url.rpartition("/")[2]
    if not path.exists():
        _download(config, path, progress)
    return path


# Files ------------------------------------------------------------------------------------------


def _download(config: Config, path: Path, progress: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(config.url, str(path), config.sha256, progress)
    except (OSError, HTTPException) as error:
        cause = " ".join(str(error).split())  # may quote what the server answered
        raise CheckpointError(
            f"cannot download {config.url} to {path}: {cause}; put the file there by hand, or set TORCH_HOME to a "
            "directory that can be written"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{config.url}: incomplete or altered download, {error}; not kept as {path}") from error


def _verify(file: BinaryIO, path: Path, sha256: str) -> None:
    """Compare the hash of the open file, then rewind: what was verified is what is read."""
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256: expected 64 hexadecimal digits, got {sha256!r}")
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != sha256.lower():
        raise CheckpointError(
            f"{path}: wrong sha256, expected {sha256.lower()}, got {digest.hexdigest()}: the file is truncated, "
            "altered or another one; delete it to get it again"
        )
    file.seek(0)


def _deserialize(file: BinaryIO, path: Path) -> Any:
    head = file.read(64)
    file.seek(0)
    if not head:
        raise CheckpointError(f"{path}: the file is empty")
    if head.lstrip(b"\xef\xbb\xbf\t\r\n ").startswith(b"<"):
        raise CheckpointError(f"{path}: an HTML or XML page, not a checkpoint; a download was answered by a web page")
    try:
        if head[8:9] == b"{":  # safetensors: 8 bytes of length, then JSON
            return safetensors.torch.load(file.read())
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything in the parsers
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            # torch's own message would advise to run the code.
            raise CheckpointError(
                f"{path}: refused, since reading it would run code, {code[1]}; only tensors in plain containers are "
                "read: save the state dict alone"
            ) from None
        cause = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise CheckpointError(
            f"{path}: truncated, damaged, or written neither by torch.save nor by safetensors "
            f"({type(error).__name__}{cause and ': '}{cause})"
        ) from error


# State dicts ------------------------------------------------------------------------------------


def _state_dict(content: Any, path: Path) -> State:
    state = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if problem := _no_state_dict(state):
        expected = f"expected tensors by name, bare or under {', '.join(_WRAPPERS)}"
        raise CheckpointError(f"{path}: not a state dict: {expected}, got {problem}")
    return _bare(state, str(path))


def _no_state_dict(value: Any) -> str | None:
    """What else it is, or None for dense tensors by name, at least one."""
    if not isinstance(value, Mapping):
        return f"a {type(value).__name__}"
    if not value:
        return "an empty dict"
    for key, entry in value.items():
        if not isinstance(key, str) or not isinstance(entry, Tensor):
            return f"a dict with {key!r}: {type(entry).__name__}"
        if entry.is_meta or entry.layout is not torch.strided:
            return f"a dict with {key!r}: a tensor that is not dense"
    return None


def _bare(state: State, where: str) -> State:
    """``state`` with the names of the network itself, in the same order."""
    bare = {_PREFIX.sub("", name): value for name, value in state.items()}
    if len(bare) < len(state):
        raise CheckpointError(f"{where}: the same name stands both with and without the prefix module. or _orig_mod.")
    return bare


def _compare(own: State, state: State) -> LoadReport:
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own if name in state}
    return LoadReport(
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        mismatched={name: (theirs, ours) for name, (theirs, ours) in shapes.items() if theirs != ours},
    )


def _explain(report: LoadReport, own: State, state: State, hint: str) -> str:
    """Why the two do not fit, in one line: the most telling reason. The hint where taking a part makes sense."""
    theirs, ours = _describe(state), _describe(own)
    missing, unexpected, mismatched = report.missing, report.unexpected, report.mismatched
    counts = f"{len(missing)} names missing, {len(unexpected)} unexpected, {len(mismatched)} of another shape"
    if theirs and ours and theirs != ours:
        return f"this is a checkpoint of {theirs}, the model is {ours}; {counts}"
    if not own.keys() & state.keys():
        return f"a checkpoint of something else: it has {_listed(state)}, the model {_listed(own)}; {counts}"
    if not (missing or unexpected) and mismatched.keys() <= _CLASSIFIER:
        rows = {(a[0], b[0]) for a, b in mismatched.values() if a[1:] == b[1:]}
        if len(rows) == 1:
            ((a, b),) = rows
            names = " and ".join(mismatched)
            return f"the checkpoint has {a} classes, the model {b}; only {names} differ{hint}"
    parts = [
        f"{len(names)} {kind} names in {_listed(map(_module, names))}: {_listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if mismatched:
        shapes = (f"{name} is {a} in the checkpoint, {b} in the model" for name, (a, b) in mismatched.items())
        parts.append(f"{len(mismatched)} of another shape: {_listed(shapes)}")
    return "; ".join(parts) + hint


def _module(name: str) -> str:
    """``head.fc`` of ``head.fc.weight``: the part of the network that a name belongs to."""
    return ".".join(name.split(".")[:-1][:2])


def _listed(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", *names[-2:]])


_PROJECTION = re.compile(
    r"rev_stack\.\d+\.(?:rev_transform_0\.([fg])\.xform_0_1|f\.xform_\d+_(\d+))\.project_conv\.conv\.weight"
)
_SILO = re.compile(r"rev_stack\.(\d+)\.f\.xform_")


def _describe(state: State) -> str | None:
    """The scale that these tensors belong to, a RevBiFPN of other channels and layers, or None: no RevBiFPN."""
    outputs, silos = {}, set()
    for name, value in state.items():
        if silo := _SILO.match(name):
            silos.add(silo[1])
        if value.dim() and (projection := _PROJECTION.fullmatch(name)):
            half, level = projection.groups()
            outputs[half or int(level)] = value.shape[0]
    if not {"f", "g", 1} <= outputs.keys():
        return None
    # A RevBlock's F and G give one half of level 0 each; the silos' downward transforms give the other levels.
    channels = [outputs.pop("f") + outputs.pop("g"), *(outputs[level] for level in sorted(outputs))]
    layers = len(silos) - len(channels) + 1
    for config in CONFIGS.values():
        if (config.channels, config.num_ext_layers) == (channels, layers):
            return config.arch
    return f"a RevBiFPN of channels={channels}, num_ext_layers={layers}"
