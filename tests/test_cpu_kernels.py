"""The CPU kernels against float64 NumPy: python3 -m pytest tests/test_cpu_kernels.py"""

import copy
import os
import subprocess
import sys
import time

import cpu_kernels
from conftest import ROOT, launch, script, train
from cpu_kernels import accelerate
from reference import Reference, Value, distance
from test_training import metadata_of
from unet import DoubleConv, UNet

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn
from oneflow.nn import functional as F

# float32 against float64. A ReLU whose input is 0 up to rounding may open in one and not in the
# other: on images this small that moves gradients by up to some per cent, else they agree to 1e-5.
OUTPUT, GRADIENT = 2e-5, 5e-2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_statistics(net):
    """Give the batch normalisations running statistics that are not those of a fresh net."""
    for i, module in enumerate(net.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(flow.tensor(0.1 * normal(module.num_features, seed=i)))
            module.running_var.copy_(flow.tensor(0.5 + normal(module.num_features, seed=i) ** 2))
            nn.init.uniform_(module.weight, -1, 1)  # negative scales too
            nn.init.uniform_(module.bias, -1, 1)
    return net


def compare(net, image, compute, training, inputs=1, gradient=GRADIENT):
    """Outputs, all gradients and buffers of an accelerated net against the reference's.

    image: (N, C, H, W), cut into `inputs` inputs along C. compute: what the Reference's method is.
    """
    reference = Reference(net.state_dict())
    accelerate(net).train(training)
    parts = [flow.tensor(p, requires_grad=True) for p in np.array_split(image, inputs, axis=1)]
    output = net(*parts)
    value = Value(image)
    expected = compute(reference, value)
    assert distance(output.numpy(), expected.array) < OUTPUT
    dy = normal(*output.shape, seed=1)
    (output * flow.tensor(dy)).sum().backward()
    expected.backward(dy)
    dx = np.concatenate([part.grad.numpy() for part in parts], axis=1)
    assert distance(dx, value.gradient) < gradient
    for name, parameter in net.named_parameters():
        wanted = reference.parameters[name].gradient
        if training and name.endswith(("double_conv.0.bias", "double_conv.3.bias")):
            assert not parameter.grad.numpy().any()  # batch normalisation takes a bias away
            assert abs(wanted).max() < 1e-9
        else:
            assert distance(parameter.grad.numpy(), wanted) < gradient, name
    for name, buffer in net.named_buffers():
        assert distance(buffer.numpy(), reference.buffers[name]) < OUTPUT, name


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "batch, height, width, base", [(1, 32, 48, 16), (2, 37, 50, 4), (3, 33, 35, 1), (4, 32, 64, 8)]
)
def test_unet_equals_float64(batch, height, width, base, training, bilinear):
    """Outputs, all gradients and running statistics, for any size, in training and evaluation."""
    flow.manual_seed(0)
    net = with_statistics(UNet(2, 3, bilinear=bilinear, base_channels=base))
    image = normal(batch, 2, height, width)
    compare(net, image, lambda reference, x: reference.unet(x, training), training)


