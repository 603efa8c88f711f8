"""oneDNN, the library under PyTorch's CPU convolutions, through ctypes. Knows nothing of nets.

    conv = primitive("convolution_forward", FORWARD, DIRECT, source, ANY, ...)   # made once, then cached
    conv({SRC: image, WEIGHTS: conv.pack(WEIGHTS, weight), DST: out})            # runs on all threads

An operation of the library, a *primitive*, is made for fixed shapes. `primitive(name, ...)` takes what the C function
dnnl_NAME_primitive_desc_create takes between its engine and its attributes, with a Layout for each memory descriptor.
Its documentation: https://uxlfoundation.github.io/oneDNN (version 3.2).

Images are NumPy arrays (N, H, W, C), channels last, float32, or uint16 that holds the bits of bfloat16, which NumPy
doesn't know. Calls return when all is computed; what is not finite goes on without a word, as in OneFlow.
"""

import ctypes
import os
import sysconfig
import threading
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

SRC, SRC_1, DST, WEIGHTS, BIAS, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE = (1, 2, 17, 33, 41, 49, 50, 51, 52, 64)
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS, DIFF_SCALE, DIFF_SHIFT = 129, 145, 161, 169, 255, 256
FORWARD, INFERENCE, BACKWARD = 64, 96, 128  # kinds of propagation
DIRECT, DIRECT_TRANSPOSED, POOL_MAX, RELU, ADD, MULTIPLY = (1, 0xA, 0x1FF, 0x20, 0x1FFF0, 0x1FFF1)  # algorithms
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
        path = os.path.join(sysconfig.get_path("data"), "lib", "libdnnl.so.3")
        # OpenMP's idle threads would spin on the cores that OneFlow's need. It reads this when it is loaded.
        before = os.environ.get("GOMP_SPINCOUNT")
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        try:
            self.functions = ctypes.CDLL(path)
        finally:
            if before is None:
                del os.environ["GOMP_SPINCOUNT"]
        self.descriptor, self.size = (
            self.functions.dnnl_primitive_desc_query_md,
            self.functions.dnnl_memory_desc_get_size,
        )
        self.descriptor.restype, self.size.restype = ctypes.c_void_p, ctypes.c_size_t
        self.process = os.getpid()
        self.lock = threading.Lock()  # a primitive is told where its arrays are before it runs
        self.engine, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        self("engine_create", ctypes.byref(self.engine), 1, ctypes.c_size_t(0))
        self("stream_create", ctypes.byref(self.stream), self.engine, 1)

    def __call__(self, name, *arguments):
        status = getattr(self.functions, f"dnnl_{name}")(*arguments)
        if status:
            raise RuntimeError(f"oneDNN: dnnl_{name} failed with status {status}")

    def has(self, instructions):
        return self.functions.dnnl_get_effective_cpu_isa() & instructions == instructions


@lru_cache(1)
def library():
    return Library()


class Argument(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("memory", ctypes.c_void_p))


def dims(numbers):
    return (ctypes.c_int64 * 12)(*numbers)


