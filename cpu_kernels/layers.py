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

    arrays: {tensor: array}. gradients: {parameter: array}. recording: whether there is a way back. later: calls of
    OneFlow, whose threads would take the cores from oneDNN's, for when the net is through.
    """

    def __init__(self, net, recording):
        self.recording, self.finite, self.steps, self.later = recording, True, [], []
        self.arrays, self.gradients = {}, {}
        tensors = {t for t in (*net.parameters(), *net.buffers()) if t.ndim}
        if vectors := [t for t in tensors if t.ndim == 1]:  # as one, since each numpy() asks OneFlow's threads
            with flow.no_grad():
                parts = np.split(flow.cat(vectors).numpy(), np.cumsum([len(t) for t in vectors[:-1]]))
            self.arrays = dict(zip(vectors, parts, strict=True))
        self.arrays |= {t: t.numpy() for t in tensors.difference(vectors)}

    def look(self, y):
        """Keep in mind whether a ReLU's result is finite: oneDNN's makes 0 of NaN, which infinity comes before."""
        largest = y[:, ::8, ::8].max()
        self.finite &= bool(largest < 0x7F80 if y.dtype == dnn.BFLOAT16 else np.isfinite(largest))

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
        if gradient is not None:
            first = self.gradient is None
            self.gradient = gradient if first else combine(dnn.ADD, gradient, self.gradient, gradient)


def combine(algorithm, array, other, out):
    """array + other or array * other -> out, all of the same shape and type."""
    layouts = layout_of(array), layout_of(other), layout_of(out)
    primitive("binary", algorithm, *layouts)({dnn.SRC: array, dnn.SRC_1: other, dnn.DST: out})
    return out


def convolve(x, w, bias=None, type=None, normalised=None, recording=True):
    """y = w * x + bias for w (K, C, k, k), float32, with stride 1 and a border of k // 2 -> (y, backward).

    type: of y, by default that of x. normalised: (scale, shift) makes it max(0, scale y + shift), without a way back.
    backward(dy, wanted) gives dx (if wanted), dw and dbias: dx is dy * w with w rotated by 180 degrees, dw is x * dy.
    """
    y = empty((*x.shape[:3], len(w)), type or x.dtype)
    images, shape, border = layout_of(x), x.shape, (w.shape[2] // 2,) * 2
    weights, biases = Layout(w.shape, None, x.dtype), None if bias is None else Layout(bias.shape, (1,))
    geometry = (1, 1), (0, 0), border, border
    arguments = dnn.DIRECT, images, weights, biases, layout_of(y), *geometry
    kind = dnn.FORWARD if recording else dnn.INFERENCE
    forward = primitive("convolution_forward", kind, *arguments, normalised=len(w) if normalised else 0)
    arrays = {dnn.SRC: x, dnn.WEIGHTS: forward.pack(dnn.WEIGHTS, w), dnn.DST: y} | ({dnn.BIAS: bias} if biases else {})
    forward(arrays | dict(zip((dnn.POST_SCALE, dnn.POST_SHIFT), normalised or (), strict=False)))

    def backward(dy, wanted):
        dx = dbias = None
        if wanted:
            dx, arguments = empty(shape, dy.dtype), (dnn.DIRECT, images, weights, layout_of(dy), *geometry)
            data = primitive("convolution_backward_data", *arguments, hint=forward)
            data({dnn.DIFF_DST: dy, dnn.WEIGHTS: data.pack(dnn.WEIGHTS, w), dnn.DIFF_SRC: dx})
        arguments = dnn.DIRECT, images, weights._replace(type=FLOAT32), biases, layout_of(dy), *geometry
        gradient = primitive("convolution_backward_weights", *arguments, hint=forward)
        arrays = {dnn.SRC: x, dnn.DIFF_DST: dy, dnn.DIFF_WEIGHTS: gradient.empty(dnn.DIFF_WEIGHTS)}
        if biases:
            dbias = arrays[dnn.DIFF_BIAS] = np.empty_like(bias)
        gradient(arrays)
        return dx, gradient.unpack(dnn.DIFF_WEIGHTS, arrays[dnn.DIFF_WEIGHTS], np.empty_like(w)), dbias

    return y, backward


def pointwise(layer, x):
    """nn.Conv2d with a 1x1 kernel. Its output is float32, since the loss reads it."""
    tape, parameters = x.tape, (layer.weight, layer.bias)
    y, back = convolve(x.array, *(tape.arrays[p] for p in parameters), FLOAT32, recording=tape.recording)

    def backward(dy):
        dx, *gradients = back(dy, x.wanted)
        tape.gradients.update(zip(parameters, gradients, strict=True))
        return dx

    return x.then(y, backward)


def transposed(layer, x):
    """nn.ConvTranspose2d with a 2x2 kernel and stride 2: a 1x1 convolution to the 2x2 pixels that each becomes."""
    tape, (images, height, width, channels), count = x.tape, x.array.shape, layer.weight.shape[1]
    w = dnn.copy(tape.arrays[layer.weight].transpose(2, 3, 1, 0), empty((2, 2, count, channels)))
    w, bias = w.reshape(4 * count, channels, 1, 1), np.tile(tape.arrays[layer.bias], 4)
    pixels, back = convolve(x.array, w, bias, recording=tape.recording)
    split = images, height, width, 2, 2, count  # of a pixel's numbers: row, column, channel
    doubled = images, height, 2, width, 2, count
    y = empty(doubled, x.array.dtype)
    dnn.copy(pixels.reshape(split), y.transpose(0, 1, 3, 2, 4, 5))

    def backward(dy):
        parts = dnn.copy(dy.reshape(doubled).transpose(0, 1, 3, 2, 4, 5), empty(split, dy.dtype))
        dx, dw, dbias = back(parts.reshape(images, height, width, -1), x.wanted)
        gradient = np.empty(layer.weight.shape, np.float32)
        dnn.copy(dw.reshape(2, 2, count, channels), gradient.transpose(2, 3, 1, 0))
        tape.gradients.update({layer.weight: gradient, layer.bias: dbias.reshape(4, -1).sum(0)})
        return dx

    return x.then(y.reshape(images, 2 * height, 2 * width, count), backward)


def double_conv(layer, x):
    """(3x3 convolution, batch normalisation, ReLU) twice, what unet.DoubleConv holds."""
    return half(half(x, *layer[0:2]), *layer[3:5])


def half(x, conv, norm):
    """3x3 convolution, batch normalisation, ReLU. The convolution is without its bias, which only moves the mean."""
    tape, parameters = x.tape, (norm.weight, norm.bias, conv.bias, conv.weight)
    gamma, beta, bias, w = (tape.arrays[p] for p in parameters)
    mean, variance = tape.arrays[norm.running_mean], tape.arrays[norm.running_var]
    scale = gamma / np.sqrt(variance + np.float32(norm.eps))
    if not tape.recording and not norm.training:  # all in one primitive
        y, _ = convolve(x.array, w, normalised=(scale, beta + scale * (bias - mean)), recording=False)
        tape.look(y)
        return x.then(y, None)
    z, convolution_back = convolve(x.array, w, recording=tape.recording)
    statistics = None if norm.training else (mean - bias, variance)
    y, batch_mean, batch_variance, back = normalise(z, gamma, beta, statistics, norm.eps)
    tape.finite &= bool(np.isfinite([batch_mean, batch_variance]).all())
    tape.look(y)
    if norm.training:
        count, momentum = z.size // len(beta), np.float32(norm.momentum)
        unbiased = batch_variance * np.float32(count / max(count - 1, 1))
        moves = (norm.running_mean, mean, batch_mean + bias), (norm.running_var, variance, unbiased)
        for buffer, before, batch in moves:
            tape.later.append(partial(buffer.copy_, flow.from_numpy(before + momentum * (batch - before))))
        tape.later.append(partial(norm.num_batches_tracked.add_, 1))
    trained = norm.training  # and so the batch's mean takes a bias away again

    def backward(dy):
        dz, dgamma, dbeta = back(dy)
        dx, dw, _ = convolution_back(dz, x.wanted)
        dbias = np.zeros_like(bias) if trained else scale * dbeta
        tape.gradients.update(zip(parameters, (dgamma, dbeta, dbias, dw), strict=True))
        return dx

    return x.then(y, backward)


def normalise(z, gamma, beta, statistics, eps):
    """y = max(0, batch normalisation of z) -> (y, mean, variance, backward). Ioffe, Szegedy (2015), arXiv:1502.03167.

    statistics: (mean, variance) to use; None takes those of z, the variance biased. backward(dy) gives dz, which takes
    the place of dy, and the gradients of gamma and beta.
    """
    mean, variance = statistics or (np.empty_like(gamma), np.empty_like(gamma))
    setup = eps, dnn.USE_SCALE | dnn.USE_SHIFT | dnn.FUSE_RELU | (dnn.GLOBAL_STATISTICS if statistics else 0)
    y, images = empty(z.shape, z.dtype), layout_of(z)
    forward = primitive("batch_normalization_forward", dnn.FORWARD, images, images, *setup)
    arrays = {dnn.SRC: z, dnn.MEAN: mean, dnn.VARIANCE: variance, dnn.SCALE: gamma}
    arrays[dnn.WORKSPACE] = forward.empty(dnn.WORKSPACE)  # which ReLUs are open
    forward(arrays | {dnn.DST: y, dnn.SHIFT: beta})

    def backward(dy):
        dgamma, dbeta = np.empty_like(gamma), np.empty_like(gamma)
        back = primitive("batch_normalization_backward", dnn.BACKWARD, images, images, images, *setup, hint=forward)
        back(arrays | {dnn.DIFF_DST: dy, dnn.DIFF_SRC: dy, dnn.DIFF_SCALE: dgamma, dnn.DIFF_SHIFT: dbeta})
        arrays.clear()  # here memory use is highest
        return dy, dgamma, dbeta

    return y, mean, variance, backward


def concatenate(layer, *images):
    """unet.Cat"""
    if len(images) == 1:
        return images[0]
    first = images[0].array
    ends = np.cumsum([0, *(image.shape[1] for image in images)])
    array, windows = empty((*first.shape[:3], ends[-1]), first.dtype), [np.s_[..., a:b] for a, b in pairwise(ends)]
    for image, window in zip(images, windows, strict=True):
        dnn.copy(image.array, array[window])
        image.array = image.array if image.tape.recording else None  # from here on inference needs most memory

    def backward(gradient):
        for image, part in zip(images, (gradient[window] for window in windows), strict=True):
            image.receive(dnn.copy(part, empty(part.shape, part.dtype)))

    return images[0].then(array, backward)


def max_pool(layer, x):
    """nn.MaxPool2d(2). The first of several equal maxima gets the gradient, as in OneFlow."""
    shape = images, height, width, channels = x.array.shape
    y = empty((images, height // 2, width // 2, channels), x.array.dtype)
    arguments = dnn.POOL_MAX, layout_of(x.array), layout_of(y), (2, 2), (2, 2), (0, 0), (0, 0), (0, 0)
    pool = primitive("pooling_forward", dnn.FORWARD, *arguments)
    chosen = {dnn.WORKSPACE: pool.empty(dnn.WORKSPACE)}
    pool({dnn.SRC: x.array, dnn.DST: y} | chosen)

    def backward(dy):
        dx = empty(shape, dy.dtype)
        primitive("pooling_backward", *arguments, hint=pool)({dnn.DIFF_DST: dy, dnn.DIFF_SRC: dx} | chosen)
        return dx

    return x.then(y, backward)


def upsample(layer, x):
    """nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), which oneDNN lacks: products in NumPy."""

    def resample(array, rows, columns):
        images, height, width, channels = array.shape
        y = dnn.copy(array, empty(array.shape)).reshape(images, height, width * channels)
        y = columns @ (rows @ y).reshape(images, len(rows), width, channels)
        return dnn.copy(y, empty(y.shape, array.dtype))

    # (2 size, size): linear interpolation at 2 size places from the first to the last of size
    places = ((np.linspace(0, size - 1, 2 * size)[:, None], np.arange(size)) for size in x.shape[2:])
    rows, columns = (np.maximum(0, 1 - np.abs(to - of)).astype(np.float32) for to, of in places)
    return x.then(resample(x.array, rows, columns), lambda dy: resample(dy, rows.T, columns.T))


def pad(layer, x, skip):
    """unet.PadTo"""
    if x.shape[2:] == skip.shape[2:]:
        return x
    (height, width), (top, left) = x.shape[2:], ((skip.shape[i] - x.shape[i]) // 2 for i in (2, 3))
    window = np.s_[:, top : top + height, left : left + width]
    array = np.zeros((*skip.array.shape[:3], x.shape[1]), x.array.dtype)
    array[window] = x.array
    return x.then(array, lambda dy: np.ascontiguousarray(dy[window]))


def dropout(layer, x):
    """unet.Dropout. OneFlow draws the numbers: those of a net that is not accelerated."""
    if not layer.training or not layer.p:
        return x
    drawn = F.dropout(flow.ones(*x.shape), layer.p).numpy().transpose(0, 2, 3, 1)
    mask = dnn.copy(drawn, empty(drawn.shape, x.array.dtype))
    y = combine(dnn.MULTIPLY, x.array, mask, empty(mask.shape, mask.dtype))
    return x.then(y, lambda dy: combine(dnn.MULTIPLY, dy, mask, dy))
