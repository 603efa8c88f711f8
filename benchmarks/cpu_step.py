"""Time a training step and an inference of the U-Net on a CPU: OneFlow, its kernels here and PyTorch side by side.

    python3 -m venv benchmarks/.venv
    benchmarks/.venv/bin/pip install -r benchmarks/requirements.txt
    source env.sh
    python3 benchmarks/cpu_step.py
    python3 benchmarks/cpu_step.py --sizes 16x256x4 --rounds 15 --profile

Seven implementations of the net (bilinear=False): OneFlow's own kernels, cpu_kernels in float32 and in bfloat16, and
PyTorch in two memory layouts and both precisions (autocast), which runs the text of unet.py with `torch` for
`oneflow`. Each has a process of its own, all in memory at once. They take turns of two steps, of which the second is
timed (in a training a step follows a step too), so that whatever else happens on the machine meets all of them.
Seconds are medians over the rounds. Ratios are to PyTorch's better layout in the same precision. "convolutions" is the
part of a step that oneDNN's convolutions take, which run at the machine's peak: the floor. "others" is the share of
all cores' time that other processes had meanwhile; a calm machine has less than 3 %. Memory is the peak of the whole
process, libraries included. --profile adds what each primitive takes.
"""

import argparse
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from math import nan
from pathlib import Path
from statistics import median

import numpy as np  # the only package in PyTorch's environment too, where workers run this file

HERE = Path(__file__).resolve().parent
CORES = len(os.sched_getaffinity(0))
STOCK, FLOAT32, BFLOAT16 = "OneFlow", "cpu_kernels float32", "cpu_kernels bfloat16"
TORCH = [f"PyTorch{layout} {t}" for t in ("float32", "bfloat16") for layout in ("", " channels_last")]
NAMES = (STOCK, FLOAT32, BFLOAT16, *TORCH)
SIZES = "16x512x1 16x256x1 16x256x4 16x128x4 64x512x1 64x256x1 64x256x4 64x128x4"
TICKS = os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------ in a worker's process


def torch_unet():
    """The class UNet of unet.py, in PyTorch."""
    lines = (HERE.parent / "unet.py").read_text().splitlines()
    text = "\n".join(line for line in lines if "common" not in line)
    for word in ("import", "from"):
        text = text.replace(f"{word} oneflow", f"{word} torch")
    module = {"__name__": "unet"}
    exec(text, module)
    return module["UNet"]


def time_primitives(times):
    """Adds the seconds of each call of oneDNN to times[its name]."""
    from cpu_kernels import onednn

    run = onednn.Primitive.__call__

    def timed(primitive, arrays):
        began = time.perf_counter()
        run(primitive, arrays)
        times[primitive.name] += time.perf_counter() - began

    onednn.Primitive.__call__ = timed


def prepare(name, base_channels, side, batch):
    """The commands of a worker: {command: function without arguments -> dict}. The same images for all."""
    amp, times = name.endswith("bfloat16"), defaultdict(float)
    if name in TORCH:
        import torch as flow

        UNet, library = torch_unet(), f"PyTorch {flow.__version__}, {flow.get_num_threads()} threads"
    else:
        sys.path.insert(0, str(HERE.parent))
        os.environ.setdefault("ONEFLOW_VM_COMPUTE_ON_WORKER_THREAD", "0")  # as common/start.py does
        from unet import UNet

        import oneflow as flow

        library = f"OneFlow {flow.__version__}"
    flow.manual_seed(0)
    rng = np.random.default_rng(0)
    x = flow.tensor(rng.standard_normal((batch, 1, side, side), np.float32))
    y = flow.tensor(rng.integers(0, 2, (batch, 1, side, side)).astype(np.float32))
    net = UNet(1, 1, bilinear=False, base_channels=base_channels)
    if name in (FLOAT32, BFLOAT16):
        from cpu_kernels import accelerate

        net = accelerate(net, amp)
        time_primitives(times)
    if "channels_last" in name:
        net, x = (each.to(memory_format=flow.channels_last) for each in (net, x))
    criterion, optimizer = flow.nn.BCEWithLogitsLoss(), flow.optim.Adam(net.parameters(), lr=1e-3)
    first, *_, last = net.parameters()

    def forward():
        if name not in TORCH:
            return net(x)
        with flow.autocast("cpu", flow.bfloat16, enabled=amp):
            return net(x)

    def train():
        net.train()
        loss = criterion(forward().to(y.dtype), y)
        loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter in (first, last):
            parameter.detach().numpy()  # OneFlow computes later: wait for it

    def predict():
        net.eval()
        with flow.no_grad():
            forward().to(y.dtype).numpy()

    def timed(function):
        def call():
            cpu = time.process_time()
            if name != STOCK:
                function()  # in a training a step follows a step: with warm caches and threads that are awake
            times.clear()
            wall = time.perf_counter()
            function()
            return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "times": times}

        return call

    def memory():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return {"memory": peak, "library": library}

    return {"step": timed(train), "inference": timed(predict), "memory": memory}


