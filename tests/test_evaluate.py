"""The script that scores: python3 -m pytest tests/test_evaluate.py"""

import json
import shutil

from common.arguments import InputError
from common.labels import judge, read_label, read_pair
from common.scores import SCORES, combine, count, count_cells
from conftest import one_line, python, script, write_pairs
from evaluate import find_scale
from inside import run_inside
from test_scores import EXPECTED

import cv2
import numpy as np
import pytest
import tifffile


def evaluate(*flags, cwd):
    return run_inside("evaluate.py", "--prediction", "found", "--label", "test_label", *flags, cwd=cwd)


def write_oracle(folder, oracle):
    """The oracle's slices as predict_unet_test.py would write them, and their labels."""
    for name in ("test_image", "test_label", "found"):
        (folder / name).mkdir()
    for i, (probability, label) in enumerate(zip(*oracle, strict=True)):
        image = np.rint(probability * 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"found/{i}_prob.png"), image)
        cv2.imwrite(str(folder / f"found/{i}_mask.png"), (image > 127) * np.uint8(255))
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
        flags = ("--prediction", prediction, "--label", "test_label", "--threshold", 0.5, "--json", "a/scores.json")
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
    (tmp_path / "found/cells.csv").touch()
    cv2.imwrite(str(tmp_path / "image/other.png"), label)  # not these slices: no floor then
    done = run_inside("evaluate.py", "--prediction", "found", "--label", "label", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for title in ("V_Rand", "V_Info", "membrane Dice"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(title))
        assert line.split()[len(title.split())] == "1.0000"
    assert "no floor of blurred slices" in done.stdout and "left out" not in done.stdout


def test_bad_input_is_one_line(oracle, tmp_path):
    """Other sizes, counts, names or values: exit 2, one line that names the file."""
    write_oracle(tmp_path, oracle)
    cv2.imwritemulti(str(tmp_path / "two.tif"), [p.astype(np.float32) for p in oracle[0][:2]])
    cv2.imwritemulti(str(tmp_path / "logits.tif"), [9 * p.astype(np.float32) for p in oracle[0]])
    for name in ("small", "renamed", "grey", "mixed"):
        (tmp_path / name).mkdir()
    for i, probability in enumerate(oracle[0]):
        image = np.rint(probability * 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"small/{i}.png"), image[1:] if i == 2 else image)
        cv2.imwrite(str(tmp_path / f"renamed/{i + 1}.png"), image)
        cv2.imwrite(str(tmp_path / f"grey/{i}.png"), image)
        cv2.imwrite(str(tmp_path / f"mixed/{i}.tif"), probability.astype(np.float32) if i == 1 else image)
    cases = {
        ("nowhere", "test_label"): "nowhere",
        ("two.tif", "test_label"): "two.tif",
        ("logits.tif", "test_label"): "logits.tif",
        ("small", "test_label"): "small/2.png",
        ("mixed", "test_label"): "mixed/1.tif",
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
    for weak in (1, 12):  # our own probabilities, which are 0 to 255
        cv2.imwrite(str(tmp_path / "0_prob.png"), masks[0] * np.uint8(weak))
        assert find_scale("found", [("0", tmp_path / "0_prob.png", 0)]) == 255
    assert slices.name == "train_image"


def test_the_masks_own_threshold(oracle, tmp_path):
    """The column beside the best scores: that of the masks, of --threshold, or of 0.5; in the JSON too."""
    write_oracle(tmp_path, oracle)
    images = [np.rint(p * 255).astype(np.uint8) for p in oracle[0]]
    for i, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"found/{i}_mask.png"), np.uint8(255) * (image / np.float32(255) > 0.65))
    for flags, title, threshold in (((), "mask", 0.65), (("--threshold", 0.35), "at 0.35", 0.35), ((), "at 0.5", 0.5)):
        if title == "at 0.5":
            (tmp_path / "found/1_mask.png").unlink()
        done = evaluate("--json", "s.json", *flags, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.splitlines()[0].split("P>")[1].strip().startswith(title)
        pairs = zip(images, oracle[1], strict=True)
        wanted = combine(count(image / np.float32(255), label, [threshold]) for image, label in pairs)
        found = json.loads((tmp_path / "s.json").read_text())
        assert found["threshold"] == ("mask" if title == "mask" else threshold)
        assert found["at_threshold"] == {name: values.item() for name, values in wanted.items()}
        assert len(found["v_rand"]) == len(found["thresholds"]) == 11
        for name, (start, _) in SCORES.items():
            (line,) = (line for line in done.stdout.splitlines() if line.startswith(start))
            assert line.removeprefix(start).split()[2] == f"{wanted[name].item():.4f}"


def test_each_slice_has_a_line(oracle, tmp_path):
    """--per_slice: scores and cells of each labelled slice; those without a label are left out and counted."""
    write_oracle(tmp_path, oracle)
    (tmp_path / "test_label/1.png").unlink()
    done = evaluate("--per_slice", "--json", "s.json", cwd=tmp_path)
    assert done.returncode == 0 and "1 of 3 slices have no label" in done.stdout and "2 slices " in done.stdout
    found = json.loads((tmp_path / "s.json").read_text())
    assert np.mean([row["v_rand"] for row in found["slices"]]) == pytest.approx(found["at_threshold"]["v_rand"])
    lines = [line.split() for line in done.stdout.partition("cells in label")[2].splitlines()[1:]]
    assert [line[0] for line in lines] == ["0", "2"]
    for line, row in zip(lines, found["slices"], strict=True):
        scores = [row[name] for name in ("v_rand", "v_info", "pixel_misclassification")]
        cells = [row["cells_in_label"], row["cells_found"]]
        assert line == [row["slice"], *(f"{value:.4f}" for value in scores), *map(str, cells)]
        label, mask = (tmp_path / f"{name}.png" for name in (f"test_label/{line[0]}", f"found/{line[0]}_mask"))
        assert cells == [count_cells(cv2.imread(str(file), -1) > 0) for file in (label, mask)]


def test_a_picture_of_the_worst_slice(tmp_path):
    """--picture: merged and split cells and wrong pixels in their colours, over the slice or else the label."""
    label = np.full((60, 90), 255, np.uint8)
    label[:, 29:31] = label[:, 59:61] = 0
    found = label.copy()
    found[20:24, :59] = 255  # joins two cells
    found[30:32, 61:] = 0  # cuts the third
    for folder, *pictures in (("test_label", label, label), ("found", label, found), ("test_image", ~label, ~label)):
        (tmp_path / folder).mkdir()
        for i, picture in enumerate(pictures):
            cv2.imwrite(str(tmp_path / folder / f"{i}.png"), picture)
    magenta, cyan, orange = (255, 0, 255), (255, 255, 0), (0, 140, 255)
    for interior in (0, 255):  # first the slices, then the labels
        done = evaluate("--picture", "new/worst.png", cwd=tmp_path)
        assert done.returncode == 0 and "new/worst.png: slice 1, " in done.stdout, done.stderr
        picture = cv2.imread(str(tmp_path / "new/worst.png")).astype(int)
        for place, colour in {(5, 5): magenta, (50, 50): magenta, (50, 80): cyan, (30, 80): orange}.items():
            np.testing.assert_allclose(2 * picture[place] - interior, colour, atol=2)
        np.testing.assert_array_equal(picture[5, 29], 255 - interior)
        shutil.rmtree(tmp_path / "test_image", ignore_errors=True)
    for flags in ("--json a.png --picture a.png", "--picture found/new.png", "--picture test_label/0.png"):
        done = evaluate(*flags.split(), cwd=tmp_path)
        assert done.returncode == 2 and "is one of the images, or would be" in done.stderr
    done = evaluate("--picture", "worst.jpg", cwd=tmp_path)
    assert done.returncode == 2 and one_line(done.stderr) and "call it .png" in done.stderr


def test_white_membranes_are_noticed(tmp_path):
    """Labels the other way round, told by slices or, without any, by their number: refused, with the cure."""
    write_pairs(tmp_path, 3)
    (tmp_path / "found").mkdir()
    for i in range(3):
        label = cv2.imread(str(tmp_path / f"train_label/{i}.png"), -1)
        for name in ("found", "train_label"):
            cv2.imwrite(str(tmp_path / f"{name}/{i}.png"), 255 - label)
    for flags in (("--image", "train_image"), ()):
        done = run_inside("evaluate.py", "--prediction", "found", "--label", "train_label", *flags, cwd=tmp_path)
        assert done.returncode == 2 and "prepare.py labels train_label OUT --membrane white" in done.stderr
        (tmp_path / "train_image").rename(tmp_path / "gone") if flags else None
    # Each sign alone is none: little interior that is light, much that is dark.
    light = np.zeros((40, 40), np.uint8)
    light[:10] = 255
    noise = np.random.default_rng(0).integers(0, 50, light.shape) + light / 2

    def judge_pair(image, label):
        for name, array in (("image.tif", image), ("label.png", label)):
            cv2.imwrite(str(tmp_path / name), array)
        return judge("x", [read_pair((tmp_path / "image.tif",), (tmp_path / "label.png",))[2]])

    assert judge_pair(noise, light) == judge_pair(noise, 255 - light) == (0, 255)
    with pytest.raises(InputError, match="--membrane white"):
        judge_pair(255 - noise, light)
