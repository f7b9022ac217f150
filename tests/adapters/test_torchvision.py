"""torchvision: detectors train as on stored plain PyTorch, and torch.fx takes a model as one operation."""

import dataclasses
import hashlib

import pytest
import torch
from torch import fx, nn

import revbifpn
from revbifpn import fast
from revbifpn.checkpoints import save_checkpoint
from revbifpn.configs import CONFIGS
from revbifpn.memory import PeakMemory
from tests.adapters import frameworks
from tests.marks import slow
from tests.networks import BOTH, F32, F64, MODULES, NARROW, difference, gradients, identical, image, narrow

detection = frameworks.torchvision("torchvision.models.detection")
adapter = pytest.importorskip("revbifpn.adapters.torchvision")
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelP6P7  # noqa: E402

BODY = NARROW | {"classes": None}
WIDTH = 32


def backbone(module=fast, *, seed=0, dtype=F32, **options):
    torch.manual_seed(seed)
    names = ("returned_levels", "extra_blocks", "fpn", "recompute")
    own = {name: options.pop(name) for name in names if name in options}
    return adapter.BackboneWithFPN(module.RevBiFPN(**(BODY | options)), WIDTH, **own).to(dtype)


def two_stage(**heads):
    def make(body):
        box = {
            "box_head": detection.faster_rcnn.TwoMLPHead(WIDTH * 7**2, 32),
            "box_predictor": detection.faster_rcnn.FastRCNNPredictor(32, 3),
        }
        cls = {"mask_head": detection.MaskRCNN, "keypoint_head": detection.KeypointRCNN}
        made = {name: head() for name, head in heads.items()}
        kind = next((cls[name] for name in made if name in cls), detection.FasterRCNN)
        return kind(
            body, **box, **made, rpn_pre_nms_top_n_train=50, box_batch_size_per_image=16, min_size=64, max_size=96
        )

    return make


def one_stage(name):
    def make(body):
        options = {"anchor_generator": detection.retinanet._default_anchorgen()} if name == "RetinaNet" else {}
        return getattr(detection, name)(body, 3, min_size=64, max_size=96, **options)

    return make


DETECTORS = {
    "FasterRCNN": (two_stage(), {}),
    "MaskRCNN": (
        two_stage(
            mask_head=lambda: detection.mask_rcnn.MaskRCNNHeads(WIDTH, (8,), 1),
            mask_predictor=lambda: detection.mask_rcnn.MaskRCNNPredictor(8, 8, 3),
        ),
        {},
    ),
    "KeypointRCNN": (
        two_stage(
            keypoint_head=lambda: detection.keypoint_rcnn.KeypointRCNNHeads(WIDTH, (8,)),
            keypoint_predictor=lambda: detection.keypoint_rcnn.KeypointRCNNPredictor(8, 17),
        ),
        {},
    ),
    "RetinaNet": (one_stage("RetinaNet"), {"returned_levels": (1, 2, 3), "extra_blocks": True}),
    "FCOS": (one_stage("FCOS"), {"returned_levels": (1, 2, 3), "extra_blocks": True}),
}


def detector(name, module=fast, *, dtype=F32, **options):
    make, of_backbone = DETECTORS[name]
    if "extra_blocks" in of_backbone:
        of_backbone = of_backbone | {"extra_blocks": LastLevelP6P7(WIDTH, WIDTH)}
    model = make(backbone(module, **of_backbone, **options))
    torch.manual_seed(4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).train()


