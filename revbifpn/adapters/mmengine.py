"""MMEngine: RevBiFPN in its registry of models, where MMDetection, MMSegmentation and MMPose find it.

In a config::

    custom_imports = dict(imports=["revbifpn.adapters.mmengine"])
    model = dict(
        backbone=dict(_delete_=True, type="RevBiFPN", arch="revbifpn_s3"),
        neck=dict(type="HRFPN", in_channels=[128, 160, 336, 848], out_channels=256),
    )
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

try:
    from mmengine.model import BaseModule
    from mmengine.registry import MODELS
except ModuleNotFoundError as error:
    raise ImportError(
        f"revbifpn.adapters.mmengine needs mmengine ({error}): pip install 'revbifpn-fast[mmengine]'"
    ) from error

from revbifpn import fast
from revbifpn.adapters.levels import freeze_unused
from revbifpn.configs import get_config
from revbifpn.mbconv import BATCH_NORM

_NORMS = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}


@MODELS.register_module()
class RevBiFPN(fast.RevBiFPN, BaseModule):
    """A published scale as a backbone, :class:`revbifpn.fast.RevBiFPN` without head, under the published names.

    Args:
        arch: ``"revbifpn_s0"`` to ``"revbifpn_s6"``.
        out_indices: levels that are returned, of strides 4, 8, 16, 32. What only the others depend on is frozen.
        frozen_stages: how many layers of the stack, from the first, are in eval mode and do not train; -1 and 0: none,
            since the stem has no parameters.
        norm_cfg: ``type`` is "BN" or "SyncBN"; with ``requires_grad=False`` norms are frozen whole. Further entries are
            arguments of the norm.
        norm_eval: norms use and keep their running statistics in train mode too.
        with_cp: recompute activations in backward instead of storing them.
        init_cfg: as in ``dict(type="Pretrained", checkpoint=...)``, which takes the published files.
        overrides: constructor arguments of :class:`revbifpn.RevBiFPN` that replace the scale's, such as ``stream``.

    Shapes:
        image ``[N, 3, H, W]``, H and W multiples of 32 (``pad_size_divisor=32`` of the data preprocessor). Returns a
        tuple of maps ``[N, neck_channels[i], H / 2^(2+i), W / 2^(2+i)]`` for i in ``out_indices``.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    norm_eval = False  # until the parts are there

    def __init__(
        self,
        arch: str = "revbifpn_s0",
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_cfg: Mapping[str, Any] | None = None,
        norm_eval: bool = True,
        with_cp: bool = True,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **overrides: Any,
    ) -> None:
        norm = dict(norm_cfg or {"type": "BN"})
        name, trained = norm.pop("type", None), norm.pop("requires_grad", True)
        if name not in _NORMS:
            raise ValueError(f"norm_cfg: expected a type among {sorted(_NORMS)}, got {name!r}")
        arguments = get_config(arch).arguments() | {"classes": None, "reversible": with_cp, "norm_fn": _NORMS[name]}
        if norm:
            arguments["norm_kwargs"] = BATCH_NORM | norm
        super().__init__(**(arguments | overrides))
        self.init_cfg = copy.deepcopy(init_cfg)
        self.out_indices = tuple(out_indices)
        if not self.out_indices or not set(self.out_indices) <= set(range(self.levels)):
            raise ValueError(f"out_indices: expected levels from 0 to {self.levels - 1}, got {self.out_indices}")
        self.norm_eval = norm_eval
        if not trained:
            self.freeze_norms()
        if not -1 <= frozen_stages <= len(self.layers):
            raise ValueError(f"frozen_stages: expected -1 to {len(self.layers)}, got {frozen_stages}")
        self.freeze_layers(max(frozen_stages, 0))
        freeze_unused(self, self.out_indices)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        maps = super().forward(x)
        return tuple(maps[i] for i in self.out_indices)

    def train(self, mode: bool = True) -> RevBiFPN:
        super().train(mode)
        if self.norm_eval:
            for norm in self.norms():
                norm.eval()
        return self
