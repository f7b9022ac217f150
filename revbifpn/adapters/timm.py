"""timm: ``timm.create_model("revbifpn_s0")`` to ``"revbifpn_s6"``, after this import.

    >>> import timm
    >>> import revbifpn.adapters.timm
    >>> backbone = timm.create_model("revbifpn_s3", features_only=True, in_chans=1)
    >>> backbone.feature_info.channels(), backbone.feature_info.reduction()
    ([128, 160, 336, 848], [4, 8, 16, 32])

timm looks for no models by itself, hence the import. It is enough for segmentation_models_pytorch too, whose encoders
they are as ``"tu-revbifpn_s3"``.

The network is :class:`revbifpn.fast.RevBiFPN`, with ``fused=False`` :class:`revbifpn.RevBiFPN`. So it recomputes its
activations by itself, and ``set_grad_checkpointing(False)`` stores them. What is here are timm's names of constructor
arguments, its poolings, and its descriptions of pretrained weights.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch

try:
    from timm.layers import SelectAdaptivePool2d
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
except ModuleNotFoundError as error:
    raise ImportError(f"revbifpn.adapters.timm needs timm ({error}): pip install 'revbifpn-fast[timm]'") from error

from revbifpn import fast, model
from revbifpn.checkpoints import load_checkpoint, published_file
from revbifpn.configs import CLASSES, CONFIGS, CROP, INTERPOLATION, MEAN, STD, Config, get_config

STRIDE = 32
TAG = "cerebras_in1k"


class TimmModel(model.RevBiFPN):
    """Mixin of a :class:`revbifpn.RevBiFPN`: a published scale by timm's arguments.

    Args:
        arch: ``"revbifpn_s0"`` to ``"revbifpn_s6"``.
        num_classes: 0 leaves out the classifier: the model returns pooled features, ``[N, head_hidden_size]``.
        in_chans: channels of the image.
        global_pool: any of :class:`timm.layers.SelectAdaptivePool2d`; ``""`` (without a classifier): the map itself.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last layer; the published models were trained with that of their
            :class:`revbifpn.configs.Config`, as with its dropout.
        output_stride: 32.
        device, dtype: of the parameters.
        options: further arguments of :class:`revbifpn.RevBiFPN`, such as ``pad``, ``stream`` or ``reversible``.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int = CLASSES,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int = STRIDE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if output_stride != STRIDE:
            raise ValueError(
                f"output_stride: expected {STRIDE}, got {output_stride}: the levels have strides 4, 8, 16 and 32, and "
                "none can be dilated; use a decoder that takes a pyramid, such as Unet, FPN or UPerNet"
            )
        arguments = get_config(arch).arguments()
        for name in ("head_dropout", "stochastic_depth"):
            del arguments[name]
        with nullcontext() if device is None else torch.device(device):
            super().__init__(
                **(arguments | options),
                classes=num_classes or 1,  # 0 would leave out the head, of which timm's classifier is the last layer
                head_dropout=drop_rate,
                stochastic_depth=drop_path_rate,
                in_chans=in_chans,
            )
        self.arch, self.drop_rate = arch, drop_rate
        if num_classes != self.num_classes or global_pool != "avg":
            self.reset_classifier(num_classes, global_pool)
        self.to(dtype)

    def _pool(self, pool_type: str) -> Any:
        own = pool_type in ("avg", "")
        return super()._pool(pool_type) if own else SelectAdaptivePool2d(pool_type=pool_type, flatten=True)

    def load_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Load the published file, as timm asks for it: complete, unless the classifier is another one."""
        load_checkpoint(self, path, strict=self.num_classes == CLASSES, sha256=get_config(self.arch).sha256)


class RevBiFPN(TimmModel, fast.RevBiFPN):
    """:class:`revbifpn.fast.RevBiFPN` by timm's arguments; see :class:`TimmModel`."""


class PlainRevBiFPN(TimmModel):
    """:class:`revbifpn.RevBiFPN` by timm's arguments; see :class:`TimmModel`."""


def _weights(config: Config) -> dict[str, Any]:
    return {
        "url": config.url,
        "num_classes": CLASSES,
        "input_size": (3, config.resolution, config.resolution),
        "pool_size": (config.resolution // STRIDE, config.resolution // STRIDE),
        "crop_pct": CROP,
        "interpolation": INTERPOLATION,
        "mean": MEAN,
        "std": STD,
        "first_conv": (),  # the stem has none, and weights fit any in_chans
        "classifier": "head.fc",
        "origin_url": "https://github.com/CerebrasResearch/RevBiFPN",
        "paper_name": "RevBiFPN: The Fully Reversible Bidirectional Feature Pyramid Network",
        "paper_ids": "arXiv:2206.14098",
    }


default_cfgs = generate_default_cfgs({f"{config.arch}.{TAG}": _weights(config) for config in CONFIGS.values()})


def _create(
    arch: str,
    pretrained: bool,
    *,
    fused: bool = True,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> torch.nn.Module:
    if kwargs.get("features_only") and kwargs.get("feature_cls", "getter") != "getter":
        raise ValueError(
            f"feature_cls: expected 'getter', got {kwargs['feature_cls']!r}: maps are read from the streams, and no "
            "sequence of modules returns them"
        )
    config = get_config(arch)
    if pretrained:
        source = resolve_pretrained_cfg(arch, pretrained_cfg, pretrained_cfg_overlay)
        if source.url == config.url and not (source.file or source.state_dict or source.hf_hub_id):
            file = {"file": str(published_file(config, cache_dir)), "custom_load": True}
            pretrained_cfg_overlay = (pretrained_cfg_overlay or {}) | file
    return build_model_with_cfg(
        RevBiFPN if fused else PlainRevBiFPN,
        arch,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        arch=arch,
        **kwargs,
    )


@register_model
def revbifpn_s0(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    return _create("revbifpn_s0", pretrained, **kwargs)


@register_model
def revbifpn_s1(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    return _create("revbifpn_s1", pretrained, **kwargs)


@register_model
def revbifpn_s2(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    return _create("revbifpn_s2", pretrained, **kwargs)


@register_model
def revbifpn_s3(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    return _create("revbifpn_s3", pretrained, **kwargs)


@register_model
def revbifpn_s4(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    return _create("revbifpn_s4", pretrained, **kwargs)


@register_model
def revbifpn_s5(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    return _create("revbifpn_s5", pretrained, **kwargs)


@register_model
def revbifpn_s6(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    return _create("revbifpn_s6", pretrained, **kwargs)
