"""The CPU kernels against float64 NumPy: python3 -m pytest tests/test_cpu_kernels.py"""

import copy
import os
import subprocess
import sys

import cpu_kernels
import unet
from conftest import ROOT, launch, one_line, script, train
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
        (1, 1, 64, 130, 71, 1),  # one channel
        (1, 96, 40, 64, 260, 2),  # two inputs
        (2, 300, 20, 24, 20, 3),  # numbers of channels that no register divides
        (1, 20, 300, 24, 20, 1),
        (4, 1024, 8, 4, 4, 2),  # many channels, few pixels
        (3, 8, 1024, 9, 11, 1),
        (1, 3, 5, 1, 2, 1),  # a line of two pixels
        (1, 12, 12, 7, 1500, 1),  # long rows
        (3, 40, 40, 50, 70, 1),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_double_conv_equals_float64(batch, inside, outside, height, width, inputs, training):
    """1 to 1024 channels, images of all shapes, several inputs."""
    flow.manual_seed(0)
    net = with_statistics(DoubleConv(inside, outside))
    image = normal(batch, inside, height, width)

    def compute(reference, x):
        return reference.double_conv(x, "", training)

    compare(net, image, compute, training, inputs)


@pytest.mark.parametrize("height, width", [(61, 300), (256, 256), (7, 9000)])
def test_exact_to_the_borders(height, width):
    """With all ReLUs open nothing flips, so that one wrong pixel anywhere would show."""
    net = DoubleConv(3, 4)
    for norm in net.double_conv[1::3]:
        nn.init.constant_(norm.bias, 10)

    def compute(reference, x):
        return reference.double_conv(x, "", True)

    compare(net, normal(1, 3, height, width), compute, training=True, gradient=1e-3)


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


def test_large_means_dont_drown_small_variances():
    """Batch statistics stay right where a channel's mean is 1000 times its deviation."""
    net = accelerate(DoubleConv(1, 1))
    with flow.no_grad():
        nn.init.zeros_(net.double_conv[0].weight)
        net.double_conv[0].weight[0, 0, 1, 1] = 1  # hands the image on
    x = 1000 + normal(2, 1, 90, 70)
    with flow.no_grad():
        net(flow.tensor(x))
    norm, bias = net.double_conv[1], net.double_conv[0].bias.numpy()
    np.testing.assert_allclose(norm.running_mean.numpy(), 0.1 * (x.astype(float).mean() + bias), rtol=1e-6)
    np.testing.assert_allclose(norm.running_var.numpy(), 0.9 + 0.1 * x.astype(float).var(ddof=1), rtol=1e-4)


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

    frozen = ("down1.maxpool_conv.1.double_conv.3.weight", "up2.up.weight", "inc.double_conv.1.bias")
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
    assert distance(without.numpy(), with_gradient.detach().numpy()) < OUTPUT


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
    kind = type(fast.inc)
    assert type(accelerate(fast).inc) is kind  # once more changes nothing
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
        accelerate(DoubleConv(4, 2))(image, flow.tensor(normal(1, 2, 8, 5)))
    with pytest.raises(ValueError, match="too small"):
        accelerate(UNet(2, 1))(image)


def small_modules():
    return [
        nn.Conv2d(2, 3, 1),
        nn.ConvTranspose2d(2, 3, 2, stride=2),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    ]


def test_any_order_in_memory():
    """Images and gradients with channels last in memory, first, or cut out of larger ones; of any size."""

    def last(x):
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    def cut(x):
        return F.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2]

    net = DoubleConv(2, 3).eval()  # in training, OneFlow's own gradients are poor
    for module in [*small_modules(), net]:
        stock = nn.Sequential(module)
        fast = accelerate(copy.deepcopy(stock))
        for height, width in ((9, 7), (2, 8)):
            array = normal(2, 2, height, width)
            results = []
            for some in (stock, fast):
                for order in (flow.Tensor.contiguous, last, cut):
                    image = flow.tensor(array, requires_grad=True)
                    output = some(order(image))
                    with flow.no_grad():
                        np.testing.assert_allclose(some(order(image)).numpy(), output.numpy(), atol=1e-6)
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
def test_where_the_kernels_cannot_run_a_line_says_why(break_it, said):
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
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
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
            loss = nn.functional.binary_cross_entropy_with_logits(net(flow.tensor(image)), flow.tensor(label))
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
import common.ranks
import cpu_kernels, unet
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
        assert distance(first[name], alone[name] / 2) < 1e-4, name


