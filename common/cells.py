"""From P(interior) to a mask, and the mask's cells: a number for each, its area and place."""

from common.images import find_border
from common.scores import SMALLEST, thin

import cv2
import numpy as np
from skimage.measure import label, regionprops_table
from skimage.segmentation import watershed

MOST = 2**16 - 1  # cells that 16 bits can number
PIECE = 300  # pixels of the weights: of ISBI 2012's slices 0 to 4, 200 to 500 are as good


def find_mask(probability, threshold, grow, piece=PIECE):
    """P(interior) (H, W), float32 -> mask (H, W), bool: P > threshold, grown into P > grow, but for the ridge of low P
    where cells (4-connected) meet. What has under `piece` pixels and reaches a larger cell over P > grow is a part of
    that, as most organelles are. Nets trained with border weights want all this: docs/recipe.md."""
    found, wide = probability > threshold, probability > grow
    if grow >= threshold:
        return found
    cells, reach = label(found, connectivity=1), label(wide, connectivity=1)
    large = found & (np.bincount(cells.ravel()) >= piece)[cells]
    found &= large | ~np.isin(reach, np.unique(reach[large]))
    where = wide & (cv2.erode(np.uint8(found), np.uint8([[0, 1, 0], [1, 1, 1], [0, 1, 0]])) == 0)  # insides are known
    grown = watershed(np.uint8(255 * (1 - probability)), cells * found, mask=where, watershed_line=True) > 0
    parts = label(grown | found, connectivity=1)
    return np.isin(parts, np.unique(parts[found]))  # lines cut off single pixels


def find_cells(image, mask, smallest=SMALLEST):
    """Each pixel's cell, from 1 to MOST, uint16 (H, W), as by common.scores.thin(); 0: lines between cells, padding,
    cells of under `smallest` pixels in the mask. image: raw slice (H, W). mask: (H, W), bool, True inside cells."""
    cells = thin(mask) * (mask.any() & ~find_border(image))  # thin() makes one cell of nothing, and fills padding
    kept = np.bincount(cells[mask & (cells > 0)], minlength=cells.max() + 1) >= max(smallest, 1)
    numbers = np.cumsum(kept) * kept
    return np.where(numbers > MOST, 0, numbers).astype(np.uint16)[cells]


def measure(name, image, cells, pixel_size=None):
    """A slice's columns of cells.csv, {title: a value for each cell}; pixel_size: of the slice in nm, where known."""
    edge = cv2.dilate(np.uint8(find_border(image)), np.ones((3, 3)), borderValue=1)
    cell, area, y, x, cut = regionprops_table(cells, edge, ("label", "area", "centroid", "intensity_max")).values()
    columns = {"slice": [name] * len(cell), "cell": cell, "area": area.astype(int)}
    columns |= {"area_nm2": (area * pixel_size**2).round(3)} if pixel_size else {}
    return columns | {"centroid_row": y.round(1), "centroid_column": x.round(1), "touches_edge": cut.astype(int)}
