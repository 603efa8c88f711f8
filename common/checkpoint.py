"""Reading and writing checkpoints, and taking over the weights that others trained."""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path

from common.arguments import InputError
from common.files import write_whole
from common.images import print_once
from unet import UNet  # which brings OneFlow without its noise

import numpy as np
import oneflow as flow
import safetensors.numpy

THEIRS = dict.fromkeys((".pth", ".pt", ".ckpt"), "PyTorch's") | dict.fromkeys((".h5", ".hdf5", ".keras"), "Keras/HDF5")
FIRST, LAST = "inc.double_conv.0.weight", "outc.conv.weight"
BIASES = ("double_conv.0.bias", "double_conv.3.bias")
SENSELESS = (LookupError, TypeError, ValueError, AttributeError, OverflowError)  # what odd JSON raises when it is used


def write(path, tensors, metadata):
    """Write a safetensors file whole, with a checksum. tensors: {name: array}; metadata: {key: JSON value}."""
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts["checksum"] = checksum(tensors, texts)
    with write_whole(path) as file:
        file.write(safetensors.numpy.save(tensors, texts))


def checksum(tensors, texts):
    """SHA-256 as JSON of all that a checkpoint holds; texts: its metadata, {key: string}."""
    digest = hashlib.sha256("".join(f"{key}={texts[key]}\n" for key in sorted(texts)).encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return json.dumps(digest.hexdigest())


def read(path, trust_pickle=False):
    """Read a checkpoint -> (its net, {name: array} under our names; its optimizer's arrays; metadata), or InputError.
    Runs no code but, with `trust_pickle`, that of a flow.save folder. metadata["further"]: {number: further net}."""
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
        expected = texts.pop("checksum", None)
        metadata = {key: json.loads(text) for key, text in texts.items()} if expected else {}  # others' is no JSON
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; train one first, with bash train.sh") from None
    except Exception as error:  # whatever unpickling or odd JSON brings up
        raise InputError(f"{path}: not a whole checkpoint ({error!r})") from None
    if (expected or {"model", "arguments", "threshold"} & texts.keys()) and expected != checksum(tensors, texts):
        raise InputError(f"{path}: is damaged, what it holds doesn't match its checksum")
    optimizer = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")}
    metadata["further"] = {}
    for name in filter(re.compile(r"further\.\d+\.").match, list(tensors)):
        _, number, own = name.split(".", 2)
        metadata["further"].setdefault(number, {})[own] = tensors.pop(name)
    return (tensors if "model" in metadata else named_as_ours(path, tensors)), optimizer, metadata


def load_net(path, trust_pickle=False):
    """A checkpoint's or others' net on the CPU -> (net, or a list of a file's several, metadata). Raises InputError."""
    tensors, _, metadata = read(path, trust_pickle)
    every = (tensors, *metadata.pop("further").values())
    nets = [fill(path, UNet(*architecture(path, each)).eval(), each) for each in every]
    return nets if len(nets) > 1 else nets[0], metadata


def named_as_ours(path, tensors):
    """Others' weights of this network under our names; prints what was changed: names may have something in front
    (`module.`, `model.`), 3x3 convolutions no biases, batch normalisation no counts; further tensors are left out."""
    prefix = next((name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)), "")
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    zeros = {name: np.zeros_like(t.numpy()) for name, t in UNet(*architecture(path, found)).state_dict().items()}
    left = ", ".join(sorted(name for name in tensors if name.removeprefix(prefix) not in zeros)[:5])
    bare = not any(name.endswith(BIASES) for name in found)
    changes = {f"names without {prefix}": prefix, f"left out {left}": left, "its 3x3 convolutions have no biases": bare}
    if said := "; ".join(text for text, so in changes.items() if so):
        print_once(f"{path}: weights that others trained: {said}")
    known = [name for name in zeros if name in found or name.endswith(("num_batches_tracked", *BIASES * bare))]
    return {name: found.get(name, zeros[name]) for name in known}


def architecture(path, tensors):
    """What UNet() is to be called with for a net's tensors. Raises InputError for none, or one the file can't hold."""
    with suppress(KeyError, IndexError, ValueError):
        (base_channels, n_channels, *_), n_classes = tensors[FIRST].shape, tensors[LAST].shape[0]
        least = base_channels * (9 * n_channels + n_classes + 576 * base_channels)
        if n_channels * n_classes > 0 and 0 < least <= sum(tensor.size for tensor in tensors.values()):
            return n_channels, n_classes, "up1.up.weight" not in tensors, base_channels
    raise InputError(f"{path}: doesn't hold a U-Net's weights")


def fill(path, net, tensors):
    """Load a net's tensors into the net, which is returned. Raises InputError where they don't fit."""
    own = net.state_dict()
    try:
        net.load_state_dict({name: as_ours(name, own[name], tensors[name]) for name in own | tensors})
    except SENSELESS as error:
        size = f"{net.base_channels} base channels{', bilinear' * net.bilinear}"
        wrong = f"{error} is missing, unknown, of another shape or type, or not finite"
        raise InputError(f"{path}: doesn't hold this U-Net of {size}: {wrong}") from None
    return net


def as_ours(name, ours, array):
    """An array as a tensor in the place of ours. Raises ValueError for another shape or kind, or what is not finite."""
    fits = array.shape == tuple(ours.shape) and array.dtype.kind == ours.numpy().dtype.kind
    if not fits or not (np.abs(array) < 1e30).all() or ("running_var" in name and array.min() < 0):
        raise ValueError(name)
    return flow.tensor(array, dtype=ours.dtype, device=ours.device)  # copies it, as from_numpy() doesn't


def contents(net, optimizer):
    """What a run goes on from -> ({name: array}, the optimizer's metadata). Raises InputError for what fits nowhere."""
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
    saved, kind = metadata.get("optimizer"), type(optimizer).__name__
    if isinstance(saved, dict) and saved.get("name") != kind:
        raise InputError(f"{path}: was trained with {saved.get('name')}, not with {kind}, so it can't go on here")
    own = dict(net.named_parameters())
    try:
        kinds, owners = ({name.split(".", 2)[place] for name in kept} for place in (1, 2))
        state = {own[o]: {k: as_ours(k, own[o], kept[f"optimizer.{k}.{o}"]) for k in kinds} for o in owners}
        numbers = {key: saved["state"][key] for key in optimizer._state if isinstance(key, str)}
        epoch, best, rows = (metadata[key] for key in ("epoch", "best", "rows"))
        sound = all(type(n) is type(optimizer._state[key]) and 0 <= n < 2**31 for key, n in numbers.items())
        sound &= type(epoch) is int and 0 < epoch < 2**31 and rows[-1]["epoch"] == str(epoch - 1)
        sound &= all({*map(type, row.values())} == {str} and abs(float(row["train_loss"])) < 1e30 for row in rows)
        sound &= "by" in best and abs(best["loss"]) < 1e30 and 0 <= best["threshold"] <= 1 and 0 <= best["grow"] <= 1
        if not sound:
            raise ValueError
    except SENSELESS:
        raise InputError(f"{path}: its epoch, best, rows or optimizer make no sense, try --init with it") from None
    optimizer._state |= state | numbers
    return metadata
