"""Time training over processes, threads, batches and loading workers, and what each step waits for.

    source env.sh
    python3 benchmarks/scaling.py
    python3 benchmarks/scaling.py --base_channels 64 --batch_size 1 --rounds 1 --plot /tmp/wide.png
    python3 benchmarks/scaling.py --device cuda --processes 1 2 4 8 --threads 4 --batch_size 16

Trains on generated slices as ddp_train.py does, with flips, turns, elastic deformation and border
weights, by each number of processes, threads of a process, slices of a process' batch and loading
workers for which there are cores. Settings take turns, in rounds; the table has medians. Of a step

- `loading` is how long it waits for its slices,
- `computing` is a step of a net of the same kind that isn't wrapped by DistributedDataParallel,
- `synchronising` is how much longer the wrapped net's step takes than that, waiting included.

The steps of both nets alternate. `to one process` is the images a second of all processes, over
those of one process with the most threads of --threads, with the same batch and workers.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
from cpu_kernels import accelerate
from dataloader import AUGMENTATIONS, InputError, SelfDataSet
from unet import UNet

import cv2
import matplotlib.pyplot as plt
import numpy as np
from oneflow import nn, optim
from oneflow.nn.parallel import DistributedDataParallel
from oneflow.utils.data import DataLoader
from oneflow.utils.data.distributed import DistributedSampler

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("computing", "synchronising", "loading")


def parse_args(argv=None):
    parser = engine.Parser(__doc__)
    add, positive = parser.add_argument, engine.number(int, 1)
    add("--processes", type=positive, nargs="+", default=[1, 2], help="(1 2)")
    add("--threads", type=positive, nargs="+", default=[1, 2], help="of each process (1 2)")
    add("--batch_size", type=positive, nargs="+", default=[1, 4], help="of each process (1 4)")
    add("--num_workers", type=engine.number(int, 0), nargs="+", default=[0, 1], help="(0 1)")
    add("--base_channels", type=positive, default=16, help="channels of the first level (16)")
    add("--crop", type=engine.number(int, 32), default=256, help="side in pixels (256)")
    add("--steps", type=positive, default=6, help="of each net in a round (6)")
    add("--rounds", type=positive, default=3, help="(3)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--plot", default=ROOT / "docs/scaling.png", help="(docs/scaling.png)")
    add("--slices", help="for the processes that this script starts")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------ in a worker's process


def work(args):
    """Train, and print the mean seconds of a step's parts over all processes, as JSON."""
    device = engine.pick_device(args.device)
    data_set = SelfDataSet(
        args.slices,
        augment=AUGMENTATIONS,
        crop=args.crop,
        border_weight=10,
        repeat=1000,
    )
    loader = DataLoader(
        data_set,
        args.batch_size[0],
        sampler=DistributedSampler(data_set),
        num_workers=args.num_workers[0],
    )
    criterion = nn.BCEWithLogitsLoss(reduction="none")

    def trainer(wrap):
        net = UNet(1, 1, bilinear=False, base_channels=args.base_channels).to(device)
        net = wrap(accelerate(net))
        optimizer = optim.Adam(net.parameters(), lr=1e-3)
        first, *_, last = net.parameters()

        def step(image, label, weight):
            began = time.perf_counter()
            (criterion(net(image), label) * weight).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for parameter in (first, last):
                parameter.detach().cpu().numpy()  # OneFlow computes later: wait for it
            return time.perf_counter() - began

        return step

    alone = trainer(lambda net: net)
    together = trainer(DistributedDataParallel) if engine.WORLD_SIZE > 1 else alone
    batches = iter(loader)
    seconds = []
    for _ in range(2 + args.steps):
        began = time.perf_counter()
        batch = next(batches)
        loading = time.perf_counter() - began
        batch = [part.to(device) for part in batch]
        computing = alone(*batch)
        seconds.append((computing, together(*batch) - computing, loading))
    seconds = np.mean(seconds[2:], axis=0)  # the first two of each find no memory to use again
    seconds = np.array(engine.sum_over_ranks(*seconds)) / engine.WORLD_SIZE
    if engine.WORLD_SIZE == 1:
        seconds[1] = 0  # noise
    if engine.RANK == 0:
        print(json.dumps(seconds.tolist()), flush=True)


