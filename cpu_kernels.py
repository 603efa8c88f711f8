"""Fast CPU kernels: `accelerate(net)` makes the U-Net of unet.py train several times faster.

    net = accelerate(UNet(1, 1, bilinear=False))    # the same net, as fast as a CPU allows
    python3 TrainUnetDataSet.py --cpu_kernels off   # the scripts call it unless told not to

OneFlow 0.9 convolves slowly on a CPU. Here NumPy does it, with the minimal filtering algorithm of
Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016), arXiv:1509.09308, called
F(m x m, 3 x 3) there and Winograd's elsewhere.

**The mathematics.** Cut the output of a 3x3 correlation into tiles Y of m x m pixels. Each depends
on a tile d of n x n input pixels, n = m + 2, that overlaps its neighbours by 2. With V(k) the n x k
Vandermonde matrix of n - 1 points and of infinity, A = V(m), G = V(3) and B^T = V(n)^-T,

    Y  = A^T [ sum over c of (G w G^T) * (B^T d B) ] A        equation 12 of the paper
    dw = G^T [ sum over tiles of (A dY A^T) * (B^T d B) ] G   its derivative by w
    dd = the first line, of dY, with w turned by 180 degrees and its channels exchanged

where * multiplies entry by entry. Because of the sums each of the n x n entries is a matrix
product, (K x C) (C x tiles) in the first line and (K x tiles) (tiles x C) in the second, for C
channels in and K out. m = 4 multiplies 36 times for 16 pixels instead of 144. Its points 0, 1, -1,
1/2, -2 keep rounding errors small (Barabasz et al. 2020, arXiv:1803.10986). m = 1 is the direct
way, with A^T = (1 1 1) and G = B = identity, for images so small that larger weights don't pay.

**Speed.** The transforms are matrix products too. All is cut into jobs that fit a core's cache,
worked off by a Python thread a core (NumPy lets other threads run while it computes), each with one
BLAS thread. OMP_NUM_THREADS sets their number. Sums don't depend on which thread was faster: with
the same number of threads a run repeats bit for bit.

**Memory.** A DoubleConv keeps its inputs and the outputs of its two convolutions, and computes the
rest again in its backward pass. OneFlow reads arrays when it pleases, so one that it was given is
never written to again. Arrays named by scratch() never leave this file; each thread keeps its own,
as large as the largest that was needed. From the first accelerate() on, the whole process keeps
freed memory for itself, and all of NumPy multiplies matrices on the calling thread only.

**What changes.** An accelerated module can be differentiated once: a second backward pass and
gradients of gradients raise RuntimeError. A DoubleConv with hooks on the modules inside it, tensors
on a GPU or of another type than float32, static graphs and a module whose setup was changed get
OneFlow's own kernels as before. copy.deepcopy, state_dict and load_state_dict work as before.
"""

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from math import ceil, prod
from pathlib import Path

import unet

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow._oneflow_internal.autograd import AutogradFunctionBase

if not flow.cuda.is_available():
    # Saves tensor.numpy() from waiting, now and then, for a thread that waits for this core.
    os.environ.setdefault("ONEFLOW_VM_COMPUTE_ON_WORKER_THREAD", "0")

CORES = str(len(os.sched_getaffinity(0)))
THREADS = max(1, int((os.environ.get("OMP_NUM_THREADS") or CORES).split(",")[0]))

# Sizes of jobs, best on cores with 1 MB of L2 cache; another CPU may like others.
TILES = 64, 256  # fewest and most tiles in a block
COLUMNS = 8192  # channels x tiles to transform at a time
PRODUCT = 1_000_000  # rows x inner x columns up to which OpenBLAS multiplies without repacking
PIXELS = 262_144  # to work on elementwise at a time
CHANNELS = 128 * 128  # inputs x outputs from which on sums in parallel take too much memory
MANY = 4  # blocks a thread from which on a job is a block
SMALL = 200  # pixels in a batch below which m = 1


# --------------------------------------------------------------------------- threads and memory


def start_pool():
    global pool
    pool = ThreadPoolExecutor(max(1, THREADS - 1), "cpu_kernels")


start_pool()
os.register_at_fork(after_in_child=start_pool)  # threads don't survive a fork


