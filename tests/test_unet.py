"""The UNet: size, shapes, gradients, receptive field, compilation."""

import pytest
import torch

from fastseg.network.unet import UNet


def test_parameters_of_the_full_network():
    assert sum(p.numel() for p in UNet().parameters()) == 31_037_633


@pytest.mark.parametrize(("depth", "height", "width"), [(1, 6, 10), (2, 36, 20), (4, 16, 48), (5, 64, 96)])
def test_logits_have_the_image_size_at_any_depth(depth, height, width):
    assert UNet(2, depth)(torch.zeros(2, 3, height, width)).shape == (2, 1, height, width)


def test_every_parameter_gets_a_gradient():
    model = UNet(4, 3)
    model(torch.randn(2, 3, 16, 24)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_an_output_pixel_depends_on_its_own_place_and_on_distant_ones():
    torch.manual_seed(0)
    model = UNet(8, 3).eval()
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    model(image)[0, 0, 32, 32].backward()
    seen = image.grad[0].abs().sum(0) > 0
    assert seen[32, 32]
    assert seen[12].any()  # 20 pixels away, through the bottleneck


def test_compiled_equals_eager():
    torch.manual_seed(0)
    model = UNet(4, 2).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(image), model(image))
