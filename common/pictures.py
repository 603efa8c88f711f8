"""Pictures of a prediction: probabilities, masks, overlays and coloured cells as PNG files."""

from common.files import write_whole

import cv2
import numpy as np
from skimage.segmentation import find_boundaries

ORANGE = (0, 140, 255)  # blue, green, red, as OpenCV has it


def paint(image, colours, where, share=0.5):
    """Slice (H, W) -> uint8 (H, W, 3), covered by colours, (3,) or (H, W, 3), BGR to 255, at `where`, bool (H, W)."""
    picture = np.repeat(255 * stretch(image)[:, :, None], 3, axis=2)
    picture[where] = ((1 - share) * picture + share * np.float32(colours))[where]
    return picture.astype(np.uint8)


def stretch(image):
    """Image (H, W) -> float32 from 0 to 1, its half percent of darkest and of lightest pixels cut off."""
    low, high = np.percentile(image, (0.5, 99.5))
    return np.clip((image.astype(np.float32) - low) / max(high - low, 1e-30), 0, 1)


def write_pictures(path, image, probability, mask, cells=None, outline=False, pixel_size=None):
    """Write PATH_prob.png, _mask, _overlay and, of cells, _cells and _colours. (H, W): raw image, float32 probability,
    bool mask, uint16 cells. outline: draw where the mask ends only. pixel_size: nm, for a bar. Raises OSError."""
    overlay = paint(image, ORANGE, find_boundaries(mask), 1) if outline else paint(image, ORANGE, ~mask)
    if pixel_size:
        most, thick = image.shape[1] * pixel_size / 4, max(1, min(image.shape) // 400)
        length = max(digit * 10.0**n for n in range(-3, 11) for digit in (1, 2, 5) if digit * 10.0**n <= most)  # round
        x, y, font = 10 * thick, image.shape[0] - 10 * thick, cv2.FONT_HERSHEY_SIMPLEX
        for colour, width in (((0, 0, 0), 4 * thick), ((255, 255, 255), 2 * thick)):
            cv2.line(overlay, (x, y), (x + round(length / pixel_size), y), colour, width)
            cv2.putText(overlay, f"{length:g} nm", (x, y - 5 * thick), font, thick / 2, colour, width)
    pictures = {"prob": np.rint(probability * 255).astype(np.uint8), "mask": np.uint8(255) * mask, "overlay": overlay}
    if cells is not None:
        numbers = np.arange(cells.max() + 1)
        hues = numbers * 0.618034 % 1 * 180  # the golden ratio: of successive numbers far apart; OpenCV's end at 180
        palette = np.stack((hues, 150 + 35 * (numbers % 4), 255 - 40 * (numbers % 3)), axis=-1).astype(np.uint8)
        colours = cv2.cvtColor(palette[None], cv2.COLOR_HSV2BGR)[0][cells]
        pictures |= {"cells": cells, "colours": paint(image, colours, mask & (cells > 0))}
    for kind, picture in pictures.items():
        with write_whole(f"{path}_{kind}.png", sync=False) as file:  # it can be predicted again
            file.write(cv2.imencode(".png", picture)[1])
