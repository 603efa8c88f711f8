"""Fast CPU kernels: `accelerate(net)` makes the U-Net of unet.py train several times faster.

    net = accelerate(UNet(1, 1, bilinear=False))    # the same net, as fast as a CPU allows
    python3 TrainUnetDataSet.py --cpu_kernels off   # the scripts call it unless told not to

OneFlow 0.9 convolves slowly on a CPU. Here NumPy does it (and OpenCV transposes), with the minimal
filtering algorithm of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016),
arXiv:1509.09308, called F(m x m, 3 x 3) there and Winograd's elsewhere.

**The mathematics.** Cut the output of a 3x3 correlation into tiles Y of m x m pixels, m = 4. Each
depends on a tile d of n x n input pixels, n = 6, that overlaps its neighbours by 2. With V(k) the
n x k Vandermonde matrix of n - 1 points and of infinity, A = V(m), G = V(3) and B^T = V(n)^-T,

    Y  = A^T [ sum over c of (G w G^T) * (B^T d B) ] A        equation 12 of the paper
    dw = G^T [ sum over tiles of (A dY A^T) * (B^T d B) ] G   its derivative by w
    dd = the first line, of dY, with w turned by 180 degrees and its channels exchanged

where * multiplies entry by entry. Because of the sums each of the 36 entries is a matrix product,
(tiles x C) (C x K) in the first line and (C x tiles) (tiles x K) in the second, for C channels in
and K out. That multiplies 36 times for 16 pixels instead of 144. Transforming images costs as much
for few channels as for many. So where there are few, only columns are transformed (class Rows):

    Y  = A^T [ sum over c and the three pixels of a row of (G w) * (B^T d) ]

The points 0, 1, -1, 1/2, -2 keep rounding errors small (Barabasz et al. 2020, arXiv:1803.10986).

**Speed.** The transforms are matrix products too. All is cut into jobs that fit a core's cache,
worked off by a Python thread a core (NumPy lets other threads run while it computes), each with one
BLAS thread. OMP_NUM_THREADS sets their number. When they are as many as the cores, each stays on
its own; so give processes that share a machine fewer, as oneflow.distributed.launch does. A call of
NumPy that ends while another thread is in Python waits some 20 microseconds, so calls are few and
long. Sums don't depend on which thread was faster: with the same number of threads a run repeats
bit for bit.

**Memory.** Kernels hand each other images whose channels are last in memory; their tensors are
(N, C, H, W) as ever, but not contiguous. A DoubleConv keeps its inputs and the outputs of its two
convolutions, and computes the rest again in its backward pass. OneFlow reads arrays when it
pleases, so one that it was given is never written to again. Arrays named by scratch() never leave
this file; each thread keeps its own, as large as the largest that was needed. From the first
accelerate() on, the whole process keeps freed memory for itself, and all of NumPy multiplies
matrices on the calling thread only.

**What changes.** An accelerated module can be differentiated once: a second backward pass and
gradients of gradients raise RuntimeError. Outputs but those of the 1x1 convolution aren't
contiguous: reshape() them, view() raises. A DoubleConv with hooks on the modules inside it, tensors
on a GPU or of another type than float32, static graphs and a module whose setup was changed get
OneFlow's own kernels as before. copy.deepcopy, state_dict and load_state_dict work as before.
"""

import ctypes
import os
import threading
from contextlib import contextmanager, suppress
from math import ceil, prod
from pathlib import Path
from queue import SimpleQueue

import unet

import cv2
import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow._oneflow_internal.autograd import AutogradFunctionBase

if not flow.cuda.is_available():
    # Saves tensor.numpy() from waiting, now and then, for a thread that waits for this core.
    os.environ.setdefault("ONEFLOW_VM_COMPUTE_ON_WORKER_THREAD", "0")

CORES = sorted(os.sched_getaffinity(0))
THREADS = max(1, int((os.environ.get("OMP_NUM_THREADS") or str(len(CORES))).split(",")[0]))

# Sizes of jobs, best on cores with 1 MB of L2 cache; another CPU may like others.
PRODUCT = 1_000_000  # rows x inner x columns up to which OpenBLAS multiplies without repacking
NUMBERS = 262_144  # to work on elementwise at a time
BUFFER = 1024  # of NumPy, in numbers: it copies a row that meets lines shorter than this to it
COLUMNS = 4096  # tiles x channels to transform at a time
TILES = 64  # fewest in a block
KERNELS = 32_768  # C x K to transform at a time, where few pixels meet many weights
MANY = 4  # blocks a thread from which on a job is a block
TOTAL = 128 * 128  # C x K from which on sums in parallel take too much memory
NARROW, SMALL = 32, 200  # channels, or pixels in a batch, up to which Rows is faster than Tiles


# --------------------------------------------------------------------------- threads and memory


def stay(core):
    """Keep this thread on a core, whose cache then has what it needs, if all cores are to work."""
    if len(CORES) == THREADS:
        with suppress(OSError):  # a core that has been taken away since
            os.sched_setaffinity(0, {CORES[core]})


@contextmanager
def computing():
    """While a kernel computes, its thread stays on the first core and NumPy is set up for it."""
    cores, size = os.sched_getaffinity(0), np.getbufsize()
    try:
        if cores == set(CORES):
            stay(0)
        with np.errstate(all="ignore"):  # infinity and NaN go on without a word, as in OneFlow
            np.setbufsize(BUFFER)
            yield
    finally:
        np.setbufsize(size)
        with suppress(OSError):
            os.sched_setaffinity(0, cores)


