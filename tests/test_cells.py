"""Cells, their table and their pictures: python3 -m pytest tests/test_cells.py"""

import csv

import predict_unet_test
from common import checkpoint
from common.cells import find_cells, find_mask
from common.images import read_slice
from common.pictures import write_pictures
from conftest import release
from inside import run_inside
from unet import UNet

import cv2
import numpy as np
import pytest
import tifffile


@pytest.fixture
def predict(tmp_path, monkeypatch):
    """Runs predict_unet_test.py on the folder in/, with a net that takes brightness for P(interior)."""
    net = UNet(1, 1, bilinear=False, base_channels=2)
    tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    checkpoint.write(tmp_path / "w.safetensors", tensors, {"model": {}, "pixel_size": 5.0})
    monkeypatch.setattr(predict_unet_test, "predict", lambda nets, image, *_, **__: np.float32(image / 255))
    (tmp_path / "in").mkdir()
    given = ("--device", "cpu", "--checkpoint", "w.safetensors", "--Test_Data_path", "in", "--save_res_path", "out")
    yield lambda *flags: run_inside("predict_unet_test.py", *given, *flags, cwd=tmp_path)
    release()


def draw(path, speck=True, frame=0):
    """Write a slice of cells on the left, on the right and in the middle, and a speck; a black frame of some pixels."""
    image = np.full((90, 120), 200, np.uint8)
    image[:, 90:93] = 30
    for top, bottom, left, right in ((20, 60, 30, 70), *[(70, 77, 10, 17)] * speck):
        image[top : bottom + 1, left : right + 1] = 30
        image[top + 3 : bottom - 2, left + 3 : right - 2] = 200
    image += np.random.default_rng(0).integers(0, 20, image.shape).astype(np.uint8)  # one value would be padding
    image = np.pad(image, frame)
    cv2.imwrite(str(path), image)
    return image > 127


def table_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_numbers_table_colours_and_stack_agree(predict, tmp_path):
    """One set of cells, numbered from 1 on, without specks; each row of cells.csv is what NAME_cells.png holds."""
    masks = {"0,a": draw(tmp_path / "in/0,a.png"), "1": draw(tmp_path / "in/1.png", speck=False)}
    for flags, expected in (((), (3, 3)), (("--min_cell", 0, "--pixel_size", 2.5), (4, 3))):
        done = predict("--cells", "--stack", "s.tif", "--min_cell", 9, *flags)
        assert done.returncode == 0 and f"{sum(expected)} cells of " in done.stdout, done.stdout
        rows, stack = table_of(tmp_path / "out/cells.csv"), tifffile.imread(tmp_path / "s_cells.tif")
        assert stack.dtype == np.uint16
        for page, (name, mask) in enumerate(masks.items()):
            cells, colours = (cv2.imread(str(tmp_path / f"out/{name}_{kind}.png"), -1) for kind in ("cells", "colours"))
            mine = [row for row in rows if row["slice"] == name]
            assert [int(row["cell"]) for row in mine] == list(range(1, expected[page] + 1)) == [*np.unique(cells)][1:]
            np.testing.assert_array_equal(stack[page], cells)
            painted = colours.max(2) > colours.min(2)
            np.testing.assert_array_equal(painted, mask & (cells > 0))
            assert np.count_nonzero(mask & (cells == 0)) == (4 if expected[page] == 3 and page == 0 else 0)
            for row in mine:
                where = np.argwhere(cells == int(row["cell"]))
                assert int(row["area"]) == len(where)
                assert ("area_nm2" in row) == bool(flags) and float(row.get("area_nm2", 0)) in (0, 6.25 * len(where))
                centroid = float(row["centroid_row"]), float(row["centroid_column"])
                np.testing.assert_allclose(centroid, where.mean(0), atol=0.051)
                edge = ((where == 0) | (where == np.subtract(cells.shape, 1))).any()
                assert int(row["touches_edge"]) == edge
            assert {row["touches_edge"] for row in mine} == {"0", "1"}
    with tifffile.TiffFile(tmp_path / "s_cells.tif") as tiff:  # pixels a centimetre
        assert {page.get_resolution("centimeter") for page in tiff.pages} == {(4e6, 4e6)}
    assert "NAME_colours.png and cells.csv are older" in predict().stdout


