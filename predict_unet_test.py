"""Predict membranes: a folder or stack of slices -> probabilities, masks and overlays.

    python3 predict_unet_test.py
    python3 predict_unet_test.py --Test_Data_path my_slices/ --save_res_path my_membranes/ --tta
    python3 predict_unet_test.py --Test_Data_path volume.tif --stack submission.tif

For each slice NAME it writes NAME_prob.png (P(interior), 0 to 255), NAME_mask.png (255 = interior,
0 = membrane) and NAME_overlay.png (the membrane drawn over the slice); with --cells also
NAME_cells.png (16 bit, a number for each cell, 0 on the lines between them) and NAME_colours.png
(the cells coloured). The weights are those of your last training, else those in this repository.
"""

import math
import os
from contextlib import ExitStack
from pathlib import Path

import engine
from cpu_kernels import accelerate
from dataloader import InputError, list_slices, normalise, read_slice
from scores import thin
from unet import MIN_SIDE

import cv2
import numpy as np
import oneflow as flow
import tifffile
from tqdm import tqdm

OWN = Path("checkpoints/best.safetensors")
BOXED = Path(__file__).resolve().parent / "checkpoints/isbi2012.safetensors"

# An aligned block of 16 pixels (one pixel of the coarsest level) depends on input up to 94 pixels
# around it. The margin is the next multiple of 16, so that the blocks of all tiles are aligned.
MARGIN = 96


def predict(net, image, device):
    """Normalised slice (H, W), float32 -> P(interior) (H, W), float32 in [0, 1].

    Raises InputError where the net's weights lead to no number.
    """
    batch = flow.tensor(np.ascontiguousarray(image[None, None])).to(device)
    with flow.no_grad():
        probability = flow.sigmoid(net(batch)).numpy()[0, 0]
    if np.isnan(probability).any():
        raise InputError("the net's weights lead to no number: they are finite but far too large")
    return probability


def predict_tiled(net, image, device, tile):
    """As predict, in overlapping squares of `tile` pixels where a side is longer than that.

    Mirrored borders surround the slice, and of every tile only the middle is kept, which its edges
    don't reach. So the result is the whole slice's except near the slice's own edges, with a net
    of transposed convolutions; bilinear upsampling depends on the tile's size (aligned corners).
    """
    height, width = image.shape
    if tile == 0 or max(height, width) <= tile:
        return predict(net, image, device)
    step = tile - 2 * MARGIN
    bottom, right = -height % step + MARGIN, -width % step + MARGIN
    padded = np.pad(image, ((MARGIN, bottom), (MARGIN, right)), mode="reflect")
    probability = np.empty((height, width), np.float32)
    for top in range(0, height, step):
        for left in range(0, width, step):
            result = predict(net, padded[top : top + tile, left : left + tile], device)
            middle = result[MARGIN : MARGIN + step, MARGIN : MARGIN + step]
            middle = middle[: height - top, : width - left]
            probability[top : top + step, left : left + step] = middle
    return probability


def predict_symmetries(net, image, device, tile):
    """The mean of predict_tiled over the 8 symmetries of the square (test-time augmentation)."""
    total = np.zeros(image.shape, np.float32)
    for turns in range(4):
        for flip in (False, True):
            seen = np.rot90(image, turns)
            result = predict_tiled(net, np.fliplr(seen) if flip else seen, device, tile)
            total += np.rot90(np.fliplr(result) if flip else result, -turns)
    return total / 8


def predict_mirrored(net, image, device, tile, mirror, run=predict_tiled):
    """`run` of a slice that is continued by so many mirrored pixels on each side, as in the paper.

    Near its edges a net has seen too little of a cell to be sure; this gives it something to see.
    mirror: a multiple of 16. Slices that are cut into tiles are continued without it.
    """
    height, width = image.shape
    if not mirror or (tile and max(height, width) > tile):
        return run(net, image, device, tile)
    probability = run(net, np.pad(image, mirror, mode="reflect"), device, 0)
    return probability[mirror : mirror + height, mirror : mirror + width]


