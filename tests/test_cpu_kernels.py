"""The CPU kernels against float64 NumPy: python3 -m pytest tests/test_cpu_kernels.py"""

import copy

from conftest import BEST, LAST, metadata_of, resume, script, train
from cpu_kernels import accelerate
from reference import Reference, Value, distance, normal, small_modules, with_statistics
from unet import DoubleConv, UNet

import cv2
import numpy as np
import oneflow as flow
import pytest
from oneflow import nn
from oneflow.nn import functional as F

# float32 against float64. A ReLU whose input is 0 up to rounding may open in one and not in the
# other: on images this small that moves gradients by up to some per cent, else they agree to 1e-5.
OUTPUT, GRADIENT = 2e-5, 5e-2


def compare(net, image, compute, training, gradient=GRADIENT):
    """Outputs, all gradients and buffers of an accelerated net against the reference's.

    image: (N, C, H, W). compute: what the Reference's method is.
    """
    reference = Reference(net.state_dict())
    accelerate(net).train(training)
    x = flow.tensor(image, requires_grad=True)
    output = net(x)
    value = Value(image)
    expected = compute(reference, value)
    assert distance(output.numpy(), expected.array) < OUTPUT
    dy = normal(*output.shape, seed=1)
    (output * flow.tensor(dy)).sum().backward()
    expected.backward(dy)
    assert distance(x.grad.numpy(), value.gradient) < gradient
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
    "batch, inside, outside, height, width",
    [
        (1, 1, 64, 130, 71),  # one channel
        (1, 96, 40, 64, 260),
        (2, 300, 20, 24, 20),  # numbers of channels that no register divides
        (1, 20, 300, 24, 20),
        (4, 1024, 8, 4, 4),  # many channels, few pixels
        (3, 8, 1024, 9, 11),
        (1, 3, 5, 1, 2),  # a line of two pixels
        (1, 12, 12, 7, 1500),  # long rows
        (3, 40, 40, 50, 70),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_double_conv_equals_float64(batch, inside, outside, height, width, training):
    """1 to 1024 channels, images of all shapes."""
    flow.manual_seed(0)
    net = with_statistics(DoubleConv(inside, outside))
    image = normal(batch, inside, height, width)

    def compute(reference, x):
        return reference.double_conv(x, "", training)

    compare(net, image, compute, training)


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


def test_flag_of_the_scripts(slices, tmp_path):
    """--cpu_kernels off trains and predicts with OneFlow's kernels; results agree, resuming too."""
    for kind in ("auto", "off"):
        flags = ("--data_path", slices, "--cpu_kernels", kind, "--val_count", 2)
        train(*flags, "--epochs", 2, cwd=tmp_path / kind)
        resume("--data_path", slices, "--epochs", 3, cwd=tmp_path / kind)
        assert metadata_of(tmp_path / kind / LAST)["arguments"]["cpu_kernels"] == kind
    rows = {kind: (tmp_path / kind / "Unet_train.txt").read_text().split() for kind in ("auto", "off")}
    assert np.allclose(*(np.array(rows[kind], float) for kind in ("auto", "off")), atol=0.02)
    for kind in ("auto", "off"):
        done = script(
            *("predict_unet_test.py", "--checkpoint", tmp_path / "auto" / BEST),
            *("--Test_Data_path", slices, "--save_res_path", tmp_path / kind / "out"),
            *("--cpu_kernels", kind, "--stack", tmp_path / f"{kind}.tif", "--device", "cpu"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    stacks = [cv2.imreadmulti(str(tmp_path / f"{k}.tif"), flags=-1)[1] for k in ("auto", "off")]
    np.testing.assert_allclose(np.array(stacks[0]), np.array(stacks[1]), atol=1e-4)
    assert not np.array_equal(stacks[0], stacks[1])  # so "off" is something else
