"""Pictures of a prediction: probabilities, masks, overlays and coloured cells as PNG files."""

import math

from common.files import write_whole

import cv2
import numpy as np
from skimage.segmentation import find_boundaries

ORANGE = (0, 140, 255)  # blue, green, red, as OpenCV has it


def paint(image, colours, where, share=0.5):
    """Slice (H, W) of any depth -> uint8 (H, W, 3), covered by the colours at `where`, half or to another share.

    colours: (3,) or (H, W, 3), blue, green, red, from 0 to 255. where: (H, W), bool.
    """
    picture = np.repeat(255 * stretch(image)[:, :, None], 3, axis=2)
    picture[where] = ((1 - share) * picture + share * np.float32(colours))[where]
    return picture.astype(np.uint8)


def stretch(image):
    """Image (H, W) -> float32 from 0 to 1, its half percent of darkest and of lightest pixels cut off."""
    low, high = np.percentile(image, (0.5, 99.5))
    return np.clip((image.astype(np.float32) - low) / max(high - low, 1e-30), 0, 1)


def colour_cells(cells):
    """Cells (H, W), integers -> uint8 (H, W, 3): successive numbers get hues far apart."""
    numbers = np.arange(cells.max() + 1)
    hues = numbers * 0.618034 % 1 * 180  # steps of the golden ratio; OpenCV's hues end at 180
    palette = np.stack((hues, 150 + 35 * (numbers % 4), 255 - 40 * (numbers % 3)), axis=-1).astype(np.uint8)
    return cv2.cvtColor(palette[None], cv2.COLOR_HSV2BGR)[0][cells]


def draw_scale_bar(picture, pixel_size):
    """Draw a bar of a round length, a quarter of the width at most, into a uint8 (H, W, 3); pixel_size: in nm."""
    most, thick = picture.shape[1] * pixel_size / 4, max(1, min(picture.shape[:2]) // 400)
    power = 10.0 ** math.floor(math.log10(most))
    length = power * max(digit for digit in (1, 2, 5) if digit * power <= most)
    x, y = 10 * thick, picture.shape[0] - 10 * thick
    for colour, width in (((0, 0, 0), 4 * thick), ((255, 255, 255), 2 * thick)):
        cv2.line(picture, (x, y), (x + round(length / pixel_size), y), colour, width)
        cv2.putText(picture, f"{length:g} nm", (x, y - 5 * thick), cv2.FONT_HERSHEY_SIMPLEX, thick / 2, colour, width)


def write_pictures(path, image, probability, mask, cells=None, outline=False, pixel_size=None):
    """Write PATH_prob.png, PATH_mask.png, PATH_overlay.png and, of cells, PATH_cells.png and PATH_colours.png.

    image: the raw slice (H, W). probability: P(interior), (H, W), float32 in [0, 1]. mask: (H, W), bool. cells: (H, W),
    uint16. outline: draw where the mask ends, not all membrane. pixel_size: in nm, for a scale bar. Raises OSError.
    """
    pictures = {"prob": np.rint(probability * 255).astype(np.uint8), "mask": np.uint8(255) * mask}
    where, share = (find_boundaries(mask), 1) if outline else (~mask, 0.5)
    pictures["overlay"] = paint(image, ORANGE, where, share)
    if pixel_size:
        draw_scale_bar(pictures["overlay"], pixel_size)
    if cells is not None:
        pictures |= {"cells": cells, "colours": paint(image, colour_cells(cells), mask & (cells > 0))}
    for kind, picture in pictures.items():
        with write_whole(f"{path}_{kind}.png", sync=False) as file:  # it can be predicted again
            file.write(cv2.imencode(".png", picture)[1])
