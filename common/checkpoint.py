"""Reading and writing checkpoints, and taking over the weights that others trained.

`net, metadata = load_net("checkpoints/best.safetensors")` gives a trained net.
"""

import hashlib
import json
import math
import re
from contextlib import suppress
from pathlib import Path

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common import start
from common.arguments import InputError
from common.files import write_whole
from unet import UNet

import numpy as np
import oneflow as flow
import safetensors
import safetensors.numpy

THEIRS = dict.fromkeys((".pth", ".pt", ".ckpt"), "PyTorch's") | dict.fromkeys((".h5", ".hdf5", ".keras"), "Keras/HDF5")
FIRST, LAST = "inc.double_conv.0.weight", "outc.conv.weight"
SENSELESS = (LookupError, TypeError, ValueError, AttributeError, OverflowError)  # what odd JSON raises when it is used


def write(path, tensors, metadata):
    """Write a safetensors file whole, with a checksum. tensors: {name: array}; metadata: {key: JSON value}."""
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts["checksum"] = checksum(tensors, texts)
    with write_whole(path) as file:
        file.write(safetensors.numpy.save(tensors, texts))


def checksum(tensors, texts):
    """SHA-256 as JSON of all that a checkpoint holds; texts: its metadata, {key: string}."""
    digest = hashlib.sha256()
    for key in sorted(texts):
        digest.update(f"{key}={texts[key]}\n".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name]))
    return json.dumps(digest.hexdigest())


def read(path, trust_pickle=False):
    """Read a checkpoint -> (net's tensors under our names, optimizer's tensors, metadata); runs no code from it.

    The tensors are {name: array}; metadata["further"] has those of nets beside the first, by number, in the file
    `further.1.NAME` …. A folder of `flow.save` runs code when loaded: needs `trust_pickle`. Raises InputError.
    """
    path, texts = Path(path), {}
    if path.is_dir() and not trust_pickle:
        raise InputError(f"{path}: a folder of flow.save runs code when loaded: predict with it and --trust_pickle")
    if path.is_file() and (whose := THEIRS.get(path.suffix.lower())):
        raise InputError(f"{path}: is {whose}, convert it to .safetensors: docs/weights.md says how")
    try:
        if path.is_dir():
            tensors = {name: tensor.numpy() for name, tensor in flow.load(str(path)).items()}
        else:
            with safetensors.safe_open(path, framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                texts = file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; train one first, with bash train.sh") from None
    except Exception as error:  # whatever unpickling brings up
        raise InputError(f"{path}: not a whole checkpoint ({error!r})") from None
    expected = texts.pop("checksum", None)
    ours = not {"model", "arguments", "threshold"}.isdisjoint(texts)
    if (ours or expected) and expected != checksum(tensors, texts):
        raise InputError(f"{path}: is damaged, what it holds doesn't match its checksum")
    metadata = {}
    for key, text in texts.items():
        with suppress(ValueError, RecursionError):  # others' metadata, such as PyTorch's format: pt, aren't JSON
            metadata[key] = json.loads(text)
    optimizer = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")}
    metadata["further"] = {}
    for name in filter(re.compile(r"further\.\d+\.").match, list(tensors)):
        _, number, own = name.split(".", 2)
        metadata["further"].setdefault(number, {})[own] = tensors.pop(name)
    return (tensors if "model" in metadata else named_as_ours(path, tensors)), optimizer, metadata


def load_net(path, trust_pickle=False):
    """A checkpoint's or others' net on the CPU -> (net, or a list of a file's several, metadata). Raises InputError."""
    tensors, _, metadata = read(path, trust_pickle)
    nets = []
    for each in (tensors, *metadata.pop("further").values()):
        nets.append(UNet(*architecture(path, each)).eval())
        fill(path, nets[-1], each)
    return nets if len(nets) > 1 else nets[0], metadata


def named_as_ours(path, tensors):
    """Others' weights of this network under our names; prints what was changed.

    Names may have something in front (`module.`, `model.`); 3x3 convolutions may have no biases, batch normalisation no
    counts; further tensors are left out.
    """
    prefix = next((name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)), "")
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    said = [f"names without {prefix}"] if prefix else []
    own = UNet(*architecture(path, found)).state_dict()
    if unused := sorted(name for name in tensors if name.removeprefix(prefix) not in own):
        said.append(f"left out {', '.join(unused[:5])}")
    biases = {name for name in own if name.endswith(("double_conv.0.bias", "double_conv.3.bias"))}
    if biases.isdisjoint(found):
        found |= {name: np.zeros(own[name].shape, np.float32) for name in biases}
        said.append("its 3x3 convolutions have no biases")
    if said and start.rank == 0:
        print(f"{path}: weights that others trained: {'; '.join(said)}")
    counts = {name: np.zeros((), np.int64) for name in own if name.endswith("num_batches_tracked")}
    return {name: tensor for name, tensor in (counts | found).items() if name in own}


