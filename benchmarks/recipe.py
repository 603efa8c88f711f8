"""Train by a variant of the recipe and score it on held-out slices: a row of benchmarks/recipe.md.

    source env.sh
    python3 benchmarks/recipe.py --name recipe --epochs 50
    python3 benchmarks/recipe.py --name elastic --epochs 50 --augment flip rotate elastic
    python3 benchmarks/recipe.py --name smoothing --epochs 15 --dropout 0 --smoothing 0.1

Takes the flags of TrainUnetDataSet.py that say how to train (not --resume), whose defaults are the
recipe, and besides those below, for what was tried and not kept. The last five slices of
--data_path are held out (--val_count; or --val_path), and scored after the last epoch, without and
with the 8 flips and turns averaged (--tta). A score is printed as BEST (the threshold where it is
best; the score at 0.5). A second row is for slices continued by mirrored pixels (--mirror 32).
Nothing is written but the rows.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
from cpu_kernels import accelerate
from dataloader import InputError, SelfDataSet
from predict_unet_test import predict_mirrored, predict_symmetries, predict_tiled
from scores import THRESHOLDS, best, evaluate
from unet import UNet

import numpy as np
import oneflow as flow
from oneflow import nn, optim
from oneflow.utils.data import DataLoader, RandomSampler

MIRROR = 32  # pixels


def parse_args():
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--name", default="recipe", help="what the row is called")
    add("--optimizer", choices=("adam", "adamw", "sgd"), default="adam", help="sgd: momentum 0.99")
    add("--weight_decay", type=float, default=0.01, help="of adamw")
    add("--smoothing", type=float, default=0, help="labels E/2 and 1 - E/2 for 0 and 1")
    add("--dice", type=float, default=0, help="how much the Dice loss of the membrane counts")
    add("--balance", type=float, default=0, help="times that membrane counts in the loss")
    add("--average", type=float, default=0, help="decay of averaged weights, which get rows too")
    add("--plateau", type=int, default=0, help="step size x 0.3 after N epochs of no lower loss")
    add("--intensity", action="store_true", help="vary brightness, contrast and gamma")
    own, rest = parser.parse_known_args()
    if {"-h", "--help"} & set(rest):
        print(__doc__, parser.format_help(), sep="\n")
        sys.exit()
    if not any(word.split("=")[0] in ("--val_count", "--val_path") for word in rest):
        rest += ["--val_count", "5"]
    args = engine.parse_args(__doc__, rest)
    if args.resume or not (args.val_path or args.val_count):
        raise InputError("leave out --resume and --val_count 0: a row scores a whole training")
    return own, args


class VaryingIntensity(SelfDataSet):
    def __getitem__(self, index):
        image, *others = super().__getitem__(index)
        rng = np.random.default_rng((self.seed, self.epoch, index, 1))
        # A curve through the darkest and the lightest value, then contrast and brightness.
        low, span = image.min(), np.ptp(image)
        image = low + span * ((image - low) / span) ** rng.lognormal(0, 0.2)
        image = image * rng.uniform(0.8, 1.2) + rng.uniform(-0.2, 0.2)
        return image.astype(np.float32), *others


def loss_function(own):
    """(logits, label) -> loss of each pixel, all (N, 1, H, W)."""
    cross_entropy = nn.BCEWithLogitsLoss(reduction="none")

    def loss(logits, label):
        target = label * (1 - own.smoothing) + own.smoothing / 2
        value = cross_entropy(logits, target)
        if own.balance:
            value = value * (1 + (own.balance - 1) * (1 - label))
        if own.dice:
            found, membrane = 1 - flow.sigmoid(logits), 1 - label
            both = 2 * (found * membrane).sum() + 1
            value = value + own.dice * (1 - both / (found.sum() + membrane.sum() + 1))
        return value

    return loss


def average_weights(net, optimizer, decay):
    """After each step of the optimizer, let an average follow the net's state; returns it."""
    state = net.state_dict()
    average = {name: x.numpy().copy() for name, x in state.items() if x.dtype == flow.float32}
    step = optimizer.step

    def step_and_follow():
        step()
        state = net.state_dict()
        for name, value in average.items():
            value += (1 - decay) * (state[name].numpy() - value)

    optimizer.step = step_and_follow
    return average


def main():
    own, args = parse_args()
    train_set, val_set = engine.data_sets(args)
    if own.intensity:
        train_set.__class__ = VaryingIntensity
    device = engine.start(args)
    net = UNet(1, 1, args.bilinear, args.base_channels, args.dropout).to(device)
    if args.cpu_kernels == "auto":
        accelerate(net)
    kinds = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}
    more = {"adam": {}, "adamw": {"weight_decay": own.weight_decay}, "sgd": {"momentum": 0.99}}
    optimizer = kinds[own.optimizer](net.parameters(), lr=args.lr, **more[own.optimizer])
    if own.average:
        average = average_weights(net, optimizer, own.average)
    loader = DataLoader(
        train_set,
        args.batch_size,
        sampler=RandomSampler(train_set),
        num_workers=args.num_workers,
    )
    schedule = engine.learning_rate_schedule(args, optimizer, len(loader), 1)
    criterion = loss_function(own)
    lowest, since = math.inf, 0

    def step(image, label, weight):
        losses = (criterion(net(image), label) * weight).mean((1, 2, 3))  # of each slice
        losses.mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return losses

    began, cpu = time.monotonic(), time.process_time()
    for epoch in range(1, args.epochs + 1):
        engine.seed_epoch(args.seed, epoch)
        train_set.epoch = epoch
        loss, *_ = engine.train_one_epoch(net, loader, step, device, epoch)
        print(f"epoch {epoch}: {loss:.4f}", file=sys.stderr, flush=True)
        lowest, since = (loss, 0) if loss < lowest else (lowest, since + 1)
        if own.plateau and since == own.plateau:
            schedule.base_lrs = [lr * 0.3 for lr in schedule.base_lrs]
            since = 0
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu

    labels = [label[0] > 0.5 for _, label in val_set]
    scores = "V_Rand | V_Info | misclassification"
    print(f"| variant | seed | steps | s | CPU s | {scores} | --tta: {scores} |")
    net.eval()
    for averaged in (False, True)[: 2 if own.average else 1]:
        if averaged:
            state = {key: flow.tensor(value) for key, value in average.items()}
            net.load_state_dict(net.state_dict() | state)
        for mirror in (0, MIRROR):
            name = own.name + ", averaged" * averaged + f", --mirror {mirror}" * bool(mirror)
            cells = [name, args.seed, args.epochs * len(loader), f"{seconds:.0f}", f"{cpu:.0f}"]
            for run in (predict_tiled, predict_symmetries):
                images = (image[0] for image, _ in val_set)
                found = [predict_mirrored(net, image, device, 0, mirror, run) for image in images]
                found = evaluate(found, labels)
                for kind in ("v_rand", "v_info", "pixel_misclassification"):
                    value, threshold = best(found, kind)
                    (middle,) = found[kind][THRESHOLDS == 0.5]
                    cells.append(f"{value:.4f} ({threshold:.1f}; {middle:.4f})")
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    engine.run(main)
