"""Predicting one slice: whole or in tiles, plain, mirrored or averaged over flips and rotations.

net, metadata = load_net("checkpoints/isbi2012.safetensors")  # from common.checkpoint
probability = predict(net, slice)
"""

import math

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common.arguments import InputError
from common.images import find_border, normalise
from unet import MIN_SIDE

import cv2
import numpy as np
import oneflow as flow

# An aligned block of 16 pixels (one pixel of the coarsest level) depends on input up to 94 pixels around it. The margin
# is the next multiple of 16, so that the blocks of all tiles are aligned.
MARGIN = 96
TILE = 1440  # pixels a side, by default: what margins add to a slice is a third at most, and memory stays bounded


def predict(nets, image, device="cpu", *, tile=TILE, tta=False, mirror=0, scale=1):
    """Raw slice (H, W) of any depth, 16 pixels a side or more -> P(interior) (H, W), float32 in [0, 1].

    nets: a net in eval mode on the device, or several, whose probabilities are averaged. tile: sides over so many
    pixels are cut, 0: none. No seams: a tile's margin holds all that its middle depends on (a bilinear net's depends a
    little on the tile's size, too). tta: average over the 8 symmetries of the square. mirror: continue the slice by so
    many mirrored pixels on each side, a multiple of 16, as in the paper. scale: the slice is resampled by it, its P
    back. Padding at the slice's edges, see find_border, gets 0. Raises InputError where the weights lead to no number.
    """
    nets = nets if isinstance(nets, list | tuple) else [nets]
    border, whole = find_border(image), np.zeros(image.shape, np.float32)
    if border.all():
        return whole
    left, top, width, height = cv2.boundingRect((~border).astype(np.uint8))
    window = np.s_[top : top + height, left : left + width]  # so that a frame changes nothing of what is in it
    sides = [max(MIN_SIDE, round(scale * side)) for side in (height, width)]
    tissue, padding = resample(image[window], sides), resample(border[window], sides)
    seen = np.pad(normalise(tissue, padding > 0), mirror, mode="reflect")
    total = np.zeros(seen.shape, np.float32)
    views = [(turns, flip) for turns in range(4) for flip in (1, -1)] if tta else [(0, 1)]
    for net in nets:
        for turns, flip in views:
            result = predict_tiles(net, np.rot90(seen, turns)[:, ::flip], device, tile)
            total += np.rot90(result[:, ::flip], -turns)
    middle = np.s_[mirror : seen.shape[0] - mirror, mirror : seen.shape[1] - mirror]
    whole[window] = resample(total[middle] / (len(nets) * len(views)), (height, width))
    whole[border] = 0
    return whole


def resample(array, sides):
    """Array (H, W) -> one of these sides, float64; the array itself where it has them."""
    if array.shape == tuple(sides):
        return array
    way = cv2.INTER_AREA if sides[0] < len(array) else cv2.INTER_LINEAR
    return cv2.resize(array.astype(np.float64), sides[::-1], interpolation=way)


def predict_tiles(net, image, device, tile=TILE):
    """Normalised slice (H, W), float32 -> P(interior) (H, W), tile by tile."""
    probability = np.empty(image.shape, np.float32)
    for top, end, row, row_end in cut(image.shape[0], tile):
        for left, right, column, column_end in cut(image.shape[1], tile):
            result = predict_whole(net, image[row:row_end, column:column_end], device)
            probability[top:end, left:right] = result[top - row : end - row, left - column : right - column]
    return probability


def predict_whole(net, image, device):
    """Normalised slice or tile (H, W), float32 -> P(interior) (H, W), float32 in [0, 1]."""
    batch = flow.tensor(np.ascontiguousarray(image[None, None])).to(device)
    with flow.no_grad():
        probability = flow.sigmoid(net(batch)).numpy()[0, 0]
    if np.isnan(probability).any():
        raise InputError("the net's weights lead to no number: they are finite but far too large")
    return probability


def cut(side, tile):
    """A side in equal parts of multiples of 16 -> [(begin, end, begin of its tile, end of its tile)]."""
    parts = math.ceil(side / (tile - 2 * MARGIN)) if 0 < tile < side else 1
    step = math.ceil(side / parts / 16) * 16
    starts = range(0, side, step)
    return [(s, min(s + step, side), max(s - MARGIN, 0), min(s + step + MARGIN, side)) for s in starts]