@pytest.mark.parametrize(
    "batch, inside, outside, height, width, inputs",
    [
        (1, 1, 64, 130, 71, 1),  # one channel, many blocks of tiles, sides that 4 doesn't divide
        (1, 96, 40, 64, 260, 2),  # two inputs, blocks that are parts of rows
        (2, 300, 20, 24, 20, 3),
        (1, 20, 300, 24, 20, 1),
        (4, 1024, 8, 4, 4, 2),  # fewer than SMALL pixels
        (3, 8, 1024, 9, 11, 1),  # several images in a block
        (1, 3, 5, 1, 2, 1),
        (1, 12, 12, 7, 1500, 1),  # rows wider than a block
        (1, 40, 24, 7, 1500, 1),
        (3, 40, 40, 50, 70, 1),  # several images, several blocks each
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "many, narrow", [(4, 32), (0.01, 0), (0.01, 1024), (10**9, 0), (10**9, 1024)]
)
def test_double_conv_equals_float64(
    batch, inside, outside, height, width, inputs, training, many, narrow, monkeypatch
):
    """1 to 1024 channels, images of all shapes, several inputs: each way that work is done."""
    monkeypatch.setattr(cpu_kernels, "MANY", many)  # jobs of blocks, or of weights
    monkeypatch.setattr(cpu_kernels, "NARROW", narrow)  # Tiles, or Rows
    if narrow == 0:
        monkeypatch.setattr(cpu_kernels, "SMALL", 0)
    flow.manual_seed(0)
    net = with_statistics(DoubleConv(inside, outside))
    image = normal(batch, inside, height, width)

    def compute(reference, x):
        return reference.double_conv(x, "", training)

    compare(net, image, compute, training, inputs)


@pytest.fixture
def threads(request, monkeypatch):
    """So many threads, whatever the machine has."""
    monkeypatch.setattr(cpu_kernels, "THREADS", request.param)
    cpu_kernels.forget_helpers()
    yield
    monkeypatch.undo()
    cpu_kernels.forget_helpers()


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("height, width", [(61, 300), (256, 256), (7, 9000)])  # last: cut rows
def test_exact_to_the_borders(threads, height, width):
    """With all ReLUs open nothing flips, so that one wrong pixel anywhere would show."""
    net = DoubleConv(3, 4)
    for norm in net.double_conv[1::3]:
        nn.init.constant_(norm.bias, 10)

    def compute(reference, x):
        return reference.double_conv(x, "", True)

    compare(net, normal(1, 3, height, width), compute, training=True, gradient=1e-4)


@pytest.mark.parametrize("gamma, beta", [(-1, 0), (0, 0), (0, 1), (-0.0, 1), (-1, 1), (1, -1)])
def test_relu_of_exactly_zero_is_closed(gamma, beta):
    """Constant images, scales of zero and less: the same ReLUs are open as in float64."""
    net = DoubleConv(2, 3).eval()
    for norm in net.double_conv[1::3]:
        nn.init.constant_(norm.weight, gamma)
        nn.init.constant_(norm.bias, beta)
    for convolution in net.double_conv[::3]:
        nn.init.zeros_(convolution.bias)
    compare(
        net,
        np.zeros((1, 2, 8, 8), np.float32),
        lambda reference, x: reference.double_conv(x, "", False),
        training=False,
    )


def test_more_channels_than_a_block_has_room_for():
    """From 4097 channels on a block is a tile, not a division by zero."""
    assert len(cpu_kernels.cut((0, 1, 0, 2, 0, 3), 0)) == 6


def test_large_means_dont_drown_small_variances():
    """Batch statistics stay right where a channel's mean is 1000 times its deviation."""
    x = 1000 + normal(2, 5, 90, 70)
    mean, variance = cpu_kernels.statistics(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(mean, x.astype(float).mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(variance, x.astype(float).var((0, 2, 3)), rtol=1e-4)


def gradients(net, image):
    for parameter in net.parameters():
        parameter.grad = None
    net(flow.tensor(image)).square().sum().backward()
    return {n: p.grad.numpy().copy() for n, p in net.named_parameters() if p.grad is not None}


def test_accumulated_frozen_and_no_gradients():
    """Gradients add up; frozen parameters get none, the others' stay; no_grad changes nothing."""
    net = accelerate(with_statistics(UNet(1, 1, bilinear=False, base_channels=4))).eval()
    first, second = normal(1, 1, 32, 32, seed=1), normal(2, 1, 48, 32, seed=2)
    one, two = gradients(net, first), gradients(net, second)
    net(flow.tensor(first)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert distance(parameter.grad.numpy(), one[name] + two[name]) < 1e-5

    frozen = (
        "down1.maxpool_conv.1.double_conv.3.weight",
        "up2.up.weight",
        "inc.double_conv.1.bias",
    )
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)
    some = gradients(net, first)
    assert set(some) == set(one) - set(frozen)
    for name, gradient in some.items():
        np.testing.assert_array_equal(gradient, one[name])

    with_gradient = net(flow.tensor(first))
    with flow.no_grad():
        without = net(flow.tensor(first))
    assert with_gradient.requires_grad and not without.requires_grad
    np.testing.assert_array_equal(with_gradient.detach().numpy(), without.numpy())


def test_threads_may_use_all_cores_again(monkeypatch):
    """Only while a kernel computes is its thread set up for that, also when it fails."""
    monkeypatch.setattr(cpu_kernels, "THREADS", len(cpu_kernels.CORES))
    cores, size = os.sched_getaffinity(0), np.getbufsize()
    gradients(accelerate(UNet(1, 1, base_channels=2)), normal(1, 1, 32, 32))
    assert os.sched_getaffinity(0) == cores
    with pytest.raises(ZeroDivisionError), cpu_kernels.computing():
        assert len(os.sched_getaffinity(0)) == 1 and np.getbufsize() != size
        1 / 0  # noqa: B018
    assert os.sched_getaffinity(0) == cores and np.getbufsize() == size


def test_repeats_bit_for_bit():
    """The same input gives the same bits, whichever thread was faster."""
    net = accelerate(UNet(1, 1, bilinear=False, base_channels=8))
    image = normal(1, 1, 256, 256)
    first = gradients(net, image)
    for _ in range(3):
        for name, gradient in gradients(net, image).items():
            np.testing.assert_array_equal(gradient, first[name], err_msg=name)


def test_state_dict_and_copies():
    """Names, shapes and types of the state stay; loading, saving and deepcopy work."""
    plain, fast = UNet(1, 1, base_channels=4), UNet(1, 1, base_channels=4)
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in fast.state_dict().items()}
    assert accelerate(fast) is fast
    assert {n: (t.shape, t.dtype) for n, t in fast.state_dict().items()} == before
    assert type(accelerate(fast).inc) is cpu_kernels.DoubleConv  # once more changes nothing
    fast.load_state_dict(plain.state_dict())
    image = flow.tensor(normal(1, 1, 48, 48))
    twin = copy.deepcopy(fast)
    for net in (plain, fast, twin):
        net.eval()
    assert distance(fast(image).numpy(), plain(image).numpy()) < OUTPUT
    nn.init.zeros_(fast.outc.conv.weight)  # the twin has weights of its own
    assert distance(twin(image).numpy(), plain(image).numpy()) < OUTPUT


def test_what_is_not_possible_fails_loudly():
    """A second backward pass and gradients of gradients raise instead of giving wrong numbers."""
    net = accelerate(UNet(1, 1, base_channels=2))
    image = flow.tensor(normal(1, 1, 32, 32), requires_grad=True)
    loss = net(image).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()
    with pytest.raises(RuntimeError, match="differentiated once"):
        flow.autograd.grad(net(image).sum(), image, create_graph=True)


def test_hooks_inside_a_double_conv_still_fire():
    """A DoubleConv with hooks on its inner modules runs OneFlow's own kernels, hooks included."""
    net = accelerate(UNet(1, 1, base_channels=2))
    image = flow.tensor(normal(1, 1, 32, 32))
    expected = net(image).numpy()
    seen = []
    net.inc.double_conv[0].register_forward_hook(lambda *_: seen.append("inner"))
    net.down1.register_forward_hook(lambda *_: seen.append("block"))
    assert distance(net(image).numpy(), expected) < OUTPUT
    assert seen == ["inner", "block"]


def test_pooling_does_not_rely_on_its_output():
    """What is done to the output in place has no say in which pixels were the largest."""
    array, gradients = normal(1, 2, 8, 8), []
    for module in (nn.MaxPool2d(2), accelerate(nn.Sequential(nn.MaxPool2d(2)))):
        image = flow.tensor(array, requires_grad=True)
        module(image * 1).add_(1).sum().backward()
        gradients.append(image.grad.numpy())
    np.testing.assert_array_equal(*gradients)


def test_what_is_changed_or_wrong_is_left_to_oneflow():
    """A module changed later computes what it now says; inputs that don't fit raise an error."""
    net, image = accelerate(DoubleConv(2, 2)).eval(), flow.tensor(normal(1, 2, 8, 8))
    before = net(image).numpy()
    net.double_conv[5] = nn.LeakyReLU(0.5)
    assert net(image).numpy().min() < 0 <= before.min()

    turned = accelerate(DoubleConv(2, 2)).eval()
    square = flow.tensor(normal(1, 2, 9, 12)).permute(0, 1, 3, 2)  # not contiguous
    copied = flow.tensor(np.ascontiguousarray(square.numpy()))
    np.testing.assert_array_equal(turned(square).numpy(), turned(copied).numpy())

    wrong = flow.tensor(normal(1, 3, 8, 8))
    for module in (DoubleConv(2, 2), nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 2, 2, stride=2)):
        with pytest.raises(Exception):  # noqa: B017, whatever OneFlow raises
            accelerate(nn.Sequential(module))(wrong).numpy()
    with pytest.raises(Exception):  # noqa: B017
        accelerate(DoubleConv(4, 2))(image, flow.tensor(normal(1, 2, 8, 5))).numpy()


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_an_error_in_a_job_waits_for_the_others(threads):
    """No job is at work any more when parallel() raises, whichever thread failed."""
    done = []

    def work(i):
        time.sleep(0.01)
        if i == 0:
            raise ValueError(i)
        time.sleep(0.05)
        done.append(i)

    with pytest.raises(ValueError):
        cpu_kernels.parallel(work, [(i,) for i in range(50)])
    count = len(done)
    time.sleep(0.1)
    assert len(done) == count


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_threads_that_cannot_start_are_tried_again(threads, monkeypatch):
    """A machine out of threads is an error, and no call waits for threads that never were."""

    def fail(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as short:
        short.setattr(cpu_kernels.threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            cpu_kernels.parallel(pow, [(2, 3), (2, 4)])
    assert cpu_kernels.parallel(pow, [(2, 3), (2, 4)]) == [8, 16]


def small_modules():
    return [
        nn.Conv2d(2, 3, 1),
        nn.ConvTranspose2d(2, 3, 2, stride=2),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    ]


@pytest.mark.parametrize("numbers", [cpu_kernels.NUMBERS, 1, 40])
def test_any_order_in_memory(numbers, monkeypatch):
    """Images and gradients with channels last in memory, first, or cut out of larger ones.

    In one piece, a row a piece, and some rows a piece; of any size.
    """
    monkeypatch.setattr(cpu_kernels, "NUMBERS", numbers)

    def last(x):
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    def cut(x):
        return F.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2]

    net = DoubleConv(2, 3).eval()  # in training, OneFlow's own gradients are poor
    for module in [*small_modules(), net]:
        stock = nn.Sequential(module)
        fast = accelerate(copy.deepcopy(stock))
        for height, width in ((9, 7), (8, 1), (2, 8)):
            array = normal(2, 2, height, width)
            results = []
            for some in (stock, fast):
                for order in (flow.Tensor.contiguous, last, cut):
                    image = flow.tensor(array, requires_grad=True)
                    output = some(order(image))
                    with flow.no_grad():
                        np.testing.assert_array_equal(some(order(image)).numpy(), output.numpy())
                    weights = flow.tensor(normal(*output.shape, seed=1))
                    (order(output) * weights).sum().backward()
                    gradients = [p.grad.numpy().copy() for p in (image, *some.parameters())]
                    results.append([F.relu(output).numpy(), output.numpy(), *gradients])
                    some.zero_grad()
            for result in results[1:]:
                for array_, wanted in zip(result, results[0], strict=True):
                    np.testing.assert_allclose(array_, wanted, rtol=1e-4, atol=1e-5)


def test_leaves_alone_what_it_does_not_know(monkeypatch):
    """Other modules and setups, other types, and machines that don't fit stay as they are."""
    unknown = [
        nn.Conv2d(2, 2, 1, stride=2),
        nn.Conv2d(2, 2, 1, bias=False),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.ConvTranspose2d(2, 2, 3, stride=2),
        nn.ConvTranspose2d(2, 2, 2, stride=2, groups=2),
        nn.MaxPool2d(2, stride=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        nn.Upsample(scale_factor=3, mode="bilinear", align_corners=True),
    ]
    for change in ({3: nn.Conv2d(2, 2, 5, padding=2)}, {1: nn.BatchNorm2d(2, momentum=None)}):
        block = DoubleConv(2, 2)
        for place, module in change.items():
            block.double_conv[place] = module
        unknown.append(block)
    for module in unknown:
        kind = type(module)
        assert type(accelerate(nn.Sequential(module))[0]) is kind, module

    for module in [*small_modules(), DoubleConv(2, 3)]:
        kind = type(module)
        double = nn.Sequential(copy.deepcopy(module)).to(flow.float64)
        assert isinstance(accelerate(double)[0], kind) and type(double[0]) is not kind
        x = flow.tensor(normal(1, 2, 8, 8).astype(np.float64))
        assert double(x).dtype == flow.float64  # by OneFlow's own kernels
        for check in ("has_avx2", "one_blas_thread"):
            with monkeypatch.context() as patch:
                patch.setattr(cpu_kernels, check, lambda: False)
                assert type(accelerate(nn.Sequential(module))[0]) is kind


def test_static_graph_runs_stock_kernels():
    """In an nn.Graph an accelerated net computes the same, by OneFlow's own kernels."""
    net = accelerate(UNet(1, 1, base_channels=2)).eval()

    class Graph(nn.Graph):
        def __init__(self):
            super().__init__()
            self.net = net

        def build(self, x):
            return self.net(x)

    image = flow.tensor(normal(1, 1, 32, 32))
    assert distance(Graph()(image).numpy(), net(image).numpy()) < OUTPUT


def test_no_array_is_reused():
    """Outputs and gradients keep what they held, whatever is computed after them."""
    for net in (
        DoubleConv(3, 8),
        nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2)),
        nn.Sequential(nn.Conv2d(3, 2, 1)),
        nn.Sequential(nn.MaxPool2d(2)),
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
    ):
        accelerate(net)
        kept, copies = [], []
        for seed in range(30):
            image = flow.tensor(normal(1, 3, 40, 40, seed=seed), requires_grad=True)
            output = net(image)
            wanted = [image, *net.parameters()]
            kept += [output.detach(), *flow.autograd.grad(output.square().sum(), wanted)]
            copies += [tensor.numpy().copy() for tensor in kept[len(copies) :]]
        for tensor, copied in zip(kept, copies, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), copied)


