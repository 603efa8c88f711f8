"""Scores of the masks of slices as another microscope may show them: with other contrast, grain and focus.

    source env.sh
    python3 benchmarks/microscopes.py SLICES LABELS checkpoints/isbi2012.safetensors

Of several FILEs the mean counts; without --tta, interior is P > 0.6, grown into P > 0.2. Contrast is changed after
normalisation, which evens out a slice's own, as where membranes are darker, beside the rest, than those trained on.
Noise and blur have sigmas of 0.2 standard deviations and 0.7 pixels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import begin, start, tiles
from common.arguments import Parser
from common.cells import find_mask
from common.checkpoint import load_net
from common.images import normalise
from common.labels import judge, pair, read_label, read_pair
from common.scores import combine, count
from cpu_kernels import accelerate

import cv2
import numpy as np

VIEWS = {
    "as they are": lambda seen: seen,
    "contrast 0.8": lambda seen: seen * np.float32(0.8),
    "contrast 1.25": lambda seen: seen * np.float32(1.25),
    "noise": lambda seen: seen + np.random.default_rng(0).normal(0, 0.2, seen.shape).astype(np.float32),
    "blur": lambda seen: cv2.GaussianBlur(seen, (0, 0), 0.7),
}


def main():
    parser = Parser(__doc__)
    parser.add_argument("slices")
    parser.add_argument("labels")
    parser.add_argument("nets", nargs="+", metavar="FILE")
    parser.set_defaults(amp="auto", cpu_kernels="auto")  # as prediction does
    args = parser.parse_args()
    nets = []
    for path in args.nets:
        found, metadata = load_net(path)
        amp = begin.mixed_precision(args, "cpu", wanted=metadata.get("amp") is True)
        nets += [accelerate(net, amp) for net in (found if isinstance(found, list) else [found])]
    pairs = [(image[1:], label[1:]) for image, label in pair(args.slices, args.labels) if label]
    looks = [read_pair(*both) for both in pairs]
    values = judge(args.labels, [look for *_, look in looks])
    interiors = [read_label(*label, values) > 0 for _, label in pairs]
    print(f"{'':15} V_Rand  V_Info  misclassified")
    for name, view in VIEWS.items():
        tiles.normalise = lambda image, border, view=view: view(normalise(image, border))
        masks = [find_mask(tiles.predict(nets, image), 0.6, 0.2) for image, *_ in looks]
        counts = [count(mask, interior, [0.5]) for mask, interior in zip(masks, interiors, strict=True)]
        scores = [combine(counts)[score][0] for score in ("v_rand", "v_info", "pixel_misclassification")]
        print(f"{name:15}", *(f"{value:.4f} " for value in scores), flush=True)


if __name__ == "__main__":
    start.run(main)
