"""The scores of the ISBI 2012 challenge: how well cells are told apart, and pixels.

    from scores import THRESHOLDS, best, evaluate
    best(evaluate(probabilities, labels), "v_rand")  # (0.97, 0.6): the score, its threshold

V_Rand and V_Info are those of Arganda-Carreras et al. (2015), doi 10.3389/fnana.2015.00142, after
border thinning: they count cells that are merged or split, which one missed pixel of membrane can
do. Shares of wrong pixels say little of that.
"""

import numpy as np
from skimage.measure import label as components
from skimage.metrics import contingency_table
from skimage.segmentation import watershed

THRESHOLDS = np.arange(11) / 10

# Each score: what it is called, and whether more is better.
SCORES = {
    "v_rand": ("V_Rand", True),
    "v_info": ("V_Info", True),
    "pixel_error": ("pixel error", False),
    "pixel_misclassification": ("misclassification", False),
    "membrane_dice": ("membrane Dice", True),
}


def thin(interior):
    """Interior (H, W), bool -> its 4-connected components, grown until lines of a pixel part them.

    Integers (H, W), 0 on the lines. Without any interior all is one component.
    """
    if not interior.any():
        return np.ones(interior.shape, int)
    return watershed(~interior, components(interior, connectivity=1), watershed_line=True)


def entropy(counts, single=0):
    """Entropy in nats of a partition of pixels into parts of such sizes and `single` of one."""
    counts = counts[counts > 0]
    total = counts.sum() + single
    return np.log(total) - (counts * np.log(counts)).sum() / total


def partition_scores(label, segments):
    """(V_Rand, V_Info, pairs) of a slice; pairs counts pixels that go together: in both, in the
    label, in the segments.

    label: (H, W), bool, True inside cells. segments: (H, W), integers as from thin(). Counted over
    the label's interior, where each pixel on a line is a segment of its own; a label without any
    interior gives (1, 1, (0, 0, 0)).
    """
    if not label.any():
        return 1.0, 1.0, (0, 0, 0)
    table = contingency_table(components(label, connectivity=1)[label], segments[label]).tocsc()
    cells = np.asarray(table.sum(axis=1)).ravel()
    lines = table[:, 0].sum()
    both, parts = table[:, 1:].data, np.asarray(table[:, 1:].sum(axis=0)).ravel()
    same = (both**2).sum() + lines
    in_cells, in_parts = (cells**2).sum(), (parts**2).sum() + lines
    of_cells, of_parts = entropy(cells), entropy(parts, lines)
    mutual = of_cells + of_parts - entropy(both, lines)
    information = 2 * mutual / (of_cells + of_parts) if of_cells + of_parts > 0 else 1.0
    v_rand = 2 * same / (in_cells + in_parts)
    return v_rand, max(0.0, information), (same, in_cells, in_parts)


def evaluate(probabilities, labels, thresholds=THRESHOLDS):
    """Scores at each of the thresholds -> {name: array (len(thresholds),)}.

    probabilities: P(interior) of each slice, (H, W), floats in [0, 1]. labels: (H, W), bool. Both
    may be iterators, so that one slice is in memory at a time.
    V_Rand and V_Info are averages over the slices; the split and merge scores (how little is split,
    how little is merged) and pixels are counted over all of them.
    """
    partitions = np.zeros((len(thresholds), 2))
    together = np.zeros((len(thresholds), 3))
    counts = np.zeros((len(thresholds), 4))
    slices = 0
    for probability, label in zip(probabilities, labels, strict=True):
        slices += 1
        for i, threshold in enumerate(thresholds):
            found = probability > threshold
            v_rand, v_info, pairs = partition_scores(label, thin(found))
            partitions[i] += (v_rand, v_info)
            together[i] += pairs
            pairs = (found & label, found & ~label, ~found & label, ~found & ~label)
            counts[i] += [np.count_nonzero(pair) for pair in pairs]
    right, extra, missed, membrane = counts.T
    wrong = extra + missed

    def ratio(part, whole):  # 1 where there is nothing to find
        return np.divide(part, whole, np.ones(len(thresholds)), where=whole > 0)

    same, in_cells, in_segments = together.T
    f1_interior = ratio(2 * right, 2 * right + wrong)

    return {
        "v_rand": partitions[:, 0] / slices,
        "v_rand_split": ratio(same, in_cells),
        "v_rand_merge": ratio(same, in_segments),
        "v_info": partitions[:, 1] / slices,
        "pixel_f1_interior": f1_interior,
        "pixel_error": 1 - f1_interior,
        "pixel_misclassification": wrong / counts.sum(1),
        "membrane_dice": ratio(2 * membrane, 2 * membrane + wrong),
    }


def best(scores, name, thresholds=THRESHOLDS):
    """(the best value of a score, its threshold)"""
    i = int(np.argmax(scores[name]) if SCORES[name][1] else np.argmin(scores[name]))
    return float(scores[name][i]), float(thresholds[i])
