"""The layers of unet.py on oneDNN. A function gets a layer and Images, computes the next Image, and leaves on the tape
how a gradient goes back: forward and backward stand side by side."""

import numpy as np
import oneflow as flow

from . import onednn as dnn
from .onednn import FLOAT32, descriptor, empty, layout, layout_of, primitive


class Tape:
    """A net's call. arrays: of parameters and buffers. finite: all numbers so far. steps: the way back, if recording.
    gradients: of parameters and Images. later: [(nn.BatchNorm2d, mean, variance)]: OneFlow takes cores from oneDNN."""

    def __init__(self, net, recording, finite):
        self.recording, self.finite, self.steps, self.later, self.gradients = recording, finite, [], [], {}
        tensors = [*net.parameters(), *net.buffers()]
        vectors = [t for t in tensors if t.ndim == 1]
        self.arrays = {t: t.numpy() for t in tensors if t.ndim > 1}
        if vectors:  # as one, since each numpy() asks OneFlow's threads
            parts = np.split(flow.cat(vectors).numpy(), np.cumsum([len(t) for t in vectors[:-1]]))
            self.arrays.update(zip(vectors, parts, strict=True))


class Image:
    """A batch of images between layers: `array` (N, H, W, C), float32 or bits of bfloat16; `shape` is (N, C, H, W)."""

    def __init__(self, array, tape, wanted=True):
        self.array, self.tape, self.wanted = array, tape, wanted  # wanted: whether anybody asks for its gradient
        self.shape = tuple(array.shape[i] for i in dnn.NCHW)

    def then(self, array, backward, *others):
        """The next Image. backward(its gradient) gives those of self (None: unwanted), other Images and parameters."""
        image = Image(array, self.tape)
        if self.tape.recording:
            self.tape.steps.append((image, backward, (self, *others)))
        return image


def combine(algorithm, array, other, out):
    """array + other or array * other -> out, all of the same shape and type; nothing is done where other is None."""
    if other is not None:
        arguments = algorithm, layout_of(array), layout_of(other), layout_of(out)
        primitive("binary", *arguments)({dnn.SRC: array, dnn.SRC_1: other, dnn.DST: out})
    return out