def test_flag_of_the_scripts(slices, tmp_path):
    """--cpu_kernels off trains and predicts with OneFlow's kernels; results agree, resuming too."""
    for kind in ("auto", "off"):
        (tmp_path / kind).mkdir()
        flags = ("--data_path", slices, "--cpu_kernels", kind, "--val_count", 2)
        train(*flags, "--epochs", 2, cwd=tmp_path / kind)
        train(*("--data_path", slices, "--epochs", 3, "--resume", "checkpoints/last.safetensors"), cwd=tmp_path / kind)
        assert metadata_of(tmp_path / kind / "checkpoints/last.safetensors")["arguments"]["cpu_kernels"] == kind
    rows = {kind: (tmp_path / kind / "Unet_train.txt").read_text().split() for kind in ("auto", "off")}
    assert np.allclose(*(np.array(rows[kind], float) for kind in ("auto", "off")), atol=0.02)
    for kind in ("auto", "off"):
        done = script(
            *("predict_unet_test.py", "--checkpoint", tmp_path / "auto/checkpoints/best.safetensors"),
            *("--Test_Data_path", slices, "--save_res_path", tmp_path / kind / "out"),
            *("--cpu_kernels", kind, "--stack", tmp_path / f"{kind}.tif", "--device", "cpu"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    import cv2

    stacks = [cv2.imreadmulti(str(tmp_path / f"{k}.tif"), flags=-1)[1] for k in ("auto", "off")]
    np.testing.assert_allclose(np.array(stacks[0]), np.array(stacks[1]), atol=1e-4)
    assert not np.array_equal(stacks[0], stacks[1])  # so "off" is something else


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

    def residual(self, *parts):
        return self.double_conv(self.cat(*parts)) + parts[0]

    monkeypatch.setattr(DoubleConv, "forward", residual)
    net = accelerate(DoubleConv(2, 2))
    with pytest.raises(RuntimeError, match="--cpu_kernels off"):
        net(flow.tensor(normal(1, 2, 8, 8)))


needs_bfloat16 = pytest.mark.skipif(not cpu_kernels.has_bfloat16(), reason="this CPU has no bfloat16")


def round_to_bfloat16(array):
    """The nearest numbers that have a mantissa of 8 bits; of two, the even one."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(float)


@needs_bfloat16
@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_is_as_near_as_rounding_allows(bilinear, training):
    """Mixed precision: logits, gradients and statistics against float64, beside what rounding itself does.

    All inputs and outputs of layers are rounded to 2^-9: what the reference's change when its weights and image are
    rounded so is the yardstick. Parameters, their gradients and statistics stay float32.
    """
    flow.manual_seed(0)
    net = with_statistics(UNet(1, 1, bilinear=bilinear, base_channels=16))
    image = normal(2, 1, 48, 64)
    references = {}
    for name, rounding in (("exact", np.asarray), ("rounded", round_to_bfloat16)):
        reference = references[name] = Reference(net.state_dict())
        for parameter in reference.parameters.values():
            parameter.array = np.asarray(rounding(parameter.array), float)
        references[name, "output"] = reference.unet(Value(rounding(image)), training)
    accelerate(net, amp=True).train(training)
    output = net(flow.tensor(image))
    exact = references["exact", "output"].array
    yardstick = distance(references["rounded", "output"].array, exact)
    assert output.dtype == flow.float32
    assert 1e-4 < distance(output.numpy(), exact) < 5 * yardstick
    output.sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == flow.float32, name
    for name, buffer in net.named_buffers():
        assert distance(buffer.numpy(), references["exact"].buffers[name]) < 0.02, name


@needs_bfloat16
def test_bfloat16_gradients_have_the_right_direction():
    """With all ReLUs open gradients in mixed precision are those of float64 up to rounding."""
    net = DoubleConv(3, 16)
    for norm in net.double_conv[1::3]:
        nn.init.constant_(norm.bias, 10)
    reference, image, dy = Reference(net.state_dict()), normal(2, 3, 40, 40), normal(2, 16, 40, 40, seed=1)
    x = flow.tensor(image, requires_grad=True)
    (accelerate(net, amp=True)(x) * flow.tensor(dy)).sum().backward()
    value = Value(image)
    reference.double_conv(value, "", True).backward(dy)
    assert distance(x.grad.numpy(), value.gradient) < 0.02
    for name, parameter in net.named_parameters():
        if not name.endswith(("0.bias", "3.bias")):
            assert distance(parameter.grad.numpy(), reference.parameters[name].gradient) < 0.02, name