def architecture(path, tensors):
    """What UNet() is to be called with for a net's tensors. Raises InputError for none, or one the file can't hold."""
    with suppress(KeyError, IndexError, ValueError):
        (base_channels, n_channels, *_), n_classes = tensors[FIRST].shape, tensors[LAST].shape[0]
        least = base_channels * (9 * n_channels + n_classes + 576 * base_channels)
        if n_channels * n_classes > 0 and 0 < least <= sum(tensor.size for tensor in tensors.values()):
            return n_channels, n_classes, "up1.up.weight" not in tensors, base_channels
    raise InputError(f"{path}: doesn't hold a U-Net's weights")


def fill(path, net, tensors):
    """Load a checkpoint's net tensors into the net. Raises InputError where they don't fit."""
    own = net.state_dict()
    try:
        net.load_state_dict({name: as_ours(name, own[name], tensors[name]) for name in own | tensors})
    except SENSELESS as error:
        text = f"doesn't hold this U-Net of {net.base_channels} base channels{', bilinear' * net.bilinear}"
        wrong = f"{error} is missing, unknown, of another shape or type, or not finite"
        raise InputError(f"{path}: {text}: {wrong}") from None


def as_ours(name, ours, array):
    """An array as a tensor in the place of ours. Raises ValueError for another shape or kind, or what is not finite."""
    real = ours.dtype.is_floating_point
    fits = tuple(ours.shape) == array.shape and np.issubdtype(array.dtype, np.floating if real else np.integer)
    if not fits or (real and not (np.abs(array) < 1e30).all()) or ("running_var" in name and array.min() < 0):
        raise ValueError(name)
    return flow.tensor(array, dtype=ours.dtype)  # not from_numpy(): the array's memory is not ours to keep


def contents(net, optimizer):
    """What a run goes on from -> ({name: array}, the optimizer's metadata).

    What the optimizer keeps of a parameter is `optimizer.WHAT.PARAMETER`. Raises InputError for what fits nowhere.
    """
    tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    kind, numbers, name_of = type(optimizer).__name__, {}, {id(p): name for name, p in net.named_parameters()}
    for key, value in optimizer._state.items():  # PyTorch's .state: numbers by their names, tensors by parameter
        if isinstance(key, str) and isinstance(value, int | float):
            numbers[key] = value
        elif isinstance(key, flow.Tensor) and all(isinstance(tensor, flow.Tensor) for tensor in value.values()):
            tensors |= {f"optimizer.{what}.{name_of[id(key)]}": tensor.numpy() for what, tensor in value.items()}
        else:
            raise InputError(f"{kind}: its state {key} is neither a number nor tensors, no checkpoint can hold it")
    return tensors, {"name": kind, "state": numbers}


def resume(path, net, optimizer):
    """Load a checkpoint into net and optimizer -> its metadata. Raises InputError where it doesn't fit."""
    tensors, kept, metadata = read(path)
    fill(path, net, tensors)
    if older := "optimizer_step" in metadata:  # it knew Adam only and kept the rows in the log
        metadata |= {"optimizer": {"name": "Adam", "state": {"step": metadata["optimizer_step"]}}, "rows": []}
    saved, kind = metadata.get("optimizer"), type(optimizer).__name__
    if isinstance(saved, dict) and saved.get("name") != kind:
        raise InputError(f"{path}: was trained with {saved.get('name')}, not with {kind}, so it can't go on here")
    own, state = dict(net.named_parameters()), {}
    try:
        for name, array in kept.items():
            _, what, owner = name.split(".", 2)
            state.setdefault(own[owner], {})[what] = as_ours(name, own[owner], array).to(own[owner].device)
        numbers = {key: type(number) for key, number in optimizer._state.items() if isinstance(key, str)}
        epoch, best, rows = (metadata[key] for key in ("epoch", "best", "rows"))
        sound = len({frozenset(one) for one in state.values()}) <= 1  # a parameter without gradients has none
        sound &= {key: type(number) for key, number in saved["state"].items()} == numbers
        sound &= all(0 <= number < 2**31 for number in saved["state"].values())
        sound &= type(epoch) is int and 0 < epoch < 2**31 and (older or rows[-1]["epoch"] == str(epoch - 1))
        sound &= all({*map(type, row.values())} == {str} and float(row["train_loss"]) >= 0 for row in rows)
        if best is not None:
            sound &= "by" in best and math.isfinite(best["loss"])
            sound &= 0 <= best["threshold"] <= 1 and 0 <= best.get("grow", 0) <= 1
    except SENSELESS:
        sound = False
    if not sound:
        raise InputError(f"{path}: its epoch, best, rows or what its optimizer kept make no sense")
    optimizer._state |= state | saved["state"]
    return metadata
