"""Time a training step of graph_train.py beside the eager one of TrainUnetDataSet.py.

    source env.sh
    python3 benchmarks/graph_step.py
    python3 benchmarks/graph_step.py --base_channels 64 --crop 512 --batch_size 1 --rounds 3
    python3 benchmarks/graph_step.py --device cuda --base_channels 64 --batch_size 16

Eager with OneFlow's own kernels, eager with cpu_kernels.py (on a CPU), the graph, and the graph in
mixed precision (on a GPU), in one process. They take turns step by step, so that whatever else
happens on the machine meets all of them; ratios of medians are to the eager step of OneFlow's own
kernels. The first call of a graph compiles it, which is timed apart.
"""

import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
from cpu_kernels import accelerate
from graph_train import TrainGraph
from unet import UNet

import numpy as np
import oneflow as flow
from oneflow import nn, optim


def contestant(name, args, device):
    """A function that makes one training step of the implementation and waits for its end."""
    flow.manual_seed(0)
    rng = np.random.default_rng(0)
    shape = (args.batch_size, 1, args.crop, args.crop)
    image = flow.tensor(rng.normal(size=shape).astype(np.float32)).to(device)
    label = (image > 0).to(flow.float32)
    net = UNet(1, 1, bilinear=False, base_channels=args.base_channels).to(device)
    if name == "eager, cpu_kernels":
        accelerate(net)
    optimizer = optim.Adam(net.parameters(), lr=1e-3)
    criterion = nn.BCEWithLogitsLoss(reduction="none")
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, 10_000)
    first, *_, last = net.parameters()

    def eager(image, label, weight):
        losses = (criterion(net(image), label) * weight).mean((1, 2, 3))
        losses.mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return losses

    step = eager
    if name.startswith("graph"):
        count = flow.zeros(1, dtype=flow.int64)
        step = TrainGraph(net, criterion, optimizer, schedule, count, name == "graph, AMP")

    def timed():
        began = time.perf_counter()
        step(image, label, flow.ones_like(label)).numpy()
        for parameter in (first, last):
            parameter.detach().cpu().numpy()  # OneFlow computes later: wait for it
        return time.perf_counter() - began

    return timed


def main():
    parser = engine.Parser(__doc__)
    add = parser.add_argument
    positive = engine.number(int, 1)
    add("--base_channels", type=positive, default=16, help="channels of the first level (16)")
    add("--crop", type=engine.number(int, 32), default=256, help="side in pixels (256)")
    add("--batch_size", type=positive, default=4, help="(4)")
    add("--rounds", type=positive, default=10, help="steps of each that count (10)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    device = engine.pick_device(args.device)
    names = ["eager", "graph", "graph, AMP" if device == "cuda" else "eager, cpu_kernels"]
    engine.kept = "nothing was written"
    steps = {name: contestant(name, args, device) for name in names}
    first = {name: steps[name]() for name in names}
    times = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            times[name].append(steps[name]())
    print(
        f"{device}, {args.base_channels} channels, {args.batch_size} of {args.crop} x {args.crop}"
    )
    print("| | median step, s | to eager | first step, s |\n| --- | --- | --- | --- |")
    for name in names:
        seconds = median(times[name])
        ratio = seconds / median(times["eager"])
        print(f"| {name} | {seconds:.3g} | {ratio:.3f} | {first[name]:.3g} |")


if __name__ == "__main__":
    engine.run(main)
