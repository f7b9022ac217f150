"""A network for inference elsewhere: BatchNorm folded into the convolutions, and ONNX.

    >>> from revbifpn.export import export_onnx
    >>> export_onnx(model.eval(), "revbifpn_s0.onnx", 224, dynamic_batch=True)

An exported network consists of PyTorch's ordinary operations, whichever class it is of. ``torch.export`` takes a model
as it is, ``torch.export.export(model, (image,))``; what :func:`fold_norms` gives makes a smaller graph.
"""

from __future__ import annotations

import copy
import importlib.util
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.fusion import fuse_conv_bn_eval

from revbifpn.mbconv import ConvNormAct
from revbifpn.model import RevBiFPN

_NEEDED = ("onnx", "onnxscript")


def fold_norms(model: RevBiFPN) -> RevBiFPN:
    """A copy for inference whose BatchNorms are part of the convolutions before them.

    ``w' = w gamma / sqrt(var + eps)``, ``b' = (b - mean) gamma / sqrt(var + eps) + beta``, with running statistics.

    Args:
        model: in eval mode; it stays as it is. Norms other than BatchNorm2d stay in the copy.

    Returns:
        A model of the same class, in eval mode.

    Raises:
        ValueError: the model is in train mode.
    """
    _expect_eval(model)
    folded = copy.deepcopy(model)
    for layer in folded.modules():
        if isinstance(layer, ConvNormAct) and type(layer.norm) is nn.BatchNorm2d and layer.norm.track_running_stats:
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
            layer.norm = None
    return folded


@torch.no_grad()
def export_onnx(
    model: RevBiFPN,
    path: str | PathLike[str],
    size: int | tuple[int, int] = 224,
    *,
    batch: int = 1,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    **options: Any,
) -> None:
    """Write an ONNX file: input ``image [N, in_chans, H, W]``, outputs ``logits`` or ``map_0``, ``map_1``, ...

    The operators are ONNX's standard ones, and BatchNorm is folded.

    Args:
        model: either class, in eval mode, with or without head.
        path: of the file.
        size: of the image in pixels, height and width or both at once: multiples of ``model.stride``.
        batch: samples.
        dynamic_batch: any number of samples; ``batch`` is an example.
        dynamic_size: any multiples of ``model.stride`` as height and width; ``size`` is an example. Padding by a model
            with ``pad`` is part of a graph of one size only: for any size, pad its input and crop its maps yourself.
        options: of :func:`torch.onnx.export`, such as ``opset_version``.

    Raises:
        ValueError: the model is in train mode, or the size does not fit.
        ImportError: onnx or onnxscript is missing.
    """
    _expect_eval(model)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export_onnx needs {' and '.join(missing)}: pip install 'revbifpn-fast[onnx]'")
    folded = fold_norms(model)
    height, width = (size, size) if isinstance(size, int) else size
    like = next(folded.parameters())
    # Examples of a dynamic dimension are neither 0 nor 1 of anything, which PyTorch would take for a constant.
    stride = model.stride
    if dynamic_batch:
        batch = max(batch, 2)
    if dynamic_size:
        height, width = max(height, 2 * stride), max(width, 2 * stride)
    image = torch.zeros(batch, model.in_chans, height, width, dtype=like.dtype, device=like.device)
    dynamic: dict[int, Any] = {0: Dim("batch")} if dynamic_batch else {}
    if dynamic_size:
        dynamic |= {2: stride * Dim("rows", min=1), 3: stride * Dim("columns", min=1)}
    outputs = ["logits"] if model.head is not None else [f"map_{i}" for i in range(len(model.out_levels))]
    program = torch.onnx.export(
        folded,
        (image,),
        dynamo=True,
        dynamic_shapes=(dynamic,) if dynamic else None,
        input_names=["image"],
        output_names=outputs,
        verbose=False,
        **options,
    )
    assert program is not None
    program.save(path)


def _expect_eval(model: nn.Module) -> None:
    if model.training:
        raise ValueError("model: expected one in eval mode, got one in train mode; call model.eval() first")
