"""revbifpn.detection: what is recomputed gives the losses and gradients of what is stored, in less memory."""

import gc

import pytest
import torch
from torch import nn

from revbifpn.fused import chunks_of
from revbifpn.memory import PeakMemory
from tests.adapters import frameworks
from tests.marks import slow
from tests.networks import F32, F64, NARROW, difference, identical
from tests.processes import run, worker

vision = frameworks.torchvision("torchvision.models.detection")
detection = pytest.importorskip("revbifpn.detection")
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor  # noqa: E402
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads  # noqa: E402
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork  # noqa: E402

from revbifpn.adapters.torchvision import FeaturePyramid  # noqa: E402
from revbifpn.adapters.torchvision_heads import recompute_heads  # noqa: E402

WIDTH = 32
BODY = {name: value for name, value in NARROW.items() if name != "classes"}
SMALL = {"min_size": 64, "max_size": 96, "width": WIDTH}
REGIONS = {"rpn_pre_nms_top_n_train": 50, "box_batch_size_per_image": 24}
DETECTORS = {
    "fasterrcnn": REGIONS,
    "maskrcnn": REGIONS | {"mask_head": lambda: MaskRCNNHeads(WIDTH, (256,), 1)},
    "keypointrcnn": REGIONS
    | {
        "keypoint_head": lambda: KeypointRCNNHeads(WIDTH, (8,)),
        "keypoint_predictor": lambda: KeypointRCNNPredictor(8, 17),
    },
    "retinanet": {},
    "fcos": {},
}
ALL = pytest.mark.parametrize("name", ["fasterrcnn", "retinanet", *slow(["maskrcnn", "keypointrcnn", "fcos"])])


def make(name, *, stored=False, dtype=F32, **options):
    own = {key: value() if callable(value) else value for key, value in DETECTORS[name].items()}
    overrides = BODY | ({"reversible": False} if stored else {})
    options = SMALL | own | {"recompute": not stored, "overrides": overrides} | options
    model = getattr(detection, f"{name}_revbifpn")(3, **options)
    generator = torch.Generator().manual_seed(4)
    for _, parameter in sorted(model.named_parameters()):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.to(dtype).train()


def images(dtype=F32, sizes=((75, 97), (64, 70))):
    """Of sizes that no stride divides."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, h, w, dtype=F64, generator=generator).to(dtype) for h, w in sizes]


def targets(of, empty=()):
    made = []
    for i, x in enumerate(of):
        n = 0 if i in empty else 2
        masks = torch.zeros(n, *x.shape[-2:], dtype=torch.uint8)
        masks[:, 10:30, 10:30] = 1
        made.append(
            {
                "boxes": torch.tensor([[5.0, 5, 40, 40], [10, 20, 60, 60]], dtype=x.dtype)[:n],
                "labels": torch.tensor([1, 2])[:n],
                "masks": masks,
                "keypoints": torch.cat([torch.full((n, 17, 2), 25.0), torch.ones(n, 17, 1)], -1),
            }
        )
    return made


def step(model, dtype=F32, empty=()):
    """Losses, and gradients of parameters that train; anchors and proposals are drawn from the seed."""
    torch.manual_seed(5)
    found = model(images(dtype), targets(images(dtype), empty))
    sum(found.values()).backward()
    return list(found.values()), [p.grad for p in model.parameters() if p.requires_grad]


def assert_same(name, *, empty=(), **options):
    with chunks_of(2**15):  # several strips of rows
        losses, grads = step(make(name, dtype=F64, **options), F64, empty)
    wanted_losses, wanted = step(make(name, stored=True, dtype=F64, **options), F64, empty)
    assert difference(grads, wanted) < 1e-9 and difference(losses, wanted_losses) < 1e-12
    assert all(loss.isfinite() for loss in losses)


@ALL
def test_a_step_has_the_losses_and_gradients_of_the_stored_one(name):
    assert_same(name)


def test_so_it_has_where_no_anchor_of_some_levels_is_sampled():
    assert_same("fasterrcnn", rpn_batch_size_per_image=2)


@pytest.mark.parametrize("name", slow(["fasterrcnn", "maskrcnn", "retinanet", "fcos"]))
def test_so_it_has_where_an_image_has_no_boxes_and_layers_and_norms_are_frozen(name):
    assert_same(name, empty=(0,), trainable_levels=1, frozen_norms=True)


@pytest.mark.parametrize("name", [*slow(["fasterrcnn", "maskrcnn", "keypointrcnn"]), "fcos", *slow(["retinanet"])])
def test_every_parameter_that_trains_gets_a_gradient(name):
    model = make(name, trainable_levels=1, frozen_norms=True)
    frozen = {id(p) for block in model.backbone.body.layers[0] for p in block.parameters()}
    frozen |= {id(p) for norm in model.backbone.body.norms() for p in norm.parameters()}
    assert frozen and not any(p.requires_grad for p in model.parameters() if id(p) in frozen)
    step(model)
    assert [n for n, p in model.named_parameters() if (p.grad is None) == p.requires_grad] == []


@ALL
def test_names_of_parameters_and_detections_are_torchvisions(name):
    ours, stored = make(name).eval(), make(name, stored=True).eval()
    assert ours.state_dict().keys() == stored.state_dict().keys()
    stored.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for found, wanted in zip(ours(images()), stored(images()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@ALL
def test_recomputing_saves_memory(name):
    peaks = []
    for stored in (False, True):
        model = make(name, stored=stored)
        with PeakMemory() as meter, chunks_of(2**15):
            loss = sum(model(images(), targets(images())).values())
            kept = meter.live_bytes
            loss.backward()
            peaks.append((kept, meter.peak_without([p.grad for p in model.parameters() if p.grad is not None])))
    (kept, peak), (stored_kept, stored_peak) = peaks
    assert kept < stored_kept / 2 and peak < 0.8 * stored_peak


def pyramids(sizes=((16, 24), (8, 12), (4, 6))):
    """Our FPN and torchvision's, of equal weights, and maps."""
    made = []
    for cls in (FeaturePyramid, FeaturePyramidNetwork):
        torch.manual_seed(0)
        made.append(cls([8, 6, 4], WIDTH).double())
    maps = {str(i): torch.randn(2, 8 - 2 * i, *size, dtype=F64) for i, size in enumerate(sizes)}
    return *made, maps