tasks = None  # a queue for the helpers, once there are some


def start_helpers():
    global tasks
    queue = SimpleQueue()
    for core in range(1, THREADS):
        threading.Thread(target=help_out, args=(queue, core), daemon=True).start()
    tasks = queue


def forget_helpers():
    """The next parallel() starts new ones."""
    global tasks
    tasks = None


os.register_at_fork(after_in_child=forget_helpers)  # threads don't survive a fork


def help_out(queue, core):
    stay(core)
    np.seterr(all="ignore")
    np.setbufsize(BUFFER)
    while True:
        take, done = queue.get()
        done.put(take())
        del take, done  # and what they refer to, large arrays


def parallel(work, jobs):
    """[work(*job) for job in jobs], on all threads; none is at work any more when this returns.

    work must not call it. concurrent.futures would do, but does so much in Python that a step of 16
    channels takes 5 % longer.
    """
    jobs = list(jobs)
    results = [None] * len(jobs)
    numbers = iter(range(len(jobs)))  # shared: each thread takes the next
    done = SimpleQueue()

    def take():
        try:
            for i in numbers:
                results[i] = work(*jobs[i])
        except BaseException as error:  # Ctrl-C among others
            return error

    helpers = min(THREADS, len(jobs)) - 1
    if helpers > 0 and tasks is None:
        start_helpers()
    for _ in range(helpers):
        tasks.put((take, done))
    errors = [take()]
    list(numbers)  # after an error, takes the jobs that are left away from the helpers
    errors += [done.get() for _ in range(helpers)]  # the caller may reuse its arrays then
    for error in filter(None, errors):
        raise error
    return results


own = threading.local()
HUGE = 2**19  # numbers in a huge page