def test_late_readers_see_what_was_computed():
    """What OneFlow computes behind the kernels' back equals what it computes step by step."""
    net = accelerate(DoubleConv(3, 8)).eval()
    images = [flow.tensor(normal(1, 3, 40, 40, seed=i)) for i in range(20)]

    def run(wait):
        results = []
        for image in images:
            late = net(image)
            for _ in range(30):
                late = late * 1.01 - 0.001
            results.append(flow.tensor(late.numpy()) if wait else late)
        return [tensor.numpy().copy() for tensor in results]

    for one, other in zip(run(wait=True), run(wait=False), strict=True):
        np.testing.assert_array_equal(one, other)


MEMORY = """
import gc
import dataloader, cpu_kernels, unet
import numpy as np
import oneflow as flow

gc.disable()  # nothing may wait for Python to look for cycles of references
net = cpu_kernels.accelerate(unet.UNet(1, 1, bilinear=False, base_channels=4))
optimizer = flow.optim.SGD(net.parameters(), lr=0.01)
image = flow.ones(1, 1, 32, 32)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

for step in range(700):
    if step == 200:
        before = resident()
    loss = net(image).square().mean()
    if step % 2:  # a graph that is thrown away holds nothing either
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print((resident() - before) / 500)
"""


def test_memory_does_not_grow():
    """500 steps: under 2 kB a step, OneFlow's own leaks included."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert float(done.stdout) < 2000


def test_training_curves_agree():
    """200 steps with and without: the same curve at first, one as good as the other at the end."""
    losses = {}
    for kind in ("stock", "fast"):
        flow.manual_seed(0)
        net = UNet(1, 1, bilinear=False, base_channels=4)
        if kind == "fast":
            accelerate(net)
        optimizer = flow.optim.Adam(net.parameters(), lr=1e-3)
        rng = np.random.default_rng(0)
        losses[kind] = []
        for _ in range(200):
            label = (rng.random((2, 1, 4, 4)) < 0.5).astype(np.float32).repeat(8, 2).repeat(8, 3)
            image = label + 0.5 * rng.standard_normal(label.shape).astype(np.float32)
            loss = nn.functional.binary_cross_entropy_with_logits(
                net(flow.tensor(image)), flow.tensor(label)
            )
            losses[kind].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    stock, fast = (np.array(losses[kind]) for kind in ("stock", "fast"))
    assert abs(stock - fast)[:20].max() < 1e-3
    assert stock[-50:].mean() < 0.5 * stock[:10].mean()
    assert fast[-50:].mean() == pytest.approx(stock[-50:].mean(), rel=0.15)


DRIVER = """
import sys
import time
import dataloader, cpu_kernels, unet
import numpy as np
import oneflow as flow
from oneflow.nn.parallel import DistributedDataParallel as ddp