class Primitive:
    """See primitive()."""

    def __init__(self, name, *arguments, hint=None, then=()):
        self.library, self.name, self.memories, self.reorders = library(), name, {}, {}
        self.description, self.handle, attributes = (ctypes.c_void_p() for _ in range(3))
        made = []
        passed = [self.translate(argument, made) for argument in arguments]
        # A reorder wants the engine of its source and of its target, all others want one in front.
        passed[1 if name == "reorder" else 0 : 0] = [self.library.engine]
        passed += [self.library.engine] * (name == "reorder") + ([hint.description] if hint else [])
        self.library("primitive_attr_create", ctypes.byref(attributes))
        self.append(then, attributes, made)
        self.library(f"{name}_primitive_desc_create", ctypes.byref(self.description), *passed, attributes)
        self.library("primitive_attr_destroy", attributes)
        for descriptor in made:
            self.library("memory_desc_destroy", descriptor)
        self.library("primitive_create", ctypes.byref(self.handle), self.description)

    def translate(self, argument, made):
        """What the C function takes for an argument of primitive(); new descriptors are added to `made`."""
        if isinstance(argument, Layout):
            made.append(ctypes.c_void_p())
            start = (ctypes.byref(made[-1]), len(argument.sizes), dims(argument.sizes), TYPES[argument.type])
            if argument.strides is None:
                self.library("memory_desc_create_with_tag", *start, ANY)
            else:
                self.library("memory_desc_create_with_strides", *start, dims(argument.strides))
            return made[-1]
        if isinstance(argument, tuple):
            return dims(argument)
        return ctypes.c_float(argument) if isinstance(argument, float) else argument

    def append(self, then, attributes, made):
        operations, zero = ctypes.c_void_p(), ctypes.c_float(0)
        self.library("post_ops_create", ctypes.byref(operations))
        for operation in then:
            if operation == RELU:
                self.library("post_ops_append_eltwise", operations, RELU, zero, zero)
            else:
                algorithm, layout_of_array = operation
                self.library("post_ops_append_binary", operations, algorithm, self.translate(layout_of_array, made))
        self.library("primitive_attr_set_post_ops", attributes, operations)
        self.library("post_ops_destroy", operations)

    def __del__(self):
        for memory in self.memories.values():
            self.library("memory_destroy", memory)
        self.library("primitive_destroy", self.handle)
        self.library("primitive_desc_destroy", self.description)

    def wanted(self, argument):
        """The memory descriptor that the primitive wants for an argument, owned by it."""
        return ctypes.c_void_p(self.library.descriptor(self.description, 255, argument))

    def empty(self, argument):
        """An array of bytes for an argument whose layout the primitive has chosen."""
        return empty((self.library.size(self.wanted(argument)),), np.dtype(np.uint8))

    def pack(self, argument, array):
        """A copy of an array in the layout and the type that the primitive has chosen for an argument."""
        packed = self.empty(argument)
        self.reorder(layout(array), self.wanted(argument), argument)({SRC: array, DST: packed})
        return packed

    def unpack(self, argument, packed, array):
        """The inverse of pack(): writes to `array` and returns it."""
        self.reorder(self.wanted(argument), layout(array), argument)({SRC: packed, DST: array})
        return array

    def reorder(self, source, target, argument):
        key = argument, source if isinstance(source, Layout) else target
        if key not in self.reorders:
            self.reorders[key] = Primitive("reorder", source, target)
        return self.reorders[key]

    def __call__(self, arrays):
        arguments = (Argument * len(arrays))()
        with self.library.lock:
            for slot, (number, array) in zip(arguments, arrays.items(), strict=True):
                memory = self.memories.get(number)
                if memory is None:
                    memory = self.memories[number] = ctypes.c_void_p()
                    self.library("memory_create", ctypes.byref(memory), self.wanted(number), self.library.engine, None)
                self.library("memory_set_data_handle", memory, ctypes.c_void_p(array.ctypes.data))
                slot.number, slot.memory = number, memory
            self.library("primitive_execute", self.handle, self.library.stream, len(arrays), arguments)


@lru_cache(4096)
def primitive(name, *arguments, hint=None, then=()):
    """The primitive that dnnl_{name}_primitive_desc_create makes of these arguments; the same ones give the same.

    arguments: Layouts, tuples of sizes, numbers, None. hint: the forward primitive that a backward one belongs to.
    then: what is done to the result: RELU, or (ADD or MULTIPLY, Layout), whose array the i-th gets as then_argument(i).
    """
    return Primitive(name, *arguments, hint=hint, then=then)


def then_argument(i):
    return 32768 * (i + 1) | SRC_1


def copy(source, target):
    """Copy an array to another of the same shape, whatever the strides and types of both; returns the target."""
    primitive("reorder", layout(source), layout(target))({SRC: source, DST: target})
    return target
