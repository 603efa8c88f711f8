"""Train the U-Net for the same time in OneFlow with cpu_kernels.py and in PyTorch: who scores more?

    python3 -m venv benchmarks/.venv
    benchmarks/.venv/bin/pip install -r benchmarks/requirements.txt
    source env.sh
    python3 benchmarks/same_time.py --data_path data/train_image --val_count 5 --minutes 10

Both train the net of unet.py (bilinear=False) by the plain recipe with which this project began:
whole slices, one a step, flips, binary cross-entropy, Adam with a step size of 0.001. They start
from the same weights and see the slices in the same order, so they differ in speed and rounding
only. PyTorch runs the text of unet.py with `torch` for `oneflow`, in its faster memory layout,
channels last. They take turns of 20 seconds on all cores, so that both meet the same machine; a
turn ends with a step, and what it took too long the next one is shorter.

After each quarter of the time both predict the held-out slices, without flips and turns, and batch
normalisation takes each slice's own mean and variance, as in training: running averages of batches
of one slice are too noisy. So the scores don't compare with those in recipe.md.
"""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np  # the only package in PyTorch's environment too, where a worker runs this file
from cpu_step import torch_unet

HERE = Path(__file__).resolve().parent
TURN = 20  # seconds


def work(library, base_channels, seed, folder):
    """Answer each line of stdin, seconds to train or "predict", with a line of JSON."""
    if library == "PyTorch":
        import torch as flow

        UNet = torch_unet()
    else:
        sys.path.insert(0, str(HERE.parent))
        import dataloader  # noqa: F401, quiets the import of oneflow
        from cpu_kernels import accelerate
        from unet import UNet

        import oneflow as flow

    data = np.load(Path(folder) / "data.npz")
    net = UNet(1, 1, bilinear=False, base_channels=int(base_channels))
    weights = np.load(Path(folder) / "weights.npz")
    net.load_state_dict({name: flow.tensor(array) for name, array in weights.items()})
    if library == "PyTorch":
        net = net.to(memory_format=flow.channels_last)
    else:
        accelerate(net)
    optimizer = flow.optim.Adam(net.parameters(), lr=1e-3)
    criterion = flow.nn.BCEWithLogitsLoss()
    rng = np.random.default_rng(int(seed))
    order, steps, late = [], 0, 0
    for line in sys.stdin:
        if line == "predict\n":
            with flow.no_grad():  # and in training mode, see above
                images = (flow.tensor(image[None, None]) for image in data["val"])
                found = [flow.sigmoid(net(image)).numpy()[0, 0] for image in images]
            np.save(Path(folder) / library, found)
        else:
            end = time.monotonic() + float(line) - late
            while time.monotonic() < end:
                order = order or list(rng.permutation(len(data["image"])))
                pair = np.stack([data[name][order[-1]] for name in ("image", "label")])
                order.pop()
                for axis in (1, 2):
                    pair = np.flip(pair, axis) if rng.integers(2) else pair
                image, label = (flow.tensor(each[None, None].copy()) for each in pair)
                loss = criterion(net(image), label)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                loss.item()
                steps += 1
            late = time.monotonic() - end
        print(json.dumps(steps), flush=True)


def main():
    sys.path.insert(0, str(HERE.parent))
    import engine
    from dataloader import InputError, SelfDataSet
    from scores import best, evaluate
    from unet import UNet

    import oneflow as flow

    parser = engine.Parser(__doc__)
    add = parser.add_argument
    add("--data_path", default=HERE.parent / "data/train_image", help="slices, labels beside them")
    add("--val_count", type=engine.number(int, 1), default=5, help="the last N are held out (5)")
    add("--minutes", type=engine.number(float, 0, above=True), default=10, help="for each (10)")
    add("--base_channels", type=engine.number(int, 1), default=16, help="channels (16)")
    add("--seed", type=engine.number(int, 0), default=0, help="of weights and order (0)")
    python = HERE / ".venv/bin/python"
    add("--torch_python", type=Path, default=python, help="of an environment with PyTorch")
    args = parser.parse_args()
    if not args.torch_python.exists():
        raise InputError(f"{args.torch_python}: no such file, see --help for PyTorch")
    train_set = SelfDataSet(args.data_path, keep=slice(None, -args.val_count))
    val_set = SelfDataSet(args.data_path, keep=slice(-args.val_count, None))
    if not len(train_set):
        raise InputError(f"--val_count {args.val_count}: leaves no slice to train on")
    if len({*train_set.shapes, *val_set.shapes}) > 1:
        raise InputError(f"{args.data_path}: slices of several sizes, which this can't compare")
    engine.kept = "nothing was written"

    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        images, labels = (np.stack([pair[k][0] for pair in train_set]) for k in (0, 1))
        val = np.stack([image[0] for image, _ in val_set])
        np.savez(Path(folder) / "data.npz", image=images, label=labels, val=val)
        flow.manual_seed(args.seed)
        weights = UNet(1, 1, bilinear=False, base_channels=args.base_channels).state_dict()
        np.savez(Path(folder) / "weights.npz", **{n: w.numpy() for n, w in weights.items()})
        workers = {}
        for name, python in (("OneFlow", sys.executable), ("PyTorch", args.torch_python)):
            command = [python, __file__, "--worker", name, args.base_channels, args.seed, folder]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = subprocess.Popen([str(word) for word in command], text=True, **pipes)
            workers[name] = stack.enter_context(process)

        def ask(name, command):
            print(command, file=workers[name].stdin, flush=True)
            return json.loads(workers[name].stdout.readline())

        print("minutes  library      steps   V_Rand   V_Info   misclassification")
        seconds, turns = args.minutes * 60, []
        while sum(turns) < seconds:
            turns.append(min(TURN, seconds - sum(turns)))
        quarters = {round(len(turns) * quarter / 4) for quarter in (1, 2, 3, 4)}
        for i, turn in enumerate(turns, 1):
            # Who begins changes, so that neither always finds the caches as the other left them.
            steps = {name: ask(name, turn) for name in sorted(workers, reverse=i % 2 == 0)}
            if i not in quarters:
                continue
            for name in sorted(workers):
                ask(name, "predict")
                found = evaluate(
                    np.load(Path(folder) / f"{name}.npy"), [label[0] > 0.5 for _, label in val_set]
                )
                kinds = ("v_rand", "v_info", "pixel_misclassification")
                line = "   ".join(f"{best(found, kind)[0]:6.4f}" for kind in kinds)
                print(f"{sum(turns[:i]) / 60:7.1f}  {name:10}{steps[name]:8}   {line}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        sys.path.insert(0, str(HERE.parent))
        import engine

        engine.run(main)
