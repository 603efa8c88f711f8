"""Fast CPU kernels: `accelerate(net)` makes the U-Net of unet.py train several times faster on a CPU, by oneDNN.
    net = accelerate(UNet(1, 1, bilinear=False))             # in place; parameters and their names don't change
    net = accelerate(UNet(1, 1, bilinear=False), amp=True)   # mixed precision: images between layers in bfloat16
An accelerated net is one operation for OneFlow's autograd: its own forward() runs on images of onednn.py, layer by
layer (layers.py). A second backward pass, gradients of gradients, hooks and other modules inside raise RuntimeError. On
a GPU, in a static graph and for other types OneFlow's own kernels run. OMP_NUM_THREADS sets the number of threads."""

import ctypes
import os
import sys
import weakref
from functools import lru_cache

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
import unet

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow._oneflow_internal.autograd import AutogradFunctionBase

from . import layers
from . import onednn as dnn

OFF = "; leave out accelerate() for that (--cpu_kernels off)"
CONTAINERS = nn.Sequential, unet.UNet, unet.DoubleConv, unet.Down, unet.Up, unet.OutConv  # they only call their layers
SETUP = "kernel_size stride padding dilation groups output_padding padding_mode ceil_mode return_indices affine "
SETUP += "track_running_stats size scale_factor mode align_corners"


def accelerate(net, amp=False):
    """Make a net of unet.py's layers fast on a CPU, in place; returns the net, which computes the same up to rounding.
    With other layers, or on a GPU, it stays as it is; so it does where the kernels can't run, which a line on stderr
    says. Raises ValueError for amp on a CPU without bfloat16."""
    if any(parameter.is_cuda for parameter in net.parameters()):
        return net
    found = [] if isinstance(net, Accelerated) else layers_of(net)
    reason = why_not() or next((f"they have no {type(layer).__name__}" for layer, run in found if not run), None)
    if amp and (reason or not has_bfloat16()):
        raise ValueError(f"no mixed precision: {reason or 'this CPU has no bfloat16, it would be slower'}")
    if reason:
        if flow.env.get_rank() == 0:
            print(f"cpu_kernels: {reason}. OneFlow's own kernels run instead, several times slower", file=sys.stderr)
        return net
    for layer, run in found:
        layer.__class__ = twin(type(layer), run)
    if found:
        net._stock, net.__class__ = type(net), type(type(net).__name__, (Accelerated, type(net)), {})
        net._inside = [type(module) for module in net.modules()]
        libc = ctypes.CDLL(None)  # malloc is to keep what is freed: the next step wants it, and new pages are slow
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    net._type = dnn.BFLOAT16 if amp else dnn.FLOAT32
    return net


@lru_cache(1)
def examples():
    """[(what runs a layer, its setup as in unet.py)]"""
    halves = [(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU(inplace=True)) for _ in range(2)]
    known = {layers.double_conv: nn.Sequential(*halves[0], *halves[1]), layers.max_pool: nn.MaxPool2d(2)}
    known |= {layers.transposed: nn.ConvTranspose2d(1, 1, 2, stride=2), layers.pointwise: nn.Conv2d(1, 1, 1)}
    known |= {layers.upsample: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)}
    known |= {layers.dropout: unet.Dropout(0.5), layers.join: unet.Join()}
    return [(run, setup(layer)) for run, layer in known.items()]


def setup(module):
    """All that decides what a module computes, but for its numbers."""
    values = [getattr(module, name, None) for name in SETUP.split()]
    missing = [getattr(module, name, 0) is None for name in ("momentum", "bias")]
    return type(module), values, missing, *map(setup, module.children())


def layers_of(module):
    """[(layer, its function)] for all layers in a module, None for one that is unknown."""
    run = next((run for run, example in examples() if setup(module) == example), None)
    if run or type(module) not in CONTAINERS:
        return [(module, run)]
    return [pair for child in module.children() for pair in layers_of(child)]