def images(dtype=F32):
    """Of sizes that no stride divides."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, h, w, dtype=F64, generator=generator).to(dtype) for h, w in ((75, 97), (64, 70))]


def targets(dtype=F32):
    boxes = torch.tensor([[5.0, 5, 40, 40], [10, 20, 60, 60]], dtype=dtype)
    made = []
    for x in images():
        masks = torch.zeros(2, *x.shape[-2:], dtype=torch.uint8)
        masks[:, 10:30, 10:30] = 1
        keypoints = torch.cat([torch.full((2, 17, 2), 25.0), torch.ones(2, 17, 1)], -1)
        made.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": keypoints})
    return made


def step(model, dtype=F32):
    """Losses and gradients; proposals are drawn from the seed."""
    torch.manual_seed(5)
    losses = model(images(dtype), targets(dtype))
    sum(losses.values()).backward()
    return list(losses.values()), [p.grad for p in model.parameters()]


# Detectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FasterRCNN", *slow(["MaskRCNN", "KeypointRCNN", "RetinaNet", "FCOS"])])
def test_a_detector_trains_on_images_of_any_size_as_on_stored_plain_pytorch(name):
    losses, grads = step(detector(name, dtype=F64), F64)
    wanted_losses, wanted = step(detector(name, revbifpn, dtype=F64, reversible=False, recompute=False), F64)
    assert difference(grads, wanted) < 1e-9 and difference(losses, wanted_losses) < 1e-12
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("name", ["FCOS", *slow(["FasterRCNN", "MaskRCNN", "KeypointRCNN", "RetinaNet"])])
def test_every_parameter_that_trains_gets_a_gradient(name):
    model = detector(name)
    step(model)
    assert [n for n, p in model.named_parameters() if (p.grad is None) == p.requires_grad] == []


@pytest.mark.parametrize("name", ["FasterRCNN", *slow(["MaskRCNN", "KeypointRCNN", "RetinaNet", "FCOS"])])
def test_a_detector_finds_boxes_in_images_of_any_size(name):
    with torch.no_grad():
        found = detector(name).eval()(images())
    for x, boxes in zip(images(), (f["boxes"] for f in found), strict=True):
        assert boxes.shape[1:] == (4,) and (boxes >= 0).all()
        assert (boxes[:, ::2] <= x.shape[-1]).all() and (boxes[:, 1::2] <= x.shape[-2]).all()


# The backbone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fpn", [True, False], ids=["fpn", "own maps"])
def test_maps_have_torchvisions_names_one_width_and_strides_4_to_64(fpn):
    net = backbone(fpn=fpn, **{} if fpn else {"head_channels": [WIDTH] * 4})
    maps = net(image(F32, height=64, width=96))
    assert net.out_channels == WIDTH
    sizes = {"0": (16, 24), "1": (8, 12), "2": (4, 6), "3": (2, 3), "pool": (1, 2)}
    assert {name: tuple(y.shape) for name, y in maps.items()} == {
        name: (2, WIDTH, *size) for name, size in sizes.items()
    }


class Values(nn.Module):
    """The maps of a backbone as a list."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return list(self.net(x).values())


def test_a_recomputed_pyramid_changes_no_gradient_and_saves_memory():
    x, kept, found = image(F32, height=128, width=128), {}, {}
    for recompute in (False, True):
        net = Values(backbone(recompute=recompute))
        found[recompute] = gradients(net, x)
        with PeakMemory() as meter:
            maps = net(x)
        kept[recompute] = meter.live_bytes
        del maps
    assert difference(found[True], found[False]) < 1e-5
    merged = 2 * WIDTH * 32 * 32 * 4  # the largest, in bytes
    assert kept[False] - kept[True] >= merged


