"""The U-Net of unet.py in float64 NumPy, forward and backward, one plain line for each operation.

What the fast kernels and OneFlow's own are measured against; slow, so for small images only.
"""

import numpy as np
import oneflow as flow
from numpy.lib.stride_tricks import sliding_window_view
from oneflow import nn


class Value:
    """An array, its gradient after backward(), and how to pass the gradient on."""

    def __init__(self, array, inputs=(), backward=None):
        self.array = np.asarray(array, np.float64)
        self.gradient = np.zeros_like(self.array)
        self.inputs, self.pass_on = inputs, backward

    def backward(self, gradient):
        """Add d/d(this) of sum(this * gradient) to the gradients of everything it came from."""
        order, seen = [], set()

        def visit(value):
            if id(value) not in seen:
                seen.add(id(value))
                for parent in value.inputs:
                    visit(parent)
                order.append(value)

        visit(self)
        self.gradient = np.asarray(gradient, np.float64)
        for value in reversed(order):
            parts = value.pass_on(value.gradient) if value.inputs else ()
            for parent, part in zip(value.inputs, parts, strict=True):
                parent.gradient = parent.gradient + part


def conv3x3(x, w, b):
    windows = sliding_window_view(np.pad(x.array, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    columns = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, w.array[0].size)
    n, _, height, width = x.array.shape
    k = len(w.array)
    flat = w.array.reshape(k, -1)
    y = (columns @ flat.T + b.array).reshape(n, height, width, k).transpose(0, 3, 1, 2)

    def backward(dy):
        rows = dy.transpose(0, 2, 3, 1).reshape(-1, k)
        back = np.pad(dy, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = sliding_window_view(back, (3, 3), (2, 3)).transpose(0, 2, 3, 1, 4, 5)
        turned = w.array[:, :, ::-1, ::-1].transpose(1, 0, 2, 3).reshape(x.array.shape[1], -1)
        dx = windows.reshape(-1, 9 * k) @ turned.T
        dx = dx.reshape(n, height, width, -1).transpose(0, 3, 1, 2)
        return dx, (rows.T @ columns).reshape(w.array.shape), rows.sum(0)

    return Value(y, (x, w, b), backward)


def normalise(x, gamma, beta, mean, variance, training, eps=1e-5):
    """Batch normalisation; `mean` and `variance` are used in evaluation, replaced in training."""
    axes = (0, 2, 3)
    if training:
        mean, variance = x.array.mean(axes), x.array.var(axes)
    inverse = 1 / np.sqrt(variance + eps)
    shape = (1, -1, 1, 1)
    hat = (x.array - mean.reshape(shape)) * inverse.reshape(shape)
    y = hat * gamma.array.reshape(shape) + beta.array.reshape(shape)

    def backward(dy):
        dhat = dy * gamma.array.reshape(shape)
        if training:
            dhat = dhat - dhat.mean(axes).reshape(shape) - hat * (dhat * hat).mean(axes).reshape(shape)
        return dhat * inverse.reshape(shape), (dy * hat).sum(axes), dy.sum(axes)

    return Value(y, (x, gamma, beta), backward), mean, variance


def relu(x):
    return Value(np.maximum(x.array, 0), (x,), lambda dy: (dy * (x.array > 0),))


def pool(x):
    n, c, height, width = x.array.shape
    even = x.array[:, :, : height // 2 * 2, : width // 2 * 2]
    quads = even.reshape(n, c, height // 2, 2, width // 2, 2).swapaxes(3, 4)
    quads = quads.reshape(n, c, height // 2, width // 2, 4)
    chosen = quads.argmax(-1)  # the first of equals

    def backward(dy):
        spread = np.eye(4)[chosen] * dy[..., None]
        spread = spread.reshape(*dy.shape, 2, 2).swapaxes(3, 4).reshape(even.shape)
        dx = np.zeros_like(x.array)
        dx[:, :, : even.shape[2], : even.shape[3]] = spread
        return (dx,)

    return Value(quads.max(-1), (x,), backward)


def upsample(x, w, b):
    """2x2 transposed convolution, stride 2."""
    n, _, height, width = x.array.shape
    y = np.einsum("nchw,ckij->nkhiwj", x.array, w.array, optimize=True)
    y = y.reshape(n, -1, 2 * height, 2 * width) + b.array.reshape(1, -1, 1, 1)

    def backward(dy):
        dy = dy.reshape(n, -1, height, 2, width, 2)
        dx = np.einsum("nkhiwj,ckij->nchw", dy, w.array, optimize=True)
        dw = np.einsum("nkhiwj,nchw->ckij", dy, x.array, optimize=True)
        return dx, dw, dy.sum((0, 2, 3, 4, 5))

    return Value(y, (x, w, b), backward)


def interpolate(x):
    """Bilinear upsampling by 2, corners aligned."""

    def matrix(size):
        at = np.arange(2 * size) * (size - 1) / (2 * size - 1)
        low = np.minimum(at.astype(int), size - 1)
        rows = np.zeros((2 * size, size))
        rows[np.arange(2 * size), low] += 1 - (at - low)
        rows[np.arange(2 * size), np.minimum(low + 1, size - 1)] += at - low
        return rows

    vertical, horizontal = (matrix(size) for size in x.array.shape[2:])
    return Value(vertical @ x.array @ horizontal.T, (x,), lambda dy: (vertical.T @ dy @ horizontal,))


def join(skip, x):
    """Pad x to the skip's size and put it behind the skip."""
    missing = np.subtract(skip.array.shape[2:], x.array.shape[2:])
    top, left = missing // 2
    height, width = x.array.shape[2:]
    wide = ((0, 0), (0, 0), (top, missing[0] - top), (left, missing[1] - left))
    y = np.concatenate([skip.array, np.pad(x.array, wide)], 1)
    c = skip.array.shape[1]

    def backward(dy):
        return dy[:, :c], dy[:, c:, top : top + height, left : left + width]

    return Value(y, (skip, x), backward)


def conv1x1(x, w, b):
    flat = w.array[:, :, 0, 0]
    y = np.einsum("nchw,kc->nkhw", x.array, flat) + b.array.reshape(1, -1, 1, 1)

    def backward(dy):
        dw = np.einsum("nkhw,nchw->kc", dy, x.array)[:, :, None, None]
        return np.einsum("nkhw,kc->nchw", dy, flat), dw, dy.sum((0, 2, 3))

    return Value(y, (x, w, b), backward)


class Reference:
    """A U-Net, or one of its blocks, with the state dict of a net made by unet.py."""

    def __init__(self, state):
        arrays = {name: tensor.numpy().copy() for name, tensor in state.items()}
        self.parameters = {n: Value(a) for n, a in arrays.items() if n.endswith(("weight", "bias"))}
        self.buffers = {n: a for n, a in arrays.items() if n not in self.parameters}

    def named(self, prefix):
        return self.parameters[f"{prefix}.weight"], self.parameters[f"{prefix}.bias"]

    def double_conv(self, x, prefix, training):
        for conv, norm in ((0, 1), (3, 4)):
            x = conv3x3(x, *self.named(f"{prefix}double_conv.{conv}"))
            name = f"{prefix}double_conv.{norm}"
            old = [self.buffers[f"{name}.running_{kind}"].astype(float) for kind in ("mean", "var")]
            x, *new = normalise(x, *self.named(name), *old, training)
            if training:
                count = x.array.size / x.array.shape[1]
                new[1] = new[1] * count / (count - 1)
                for kind, before, after in zip(("mean", "var"), old, new, strict=True):
                    self.buffers[f"{name}.running_{kind}"] = 0.9 * before + 0.1 * after
                self.buffers[f"{name}.num_batches_tracked"] += 1
            x = relu(x)
        return x

    def unet(self, x, training):
        skips = []
        for level in range(5):
            prefix = f"down{level}.maxpool_conv.1." if level else "inc."
            x = self.double_conv(pool(x) if level else x, prefix, training)
            skips.append(x)
        for level in range(1, 5):
            up = f"up{level}.up"
            x = upsample(x, *self.named(up)) if f"{up}.weight" in self.parameters else interpolate(x)
            x = self.double_conv(join(skips[4 - level], x), f"up{level}.conv.", training)
        return conv1x1(x, *self.named("outc.conv"))


def distance(array, reference):
    """Relative distance in the L2 norm; absolute where the reference is zero."""
    array = np.asarray(array, np.float64)
    scale = np.linalg.norm(reference.ravel())
    return np.linalg.norm((array - reference).ravel()) / (scale or 1)


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


def small_modules():
    return [
        nn.Conv2d(2, 3, 1),
        nn.ConvTranspose2d(2, 3, 2, stride=2),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    ]
