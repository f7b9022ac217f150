"""Detectron2: the backbone against its documented interface, which is written down here, since it has no wheels."""

import sys
import types
from abc import ABCMeta, abstractmethod
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from revbifpn import fast
from tests.networks import F32, NARROW, identical, image, narrow

OPTIONS = {name: value for name, value in NARROW.items() if name != "classes"}


@dataclass
class ShapeSpec:
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Backbone(nn.Module, metaclass=ABCMeta):
    @abstractmethod
    def forward(self): ...

    @property
    def size_divisibility(self):
        return 0

    def output_shape(self):
        raise NotImplementedError


class Registry(dict):
    def register(self):
        def add(value):
            self[value.__name__] = value
            return value

        return add


class CfgNode(dict):
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class FPN(nn.Module):
    """What Detectron2's reads of the backbone under it."""

    def __init__(self, bottom_up, in_features, out_channels, norm="", top_block=None, fuse_type="sum"):
        super().__init__()
        shapes = bottom_up.output_shape()
        strides = [shapes[name].stride for name in in_features]
        assert all(2 * a == b for a, b in zip(strides, strides[1:], strict=False))
        self.bottom_up, self.in_features = bottom_up, in_features
        self.laterals = nn.ModuleList(nn.Conv2d(shapes[name].channels, out_channels, 1) for name in in_features)

    def forward(self, x):
        maps = self.bottom_up(x)
        return [lateral(maps[name]) for lateral, name in zip(self.laterals, self.in_features, strict=True)]


@pytest.fixture
def adapter(monkeypatch):
    modules = {
        "detectron2": {},
        "detectron2.config": {"CfgNode": CfgNode},
        "detectron2.layers": {"ShapeSpec": ShapeSpec},
        "detectron2.modeling": {"BACKBONE_REGISTRY": Registry(), "Backbone": Backbone, "FPN": FPN},
        "detectron2.modeling.backbone": {},
        "detectron2.modeling.backbone.fpn": {"LastLevelMaxPool": nn.Identity},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "revbifpn.adapters.detectron2", raising=False)
    import importlib

    yield importlib.import_module("revbifpn.adapters.detectron2")
    sys.modules.pop("revbifpn.adapters.detectron2", None)


def test_maps_are_those_of_the_ordinary_class_by_name_with_channels_and_strides(adapter):
    torch.manual_seed(0)
    model = adapter.RevBiFPN("revbifpn_s0", out_features=["rev5", "rev3"], **OPTIONS).eval()
    with torch.no_grad():
        found, maps = model(image(F32)), narrow(fast, F32, classes=None).eval()(image(F32))
    assert list(found) == ["rev3", "rev5"] and identical(found.values(), [maps[1], maps[3]])
    shapes = model.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {"rev3": (16, 8), "rev5": (16, 32)}
    assert model.size_divisibility == 32


def test_a_config_builds_it_under_an_fpn_and_everything_that_trains_gets_a_gradient(adapter):
    model = CfgNode(BACKBONE=CfgNode(FREEZE_AT=2))
    model.FPN = CfgNode(IN_FEATURES=["rev2", "rev3", "rev4", "rev5"], OUT_CHANNELS=16, NORM="", FUSE_TYPE="sum")
    cfg = CfgNode(MODEL=model)
    adapter.add_revbifpn_config(cfg)
    net = adapter.BACKBONE_REGISTRY["build_revbifpn_fpn_backbone"](cfg, ShapeSpec(channels=3)).train()
    sum(y.square().mean() for y in net(image(F32))).backward()
    assert all((p.grad is None) != p.requires_grad for p in net.parameters())
    body = net.bottom_up
    assert body.layers_frozen == 2 and body.norms_frozen


@pytest.mark.parametrize(
    "options, match",
    [
        ({"out_features": ["p2"]}, "out_features: expected names out of"),
        ({"freeze_at": 9}, "freeze_at: expected 0 to 3"),
    ],
)
def test_arguments_that_do_not_fit_are_named(adapter, options, match):
    with pytest.raises(ValueError, match=match):
        adapter.RevBiFPN("revbifpn_s0", **OPTIONS, **options)
