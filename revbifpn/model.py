"""RevBiFPN in plain PyTorch: stem, stack of reversible layers, neck, head.

    image --stem--> level 0 --[blocks, blocks, silo] x layers--> streams --neck--> pyramid --head--> logits

The stack is reversible: blocks refine each level on its own, silos fuse the levels down and up, the first ones also
create the lower levels. Only its outputs stay in memory for backward (:mod:`revbifpn.reversible`).

To see how the network runs, read ``__init__``, ``open``, ``_pyramid`` and ``_forward`` of :class:`RevBiFPN`, and what
they name of ``parts.py`` and ``build.py``. The other methods are checks, padding, fine-tuning and what timm's models
have.

Names: ``rev_stack.{k}``, ``xform_{i}_{j}``, ``recomp_op`` and so on are those of the published checkpoints. They are
kept outright rather than translated, so that ``state_dict``, ``named_parameters``, optimizer groups and averaged copies
all speak of the same names, and published files load with ``strict=True``.

Source: Chiley et al., RevBiFPN: The Fully Reversible Bidirectional Feature Pyramid Network, arXiv 2206.14098.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from revbifpn.build import Builder
from revbifpn.checkpoints import load_published
from revbifpn.configs import CONFIGS, get_config
from revbifpn.engine.anomaly import names_of
from revbifpn.engine.region import Region, run_as_region, wants_gradients
from revbifpn.engine.tape import Stored, Tape
from revbifpn.mbconv import BATCH_NORM, ConvNormAct, Layers, MBConv
from revbifpn.parts import GlobalPool, Head, Neck, Stem
from revbifpn.reversible import Reversible, ReversibleSequence, RevSilo
from revbifpn.streams import StreamFormat, autocast_dtype

T = TypeVar("T")


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
            :class:`revbifpn.StreamFormat`; None is ``"float32"``, and ``"fixed32"`` where branches
            compute in 16 bits.
        retain_graph: allow several backwards through one forward (two losses, gradients per task), as
            ``backward(retain_graph=True)`` asks for; see :class:`revbifpn.reversible.Reversible`.
        in_chans: channels of the image, at most ``channels[0] / 4^d``, see :class:`Stem`. No weight's shape depends on
            it, and checkpoints of another number of channels load as they are.
        pad: take images of any size: zeros are added below and on the right, up to multiples of ``2^(d + L - 1)``. Maps
            are cropped to ``ceil(H / 2^(d+i)) x ceil(W / 2^(d+i))``; logits, and the statistics of the norms, are
            those of the padded image.

    Shapes:
        image ``[N, in_chans, H, W]``, float, H and W multiples of ``2^(d + L - 1)`` (32 for four levels) or, with
        ``pad``, at least 1; an unbatched ``[in_chans, H, W]`` gives unbatched results. Returns logits ``[N, classes]``,
        or a list of maps ``[N, C_i, H / 2^(d+i), W / 2^(d+i)]`` without a head.

    Attributes and methods that timm's models have too: ``num_classes``, ``in_chans``, ``num_features``,
    ``head_hidden_size``, ``feature_info``, ``forward_features``, ``forward_head``, ``forward_intermediates``,
    ``get_classifier``, ``reset_classifier``, ``prune_intermediate_layers``, ``group_matcher``, ``no_weight_decay`` and
    ``set_grad_checkpointing``. ``timm.create_model`` finds the network through :mod:`revbifpn.adapters.timm`.

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
        in_chans: int = 3,
        pad: bool = False,
    ) -> None:
        super().__init__()
        layers = Layers(norm, norm_fn, dict(BATCH_NORM if norm_kwargs is None else norm_kwargs), act_fn, se_sig_act)
        build = Builder(channels, dwk, dwkp, expand_ratios, se_ratios, upscale_mode, layers)
        if zero_init and not norm:
            raise ValueError("zero_init: expected norm=True, since it is the last normalisation that starts as zero")
        block = 2**stem_downsampling
        planes = channels[0] // block**2
        least = block**2 * min(in_chans, 3)
        if planes * block**2 != channels[0] or channels[0] < least:
            raise ValueError(
                f"channels[0]: expected a multiple of 4^stem_downsampling = {block**2}, at least {least}, "
                f"got {channels[0]}"
            )
        if not 1 <= in_chans <= planes:
            raise ValueError(
                f"in_chans: expected 1 to {planes}, for which channels[0] = {channels[0]} has room, got {in_chans}; "
                f"{_room_for(in_chans, block)}"
            )

        self.disable_recomp = disable_recomp if reversible is None else not reversible
        self.norms_frozen, self.layers_frozen = False, 0
        self.in_chans, self.pad = in_chans, pad
        self.levels = build.levels
        self.stride = block * 2 ** (build.levels - 1)  # of the lowest resolution, in image pixels
        self.out_levels: Sequence[int] = range(build.levels)  # of the pyramid that a model without a head returns

        self.stem = Stem(planes, block, in_chans)
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
        shape, c = tuple(x.shape), self.in_chans
        if x.dim() not in (3, 4) or shape[-3] != c:
            fits = x.dim() in (3, 4) and shape[-1] != c  # else its channels come last
            other = f"; in_chans={shape[-3]} makes a model for it" if fits else ""
            raise ValueError(
                f"x: expected an image batch of shape [N, {c}, H, W] or [{c}, H, W], got shape {shape}{other}"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"x: expected a floating-point image, got {x.dtype}; scale it first, as in x.float() / 255"
            )
        sharded = "full_tensor"  # of a DTensor, whose unit may gather it in another dtype
        dtypes = (parameter.dtype for parameter in self.parameters() if not hasattr(parameter, sharded))
        if (first := next(dtypes, x.dtype)) != x.dtype and x.dtype not in dtypes:
            if autocast_dtype(x.device) is None:
                raise ValueError(
                    f"x: expected an image of {first}, as the parameters are, got {x.dtype}; convert it, as in "
                    f"x.to({first}), or run under torch.autocast"
                )
        if not all(size and (self.pad or size % self.stride == 0) for size in shape[-2:]):
            expected = "positive" if self.pad else f"positive multiples of {self.stride}"
            raise ValueError(
                f"x: expected height and width to be {expected}, got {shape[-2]} x {shape[-1]}; resize the image"
                + ("" if self.pad else ", or construct the model with pad=True")
            )

    def open(self, x: Tensor, read: Callable[[Tape | Stored], T]) -> T:
        """``read(tape)``, of the tape with the streams of x.

        It is the result of the stack's call, since the neck's parameters lie in the stack: hooks that gather sharded
        parameters for the stack gather these too.
        """
        owned = isinstance(self.stem, Stem) and not self.stem._forward_hooks  # else someone may hold the stem's output
        tape = self.rev_stack.open(self.stem(x), owned=owned)

        def finished() -> T:
            tape.finish()
            return read(tape)

        return tape.call_and_read(self.rev_stack, finished)

    def _pyramid(self, levels: Sequence[int], tape: Tape | Stored) -> list[Tensor]:
        """The maps of these levels, read from a tape."""
        if self.neck is None:
            streams = tape.leave()
            return [streams[level] for level in levels]
        return self.neck(tape.leave() if self.disable_recomp else tape, levels)

    def _merged(self, tape: Tape | Stored) -> Tensor:
        """The pyramid merged by the head, ``[N, C, H / 32, W / 32]``."""
        assert self.head is not None
        return self.head.merge(self._pyramid(range(self.levels), tape))

    def _maps(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """The maps of these levels, of a batch of images."""
        return self.open(x, partial(self._pyramid, levels))

    def _last(self, x: Tensor) -> Tensor:
        """The pyramid of a batch merged by the head; without a head, the last map."""
        return self._maps(x, self.out_levels[-1:])[0] if self.head is None else self.open(x, self._merged)

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        pyramid = self._maps(x, self.out_levels)
        return pyramid if self.head is None else self.head(pyramid)

    def _compute(self, x: Tensor) -> Tensor | list[Tensor]:
        recomputes = self.rev_stack.recomputes(x) or (self.neck is not None and not self.disable_recomp)
        if not (recomputes and wants_gradients(self, x)):
            return self._forward(x)
        maps = run_as_region(self, x)
        return list(maps) if self.head is None else maps[0]

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, -x.shape[-1] % self.stride, 0, -x.shape[-2] % self.stride)) if self.pad else x

    def _cropped(self, y: Tensor, level: int, x: Tensor) -> Tensor:
        """The part of a level's map of the padded image in which pixels of the image x lie."""
        stride = self.stem.block * 2**level
        return y.narrow(-2, 0, -(-x.shape[-2] // stride)).narrow(-1, 0, -(-x.shape[-1] // stride))

    def _run(self, compute: Callable[[Tensor], Tensor | list[Tensor]], x: Tensor, levels: Sequence[int]) -> Any:
        """What is computed of a batch after checks and padding, maps of ``levels`` cropped; unbatched as x is."""
        self._check(x)
        batch = self._padded(x if x.dim() == 4 else x[None])
        with names_of(self):
            out = compute(batch)
        maps = [out] if isinstance(out, Tensor) else out
        if self.pad:
            maps = [self._cropped(y, i, x) if y.dim() == 4 else y for y, i in zip(maps, levels, strict=True)]
        if x.dim() == 3:
            maps = [y[0] for y in maps]
        return maps[0] if isinstance(out, Tensor) else maps

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if isinstance(x, fx.Proxy):
            return _as_leaf(self, x)
        return self._run(self._compute, x, self.out_levels if self.head is None else self.out_levels[-1:])

    def norms(self) -> Iterator[nn.Module]:
        """The layers that normalise by statistics which they keep: BatchNorm and its kind."""
        return (module for module in self.modules() if isinstance(module, _NormBase))

    def freeze_norms(self, frozen: bool = True) -> RevBiFPN:
        """Fine-tuning with frozen BatchNorm: running statistics are used and kept, in train mode too.

        Affine parameters of the norms stop requiring a gradient while frozen. Saves every reduction of the norms.

        Args:
            frozen: False takes it back.

        Returns:
            self.
        """
        self.norms_frozen = frozen
        for norm in self.norms():
            norm.requires_grad_(not frozen)
        for block in chain(*self.layers[: self.layers_frozen]):
            block.requires_grad_(False)
        return self.train(self.training)

    @property
    def layers(self) -> list[list[Reversible]]:
        """The stack's blocks by layer: RevBlocks, then a silo."""
        layers: list[list[Reversible]] = [[]]
        for block in self.rev_stack.blocks:
            layers[-1].append(block)
            if isinstance(block, RevSilo):
                layers.append([])
        return [layer for layer in layers if layer]

    def freeze_layers(self, layers: int) -> RevBiFPN:
        """Fine-tuning of the last layers only: the first ones stay as they are, in eval mode and without gradients.

        Args:
            layers: how many; 0 takes it back.

        Returns:
            self.

        Raises:
            ValueError: the stack does not have so many.
        """
        all_layers = self.layers
        if not 0 <= layers <= len(all_layers):
            raise ValueError(f"layers: expected 0 to {len(all_layers)}, as the stack has, got {layers}")
        for i, layer in enumerate(all_layers):
            for block in layer if (i < layers) != (i < self.layers_frozen) else ():
                block.requires_grad_(i >= layers)
        self.layers_frozen = layers
        return self.freeze_norms() if self.norms_frozen else self.train(self.training)

    def train(self, mode: bool = True) -> RevBiFPN:
        """As :meth:`torch.nn.Module.train`, but frozen norms and layers stay in eval mode."""
        super().train(mode)
        if self.norms_frozen:
            for norm in self.norms():
                norm.eval()
        for block in chain(*self.layers[: self.layers_frozen]):
            block.eval()
        return self

    def forward_streams(self, x: Tensor) -> tuple[Tensor, ...]:
        """The stack's outputs, before the neck: what :meth:`inverse` takes.

        Args:
            x: ``[N, in_chans, H, W]``.

        Returns:
            Streams ``[N, channels[i], H / 2^(d+i), W / 2^(d+i)]``, from high to low resolution; with ``pad`` those of
            the padded image, not cropped.
        """
        self._check(x)
        return self.open(self._padded(x), lambda tape: tape.leave())

    @torch.no_grad()
    def inverse(self, streams: Sequence[Tensor]) -> Tensor:
        """The image, from the stack's outputs (:meth:`forward_streams`, or the pyramid of a model without neck).

        With ``pad`` it is the padded image, from the streams of :meth:`forward_streams`; ``[..., :H, :W]`` of it is the
        one that came.

        Not differentiable. In train mode batch statistics are those of the same batch, and random layers break the
        inversion: use ``eval()``, or ``stochastic_depth=0``.
        """
        streams = list(streams)
        if len(streams) != self.levels:
            raise ValueError(f"streams: expected {self.levels} maps from high to low resolution, got {len(streams)}")
        sizes = [tuple(y.shape[2:]) for y in streams]
        if any(2 * small != large for a, b in pairwise(sizes) for large, small in zip(a, b, strict=True)):
            raise ValueError(
                f"streams: expected sizes that halve from level to level, got {sizes}; with pad=True take them from "
                "forward_streams, which does not crop them"
            )
        return self.stem.inverse(cast(Tensor, self.rev_stack.inverse(*streams)))  # the stack starts from one stream

    # As timm's models ---------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """0 without a classifier."""
        return 0 if self.head is None else int(getattr(self.head.fc, "out_features", 0))

    @property
    def num_features(self) -> int:
        """Channels of :meth:`forward_features`."""
        return self.neck_channels[self.out_levels[-1]] if self.head is None else self.head.num_features

    @property
    def head_hidden_size(self) -> int:
        """Width before the classifier."""
        return self.num_features if self.head is None else self.head.hidden_size

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Per map of the pyramid: ``num_chs``, ``reduction`` (its stride), and the ``module`` that computes it."""
        module = "rev_stack" if self.neck is None else "rev_stack.recomp_op.recomp_transform_{}"
        return [
            {"num_chs": c, "reduction": self.stem.block * 2**i, "module": module.format(i)}
            for i, c in enumerate(self.neck_channels)
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """The map before pooling, ``[N, num_features, ceil(H / 32), ceil(W / 32)]``; without a head, the last map."""

        def compute(batch: Tensor) -> Tensor:
            last = self._last(batch)
            return last if self.head is None else self.head.features(last)

        return self._run(compute, x, self.out_levels[-1:])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from :meth:`forward_features`; with ``pre_logits`` what the classifier takes."""
        return self._with_head().classify(x, pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the pyramid.

        Args:
            x: as for ``forward``.
            indices: their levels: all (None), the lowest n resolutions (an int), or these; -1 is the lowest.
            norm, stop_early: without effect: the neck has no norm of its own, and every map needs every level.
            output_fmt: ``"NCHW"``.
            intermediates_only: leave out :meth:`forward_features`.

        Returns:
            The maps in the order of ``indices``, or ``(features, maps)``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        levels = self._levels_of(indices)

        def compute(batch: Tensor) -> list[Tensor]:
            if intermediates_only:
                return self._maps(batch, levels)
            pyramid = dict(zip(self.out_levels, self._maps(batch, self.out_levels), strict=True))
            maps = list(pyramid.values())
            features = maps[-1] if self.head is None else self.head.features(self.head.merge(maps))
            return [features, *(pyramid[level] for level in levels)]

        maps = self._run(compute, x, levels if intermediates_only else [self.out_levels[-1], *levels])
        return maps if intermediates_only else (maps[0], maps[1:])

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leave out whatever these maps do not need, and return nothing but them from now on.

        Without its head the model returns its pyramid. In the neck and in the last silo, transforms go that only other
        levels need: no parameter is left without a gradient.

        Args:
            indices: levels, as for :meth:`forward_intermediates`.
            prune_norm: without effect.
            prune_head: with False nothing is left out, since the head needs every level.

        Returns:
            The levels.
        """
        levels = self._levels_of(indices)
        if prune_head:
            self.head = None
            self.out_levels = sorted(set(levels))
            if self.neck is not None:
                self.neck.keep(levels)
            for silo in self.rev_stack.blocks[-1:]:
                cast(RevSilo, silo).keep(levels)
        return levels

    def _levels_of(self, indices: int | Sequence[int] | None) -> list[int]:
        if indices is None:
            return list(self.out_levels)
        if isinstance(indices, int):
            levels = list(range(self.levels))[-indices:] if 0 < indices <= self.levels else [self.levels]
        else:
            levels = [index + self.levels if index < 0 else index for index in indices]
        if not levels or not set(levels) <= set(self.out_levels):
            raise ValueError(
                f"indices: expected levels out of {list(self.out_levels)}, or how many of the last ones, got {indices}"
            )
        return levels

    def _with_head(self) -> Head:
        if self.head is None:
            raise ValueError("model: it has no head; construct it with classes=..., and do not prune it")
        return self.head

    def get_classifier(self) -> nn.Module:
        """The last linear layer; an ``nn.Identity`` if it was taken off."""
        return self._with_head().fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another classifier, newly initialised.

        Args:
            num_classes: 0 leaves it out: the model returns pooled features, ``[N, head_hidden_size]``.
            global_pool: ``"avg"``, or ``""`` for the map before pooling (without a classifier); None keeps it.
        """
        self._with_head().reset(num_classes, None if global_pool is None else self._pool(global_pool))

    def _pool(self, pool_type: str) -> GlobalPool:
        return GlobalPool(pool_type)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in backward (as a model does by itself), or store them."""
        self.disable_rev = self.disable_recomp = not enable

    @property
    def grad_checkpointing(self) -> bool:
        return not self.disable_rev

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for learning rates per layer: blocks of the stack, neck, head, classifier.

        Args:
            coarse: the blocks between two silos, and the silo, as one.
        """
        names = {block: name for name, block in self.rev_stack.named_children()}
        groups = self.layers if coarse else [[block] for block in self.rev_stack.blocks]
        blocks = [rf"^rev_stack\.(?:{'|'.join(names[block] for block in group)})\." for group in groups]
        depths = [*blocks, r"^rev_stack\.", r"^head\.(?!fc\.)"]
        return {"stem": r"^stem\.", "blocks": [(pattern, (depth,)) for depth, pattern in enumerate(depths)]}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides norms and biases: none."""
        return set()


def _room_for(in_chans: int, block: int) -> str:
    """What to do about an image of that many channels."""
    channels = in_chans * block**2
    scale = next((config.arch for config in CONFIGS.values() if config.channels[0] >= channels), None)
    return f"more channels need channels[0] >= {channels}" + (f", as {scale} has" if scale else "")


def _as_leaf(model: RevBiFPN, x: fx.Proxy) -> Any:
    """The call of ``model`` in a graph that torch.fx traces: one operation, as those of torch.nn are."""
    path = x.tracer.path_of_module(model) if isinstance(x.tracer, fx.Tracer) else ""
    if not path:
        raise TypeError(
            "x: torch.fx takes a RevBiFPN as one operation, so there is nothing in it to trace or to extract: "
            "classes=None makes it return its maps, revbifpn.adapters.torchvision has a backbone of named maps, and a "
            "module that holds the model can be traced"
        )
    return x.tracer.create_proxy("call_module", path, (x,), {})


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
