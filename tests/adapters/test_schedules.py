"""The schedule of a converted model in other frameworks' training loops."""

import importlib.util

import pytest
import torch
from torch import nn

from revbifpn.dual_residual import convert, runs_of
from tests.adapters.frameworks import on_torchvision
from tests.dual_residual.networks import Encoder, tokens
from tests.marks import covering

SAMPLES, STEPS = 8, 8


def betas_of(exact):
    """Of the steps of a training of ``STEPS``, with the schedule's defaults."""
    return [2.0**-k for k in (7, 6, 5, 4, 3, 3, 3, 3)] if exact else None


class Seen(nn.Module):
    """A model that notes the coefficients that it is called with."""

    def __init__(self, exact):
        super().__init__()
        self.model = Encoder()
        convert(self.model, exact=exact)
        self.betas = []

    def forward(self, x):
        self.betas.append(runs_of(self)[0].beta)
        return self.model(x).square().mean()


def lightning_module(exact):
    lightning = on_torchvision("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.seen = Seen(exact)

        def training_step(self, batch, index):
            return self.seen(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

        def train_dataloader(self):
            data = torch.utils.data.TensorDataset(tokens(shape=(SAMPLES, 5, 8)))
            return torch.utils.data.DataLoader(data, batch_size=2)

    return Module()


def fit(module, folder, steps, callback=None, accumulate=1, checkpoint=None):
    lightning = on_torchvision("lightning")
    from revbifpn.adapters.lightning import DualResidualSchedule

    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[callback or DualResidualSchedule(STEPS // 2)],
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("exact", [True, False])
def test_lightning_moves_the_coefficients_with_its_steps_and_resumes(exact, tmp_path):
    module = lightning_module(exact)
    fit(module, tmp_path, STEPS)
    seen = module.seen.betas
    assert seen == (betas_of(exact) or sorted(set(seen[:5])) + seen[5:]) and len(seen) == STEPS
    assert len(set(seen[4:])) == 1
    half = lightning_module(exact)
    fit(half, tmp_path, 3).save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    rest = lightning_module(exact)
    fit(rest, tmp_path, STEPS, checkpoint=tmp_path / "half.ckpt")
    assert half.seen.betas + rest.seen.betas == seen


def test_lightning_counts_accumulated_batches_as_one_step_and_takes_half_of_the_training(tmp_path):
    on_torchvision("lightning")
    from revbifpn.adapters.lightning import DualResidualSchedule

    module, callback = lightning_module(True), DualResidualSchedule()
    fit(module, tmp_path, STEPS, callback, accumulate=2)
    assert callback.schedule.steps == STEPS // 2
    assert module.seen.betas == [beta for beta in betas_of(True) for _ in range(2)]


def trainer(model, folder, steps, callback=None, accumulate=1):
    transformers = on_torchvision("transformers")
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("transformers' Trainer needs accelerate")
    from revbifpn.adapters.transformers import DualResidualSchedule

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return model(inputs["x"])

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = [{"x": x} for x in tokens(shape=(SAMPLES, 5, 8))]
    return Trainer(model, arguments, train_dataset=data, callbacks=[callback or DualResidualSchedule(STEPS // 2)])


@pytest.mark.parametrize("exact", [True, False])
def test_transformers_moves_the_coefficients_with_its_steps_and_resumes(exact, tmp_path):
    model, rest = Seen(exact), Seen(exact)
    trainer(model, tmp_path, STEPS).train()
    seen = model.betas
    assert seen == (betas_of(exact) or sorted(set(seen[:5])) + seen[5:]) and len(seen) == STEPS
    trainer(rest, tmp_path, STEPS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rest.betas == seen[3:]


def test_transformers_counts_accumulated_batches_as_one_step_and_takes_half_of_the_training(tmp_path):
    on_torchvision("transformers")
    from revbifpn.adapters.transformers import DualResidualSchedule

    model, callback = Seen(True), DualResidualSchedule()
    trainer(model, tmp_path, STEPS, callback, accumulate=2).train()
    assert callback.schedule.steps == STEPS // 2
    assert model.betas == [beta for beta in betas_of(True) for _ in range(2)]


# xdist sends warnings by class: the receiving process would import Lightning for its own.
pytestmark = [covering, pytest.mark.filterwarnings("ignore")]
