"""The challenge's scores: python3 -m pytest tests/test_scores.py"""

import json

from common.scores import THRESHOLDS, best, combine, count, count_cells, find_faults, partition_scores, thin
from conftest import ROOT

import numpy as np
import pytest

EXPECTED = json.loads((ROOT / "tests/metrics_oracle/expected.json").read_text())  # what the challenge's software says


def evaluate(probabilities, labels):
    return combine(map(count, probabilities, labels))


def test_scores_are_the_challenges(oracle):
    """V_Rand and V_Info within 1e-3 from t = 0.1 to 0.8 and at the best t, pixels within 1e-9."""
    found = evaluate(*oracle)
    for name in ("v_rand", "v_info"):
        np.testing.assert_allclose(found[name][1:9], EXPECTED[name][1:9], atol=1e-3)
        assert best(found, name)[0] == pytest.approx(EXPECTED["best"][name], abs=1e-3)
    for name in ("v_rand_split", "v_rand_merge"):
        np.testing.assert_allclose(found[name][1:8], EXPECTED[name][1:8], atol=1e-3)
    for name in ("pixel_misclassification", "pixel_f1_interior"):
        np.testing.assert_allclose(found[name], EXPECTED[name], atol=1e-9)
    assert best(found, "pixel_error")[0] == pytest.approx(EXPECTED["best"]["pixel_error"], abs=1e-9)


@pytest.mark.filterwarnings("error")
def test_degenerate_proposals_have_their_value():
    """All interior, all membrane and constant: no warning, no NaN, the value of one component."""
    label = np.ones((20, 20), bool)
    label[:, 10] = False  # cells of 200 and 180 pixels
    cells = 200**2 + 180**2
    merged = 2 * cells / (cells + 380**2)  # all in one component
    for value in (0.0, 0.5, 1.0):
        scores = evaluate([np.full(label.shape, value)], [label])
        np.testing.assert_allclose(scores["v_rand"], merged)
        assert all(np.isfinite(values).all() for values in scores.values())
        np.testing.assert_allclose(scores["v_info"], 0, atol=1e-12)
    nothing = evaluate([np.zeros((20, 20))], [np.zeros((20, 20), bool)])
    assert nothing["v_rand"][5] == nothing["v_info"][5] == nothing["membrane_dice"][5] == 1
    whole = evaluate([np.ones((20, 20))], [np.ones((20, 20), bool)])
    assert whole["v_rand"][5] == whole["v_info"][5] == 1
    perfect = evaluate([label.astype(float)], [label])
    assert perfect["v_rand"][5] == perfect["v_info"][5] == 1 and perfect["pixel_error"][5] == 0


def test_partition_scores_by_hand():
    """Split, merged and line pixels count as in the definition: c, a, b and n0 worked out by hand.

    The label has two cells of 4 pixels. Segment 1 covers the first and 1 pixel of the second, 2
    covers 2 pixels of the second, 1 pixel of it lies on a line.
    """
    label = np.array([[1, 1, 0, 1, 1], [1, 1, 0, 1, 1]], bool)
    segments = np.array([[1, 1, 0, 1, 0], [1, 1, 0, 2, 2]])
    same = 4**2 + 1**2 + 2**2 + 1
    in_cells, in_parts = 2 * 4**2, 5**2 + 2**2 + 1
    v_rand, v_info, pairs = partition_scores(label, segments)
    assert v_rand == pytest.approx(2 * same / (in_cells + in_parts))
    assert pairs == (same, in_cells, in_parts)

    def entropy(*sizes):
        return -sum(n / 8 * np.log(n / 8) for n in sizes)

    cells, parts, both = entropy(4, 4), entropy(5, 2, 1), entropy(4, 1, 2, 1)
    assert v_info == pytest.approx(2 * (cells + parts - both) / (cells + parts))


def test_thinning_parts_cells_by_lines_of_a_pixel():
    """Thick membrane becomes lines that no 4-connected path crosses; cells are 4-connected."""
    interior = np.ones((30, 40), bool)
    interior[:, 15:22] = interior[12:17] = False
    cells = thin(interior)
    assert set(np.unique(cells)) == {0, 1, 2, 3, 4}
    assert np.mean(cells == 0) < 0.08
    for axis in (0, 1):
        one, other = (np.delete(cells, end, axis) for end in (0, -1))
        assert not ((one != other) & (one > 0) & (other > 0)).any()
    assert len(np.unique(thin(np.eye(6, dtype=bool)))) == 7  # diagonal neighbours are apart


def test_a_gap_costs_v_rand_and_hardly_a_pixel():
    """The reason for V_Rand: joining two cells by one pixel is a merge."""
    label = np.ones((40, 40), bool)
    label[:, 20] = False
    gap = label.copy()
    gap[20, 20] = True
    scores = evaluate([gap.astype(float)], [label])
    assert best(scores, "v_rand")[0] < 0.7 and best(scores, "pixel_misclassification")[0] < 0.001


def test_the_best_threshold_is_the_middle_one():
    """Of thresholds that are equally good, the middle one: an untrained net gets 0.5."""
    scores = {"v_rand": np.array([0.1, 0.7, 0.7, 0.7 - 1e-15, 0.2]), "pixel_error": np.array([0.5, 0.2, 0.3, 0.2, 0.2])}
    thresholds = np.arange(5) / 10
    assert best(scores, "v_rand", thresholds) == (pytest.approx(0.7), pytest.approx(0.2))
    assert best(scores, "pixel_error", thresholds) == (0.2, pytest.approx(0.3))
    same = evaluate([np.full((20, 20), 2.0)], [np.eye(20) > 0])
    assert best(same, "v_rand") == (pytest.approx(same["v_rand"][0]), 0.5)


def test_a_mask_has_one_score(oracle):
    """Whatever the threshold: that of the probabilities at the mask's own one."""
    mask = count((oracle[0][0] > 0.3).astype(np.float32), oracle[1][0])
    np.testing.assert_array_equal(mask[:10], np.tile(count(oracle[0][0], oracle[1][0], [0.3]), (10, 1)))
    assert len(mask) == len(THRESHOLDS)


def test_merged_and_split_cells_are_found():
    """By hand: two cells joined by a gap, one cut in two; borders that lie a little otherwise are no fault."""
    label = np.ones((60, 90), bool)
    label[:, 29:31] = label[:, 59:61] = False
    for shift in (0, 2):
        found = np.roll(label, shift, axis=1)
        assert not find_faults(label, thin(found)).any()
        found[20:24, :59] = True
        found[30:32, 61:] = False
        merged, split = find_faults(label, thin(found))
        assert merged.sum() == pytest.approx(57 * 60, rel=0.1) and split.sum() == pytest.approx(29 * 60, rel=0.1)
        assert merged[5, 5] and merged[50, 50] and not merged[:, 64:].any()
        assert split[5, 85] and split[50, 85] and not split[:, :57].any()
    speck = np.ones((40, 40), bool)
    speck[10:18, 10:18], speck[12:16, 12:16] = False, True
    small = np.pad(np.ones((12, 12), bool), 9)  # thin() makes it large
    assert [count_cells(cells) for cells in (label, found, speck, speck & False, small)] == [3, 3, 1, 0, 0]
