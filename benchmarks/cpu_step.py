"""Time a training step and an inference of the U-Net on a CPU: OneFlow and PyTorch side by side.

    python3 -m venv benchmarks/.venv
    benchmarks/.venv/bin/pip install -r benchmarks/requirements.txt
    source env.sh
    python3 benchmarks/cpu_step.py
    python3 benchmarks/cpu_step.py --base_channels 16 --sizes 256x1 --implementations PyTorch
    python3 benchmarks/cpu_step.py --scaling

Four implementations of the net (bilinear=False): OneFlow's own kernels, cpu_kernels.py, and PyTorch
in two memory layouts, which runs the text of unet.py with `torch` for `oneflow`. Each has a process
of its own, all in memory at once, and they take turns step by step, so that whatever else happens
on the machine meets all of them. A round in which the CPU time of one, over the time that passed,
is far below its usual (about the number of threads) was disturbed and is left out for all.

Ratios are to PyTorch's better layout, the one with the smaller median, and to OneFlow's kernels.
Peak memory is that of the whole process after training, libraries included.

--scaling times cpu_kernels.py on one thread, on all, and in two data-parallel processes instead.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from functools import partial
from math import nan
from pathlib import Path
from statistics import median

import numpy as np  # the only package in PyTorch's environment too, where workers run this file

HERE = Path(__file__).resolve().parent
CORES = len(os.sched_getaffinity(0))
NAMES = ("OneFlow", "OneFlow, cpu_kernels", "PyTorch", "PyTorch, channels_last")
STOCK, FAST, TORCH, CHANNELS_LAST = NAMES
QUANTITIES = {"step": "Training step, s", "inference": "Inference, s", "memory": "Peak memory, GB"}
CALM = 0.85  # of a worker's median CPU time over wall time; below it, the round was disturbed
DDP_STEPS = 3  # timed steps of a data-parallel launch, after one to warm up


# ------------------------------------------------------------------------ in a worker's process


def timed(function):
    """Decorator: the function returns the seconds that passed, and of CPU time of all threads."""

    def call():
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    return call


def torch_unet():
    """The class UNet of unet.py, in PyTorch."""
    text = (HERE.parent / "unet.py").read_text()
    for word in ("import", "from"):
        text = text.replace(f"{word} oneflow", f"{word} torch")
    module = {"__name__": "unet"}
    exec(text, module)
    return module["UNet"]


def prepare(name, base_channels, side, batch):
    """The commands of a worker: {command: function without arguments -> dict}.

    Images and labels (batch, 1, side, side) are the same for all implementations.
    """
    library, threads, accelerate = "OneFlow", os.environ.get("OMP_NUM_THREADS", "its default"), None
    if name in (TORCH, CHANNELS_LAST):
        import torch as flow

        library, threads, UNet = "PyTorch", flow.get_num_threads(), torch_unet()
    else:
        sys.path.insert(0, str(HERE.parent))
        import dataloader  # noqa: F401, quiets the import of oneflow
        from unet import UNet

        import oneflow as flow

        if name != STOCK:
            from cpu_kernels import THREADS as threads
            from cpu_kernels import accelerate

    flow.manual_seed(0)
    rng = np.random.default_rng(0)
    x = flow.tensor(rng.standard_normal((batch, 1, side, side), np.float32))
    y = flow.tensor(rng.integers(0, 2, (batch, 1, side, side)).astype(np.float32))
    net = UNet(1, 1, bilinear=False, base_channels=base_channels)
    net = accelerate(net) if accelerate else net
    if name == CHANNELS_LAST:
        net, x = (each.to(memory_format=flow.channels_last) for each in (net, x))
    if name == "ddp":
        from oneflow.nn.parallel import DistributedDataParallel

        net = DistributedDataParallel(net)
    criterion = flow.nn.BCEWithLogitsLoss()
    optimizer = flow.optim.Adam(net.parameters(), lr=1e-3)
    first, *_, last = net.parameters()

    @timed
    def train():
        net.train()
        loss = criterion(net(x), y)
        loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter in (first, last):
            parameter.detach().numpy()  # OneFlow computes later: wait for it

    @timed
    def predict():
        net.eval()
        with flow.no_grad():
            net(x).numpy()

    def memory():
        python = f"Python {platform.python_version()}, NumPy {np.__version__}"
        return {
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "versions": f"{python}, {library} {flow.__version__}",
            "threads": f"{threads} ({name})",
        }

    return {"train": train, "predict": predict, "memory": memory}


def work(name, *setting):
    """Answer each line of stdin, a command, with a line of JSON, until stdin ends.

    As "ddp", one of several processes, train at once; rank 0 prints medians.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent, at once
    commands = prepare(name, *map(int, setting))
    if name == "ddp":
        steps = [commands["train"]() for _ in range(1 + DDP_STEPS)][1:]
        if os.environ["RANK"] == "0":
            print(json.dumps({key: median(step[key] for step in steps) for key in steps[0]}))
        return
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


