"""segmentation_models_pytorch: models of timm are its encoders, ``tu-revbifpn_s0``."""

import pytest
import torch

from tests.adapters import frameworks
from tests.marks import slow

smp = frameworks.on_torchvision("segmentation_models_pytorch")
pytest.importorskip("revbifpn.adapters.timm")

OPTIONS = {"encoder_weights": None, "classes": 2}
WIDER = {"channels": (64, 64, 80, 160), "num_ext_layers": 0, "inv_blk_rep": 1}
DECODERS = ["UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "UPerNet", "Segformer", "DPT"]


@pytest.mark.parametrize("channels", [1, *slow([3])])
@pytest.mark.parametrize("decoder", ["Unet", *slow(DECODERS)])
def test_a_decoder_trains(decoder, channels):
    model = getattr(smp, decoder)("tu-revbifpn_s0", in_channels=channels, **OPTIONS)
    masks = model(torch.randn(2, channels, 64, 64))
    assert masks.shape == (2, 2, 64, 64)
    masks.square().mean().backward()
    assert any(p.grad is not None for p in model.encoder.parameters())
    if decoder not in ("PSPNet", "DPT"):  # which take deeper encoders than they read
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "options", [*slow([("s1", {})]), ("s0", {"channels": (64, 64, 80, 160)})], ids=["s1", "wider s0"]
)
def test_four_channels_train_where_there_is_room(options):
    scale, channels = options
    model = smp.FPN(f"tu-revbifpn_{scale}", in_channels=4, **OPTIONS, **channels)
    model(torch.randn(2, 4, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="in_chans: expected 1 to 3.*got 4.*>= 64, as revbifpn_s1 has"):
        smp.FPN("tu-revbifpn_s0", in_channels=4, **OPTIONS)


@pytest.mark.parametrize("decoder", ["DeepLabV3Plus", *slow(["DeepLabV3", "PAN"])])
def test_decoders_that_dilate_their_encoder_are_refused_with_those_that_do_not(decoder):
    with pytest.raises(ValueError, match="output_stride: expected 32, got .*use a decoder that takes a pyramid"):
        getattr(smp, decoder)("tu-revbifpn_s0", **OPTIONS)
