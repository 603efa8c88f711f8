"""Pictures of a prediction: probabilities, masks, overlays and coloured cells as PNG files."""

from common.files import write_whole
from common.scores import thin

import cv2
import numpy as np

ORANGE = (0, 140, 255)  # blue, green, red, as OpenCV has it
MOST_CELLS = 2**16 - 1  # that a PNG can number


def paint(image, colours, where):
    """Slice (H, W) of any depth -> uint8 (H, W, 3), half covered by the colours at `where`.

    colours: (3,) or (H, W, 3), blue, green, red, from 0 to 255. where: (H, W), bool.
    """
    picture = np.repeat(255 * stretch(image)[:, :, None], 3, axis=2)
    picture[where] = (0.5 * picture + 0.5 * np.float32(colours))[where]
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


def write_pictures(path, image, probability, threshold, with_cells=False):
    """Write PATH_prob.png, PATH_mask.png, PATH_overlay.png and on demand PATH_cells.png and PATH_colours.png.

    image: the raw slice (H, W). probability: P(interior), (H, W), float32 in [0, 1]. Returns what is odd about the
    slice, as a list of sentences. Raises OSError.
    """
    mask, odd = probability > threshold, []
    pictures = {"prob": np.rint(probability * 255).astype(np.uint8), "mask": np.uint8(255) * mask}
    pictures["overlay"] = paint(image, ORANGE, ~mask)
    if mask.all() or not mask.any():
        odd.append(f"{path}_mask.png is all {'interior' if mask.all() else 'membrane'}")
    if with_cells:
        cells = thin(mask) * mask.any()  # thin() makes one cell of nothing
        pictures["colours"] = paint(image, colour_cells(cells), mask)
        if cells.max() > MOST_CELLS:  # specks: no number is better than a wrong one
            odd.append(f"{path}_cells.png: only the first {MOST_CELLS} of the cells have a number")
        pictures["cells"] = np.where(cells > MOST_CELLS, 0, cells).astype(np.uint16)
    for kind, picture in pictures.items():
        with write_whole(f"{path}_{kind}.png", sync=False) as file:  # it can be predicted again
            file.write(cv2.imencode(".png", picture)[1])
    return odd
