"""From P(interior) to a mask, and the mask's cells: a number for each, its area and place."""

import codecs
import csv

from common.files import write_whole
from common.images import find_border
from common.scores import SMALLEST, thin

import cv2
import numpy as np
from skimage.measure import label as components
from skimage.measure import regionprops_table
from skimage.segmentation import watershed

MOST = 2**16 - 1  # cells that 16 bits can number


def find_mask(probability, threshold, grow):
    """P(interior) (H, W), float32 -> mask (H, W), bool: P > threshold, grown into P > grow where cells don't meet.

    Nets trained with border weights part cells best at one threshold, and draw membranes as thick as people do at a
    lower one (docs/recipe.md). Cells (4-connected) meet at the ridge of low P.
    """
    found = probability > threshold
    if grow >= threshold:
        return found
    inside = cv2.erode(found.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))) > 0
    where = (probability > grow) & ~inside  # the watershed is slow
    cells = components(found, connectivity=1)
    grown = watershed(np.uint8(255 * (1 - probability)), cells, mask=where, watershed_line=True) > 0
    parts = components(grown | found, connectivity=1)
    return np.isin(parts, np.unique(parts[found]))  # lines cut off single pixels


def find_cells(image, mask, smallest=SMALLEST):
    """Each pixel's cell, from 1 on, uint16 (H, W): those of common.scores.thin(), up to MOST of them.

    image: the raw slice (H, W). mask: (H, W), bool, True inside cells. 0 is on the lines between cells, in padding at
    the slice's edges, and in cells that have fewer pixels in the mask than `smallest`.
    """
    cells = thin(mask) * (mask.any() & ~find_border(image))  # thin() makes one cell of nothing, and fills padding
    kept = np.bincount(cells[mask], minlength=cells.max() + 1) >= max(smallest, 1)
    kept[0] = False
    numbers = np.cumsum(kept) * kept
    return np.where(numbers > MOST, 0, numbers).astype(np.uint16)[cells]


def measure(name, image, cells, pixel_size=None):
    """A slice's columns of cells.csv, {title: a value for each cell}; pixel_size: of the slice in nm, where known."""
    number, area, row, column = regionprops_table(cells, properties=("label", "area", "centroid")).values()
    outside = np.pad(find_border(image), 1, constant_values=True).astype(np.uint8)
    edge = cv2.dilate(outside, np.ones((3, 3)))[1:-1, 1:-1] > 0
    columns = {"slice": [name] * len(number), "cell": number, "area": area.astype(int)}
    columns |= {"area_nm2": (area * pixel_size**2).round(3)} if pixel_size else {}
    columns |= {"centroid_row": row.round(1), "centroid_column": column.round(1)}
    return columns | {"touches_edge": np.isin(number, cells[edge]).astype(int)}


def write_table(path, tables):
    """Write what measure() gives of each slice as one CSV file. Raises OSError."""
    with write_whole(path) as file:
        table = csv.writer(codecs.getwriter("utf-8")(file, "surrogateescape"), lineterminator="\n")
        table.writerow(tables[0])
        table.writerows(row for columns in tables for row in zip(*columns.values(), strict=True))