rank = flow.env.get_rank()
flow.manual_seed(0)
net = cpu_kernels.accelerate(unet.UNet(1, 1, bilinear=False, base_channels=4))
if flow.env.get_world_size() > 1:
    net = ddp(net)
images = np.load("images.npy")
for image in images[rank:rank + 1] if flow.env.get_world_size() > 1 else images:
    net.train()
    (net(flow.tensor(image[None])).square().mean()).backward()
gradients = {n: p.grad.numpy() for n, p in net.named_parameters()}
np.savez(f"{sys.argv[-1]}{rank}.npz", **gradients)
"""


def test_two_processes_average_gradients(tmp_path):
    """Data parallel training on the kernels gives the mean of what each process has alone."""
    (tmp_path / "driver.py").write_text(DRIVER)
    np.save(tmp_path / "images.npy", normal(2, 1, 32, 48))
    done = launch(tmp_path / "driver.py", "both", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "driver.py", "alone"], cwd=tmp_path, env=env, check=True)
    first, second, alone = (np.load(tmp_path / f"{n}.npz") for n in ("both0", "both1", "alone0"))
    for name in alone.files:
        np.testing.assert_array_equal(first[name], second[name])
        assert distance(first[name], alone[name] / 2) < 1e-5, name


def test_flag_of_the_scripts(slices, tmp_path):
    """--cpu_kernels off trains and predicts with OneFlow's kernels; results agree, resuming too."""
    for kind in ("auto", "off"):
        (tmp_path / kind).mkdir()
        flags = ("--data_path", slices, "--cpu_kernels", kind, "--val_count", 2)
        train(*flags, "--epochs", 2, cwd=tmp_path / kind)
        train(
            *("--data_path", slices, "--epochs", 3, "--resume", "checkpoints/last.safetensors"),
            cwd=tmp_path / kind,
        )
        assert (
            metadata_of(tmp_path / kind / "checkpoints/last.safetensors")["arguments"][
                "cpu_kernels"
            ]
            == kind
        )
    rows = {
        kind: (tmp_path / kind / "Unet_train.txt").read_text().split() for kind in ("auto", "off")
    }
    assert np.allclose(*(np.array(rows[kind], float) for kind in ("auto", "off")), atol=0.02)
    for kind in ("auto", "off"):
        done = script(
            *(
                "predict_unet_test.py",
                "--checkpoint",
                tmp_path / "auto/checkpoints/best.safetensors",
            ),
            *("--Test_Data_path", slices, "--save_res_path", tmp_path / kind / "out"),
            *("--cpu_kernels", kind, "--stack", tmp_path / f"{kind}.tif", "--device", "cpu"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    import cv2

    stacks = [cv2.imreadmulti(str(tmp_path / f"{k}.tif"), flags=-1)[1] for k in ("auto", "off")]
    np.testing.assert_allclose(np.array(stacks[0]), np.array(stacks[1]), atol=1e-4)
    assert not np.array_equal(stacks[0], stacks[1])  # so "off" is something else