# ------------------------------------------------------------------------- in the main process


def fail(message, code=2):
    progress()
    print(f"cpu_step.py: {message}", file=sys.stderr)
    sys.exit(code)


def progress(text=""):
    """Show the text in place of the one before, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def start(stack, python, name, setting, **environment):
    """Start a worker that ends with the stack; python begins its command line."""
    command = [*python, __file__, "--worker", name, *map(str, setting)]
    process = subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        start_new_session=True,  # Ctrl-C is for the main process, which ends the others
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def ask(name, worker, command):
    """Send a worker a command -> its answer, a dict. Ends the script if the worker has ended."""
    with suppress(BrokenPipeError):  # the end of its answers says so too
        worker.stdin.write(f"{command}\n".encode())
    answer = next((line for line in worker.stdout if line.startswith(b"{")), None)
    if answer is None:
        code = worker.wait()
        why = "was killed, perhaps for want of memory" if code == -9 else f"failed, code {code}"
        fail(f"the worker of {name} {why}", 1)
    return json.loads(answer)


def measure(turns, what, args):
    """Let implementations take turns -> {name: (median seconds, median CPU/wall)}.

    turns: {name: function that does a step and returns its "wall" and "cpu" seconds}. Disturbed
    rounds don't count where an implementation has two others or more.
    """
    steps = {name: [] for name in turns}
    for i in range(args.rounds + 1):
        for name, turn in turns.items():
            if name != STOCK or i <= args.stock_rounds:
                progress(f"{what}, round {i} of {args.rounds}: {name}")
                step = turn()
                if i > 0:  # the first is to warm up
                    steps[name].append((step["wall"], step["cpu"] / step["wall"]))
    disturbed = set()
    for taken in steps.values():
        limit = CALM * median(busy for _, busy in taken)
        disturbed |= {i for i, (_, busy) in enumerate(taken) if busy < limit}
    progress()
    print(f"{what}: {len(disturbed)} of {args.rounds} rounds disturbed", flush=True)
    medians = {}
    for name, taken in steps.items():
        calm = [step for i, step in enumerate(taken) if i not in disturbed]
        seconds, busy = zip(*(calm if len(calm) > 1 else taken), strict=True)
        medians[name] = median(seconds), median(busy)
    return medians


def describe(base_channels, side, batch):
    return f"{base_channels} channels, {side}x{side}, batch {batch}"


def compare(args, setting):
    """Measure and print a setting, (base channels, side, batch).

    -> ({name: {"step": seconds, "inference": seconds, "memory": GB}}, versions and threads)
    """
    what = describe(*setting)
    with ExitStack() as stack:
        workers = {}
        for name in args.implementations:
            python = sys.executable if name in (STOCK, FAST) else str(args.torch_python)
            workers[name] = start(stack, [python], name, setting)

        def turns(command):
            return {name: partial(ask, name, workers[name], command) for name in workers}

        step = measure(turns("train"), f"{what}, training", args)
        about = {name: turn() for name, turn in turns("memory").items()}
        inference = measure(turns("predict"), f"{what}, inference", args)

    result = {}
    for name in workers:
        values = step[name][0], inference[name][0], about[name]["memory"]
        result[name] = dict(zip(QUANTITIES, values, strict=True))
    titles = "".join(f"{title:27}" for title in QUANTITIES.values())
    print(f"{'(/ PyTorch, / OneFlow)':24}{titles}CPU/wall of both")
    for name, values in result.items():
        line = f"{name:24}"
        for quantity, value in values.items():
            both = ", ".join(map(digits, ratios(result, name, quantity)))
            line += f"{digits(value):8}{f'({both})':19}"
        print(f"{line}{step[name][1]:.2f}, {inference[name][1]:.2f}")
    print(flush=True)
    versions = dict.fromkeys(of["versions"] for of in about.values())  # each once, in order
    return result, [*versions, "threads: " + ", ".join(of["threads"] for of in about.values())]


def ratios(result, name, quantity):
    """An implementation's quantity over [that of PyTorch's better layout, of stock OneFlow].

    For memory the better layout is the one with the faster step. NaN where one is missing.
    """
    by = "step" if quantity == "memory" else quantity
    layouts = [result[layout] for layout in (TORCH, CHANNELS_LAST) if layout in result]
    better = min(layouts, key=lambda values: values[by], default={})
    value = result.get(name, {}).get(quantity, nan)
    return [value / other.get(quantity, nan) for other in (better, result.get(STOCK, {}))]


def digits(value):
    return f"{value:#.3g}".rstrip(".").replace("nan", "-")


def markdown(results, names, quantity):
    """A table of one quantity for a README: a row for each setting of {setting: result}."""
    rows = [[QUANTITIES[quantity], *names, "cpu_kernels / PyTorch's better", "/ OneFlow"]]
    rows.append(["---"] * len(rows[0]))
    for setting, result in results.items():
        values = [result[name][quantity] for name in names] + ratios(result, FAST, quantity)
        rows.append([describe(*setting), *map(digits, values)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(results, names, chart):
    """Bars of the training steps over PyTorch's better layout; high ones of stock are cut off."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colours = {STOCK: "0.7", FAST: "C3", TORCH: "C0", CHANNELS_LAST: "lightskyblue"}
    heights = {name: [ratios(r, name, "step")[0] for r in results.values()] for name in names}
    top = 1.15 * max(max(heights[name]) for name in names if name != STOCK)
    size = max(7, 1.4 * len(results)), 4.5
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    width = 0.84 / len(names)
    for i, (name, values) in enumerate(heights.items()):
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(results))]
        shown = [min(value, top) for value in values]
        bars = axes.bar(places, shown, 0.92 * width, color=colours[name], label=name)
        labels = [f"{digits(value)}\n↑" if value > top else f"{value:.2f}" for value in values]
        axes.bar_label(bars, labels, padding=2, fontsize=7)
    axes.axhline(1, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xticks(range(len(results)), [describe(*s).replace(", ", "\n") for s in results])
    label = "time of a training step (lower is better),\nPyTorch's better layout = 1"
    axes.set(ylim=(0, 1.12 * top), ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(chart, dpi=150)


def scale(args, setting):
    """Print images a second of cpu_kernels on 1 thread, on all, and in 2 processes."""
    base_channels, side, batch = setting
    turns = {}
    with ExitStack() as stack:
        for threads in (1, CORES):
            name, threads = f"1 process, threads: {threads}", str(threads)
            worker = start(stack, [sys.executable], FAST, setting, OMP_NUM_THREADS=threads)
            turns[name] = partial(ask, name, worker, "train")
        turns["2 processes, threads: 1 each"] = partial(launch, (base_channels, side, batch // 2))
        medians = measure(turns, f"{describe(*setting)} in all, training", args)
    slowest = next(iter(medians.values()))[0]
    for name, (seconds, busy) in medians.items():
        speed = f"{digits(batch / seconds):>6} images/s, {slowest / seconds:.2f} times one thread"
        print(f"{name:30}{speed}, CPU/wall {busy:.2f}")


def launch(setting):
    """Medians of a step's "wall" and "cpu" seconds in rank 0 of two data-parallel processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "oneflow.distributed.launch", "--nproc_per_node=2", f"--master_port={port}"]
    with ExitStack() as stack:
        worker = start(stack, [sys.executable, *launcher], "ddp", setting, OMP_NUM_THREADS="1")
        medians = ask("two data-parallel processes", worker, "")
        worker.wait()  # so that nothing of it runs during the next step
    return medians


def number(text):
    """An argparse type: 1, 2, ..."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def size(text):
    """An argparse type: 256x4 -> (256, 4), side in pixels and batch."""
    side, batch = map(int, text.split("x"))
    if side < 32 or batch < 1:
        raise argparse.ArgumentTypeError(f"{text}: a side under 32 pixels, or no image")
    return side, batch


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("--base_channels", type=number, nargs="+", default=[64, 16], help="(default: 64 16)")
    sizes = [(512, 1), (256, 1), (256, 4), (128, 4)]
    default = "side x batch (default: 512x1 256x1 256x4 128x4, for --scaling 256x2)"
    add("--sizes", type=size, nargs="+", help=default)
    add("--rounds", type=number, default=5, help="steps to time, after one to warm up (5)")
    add("--stock_rounds", type=number, default=2, help="those of OneFlow's own slow kernels (2)")
    add("--implementations", nargs="+", choices=NAMES, default=NAMES, help="(default: all)")
    default = "the Python that has PyTorch (default: benchmarks/.venv/bin/python)"
    add("--torch_python", type=Path, default=HERE / ".venv/bin/python", help=default)
    add("--chart", type=Path, default="cpu_step.png", help="the picture (cpu_step.png)")
    add("--scaling", action="store_true", help="see above; takes the first of channels and sizes")
    args = parser.parse_args()
    args.sizes = args.sizes or ([(256, 2)] if args.scaling else sizes)
    args.implementations = [name for name in NAMES if name in args.implementations]
    args.with_torch = not args.scaling and bool({TORCH, CHANNELS_LAST} & {*args.implementations})
    if args.scaling and args.sizes[0][1] % 2:
        fail("--scaling halves the batch, which therefore has to be even")
    if not args.chart.parent.is_dir():
        fail(f"{args.chart}: no such folder to write to")
    if args.with_torch and not os.access(args.torch_python, os.X_OK):
        venv, requirements = (os.path.relpath(HERE / f) for f in (".venv", "requirements.txt"))
        how = f"python3 -m venv {venv} && {venv}/bin/pip install -r {requirements}"
        fail(f"{args.torch_python}: no Python there; to make the default one: {how}")
    return args


def main():
    args = parse_args()
    settings = [(channels, *size) for channels in args.base_channels for size in args.sizes]
    if args.scaling:
        return scale(args, settings[0])
    results = {}
    for setting in settings:
        results[setting], software = compare(args, setting)
    for quantity in QUANTITIES:
        print(markdown(results, args.implementations, quantity))
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].split("\n")[0].strip("\t: ")
    blas = f"OPENBLAS_CORETYPE {os.environ.get('OPENBLAS_CORETYPE', 'unset')}"
    print(cpu, f"{CORES} cores", *software, blas, sep="; ")
    if args.with_torch:  # the chart is relative to it
        try:
            draw(results, args.implementations, args.chart)
        except (OSError, ValueError) as error:
            fail(f"{args.chart}: can't be written ({error})")
        print(f"{args.chart}: the training steps as bars")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        try:
            main()
        except KeyboardInterrupt:
            fail("interrupted", 130)