def scratch(name, *shape):
    """An uninitialised float32 array of this thread; the next call with the name reuses it.

    It lies in huge pages, which NumPy asks for from 4 MB on: whether small pages get in each
    other's way in a cache is luck. Not all begin at the same place of a page, for the same reason.
    """
    size = prod(shape)
    arrays = vars(own)
    if name not in arrays or arrays[name].size < size:
        arrays.pop(name, None)  # its memory may serve
        stagger = len(arrays) % 32 * 1040
        longer = np.empty(max(size, HUGE) + HUGE + stagger, np.float32)
        arrays[name] = longer[-(longer.ctypes.data // 4) % HUGE + stagger :]
    return arrays[name][:size].reshape(shape)


def spans(count, size):
    """[(0, size), (size, 2 size), ...] up to count."""
    size = max(1, size)
    return [(i, min(i + size, count)) for i in range(0, count, size)]


# ------------------------------------------------------------------------------ 3x3 convolution
# In here images have their channels last, (N, H, W, C): what is multiplied lies together.


def filtering_matrices():
    """(A^T (4, 6), G (6, 3), B^T (6, 6)) of F(4, 3), float32."""

    def vandermonde(k):
        infinity = [0] * (k - 1) + [1]
        return np.array([[p**i for i in range(k)] for p in (0, 1, -1, 1 / 2, -2)] + [infinity])

    matrices = vandermonde(4).T, vandermonde(3), np.linalg.inv(vandermonde(6)).T
    return tuple(np.ascontiguousarray(matrix, np.float32) for matrix in matrices)


A_T, G, B_T = filtering_matrices()
A = np.ascontiguousarray(A_T.T)


class Grid:
    """How a batch of N images, H x W pixels, is cut into tiles of 4 x 4 pixels."""

    def __init__(self, images, height, width):
        self.shape = images, height, width
        self.rows, self.columns = ceil(height / 4), ceil(width / 4)
        self.side, self.width = 4 * self.rows + 2, in_triples(self.columns)  # padded, in pixels

    def padded(self, name, channels):
        """A scratch batch with a border of zeros: lines of pixels (N side + 1, width, channels).

        inside() is the batch without the border, uninitialised.
        """
        images, height, width = self.shape
        lines = scratch(name, images * self.side + 1, self.width, channels)
        lines[-1] = 0  # read behind the last image, for nothing
        whole = lines[:-1].reshape(images, self.side, self.width, channels)
        whole[:, 0] = whole[:, height + 1 :] = 0
        whole[:, :, 0] = whole[:, :, width + 1 :] = 0
        return lines

    def inside(self, padded):
        """The view (N, H, W, C) of a padded batch."""
        images, height, width = self.shape
        whole = padded[:-1].reshape(images, self.side, self.width, -1)
        return whole[:, 1 : height + 1, 1 : width + 1]

    def steps(self, padded, block, first):
        """Bytes to a block's pixel (first, first), and to the next (image, line, pixel)."""
        image, _, y, _, x, _ = block
        line, pixel, _ = padded.strides
        offset = (image * self.side + 4 * y + first) * line + (4 * x + first) * pixel
        return offset, self.side * line, line, pixel


def in_triples(columns):
    """Pixels that so many columns of tiles take with their right border, up to a multiple of 3."""
    return 3 * ceil((4 * columns + 2) / 3)


def cut(block, tiles):
    """Blocks of at most `tiles` tiles that make up a block, in the order of its tiles.

    A block is (first image, images, first row, rows, first column, columns), counted in tiles.
    """
    image, images, y, rows, x, columns = block
    tiles = max(1, tiles)
    if images * rows * columns <= tiles:
        return [block]
    width = ceil(columns / ceil(columns / tiles))
    height = ceil(rows / ceil(rows / (tiles // width)))
    return [
        (n, 1, y + top, bottom - top, x + left, right - left)
        for n in range(image, image + images)
        for top, bottom in spans(rows, height)
        for left, right in spans(columns, width)
    ]


def shares(count, most):
    """spans() about equally long: multiples of 16, no longer than `most` if that is 16 or more."""
    parts = ceil(count / max(16, most // 16 * 16))
    return spans(count, 16 * ceil(count / parts / 16))


class Rows:
    """F(4, 3) down the columns and the direct way along the rows: 4.5 products a pixel.

    The pixels that an output needs in a row are next to each other: 3 C numbers. Those of outputs
    0, 3, 6 ... make a matrix without being copied, and so do those of 1, 4 ... and of 2, 5 ...
    """

    weights = np.kron(G, np.eye(3, dtype=np.float32))  # (6 3, 3 3)
    entries, columns = 6, 2 * COLUMNS

    @staticmethod
    def size(block):
        return block[1] * block[3] * in_triples(block[5])

    @staticmethod
    def analyse(grid, padded, block, gradient, out):
        """B^T d, or A dY, for each column of pixels of a tile -> out (6, size, C)"""
        matrix, first = (A, 1) if gradient else (B_T, 0)
        _, images, _, rows, _, columns = block
        channels = padded.shape[2]
        offset, image, line, _ = grid.steps(padded, block, first)
        shape = images, rows, matrix.shape[1], in_triples(columns) * channels
        pixels = np.ndarray(shape, np.float32, padded, offset, (image, 4 * line, line, 4))
        out = out.reshape(6, images, rows, -1)
        np.matmul(matrix, pixels, out=out.transpose(1, 2, 0, 3))
        if gradient:  # only what belongs to the block
            out[..., 4 * columns * channels :] = 0

    @staticmethod
    def triples(analysed):
        """(i, n, (6, n, 3 C)): the n triples that start at i, i + 3, ..., for i = 0, 1, 2."""
        _, size, channels = analysed.shape
        flat = analysed.reshape(6, -1)
        for i, n in (0, size // 3), (1, size // 3 - 1), (2, size // 3 - 1):
            yield i, n, flat[:, i * channels : (i + 3 * n) * channels].reshape(6, n, -1)

    @staticmethod
    def multiply(analysed, kernels, output):
        """(6, size, C), (18, C, K) -> output (images, rows, 4, columns, 4, K)"""
        images, rows, _, columns, _, count = output.shape
        _, size, channels = analysed.shape
        kernels = kernels.reshape(6, 3 * channels, count)
        product = scratch("product", 6, size // 3, 3, count)
        for i, n, triples in Rows.triples(analysed):
            np.matmul(triples, kernels, out=product[:, :n, i])
        product = product.reshape(6, images, rows, -1)[..., : 4 * columns * count]
        result = output.reshape(images, rows, 4, -1)  # a copy if it is for some of the weights only
        np.matmul(A_T, product.transpose(1, 2, 0, 3), out=result)
        if not np.may_share_memory(result, output):
            output[...] = result.reshape(output.shape)

    @staticmethod
    def add(total, right, left):
        """total (18, C, K) += what (6, size, C) and (6, size, K) give"""
        size, count = left.shape[1:]
        left = left.reshape(6, size // 3, 3, count)
        total = total.reshape(6, -1, count)
        for i, n, triples in Rows.triples(right):
            for a, b in shares(total.shape[1], PRODUCT // (n * count)):
                product = scratch("product", 6, b - a, count)
                np.matmul(triples[:, :, a:b].swapaxes(1, 2), left[:, :n, i], out=product)
                total[:, a:b] += product


class Tiles:
    """F(4 x 4, 3 x 3): 2.25 products a pixel."""

    weights = np.kron(G, G)  # (6 6, 3 3)
    entries, columns = 36, COLUMNS

    @staticmethod
    def size(block):
        return block[1] * block[3] * block[5]

    @staticmethod
    def analyse(grid, padded, block, gradient, out):
        """B^T d B, or A dY A^T, for each tile -> out (36, tiles, C)"""
        matrix, first = (A, 1) if gradient else (B_T, 0)
        n, channels = matrix.shape[1], padded.shape[2]
        done = 0
        for part in cut(block, COLUMNS // channels):
            _, images, _, rows, _, columns = part
            offset, image, line, pixel = grid.steps(padded, part, first)
            shape = n, n, images, rows, columns, channels
            strides = line, pixel, image, 4 * line, 4 * pixel, 4
            tiles = scratch("tiles", *shape)
            tiles[...] = np.ndarray(shape, np.float32, padded, offset, strides)
            half = scratch("half", 6, n, Tiles.size(part) * channels)
            np.matmul(matrix, tiles.reshape(n, -1), out=half.reshape(6, -1))
            target = out[:, done : done + Tiles.size(part)]
            np.matmul(matrix, half, out=target.reshape(6, 6, -1))
            done += Tiles.size(part)

    @staticmethod
    def multiply(analysed, kernels, output):
        """(36, tiles, C), (36, C, K) -> output (images, rows, 4, columns, 4, K)"""
        images, rows, _, columns = output.shape[:4]
        tiles, count = analysed.shape[1], kernels.shape[2]
        product = scratch("product", 36, tiles, count)
        np.matmul(analysed, kernels, out=product)
        half = scratch("half", 4, 6, tiles * count)
        np.matmul(A_T, product.reshape(6, -1), out=half.reshape(4, -1))
        result = scratch("result", 4, 4, tiles * count)
        np.matmul(A_T, half, out=result)
        result = result.reshape(4, 4, images, rows, columns, count)
        output[...] = result.transpose(2, 3, 0, 4, 1, 5)

    @staticmethod
    def add(total, right, left):
        """total (36, C, K) += what (36, tiles, C) and (36, tiles, K) give"""
        tiles, count = left.shape[1:]
        for a, b in shares(count, PRODUCT // (32 * tiles)):
            for c, d in shares(total.shape[1], PRODUCT // (tiles * (b - a))):
                product = scratch("product", 36, d - c, b - a)
                np.matmul(right[:, :, c:d].swapaxes(1, 2), left[:, :, a:b], out=product)
                total[:, c:d, a:b] += product


class Plan:
    """Which way a convolution of C to K channels is computed, and in which blocks.

    blocks: (block, start, end), where [start:end] is what belongs to it when all are analysed.
    """

    def __init__(self, grid, channels, count, fewest=TILES):
        images, height, width = grid.shape
        narrow = min(channels, count) <= NARROW or images * height * width <= SMALL
        self.grid, self.way = grid, Rows if narrow else Tiles
        whole = (0, images, 0, grid.rows, 0, grid.columns)
        blocks = cut(whole, max(fewest, self.way.columns // max(channels, count)))
        ends = np.cumsum([0, *(self.way.size(block) for block in blocks)]).tolist()
        self.blocks = list(zip(blocks, ends[:-1], ends[1:], strict=True))
        self.many = len(blocks) >= MANY * THREADS
        self.largest = max(map(self.way.size, blocks))

    def analyse(self, padded, i, gradient=False):
        """Block i, analysed in scratch memory."""
        block, start, end = self.blocks[i]
        name = "gradient" if gradient else "image"
        out = scratch(name, self.way.entries, end - start, padded.shape[2])
        self.way.analyse(self.grid, padded, block, gradient, out)
        return out

    def analyse_all(self, padded, gradient=False):
        name = "all gradients" if gradient else "all images"
        out = scratch(name, self.way.entries, self.blocks[-1][2], padded.shape[2])
        jobs = [(self.grid, padded, block, gradient, out[:, a:b]) for block, a, b in self.blocks]
        parallel(self.way.analyse, jobs)
        return out


def transform_weights(matrix, weights, turned):
    """(K, C, 3, 3) -> matrix times each w, (e, C, K); if turned by 180 degrees, (e, K, C)."""
    count, channels = weights.shape[:2]
    weights = weights.reshape(count, channels, 9)
    if turned:
        matrix, weights = np.ascontiguousarray(matrix[:, ::-1]), weights.transpose(0, 2, 1)
    else:
        weights = weights.transpose(1, 2, 0)
    result = np.empty((len(matrix), len(weights), weights.shape[2]), np.float32)
    np.matmul(matrix, weights, out=result.transpose(1, 0, 2))
    return result


def correlate(grid, padded, weights, turned=False):
    """Padded batch of C channels, weights (K, C, 3, 3) -> (N, H, W, K): the first line above.

    turned: padded dY, K channels -> dd (N, H, W, C), the third.
    """
    images, height, width = grid.shape
    channels, count = padded.shape[2], weights.shape[1 if turned else 0]
    plan = Plan(grid, channels, count, min(TILES, PRODUCT // (16 * channels)))
    output = np.empty((images, grid.rows, 4, grid.columns, 4, count), np.float32)

    def kernels(first, last):
        some = weights[:, first:last] if turned else weights[first:last]
        return first, transform_weights(plan.way.weights, some, turned)

    def multiply(analysed, first, kernels, block):
        image, images, y, rows, x, columns = block
        part = output[image : image + images, y : y + rows, :, x : x + columns]
        plan.way.multiply(analysed, kernels, part[..., first : first + kernels.shape[2]])

    parts = shares(count, min(PRODUCT // (channels * plan.largest), COLUMNS // TILES))
    if plan.many:
        all_kernels = parallel(kernels, parts)

        def work(i):
            analysed = plan.analyse(padded, i)
            for first, some in all_kernels:
                multiply(analysed, first, some, plan.blocks[i][0])

        parallel(work, [(i,) for i in range(len(plan.blocks))])
    else:  # few pixels, so many weights: a job is some of those
        analysed = plan.analyse_all(padded)

        def work(*part):
            first, some = kernels(*part)
            for block, a, b in plan.blocks:
                multiply(analysed[:, a:b], first, some, block)

        parallel(work, parts)
    output = output.reshape(images, 4 * grid.rows, 4 * grid.columns, count)
    return output[:, :height, :width]


def weight_gradient(grid, image, gradient):
    """Padded batch and padded dY -> dw (K, C, 3, 3): the second line above."""
    channels, count = image.shape[2], gradient.shape[2]
    # Adding to totals that no cache holds takes time.
    plan = Plan(grid, channels, count, 2 * TILES if channels * count >= TOTAL else TILES)
    weights = plan.way.weights
    dw = np.empty((count, channels, 9), np.float32)
    if plan.many:

        def work(first, last):
            total = np.zeros((len(weights), channels, count), np.float32)
            for i in range(first, last):
                left, right = plan.analyse(gradient, i, gradient=True), plan.analyse(image, i)
                plan.way.add(total, right, left)
            return total

        jobs = THREADS if channels * count > TOTAL else MANY * THREADS  # each has a total
        total = sum(parallel(work, spans(len(plan.blocks), ceil(len(plan.blocks) / jobs))))
        np.matmul(total.transpose(1, 2, 0), weights, out=dw.transpose(1, 0, 2))
    else:
        left, right = plan.analyse_all(gradient, gradient=True), plan.analyse_all(image)

        def work(a, b):
            total = scratch("total", len(weights), channels, b - a)
            total[...] = 0
            for _, c, d in plan.blocks:
                plan.way.add(total, right[:, c:d], left[:, c:d, a:b])
            np.matmul(total.transpose(1, 2, 0), weights, out=dw[a:b].transpose(1, 0, 2))

        most = min(ceil(count / (2 * THREADS)), KERNELS // channels)  # each job has all pixels
        parallel(work, shares(count, most))
    return dw.reshape(count, channels, 3, 3)


# ---------------------------------------------------------------- batch normalisation with ReLU


def pieces(images, height, numbers):
    """(image, first row, last row) that cut images with so many numbers a row into pieces."""
    rows = spans(height, NUMBERS // max(1, numbers))
    return [(n, *some) for n in range(images) for some in rows]


def pieces_of(x):
    """The pieces of (N, H, W, C)."""
    return pieces(*x.shape[:2], x.shape[2] * x.shape[3])


def lines(x, piece, name="last"):
    """A piece of (N, H, W, C), its numbers in the order of memory if that is possible: (rows, W C).

    A view where channels are last in memory too, else scratch memory of that name.
    """
    n, a, b = piece
    _, _, width, channels = x.shape
    if channels == 1 or x.size == 0 or x.strides[2:] == (4 * channels, 4):
        return x[n, a:b].reshape(b - a, -1)
    part = scratch(name, (b - a) * width, channels)
    return cv2.transpose(planes(x, piece), part).reshape(b - a, -1)


def planes(x, piece):
    """The view (C, pixels) of a piece of (N, H, W, C) whose channels are first in memory."""
    n, a, b = piece
    _, height, width, channels = x.shape
    whole = x[n].transpose(2, 0, 1).reshape(channels, height * width)
    return whole[:, a * width : b * width]


def channels_first(images, height, width, channels):
    """An uninitialised (N, H, W, C) of which planes() can be written."""
    return np.empty((images, channels, height, width), np.float32).transpose(0, 2, 3, 1)


def along(x, values):
    """Values (C,) for each of the W C numbers of a line, float32."""
    return np.tile(values.astype(np.float32), x.shape[2])


def sum_lines(part):
    """The sum of lines, (W C,); a product is faster than sum()."""
    return np.ones(len(part), np.float32) @ part


def of_channels(columns, x):
    """Sums of columns of lines, (W C,) -> sums over all of their pixels, (C,)"""
    return sum_lines(columns.reshape(-1, x.shape[3]))


class Normalisation:
    """y = max(0, batch normalisation of x), for x (N, H, W, C) without the convolution's bias.

    Ioffe and Szegedy (2015), arXiv:1502.03167: with the batch's mean and deviation if the layer is
    training, whose running statistics then move; else with those. y = max(0, scale x + shift),
    where scale = gamma / deviation, shift = beta - scale mean. A bias would only add to the mean.
    """

    def __init__(self, layer, bias, x, gamma, beta):
        self.x, self.training = x, layer.training
        self.count = x.size // x.shape[3]
        if layer.training:
            self.mean, variance = statistics(x)
            unbiased = variance * self.count / (self.count - 1)
            moves = (layer.running_mean, self.mean + bias), (layer.running_var, unbiased)
            for buffer, new in moves:
                # OneFlow's operations, since waiting for the buffer's numbers takes longer.
                news = flow.from_numpy((layer.momentum * new).astype(np.float32))
                buffer.mul_(1 - layer.momentum).add_(news)
            layer.num_batches_tracked.add_(1)
        else:
            self.mean, variance = layer.running_mean.numpy() - bias, layer.running_var.numpy()
        self.inverse = 1 / np.sqrt(variance.astype(np.float64) + layer.eps)  # of the deviation
        self.scale = gamma * self.inverse + 0.0  # no negative zero
        self.shift = beta - self.scale * self.mean

    def output(self, y):
        """Write y (N, H, W, C)."""
        scale, shift = along(self.x, self.scale), along(self.x, self.shift)
        zeros = np.zeros_like(shift)  # NumPy compares arrays faster than numbers

        def work(*piece):
            x = lines(self.x, piece)
            value = np.multiply(x, scale, out=scratch("value", *x.shape))
            value += shift
            np.maximum(value, zeros, out=lines(y, piece))

        parallel(work, pieces_of(self.x))

    def gradient(self, dy, dx):
        """dy -> writes dx, both (N, H, W, C); returns the gradients of gamma, beta and bias."""
        scale = along(self.x, self.scale)
        # scale x + shift > 0 <=> x > -shift / scale, or for negative scales the opposite
        threshold = along(self.x, -self.shift / self.scale)
        negative = scale < 0
        np.nextafter(threshold, -np.inf, out=threshold, where=negative, dtype=np.float32)

        def mask(*piece):
            x, masked = lines(self.x, piece), lines(dx, piece)
            np.multiply(lines(dy, piece), (x > threshold) ^ negative, out=masked)
            sums = sum_lines(masked), np.einsum("ij,ij->j", masked, x)
            return [of_channels(columns, self.x) for columns in sums]

        dbeta, dgamma = np.sum(parallel(mask, pieces_of(self.x)), axis=0, dtype=np.float64)
        dgamma = (dgamma - self.mean * dbeta) * self.inverse
        # dx = scale (dy - mean of dy - normalised x * mean of dy * normalised x)
        slope = -self.scale * self.inverse * dgamma / self.count
        constant = -self.scale * dbeta / self.count - slope * self.mean
        slope, constant = along(self.x, slope), along(self.x, constant)

        def finish(*piece):
            masked = lines(dx, piece)
            masked *= scale
            if self.training:
                x = lines(self.x, piece)
                value = np.multiply(x, slope, out=scratch("value", *x.shape))
                value += constant
                masked += value

        parallel(finish, pieces_of(self.x))
        # The batch's mean takes a bias away again.
        dbias = np.zeros_like(dbeta) if self.training else self.scale * dbeta
        return dgamma, dbeta, dbias


def statistics(x):
    """(mean, biased variance) of the channels of (N, H, W, C), float64.

    From those of pieces, while a cache holds them: the variance of all is the mean of the pieces'
    variances plus the variance of their means (Chan, Golub and LeVeque 1983).
    """

    def work(*piece):
        part = lines(x, piece)
        count = len(part) * x.shape[2]
        mean = of_channels(sum_lines(part), x) / count
        centred = np.subtract(part, along(x, mean), out=scratch("value", *part.shape))
        return count, mean, of_channels(np.einsum("ij,ij->j", centred, centred), x)

    parts = zip(*parallel(work, pieces_of(x)), strict=True)
    counts, means, squares = (np.array(values, np.float64) for values in parts)
    counts = counts[:, None]
    mean = (counts * means).sum(0) / counts.sum()
    return mean, (squares + counts * (means - mean) ** 2).sum(0) / counts.sum()


# ------------------------------------------------------- layers: arrays in, arrays out, and back


class Kernel:
    """Computes one call of a module; forward() leaves in it what backward() needs.

    forward: `inputs` images and the parameters, as arrays -> an image. backward: its gradient ->
    theirs, those of parameters in any shape, or None for what is not `needed`. Images are
    (N, H, W, C); in memory, those of other modules may have their channels first.
    """

    def __init__(self, module, inputs, needed):
        self.module, self.inputs, self.needed = module, inputs, needed


class DoubleConvolution(Kernel):
    """unet.DoubleConv of one or more inputs that follow each other along the channels."""

    def forward(self, *arrays):
        self.images, self.parameters = arrays[: self.inputs], arrays[self.inputs :]
        w1, bias1, gamma1, beta1, w2, bias2, gamma2, beta2 = self.parameters
        self.grid = Grid(*self.images[0].shape[:3])
        x = correlate(self.grid, self.padded_images(), w1)
        self.first = Normalisation(self.module.double_conv[1], bias1, x, gamma1, beta1)
        middle = self.padded_middle()
        if not any(self.needed):
            self.first = x = None  # only a backward pass would ask for it
        x = correlate(self.grid, middle, w2)
        self.second = Normalisation(self.module.double_conv[4], bias2, x, gamma2, beta2)
        y = np.empty(x.shape, np.float32)
        self.second.output(y)
        return y

    def padded_images(self):
        padded = self.grid.padded("padded", sum(image.shape[3] for image in self.images))
        inside = self.grid.inside(padded)

        def write(*piece):
            n, a, b = piece
            channel = 0
            for image in self.images:
                part = lines(image, piece).reshape(b - a, -1, image.shape[3])
                inside[n, a:b, :, channel : channel + part.shape[2]] = part
                channel += part.shape[2]

        parallel(write, pieces_of(inside))
        return padded

    def padded_middle(self):
        """What goes from the first half into the second."""
        padded = self.grid.padded("padded", self.first.x.shape[3])
        self.first.output(self.grid.inside(padded))
        return padded

    def backward(self, dy):
        *images_needed, w1_needed, _, _, _, w2_needed, _, _, _ = self.needed
        w1, w2 = self.parameters[0], self.parameters[4]
        dw1 = dw2 = None
        images = [None] * self.inputs

        # Arrays that are done with are let go of at once: here memory use is highest.
        dx2 = self.grid.padded("padded gradient", dy.shape[3])
        dgamma2, dbeta2, dbias2 = self.second.gradient(dy, self.grid.inside(dx2))
        self.second = None
        if w2_needed:
            dw2 = weight_gradient(self.grid, self.padded_middle(), dx2)
        middle = correlate(self.grid, dx2, w2, turned=True)

        dx1 = self.grid.padded("padded gradient", middle.shape[3])  # dx2's memory
        dgamma1, dbeta1, dbias1 = self.first.gradient(middle, self.grid.inside(dx1))
        self.first = middle = None
        if w1_needed:
            dw1 = weight_gradient(self.grid, self.padded_images(), dx1)
        if any(images_needed):
            dx = correlate(self.grid, dx1, w1, turned=True)
            images = self.parts(dx) if self.inputs > 1 else [dx]
        return *images, dw1, dbias1, dgamma1, dbeta1, dw2, dbias2, dgamma2, dbeta2

    def parts(self, dx):
        """dx cut into those of the inputs."""
        # In a U-Net the first input feeds a pooling as well. OneFlow adds the two gradients, for
        # which channels first is its way; with others it takes 20 times as long.
        skip, *others = self.images
        parts = [channels_first(*skip.shape)]
        parts += [np.empty(image.shape, np.float32) for image in others]

        def write(*piece):
            n, a, b = piece
            channel = skip.shape[3]
            pixels = lines(dx, piece).reshape(-1, dx.shape[3])
            cv2.transpose(pixels[:, :channel], planes(parts[0], piece))
            for part in parts[1:]:
                part[n, a:b] = dx[n, a:b, :, channel : channel + part.shape[3]]
                channel += part.shape[3]

        parallel(write, pieces_of(dx))
        return parts


class TransposedConvolution(Kernel):
    """nn.ConvTranspose2d with a 2x2 kernel and stride 2: every pixel becomes 2x2 pixels.

    A pixel of C numbers times a (C, 2 K) matrix is two pixels of K numbers that follow each other,
    in an even line of the output; another matrix gives those in the odd line.
    """

    def forward(self, x, weights, bias):
        self.x = x
        images, height, width, channels = x.shape
        count = weights.shape[1]
        # (line, C, pixel K)
        self.weights = np.ascontiguousarray(weights.transpose(2, 0, 3, 1)).reshape(2, channels, -1)
        biases = np.tile(bias, 2 * width)
        y = np.empty((images, 2 * height, width, 2 * count), np.float32)

        def work(n, a, b):
            pixels = lines(x, (n, a, b)).reshape(b - a, width, channels)
            for i in range(2):
                np.matmul(pixels, self.weights[i], out=y[n, 2 * a + i : 2 * b : 2])
            part = lines(y, (n, 2 * a, 2 * b))
            part += biases

        parallel(work, pieces(images, height, 4 * width * count))
        return y.reshape(images, 2 * height, 2 * width, count)

    def backward(self, dy):
        images, height, width, channels = self.x.shape
        count = dy.shape[3]
        dx = np.empty(self.x.shape, np.float32)
        jobs = pieces(images, height, 4 * width * count)

        def work(first, last):
            dw, dbias = np.zeros_like(self.weights), 0
            for n, a, b in jobs[first:last]:
                x = lines(self.x, (n, a, b), "x").reshape(-1, channels)
                out = dx[n, a:b].reshape(-1, channels)
                dy_lines = lines(dy, (n, 2 * a, 2 * b))
                dbias = dbias + of_channels(sum_lines(dy_lines), dy)
                pairs, more = scratch("pairs", len(x), 2 * count), scratch("more", *x.shape)
                for i, target in enumerate((out, more)):
                    pairs.reshape(b - a, -1)[...] = dy_lines[i::2]
                    np.matmul(pairs, self.weights[i].T, out=target)
                    dw[i] += x.T @ pairs
                out += more
            return dw, dbias

        results = parallel(work, spans(len(jobs), ceil(len(jobs) / THREADS)))
        dw, dbias = map(sum, zip(*results, strict=True))
        dw = dw.reshape(2, channels, 2, count).transpose(1, 3, 0, 2)
        return dx, dw, dbias


class PointwiseConvolution(Kernel):
    """nn.Conv2d with a 1x1 kernel."""

    def forward(self, x, weights, bias):
        self.x, self.weights = x, weights[:, :, 0, 0]
        images, height, width, channels = x.shape
        y = channels_first(images, height, width, len(weights))  # it goes to OneFlow's operations

        def work(*piece):
            pixels = lines(x, piece).reshape(-1, channels)
            np.add(self.weights @ pixels.T, bias[:, None], out=planes(y, piece))

        parallel(work, pieces_of(x))
        return y

    def backward(self, dy):
        channels = self.x.shape[3]
        dx = np.empty(self.x.shape, np.float32)

        def work(*piece):
            part = planes(dy, piece)
            np.matmul(part.T, self.weights, out=lines(dx, piece).reshape(-1, channels))
            return part @ lines(self.x, piece).reshape(-1, channels), part.sum(1)

        dw, dbias = zip(*parallel(work, pieces_of(dx)), strict=True)
        return dx, sum(dw), sum(dbias)


class MaxPooling(Kernel):
    """nn.MaxPool2d(2). The first of several equal maxima gets the gradient, as in OneFlow."""

    def forward(self, x):
        self.x = x
        images, height, width, channels = x.shape
        y = np.empty((images, height // 2, width // 2, channels), np.float32)

        def work(n, a, b):
            self.maxima(self.rows(n, a, b), out=y[n, a:b])

        parallel(work, pieces_of(y))
        return y

    def rows(self, n, a, b):
        """The upper and the lower lines of the input that rows a to b of the output come from."""
        _, _, width, channels = self.x.shape
        part = lines(self.x, (n, 2 * a, 2 * b))[:, : width // 2 * 2 * channels]
        return part[::2], part[1::2]

    def maxima(self, rows, out):
        """-> out (rows, W // 2, C)"""
        larger = np.maximum(*rows, out=scratch("larger", *rows[0].shape))
        pairs = larger.reshape(len(larger), -1, 2, self.x.shape[3])
        return np.maximum(pairs[:, :, 0], pairs[:, :, 1], out=out)

    def backward(self, dy):
        _, height, width, channels = self.x.shape
        dx = channels_first(*self.x.shape)  # to be added to another, as in DoubleConvolution
        if height % 2:
            dx[:, -1] = 0  # an odd line or column belongs to no maximum

        def work(n, a, b):
            shape = b - a, width // 2, 2, channels
            target = scratch("target", b - a, 2, width, channels)
            target[:, :, width // 2 * 2 :] = 0
            gradient, maxima = scratch("gradient", *shape), scratch("maxima", *shape)
            gradient[...] = lines(dy, (n, a, b)).reshape(b - a, -1, 1, channels)
            rows = self.rows(n, a, b)
            maxima[:, :, 1] = self.maxima(rows, out=maxima[:, :, 0])
            free = np.ones((b - a, width // 2, channels), bool)
            for i, x in enumerate(rows):
                hit = (x == maxima.reshape(b - a, -1)).reshape(shape)
                for j in range(2):
                    hit[:, :, j] &= free
                    free ^= hit[:, :, j]
                np.multiply(gradient, hit, out=target[:, i, : width // 2 * 2].reshape(shape))
            cv2.transpose(target.reshape(-1, channels), planes(dx, (n, 2 * a, 2 * b)))

        parallel(work, pieces_of(dy))
        return (dx,)


def interpolation(size):
    """(2 size, size): linear interpolation at 2 size places, from the first to the last of size."""
    places = np.linspace(0, size - 1, 2 * size)
    matrix = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size)))
    return matrix.astype(np.float32)


def resample(x, rows, columns):
    """(N, H, W, C) -> rows (H', H) times each column, columns (W', W) times each row."""
    images, _, _, channels = x.shape
    y = np.empty((images, len(rows), len(columns), channels), np.float32)

    def band(matrix, first, last):
        """Some rows without zeros around: where those begin and end, and the rest."""
        used = np.flatnonzero(matrix[first:last].any(axis=0))
        a, b = used[0], used[-1] + 1
        return a, b, np.ascontiguousarray(matrix[first:last, a:b])

    def work(n, first, last):
        a, b, some = band(rows, first, last)
        part = (some @ lines(x, (n, a, b))).reshape(last - first, -1, channels)
        for left, right in spans(len(columns), 64):
            a, b, some = band(columns, left, right)
            np.matmul(some, part[:, a:b], out=y[n, first:last, left:right])

    parallel(work, pieces_of(y))
    return y


class Upsampling(Kernel):
    """nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)."""

    def forward(self, x):
        self.rows, self.columns = map(interpolation, x.shape[1:3])
        return resample(x, self.rows, self.columns)

    def backward(self, dy):
        return (resample(dy, self.rows.T, self.columns.T),)


# ---------------------------------------------------------------------- what OneFlow gets to see


def run(kind, module, inputs, *tensors):
    """A kernel's forward of the tensors, with its backward for autograd where that is needed.

    Images go from kernel to kernel with their channels last in memory, as tensors (N, C, H, W)
    that aren't contiguous. OneFlow would make them so for autograd, slowly; permuted they are.
    """
    parameters = tensors[inputs:]
    images = [image.permute(0, 2, 3, 1) for image in tensors[:inputs]]
    first = [not image.is_contiguous() for image in images]  # channels first in memory, or else
    for i in range(inputs):
        if first[i]:
            images[i] = tensors[i].contiguous()
    needed = [flow.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    kernel = kind(module, inputs, needed)
    shapes = [tensor.shape for tensor in parameters]

    def forward(ctx, *tensors):
        arrays = [tensor.numpy() for tensor in tensors]
        for i in range(inputs):
            if first[i]:
                arrays[i] = arrays[i].transpose(0, 2, 3, 1)
        with computing():
            return flow.from_numpy(kernel.forward(*arrays))

    def backward(ctx, dy):
        if flow.is_grad_enabled() or not vars(kernel):
            raise RuntimeError(
                "an accelerated module can be differentiated once: no second backward pass, no "
                "gradients of gradients; leave out accelerate() for that (--cpu_kernels off)"
            )
        with computing():
            gradients = list(kernel.backward(dy.numpy()))
        vars(kernel).clear()  # OneFlow itself keeps everything until the whole pass is done
        for i, gradient in enumerate(gradients):
            if not needed[i]:
                gradients[i] = None
                continue
            if i >= inputs:
                gradient = np.ascontiguousarray(gradient, np.float32).reshape(shapes[i - inputs])
            elif first[i]:
                gradient = gradient.transpose(0, 3, 1, 2)
            gradients[i] = flow.from_numpy(gradient)
        return tuple(gradients)

    if not any(needed):
        return forward(None, *images, *parameters).permute(0, 3, 1, 2)
    # What a class derived from autograd.Function calls. A class for each call would be a cycle of
    # references, which holds its arrays until Python looks for cycles.
    y = AutogradFunctionBase.apply("cpu_kernels", forward, backward, *images, *parameters)
    return y.permute(0, 3, 1, 2)


class Fast:
    """Mixed into a module's class: runs its kernel where that can be, else OneFlow's own."""

    def forward(self, *inputs):
        tensors = (*inputs, *self.parameters())
        odd = any(t.is_lazy or t.is_global or t.is_cuda or t.dtype != flow.float32 for t in tensors)
        if odd or not self.fits(*(tuple(x.shape) for x in inputs)):
            return self.stock.forward(self, *inputs)
        return run(self.kernel, self, len(inputs), *tensors)

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


class Upsample(Fast, nn.Upsample):
    stock, kernel = nn.Upsample, Upsampling


def setup(module):
    """All that decides what a module computes, but for numbers that the kernels ask it for."""
    names = "kernel_size stride padding dilation groups output_padding padding_mode ceil_mode"
    names += " return_indices affine track_running_stats size scale_factor mode align_corners"
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
        Upsample: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    }
    for module in net.modules():
        for fast, example in examples.items():
            if setup(module) == setup(example):
                module.__class__ = fast
                module._setup = setup(module)
    return net
