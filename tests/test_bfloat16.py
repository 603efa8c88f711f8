"""Mixed precision on a CPU against float64 NumPy: python3 -m pytest tests/test_bfloat16.py"""

import ctypes

import cpu_kernels
from cpu_kernels import accelerate, onednn
from reference import Reference, Value, distance, normal, with_statistics
from unet import DoubleConv, UNet

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn

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


@needs_bfloat16
def test_no_primitive_keeps_scratch_memory(monkeypatch):
    """In bfloat16 gradients of weights need as much as images beside them, 0.7 GB of a net of 64 channels: on loan."""
    made, create, kept = [], onednn.Primitive.__init__, ctypes.c_int64()

    def noted(primitive, *arguments, **options):
        create(primitive, *arguments, **options)
        made.append(primitive)

    monkeypatch.setattr(onednn.Primitive, "__init__", noted)
    net = accelerate(UNet(1, 1, bilinear=False, base_channels=24), amp=True)  # a width that no other test has
    net(flow.tensor(normal(1, 1, 64, 64))).sum().backward()
    query = onednn.library().functions.dnnl_primitive_desc_query
    for primitive in made:  # 6: dnnl_query_memory_consumption_s64
        assert query(primitive.description, 6, 0, ctypes.byref(kept)) == 0 and kept.value == 0, primitive.name
    assert max(primitive.scratch for primitive in made) > 100_000