# ------------------------------------------------------------------------- in the main process


def write_slices(folder, side):
    """Generated slices with labels, in the manner of cells: noise, blurred and cut at its mean."""
    rng = np.random.default_rng(0)
    for name in ("train_image", "train_label"):
        (folder / name).mkdir()
    for i in range(20):
        distance = np.abs(cv2.GaussianBlur(rng.normal(size=(side, side)), (0, 0), 12))
        label = distance > np.quantile(distance, 0.2)
        image = 90 + 90 * label + rng.normal(0, 25, label.shape)
        cv2.imwrite(str(folder / f"train_label/{i}.png"), label.astype(np.uint8) * 255)
        cv2.imwrite(str(folder / f"train_image/{i}.png"), np.clip(image, 0, 255).astype(np.uint8))


def measure(setting, args, slices):
    """One job of a setting -> seconds of a step's parts, a list in the order of PARTS."""
    processes, threads, batch, workers = setting
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "oneflow.distributed.launch", "--nproc_per_node", processes]
        command += ["--master_port", 29511]
    command += [__file__, "--slices", slices, "--batch_size", batch, "--num_workers", workers]
    for name in ("base_channels", "crop", "steps", "device"):
        command += [f"--{name}", getattr(args, name)]
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("[")), None)
    if done.returncode or line is None:
        raise InputError(f"a job of {processes} processes failed: {done.stderr.strip()[-300:]}")
    return json.loads(line)


def plot(names, seconds, images, path):
    """Bars: of each setting, the milliseconds of an image, by what they went to."""
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(names) + 1.5), layout="constrained")
    left = np.zeros(len(names))
    for part, values in zip(PARTS, np.transpose(seconds), strict=True):
        width = 1000 * values / images
        axes.barh(names, width, left=left, label=part)
        left += width
    axes.invert_yaxis()
    axes.set_xlabel("ms per image (all processes together)")
    axes.legend()
    figure.savefig(path, dpi=110)


def main():
    args = parse_args()
    if args.slices:
        work(args)
        return
    cores = len(os.sched_getaffinity(0))
    device = engine.pick_device(args.device)
    settings = [
        setting
        for setting in itertools.product(
            args.processes, args.threads, args.batch_size, args.num_workers
        )
        if device == "cuda" or setting[0] * setting[1] <= cores
    ]
    if not settings:
        raise InputError(f"--processes and --threads: all take more than the {cores} cores here")
    engine.kept = "nothing was written"
    found = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory() as folder:
        write_slices(Path(folder), 2 * args.crop)
        for _ in range(args.rounds):
            for setting in settings:
                found[setting].append(measure(setting, args, f"{folder}/train_image"))
    print(f"{device}, {cores} cores, {args.base_channels} channels, squares of {args.crop}")
    print("| processes | threads | batch | workers | images/s | to one process", end="")
    print("".join(f" | {part}" for part in PARTS), "|")
    print("| --- " * 9 + "|")
    seconds = {setting: [median(p) for p in zip(*found[setting], strict=True)] for setting in found}
    speed = {(p, t, b, w): p * b / sum(seconds[p, t, b, w]) for p, t, b, w in settings}
    for setting in settings:
        whole = speed.get((1, max(args.threads), *setting[2:]))
        cells = [
            *setting,
            f"{speed[setting]:.3g}",
            f"{speed[setting] / whole:.2f}" if whole else "",
        ]
        total = sum(seconds[setting])
        cells += [f"{1000 * part:.0f} ms, {part / total:.1%}" for part in seconds[setting]]
        print("| " + " | ".join(map(str, cells)) + " |")
    names = [f"{p} x {t} threads, batch {b}, {w} workers" for p, t, b, w in settings]
    images = [p * b for p, _, b, _ in settings]
    plot(names, list(seconds.values()), np.array(images), args.plot)
    print(f"{args.plot} written")


if __name__ == "__main__":
    engine.run(main)
