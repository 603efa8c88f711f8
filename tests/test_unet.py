"""The network: python3 -m pytest tests/test_unet.py"""

from unet import UNet

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def test_paper_size():
    """b = 64 with transposed convolutions has the 31,042,369 parameters that the README states."""
    assert parameters(UNet(1, 1, bilinear=False, base_channels=64)) == 31_042_369
    # The sum over the layers of the bilinear net, whose deepest level is half as wide.
    assert parameters(UNet(1, 1, bilinear=True, base_channels=64)) == 17_266_241


@pytest.mark.parametrize("bilinear", [False, True])
def test_state_dict_names(bilinear):
    """Weights move to and from PyTorch's best known U-Net: names and shapes stay."""
    state = UNet(1, 1, bilinear=bilinear, base_channels=4).state_dict()
    deepest = 32 if bilinear else 64
    expected = {
        "inc.double_conv.0.weight": (4, 1, 3, 3),
        "inc.double_conv.4.num_batches_tracked": (),
        "down1.maxpool_conv.1.double_conv.3.weight": (8, 8, 3, 3),
        "down4.maxpool_conv.1.double_conv.0.weight": (deepest, 32, 3, 3),
        "up1.conv.double_conv.0.weight": (32, 64, 3, 3),
        "up4.conv.double_conv.1.running_mean": (4,),
        "outc.conv.weight": (1, 4, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert ("up1.up.weight" in state) is not bilinear


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (33, 16), (50, 75)])
def test_any_size_from_16(bilinear, size):
    """Any size from 16 pixels up gives logits of the same size, and gradients everywhere."""
    net = UNet(2, 3, bilinear=bilinear, base_channels=2)
    flow.nn.init.constant_(net.outc.conv.bias, -99)
    logits = net(flow.randn(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    assert logits.numpy().max() < 0  # no sigmoid inside
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_too_small_is_an_error():
    """A side under 16 pixels raises instead of aborting the process."""
    for size in ((15, 64), (64, 15)):
        with pytest.raises(ValueError, match="at least 16 pixels"):
            UNet(1, 1, base_channels=2)(flow.randn(1, 1, *size))


class Ones(nn.Module):
    """A level that gives ones."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return flow.ones(*self.shape)


def test_dropout():
    """It takes its share of the two deepest levels, by the seed, of each level for itself."""
    net = UNet(1, 1, bilinear=False, base_channels=4, dropout=0.25)
    net.down3, net.down4 = Ones(1, 32, 8, 8), Ones(1, 64, 4, 4)
    image, seen = flow.randn(1, 1, 64, 64), []
    net.up1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))

    def levels(seed):
        flow.manual_seed(seed)
        net(image)
        return [level.numpy() for level in seen[-1]]

    deepest, skip = levels(1)
    for level in deepest, skip:
        assert set(np.unique(level)) == {0, np.float32(4 / 3)}
        assert abs((level == 0).mean() - 0.25) < 0.05
    assert not np.array_equal(deepest.ravel(), skip.ravel()[: deepest.size])
    assert np.array_equal(levels(1)[0], deepest) and np.array_equal(levels(1)[1], skip)
    assert not np.array_equal(levels(2)[0], deepest)
    net.eval()
    assert all((level == 1).all() for level in levels(1))


def test_shift_equivariance():
    """Padding, pooling and upsampling line up: shifting by 16 pixels shifts the output."""
    net = UNet(1, 1, bilinear=False, base_channels=4).eval()
    image = flow.randn(1, 1, 256, 272)
    with flow.no_grad():
        whole, shifted = net(image).numpy(), net(image[:, :, :, 16:]).numpy()
    inner = slice(112, -112)  # out of the reach of the edges
    difference = whole[:, :, inner, 16:][..., inner] - shifted[:, :, inner, inner]
    assert abs(difference).max() < 1e-5
