"""The ISBI 2012 challenge's scores: best(combine(map(count, probabilities, labels)), "v_rand") is (score, threshold).
V_Rand and V_Info are those of Arganda-Carreras et al. (2015), doi 10.3389/fnana.2015.00142, after border thinning: they
count cells that are merged or split, which one missed pixel of membrane can do. Shares of wrong pixels say little."""

import numpy as np
from skimage.measure import label as components
from skimage.metrics import contingency_table
from skimage.segmentation import watershed

THRESHOLDS = np.arange(11) / 10
SMALLEST = 200  # pixels of the weights: of smaller cells most are none, see docs/cells.md

SCORES = {"v_rand": ("V_Rand", np.max), "v_info": ("V_Info", np.max), "pixel_error": ("pixel error", np.min)}
SCORES |= {"pixel_misclassification": ("misclassification", np.min), "membrane_dice": ("membrane Dice", np.max)}


def thin(interior):
    """Interior (H, W), bool -> its 4-connected components, grown until lines of a pixel (0) part them: (H, W), int."""
    if not interior.any():
        return np.ones(interior.shape, int)  # all is one component
    return watershed(~interior, components(interior, connectivity=1), watershed_line=True)


def entropy(counts, single=0):
    """Entropy in nats of a partition of pixels into parts of such sizes and `single` of one."""
    counts = counts[counts > 0]
    total = counts.sum() + single
    return np.log(total) - (counts * np.log(counts)).sum() / total


def partition_scores(label, segments):
    """(V_Rand, V_Info, pairs) of a slice; pairs counts pixels that go together: in both, in the label, in the segments.
    label: (H, W), bool, True inside cells. segments: (H, W), integers as from thin(). Counted over the label's interior
    (none: 1, 1, (0, 0, 0)), where each pixel on a line is a segment of its own."""
    if not label.any():
        return 1.0, 1.0, (0, 0, 0)
    cell, segment = components(label, connectivity=1)[label], segments[label]
    both = contingency_table(cell, segment).tocsc()[:, 1:].data
    cells, parts, lines = np.bincount(cell), np.bincount(segment)[1:], np.count_nonzero(segment == 0)
    same, in_cells, in_parts = (both**2).sum() + lines, (cells**2).sum(), (parts**2).sum() + lines
    entropies = entropy(cells) + entropy(parts, lines)
    v_info = 2 * (entropies - entropy(both, lines)) / entropies if entropies > 0 else 1.0
    return 2 * same / (in_cells + in_parts), max(0.0, v_info), (same, in_cells, in_parts)


def count_cells(interior):
    """How many 4-connected cells of SMALLEST or more pixels are in an interior (H, W), bool."""
    return np.count_nonzero(np.bincount(components(interior, connectivity=1)[interior]) >= SMALLEST)


def find_faults(label, segments):
    """Where cells are merged, and where they are split -> two masks, (2, H, W), bool, inside the label's cells. label,
    segments: as for partition_scores(). A cell is merged that shares a segment with another cell, and split that has
    several segments. What cell and segment have in common counts from a tenth of the smaller one and SMALLEST on."""
    inside = label & (segments > 0)
    cells, found = components(label, connectivity=1)[inside], segments[inside].astype(np.int64)
    pairs, pair_of, shared = np.unique(cells * 2**32 + found, return_inverse=True, return_counts=True)
    cell, segment = np.divmod(pairs, 2**32)
    large = shared >= np.maximum(SMALLEST, 0.1 * np.minimum(np.bincount(cells)[cell], np.bincount(found)[segment]))
    masks = np.zeros((2, *label.shape), bool)
    masks[:, inside] = [(large & (np.bincount(part, large)[part] > 1))[pair_of] for part in (segment, cell)]
    return masks


def count(probability, label, thresholds=THRESHOLDS):
    """What combine() needs of P(interior), (H, W), float or bool, and a label, bool -> float64 (len(thresholds), 9)."""
    known, rows = {}, []
    for threshold in thresholds:
        found = probability > threshold
        size = np.count_nonzero(found)
        if size not in known:  # as many pixels of one probability are the same pixels
            v_rand, v_info, pairs = partition_scores(label, thin(found))
            pixels = (found & label, found & ~label, ~found & label, ~found & ~label)
            known[size] = [v_rand, v_info, *pairs, *map(np.count_nonzero, pixels)]
        rows.append(known[size])
    return np.array(rows, np.float64)


def combine(counts):
    """The scores of slices from count() of each -> {name: array (len(thresholds),)}. V_Rand and V_Info are averages
    over the slices; the split and merge scores and pixels are counted over all of them."""
    counts = np.array(list(counts))
    v_rand, v_info = counts[:, :, :2].mean(0).T
    same, in_cells, in_segments, right, extra, missed, membrane = counts[:, :, 2:].sum(0).T
    wrong, total = extra + missed, right + extra + missed + membrane
    shares = (same, in_cells), (same, in_segments), (2 * right, 2 * right + wrong), (2 * membrane, 2 * membrane + wrong)
    split, merge, f1, dice = (np.divide(a, b, np.ones(len(a)), where=b > 0) for a, b in shares)  # 1: nothing to find
    scores = {"v_rand": v_rand, "v_rand_split": split, "v_rand_merge": merge, "v_info": v_info, "membrane_dice": dice}
    return scores | {"pixel_f1_interior": f1, "pixel_error": 1 - f1, "pixel_misclassification": wrong / total}


def best(scores, name, thresholds=THRESHOLDS):
    """(the best value of a score, its threshold); of thresholds that are equally good, the middle one."""
    value = SCORES[name][1](scores[name])
    equal = np.flatnonzero(np.isclose(scores[name], value, rtol=0, atol=1e-12))
    return float(value), float(thresholds[equal[len(equal) // 2]])
