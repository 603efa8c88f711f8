"""The challenge's scores: python3 -m pytest tests/test_evaluate.py"""

import json

from common.arguments import InputError
from common.labels import judge, look, read_label
from common.scores import SCORES, THRESHOLDS, best, combine, count, evaluate, partition_scores, thin
from conftest import ROOT, one_line, python, script, write_pairs
from inside import run_inside

import cv2
import numpy as np
import pytest
import tifffile

ORACLE = ROOT / "tests/metrics_oracle"  # what the challenge's own software says of three slices
EXPECTED = json.loads((ORACLE / "expected.json").read_text())


@pytest.fixture(scope="module")
def oracle():
    arrays = np.load(ORACLE / "oracle.npz")
    return (arrays["probability_u8"] + 0.5) / 256, arrays["labels"] > 0


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


def write_oracle(folder, oracle):
    """The oracle's slices as predict_unet_test.py would write them, and their labels."""
    for name in ("test_image", "test_label", "found"):
        (folder / name).mkdir()
    for i, (probability, label) in enumerate(zip(*oracle, strict=True)):
        image = np.rint(probability * 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"found/{i}_prob.png"), image)
        cv2.imwrite(str(folder / f"found/{i}_mask.png"), (image > 127) * 255)
        cv2.imwrite(str(folder / f"test_label/{i}.png"), label * np.uint8(255))
        cv2.imwrite(str(folder / f"test_image/{i}.png"), image)


def test_the_script_prints_a_table_and_writes_json(oracle, tmp_path):
    """Folder or stack: the same table, with the floors; --json holds each threshold's scores."""
    write_oracle(tmp_path, oracle)
    stack = tmp_path / "found.tif"
    pages = [np.rint(p * 255).astype(np.float32) / 255 for p in oracle[0]]
    cv2.imwritemulti(str(stack), pages)
    answers = []
    for prediction in ("found", stack):
        flags = ("--prediction", prediction, "--label", "test_label", "--json", "a/scores.json")
        run = script if prediction == "found" else run_inside
        done = run("evaluate.py", *flags, cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        answers.append((done.stdout, json.loads((tmp_path / "a/scores.json").read_text())))
    assert answers[0] == answers[1]
    text, scores = answers[0]
    for name, (title, _) in SCORES.items():
        line = next(line for line in text.splitlines() if line.startswith(title))
        assert f"{scores['best'][name]:.4f}" in line and f"{scores[name][5]:.4f}" in line
        for floor in ("all_interior", "blurred_slices"):
            assert f"{scores['floors'][floor]['best'][name]:.4f}" in line
    assert scores["best"]["v_rand"] == pytest.approx(EXPECTED["best"]["v_rand"], abs=2e-3)
    assert scores["floors"]["all_interior"]["best"]["v_rand"] < scores["best"]["v_rand"]
    done = run_inside("evaluate.py", "--prediction", stack, "--label", stack, cwd=tmp_path)
    assert done.returncode == 2  # probabilities are no labels


def test_folders_are_paired_by_name(tmp_path):
    """Whatever the order of the files: 1_prob comes after 1_2_prob, 1 before 1_2."""
    rng = np.random.default_rng(0)
    for name in ("label", "found", "image"):
        (tmp_path / name).mkdir()
    for name in ("1", "1_2", "10", "a"):
        label = np.where(rng.random((40, 40)) > 0.4, 255, 0).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"label/{name}.png"), label)
        cv2.imwrite(str(tmp_path / f"found/{name}_prob.png"), label)
    cv2.imwrite(str(tmp_path / "image/other.png"), label)  # not these slices: no floor then
    done = run_inside("evaluate.py", "--prediction", "found", "--label", "label", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for title in ("V_Rand", "V_Info", "membrane Dice"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(title))
        assert line.split()[len(title.split())] == "1.0000"
    assert "no floor of blurred slices" in done.stdout


def test_bad_input_is_one_line(oracle, tmp_path):
    """Other sizes, counts, names or values: exit 2, one line that names the file."""
    write_oracle(tmp_path, oracle)
    cv2.imwritemulti(str(tmp_path / "two.tif"), [p.astype(np.float32) for p in oracle[0][:2]])
    cv2.imwritemulti(str(tmp_path / "logits.tif"), [9 * p.astype(np.float32) for p in oracle[0]])
    for name in ("small", "renamed", "grey"):
        (tmp_path / name).mkdir()
    for i, probability in enumerate(oracle[0]):
        image = np.rint(probability * 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"small/{i}.png"), image[1:] if i == 2 else image)
        cv2.imwrite(str(tmp_path / f"renamed/{i + 1}.png"), image)
        cv2.imwrite(str(tmp_path / f"grey/{i}.png"), image)
    cases = {
        ("nowhere", "test_label"): "nowhere",
        ("two.tif", "test_label"): "two.tif",
        ("logits.tif", "test_label"): "logits.tif",
        ("small", "test_label"): "small/2.png",
        ("renamed", "test_label"): "has 0, but renamed does not",
        ("found", "grey"): "grey/0.png",
    }
    for (prediction, label), said in cases.items():
        flags = ("--prediction", prediction, "--label", label, "--json", "out/s.json")
        done = (script if prediction == "nowhere" else run_inside)("evaluate.py", *flags, cwd=tmp_path)
        assert done.returncode == 2 and one_line(done.stderr), done.stderr
        assert said in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
    inputs = [tmp_path / f"{name}/0.png" for name in ("grey", "test_label", "test_image")]
    before = [file.read_bytes() for file in inputs]
    for file in inputs:  # the scores would take the place of a slice
        flags = ("--prediction", "grey", "--label", "test_label", "--json", file)
        done = run_inside("evaluate.py", *flags, cwd=tmp_path)
        assert done.returncode == 2 and one_line(done.stderr), done.stderr
        assert "--json" in done.stderr and "is one of the images" in done.stderr
    assert [file.read_bytes() for file in inputs] == before