def paint(image, colours, where):
    """Slice (H, W) of any depth -> uint8 (H, W, 3), half covered by the colours at `where`.

    colours: (3,) or (H, W, 3), blue, green, red, from 0 to 255. where: (H, W), bool.
    """
    low, high = np.percentile(image, (0.5, 99.5))
    grey = np.clip((image.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * 255
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    colours = np.broadcast_to(np.float32(colours), picture.shape)
    picture[where] = 0.5 * picture[where] + 0.5 * colours[where]
    return picture.astype(np.uint8)


def colour_cells(cells):
    """Cells (H, W), integers -> uint8 (H, W, 3): successive numbers get hues far apart."""
    numbers = np.arange(cells.max() + 1)
    hues = numbers * 0.618034 % 1 * 180  # steps of the golden ratio; OpenCV's hues end at 180
    saturation, value = 150 + 35 * (numbers % 4), 255 - 40 * (numbers % 3)
    palette = np.stack((hues, saturation, value), axis=-1).astype(np.uint8)
    return cv2.cvtColor(palette[None], cv2.COLOR_HSV2BGR)[0][cells]


def write_png(path, image):
    with engine.write_whole(path) as file:
        file.write(cv2.imencode(".png", image)[1])


def write_slice(path, image, probability, threshold, with_cells):
    """Write the pictures of one slice as PATH_prob.png and so on; image is the raw slice (H, W)."""
    mask = probability > threshold
    write_png(f"{path}_prob.png", np.rint(probability * 255).astype(np.uint8))
    write_png(f"{path}_mask.png", mask.astype(np.uint8) * 255)
    orange = (0, 140, 255)
    write_png(f"{path}_overlay.png", paint(image, orange, ~mask))
    if with_cells:
        cells = thin(mask) * mask.any()  # thin() makes one cell of nothing
        write_png(f"{path}_colours.png", paint(image, colour_cells(cells), mask))
        if cells.max() > np.iinfo(np.uint16).max:  # specks: no number is better than a wrong one
            cells[cells > np.iinfo(np.uint16).max] = 0
            tqdm.write(f"{path}_cells.png: only the first 65535 of the cells have a number")
        write_png(f"{path}_cells.png", cells.astype(np.uint16))


def parse_args():
    parser = engine.Parser(__doc__)
    add = parser.add_argument
    path, default = engine.given_path, "(default: %(default)s)"
    weights = f"weights (default: {OWN}, else {BOXED.name}, of this repository)"
    add("--checkpoint", type=path, help=weights)
    add("--Test_Data_path", type=path, default="data/test_image", help=f"slices {default}")
    add("--save_res_path", type=path, default="predict_image", help=f"output folder {default}")
    add(
        "--stack",
        type=path,
        metavar="FILE.tif",
        help="write P(interior) as a float32 stack as well",
    )
    add(
        "--threshold",
        type=engine.number(float, 0, maximum=1),
        help="interior is P > T (default: the checkpoint's, else 0.5)",
    )
    add("--cells", action="store_true", help="number and colour the cells as well")
    add("--tta", action="store_true", help="average 8 flips and turns: better, 8 times slower")
    add(
        "--tile",
        type=engine.number(int, 0),
        default=512,
        help="cut slices with a longer side into tiles of N pixels, a multiple of 16 from 208 on; "
        "0: never (default: 512)",
    )
    add(
        "--mirror",
        type=engine.number(int, 0),
        default=0,
        help=f"continue slices by N mirrored pixels on each side, a multiple of 16 up to {MARGIN}: "
        "fewer wrong pixels near their edges (default: 0)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    engine.add_cpu_kernels(parser)
    add("--trust_pickle", action="store_true", help="allow a flow.save folder, which runs code")
    args = parser.parse_args()
    if args.tile and (args.tile <= 2 * MARGIN or args.tile % 16):
        raise InputError(f"--tile {args.tile} is not 0 or a multiple of 16 above {2 * MARGIN}")
    if args.mirror % 16 or args.mirror > MARGIN:
        raise InputError(f"--mirror {args.mirror} is not a multiple of 16 up to {MARGIN}")
    return args


def main():
    args = parse_args()
    device = engine.pick_device(args.device)
    if args.checkpoint is None:
        args.checkpoint = OWN if OWN.exists() or not BOXED.exists() else BOXED
        print(f"weights: {args.checkpoint}")
    net, metadata = engine.net_of_checkpoint(args.checkpoint, args.trust_pickle)
    if (net.n_channels, net.n_classes) != (1, 1):
        raise InputError(
            f"{args.checkpoint}: a net of {net.n_channels} channels and {net.n_classes} classes, "
            "slices need one of each"
        )
    slices = list_slices(args.Test_Data_path)
    shapes = []
    for _, file, page in slices:  # all of them, before hours of work
        shapes.append(read_slice(file, page).shape)
        if min(shapes[-1]) < MIN_SIDE:
            raise InputError(f"{file}: a side is under {MIN_SIDE} pixels")
        if args.stack and shapes[-1] != shapes[0]:
            raise InputError(f"{file}: is of another size than the first slice, leave out --stack")
    net = net.to(device).eval()
    if args.cpu_kernels == "auto":
        accelerate(net)
    threshold = args.threshold if args.threshold is not None else metadata.get("threshold", 0.5)
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise InputError(f"{args.checkpoint}: its threshold is no number from 0 to 1")
    folder = Path(args.save_res_path)
    if os.path.realpath(folder) == os.path.realpath(args.Test_Data_path):
        raise InputError(f"{folder}: holds the slices, choose another --save_res_path")
    if args.stack:
        engine.check_output(args.stack)
        if os.path.realpath(args.stack) in {os.path.realpath(file) for _, file, _ in slices}:
            raise InputError(f"--stack {args.stack}: is one of the slices, choose another name")
    engine.make_folder(folder)

    engine.kept = f"the slices finished so far are in {folder}"
    run = predict_symmetries if args.tta else predict_tiled
    with ExitStack() as open_files:
        if args.stack:
            file = open_files.enter_context(engine.write_whole(args.stack))
            # beyond what a plain TIFF's offsets reach
            big = 4 * len(shapes) * math.prod(shapes[0]) > 2**32 - 2**25
            stack = open_files.enter_context(tifffile.TiffWriter(file, bigtiff=big))
        for name, file, page in tqdm(slices, desc="predict", leave=False, disable=None):
            image = read_slice(file, page)
            seen = normalise(image)
            probability = predict_mirrored(net, seen, device, args.tile, args.mirror, run)
            write_slice(folder / name, image, probability, threshold, args.cells)
            if args.stack:
                stack.write(probability, photometric="minisblack", contiguous=False, metadata=None)
    if args.stack:
        print(f"{args.stack}: {len(slices)} slices, float32, 0 = membrane, 1 = interior")
    kinds = ("prob", "mask", "overlay") + ("cells", "colours") * args.cells
    print(f"{len(slices)} slices: {folder}/NAME_" + ".png, NAME_".join(kinds) + ".png")
    if not args.cells and any((folder / f"{name}_cells.png").exists() for name, *_ in slices):
        print(f"{folder}/NAME_cells.png and NAME_colours.png are older; --cells makes them anew")


if __name__ == "__main__":
    engine.run(main)
