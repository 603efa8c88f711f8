"""The CPU kernels where something is wrong, changed, reused or forked: python3 -m pytest tests/test_cpu_safety.py"""

import copy
import os

import cpu_kernels
import unet
from conftest import one_line, python
from cpu_kernels import accelerate
from reference import distance, normal, small_modules
from unet import DoubleConv, UNet, Up

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn


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


def test_what_was_changed_inside_fails_loudly():
    """Hooks and other modules inside, which would be left out in silence, raise; hooks on the net itself fire."""
    image = flow.tensor(normal(1, 1, 32, 32))
    seen = []
    net = accelerate(UNet(1, 1, base_channels=2))
    net.register_forward_hook(lambda *_: seen.append("net"))
    net(image)
    assert seen == ["net"]
    for place in ("inc", "down1.maxpool_conv.1.double_conv.0"):
        net = accelerate(UNet(1, 1, base_channels=2))
        dict(net.named_modules())[place].register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="hooks or other modules"):
            net(image)
    net = accelerate(UNet(1, 1, base_channels=2))
    net.inc.double_conv[5] = nn.LeakyReLU(0.5)
    with pytest.raises(RuntimeError, match="hooks or other modules"):
        net(image)


def test_what_was_changed_in_unet_is_not_overlooked(monkeypatch, capfd):
    """Other layers in the classes of unet.py, or a forward that does more, are never computed as if they weren't."""

    class Leaky(DoubleConv):
        def __init__(self, *channels):
            super().__init__(*channels)
            self.double_conv[5] = nn.LeakyReLU(0.5)

    monkeypatch.setattr(unet, "DoubleConv", Leaky)
    net = UNet(1, 1, bilinear=False, base_channels=2)
    assert type(accelerate(net)) is UNet and "Leaky" in capfd.readouterr().err
    if cpu_kernels.has_bfloat16():
        with pytest.raises(ValueError, match="Leaky"):
            accelerate(net, amp=True)
    monkeypatch.undo()

    def residual(self, x):
        return self.double_conv(x) + x

    monkeypatch.setattr(DoubleConv, "forward", residual)
    net = accelerate(DoubleConv(2, 2))
    with pytest.raises(RuntimeError, match="--cpu_kernels off"):
        net(flow.tensor(normal(1, 2, 8, 8)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("amp", [False, True])
def test_what_is_not_finite_stays_so(training, amp):
    """Weights that lead to no number give no number, though oneDNN's ReLU makes 0 of NaN."""
    net = UNet(1, 1, bilinear=False, base_channels=2)
    for parameter in net.parameters():
        nn.init.constant_(parameter, 1e29)
    net = accelerate(net, amp and cpu_kernels.has_bfloat16()).train(training)
    with flow.no_grad():
        assert np.isnan(net(flow.tensor(normal(1, 1, 32, 32))).numpy()).all()


def test_one_pixel_that_is_not_finite_shows():
    """An image with NaN or infinity leads to no number, wherever it is, with gradients and without."""
    net = accelerate(UNet(1, 1, base_channels=2)).eval()
    for value in (np.nan, np.inf):
        image = normal(1, 1, 32, 32)
        image[0, 0, 3, 5] = value
        assert np.isnan(net(flow.tensor(image)).numpy()).any()
        with flow.no_grad():
            assert np.isnan(net(flow.tensor(image)).numpy()).any()


def test_a_forked_process_is_told_so():
    """OpenMP's threads don't survive a fork: instead of hanging, the child raises."""
    net, image = accelerate(UNet(1, 1, base_channels=2)), flow.tensor(normal(1, 1, 32, 32))
    net(image)
    child = os.fork()
    if child == 0:
        try:
            net.check()
        except RuntimeError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_pooling_does_not_rely_on_its_output():
    """What is done to the output in place has no say in which pixels were the largest."""
    array, gradients = normal(1, 2, 8, 8), []
    for module in (nn.MaxPool2d(2), accelerate(nn.Sequential(nn.MaxPool2d(2)))):
        image = flow.tensor(array, requires_grad=True)
        module(image * 1).add_(1).sum().backward()
        gradients.append(image.grad.numpy())
    np.testing.assert_array_equal(*gradients)


def test_what_is_wrong_raises():
    """Inputs that don't fit raise an error, as without the kernels."""
    image, wrong = flow.tensor(normal(1, 2, 8, 8)), flow.tensor(normal(1, 3, 8, 8))
    for module in (DoubleConv(2, 2), nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 2, 2, stride=2)):
        with pytest.raises(RuntimeError):
            accelerate(nn.Sequential(module))(wrong)
    with pytest.raises((RuntimeError, ValueError)):
        accelerate(Up(4, 2, bilinear=False))(flow.tensor(normal(1, 4, 4, 4)), flow.tensor(normal(1, 2, 8, 5)))
    with pytest.raises(ValueError, match="too small"):
        accelerate(UNet(2, 1))(image)


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
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sigmoid()),
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
        assert isinstance(accelerate(double), cpu_kernels.Accelerated) and isinstance(double[0], kind)
        x = flow.tensor(normal(1, 2, 8, 8).astype(np.float64))
        assert double(x).dtype == flow.float64  # by OneFlow's own kernels
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernels, "why_not", lambda: "no reason")
            assert type(accelerate(nn.Sequential(module))[0]) is kind


@pytest.mark.parametrize(
    "break_it, said",
    [
        ("ctypes.CDLL = lambda path: (_ for _ in ()).throw(OSError('libgomp.so.1: cannot open'))", "apt-get install"),
        ("sysconfig.get_path = lambda name: '/nowhere'", "pip install"),
        ("dnn.Library.has = lambda self, bits: False", "AVX2"),
    ],
)
def test_where_the_kernels_cannot_run_a_line_says_why(break_it, said, tmp_path):
    """OneFlow's own kernels run then, and one line on stderr says what to install; amp is refused."""
    code = f"""
import ctypes, sys, sysconfig
import cpu_kernels, unet
from cpu_kernels import onednn as dnn
import oneflow as flow
{break_it}
net = cpu_kernels.accelerate(unet.UNet(1, 1, base_channels=1))
assert type(net) is unet.UNet and not cpu_kernels.has_bfloat16()
net(flow.ones(1, 1, 16, 16)).numpy()
"""
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert one_line(done.stderr) and said in done.stderr


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
    assert distance(Graph()(image).numpy(), net(image).numpy()) < 2e-5


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
import cpu_kernels, unet
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


def test_memory_does_not_grow(tmp_path):
    """500 steps: under 2 kB a step, OneFlow's own leaks included."""
    done = python(MEMORY, cwd=tmp_path)
    assert float(done.stdout) < 2000, done.stderr
