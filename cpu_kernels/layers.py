"""The layers of unet.py on oneDNN: a function each, from an Image to the next.

An accelerated net runs its own forward() on Images instead of tensors. A function gets a layer and Images, computes,
and leaves on the tape how a gradient goes back, so that forward and backward stand side by side.
"""

from functools import partial
from itertools import pairwise

import numpy as np
import oneflow as flow
from oneflow.nn import functional as F

from . import onednn as dnn
from .onednn import FLOAT32, Layout, empty, layout_of, primitive


class Tape:
    """One call of a net: the way back through it, step by step, and the numbers of its parameters and buffers.

    arrays: {tensor: array}, all but counters. gradients: {parameter: array}. recording: whether there is a way back
    at all. later: calls of OneFlow, whose threads would take the cores from oneDNN's, for when the net is through.
    """

    def __init__(self, net, recording):
        self.recording, self.steps, self.gradients, self.later = recording, [], {}, []
        tensors = [*net.parameters(), *net.buffers()]
        # Each numpy() waits for OneFlow, up to a millisecond on busy cores: the many vectors go as one.
        vectors = [tensor for tensor in tensors if tensor.ndim == 1]
        self.arrays = {tensor: tensor.numpy() for tensor in tensors if tensor.ndim > 1}
        if vectors:
            joined = flow.cat([vector.detach() for vector in vectors]).numpy()
            ends = np.cumsum([0, *map(len, vectors)])
            self.arrays |= {vector: joined[a:b] for vector, (a, b) in zip(vectors, pairwise(ends), strict=True)}

    def close(self):
        """The net is through: arrays that no step needs are let go of, and OneFlow is told what waited."""
        for image, _ in self.steps:
            image.array = None
        for call in self.later:
            call()

    def play(self):
        """All steps, last first. Each is let go of at once, with the arrays that it kept."""
        while self.steps:
            image, step = self.steps.pop()
            gradient, image.gradient = image.gradient, None
            step(gradient)


class Image:
    """A batch of images between layers: `array` (N, H, W, C), float32 or the bits of bfloat16; `shape` is (N, C, H, W).

    gradient: an array like it, the sum of what its readers give back; wanted: whether anybody asks for it.
    """

    def __init__(self, array, tape, wanted=True):
        self.array, self.tape, self.wanted, self.gradient = array, tape, wanted, None

    @property
    def shape(self):
        return tuple(self.array.shape[i] for i in (0, 3, 1, 2))

    def then(self, array, backward):
        """The next image; backward(its gradient) gives back this one's, None where that is not wanted."""
        image = Image(array, self.tape)
        if self.tape.recording:
            self.tape.steps.append((image, lambda gradient: self.receive(backward(gradient))))
        return image

    def receive(self, gradient):
        if gradient is not None and self.gradient is not None:
            combine(dnn.ADD, gradient, self.gradient, gradient)
        self.gradient = self.gradient if gradient is None else gradient


def combine(algorithm, array, other, out):
    """array + other or array * other -> out, all of the same shape and type."""
    layouts = layout_of(array), layout_of(other), layout_of(out)
    primitive("binary", algorithm, *layouts)({dnn.SRC: array, dnn.SRC_1: other, dnn.DST: out})
    return out


