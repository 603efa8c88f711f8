"""oneDNN 3.2 (https://uxlfoundation.github.io/oneDNN), the library under PyTorch's CPU convolutions, through ctypes.
    conv = primitive("convolution_forward", FORWARD, DIRECT, layout_of(image), ...)   # made once, then cached
    conv({SRC: image, WEIGHTS: conv.pack(WEIGHTS, weight), DST: out})            # runs on all threads
An operation of the library, a *primitive*, is made for fixed shapes; a call returns when all is computed. Images are
NumPy arrays (N, H, W, C), float32, or uint16 that holds the bits of bfloat16, which NumPy doesn't know."""

import ctypes
import os
import sysconfig
import threading
from functools import lru_cache, partial
from math import prod

import numpy as np

# Numbers of dnnl_types.h: arguments of primitives; kinds of propagation and algorithms; flags of batch normalisation
SRC, SRC_1, DST, WEIGHTS, BIAS, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE = 1, 2, 17, 33, 41, 49, 50, 51, 52, 64
SCRATCHPAD, POST_SCALE, POST_SHIFT = 80, 1 << 15 | SRC_1, 2 << 15 | SRC_1
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS, DIFF_SCALE, DIFF_SHIFT = 129, 145, 161, 169, 255, 256
FORWARD, BACKWARD, DIRECT, POOL_MAX, RELU, ADD, MULTIPLY = 64, 128, 1, 0x1FF, 0x20, 0x1FFF0, 0x1FFF1
GLOBAL_STATISTICS, USE_SCALE, USE_SHIFT, FUSE_RELU = 1, 2, 4, 8
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(np.uint16)
TYPES, ANY = {FLOAT32: 3, BFLOAT16: 2}, 1
AVX2, AVX512_BF16 = 0x7, 0xE7  # bits of the instruction sets
ARGUMENT = np.dtype([("number", np.int32), ("memory", np.uintp)], align=True)  # dnnl_exec_arg_t
Sizes = ctypes.c_int64 * 12  # what the library calls dims
NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)  # orders of axes: what transposes a tensor to an image, and an image back


def empty(shape, type):
    """An uninitialised array that begins at a multiple of 64 bytes, a line of the cache."""
    raw = np.empty(prod(shape) * type.itemsize + 64, np.uint8)
    return np.ndarray(shape, type, raw, -raw.ctypes.data % 64)


class Library:
    """The loaded library, its engine (the CPU) and its stream. Raises OSError where it can't be loaded."""

    def __init__(self):
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # OpenMP's idle threads would spin on cores that OneFlow needs
        self.functions = ctypes.CDLL(os.path.join(sysconfig.get_path("data"), "lib", "libdnnl.so.3"))
        self.wanted, self.size = self.functions.dnnl_primitive_desc_query_md, self.functions.dnnl_memory_desc_get_size
        self.wanted.restype, self.size.restype = Handle, ctypes.c_size_t
        self.process = os.getpid()
        self.lock = threading.Lock()  # a primitive is told where its arrays are before it runs
        self.engine, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        self("engine_create", ctypes.byref(self.engine), 1, ctypes.c_size_t(0))
        self("stream_create", ctypes.byref(self.stream), self.engine, 1)

    def __call__(self, name, *arguments):
        """Call the C function dnnl_{name}. Raises RuntimeError where its status is an error."""
        if status := getattr(self.functions, f"dnnl_{name}")(*arguments):
            raise RuntimeError(f"oneDNN: {name} failed with status {status}")

    def has(self, instructions):
        return self.functions.dnnl_get_effective_cpu_isa() & instructions == instructions


class Handle(ctypes.c_void_p):
    """An object of the library's, made by dnnl_{create}, destroyed with its handle. It can be a key of a cache."""

    __hash__ = object.__hash__

    def __init__(self, kind, *arguments, create=None):
        super().__init__()
        self.destroy = partial(library(), f"{kind}_destroy")
        library()(create or f"{kind}_create", ctypes.byref(self), *arguments)

    def __del__(self):
        if hasattr(self, "destroy"):  # a query only lends its result
            self.destroy(self)