@lru_cache(None)
def twin(kind, run):
    """A class of layers that run the function when they get Images, and do what they did when they get tensors."""

    def forward(self, *inputs):
        return run(self, *inputs) if isinstance(inputs[0], layers.Image) else kind.forward(self, *inputs)

    return type(kind.__name__, (kind,), {"forward": forward})


class Accelerated:
    """Mixed into a net's class: what OneFlow gets to see of a call."""

    @np.errstate(all="ignore")  # what is not finite goes on without a word, as in OneFlow
    def forward(self, *inputs):
        tensors = (*inputs, *self.parameters())
        if any(t.is_lazy or t.is_global or t.is_cuda or t.dtype != flow.float32 for t in tensors):
            return self._stock.forward(self, *inputs)  # not super(): in a graph self is a stand-in
        self.check()
        needed = [flow.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
        tape = layers.Tape(self, any(needed), all(np.isfinite(x.numpy()).all() for x in inputs))
        weak = weakref.proxy(tape)  # a cycle of references would hold arrays until Python looks for cycles
        arrays = (dnn.copy(x.numpy(), dnn.NHWC, self._type) for x in inputs)
        images = [layers.Image(array, weak, need) for array, need in zip(arrays, needed, strict=False)]
        try:
            result = self._stock.forward(self, *images)
        except (TypeError, AttributeError) as error:  # something else than a layer met an Image
            raise RuntimeError(f"{error}; an accelerated net's forward may only call layers of unet.py{OFF}") from error
        y = dnn.copy(result.array, dnn.NCHW, dnn.FLOAT32) if tape.finite else np.full(result.shape, np.nan, np.float32)
        for image, *_ in tape.steps:
            image.array = None  # what no step needs is let go of
        for norm, mean, variance in tape.later:
            norm.running_mean.copy_(flow.from_numpy(mean))
            norm.running_var.copy_(flow.from_numpy(variance))
            norm.num_batches_tracked.add_(1)
        if not tape.recording:
            return flow.from_numpy(y)

        def backward(ctx, dy):
            if flow.is_grad_enabled() or not tape.steps:
                raise RuntimeError(f"an accelerated net can be differentiated once, not twice{OFF}")
            tape.gradients[result] = dnn.copy(dy.numpy(), dnn.NHWC, self._type)
            while tape.steps:  # each is let go of at once, with the arrays that it kept
                image, step, sources = tape.steps.pop()
                for source, part in zip(sources, step(tape.gradients.pop(image)), strict=True):
                    if part is not None:  # an Image that several layers read gets the sum
                        tape.gradients[source] = layers.combine(dnn.ADD, part, tape.gradients.get(source), part)
            gradients = [dnn.copy(tape.gradients[x], dnn.NCHW, dnn.FLOAT32) if x.wanted else None for x in images]
            gradients += [tape.gradients.get(parameter) for parameter in self.parameters()]
            return tuple(flow.from_numpy(g) if need else None for g, need in zip(gradients, needed, strict=True))

        # What a class derived from autograd.Function calls; a class for each call would be another cycle.
        return AutogradFunctionBase.apply("cpu_kernels", lambda *_: flow.from_numpy(y), backward, *tensors)

    def check(self):
        """Raises RuntimeError where the kernels would compute something else than the net."""
        if os.getpid() != dnn.library().process:
            raise RuntimeError("an accelerated net can't compute in a forked process: its threads didn't survive")
        modules = list(self.modules())
        hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules[1:])
        if hooked or [type(module) for module in modules] != self._inside:
            raise RuntimeError(f"an accelerated net can't have hooks or other modules inside{OFF}")


def why_not():
    """Why the kernels can't run here, as a clause for a message; None where they can."""
    try:
        return None if dnn.library().has(dnn.AVX2) else "this CPU has no AVX2"
    except OSError as error:
        return f"oneDNN can't be loaded ({error}; pip install onednn-cpu-gomp==2023.2.0, apt-get install libgomp1)"


def has_bfloat16():
    """Whether the kernels run here and the CPU multiplies bfloat16 in hardware."""
    return why_not() is None and dnn.library().has(dnn.AVX512_BF16)
