"""Tiles, symmetries, frames and pixel sizes of a prediction: python3 -m pytest tests/test_tiles.py"""

from common import tiles
from common.images import normalise
from unet import UNet

import numpy as np
import oneflow as flow
import pytest


def test_tiles_dont_show():
    """Tiles give the whole slice's result to rounding, whatever their size."""
    net = UNet(1, 1, bilinear=False, base_channels=2).eval()
    for name, parameter in net.named_parameters():
        # Every convolution averages, so that the most distant pixel in reach has a say.
        if parameter.ndim == 4:
            inputs = parameter.shape[0] if ".up." in name else parameter[0].numel()
            flow.nn.init.constant_(parameter, 1 / inputs)
        elif name.endswith("bias"):
            flow.nn.init.constant_(parameter, 0)
    image = np.random.default_rng(0).uniform(0, 4, (420, 340)).astype(np.float32)
    whole = tiles.predict_tiles(net, image, "cpu", 0)
    assert whole.max() < 0.99  # the sigmoid isn't flat there
    for tile in (256, 304):
        tiled = tiles.predict_tiles(net, image, "cpu", tile)
        np.testing.assert_allclose(tiled, whole, rtol=0, atol=5e-7)


def test_symmetries():
    """--tta predicts the same however the slice is turned, and isn't the plain prediction."""
    flow.manual_seed(0)
    net = UNet(1, 1, bilinear=True, base_channels=4).eval()
    image = np.random.default_rng(0).normal(size=(100, 90)).astype(np.float32)
    mean = tiles.predict(net, image, tta=True)
    turned = np.ascontiguousarray(np.rot90(np.flipud(image)))
    np.testing.assert_allclose(tiles.predict(net, turned, tta=True), np.rot90(np.flipud(mean)), atol=1e-6)
    plain = tiles.predict(net, image)
    assert abs(mean - plain).max() > 1e-4
    # Several nets: the mean of what each says.
    other = UNet(1, 1, bilinear=True, base_channels=2).eval()
    both = tiles.predict([net, other], image)
    np.testing.assert_allclose(both, (plain + tiles.predict(other, image)) / 2, atol=1e-6)


def test_the_margin_costs_a_third_at_most():
    """Whatever the size: tiles cover a side once, compute little more than its pixels, and are bounded."""
    for side in (16, 1024, 1440, 1441, 1449, 2497, 20000, *np.random.default_rng(0).integers(16, 9000, 40).tolist()):
        windows = tiles.cut(side, tiles.TILE)
        assert [end for _, end, *_ in windows] == [*[begin for begin, *_ in windows][1:], side]
        for begin, end, first, last in windows:
            assert first % 16 == 0 and first in (0, begin - 96) and last in (side, end + 96)
        lengths = [last - first for *_, first, last in windows]
        assert max(lengths) <= tiles.TILE and (sum(lengths) / side) ** 2 <= 4 / 3


@pytest.mark.parametrize("value", [0, 255, 77])
def test_a_frame_changes_nothing_within(value):
    """Black, white or grey padding: the tissue's prediction is what it is without, and no interior is seen there."""
    flow.manual_seed(0)
    net = UNet(1, 1, bilinear=False, base_channels=2).eval()
    tissue = np.random.default_rng(0).integers(1, 255, (90, 100)).astype(np.uint8)
    rim = np.ones(tissue.shape, bool)
    rim[1:-1, 1:-1] = False
    # So that no pixel of tissue at the frame has its value.
    tissue[rim] = np.random.default_rng(1).integers(130, 150, rim.sum())
    framed = np.full((200, 180), value, np.uint8)
    framed[57:147, 33:133] = tissue
    found = tiles.predict(net, framed, tile=0)
    np.testing.assert_allclose(found[57:147, 33:133], tiles.predict(net, tissue), atol=1e-6)
    found[57:147, 33:133] = 0
    assert not found.any()
    assert not tiles.predict(net, np.full((40, 20), 7)).any()


def test_pixel_size(monkeypatch):
    """The net sees a slice in its own pixels; what it says of them is of the slice's size, and in place."""
    seen = []
    monkeypatch.setattr(tiles, "predict_whole", lambda net, image, device: seen.append(image.shape) or image.copy())
    rows, columns = np.mgrid[:120, :90]
    image = 100 + 50 * np.sin(rows / 5) + 40 * np.cos(columns / 7)
    for scale, sides in ((0.5, (60, 45)), (1.15, (138, 103)), (3, (360, 270))):
        back = tiles.predict(None, image, scale=scale)
        assert seen.pop() == sides
        assert np.abs(back - normalise(image))[4:-4, 4:-4].max() < 0.08  # a pixel's shift would be 0.2
