"""RevBiFPN in plain PyTorch: stem, stack of reversible layers, neck, head.

    image --stem--> level 0 --[blocks, blocks, silo] x layers--> streams --neck--> pyramid --head--> logits

The stack is reversible: blocks refine each level on its own, silos fuse the levels down and up, the first ones also
create the lower levels. Only its outputs stay in memory for backward (:mod:`revbifpn.reversible`).

Names: ``rev_stack.{k}``, ``xform_{i}_{j}``, ``recomp_op`` and so on are those of the published checkpoints. They are
kept outright rather than translated, so that ``state_dict``, ``named_parameters``, optimizer groups and averaged copies
all speak of the same names, and published files load with ``strict=True``.

Source: Chiley et al., RevBiFPN: The Fully Reversible Bidirectional Feature Pyramid Network, arXiv 2206.14098.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from revbifpn.build import Builder
from revbifpn.checkpoints import load_published
from revbifpn.configs import get_config
from revbifpn.engine.anomaly import names_of
from revbifpn.engine.region import Region, run_as_region, wants_gradients
from revbifpn.engine.tape import Stored, Tape
from revbifpn.mbconv import BATCH_NORM, ConvNormAct, Layers, MBConv
from revbifpn.reversible import ReversibleSequence
from revbifpn.streams import StreamFormat, autocast_dtype
from revkernels import reference


class Stem(nn.Module):
    """Repeat the image's planes to ``planes``, then space-to-depth: invertible, no parameters.

    ``y[n, (r b + q) P + p, i, j] = x[n, p mod 3, b i + r, b j + q]`` for a block b and P planes.
    """

    IMAGE_CHANNELS = 3

    def __init__(self, planes: int, block: int) -> None:
        super().__init__()
        self.planes, self.block = planes, block

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, P b^2, H / b, W / b]
        return reference.space_to_depth(x, self.planes, self.block)

    def inverse(self, y: Tensor) -> Tensor:
        return reference.depth_to_space(y, self.IMAGE_CHANNELS, self.block)


class Neck(nn.Module):
    """One MBConv per level, from the streams' channels to the pyramid's."""

    def __init__(self, transforms: Sequence[nn.Module]) -> None:
        super().__init__()
        for i, transform in enumerate(transforms):
            self.add_module(f"recomp_transform_{i}", transform)

    def forward(self, streams: Sequence[Tensor] | Tape | Stored) -> list[Tensor]:
        """The pyramid; a level read from its tape is recomputed in backward."""
        if isinstance(streams, (Tape, Stored)):
            return [streams.read(i, transform) for i, transform in enumerate(self.children())]
        return [transform(y) for transform, y in zip(self.children(), streams, strict=True)]


class Head(nn.Module):
    """Merge the pyramid from high to low resolution, then classify.

    ``o_0 = n_0``, ``o_{h+1} = n_{h+1} + merge_h(o_h)``; 1x1 convolution, global mean, dropout, linear.
    """

    def __init__(
        self, merges: Sequence[nn.Module], final_conv: nn.Module | None, features: int, dropout: float, classes: int
    ) -> None:
        super().__init__()
        self.pyramid_heads = nn.ModuleList(merges)
        self.final_conv = final_conv
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.fc = nn.Linear(features, classes)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        out = pyramid[0]
        for merge, n in zip(self.pyramid_heads, pyramid[1:], strict=True):
            out = n + merge(out)
        return self.classify(out)

    def classify(self, out: Tensor) -> Tensor:  # [N, C, H / 32, W / 32] -> [N, classes]
        if self.final_conv is not None:
            out = self.final_conv(out)
        out = out.mean((2, 3))
        return self.fc(out if self.dropout is None else self.dropout(out))


class RevBiFPN(Region):
    """The fully reversible bidirectional feature pyramid network, with a classification head.

    Args:
        stem_downsampling: the stem makes pixels of ``2^d x 2^d`` image pixels; level i has stride ``2^(d + i)``.
        channels: of the streams, from high to low resolution; the four ``*_ratios`` and ``dwk*`` lists go with it.
        dwk, dwkp: kernel of a RevBlock's depthwise convolution is ``dwk + dwkp``; of a silo's, ``2 s - 1 + dwkp``
            going down by a stride s and ``3 + dwkp`` going up, both of the source level.
        inv_blk_rep: RevBlocks per level and layer.
        expand_ratios, se_ratios: of the transforms, see :class:`revbifpn.mbconv.MBConv`.
        num_ext_layers: layers after the ``len(channels) - 1`` growing ones.
        zero_init: every reversible transform starts as zero, except those that create a level.
        stochastic_depth: drop probability of the last layer, growing linearly from the first.
        upscale_mode: ``"bilinear"`` or ``"nearest"``.
        disable_rev: store the stack's activations instead of recomputing them.
        disable_recomp: store the neck's.
        head_channels: of the pyramid; None leaves out the neck. The ``head_*`` lists go with it.
        fc_features: width before the classifier; 0 leaves out the last 1x1 convolution.
        head_dropout: before the classifier.
        classes: None (or 0) leaves out the head: the model returns the pyramid.
        norm, norm_fn, norm_kwargs, act_fn, se_sig_act: see :class:`revbifpn.mbconv.Layers`.
        reversible: True recomputes, False stores all activations; overrides ``disable_rev`` and ``disable_recomp``.
        stream: how the reversible streams are stored: ``"float32"``, ``"fixed32"``, ``"fixed16"`` or a
            :class:`revbifpn.StreamFormat`; None is ``"float32"``, and under autocast ``"fixed32"``.
        retain_graph: allow several backwards through one forward (two losses, gradients per task), as
            ``backward(retain_graph=True)`` asks for; see :class:`revbifpn.reversible.Reversible`.

    Shapes:
        image ``[N, 3, H, W]``, float, H and W multiples of ``2^(d + L - 1)`` (32 for four levels); an unbatched
        ``[3, H, W]`` gives unbatched results. Returns logits ``[N, classes]``, or a list of maps
        ``[N, C_i, H / 2^(d+i), W / 2^(d+i)]`` without a head.

    Raises:
        ValueError: an argument or an image does not fit; the message names it.
    """

    def __init__(
        self,
        stem_downsampling: int = 2,
        channels: Sequence[int] = (48, 64, 80, 160),
        dwk: Sequence[int] = (3, 5, 5, 3),
        dwkp: Sequence[int] = (0, 0, 0, 2),
        inv_blk_rep: int = 2,
        expand_ratios: Sequence[float] = (1, 1, 2, 2),
        se_ratios: Sequence[float] = (0.25, 0.25, 0.125, 0.0),
        num_ext_layers: int = 2,
        zero_init: bool = False,
        stochastic_depth: float = 0.0,
        upscale_mode: str = "bilinear",
        disable_rev: bool = False,
        disable_recomp: bool = False,
        head_channels: Sequence[int] | None = (48, 64, 128, 320),
        head_dwk: Sequence[int] | None = (3, 3, 3, 3),
        head_dwkp: Sequence[int] | None = (2, 2, 2, 2),
        head_expand_ratios: Sequence[float] | None = (1, 2, 2, 2),
        head_se_ratios: Sequence[float] | None = (0.25, 0.25, 0.125, 0.125),
        fc_features: int | None = 1280,
        head_dropout: float = 0.2,
        classes: int | None = 1000,
        norm: bool = True,
        norm_fn: Callable[..., nn.Module] = nn.BatchNorm2d,
        norm_kwargs: Mapping[str, Any] | None = None,
        act_fn: Callable[[], nn.Module] = nn.Hardswish,
        se_sig_act: Callable[[], nn.Module] = nn.Hardsigmoid,
        *,
        reversible: bool | None = None,
        stream: str | StreamFormat | None = None,
        retain_graph: bool = False,
    ) -> None:
        super().__init__()
        layers = Layers(norm, norm_fn, dict(BATCH_NORM if norm_kwargs is None else norm_kwargs), act_fn, se_sig_act)
        build = Builder(channels, dwk, dwkp, expand_ratios, se_ratios, upscale_mode, layers)
        if zero_init and not norm:
            raise ValueError("zero_init: expected norm=True, since it is the last normalisation that starts as zero")
        block = 2**stem_downsampling
        planes = channels[0] // block**2
        if planes * block**2 != channels[0] or planes < Stem.IMAGE_CHANNELS:
            raise ValueError(
                f"channels[0]: expected a multiple of 4^stem_downsampling = {block**2}, at least "
                f"{Stem.IMAGE_CHANNELS * block**2}, got {channels[0]}"
            )

        self.disable_recomp = disable_recomp if reversible is None else not reversible
        self.norms_frozen = False
        self.levels = build.levels
        self.stride = block * 2 ** (build.levels - 1)  # of the lowest resolution, in image pixels

        self.stem = Stem(planes, block)
        self.rev_stack = ReversibleSequence(
            *build.stack(inv_blk_rep, num_ext_layers, stochastic_depth),
            stream=stream,
            retain_graph=retain_graph,
            start=1 if stem_downsampling else 0,
        )
        self.disable_rev = disable_rev if reversible is None else not reversible
        if head_channels and head_dwk and head_dwkp and head_expand_ratios and head_se_ratios:
            pyramid = build.pyramid(head_channels, head_dwk, head_dwkp, head_expand_ratios, head_se_ratios)
            self.rev_stack.recomp_op = Neck(pyramid.neck(channels))
        else:
            pyramid = build.without_neck(head_dwkp, head_expand_ratios, head_se_ratios)
        self.neck_channels = list(pyramid.channels)
        self.head = None
        if classes:
            merges, features = pyramid.merges(), pyramid.channels[-1]
            final_conv = ConvNormAct(features, fc_features, 1, layers) if fc_features else None
            self.head = Head(merges, final_conv, fc_features or features, head_dropout, classes)
        self._initialize(zero_init)

    def _initialize(self, zero_init: bool) -> None:
        """Convolutions kaiming-normal (fan-out, relu gain), their biases 0; normalisation and linear keep defaults."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if zero_init:
            for transform in chain(*(c.transforms for c in self.rev_stack.couplings() if not c.creates)):
                for module in transform.modules():
                    if isinstance(module, MBConv) and module.project_conv.norm is not None:
                        nn.init.zeros_(module.project_conv.norm.get_parameter("weight"))

    # Running ------------------------------------------------------------------------------------

    @property
    def disable_rev(self) -> bool:
        """Whether the stack stores its activations; may be set at any time, as ``disable_recomp`` for the neck."""
        return not self.rev_stack.reversible

    @disable_rev.setter
    def disable_rev(self, stored: bool) -> None:
        self.rev_stack.reversible = not stored

    @property
    def stream(self) -> StreamFormat | None:
        """How the stack's streams are stored, see :attr:`revbifpn.reversible.Reversible.stream`; may be set."""
        return self.rev_stack.stream

    @stream.setter
    def stream(self, stream: str | StreamFormat | None) -> None:
        self.rev_stack.stream = stream

    @property
    def retain_graph(self) -> bool:
        """Whether several backwards may follow one forward; may be set at any time."""
        return self.rev_stack.retain_graph

    @retain_graph.setter
    def retain_graph(self, retain: bool) -> None:
        self.rev_stack.retain_graph = retain

    @property
    def neck(self) -> Neck | None:
        """The neck, or None; it is a child of the stack in the published names."""
        return getattr(self.rev_stack, "recomp_op", None)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
        shape, want = tuple(x.shape), f"[N, {Stem.IMAGE_CHANNELS}, H, W] or [{Stem.IMAGE_CHANNELS}, H, W]"
        if x.dim() not in (3, 4) or shape[-3] != Stem.IMAGE_CHANNELS:
            raise ValueError(f"x: expected an image batch of shape {want}, got shape {shape}")
        if not x.is_floating_point():
            raise ValueError(
                f"x: expected a floating-point image, got {x.dtype}; scale it first, as in x.float() / 255"
            )
        dtypes = (parameter.dtype for parameter in self.parameters())
        if (first := next(dtypes, x.dtype)) != x.dtype and x.dtype not in dtypes:
            if autocast_dtype(x.device) is None:
                raise ValueError(
                    f"x: expected an image of {first}, as the parameters are, got {x.dtype}; convert it, as in "
                    f"x.to({first}), or run under torch.autocast"
                )
        if not all(size and size % self.stride == 0 for size in shape[-2:]):
            raise ValueError(
                f"x: expected height and width to be positive multiples of {self.stride}, "
                f"got {shape[-2]} x {shape[-1]}; pad or resize the image"
            )

    def open(self, x: Tensor) -> Tape | Stored:
        """The streams of x, on their tape, from which neck and head read."""
        owned = isinstance(self.stem, Stem) and not self.stem._forward_hooks  # else someone may hold the stem's output
        tape = self.rev_stack.open(self.stem(x), owned=owned)
        tape.call(self.rev_stack)
        tape.finish()
        return tape

    def _pyramid(self, tape: Tape | Stored) -> list[Tensor]:
        if self.neck is None:
            return list(tape.leave())
        return self.neck(tape.leave() if self.disable_recomp else tape)

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        pyramid = self._pyramid(self.open(x))
        return pyramid if self.head is None else self.head(pyramid)

    def _recomputes(self, x: Tensor) -> bool:
        return self.rev_stack.recomputes(x) or (self.neck is not None and not self.disable_recomp)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self._check(x)
        batch = x if x.dim() == 4 else x[None]
        if self._recomputes(x) and wants_gradients(self, x):
            found = run_as_region(self, batch)
            out = found[0] if self.head is not None else list(found)
        else:
            with names_of(self):
                out = self._forward(batch)
        if x.dim() == 4:
            return out
        return out[0] if isinstance(out, Tensor) else [o[0] for o in out]

    def freeze_norms(self, frozen: bool = True) -> RevBiFPN:
        """Fine-tuning with frozen BatchNorm: running statistics are used and kept, in train mode too.

        Affine parameters of the norms stop requiring a gradient while frozen. Saves every reduction of the norms.

        Args:
            frozen: False takes it back.

        Returns:
            self.
        """
        self.norms_frozen = frozen
        for module in self.modules():
            if isinstance(module, _NormBase):
                module.requires_grad_(not frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> RevBiFPN:
        """As :meth:`torch.nn.Module.train`, but frozen norms stay in eval mode."""
        super().train(mode)
        if self.norms_frozen:
            for module in self.modules():
                if isinstance(module, _NormBase):
                    module.eval()
        return self

    def forward_streams(self, x: Tensor) -> tuple[Tensor, ...]:
        """The stack's outputs, before the neck: what :meth:`inverse` takes.

        Args:
            x: ``[N, 3, H, W]``.

        Returns:
            Streams ``[N, channels[i], H / 2^(d+i), W / 2^(d+i)]``, from high to low resolution.
        """
        self._check(x)
        return self.open(x).leave()

    @torch.no_grad()
    def inverse(self, streams: Sequence[Tensor]) -> Tensor:
        """The image, from the stack's outputs (:meth:`forward_streams`, or the pyramid of a model without neck).

        Not differentiable. In train mode batch statistics are those of the same batch, and random layers break the
        inversion: use ``eval()``, or ``stochastic_depth=0``.
        """
        streams = list(streams)
        if len(streams) != self.levels:
            raise ValueError(f"streams: expected {self.levels} maps from high to low resolution, got {len(streams)}")
        return self.stem.inverse(cast(Tensor, self.rev_stack.inverse(*streams)))  # the stack starts from one stream


class ByArch(nn.Module):
    """Mixin of a :class:`RevBiFPN`: construct a model by the name of a published scale.

    Args:
        arch: ``"revbifpn_s0"`` to ``"revbifpn_s6"``.
        pretrained: load the published ImageNet weights.
        progress: show the download's progress.
        strict: with False, load what fits in name and shape (other ``classes``, no head, no neck).
        overrides: constructor arguments of :class:`RevBiFPN` that replace the scale's.
    """

    def __init__(
        self, arch: str, pretrained: bool = False, progress: bool = False, strict: bool = True, **overrides: Any
    ) -> None:
        config = get_config(arch)
        super().__init__(**(config.arguments() | overrides))
        if pretrained:
            load_published(self, config, progress=progress, strict=strict)


class RevBiFPN_S(ByArch, RevBiFPN):  # noqa: N801 (published name)
    """A published scale of :class:`RevBiFPN`, by name; see :class:`ByArch`."""


def factory(cls: Callable[..., RevBiFPN], arch: str, module: str) -> Callable[..., RevBiFPN]:
    """The function ``arch(pretrained, progress, strict, **overrides)`` that makes a ``cls`` of that scale."""

    def make(pretrained: bool = False, progress: bool = False, strict: bool = True, **overrides: Any) -> RevBiFPN:
        return cls(arch, pretrained, progress, strict, **overrides)

    config = get_config(arch)
    make.__name__ = make.__qualname__ = arch
    make.__module__ = module
    make.__doc__ = (
        f"RevBiFPN-S{arch[-1]}: {config.parameters:,} parameters, {config.top1} % ImageNet top-1 (published) at "
        f"{config.resolution} pixels. See :class:`ByArch` for the arguments."
    )
    return make


revbifpn_s0 = factory(RevBiFPN_S, "revbifpn_s0", __name__)
revbifpn_s1 = factory(RevBiFPN_S, "revbifpn_s1", __name__)
revbifpn_s2 = factory(RevBiFPN_S, "revbifpn_s2", __name__)
revbifpn_s3 = factory(RevBiFPN_S, "revbifpn_s3", __name__)
revbifpn_s4 = factory(RevBiFPN_S, "revbifpn_s4", __name__)
revbifpn_s5 = factory(RevBiFPN_S, "revbifpn_s5", __name__)
revbifpn_s6 = factory(RevBiFPN_S, "revbifpn_s6", __name__)