def convolve(x, w, bias=None, type=None, normalised=()):
    """y = w * x + bias for an Image x and w (K, C, k, k), float32, stride 1 and a border of k // 2 -> (y, backward).
    type: of y, by default that of x. normalised: (scale, shift) makes it max(0, scale y + shift), without a way back.
    backward(dy) gives dx (if wanted), dw and dbias: dx is dy * w with w rotated by 180 degrees, dw is x * dy."""
    array, images = x.array, layout_of(x.array)
    weights, biases = descriptor(w.shape, None, array.dtype), None if bias is None else layout(bias)
    border = (w.shape[2] // 2,) * 2
    geometry = (1, 1), (0, 0), border, border  # strides, dilations, borders
    y = empty((*array.shape[:3], len(w)), type or array.dtype)
    arguments = dnn.FORWARD, dnn.DIRECT, images, weights, biases, layout_of(y), *geometry
    forward = primitive("convolution_forward", *arguments, normalised=len(w) if normalised else 0)
    arrays = {dnn.SRC: array, dnn.WEIGHTS: forward.pack(dnn.WEIGHTS, w), dnn.BIAS: bias, dnn.DST: y}
    forward(arrays | dict(zip((dnn.POST_SCALE, dnn.POST_SHIFT), normalised, strict=False)))

    def backward(dy):
        common = layout_of(dy), *geometry, forward.description
        dx = empty(array.shape, dy.dtype) if x.wanted else None
        if x.wanted:
            data = primitive("convolution_backward_data", dnn.DIRECT, images, weights, *common)
            data({dnn.DIFF_DST: dy, dnn.WEIGHTS: data.pack(dnn.WEIGHTS, w), dnn.DIFF_SRC: dx})
        arguments = dnn.DIRECT, images, descriptor(w.shape, None, FLOAT32), biases, *common
        gradient = primitive("convolution_backward_weights", *arguments)
        dw = gradient.empty(dnn.DIFF_WEIGHTS)
        dbias = None if bias is None else np.empty_like(bias)
        gradient({dnn.SRC: array, dnn.DIFF_DST: dy, dnn.DIFF_WEIGHTS: dw, dnn.DIFF_BIAS: dbias})
        return dx, dnn.copy(dw, target=np.empty_like(w), of=gradient.wanted(dnn.DIFF_WEIGHTS)), dbias

    return y, backward


def pointwise(layer, x):
    """nn.Conv2d with a 1x1 kernel. Its output is float32, since the loss reads it."""
    y, backward = convolve(x, x.tape.arrays[layer.weight], x.tape.arrays[layer.bias], FLOAT32)
    return x.then(y, backward, layer.weight, layer.bias)


def transposed(layer, x):
    """nn.ConvTranspose2d with a 2x2 kernel and stride 2: a 1x1 convolution to the 2x2 pixels that each becomes."""
    (images, height, width, _), count = x.array.shape, layer.weight.shape[1]
    w = dnn.copy(x.tape.arrays[layer.weight], (2, 3, 1, 0)).reshape(4 * count, -1, 1, 1)
    pixels, back = convolve(x, w, np.tile(x.tape.arrays[layer.bias], 4))
    order = 0, 1, 3, 2, 4, 5  # (N, H, W, 2, 2, C) to (N, H, 2, W, 2, C), and back
    y = dnn.copy(pixels.reshape(images, height, width, 2, 2, count), order)

    def backward(dy):
        parts = dnn.copy(dy.reshape(images, height, 2, width, 2, count), order)
        dx, dw, dbias = back(parts.reshape(images, height, width, -1))
        dw = dnn.copy(dw.reshape(2, 2, count, -1), (3, 2, 0, 1))
        return dx, dw, dbias.reshape(4, -1).sum(0)

    return x.then(y.reshape(images, 2 * height, 2 * width, count), backward, layer.weight, layer.bias)


def double_conv(layer, x):
    """(3x3 convolution, batch normalisation, ReLU) twice, what unet.DoubleConv holds."""
    for conv, norm in (layer[0:2], layer[3:5]):
        x = half(x, conv, norm)
        largest = x.array[:, ::8, ::8].max()  # oneDNN's ReLU makes 0 of NaN, which infinity comes before
        x.tape.finite &= largest < 0x7F80 if x.array.dtype == dnn.BFLOAT16 else np.isfinite(largest)
    return x


def half(x, conv, norm):
    """3x3 convolution (its bias only moves the mean), batch normalisation (Ioffe, Szegedy, arXiv:1502.03167), ReLU."""
    tape, training = x.tape, norm.training
    parameters = conv.weight, conv.bias, norm.weight, norm.bias
    w, bias, gamma, beta, mean, variance = (tape.arrays[t] for t in (*parameters, norm.running_mean, norm.running_var))
    scale = gamma / np.sqrt(variance + np.float32(norm.eps))
    if not tape.recording and not training:  # all in one primitive
        return x.then(convolve(x, w, normalised=(scale, beta + scale * (bias - mean)))[0], None)
    z, convolution_back = convolve(x, w)
    y, images = empty(z.shape, z.dtype), layout_of(z)
    statistics = (np.empty_like(mean), np.empty_like(mean)) if training else (mean - bias, variance)
    setup = images, norm.eps, dnn.USE_SCALE | dnn.USE_SHIFT | dnn.FUSE_RELU | (0 if training else dnn.GLOBAL_STATISTICS)
    forward = primitive("batch_normalization_forward", dnn.FORWARD, images, *setup)
    arrays = {dnn.SRC: z, dnn.MEAN: statistics[0], dnn.VARIANCE: statistics[1], dnn.SCALE: gamma}
    arrays[dnn.WORKSPACE] = forward.empty(dnn.WORKSPACE)  # which ReLUs are open
    forward(arrays | {dnn.DST: y, dnn.SHIFT: beta})
    tape.finite &= np.isfinite(statistics).all()
    if training:
        momentum, count = np.float32(norm.momentum), z.size // len(beta)
        unbiased = statistics[1] * np.float32(count / max(count - 1, 1))
        new_mean = mean + momentum * (statistics[0] + bias - mean)
        tape.later.append((norm, new_mean, variance + momentum * (unbiased - variance)))

    def backward(dy):
        dgamma, dbeta = np.empty_like(gamma), np.empty_like(beta)
        back = primitive("batch_normalization_backward", dnn.BACKWARD, images, images, *setup, forward.description)
        back(arrays | {dnn.DIFF_DST: dy, dnn.DIFF_SRC: dy, dnn.DIFF_SCALE: dgamma, dnn.DIFF_SHIFT: dbeta})
        arrays.clear()  # here memory use is highest
        dx, dw, _ = convolution_back(dy)  # dz has taken the place of dy
        dbias = np.zeros_like(bias) if training else scale * dbeta  # a batch's mean takes a bias away again
        return dx, dw, dbias, dgamma, dbeta

    return x.then(y, backward, *parameters)


def join(layer, skip, x):
    """unet.Join"""
    images, height, width, channels = skip.array.shape
    array = empty((images, height, width, channels + x.shape[1]), skip.array.dtype)
    array[:, x.shape[2] :], array[:, :, x.shape[3] :] = 0, 0
    windows = np.s_[..., :channels], np.s_[:, : x.shape[2], : x.shape[3], channels:]
    for image, window in zip((skip, x), windows, strict=True):
        dnn.copy(image.array, target=array[window])
        image.array = image.array if image.tape.recording else None  # from here on inference needs most memory
    return skip.then(array, lambda dy: [dnn.copy(dy[window]) for window in windows], x)


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
        primitive("pooling_backward", *arguments, pool.description)({dnn.DIFF_DST: dy, dnn.DIFF_SRC: dx} | chosen)
        return [dx]

    return x.then(y, backward)


def upsample(layer, x):
    """nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), which oneDNN lacks: products in NumPy."""

    def resample(array, rows, columns):
        images, height, width, channels = array.shape
        y = dnn.copy(array, type=FLOAT32).reshape(images, height, width * channels)
        y = columns @ (rows @ y).reshape(images, len(rows), width, channels)
        return dnn.copy(y, type=array.dtype)

    # (2 size, size): linear interpolation at 2 size places from the first to the last of size
    places = ((np.linspace(0, size - 1, 2 * size)[:, None], np.arange(size)) for size in x.shape[2:])
    rows, columns = (np.maximum(0, 1 - np.abs(to - of)).astype(np.float32) for to, of in places)
    return x.then(resample(x.array, rows, columns), lambda dy: [resample(dy, rows.T, columns.T)])


def dropout(layer, x):
    """unet.Dropout. OneFlow draws the numbers: those of a net that is not accelerated."""
    if not layer.training or not layer.p:
        return x
    mask = dnn.copy(flow.nn.functional.dropout(flow.ones(*x.shape), layer.p).numpy(), dnn.NHWC, x.array.dtype)
    y = combine(dnn.MULTIPLY, x.array, mask, empty(mask.shape, mask.dtype))
    return x.then(y, lambda dy: [combine(dnn.MULTIPLY, dy, mask, dy)])