@pytest.mark.parametrize("sizes", [((16, 24), (8, 12), (4, 6)), ((15, 23), (8, 12), (4, 6))], ids=["even", "odd"])
@pytest.mark.parametrize("rows", [2, 5, 100])
def test_the_pyramid_is_torchvisions_however_many_rows_a_strip_has(sizes, rows):
    ours, theirs, maps = pyramids(sizes)
    found = []
    for net in (ours, theirs):
        inputs = {name: x.clone().requires_grad_() for name, x in maps.items()}
        with chunks_of(rows * 2 * WIDTH * sizes[0][1] * 8):
            values = net(inputs)
            sum((y * torch.linspace(-1, 2, y.numel(), dtype=F64).view_as(y)).sum() for y in values.values()).backward()
        found.append([*values.values(), *(x.grad for x in inputs.values()), *(p.grad for p in net.parameters())])
    assert difference(*found) < 1e-12


@pytest.mark.parametrize("dense", [False, True], ids=["pixels", "pixels and map"])
def test_the_gradient_of_a_few_pixels_of_the_largest_map_is_that_of_the_map(dense):
    ours, theirs, maps = pyramids()
    at = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 15, 15, 7]), torch.tensor([0, 23, 23, 8])
    found = []
    for net in (ours, theirs):
        values = net(maps)
        read = values.pixels("0", *at) if net is ours else values["0"].permute(0, 2, 3, 1)[at]
        loss = read.square().sum() + (values["0"].sin().sum() if dense else 0)
        found.append(torch.autograd.grad(loss, list(net.parameters())[:3] + list(net.layer_blocks[0].parameters())))
    assert difference(*found) < 1e-12


def test_heads_of_other_detectors_are_recomputed_where_they_are_torchvisions_own():
    def run(recomputed):
        torch.manual_seed(0)
        model = vision.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
        )
        if recomputed:
            recompute_heads(model)
        return step(model.double().train(), F64)

    (losses, grads), (wanted_losses, wanted) = run(True), run(False)
    assert difference(grads, wanted) < 1e-9 and difference(losses, wanted_losses) < 1e-12


@pytest.mark.parametrize(
    "change, match",
    [
        ({"labels": torch.tensor([1, 3])}, r"targets\[0\]\['labels'\]: expected 1 to 2, got \[1, 3\]"),
        ({"labels": torch.tensor([0, 1])}, "expected 1 to 2, got"),
        ({"labels": torch.tensor([1])}, "expected 2, one per box, got 1"),
        ({"boxes": torch.tensor([[1.0, 1, float("nan"), 4], [1, 1, 5, 5]])}, "expected finite coordinates"),
    ],
)
def test_targets_that_would_give_no_loss_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        make("fasterrcnn")(images(), [targets(images())[0] | change, targets(images())[1]])


def test_a_box_without_area_is_refused_as_torchvision_does():
    wrong = targets(images())
    wrong[1]["boxes"][0, 2] = wrong[1]["boxes"][0, 0]
    with pytest.raises(AssertionError, match="positive height and width"):
        make("fasterrcnn")(images(), wrong)


def test_images_smaller_than_the_stride_train():
    tiny = images(sizes=((3, 5),))
    boxes = {"boxes": torch.tensor([[0.0, 0, 2, 2]]), "labels": torch.tensor([1])}
    assert all(loss.isfinite() for loss in make("fasterrcnn")(tiny, [boxes]).values())


@pytest.mark.parametrize("name", slow(["fasterrcnn", "retinanet"]))
def test_nothing_accumulates_over_200_steps_of_200_sizes(name):
    model = make(name, min_size=64, max_size=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    alive = []
    for i in range(200):
        x = images(sizes=((40 + i % 20, 40 + i // 20),))
        small = {"boxes": torch.tensor([[5.0, 5, 30, 30]]), "labels": torch.tensor([1])}
        sum(model(x, [small]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if i % 50 == 49:
            del x, small  # of another size each time
            gc.collect()
            alive.append(sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor)))
    assert len(set(alive)) == 1


def reduced(rank):
    """Gradients of two steps under DistributedDataParallel, which waits for every parameter."""
    model = nn.parallel.DistributedDataParallel(make("fasterrcnn", frozen_norms=True, trainable_levels=1))
    found = []
    for i in range(2):
        torch.manual_seed(rank)
        x = images(sizes=((64 + 8 * rank, 70), (60, 64 + i)))
        sum(model(x, targets(x)).values()).backward()
        found += [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
    return found


@pytest.mark.slow
def test_distributed_data_parallel_needs_nothing_else(tmp_path):
    first, second = run(__file__, tmp_path)
    assert identical(first, second) and all(g.isfinite().all() for g in first)


if __name__ == "__main__":
    worker(reduced)