def test_the_default_is_of_the_weights_pixels(predict, tmp_path):
    """What a speck is doesn't depend on the slices' pixels where these are said; of a slice whose name isn't UTF-8."""
    draw(tmp_path / "in/0.png")
    (tmp_path / "in/0.png").rename(tmp_path / "in/\udce4.png")
    for flags, pixels in (((), 200), (("--pixel_size", 2.5), 800), (("--pixel_size", 10), 50)):
        said = predict("--cells", *flags).stdout
        assert f" cells of {pixels} pixels or more" in said
        assert ("slices are resampled by " in said) == bool(flags)
    assert "resampled by 2 to the weights' 5 nm" in said
    assert b"\n\xe4,1," in (tmp_path / "out/cells.csv").read_bytes()
    assert "there are the slices" in predict("--stack", "in/s.tif").stderr


def test_cells_end_at_padding(predict, tmp_path):
    """No number in a frame; a cell that the frame cuts touches the edge, one within doesn't."""
    draw(tmp_path / "in/0.png", frame=20)
    assert predict("--cells").returncode == 0
    cells = cv2.imread(str(tmp_path / "out/0_cells.png"), -1)
    inner = cells[20:-20, 20:-20]
    assert (inner > 0).sum() == (cells > 0).sum()
    touching = [int(row["touches_edge"]) for row in table_of(tmp_path / "out/cells.csv")]
    edge = np.concatenate((inner[0], inner[-1], inner[:, 0], inner[:, -1]))
    assert touching == [int(cell in edge) for cell in (1, 2, 3)] and sum(touching) == 2


def test_nothing_half_written(predict, tmp_path, monkeypatch):
    """Where a slice fails neither the table nor a stack is there, nor a part of them."""
    draw(tmp_path / "in/0.png")
    draw(tmp_path / "in/1.png")

    def fail(path, *args):
        if path.name == "1":
            raise FloatingPointError

    monkeypatch.setattr(predict_unet_test, "write_pictures", fail)
    with pytest.raises(FloatingPointError):
        predict("--cells", "--stack", "out/s.tif")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_cell_where_there_is_no_interior(predict, tmp_path):
    """All membrane: no cell has a number, nothing is coloured, the table is its header."""
    noise = np.random.default_rng(0).integers(1, 100, (40, 50)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "in/a.png"), noise)
    done = predict("--cells", "--min_cell", 0)
    assert "a_mask.png is all membrane" in done.stdout and "0 cells of " in done.stdout
    assert not cv2.imread(str(tmp_path / "out/a_cells.png"), -1).any()
    colours = cv2.imread(str(tmp_path / "out/a_colours.png"))
    assert (colours == colours[:, :, :1]).all()
    assert (tmp_path / "out/cells.csv").read_text().count("\n") == 1
    assert "a_mask.png is all interior" in predict("--threshold", 0).stdout


def test_cells_are_those_that_lines_part():
    """4-connected cells of a ragged mask are numbered each, and lines of a pixel part the numbers."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(80, 100)), (0, 0), 2)
    mask = noise > -0.02
    cells = find_cells(noise, mask, 0)
    count, interior = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    assert cells.dtype == np.uint16 and cells.max() == count - 1 > 5
    for cell in range(1, count):
        assert len(np.unique(cells[interior == cell])) == 1
    for axis in (0, 1):
        one, other = (np.delete(cells, end, axis) for end in (0, -1))
        assert not ((one != other) & (one > 0) & (other > 0)).any()


@pytest.mark.parametrize("seed", range(5))
def test_masks_grow_where_cells_dont_meet(seed):
    """Each cell of the mask has one of P > T in it and all of that, and is P > G; a wide slope takes no time."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(80, 100)), (0, 0), 3)
    probability = np.float32(cv2.normalize(noise, None, 0, 1, cv2.NORM_MINMAX))
    mask, found = find_mask(probability, 0.6, 0.3, piece=0), probability > 0.6
    assert (mask >= found).all() and (probability[mask] > 0.3).all() and mask.sum() > 1.5 * found.sum()
    count, numbers = cv2.connectedComponents(found.astype(np.uint8), connectivity=4)
    grown, cells = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    pairs = np.unique(np.stack((numbers, cells))[:, found], axis=1)
    assert count == grown == pairs.shape[1] + 1 > 5
    # Lines that skimage draws with connectivity 2 would take it all of the memory here.
    large = cv2.resize(probability, (1200, 1000), interpolation=cv2.INTER_CUBIC)
    assert abs(find_mask(large, 0.6, 0.3, piece=0).mean() - mask.mean()) < 0.08
    assert np.array_equal(find_mask(probability, 0.6, 0.6), found)
    assert not find_mask(probability * 0.5, 0.6, 0.2).any()


