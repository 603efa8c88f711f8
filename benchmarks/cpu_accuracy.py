"""How exact are cpu_kernels.py and OneFlow's own kernels? Against float64 NumPy, and as a curve.

    source env.sh
    python3 benchmarks/cpu_accuracy.py --data_path data/train_image

Prints, for a U-Net of 16 base channels in training mode, the relative distances (L2 norm) of the
logits, of all gradients together and of the running statistics from those of a float64 reference
(tests/reference.py), median and largest of 12 seeds. Trains twice for 200 steps on the same random
crops, with and without the kernels, prints the losses and draws both curves into --chart.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import engine  # noqa: E402, quiets oneflow
from cpu_kernels import accelerate  # noqa: E402
from dataloader import SelfDataSet  # noqa: E402
from reference import Reference, Value, distance  # noqa: E402
from unet import UNet  # noqa: E402

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import oneflow as flow  # noqa: E402
from tqdm import tqdm  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

KINDS = ("OneFlow", "OneFlow, cpu_kernels")
STEPS = 200


def make_net(kind, seed):
    flow.manual_seed(seed)
    net = UNet(1, 1, bilinear=False, base_channels=16)
    return accelerate(net) if kind != "OneFlow" else net


def errors(kind, seed):
    """Relative distances from float64 of (logits, gradients, running statistics)."""
    net = make_net(kind, seed)
    rng = np.random.default_rng(seed)
    image, dy = rng.standard_normal((2, 1, 1, 128, 128)).astype(np.float32)
    reference, value = Reference(net.state_dict()), Value(image)
    expected = reference.unet(value, training=True)
    expected.backward(dy)
    logits = net(flow.tensor(image))
    (logits * flow.tensor(dy)).sum().backward()

    def together(arrays):
        return np.concatenate([np.ravel(array) for array in arrays])

    gradients = together(p.grad.numpy() for _, p in net.named_parameters())
    wanted = together(reference.parameters[n].gradient for n, _ in net.named_parameters())
    buffers = together(buffer.numpy() for _, buffer in net.named_buffers())
    wanted_buffers = together(reference.buffers[n] for n, _ in net.named_buffers())
    return (
        distance(logits.numpy(), expected.array),
        distance(gradients, wanted),
        distance(buffers, wanted_buffers),
    )


def curve(kind, data_path):
    """Losses of STEPS training steps on crops of 256 pixels, a slice each."""
    net = make_net(kind, seed=0)
    optimizer = flow.optim.Adam(net.parameters(), lr=1e-3)
    criterion = flow.nn.BCEWithLogitsLoss()
    slices = SelfDataSet(data_path, augment=["flip", "rotate"], crop=256)
    losses = []
    for step in tqdm(range(STEPS), desc=kind, leave=False, disable=None):
        slices.epoch = step // len(slices)
        image, label = (flow.tensor(a[None]) for a in slices[step % len(slices)])
        loss = criterion(net(image), label)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return np.array(losses)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", default="data/train_image", help="labelled slices")
    parser.add_argument("--chart", default="cpu_accuracy.png", help="the curves")
    args = parser.parse_args()

    print("| distance from float64 | logits | gradients | running statistics |")
    print("| --- | --- | --- | --- |")
    for kind in KINDS:
        distances = [errors(kind, seed) for seed in range(12)]
        middle, worst = np.median(distances, axis=0), np.max(distances, axis=0)
        cells = [f"{m:.0e} ({w:.0e})" for m, w in zip(middle, worst, strict=True)]
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)

    losses = {kind: curve(kind, args.data_path) for kind in KINDS}
    stock, fast = losses.values()
    print("step, loss of OneFlow, of cpu_kernels")
    for step in (1, 2, 5, 10, 20, 50, 100, 150, 200):
        print(f"{step:4d} {stock[step - 1]:.6f} {fast[step - 1]:.6f}")
    print(f"mean of the last 50 steps: {stock[-50:].mean():.4f} and {fast[-50:].mean():.4f}")

    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    for kind, style in zip(KINDS, ("-", "--"), strict=True):
        axes.plot(range(1, STEPS + 1), losses[kind], style, linewidth=1, label=kind)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.chart, dpi=150)
    print(f"{args.chart}: both curves")


if __name__ == "__main__":
    engine.run(main)
