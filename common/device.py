"""Which device computes: a GPU that OneFlow can use, or the CPU."""

import ctypes
import os

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common.arguments import InputError

import oneflow as flow

MAJOR, MINOR = 75, 76  # of the compute capability, among the driver's attributes of a device


def pick(name):
    """ "auto", "cpu" or "cuda" -> "cpu" or "cuda". Raises InputError where "cuda" can't be."""
    if name == "cpu":
        return name
    trouble = find_trouble()
    if trouble and name == "cuda":
        raise InputError(f"--device cuda: {trouble}, use --device cpu")
    if trouble and flow.cuda.is_available():
        print(f"{trouble}: using the CPU")
    return "cpu" if trouble else "cuda"


def find_trouble():
    """Why this process has no GPU that OneFlow can use; None where it has one.

    OneFlow 0.9 has machine code up to compute capability 8.9 and none that newer GPUs could translate: there it finds a
    GPU, and the first computation fails.
    """
    if not flow.cuda.is_available():
        return "OneFlow finds no GPU here"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuInit(0)
    if driver.cuDeviceGet(ctypes.byref(device), int(os.environ.get("LOCAL_RANK") or 0)):
        return None  # it isn't ours to say
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    if 6 <= major.value <= 8:
        return None
    return f"OneFlow 0.9 has no code for this GPU (compute capability {major.value}.{minor.value}, not 6.0 to 8.9)"
