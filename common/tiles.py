"""Predicting one slice: whole or in tiles, plain, mirrored or averaged over flips and rotations."""

from itertools import product

from common.arguments import InputError
from common.images import find_border, normalise
from unet import MIN_SIDE  # and brings OneFlow without its noise

import cv2
import numpy as np
import oneflow as flow

# A pixel of the coarsest level (16 x 16 here) depends on 94 pixels around it; multiples of 16 align those of all tiles.
MARGIN = 96
TILE = 1440  # pixels a side, by default: what margins add to a slice is a third at most, and memory stays bounded


def predict(nets, image, device="cpu", *, tile=TILE, tta=False, mirror=0, scale=1):
    """Raw slice (H, W) of any depth, 16 pixels a side or more -> P(interior) (H, W), float32 in [0, 1], 0 on padding.
    nets: one in eval mode on the device, or several, whose probabilities are averaged. tile: longer sides are cut, 0:
    none; no seams but for bilinear nets. tta: average over the 8 symmetries of the square. mirror: continue sides by so
    many mirrored pixels, a multiple of 16. scale: resample the slice by it. InputError if weights lead to no number."""
    nets = nets if isinstance(nets, list | tuple) else [nets]
    border, whole = find_border(image), np.zeros(image.shape, np.float32)
    if border.all():
        return whole
    left, top, width, height = cv2.boundingRect((~border).astype(np.uint8))
    window = np.s_[top : top + height, left : left + width]  # so that a frame changes nothing of what is in it
    rows, columns = (max(MIN_SIDE, round(scale * side)) for side in (height, width))
    tissue, padding = (resample(array[window], rows, columns) for array in (image, border))
    seen = np.pad(normalise(tissue, padding > 0), mirror, mode="reflect")
    views = list(product(nets, range(4), (1, -1)) if tta else product(nets, (0,), (1,)))  # quarter turns, flip
    total = 0
    for net, turns, flip in views:
        result = predict_tiles(net, np.rot90(seen, turns)[:, ::flip], device, tile)
        total += np.rot90(result[:, ::flip], -turns)
    whole[window] = resample(total[mirror : mirror + rows, mirror : mirror + columns] / len(views), height, width)
    whole[border] = 0
    return whole


def resample(array, height, width):
    """Array (H, W) -> (height, width), float64; itself where it has these sides."""
    if array.shape == (height, width):
        return array
    way = cv2.INTER_AREA if height < len(array) else cv2.INTER_LINEAR
    return cv2.resize(array.astype(np.float64), (width, height), interpolation=way)


def predict_tiles(net, image, device, tile=TILE):
    """Normalised slice (H, W), float32 -> P(interior) (H, W), tile by tile."""
    probability = np.empty(image.shape, np.float32)
    for (top, end, y, y_end), (left, right, x, x_end) in product(*(cut(side, tile) for side in image.shape)):
        result = predict_whole(net, image[y:y_end, x:x_end], device)
        probability[top:end, left:right] = result[top - y : end - y, left - x : right - x]
    return probability


def predict_whole(net, image, device):
    """Normalised slice or tile (H, W), float32 -> P(interior) (H, W), float32 in [0, 1]."""
    batch = flow.tensor(np.ascontiguousarray(image[None, None]), device=device)
    with flow.no_grad():
        probability = flow.sigmoid(net(batch)).numpy()[0, 0]
    if np.isnan(probability).any():
        raise InputError("the net's weights lead to no number: they are finite but far too large")
    return probability


def cut(side, tile):
    """A side in equal parts of multiples of 16 -> [(begin, end, begin of its tile, end of its tile)]."""
    parts = np.ceil(side / (tile // 16 * 16 - 2 * MARGIN)) if 0 < tile < side else 1
    step = 16 * int(np.ceil(side / parts / 16))
    return [(s, min(s + step, side), max(s - MARGIN, 0), min(s + step + MARGIN, side)) for s in range(0, side, step)]
