"""How exact are the CPU kernels? Distances from float64 NumPy, beside OneFlow's own kernels and PyTorch's.

    source env.sh
    python3 benchmarks/cpu_accuracy.py

For a U-Net of 16 channels in training mode and random images of 128 x 128 pixels: the relative distances (L2 norm) of
the logits, of all gradients together and of the running statistics from those of tests/reference.py, median and
(largest) of 12 seeds. PyTorch, in bfloat16 by autocast, runs in its own environment, see cpu_step.py.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE)]
import numpy as np  # noqa: E402
from cpu_step import BFLOAT16, FLOAT32, STOCK, TORCH, torch_unet  # noqa: E402

NAMES = (STOCK, FLOAT32, TORCH[1], BFLOAT16, TORCH[3])
SEEDS = 12


def compute(name, folder):
    """Write what an implementation computes from the weights and images in the folder, seed by seed."""
    amp = name.endswith("bfloat16")
    if name in TORCH:
        import torch as flow

        UNet = torch_unet()
    else:
        from unet import UNet

        import oneflow as flow
    for seed in range(SEEDS):
        given = dict(np.load(f"{folder}/{seed}.npz"))
        image, dy = given.pop("image"), given.pop("dy")
        net = UNet(1, 1, bilinear=False, base_channels=16)
        net.load_state_dict({key: flow.tensor(value) for key, value in given.items()})
        if name in (FLOAT32, BFLOAT16):
            from cpu_kernels import accelerate

            accelerate(net, amp)
        if name in TORCH:
            with flow.autocast("cpu", flow.bfloat16, enabled=amp):
                logits = net(flow.tensor(image)).float()
        else:
            logits = net(flow.tensor(image))
        (logits * flow.tensor(dy)).sum().backward()
        gradients = np.concatenate([p.grad.numpy().ravel() for _, p in net.named_parameters()])
        buffers = np.concatenate([np.ravel(buffer.numpy()) for _, buffer in net.named_buffers()])
        np.savez(f"{folder}/{name} {seed}.npz", logits.detach().numpy(), gradients, buffers)


def expect(folder):
    """Write weights and images for each seed; returns what float64 makes of them."""
    from reference import Reference, Value
    from unet import UNet

    import oneflow as flow

    wanted = []
    for seed in range(SEEDS):
        flow.manual_seed(seed)
        net = UNet(1, 1, bilinear=False, base_channels=16)
        image, dy = np.random.default_rng(seed).standard_normal((2, 1, 1, 128, 128)).astype(np.float32)
        state = {key: tensor.numpy().copy() for key, tensor in net.state_dict().items()}
        np.savez(f"{folder}/{seed}.npz", image=image, dy=dy, **state)
        reference, value = Reference(net.state_dict()), Value(image)
        logits = reference.unet(value, training=True)
        logits.backward(dy)
        gradients = np.concatenate([reference.parameters[n].gradient.ravel() for n, _ in net.named_parameters()])
        buffers = np.concatenate([np.ravel(reference.buffers[n]) for n, _ in net.named_buffers()])
        wanted.append((logits.array, gradients, buffers))
    return wanted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    python = str(HERE / ".venv/bin/python")
    parser.add_argument("--torch_python", default=python, help="the Python that has PyTorch (%(default)s)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return compute(*args.worker)
    if not os.access(args.torch_python, os.X_OK):
        sys.exit(f"{args.torch_python}: no PyTorch there; cpu_step.py --help says how to get it")
    from reference import distance

    with tempfile.TemporaryDirectory() as folder:
        wanted = expect(folder)
        print("| distance from float64 | logits | gradients | running statistics |\n| --- | --- | --- | --- |")
        for name in NAMES:
            interpreter = args.torch_python if name in TORCH else sys.executable
            subprocess.run([interpreter, __file__, "--worker", name, folder], check=True)
            found = [np.load(f"{folder}/{name} {seed}.npz").values() for seed in range(SEEDS)]
            distances = [list(map(distance, *pair)) for pair in zip(found, wanted, strict=True)]
            middle, worst = np.median(distances, axis=0), np.max(distances, axis=0)
            cells = [f"{m:.1e} ({w:.1e})" for m, w in zip(middle, worst, strict=True)]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