def test_cells_meet_at_the_ridge():
    """The line between two cells is where P is lowest, wherever that is between them."""
    rows = np.float32([0.9] * 5 + [0.44, 0.4, 0.38, 0.36, 0.34, 0.32, 0.3, 0.33] + [0.9] * 5)
    mask = find_mask(np.repeat(rows[:, None], 30, axis=1), 0.5, 0.2, piece=100)
    np.testing.assert_array_equal(np.flatnonzero(~mask.all(1)), [11])
    assert not mask[11].any()


def test_small_pieces_are_parts_of_larger_cells():
    """A piece that P > grow joins to a larger cell is a part of it; alone, or with other pieces only, it is a cell."""
    probability = np.zeros((40, 60), np.float32)
    probability[2:38, 2:25] = 0.9  # a cell, and a piece in it behind a rim
    probability[10:20, 10:20], probability[12:18, 12:18] = 0.4, 0.9
    probability[2:8, 40:46], probability[20:26, 40:46], probability[20:26, 48:54] = 0.9, 0.9, 0.9  # one alone, two that
    probability[20:26, 46:48] = 0.4  # are joined
    for piece, count in ((100, 4), (36, 5), (0, 5)):
        mask = find_mask(probability, 0.6, 0.3, piece)
        assert cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1 == count
        assert mask[10:20, 10:20].all() == (piece == 100) and mask[12:18, 12:18].all()


def test_masks_are_as_checkpoint_and_flags_say(predict, tmp_path):
    """--threshold alone is P > T and no more; of several files the means count; odd numbers are refused in a line."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(80, 100)), (0, 0), 3)
    image = cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    probability = np.float32(image / 255)
    cv2.imwrite(str(tmp_path / "in/a.png"), image)
    tensors, _, metadata = checkpoint.read(tmp_path / "w.safetensors")
    del metadata["further"]
    checkpoint.write(tmp_path / "w.safetensors", tensors, metadata | {"threshold": 0.6, "grow": 0.3})
    checkpoint.write(tmp_path / "old.safetensors", tensors, metadata | {"threshold": 0.4})
    for flags, said, threshold, grow in (
        ((), "P > 0.6, grown into P > 0.3\n", 0.6, 0.3),
        (("--threshold", 0.6), "P > 0.6\n", 0.6, 0.6),
        (("--threshold", 0.7, "--grow", 0.2), "P > 0.7, grown into P > 0.2\n", 0.7, 0.2),
        (("--grow", 1), "P > 0.6\n", 0.6, 1),
        (("--checkpoint", "w.safetensors", "old.safetensors"), "P > 0.5, grown into P > 0.35\n", 0.5, 0.35),
    ):
        assert said in predict(*flags).stdout
        mask = cv2.imread(str(tmp_path / "out/a_mask.png"), -1)
        np.testing.assert_array_equal(mask, np.uint8(255) * find_mask(probability, threshold, grow))
    for wrong in ({"grow": "much"}, {"threshold": -1}, {"pixel_size": float("inf")}, {"pixel_size": 10**400}):
        checkpoint.write(tmp_path / "w.safetensors", tensors, metadata | wrong)
        assert "threshold or grow" in predict("--pixel_size", 4).stderr


def test_outline_and_scale_bar(tmp_path):
    """The outline is a line of two pixels where the mask ends; the bar is as long as it says."""
    mask = draw(tmp_path / "slice.png")
    image = read_slice(tmp_path / "slice.png")
    write_pictures(tmp_path / "a", image, mask * 1.0, mask, outline=True)
    outline = cv2.imread(str(tmp_path / "a_overlay.png"))
    ends = np.zeros(mask.shape, bool)
    for axis in (0, 1):
        change = np.diff(mask, axis=axis)
        ends |= np.insert(change, 0, False, axis) | np.insert(change, change.shape[axis], False, axis)
    np.testing.assert_array_equal(outline.max(2) > outline.min(2), ends)

    write_pictures(tmp_path / "a", image, mask * 1.0, mask, outline=True, pixel_size=4)
    drawn = (cv2.imread(str(tmp_path / "a_overlay.png")) != outline).any(2)
    assert drawn.any() and not drawn[:60].any() and not drawn[:, 90:].any()
    length = drawn[77:].sum(1).max()  # 120 pixels of 4 nm: 100 nm, in 25 pixels, with a rim
    assert 25 <= length <= 31
