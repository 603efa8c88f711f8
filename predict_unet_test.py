"""Predict membranes: a folder or stack of slices -> probabilities, masks and overlays.

    python3 predict_unet_test.py
    python3 predict_unet_test.py --Test_Data_path my_slices/ --save_res_path my_membranes/ --tta
    python3 predict_unet_test.py --Test_Data_path volume.tif --stack submission.tif

For each slice NAME it writes NAME_prob.png (P(interior), 0 to 255), NAME_mask.png (255 = interior,
0 = membrane) and NAME_overlay.png (the membrane drawn over the slice).
"""

from pathlib import Path

import engine
from cpu_kernels import accelerate
from dataloader import InputError, list_slices, normalise, read_slice
from unet import MIN_SIDE

import cv2
import numpy as np
import oneflow as flow
from tqdm import tqdm

# An aligned block of 16 pixels (one pixel of the coarsest level) depends on input up to 94 pixels
# around it. The margin is the next multiple of 16, so that the blocks of all tiles are aligned.
MARGIN = 96


def predict(net, image, device):
    """Normalised slice (H, W), float32 -> P(interior) (H, W), float32 in [0, 1]."""
    batch = flow.tensor(np.ascontiguousarray(image[None, None])).to(device)
    with flow.no_grad():
        return flow.sigmoid(net(batch)).numpy()[0, 0]


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
    padded = np.pad(image, ((MARGIN, bottom), (MARGIN, right)), mode="symmetric")
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


def overlay(image, mask):
    """Slice (H, W) of any depth and mask (H, W), bool -> uint8 (H, W, 3), membrane in orange."""
    low, high = np.percentile(image, (0.5, 99.5))
    grey = np.clip((image.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * 255
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    orange = np.array((0, 140, 255), np.float32)  # blue, green, red
    picture[~mask] = 0.5 * picture[~mask] + 0.5 * orange
    return picture.astype(np.uint8)


def write_png(path, image):
    engine.write_whole(path, cv2.imencode(".png", image)[1].tobytes())


def parse_args():
    parser = engine.Parser(__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        default="checkpoints/best.safetensors",
        help="weights (default: %(default)s)",
    )
    add("--Test_Data_path", default="data/test_image", help="slices (default: %(default)s)")
    add("--save_res_path", default="predict_image", help="output folder (default: %(default)s)")
    add("--stack", metavar="FILE.tif", help="write P(interior) as a float32 TIFF stack as well")
    add(
        "--threshold",
        type=engine.number(float, 0),
        help="interior is P > T (default: the checkpoint's, else 0.5)",
    )
    add("--tta", action="store_true", help="average 8 flips and turns: better, 8 times slower")
    add(
        "--tile",
        type=engine.number(int, 0),
        default=512,
        help="cut slices with a longer side into tiles of N pixels, a multiple of 16 from 208 on; "
        "0: never (default: 512)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    engine.add_cpu_kernels(parser)
    add("--trust_pickle", action="store_true", help="allow a flow.save folder, which runs code")
    args = parser.parse_args()
    if args.threshold is not None and args.threshold > 1:
        raise InputError(f"--threshold {args.threshold} is not between 0 and 1")
    if args.tile and (args.tile <= 2 * MARGIN or args.tile % 16):
        raise InputError(f"--tile {args.tile} is not 0 or a multiple of 16 above {2 * MARGIN}")
    return args


def main():
    args = parse_args()
    device = engine.pick_device(args.device)
    net, metadata = engine.net_of_checkpoint(args.checkpoint, args.trust_pickle)
    if (net.n_channels, net.n_classes) != (1, 1):
        raise InputError(
            f"{args.checkpoint}: a net of {net.n_channels} channels and {net.n_classes} classes, "
            "slices need one of each"
        )
    slices = list_slices(args.Test_Data_path)
    for _, file, page in slices:  # all of them, before hours of work
        if min(read_slice(file, page).shape) < MIN_SIDE:
            raise InputError(f"{file}: a side is under {MIN_SIDE} pixels")
    net = net.to(device).eval()
    if args.cpu_kernels == "auto":
        accelerate(net)
    threshold = args.threshold if args.threshold is not None else metadata.get("threshold", 0.5)
    folder = Path(args.save_res_path)
    if folder.resolve() == Path(args.Test_Data_path).resolve():
        raise InputError(f"{folder}: holds the slices, choose another --save_res_path")
    if args.stack:
        engine.check_output(args.stack)
    engine.make_folder(folder)

    probabilities = []
    engine.kept = f"the slices finished so far are in {folder}"
    run = predict_symmetries if args.tta else predict_tiled
    for name, file, page in tqdm(slices, desc="predict", leave=False, disable=None):
        image = read_slice(file, page)
        probability = run(net, normalise(image), device, args.tile)
        mask = probability > threshold
        write_png(folder / f"{name}_prob.png", np.rint(probability * 255).astype(np.uint8))
        write_png(folder / f"{name}_mask.png", mask.astype(np.uint8) * 255)
        write_png(folder / f"{name}_overlay.png", overlay(image, mask))
        if args.stack:
            probabilities.append(probability)
    if args.stack:
        # Uncompressed, since few programs read compressed floats.
        uncompressed = [cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_NONE]
        data = cv2.imencodemulti(".tif", probabilities, uncompressed)[1]
        engine.write_whole(args.stack, data.tobytes())
        print(f"{args.stack}: {len(slices)} slices, float32, 0 = membrane, 1 = interior")
    print(f"{len(slices)} slices: {folder}/NAME_prob.png, NAME_mask.png, NAME_overlay.png")


if __name__ == "__main__":
    engine.run(main)
