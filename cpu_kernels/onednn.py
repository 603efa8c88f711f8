"""oneDNN, the library under PyTorch's CPU convolutions, through ctypes. Knows nothing of nets.

    conv = primitive("convolution_forward", FORWARD, DIRECT, layout_of(image), ...)   # made once, then cached
    conv({SRC: image, WEIGHTS: conv.pack(WEIGHTS, weight), DST: out})            # runs on all threads

An operation of the library, a *primitive*, is made for fixed shapes. Images are NumPy arrays (N, H, W, C), channels
last, float32, or uint16 that holds the bits of bfloat16, which NumPy doesn't know. Calls return when all is computed.
The library's documentation: https://uxlfoundation.github.io/oneDNN (version 3.2).
"""

import ctypes
import os
import sysconfig
import threading
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

SRC, SRC_1, DST, WEIGHTS, BIAS, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE = 1, 2, 17, 33, 41, 49, 50, 51, 52, 64
SCRATCHPAD, POST_SCALE, POST_SHIFT = 80, 1 << 15 | SRC_1, 2 << 15 | SRC_1
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS, DIFF_SCALE, DIFF_SHIFT = 129, 145, 161, 169, 255, 256
FORWARD, INFERENCE, BACKWARD = 64, 96, 128  # kinds of propagation
DIRECT, POOL_MAX, RELU, ADD, MULTIPLY = 1, 0x1FF, 0x20, 0x1FFF0, 0x1FFF1  # algorithms
GLOBAL_STATISTICS, USE_SCALE, USE_SHIFT, FUSE_RELU = 1, 2, 4, 8  # of batch normalisation
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(np.uint16)
TYPES, ANY = {FLOAT32: 3, BFLOAT16: 2}, 1
AVX2, AVX512_BF16 = 0x7, 0xE7  # bits of the instruction sets
"""Numbers of dnnl_types.h; those above are the arguments of a primitive."""


class Layout(NamedTuple):
    """A memory descriptor: sizes, strides in numbers (none: the primitive may choose), type of the numbers."""

    sizes: tuple
    strides: tuple
    type: np.dtype = FLOAT32


