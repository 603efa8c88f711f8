"""Put several trained nets into one file of weights, whose probabilities prediction averages.

    source env.sh
    python3 benchmarks/box.py boxed.safetensors --threshold 0.45 --grow 0.2 seed0.safetensors seed1.safetensors

Convolutions are kept in half precision, so a net of 16 channels takes 4 MB. A FILE may have several. What is known of
the training is taken from the first one; what only resuming needs is left out.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import checkpoint, start
from common.arguments import InputError, Parser, number

KEPT = ["model", "normalisation", "arguments", "epoch", "amp", "synthetic", "versions", "pixel_size"]


def main():
    parser = Parser(__doc__)
    parser.add_argument("out")
    parser.add_argument("nets", nargs="+", metavar="FILE")
    parser.add_argument("--threshold", type=number(float, 0, 1), required=True, help="of the mask: interior is P > T")
    parser.add_argument("--grow", type=number(float, 0, 1), help="and grows into P > G (default: it does not)")
    args = parser.parse_args()
    nets, metadata, tensors = [], {}, {}
    mask = {"threshold": args.threshold, "grow": args.threshold if args.grow is None else args.grow}
    for path in args.nets:
        net, _, of_net = checkpoint.read(path)
        nets += [net, *of_net["further"].values()]
        metadata = metadata or {key: of_net[key] for key in KEPT if key in of_net} | mask
        if of_net.get("pixel_size", 4) != metadata.get("pixel_size", 4):
            raise InputError(f"{path}: knows pixels of another size than {args.nets[0]}")
    for number_of_net, net in enumerate(nets):
        for name, array in net.items():
            key = f"further.{number_of_net}.{name}" if number_of_net else name
            tensors[key] = array.astype(np.float16) if array.ndim == 4 else array
    checkpoint.write(args.out, tensors, metadata)


if __name__ == "__main__":
    start.run(main)