def work(name, *size):
    """Answer each line of stdin, a command, with a line of JSON, until stdin ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent, at once
    commands = prepare(name, *map(int, size))
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


# ------------------------------------------------------------------------- in the main process


def fail(message, code=2):
    print(f"\ncpu_step.py: {message}", file=sys.stderr)
    sys.exit(code)


def ask(name, worker, command):
    """Send a worker a command -> its answer, a dict. Ends the script if the worker has ended."""
    with suppress(BrokenPipeError):  # the end of its answers says so too
        worker.stdin.write(f"{command}\n".encode())
    answer = next((line for line in worker.stdout if line.startswith(b"{")), None)
    if answer is None:
        code = worker.wait()
        fail(f"the worker of {name} " + ("was killed, for want of memory?" if code == -9 else f"failed, {code}"), 1)
    return json.loads(answer)


def busy():
    """Seconds of CPU time that the whole machine has used."""
    user, nice, system, _idle, _wait, *more = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + sum(more[:3])) / TICKS


def measure(workers, command, size, args):
    """Let the workers take turns -> ({name: median seconds}, {name: median seconds of each primitive}, others)."""
    answers, began, used = defaultdict(list), time.perf_counter(), 0.0
    all_before = busy()
    for i in range(args.rounds + 2):
        for name, worker in workers.items():
            if name != STOCK or i <= args.stock_rounds:
                if sys.stderr.isatty():
                    print(f"\r\033[K{size} {command} {i}/{args.rounds}: {name}", end="", file=sys.stderr, flush=True)
                time.sleep(0.05)  # until the threads of the one before have stopped to spin
                answer = ask(name, worker, command)
                used += answer["cpu"]
                answers[name].append(answer)
    others = max(0.0, busy() - all_before - used) / CORES / (time.perf_counter() - began)
    warm = {name: taken[1 if name == STOCK else 2 :] for name, taken in answers.items()}
    seconds = {name: median(answer["wall"] for answer in taken) for name, taken in warm.items()}
    primitives = {
        name: {key: median(answer["times"].get(key, 0) for answer in taken) for key in taken[0]["times"]}
        for name, taken in warm.items()
    }
    return seconds, primitives, others


def better(values, precision):
    """PyTorch's better layout in that precision, NaN without one."""
    return min((value for name, value in values.items() if name in TORCH and name.endswith(precision)), default=nan)


def show(size, title, values, primitives, args):
    """Print a line of a Markdown table of one quantity; primitives: of a step, to know the convolutions."""
    numbers = [f"{values.get(name, nan):.3g}" for name in args.implementations]
    floors = []
    for name, precision in ((FLOAT32, "float32"), (BFLOAT16, "bfloat16")):
        value = values.get(name, nan)
        numbers += [f"**{value / better(values, precision):.2f}**", f"{value / values.get(STOCK, nan):.3f}"]
        if primitives:
            floors += [f"{sum(v for key, v in primitives.get(name, {}).items() if key.startswith('convolution')):.3g}"]
    print(f"| {title} {size} | " + " | ".join(numbers + floors) + " |", flush=True)


def compare(size, args):
    with ExitStack() as stack:
        workers = {}
        for name in args.implementations:
            python = args.torch_python if name in TORCH else sys.executable
            command = [python, __file__, "--worker", name, *size.split("x")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            worker = stack.enter_context(subprocess.Popen(command, **pipes, start_new_session=True))
            stack.callback(worker.kill)
            workers[name] = worker
        about = {name: ask(name, worker, "memory") for name, worker in workers.items()}  # they have begun then
        step, step_primitives, step_others = measure(workers, "step", size, args)
        about = {name: ask(name, worker, "memory") for name, worker in workers.items()}
        inference, primitives, others = measure(workers, "inference", size, args)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    show(size, "step, s", step, step_primitives, args)
    show(size, "inference, s", inference, primitives, args)
    show(size, "memory, GB", {name: of["memory"] for name, of in about.items()}, {}, args)
    print(f"|  | others had {step_others:.1%} and {others:.1%} of the CPU time |", flush=True)
    if args.profile:
        for name in (FLOAT32, BFLOAT16):
            for key, seconds in sorted(step_primitives.get(name, {}).items(), key=lambda item: -item[1]):
                print(f"    {name} step: {key:30}{1000 * seconds:9.2f} ms")
    return dict.fromkeys(of["library"] for of in about.values())


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("--sizes", nargs="+", default=SIZES.split(), metavar="BxSxN", help=f"base channels, side, batch ({SIZES})")
    add("--rounds", type=int, default=5, help="steps to time, after two to warm up (5)")
    add("--stock_rounds", type=int, default=1, help="those of OneFlow's own slow kernels, after one (1)")
    add("--implementations", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    add("--torch_python", default=str(HERE / ".venv/bin/python"), help="the Python that has PyTorch (%(default)s)")
    add("--profile", action="store_true", help="what each primitive takes of a step")
    args = parser.parse_args()
    if not {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()):
        print("no bfloat16 in this CPU: it is left out")
        args.implementations = [name for name in args.implementations if not name.endswith("bfloat16")]
    for size in args.sizes:
        if len(size.split("x")) != 3 or not all(part.isdecimal() for part in size.split("x")):
            fail(f"--sizes {size}: write 16x256x4 for 16 channels, 4 images of 256 x 256 pixels")
    if set(TORCH) & set(args.implementations) and not os.access(args.torch_python, os.X_OK):
        fail(f"{args.torch_python}: no PyTorch there; the first lines of --help say how to get it")
    return args


def main():
    args = parse_args()
    cpu = Path("/proc/cpuinfo").read_text()
    flags = set(cpu.partition("flags")[2].split("\n")[0].split())
    isa = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    model = cpu.partition("model name")[2].split("\n")[0].strip("\t: ")
    family = ", ".join(f"{key} {cpu.partition(key)[2].split()[1]}" for key in ("cpu family", "model\t"))
    print(f"{model} ({family.replace(chr(9), '')}), {CORES} cores, {' '.join(isa)}")
    ratios = [f"{t} / {other}" for t in ("float32", "bfloat16") for other in ("PyTorch's better", "OneFlow")]
    heads = ["size", *args.implementations, *ratios, "convolutions float32", "convolutions bfloat16"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    libraries = {}
    for size in args.sizes:
        libraries |= compare(size, args)
    print("; ".join(libraries), f"; OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}", sep="")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        try:
            main()
        except KeyboardInterrupt:
            fail("interrupted", 130)