@lru_cache(4096)
def descriptor(sizes, strides, type):
    """The library's description of an array: sizes, strides in numbers (None: a primitive may choose), type."""
    kind, last = ("tag", ANY) if strides is None else ("strides", Sizes(*strides))
    return Handle("memory_desc", len(sizes), Sizes(*sizes), TYPES[type], last, create=f"memory_desc_create_with_{kind}")


def layout(array):
    """The descriptor of an array as it is."""
    return descriptor(array.shape, tuple(stride // array.itemsize for stride in array.strides), array.dtype)


def layout_of(image):
    """The descriptor of an image (N, H, W, C), in the order N, C, H, W that oneDNN wants whatever the strides."""
    return layout(image.transpose(NCHW))


class Primitive:
    """What dnnl_{name}_primitive_desc_create makes of the arguments: all that it takes between engine and attributes,
    descriptors, tuples, numbers, None, a forward primitive's description. normalised: channels of a result y that
    becomes max(0, y * array of POST_SCALE + array of POST_SHIFT). Calling it with {argument: array} runs it, always
    with the same arguments; those whose array is None are left out."""

    def __init__(self, name, *arguments, normalised=0):
        self.library, self.name, self.memories = library(), name, {}
        attributes = Handle("primitive_attr")
        self.library("primitive_attr_set_scratchpad_mode", attributes, 1)  # ours, or each primitive keeps its own
        if normalised:
            operations = Handle("post_ops")
            one_a_channel = descriptor((1, normalised, 1, 1), (normalised, 1, 1, 1), FLOAT32)
            self.library("post_ops_append_binary", operations, MULTIPLY, one_a_channel)
            self.library("post_ops_append_binary", operations, ADD, one_a_channel)
            self.library("post_ops_append_eltwise", operations, RELU, ctypes.c_float(0), ctypes.c_float(0))
            self.library("primitive_attr_set_post_ops", attributes, operations)
        passed = [Sizes(*argument) if isinstance(argument, tuple) else argument for argument in arguments]
        passed = [ctypes.c_float(argument) if isinstance(argument, float) else argument for argument in passed]
        passed.insert(name == "reorder", self.library.engine)  # behind a reorder's source, in front of all others'
        passed += [self.library.engine] * (name == "reorder")  # and behind its target
        self.description = Handle("primitive_desc", *passed, attributes, create=f"{name}_primitive_desc_create")
        self.handle = Handle("primitive", self.description)
        # The same object for an argument each time: its reorders are found by it.
        self.wanted = lru_cache(None)(partial(self.library.wanted, self.description, 255))
        self.scratch = self.library.size(self.wanted(SCRATCHPAD))

    def empty(self, argument):
        """An array of bytes for an argument whose layout the primitive has chosen."""
        return empty((self.library.size(self.wanted(argument)),), np.dtype(np.uint8))

    def pack(self, argument, array):
        """A copy of an array in the layout and the type that the primitive has chosen for an argument."""
        return copy(array, target=self.empty(argument), to=self.wanted(argument))

    def __call__(self, arrays):
        arrays = {number: array for number, array in arrays.items() if array is not None}
        if self.scratch:
            arrays[SCRATCHPAD] = self.empty(SCRATCHPAD)
        with self.library.lock:
            if not self.memories:
                self.memories = {n: Handle("memory", self.wanted(n), self.library.engine, None) for n in arrays}
                self.passed = np.array([(n, memory.value) for n, memory in self.memories.items()], ARGUMENT)
                self.start = ctypes.c_void_p(self.passed.ctypes.data)
            for number, array in arrays.items():
                self.library("memory_set_data_handle", self.memories[number], ctypes.c_void_p(array.ctypes.data))
            self.library("primitive_execute", self.handle, self.library.stream, len(arrays), self.start)


library, primitive = lru_cache(1)(Library), lru_cache(4096)(Primitive)


def copy(source, order=None, type=None, target=None, of=None, to=None):
    """A copy of an array, its axes in an order, of a type, by default its own, or in a target, whatever the strides.
    of, to: the descriptors of source and target where a primitive has chosen them."""
    source = source.transpose(order) if order else source
    target = empty(source.shape, type or source.dtype) if target is None else target
    primitive("reorder", of or layout(source), to or layout(target))({SRC: source, DST: target})
    return target