def test_frozen_norms_and_layers_stay_as_they_are_in_training():
    torch.manual_seed(0)
    net = adapter.revbifpn_fpn_backbone(
        "revbifpn_s0", trainable_layers=1, frozen_norms=True, out_channels=WIDTH, **NARROW | {"classes": None}
    ).train()
    layers = net.body.layers
    assert len(layers) == 3
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    of_layers = {id(p) for layer in layers[:2] for block in layer for p in block.parameters()}
    assert frozen == {n for n, p in net.named_parameters() if id(p) in of_layers or (".norm." in n and "body" in n)}
    before = {n: v.clone() for n, v in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sum(y.square().mean() for y in net(image(F32)).values()).backward()
    optimizer.step()
    after = net.state_dict()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed and changed <= {n for n, p in net.named_parameters() if p.requires_grad}


@MODULES
def test_gradients_above_frozen_layers_and_norms_are_those_of_the_stored_network(module):
    def run(model):
        return gradients(model.freeze_norms().freeze_layers(2), image())

    options = {"classes": None, "num_ext_layers": 1}
    assert difference(run(narrow(module, **options)), run(narrow(revbifpn, reversible=False, **options))) < 1e-9


def test_freezing_can_be_taken_back_in_any_order():
    model = narrow(fast)
    model.freeze_norms().freeze_layers(2).freeze_norms(False)
    first, last = model.layers[0], model.layers[-1]
    assert not any(p.requires_grad for block in first for p in block.parameters())
    assert not any(module.training for block in first for module in block.modules())
    assert all(p.requires_grad for block in last for p in block.parameters())
    model.freeze_norms().freeze_layers(0)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert all(p.requires_grad == (id(p) not in norms) for p in model.parameters())
    model.freeze_norms(False)
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    with pytest.raises(ValueError, match="layers: expected 0 to 3"):
        model.freeze_layers(4)


def test_pretrained_weights_are_loaded_without_a_word_about_the_head(tmp_path, monkeypatch, recwarn):
    published = fast.revbifpn_s0()
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "revbifpn_s0.pth.tar"
    save_checkpoint(published, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(CONFIGS, "revbifpn_s0", dataclasses.replace(CONFIGS["revbifpn_s0"], sha256=digest))
    net = adapter.revbifpn_fpn_backbone("revbifpn_s0", pretrained=True)
    assert identical(net.body.state_dict().values(), published.rev_stack.state_dict().values())
    assert net.body.norms_frozen and not list(recwarn)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"classes": 10}, "body: .*classes=None"),
        ({"returned_levels": (0, 4)}, r"returned_levels: expected ascending levels from 0 to 3, got \(0, 4\)"),
        ({"returned_levels": ()}, "returned_levels"),
        ({"fpn": False, "head_channels": [32, 32, 32, 16]}, r"head_channels=\[32, 32, 32, 32\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        backbone(**options)


def test_too_many_trainable_layers_are_refused():
    with pytest.raises(ValueError, match="trainable_layers: expected 0 to 5, as the stack has, got 6"):
        adapter.revbifpn_fpn_backbone("revbifpn_s0", trainable_layers=6)


# torch.fx ---------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.body = module.RevBiFPN(**BODY)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        maps = self.body(x)
        return self.head(maps[0] + nn.functional.interpolate(maps[1], scale_factor=2.0))


@MODULES
def test_a_model_is_one_operation_of_a_traced_network(module):
    net, x = Segmenter(module), image(F32)
    traced = fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["body", "head"]
    assert difference(gradients(traced, x), gradients(net, x)) == 0


def test_feature_extractors_take_the_maps_of_a_network_and_of_the_backbone():
    net = backbone().eval()
    assert get_graph_node_names(net)[0] == ["x", "body", "getitem", "getitem_1", "getitem_2", "getitem_3", "fpn"]
    extractor = create_feature_extractor(net, {"getitem_3": "stride 32", "fpn": "pyramid"})
    x = image(F32)
    with torch.no_grad():
        found = extractor(x)
        assert torch.equal(found["stride 32"], net.body(x)[3])
        assert identical(found["pyramid"].values(), net(x).values())


@pytest.mark.parametrize("cls", [BOTH["plain"].RevBiFPN, BOTH["fast"].RevBiFPN])
def test_tracing_the_model_itself_names_what_works(cls):
    with pytest.raises(TypeError, match=r"one operation.*classes=None.*revbifpn\.adapters\.torchvision"):
        create_feature_extractor(cls(**BODY), ["rev_stack.1"])