class Convolution:
    """y = w * x + bias for w (K, C, k, k), float32, with stride 1 and a border of k // 2; oneDNN's three primitives.

    type: of y, by default that of x. then, extra: what is done to y, as primitive() takes it, and its arrays.
    """

    def __init__(self, x, w, bias=None, type=None, then=(), extra=(), recording=True):
        self.x, self.w, self.bias = x, w, bias
        self.y = empty((*x.shape[:3], len(w)), type or x.dtype)
        border = (w.shape[2] // 2,) * 2
        self.geometry = (1, 1), (0, 0), border, border
        biases = None if bias is None else Layout(bias.shape, (1,))
        self.layouts = layout_of(x), Layout(w.shape, None, x.dtype), biases
        kind = dnn.FORWARD if recording else dnn.INFERENCE
        arguments = kind, dnn.DIRECT, *self.layouts, layout_of(self.y), *self.geometry
        self.forward = primitive("convolution_forward", *arguments, then=then)
        arrays = {dnn.SRC: x, dnn.WEIGHTS: self.forward.pack(dnn.WEIGHTS, w), dnn.DST: self.y}
        arrays |= {dnn.then_argument(i): array for i, array in enumerate(extra)}
        self.forward(arrays | ({} if bias is None else {dnn.BIAS: bias}))

    def backward(self, dy, wanted):
        """dy -> (dx where that is wanted, dw, dbias); dx is dy * w with w rotated by 180 degrees, dw is x * dy."""
        x, w, bias = self.layouts
        dx = dbias = None
        if wanted:
            dx = empty(self.x.shape, self.x.dtype)
            arguments = dnn.DIRECT, x, w, layout_of(dy), *self.geometry
            data = primitive("convolution_backward_data", *arguments, hint=self.forward)
            data({dnn.DIFF_DST: dy, dnn.WEIGHTS: data.pack(dnn.WEIGHTS, self.w), dnn.DIFF_SRC: dx})
        arguments = dnn.DIRECT, x, w._replace(type=FLOAT32), bias, layout_of(dy), *self.geometry
        weights = primitive("convolution_backward_weights", *arguments, hint=self.forward)
        arrays = {dnn.SRC: self.x, dnn.DIFF_DST: dy, dnn.DIFF_WEIGHTS: weights.empty(dnn.DIFF_WEIGHTS)}
        if bias:
            dbias = arrays[dnn.DIFF_BIAS] = np.empty_like(self.bias)
        weights(arrays)
        return (dx, weights.unpack(dnn.DIFF_WEIGHTS, arrays[dnn.DIFF_WEIGHTS], np.empty_like(self.w)), dbias)


def pointwise(layer, x):
    """nn.Conv2d with a 1x1 kernel. Its output is float32, since the loss reads it."""
    tape, parameters = x.tape, (layer.weight, layer.bias)
    made = Convolution(x.array, *(tape.arrays[p] for p in parameters), FLOAT32, recording=tape.recording)

    def backward(dy):
        dx, *gradients = made.backward(dy, x.wanted)
        tape.gradients.update(zip(parameters, gradients, strict=True))
        return dx

    y, made.y = made.y, None
    return x.then(y, backward)


def transposed(layer, x):
    """nn.ConvTranspose2d with a 2x2 kernel and stride 2: a 1x1 convolution to the 2x2 pixels that each becomes."""
    tape, (images, height, width, channels), count = x.tape, x.array.shape, layer.weight.shape[1]
    w = dnn.copy(tape.arrays[layer.weight].transpose(2, 3, 1, 0), empty((2, 2, count, channels)))
    w, bias = w.reshape(4 * count, channels, 1, 1), np.tile(tape.arrays[layer.bias], 4)
    made = Convolution(x.array, w, bias, recording=tape.recording)
    split = images, height, width, 2, 2, count  # of a pixel's numbers: row, column, channel
    y = empty((images, height, 2, width, 2, count), x.array.dtype)
    dnn.copy(made.y.reshape(split), y.transpose(0, 1, 3, 2, 4, 5))
    made.y = None  # its memory

    def backward(dy):
        parts = dnn.copy(dy.reshape(y.shape).transpose(0, 1, 3, 2, 4, 5), empty(split, dy.dtype))
        dx, dw, dbias = made.backward(parts.reshape(images, height, width, -1), x.wanted)
        gradient = np.empty(layer.weight.shape, np.float32)
        dnn.copy(dw.reshape(2, 2, count, channels), gradient.transpose(2, 3, 1, 0))
        tape.gradients.update({layer.weight: gradient, layer.bias: dbias.reshape(4, -1).sum(0)})
        return dx

    return x.then(y.reshape(images, 2 * height, 2 * width, count), backward)


def double_conv(layer, *parts):
    """unet.DoubleConv of one or more Images that follow each other along the channels."""
    x = concatenate(parts) if len(parts) > 1 else parts[0]
    for i in (0, 3):
        x = half(x, *layer.double_conv[i : i + 2])
    return x


def half(x, conv, norm):
    tape, parameters = x.tape, (norm.weight, norm.bias, conv.bias, conv.weight)
    gamma, beta, bias, w = (tape.arrays[p] for p in parameters)
    mean, variance = tape.arrays[norm.running_mean], tape.arrays[norm.running_var]
    if not tape.recording and not norm.training:  # all in one primitive
        scale = gamma / np.sqrt(variance + np.float32(norm.eps))
        layout = Layout((1, len(scale), 1, 1), (len(scale), 1, 1, 1))
        then, extra = (((dnn.MULTIPLY, layout), (dnn.ADD, layout), dnn.RELU), (scale, beta + scale * (bias - mean)))
        return x.then(Convolution(x.array, w, then=then, extra=extra, recording=False).y, None)
    made = Convolution(x.array, w, recording=tape.recording)
    z, made.y = made.y, None  # kept by who needs them, not longer
    normal = Normalisation(z, gamma, beta, None if norm.training else (mean - bias, variance), norm.eps)
    y, normal.y = normal.y, None
    if norm.training:
        count = y.size // len(beta)
        old, new = np.float32(1 - norm.momentum), np.float32(norm.momentum)
        unbiased = normal.variance * np.float32(count / max(count - 1, 1))
        moves = (norm.running_mean, mean, normal.mean + bias), (norm.running_var, variance, unbiased)
        for buffer, before, batch in moves:
            tape.later.append(partial(buffer.copy_, flow.from_numpy(old * before + new * batch)))
        tape.later.append(partial(norm.num_batches_tracked.add_, 1))

    def backward(dy):
        dz, dgamma, dbeta = normal.backward(dy)
        dx, dw, _ = made.backward(dz, x.wanted)
        # the batch's mean takes a bias away again
        dbias = np.zeros_like(bias) if norm.training else gamma / np.sqrt(variance + np.float32(norm.eps)) * dbeta
        tape.gradients.update(zip(parameters, (dgamma, dbeta, dbias, dw), strict=True))
        return dx

    return x.then(y, backward)


class Normalisation:
    """y = max(0, batch normalisation of z), Ioffe and Szegedy (2015), arXiv:1502.03167.

    statistics: the mean and the variance to use; None takes those of z. Kept as `mean` and `variance`, biased.
    """

    def __init__(self, z, gamma, beta, statistics, eps):
        self.mean, self.variance = statistics or (np.empty_like(gamma), np.empty_like(gamma))
        flags = dnn.USE_SCALE | dnn.USE_SHIFT | dnn.FUSE_RELU | (dnn.GLOBAL_STATISTICS if statistics else 0)
        self.setup, self.y = (eps, flags), empty(z.shape, z.dtype)
        layouts = layout_of(z), layout_of(self.y)
        self.forward = primitive("batch_normalization_forward", dnn.FORWARD, *layouts, *self.setup)
        self.arrays = {dnn.SRC: z, dnn.MEAN: self.mean, dnn.VARIANCE: self.variance, dnn.SCALE: gamma}
        self.arrays[dnn.WORKSPACE] = self.forward.empty(dnn.WORKSPACE)  # which ReLUs are open
        self.forward(self.arrays | {dnn.DST: self.y, dnn.SHIFT: beta})

    def backward(self, dy):
        """dy -> (dz, gradients of gamma and beta); dz takes the place of dy. Once: z is let go of."""
        dgamma, dbeta = np.empty_like(self.mean), np.empty_like(self.mean)
        arguments = dnn.BACKWARD, layout_of(dy), layout_of(dy), layout_of(dy), *self.setup
        backward = primitive("batch_normalization_backward", *arguments, hint=self.forward)
        self.arrays |= {dnn.DIFF_DST: dy, dnn.DIFF_SRC: dy, dnn.DIFF_SCALE: dgamma, dnn.DIFF_SHIFT: dbeta}
        backward(self.arrays)
        self.arrays = None
        return dy, dgamma, dbeta


def concatenate(images):
    first = images[0].array
    ends = np.cumsum([0, *(image.shape[1] for image in images)])
    windows = [np.s_[..., a:b] for a, b in pairwise(ends)]
    array = empty((*first.shape[:3], ends[-1]), first.dtype)
    for image, window in zip(images, windows, strict=True):
        dnn.copy(image.array, array[window])

    def backward(gradient):
        for image, window in zip(images, windows, strict=True):
            image.receive(dnn.copy(gradient[window], empty(gradient[window].shape, gradient.dtype)))

    return images[0].then(array, backward)


def max_pool(layer, x):
    """nn.MaxPool2d(2). The first of several equal maxima gets the gradient, as in OneFlow."""
    images, height, width, channels = x.array.shape
    y = empty((images, height // 2, width // 2, channels), x.array.dtype)
    arguments = (dnn.POOL_MAX, layout_of(x.array), layout_of(y), (2, 2), (2, 2), (0, 0), (0, 0), (0, 0))
    pool = primitive("pooling_forward", dnn.FORWARD, *arguments)
    chosen = pool.empty(dnn.WORKSPACE)
    pool({dnn.SRC: x.array, dnn.DST: y, dnn.WORKSPACE: chosen})

    def backward(dy):
        dx = empty((images, height, width, channels), dy.dtype)
        spread = primitive("pooling_backward", *arguments, hint=pool)
        spread({dnn.DIFF_DST: dy, dnn.DIFF_SRC: dx, dnn.WORKSPACE: chosen})
        return dx

    return x.then(y, backward)


def upsample(layer, x):
    """nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), which oneDNN lacks: products in NumPy."""

    def interpolation(size):  # (2 size, size): from the first to the last of size, at 2 size places
        places = np.linspace(0, size - 1, 2 * size)
        return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size))).astype(np.float32)

    def resample(array, rows, columns):
        images, height, width, channels = array.shape
        y = dnn.copy(array, empty(array.shape)).reshape(images, height, width * channels)
        y = columns @ (rows @ y).reshape(images, len(rows), width, channels)
        return dnn.copy(y, empty(y.shape, array.dtype))

    rows, columns = map(interpolation, x.shape[2:])
    return x.then(resample(x.array, rows, columns), lambda dy: resample(dy, rows.T, columns.T))


def pad(layer, x, skip):
    """unet.PadTo"""
    if x.shape[2:] == skip.shape[2:]:
        return x
    height, width = x.shape[2:]
    top, left = ((skip.shape[i] - x.shape[i]) // 2 for i in (2, 3))
    window = np.s_[:, top : top + height, left : left + width]
    array = np.zeros((*skip.array.shape[:3], x.shape[1]), x.array.dtype)
    array[window] = x.array
    return x.then(array, lambda dy: np.ascontiguousarray(dy[window]))


def dropout(layer, x):
    """unet.Dropout. OneFlow draws the numbers, so that they are those of a net that is not accelerated."""
    if not layer.training or not layer.p:
        return x
    mask = F.dropout(flow.ones(*x.shape), layer.p).numpy().transpose(0, 2, 3, 1)
    mask = dnn.copy(mask, empty(mask.shape, x.array.dtype))
    y = combine(dnn.MULTIPLY, x.array, mask, empty(mask.shape, mask.dtype))
    return x.then(y, lambda dy: combine(dnn.MULTIPLY, dy, mask, dy))
