"""MMEngine: the backbone in its registry, trained by its Runner, with the options that MMDetection's backbones have."""

import logging

import pytest
import torch
from torch import nn

import revbifpn
from revbifpn import fast, save_checkpoint
from tests.adapters import frameworks
from tests.networks import F32, F64, NARROW, difference, gradients, identical, image, narrow

mmengine = frameworks.on_torchvision("mmengine")  # whose Runner looks for torchvision
pytest.importorskip("revbifpn.adapters.mmengine")
from mmengine.analysis import get_model_complexity_info  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import MODELS, Registry  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

CONFIG = {"type": "RevBiFPN", "arch": "revbifpn_s0"} | {k: v for k, v in NARROW.items() if k != "classes"}
BODY = {"classes": None}


def build(dtype=F32, *, seed=0, **options):
    torch.manual_seed(seed)
    return MODELS.build(CONFIG | options).to(dtype).train()


def test_mmdetections_registry_finds_it_and_its_maps_are_those_of_the_ordinary_class():
    registry = Registry("model", parent=MODELS, scope="mmdet")  # as mmdet.registry.MODELS is made
    torch.manual_seed(0)
    model = registry.build(CONFIG | {"out_indices": (1, 3)}).eval()
    with torch.no_grad():
        found, maps = model(image(F32)), narrow(fast, F32, **BODY).eval()(image(F32))
    assert isinstance(found, tuple) and identical(found, [maps[1], maps[3]])


@pytest.mark.parametrize("with_cp", [True, False], ids=["recomputed", "stored"])
def test_gradients_with_running_statistics_are_those_of_plain_pytorch(with_cp):
    def run(model):
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return gradients(model, image())

    model = build(F64, with_cp=with_cp)
    assert model.disable_rev == (not with_cp)
    assert difference(run(model), run(narrow(revbifpn, reversible=False, **BODY))) < 1e-9


@pytest.mark.parametrize("norm_eval", [True, False])
def test_norm_eval_keeps_statistics_in_train_mode_and_trains_the_affine_parameters(norm_eval):
    model = build(norm_eval=norm_eval)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    sum(y.square().mean() for y in model.train()(image(F32))).backward()
    kept = [torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True)]
    assert all(kept) if norm_eval else not any(kept)
    assert all(norm.weight.grad is not None for norm in norms)


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (2, 3)])
def test_frozen_stages_do_not_train_and_everything_else_gets_a_gradient(out_indices):
    model = build(frozen_stages=1, norm_eval=False, out_indices=out_indices)
    assert not any(p.requires_grad for block in model.layers[0] for p in block.parameters())
    assert (
        not any(module.training for block in model.layers[0] for module in block.modules())
        and model.layers[1][0].training
    )
    sum(y.square().mean() for y in model(image(F32))).backward()
    assert [n for n, p in model.named_parameters() if (p.grad is None) == p.requires_grad] == []


def test_norm_cfg_takes_frozen_and_synchronised_norms():
    model = build(norm_cfg={"type": "SyncBN", "requires_grad": False, "momentum": 0.01})
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms and all((norm.momentum, norm.eps) == (0.01, 1e-3) for norm in norms)
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())


def test_init_cfg_loads_a_published_file(tmp_path):
    published = fast.RevBiFPN(**NARROW)
    save_checkpoint(published, tmp_path / "revbifpn.pth.tar")
    model = build(seed=1, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "revbifpn.pth.tar")})
    model.init_weights()
    wanted = {name: value for name, value in published.state_dict().items() if not name.startswith("head.")}
    assert model.state_dict().keys() == wanted.keys()
    assert identical(model.state_dict().values(), wanted.values())


@pytest.mark.parametrize(
    "options, match",
    [
        ({"arch": "revbifpn_s9"}, "arch: expected one of"),
        ({"out_indices": (0, 4)}, r"out_indices: expected levels from 0 to 3, got \(0, 4\)"),
        ({"frozen_stages": 4}, "frozen_stages: expected -1 to 3, got 4"),
        ({"norm_cfg": {"type": "GN"}}, r"norm_cfg: expected a type among \['BN', 'SyncBN'\], got 'GN'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        build(**options)


class Toy(BaseModel):
    """Whether the mean of an image is positive."""

    def __init__(self):
        super().__init__()
        self.backbone = MODELS.build(CONFIG | {"norm_eval": False, "out_indices": (3,)})
        self.head = nn.Linear(16, 2)

    def forward(self, inputs, labels, mode="tensor"):
        (y,) = self.backbone(torch.stack(inputs))
        return {"loss": nn.functional.cross_entropy(self.head(y.mean((2, 3))), torch.tensor(labels))}


class Toys(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        label = i % 2
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i))
        return noise + 2 * label - 1, label


def collate(samples):
    return {"inputs": [x for x, _ in samples], "labels": [label for _, label in samples]}


def test_a_runner_trains_to_a_smaller_loss_and_saves_what_it_trained(tmp_path):
    torch.manual_seed(0)
    model = Toy()
    losses = []

    class Losses(mmengine.hooks.Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            losses.append(outputs["loss"].item())

    loader = torch.utils.data.DataLoader(Toys(), batch_size=8, collate_fn=collate)
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=loader,
        train_cfg={"by_epoch": True, "max_epochs": 4},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 2e-3}},
        custom_hooks=[Losses()],
        experiment_name="toy",
        log_level=logging.ERROR,
    )
    runner.train()
    assert len(losses) == 8 and sum(losses[-2:]) < sum(losses[:2]) / 2
    saved = torch.load(tmp_path / "epoch_4.pth", weights_only=False)["state_dict"]
    assert identical(saved.values(), model.state_dict().values())


@pytest.mark.slow
def test_complexity_analysis_counts_the_convolutions():
    wanted = narrow(revbifpn, F32, reversible=False, **BODY).eval()
    found = get_model_complexity_info(build().eval(), input_shape=(3, 32, 32), show_table=False, show_arch=False)
    truth = get_model_complexity_info(wanted, input_shape=(3, 32, 32), show_table=False, show_arch=False)
    assert found["flops"] == truth["flops"] > 1e5 and found["params"] == truth["params"]