def test_the_best_threshold_is_the_middle_one():
    """Of thresholds that are equally good, the middle one: an untrained net gets 0.5."""
    scores = {"v_rand": np.array([0.1, 0.7, 0.7, 0.7 - 1e-15, 0.2]), "pixel_error": np.array([0.5, 0.2, 0.3, 0.2, 0.2])}
    thresholds = np.arange(5) / 10
    assert best(scores, "v_rand", thresholds) == (pytest.approx(0.7), pytest.approx(0.2))
    assert best(scores, "pixel_error", thresholds) == (0.2, pytest.approx(0.3))
    same = evaluate([np.full((20, 20), 2.0)], [np.eye(20) > 0])
    assert best(same, "v_rand") == (pytest.approx(same["v_rand"][0]), 0.5)


def test_slices_can_be_counted_apart(oracle):
    """combine() of count() of each is evaluate(); a mask is counted once, not once a threshold."""
    counts = [count(*pair) for pair in zip(*oracle, strict=True)]
    for name, values in evaluate(*oracle).items():
        np.testing.assert_array_equal(values, combine(counts)[name])
    mask = count((oracle[0][0] > 0.5).astype(np.float32), oracle[1][0])
    np.testing.assert_array_equal(mask[:10], np.tile(mask[0], (10, 1)))
    assert len(mask) == len(THRESHOLDS)


def test_it_needs_no_oneflow(tmp_path):
    """evaluate.py, plot.py and the modules behind them start without OneFlow, and where it is missing."""
    program = """
import sys
sys.modules["oneflow"] = None  # importing it fails
import evaluate, plot, data.prepare, common.images, common.labels, common.pictures, common.scores, dataloader
"""
    done = python(program, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_predictions_of_other_programs(tmp_path):
    """One mask in six codings has one score; values that can't be read so, or that only look so, are refused."""
    slices = write_pairs(tmp_path, 3)
    (tmp_path / "train_image").rename(tmp_path / "elsewhere")
    labels = [read_label(tmp_path / f"train_label/{i}.png") > 0 for i in range(3)]
    masks = [np.roll(label, 2, 0) for label in labels]
    codings = {
        "m255": lambda m: m * np.uint8(255),
        "m01": lambda m: m.astype(np.uint8),
        "m16": lambda m: m.astype(np.uint16) * 255,
        "full16": lambda m: m.astype(np.uint16) * 65535,
        "float": lambda m: m.astype(np.float32),
        "m12": lambda m: m.astype(np.uint8) + 1,
        "m13": lambda m: m.astype(np.uint8) * 3,
        "grey16": lambda m: m.astype(np.uint16) * 200 + 10,
        "bool": None,
    }
    tables = {}
    for name, code in codings.items():
        (tmp_path / name).mkdir()
        for i, mask in enumerate(masks):
            if code is None:
                tifffile.imwrite(tmp_path / name / f"{i}.tif", mask)
            else:
                cv2.imwrite(str(tmp_path / name / f"{i}.tif"), code(mask))
        done = run_inside("evaluate.py", "--prediction", name, "--label", "train_label", cwd=tmp_path)
        tables[name] = done.stdout.partition("3 slices")[2] if done.returncode == 0 else done.stderr
        assert one_line(done.stderr) or done.returncode == 0
        assert ("taken for masks of 0 and" in done.stdout) == (name in ("m01", "m16"))
    assert tables["m255"] and len({tables[name] for name in ("m255", "m01", "m16", "full16", "float", "bool")}) == 1
    for name in ("m12", "m13", "grey16"):
        assert f"{name}: holds no value above" in tables[name]
    assert slices.name == "train_image"


def test_only_labelled_slices_are_scored(oracle, tmp_path):
    """Predictions of further slices are left out and counted; a label without a prediction is refused."""
    write_oracle(tmp_path, oracle)
    (tmp_path / "test_label/1.png").unlink()
    done = run_inside("evaluate.py", "--prediction", "found", "--label", "test_label", cwd=tmp_path)
    assert done.returncode == 0 and "1 of 3 slices have no label" in done.stdout and "2 slices " in done.stdout


def test_white_membranes_are_noticed(tmp_path):
    """Labels the other way round, told by the slices or by a good prediction: refused, with the cure."""
    write_pairs(tmp_path, 3)
    (tmp_path / "found").mkdir()
    for i in range(3):
        label = cv2.imread(str(tmp_path / f"train_label/{i}.png"), -1)
        cv2.imwrite(str(tmp_path / f"found/{i}.png"), label)
        cv2.imwrite(str(tmp_path / f"train_label/{i}.png"), 255 - label)
    for flags in (("--image", "train_image"), ()):
        done = run_inside("evaluate.py", "--prediction", "found", "--label", "train_label", *flags, cwd=tmp_path)
        assert done.returncode == 2 and "prepare.py labels train_label OUT --membrane white" in done.stderr
        (tmp_path / "train_image").rename(tmp_path / "gone") if flags else None
    # Each sign alone is none: little interior that is light, much that is dark.
    light = np.zeros((40, 40), np.uint8)
    light[:10] = 255
    noise = np.random.default_rng(0).integers(0, 50, light.shape) + light / 2
    assert judge("x", [look(light, noise)]) == judge("x", [look(255 - light, noise)]) == (0, 255)
    with pytest.raises(InputError, match="--membrane white"):
        judge("x", [look(light, 255 - noise)])
