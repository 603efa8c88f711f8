"""Predicting one slice: whole or in tiles, plain, mirrored or averaged over flips and rotations.

net, metadata = load_net("checkpoints/isbi2012.safetensors")  # from common.checkpoint
probability = predict(net, slice)
"""

import math

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common.arguments import InputError
from common.images import find_border, normalise

import numpy as np
import oneflow as flow

# An aligned block of 16 pixels (one pixel of the coarsest level) depends on input up to 94 pixels around it. The margin
# is the next multiple of 16, so that the blocks of all tiles are aligned.
MARGIN = 96
# Pixels of the largest tile by default: memory stays bounded, and what a slice of any size costs more than its pixels
# is at most a third.
LARGEST = 2**21


def predict(nets, image, device="cpu", *, tile=None, tta=False, mirror=0):
    """Raw slice (H, W) of any depth, 16 pixels a side or more -> P(interior) (H, W), float32 in [0, 1].

    nets: a net in eval mode on the device, or several, whose probabilities are averaged. tile: sides over so many
    pixels are cut, 0: none, None: what costs least in bounded memory. No seams: a tile's margin holds all that its
    middle depends on (a bilinear net's depends a little on the tile's size, too). tta: average over the 8 symmetries of
    the square. mirror: continue the slice by so many mirrored pixels on each side, a multiple of 16, as in the paper.
    Padding at the slice's edges, see find_border, gets 0. Raises InputError where the weights lead to no number.
    """
    nets = nets if isinstance(nets, list | tuple) else [nets]
    border, whole = find_border(image), np.zeros(image.shape, np.float32)
    window = inside(border)
    seen = np.pad(normalise(image, border)[window], mirror, mode="reflect")
    total = np.zeros(seen.shape, np.float32)
    views = [(turns, flip) for turns in range(4) for flip in (False, True)] if tta else [(0, False)]
    for net in nets:
        for turns, flip in views:
            view = np.rot90(seen, turns)
            result = predict_tiles(net, np.fliplr(view) if flip else view, device, tile)
            total += np.rot90(np.fliplr(result) if flip else result, -turns)
    middle = np.s_[mirror : seen.shape[0] - mirror, mirror : seen.shape[1] - mirror]
    whole[window] = total[middle] / (len(nets) * len(views))
    whole[border] = 0
    return whole


def inside(border):
    """The window, two Python slices, that holds all that isn't padding, and 16 pixels a side at least.

    So a frame changes nothing of what is in it.
    """
    window = []
    for axis, side in enumerate(border.shape):
        tissue = np.flatnonzero(~border.all(1 - axis))
        begin, end = (tissue[0], tissue[-1] + 1) if tissue.size else (0, 0)
        begin = max(0, min(begin, side - 16))
        window.append(slice(begin, max(end, min(begin + 16, side))))
    return tuple(window)


def predict_tiles(net, image, device, tile=None):
    """Normalised slice (H, W), float32 -> P(interior) (H, W), tile by tile."""
    probability = np.empty(image.shape, np.float32)
    rows, columns = layout(*image.shape, tile)
    for top, end, row, row_end in rows:
        for left, right, column, column_end in columns:
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


def layout(height, width, tile=None):
    """How to cut a slice: (rows, columns) as cut() gives them, of which each pair is a tile."""
    if tile is not None:
        return tuple(
            cut(side, math.ceil(side / (tile - 2 * MARGIN)) if 0 < tile < side else 1) for side in (height, width)
        )

    def cost(tiles):  # pixels computed in all, those of the largest tile
        rows, columns = ([window[3] - window[2] for window in part] for part in tiles)
        return sum(rows) * sum(columns), max(rows) * max(columns)

    rows, columns = ([cut(side, parts) for parts in range(1, side // MARGIN + 2)] for side in (height, width))
    fitting = []
    for row in rows:
        # the fewest columns that fit: more of them only cost more
        fits = (column for column in columns if cost((row, column))[1] <= LARGEST)
        fitting += [(row, column) for column in [next(fits, None)] if column]
    return min(fitting, key=cost)


def cut(side, parts):
    """A side in equal parts of multiples of 16 -> [(begin, end, begin of its tile, end of its tile)]."""
    step = math.ceil(side / parts / 16) * 16
    starts = range(0, side, step)
    return [(s, min(s + step, side), max(s - MARGIN, 0), min(s + step + MARGIN, side)) for s in starts]
