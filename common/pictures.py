"""Pictures of a prediction: probabilities, masks, overlays and coloured cells as PNG files."""

from common.files import write_whole
from common.scores import thin

import cv2
import numpy as np

ORANGE = (0, 140, 255)  # blue, green, red, as OpenCV has it
MOST_CELLS = np.iinfo(np.uint16).max  # that a PNG can number


def paint(image, colours, where):
    """Slice (H, W) of any depth -> uint8 (H, W, 3), half covered by the colours at `where`.

    colours: (3,) or (H, W, 3), blue, green, red, from 0 to 255. where: (H, W), bool.
    """
    low, high = np.percentile(image, (0.5, 99.5))
    grey = np.clip((image.astype(np.float32) - low) / max(high - low, 1e-30), 0, 1) * 255
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    colours = np.broadcast_to(np.float32(colours), picture.shape)
    picture[where] = 0.5 * picture[where] + 0.5 * colours[where]
    return picture.astype(np.uint8)


def number_cells(mask):
    """Mask (H, W), bool, True in cells -> integers (H, W): each cell's number, 0 on lines of a pixel between them."""
    return thin(mask) * mask.any()  # thin() makes one cell of nothing


def colour_cells(cells):
    """Cells (H, W), integers -> uint8 (H, W, 3): successive numbers get hues far apart."""
    numbers = np.arange(cells.max() + 1)
    hues = numbers * 0.618034 % 1 * 180  # steps of the golden ratio; OpenCV's hues end at 180
    saturation, value = 150 + 35 * (numbers % 4), 255 - 40 * (numbers % 3)
    palette = np.stack((hues, saturation, value), axis=-1).astype(np.uint8)
    return cv2.cvtColor(palette[None], cv2.COLOR_HSV2BGR)[0][cells]


def write_png(path, image):
    """Write an image, uint8 or uint16, (H, W) or (H, W, 3), whole or not at all. Raises OSError."""
    with write_whole(path, sync=False) as file:  # it can be predicted again
        file.write(cv2.imencode(".png", image)[1])


def write_pictures(path, image, probability, threshold, with_cells=False):
    """Write PATH_prob.png, PATH_mask.png, PATH_overlay.png and on demand PATH_cells.png and PATH_colours.png.

    image: the raw slice (H, W). probability: P(interior), (H, W), float32 in [0, 1]. Returns what is odd about the
    slice, as a list of sentences. Raises OSError.
    """
    mask, odd = probability > threshold, []
    write_png(f"{path}_prob.png", np.rint(probability * 255).astype(np.uint8))
    write_png(f"{path}_mask.png", mask.astype(np.uint8) * 255)
    write_png(f"{path}_overlay.png", paint(image, ORANGE, ~mask))
    if mask.all() or not mask.any():
        odd.append(f"{path}_mask.png is all {'interior' if mask.all() else 'membrane'}")
    if with_cells:
        cells = number_cells(mask)
        write_png(f"{path}_colours.png", paint(image, colour_cells(cells), mask))
        if cells.max() > MOST_CELLS:  # specks: no number is better than a wrong one
            cells[cells > MOST_CELLS] = 0
            odd.append(f"{path}_cells.png: only the first {MOST_CELLS} of the cells have a number")
        write_png(f"{path}_cells.png", cells.astype(np.uint16))
    return odd
