"""Put several trained nets into one file of weights, whose probabilities prediction averages.

    source env.sh
    python3 benchmarks/box.py checkpoints/isbi2012.safetensors --threshold 0.5 seed0.safetensors seed1.safetensors

Convolutions are kept in half precision, so a net of 16 channels takes 4 MB. What is known of the training is taken from
the first file; what only resuming needs is left out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import checkpoint

KEPT = ["model", "normalisation", "arguments", "epoch", "amp", "synthetic", "versions"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("nets", nargs="+", metavar="FILE")
    parser.add_argument("--threshold", type=float, required=True, help="of the mask: interior is P > T")
    args = parser.parse_args()
    tensors, metadata = {}, {"threshold": args.threshold}
    for number, path in enumerate(args.nets):
        net, _, of_net = checkpoint.read(path)
        metadata |= {} if number else {key: of_net[key] for key in KEPT}
        for name, array in net.items():
            tensors[f"further.{number}.{name}" if number else name] = (
                array.astype(np.float16) if array.ndim == 4 else array
            )
    checkpoint.write(args.out, tensors, metadata)


if __name__ == "__main__":
    main()