def layout(array):
    """The Layout of an array as it is."""
    return Layout(array.shape, tuple(stride // array.itemsize for stride in array.strides), array.dtype)


def layout_of(image):
    """The Layout of an image (N, H, W, C), in the order N, C, H, W that oneDNN wants whatever the strides."""
    return layout(image.transpose(0, 3, 1, 2))


def empty(shape, type=FLOAT32):
    """An uninitialised array that begins at a multiple of 64 bytes, a line of the cache."""
    size = prod(shape) * type.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(type).reshape(shape)


class Library:
    """The loaded library, its engine (the CPU) and its stream. Raises OSError where it can't be loaded."""

    def __init__(self):
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # OpenMP's idle threads would spin on cores that OneFlow needs
        self.functions = ctypes.CDLL(os.path.join(sysconfig.get_path("data"), "lib", "libdnnl.so.3"))
        self.descriptor = self.functions.dnnl_primitive_desc_query_md
        self.size = self.functions.dnnl_memory_desc_get_size
        self.descriptor.restype, self.size.restype = ctypes.c_void_p, ctypes.c_size_t
        self.process = os.getpid()
        self.lock = threading.Lock()  # a primitive is told where its arrays are before it runs
        self.engine, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        self.engine_create(ctypes.byref(self.engine), 1, ctypes.c_size_t(0))
        self.stream_create(ctypes.byref(self.stream), self.engine, 1)

    def __getattr__(self, name):
        """The C function dnnl_{name}, which raises RuntimeError where its status is an error."""
        function = self.__dict__[name] = getattr(self.functions, f"dnnl_{name}")
        function.errcheck = self.check
        return function

    @staticmethod
    def check(status, function, arguments):
        if status:
            raise RuntimeError(f"oneDNN: {function.__name__} failed with status {status}")

    def has(self, instructions):
        return self.functions.dnnl_get_effective_cpu_isa() & instructions == instructions


library = lru_cache(1)(Library)
Sizes = ctypes.c_int64 * 12  # what the library calls dims


class Argument(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("memory", ctypes.c_void_p))


class Primitive:
    """What dnnl_{name}_primitive_desc_create makes of the arguments; calling it with {argument: array} runs it.

    arguments: what that C function takes between its engine and its attributes: Layouts, tuples, numbers, None. hint:
    the forward primitive that a backward one belongs to. normalised: channels of a result y that becomes
    max(0, y * array of POST_SCALE + array of POST_SHIFT).
    """

    def __init__(self, name, *arguments, hint=None, normalised=0):
        self.library, self.name, self.memories, self.reorders = library(), name, {}, {}
        (self.description, self.handle, attributes, operations), made = (ctypes.c_void_p() for _ in range(4)), []
        passed = [self.translate(argument, made) for argument in arguments]
        # A reorder wants the engine of its source and of its target, all others want one in front.
        passed[1 if name == "reorder" else 0 : 0] = [self.library.engine]
        passed += [self.library.engine] * (name == "reorder") + ([hint.description] if hint else [])
        self.library.primitive_attr_create(ctypes.byref(attributes))
        self.library.primitive_attr_set_scratchpad_mode(attributes, 1)  # ours, or each primitive keeps one of its own
        if normalised:
            one_a_channel = self.translate(Layout((1, normalised, 1, 1), (normalised, 1, 1, 1)), made)
            self.library.post_ops_create(ctypes.byref(operations))
            self.library.post_ops_append_binary(operations, MULTIPLY, one_a_channel)
            self.library.post_ops_append_binary(operations, ADD, one_a_channel)
            self.library.post_ops_append_eltwise(operations, RELU, ctypes.c_float(0), ctypes.c_float(0))
            self.library.primitive_attr_set_post_ops(attributes, operations)
            self.library.post_ops_destroy(operations)
        getattr(self.library, f"{name}_primitive_desc_create")(ctypes.byref(self.description), *passed, attributes)
        self.library.primitive_attr_destroy(attributes)
        for descriptor in made:
            self.library.memory_desc_destroy(descriptor)
        self.library.primitive_create(ctypes.byref(self.handle), self.description)
        self.scratch = self.library.size(self.wanted(SCRATCHPAD))

    def translate(self, argument, made):
        """What the C function takes for an argument of primitive(); new descriptors are added to `made`."""
        if isinstance(argument, Layout):
            made.append(ctypes.c_void_p())
            start = (ctypes.byref(made[-1]), len(argument.sizes), Sizes(*argument.sizes), TYPES[argument.type])
            kind, last = ("tag", ANY) if argument.strides is None else ("strides", Sizes(*argument.strides))
            getattr(self.library, f"memory_desc_create_with_{kind}")(*start, last)
            return made[-1]
        kinds = {tuple: lambda numbers: Sizes(*numbers), float: ctypes.c_float}
        return kinds.get(type(argument), lambda same: same)(argument)

    def __del__(self):
        for memory in self.memories.values():
            self.library.memory_destroy(memory)
        self.library.primitive_destroy(self.handle)
        self.library.primitive_desc_destroy(self.description)

    def wanted(self, argument):
        """The memory descriptor that the primitive wants for an argument, owned by it."""
        return ctypes.c_void_p(self.library.descriptor(self.description, 255, argument))

    def empty(self, argument):
        """An array of bytes for an argument whose layout the primitive has chosen."""
        return empty((self.library.size(self.wanted(argument)),), np.dtype(np.uint8))

    def pack(self, argument, array):
        """A copy of an array in the layout and the type that the primitive has chosen for an argument."""
        packed, plain = self.empty(argument), layout(array)
        reorder = self.reorders.get(plain) or Primitive("reorder", plain, self.wanted(argument))
        self.reorders.setdefault(plain, reorder)({SRC: array, DST: packed})
        return packed

    def unpack(self, argument, packed, array):
        """The inverse of pack(): writes to `array` and returns it."""
        plain = layout(array)
        reorder = self.reorders.get(plain) or Primitive("reorder", self.wanted(argument), plain)
        self.reorders.setdefault(plain, reorder)({SRC: packed, DST: array})
        return array

    def __call__(self, arrays):
        if self.scratch:
            arrays = arrays | {SCRATCHPAD: self.empty(SCRATCHPAD)}
        arguments = (Argument * len(arrays))()
        with self.library.lock:
            for slot, (number, array) in zip(arguments, arrays.items(), strict=True):
                if (memory := self.memories.get(number)) is None:
                    memory = self.memories[number] = ctypes.c_void_p()
                    self.library.memory_create(ctypes.byref(memory), self.wanted(number), self.library.engine, None)
                self.library.memory_set_data_handle(memory, ctypes.c_void_p(array.ctypes.data))
                slot.number, slot.memory = number, memory
            self.library.primitive_execute(self.handle, self.library.stream, len(arrays), arguments)


primitive = lru_cache(4096)(Primitive)


def copy(source, target):
    """Copy an array to another of the same shape, whatever the strides and types of both; returns the target."""
    primitive("reorder", layout(source), layout(target))({SRC: source, DST: target})
    return target