def parallel(work, jobs):
    """[work(*job) for job in jobs], on all threads; none is at work any more when this returns."""
    jobs = list(jobs)
    results = [None] * len(jobs)
    numbers = iter(range(len(jobs)))  # shared: each thread takes the next

    def take():
        with np.errstate(all="ignore"):  # infinity and NaN go on without a word, as in OneFlow
            for i in numbers:
                results[i] = work(*jobs[i])

    helpers = [pool.submit(take) for _ in range(min(THREADS, len(jobs)) - 1)]
    try:
        take()
    finally:  # after an error too, since the caller's arrays may then be used for something else
        list(numbers)  # takes the jobs that are left away from the helpers
        wait(helpers)
    for helper in helpers:
        helper.result()
    return results


own = threading.local()


def scratch(name, *shape):
    """An uninitialised float32 array of this thread; the next call with the name reuses it."""
    size = prod(shape)
    arrays = vars(own)
    if name not in arrays or arrays[name].size < size:
        longer = np.empty(size + 16, np.float32)
        arrays[name] = longer[-(longer.ctypes.data // 4) % 16 :]  # from a cache line's start
    return arrays[name][:size].reshape(shape)


def spans(count, size):
    """[(0, size), (size, 2 size), ...] up to count."""
    return [(i, min(i + size, count)) for i in range(0, count, max(1, size))]


# ------------------------------------------------------------------------------ 3x3 convolution


def filtering_matrices(m):
    """(A^T (m, n), G (n, 3), B^T (n, n)) of F(m, 3), float32."""
    if m == 1:
        matrices = np.ones((1, 3)), np.eye(3), np.eye(3)
    else:
        points = (0, 1, -1, 1 / 2, -2)[: m + 1]

        def vandermonde(k):
            infinity = [0] * (k - 1) + [1]
            return np.array([[point**i for i in range(k)] for point in points] + [infinity])

        matrices = vandermonde(m).T, vandermonde(3), np.linalg.inv(vandermonde(m + 2)).T
    return tuple(np.ascontiguousarray(matrix, np.float32) for matrix in matrices)


MATRICES = {m: filtering_matrices(m) for m in (1, 4)}


class Tiling:
    """How a batch of N images, H x W pixels, is cut: tiles of m x m pixels, blocks of tiles.

    A block is (first image, images, first row, rows, first column, columns), counted in tiles.
    """

    def __init__(self, images, height, width):
        self.shape = images, height, width
        self.m = 4 if images * height * width >= SMALL else 1
        self.rows, self.columns = ceil(height / self.m), ceil(width / self.m)

    def blocks(self, tiles):
        """Blocks of at most `tiles` tiles: of one image, or the whole batch where it fits."""
        images = self.shape[0]
        if images * self.rows * self.columns <= tiles:
            return [(0, images, 0, self.rows, 0, self.columns)]
        width = ceil(self.columns / ceil(self.columns / tiles))
        return [
            (image, 1, top, bottom - top, left, right - left)
            for image in range(images)
            for top, bottom in spans(self.rows, tiles // width)
            for left, right in spans(self.columns, width)
        ]

    def padded(self, name, channels):
        """A scratch image (N, channels, m rows + 2, m columns + 2) for tiles to be cut from.

        Zero outside the image proper, which starts at pixel (1, 1) and is uninitialised.
        """
        images, height, width = self.shape
        whole = scratch(name, images, channels, self.rows * self.m + 2, self.columns * self.m + 2)
        whole[:, :, 0] = whole[:, :, height + 1 :] = 0
        whole[:, :, :, 0] = whole[:, :, :, width + 1 :] = 0
        return whole

    def inside(self, padded):
        return padded[:, :, 1 : self.shape[1] + 1, 1 : self.shape[2] + 1]

    def tiles(self, image, size, start, block, channels):
        """View of a block's tiles in an image: (size, size, channels, images, rows, columns).

        Tile (i, j) has its first pixel at (m i + start, m j + start).
        """
        n, images, y, rows, x, columns = block
        m = self.m
        of_image, of_channel, of_row, of_pixel = image.strides
        offset = n * of_image + channels[0] * of_channel
        offset += (m * y + start) * of_row + (m * x + start) * of_pixel
        shape = size, size, channels[1] - channels[0], images, rows, columns
        strides = of_row, of_pixel, of_channel, of_image, m * of_row, m * of_pixel
        return np.ndarray(shape, np.float32, image, offset, strides)


def tiles_in(block):
    return block[1] * block[3] * block[5]


def transform(matrix, tiles, out):
    """matrix tile matrix^T of each tile: contiguous (n, n, all) -> out (q, q, all)."""
    q, n = matrix.shape
    half = scratch("half", q, n, tiles.shape[2])
    np.matmul(matrix, tiles.transpose(1, 0, 2), out=half.transpose(1, 0, 2))
    np.matmul(matrix, half, out=out)


def transform_tiles(matrix, tiling, image, start, block, out):
    """matrix tile matrix^T of a block's tiles in a padded image -> out (n n, C, tiles)."""
    for channels in spans(image.shape[1], COLUMNS // tiles_in(block)):
        transform_some(matrix, tiling, image, start, block, out, channels)


def transform_some(matrix, tiling, image, start, block, out, channels):
    """transform_tiles for channels[0] to channels[1] - 1."""
    q, size = matrix.shape
    view = tiling.tiles(image, size, start, block, channels)
    copy = scratch("tiles", *view.shape)
    copy[...] = view
    part = slice(channels[0] * tiles_in(block), channels[1] * tiles_in(block))
    transform(matrix, copy.reshape(size, size, -1), out.reshape(q, q, -1)[:, :, part])


def transform_weights(m, weights, turned):
    """(K, C, 3, 3) -> G w G^T, (n n, K, C); if turned, of w turned by 180 degrees, (n n, C, K)."""
    g = MATRICES[m][1]
    both_sides = np.kron(g, g)
    if turned:
        both_sides = np.ascontiguousarray(both_sides[:, ::-1])
    count, channels = weights.shape[:2]
    flat = weights.reshape(count, channels, 9)
    result = np.empty((len(both_sides), count, channels), np.float32)
    np.matmul(both_sides, flat.transpose(0, 2, 1), out=result.transpose(1, 0, 2))
    return result.transpose(0, 2, 1) if turned else result


def correlate(tiling, image, weights, turned=False):
    """Padded image (N, C, ...), weights (K, C, 3, 3) -> (N, K, H, W): the first line above.

    turned: padded dY (N, K, ...) -> dd (N, C, H, W), the third.
    """
    m, to_product = tiling.m, MATRICES[tiling.m][2]
    images, height, width = tiling.shape
    channels, count = image.shape[1], weights.shape[1 if turned else 0]
    output = np.empty((images, count, m * tiling.rows, m * tiling.columns), np.float32)

    def kernels(first, last):
        part = weights[:, first:last] if turned else weights[first:last]
        return transform_weights(m, part, turned)

    blocks = tiling.blocks(max(TILES[0], min(TILES[1], COLUMNS // channels)))
    if len(blocks) >= MANY * THREADS:
        all_kernels = np.concatenate(parallel(kernels, spans(count, 16)), axis=1)

        def work(*block):
            analysed = scratch("analysed", len(all_kernels), channels, tiles_in(block))
            transform_tiles(to_product, tiling, image, 0, block, analysed)
            multiply(tiling, all_kernels, analysed, block, output, 0)

        parallel(work, blocks)
    else:  # few pixels, so many weights: a job is some of those
        all_analysed = transform_all(to_product, tiling, image, 0, blocks, "all analysed")

        def work(first, last):
            some = kernels(first, last)
            for block, analysed in zip(blocks, all_analysed, strict=True):
                multiply(tiling, some, analysed, block, output, first)

        parallel(work, spans(count, 32))
    return output[:, :, :height, :width]


def multiply(tiling, kernels, analysed, block, output, first):
    """Kernels (n n, K, C) times a block (n n, C, tiles), into output's channels from `first` on."""
    to_output = MATRICES[tiling.m][0]
    m, n = to_output.shape
    channels, tiles = analysed.shape[1:]
    for a, b in spans(kernels.shape[1], min(PRODUCT // (channels * tiles), COLUMNS // tiles)):
        product = scratch("product", n * n, b - a, tiles)
        np.matmul(kernels[:, a:b], analysed, out=product)
        result = scratch("result", m, m, (b - a) * tiles)
        transform(to_output, product.reshape(n, n, -1), result)
        # Put rows of pixels together here, since far-off memory wants to be written once.
        image, images, y, rows, x, columns = block
        pixels = scratch("pixels", b - a, images, rows, m, columns, m)
        result = result.reshape(m, m, b - a, images, rows, columns)
        for i in range(m):  # NumPy interleaves column by column faster than all at once
            pixels[..., i] = result[:, i].transpose(1, 2, 3, 0, 4)
        target = output[image : image + images, first + a : first + b]
        target = target[:, :, m * y : m * (y + rows), m * x : m * (x + columns)]
        target[...] = pixels.reshape(b - a, images, m * rows, m * columns).swapaxes(0, 1)


def transform_all(matrix, tiling, image, start, blocks, name):
    """transform_tiles of several blocks at once -> list of scratch arrays (n n, C, tiles)."""
    channels, size = image.shape[1], len(matrix) ** 2
    ends = np.cumsum([tiles_in(block) * channels * size for block in blocks])
    parts = np.split(scratch(name, ends[-1]), ends[:-1])
    results = [part.reshape(size, channels, -1) for part in parts]

    def work(i, *some):
        transform_some(matrix, tiling, image, start, blocks[i], results[i], some)

    step = COLUMNS // tiles_in(blocks[0])
    parallel(work, [(i, *some) for i in range(len(blocks)) for some in spans(channels, step)])
    return results


def weight_gradient(tiling, image, gradient):
    """Padded image (N, C, ...), padded dY (N, K, ...) -> dw (K, C, 3, 3): the second line above."""
    to_output, g, to_product = MATRICES[tiling.m]
    from_output, both_sides = np.ascontiguousarray(to_output.T), np.kron(g, g)
    channels, count = image.shape[1], gradient.shape[1]
    dw = np.empty((count, channels, 9), np.float32)
    blocks = tiling.blocks(TILES[1])
    if len(blocks) >= MANY * THREADS:

        def work(first, last):
            return sum_blocks(from_output, to_product, tiling, image, gradient, blocks[first:last])

        jobs = THREADS if channels * count > CHANNELS else MANY * THREADS  # each has a total
        total = sum(parallel(work, spans(len(blocks), ceil(len(blocks) / jobs))))
        np.matmul(total.transpose(1, 2, 0), both_sides, out=dw)
    else:
        left = transform_all(from_output, tiling, gradient, 1, blocks, "all left")
        right = transform_all(to_product, tiling, image, 0, blocks, "all right")

        def work(a, b):
            for c, d in spans(channels, 128):
                products = (
                    x[:, a:b] @ y[:, c:d].swapaxes(1, 2) for x, y in zip(left, right, strict=True)
                )
                np.matmul(sum(products).transpose(1, 2, 0), both_sides, out=dw[a:b, c:d])

        parallel(work, spans(count, min(64, ceil(count / THREADS))))
    return dw.reshape(count, channels, 3, 3)


def sum_blocks(from_output, to_product, tiling, image, gradient, blocks):
    """The sum over some blocks' tiles of the second line -> (n n, K, C)."""
    size, channels, count = len(to_product) ** 2, image.shape[1], gradient.shape[1]
    total = np.zeros((size, count, channels), np.float32)
    for block in blocks:
        left = scratch("left", size, count, tiles_in(block))
        right = scratch("right", size, channels, tiles_in(block))
        transform_tiles(from_output, tiling, gradient, 1, block, left)
        transform_tiles(to_product, tiling, image, 0, block, right)
        for a, b in spans(count, 16):  # OpenBLAS wants small ones for this product
            for c, d in spans(channels, 64):
                product = scratch("product", size, b - a, d - c)
                np.matmul(left[:, a:b], right[:, c:d].swapaxes(1, 2), out=product)
                total[:, a:b, c:d] += product
    return total


# ---------------------------------------------------------------- batch normalisation with ReLU


def pieces(image):
    """Index tuples (image, channels, rows) that cut (N, C, H, W) into some PIXELS pixels each."""
    images, channels, height, width = image.shape
    return [
        (n, slice(*some_channels), slice(*some_rows))
        for n in range(images)
        for some_channels in spans(channels, PIXELS // (height * width))
        for some_rows in spans(height, PIXELS // width)
    ]


def column(values, piece):
    """The piece's part of values (C,), float32, shaped to multiply (C, H, W)."""
    return values[piece[1]].astype(np.float32)[:, None, None]


class Normalisation:
    """y = max(0, batch normalisation of x), for x (N, C, H, W) without the convolution's bias.

    Ioffe and Szegedy (2015), arXiv:1502.03167: with the batch's mean and deviation if the layer is
    training, whose running statistics then move; else with those. y = max(0, scale x + shift),
    where scale = gamma / deviation, shift = beta - scale mean. A bias would only add to the mean.
    """

    def __init__(self, layer, bias, x, gamma, beta):
        self.x, self.training = x, layer.training
        self.count = x.size // x.shape[1]
        if layer.training:
            self.mean, variance = statistics(x)
            unbiased = variance * self.count / (self.count - 1)
            news = (layer.running_mean, self.mean + bias), (layer.running_var, unbiased)
            for buffer, new in news:
                moved = (1 - layer.momentum) * buffer.numpy() + layer.momentum * new
                buffer.copy_(flow.from_numpy(moved.astype(np.float32)))
            layer.num_batches_tracked.add_(1)
        else:
            self.mean, variance = layer.running_mean.numpy() - bias, layer.running_var.numpy()
        self.inverse = 1 / np.sqrt(variance.astype(np.float64) + layer.eps)  # of the deviation
        self.scale = gamma * self.inverse
        self.shift = beta - self.scale * self.mean

    def affine(self, scale, shift, piece):
        """scale x + shift of a piece, in scratch memory."""
        x = self.x[piece]
        value = np.multiply(x, column(scale, piece), out=scratch("value", *x.shape))
        value += column(shift, piece)
        return value

    def write_output(self, y):
        def work(*piece):
            value = self.affine(self.scale, self.shift, piece)
            zero = scratch("zero", *value.shape)  # NumPy compares arrays faster than numbers
            zero[...] = 0
            y[piece] = np.maximum(value, zero, out=value)

        parallel(work, pieces(self.x))

    def write_gradient(self, dy, dx):
        """Write x's gradient into dx; returns those of gamma, beta and the convolution's bias."""

        def mask(*piece):
            value = self.affine(self.scale, self.shift, piece)
            np.multiply(dy[piece], value > 0, out=value)
            dx[piece] = value
            return value.sum((1, 2)), np.einsum("chw,chw->c", value, self.x[piece])

        dbeta, dgamma = sum_channels(self.x, parallel(mask, pieces(self.x)))
        dgamma = (dgamma - self.mean * dbeta) * self.inverse
        # dx = scale (dy - mean of dy - normalised x * mean of dy * normalised x)
        slope = -self.scale * self.inverse * dgamma / self.count
        constant = -self.scale * dbeta / self.count - slope * self.mean

        def finish(*piece):
            masked = dx[piece]
            part = scratch("part", *masked.shape)
            np.multiply(masked, column(self.scale, piece), out=part)
            if self.training:
                part += self.affine(slope, constant, piece)
            masked[...] = part

        parallel(finish, pieces(self.x))
        # The batch's mean takes a bias away again.
        dbias = np.zeros_like(dbeta) if self.training else self.scale * dbeta
        return dgamma, dbeta, dbias


def sum_channels(x, results):
    """Add up what was computed for each of pieces(x), tuples of (C,), to float64 (tuple, C)."""
    totals = np.zeros((len(results[0]), x.shape[1]))
    for (_, channels, _), result in zip(pieces(x), results, strict=True):
        totals[:, channels] += result
    return totals


def statistics(x):
    """(mean, biased variance) of the channels of (N, C, H, W), float64.

    Pieces have their own, so that large means don't drown small variances; then they are merged.
    """

    def work(*piece):
        part = x[piece]
        part = part.reshape(len(part), -1)
        mean = part.mean(1)
        centred = np.subtract(part, mean[:, None], out=scratch("value", *part.shape))
        mean, squares = mean.astype(np.float64), np.einsum("ci,ci->c", centred, centred)
        size = part.shape[1]
        return size * mean, size * mean**2, squares

    sums, between, within = sum_channels(x, parallel(work, pieces(x)))
    count = x.size // x.shape[1]
    mean = sums / count
    return mean, np.maximum(between / count - mean**2, 0) + within / count


# ------------------------------------------------------- layers: arrays in, arrays out, and back


class Kernel:
    """Computes one call of a module; forward() leaves in it what backward() needs.

    forward: inputs and parameters, as arrays -> output. backward: its gradient, and for which of
    forward's arguments one is needed -> theirs.
    """

    def __init__(self, module, inputs):
        self.module, self.inputs = module, inputs


class DoubleConvolution(Kernel):
    """unet.DoubleConv of one or more inputs that follow each other along the channels."""

    def forward(self, *arrays):
        self.images, self.parameters = arrays[: self.inputs], arrays[self.inputs :]
        w1, bias1, gamma1, beta1, w2, bias2, gamma2, beta2 = self.parameters
        images, _, height, width = self.images[0].shape
        self.tiling = Tiling(images, height, width)
        x = correlate(self.tiling, self.padded_images(), w1)
        self.first = Normalisation(self.module.double_conv[1], bias1, x, gamma1, beta1)
        x = correlate(self.tiling, self.padded_middle(), w2)
        self.second = Normalisation(self.module.double_conv[4], bias2, x, gamma2, beta2)
        y = np.empty(x.shape, np.float32)
        self.second.write_output(y)
        return y

    def padded_images(self):
        padded = self.tiling.padded("padded", sum(image.shape[1] for image in self.images))
        inside = self.tiling.inside(padded)
        for image in self.images:
            parallel(np.copyto, [(inside[piece], image[piece]) for piece in pieces(image)])
            inside = inside[:, image.shape[1] :]
        return padded

    def padded_middle(self):
        """What goes from the first half into the second."""
        padded = self.tiling.padded("padded", self.first.x.shape[1])
        self.first.write_output(self.tiling.inside(padded))
        return padded

    def backward(self, dy, needed):
        *images_needed, w1_needed, _, _, _, w2_needed, _, _, _ = needed
        w1, w2 = self.parameters[0], self.parameters[4]
        dw1 = dw2 = None
        # Arrays that are done with are let go of at once: here memory use is highest.
        dx2 = self.tiling.padded("padded gradient", dy.shape[1])
        dgamma2, dbeta2, dbias2 = self.second.write_gradient(dy, self.tiling.inside(dx2))
        self.second = None
        if w2_needed:
            dw2 = weight_gradient(self.tiling, self.padded_middle(), dx2)
        dmiddle = correlate(self.tiling, dx2, w2, turned=True)

        dx1 = self.tiling.padded("padded gradient", dmiddle.shape[1])  # dx2's memory
        dgamma1, dbeta1, dbias1 = self.first.write_gradient(dmiddle, self.tiling.inside(dx1))
        self.first = dmiddle = None
        if w1_needed:
            dw1 = weight_gradient(self.tiling, self.padded_images(), dx1)
        images = [None] * self.inputs
        if any(images_needed):
            ends = np.cumsum([image.shape[1] for image in self.images])
            images = np.split(correlate(self.tiling, dx1, w1, turned=True), ends[:-1], axis=1)
        return *images, dw1, dbias1, dgamma1, dbeta1, dw2, dbias2, dgamma2, dbeta2


class TransposedConvolution(Kernel):
    """nn.ConvTranspose2d with a 2x2 kernel and stride 2: every pixel becomes 2x2 pixels."""

    def forward(self, x, weights, bias):
        self.x, self.weights = x, weights
        images, channels, height, width = x.shape
        count = weights.shape[1]
        flat = weights.reshape(channels, 4 * count).T
        y = np.empty((images, count, height, 2, width, 2), np.float32)

        def work(n, top, bottom, first, last):
            pixels = x[n, :, top:bottom].reshape(channels, -1)
            product = scratch("product", 4 * (last - first), pixels.shape[1])
            np.matmul(flat[4 * first : 4 * last], pixels, out=product)
            product = product.reshape(last - first, 2, 2, bottom - top, width)
            product += bias[first:last, None, None, None, None]
            rows = scratch("pixels", last - first, bottom - top, 2, width, 2)
            for i, j in np.ndindex(2, 2):
                rows[:, :, i, :, j] = product[:, i, j]
            y[n, first:last, top:bottom] = rows

        rows, parts = spans(height, 1024 // width), spans(count, 64)
        parallel(work, [(n, *r, *p) for n in range(images) for r in rows for p in parts])
        return y.reshape(images, count, 2 * height, 2 * width)

    def backward(self, dy, needed):
        images, channels, height, width = self.x.shape
        count = self.weights.shape[1]
        x = self.x.reshape(images, channels, -1)
        flat = self.weights.reshape(channels, 4 * count)
        dy = dy.reshape(images, count, height, 2, width, 2)
        sorted_dy = np.empty((images, count, 2, 2, height, width), np.float32)
        dx, dw = np.empty_like(x), np.zeros_like(flat)

        def sort(n, a, b):
            for i, j in np.ndindex(2, 2):
                sorted_dy[n, a:b, i, j] = dy[n, a:b, :, i, :, j]

        step = PIXELS // (4 * height * width)
        parallel(sort, [(n, *some) for n in range(images) for some in spans(count, step)])
        by_pixel = sorted_dy.reshape(images, 4 * count, -1)

        def of_input(n, a, b):
            np.matmul(flat, by_pixel[n, :, a:b], out=dx[n, :, a:b])

        def of_weights(a, b):
            for n in range(images):
                dw[:, a:b] += x[n] @ by_pixel[n, a:b].T

        parallel(of_input, [(n, *some) for n in range(images) for some in spans(x.shape[2], 512)])
        parallel(of_weights, spans(4 * count, 128))
        return dx.reshape(self.x.shape), dw, sorted_dy.sum((0, 2, 3, 4, 5))


class PointwiseConvolution(Kernel):
    """nn.Conv2d with a 1x1 kernel."""

    def forward(self, x, weights, bias):
        self.x, self.weights = x, weights
        images, channels, height, width = x.shape
        y = weights[:, :, 0, 0] @ x.reshape(images, channels, -1)
        y += bias[:, None]
        return y.reshape(images, -1, height, width)

    def backward(self, dy, needed):
        images, channels = self.x.shape[:2]
        x, dy = self.x.reshape(images, channels, -1), dy.reshape(images, len(self.weights), -1)
        dx = self.weights[:, :, 0, 0].T @ dy
        return dx.reshape(self.x.shape), sum(dy @ x.transpose(0, 2, 1)), dy.sum((0, 2))


class MaxPooling(Kernel):
    """nn.MaxPool2d(2). The first of several equal maxima gets the gradient, as in OneFlow."""

    def forward(self, x):
        self.x = x
        images, channels, height, width = x.shape
        self.y = np.empty((images, channels, height // 2, width // 2), np.float32)

        def work(*piece):
            upper, lower = self.rows(x, piece)
            maxima = np.maximum(upper, lower)
            np.maximum(maxima[:, :, ::2], maxima[:, :, 1::2], out=self.y[piece])

        parallel(work, pieces(self.y))
        return self.y

    def rows(self, x, piece):
        """Views of the upper and the lower pixels of a piece of the output."""
        n, channels, rows = piece
        part = x[n, channels, 2 * rows.start : 2 * rows.stop, : 2 * self.y.shape[3]]
        return part[:, ::2], part[:, 1::2]

    def backward(self, dy, needed):
        dx = np.zeros_like(self.x)  # odd sides have a row or column that belongs to no maximum

        def work(*piece):
            free = np.ones(dy[piece].shape, bool)
            for x, target in zip(self.rows(self.x, piece), self.rows(dx, piece), strict=True):
                for j in range(2):
                    hit = free & (x[:, :, j::2] == self.y[piece])
                    np.multiply(dy[piece], hit, out=target[:, :, j::2])
                    free ^= hit

        parallel(work, pieces(self.y))
        return (dx,)


# ---------------------------------------------------------------------- what OneFlow gets to see


def run(kernel, *tensors):
    """kernel.forward of the tensors, with kernel.backward for autograd where it is needed."""
    needed = [tensor.requires_grad for tensor in tensors]
    shapes = [tensor.shape for tensor in tensors]

    def forward(ctx, *tensors):
        with np.errstate(all="ignore"):
            return flow.from_numpy(kernel.forward(*(tensor.numpy() for tensor in tensors)))

    def backward(ctx, dy):
        if flow.is_grad_enabled() or not vars(kernel):
            raise RuntimeError(
                "an accelerated module can be differentiated once: no second backward pass, no "
                "gradients of gradients; leave out accelerate() for that (--cpu_kernels off)"
            )
        with np.errstate(all="ignore"):
            gradients = kernel.backward(dy.numpy(), needed)
        vars(kernel).clear()  # OneFlow itself keeps everything until the whole pass is done
        return tuple(
            flow.from_numpy(np.ascontiguousarray(gradient, np.float32).reshape(shape))
            if wanted
            else None
            for gradient, shape, wanted in zip(gradients, shapes, needed, strict=True)
        )

    if not (flow.is_grad_enabled() and any(needed)):
        return forward(None, *tensors)
    # What a class derived from autograd.Function calls. A class for each call would be a cycle of
    # references, which holds its arrays until Python looks for cycles.
    return AutogradFunctionBase.apply("cpu_kernels", forward, backward, *tensors)


class Fast:
    """Mixed into a module's class: runs its kernel where that can be, else OneFlow's own."""

    def forward(self, *inputs):
        tensors = (*inputs, *self.parameters())
        odd = any(t.is_lazy or t.is_global or t.is_cuda or t.dtype != flow.float32 for t in tensors)
        if odd or not self.fits(*(tuple(x.shape) for x in inputs)):
            return self.stock.forward(self, *inputs)
        return run(self.kernel(self, len(inputs)), *tensors)

    def fits(self, shape, *others):
        """Whether all is as accelerate() found it; OneFlow also reports what nobody can compute."""
        layers = list(self.modules())
        hooked = any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in layers[1:]
        )
        channels = [layer.in_channels for layer in layers if hasattr(layer, "in_channels")]
        return (
            setup(self) == self._setup
            and not hooked
            and len(shape) == 4
            and all(other[:1] + other[2:] == shape[:1] + shape[2:] for other in others)
            and channels[:1] in ([], [shape[1] + sum(other[1] for other in others)])
            and shape[0] * shape[2] * shape[3] > 1  # one pixel has no variance
        )


class DoubleConv(Fast, unet.DoubleConv):
    stock, kernel = unet.DoubleConv, DoubleConvolution


class ConvTranspose2d(Fast, nn.ConvTranspose2d):
    stock, kernel = nn.ConvTranspose2d, TransposedConvolution


class Conv2d(Fast, nn.Conv2d):
    stock, kernel = nn.Conv2d, PointwiseConvolution


class MaxPool2d(Fast, nn.MaxPool2d):
    stock, kernel = nn.MaxPool2d, MaxPooling


def setup(module):
    """All that decides what a module computes, but for numbers that the kernels ask it for."""
    names = "kernel_size stride padding dilation groups output_padding padding_mode ceil_mode"
    names += " return_indices affine track_running_stats"
    values = [getattr(module, name, None) for name in names.split()]
    has_bias = getattr(module, "bias", None) is not None
    cumulative = getattr(module, "momentum", 0) is None
    return type(module), values, has_bias, cumulative, *map(setup, module.children())


def has_avx2():
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and " avx2 " in cpu.read_text()


def one_blas_thread():
    """Make NumPy's OpenBLAS compute in the thread that calls it; False where that can't be done."""
    for file in (Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*"):
        for name in ("openblas_set_num_threads64_", "scipy_openblas_set_num_threads64_"):
            if set_threads := getattr(ctypes.CDLL(str(file)), name, None):
                set_threads(1)
                return True
    return False


def keep_memory():
    """Tell malloc to keep what is freed: the next step wants it again, and new pages are slow."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def accelerate(net):
    """Make a U-Net's DoubleConvs, up- and downsampling fast on a CPU, in place; returns the net.

    Outputs, gradients and running statistics stay the same up to rounding; parameters, buffers and
    their names don't change. Modules that aren't set up as in unet.py stay as they are, and so does
    every module of a net on a GPU, on a CPU without AVX2, or with a NumPy whose matrix products
    can't be kept to one thread.
    """
    on_gpu = any(parameter.is_cuda for parameter in net.parameters())
    if on_gpu or not has_avx2() or not one_blas_thread():
        return net
    keep_memory()
    examples = {
        DoubleConv: unet.DoubleConv(1, 1),
        ConvTranspose2d: nn.ConvTranspose2d(1, 1, 2, stride=2),
        Conv2d: nn.Conv2d(1, 1, 1),
        MaxPool2d: nn.MaxPool2d(2),
    }
    for module in net.modules():
        for fast, example in examples.items():
            if setup(module) == setup(example):
                module.__class__ = fast
                module._setup = setup(module)
    return net
