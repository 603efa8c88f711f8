"""Reading and writing checkpoints, and taking over the weights that others trained.

`net, metadata = load_net("checkpoints/best.safetensors")` gives a trained net.
"""

import hashlib
import json
import math
from contextlib import suppress
from pathlib import Path

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common.arguments import InputError
from common.files import write_whole
from common.log import are_rows
from unet import UNet

import numpy as np
import oneflow as flow
import safetensors
import safetensors.numpy

WEIGHTS_ONLY = "holds weights only, too little to go on from; --init begins a training with them"
CONVERT = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'NEW.safetensors')"
FIRST, LAST = "inc.double_conv.0.weight", "outc.conv.weight"


def write(path, tensors, metadata):
    """Write a safetensors file whole, with a checksum. tensors: {name: array}; metadata: {key: JSON value}."""
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts["checksum"] = json.dumps(checksum(tensors, texts))
    with write_whole(path) as file:
        file.write(safetensors.numpy.save(tensors, texts))


def checksum(tensors, texts):
    """SHA-256, in hex, of all that a checkpoint holds; texts: its metadata, {key: string}."""
    digest = hashlib.sha256()
    for key in sorted(texts):
        digest.update(f"{key}={texts[key]}\n".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name]))
    return digest.hexdigest()


def read(path, trust_pickle=False):
    """Read a checkpoint -> (net's tensors, optimizer's tensors, metadata); runs no code from it.

    The tensors are {name: array}, the metadata a dict, empty for a file of bare weights. A checksum, where there is
    one, is checked. A folder written by `flow.save` is unpickled, which runs whatever code it holds, so that needs
    `trust_pickle`. Raises InputError.
    """
    path = Path(path)
    if path.is_dir() and not trust_pickle:
        raise InputError(
            f"{path}: a folder of flow.save runs code when it is loaded: predict with it and --trust_pickle"
        )
    if path.is_dir():
        try:
            return {name: tensor.numpy() for name, tensor in flow.load(str(path)).items()}, {}, {}
        except Exception as error:  # whatever unpickling brings up
            raise InputError(f"{path}: not a state dict of flow.save ({error!r})") from None
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train one first, with bash train.sh")
    if path.suffix in (".pth", ".pt", ".ckpt"):
        raise InputError(f"{path}: is PyTorch's, convert it with torch: {CONVERT}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            texts = file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    expected = texts.pop("checksum", None)
    ours = not {"model", "arguments", "threshold"}.isdisjoint(texts)
    if (ours or expected) and expected != json.dumps(checksum(tensors, texts)):
        raise InputError(f"{path}: is damaged, what it holds doesn't match its checksum")
    metadata = {}
    for key, text in texts.items():
        with suppress(ValueError, RecursionError):  # others' metadata, such as PyTorch's format: pt, aren't JSON
            metadata[key] = json.loads(text)
    optimizer = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")}
    return tensors, optimizer, metadata


# ------------------------------------------------------------------------------------ the net


def load_net(path, trust_pickle=False):
    """The net of a checkpoint, of bare weights, or of a PyTorch U-Net's -> (net on the CPU, metadata dict).

    Says what it made of weights that others trained. Raises InputError.
    """
    tensors, metadata = read_net(path, trust_pickle)
    net = UNet(*architecture(path, tensors))
    fill(path, net, tensors)
    return net, metadata


def read_net(path, trust_pickle=False):
    """The net's tensors under our names, {name: array}, and the metadata."""
    tensors, _, metadata = read(path, trust_pickle)
    return (tensors if "model" in metadata else named_as_ours(path, tensors)), metadata


def named_as_ours(path, tensors):
    """Others' weights of this network under our names, {name: array}; prints what was changed.

    Taken are names with something in front (`module.` of DataParallel, `model.` of Lightning), 3x3 convolutions without
    biases, a batch normalisation that counted no batches, and further tensors, which are left out.
    """
    prefixes = {name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)}
    if len(prefixes) != 1:
        return tensors  # architecture() refuses it
    prefix = prefixes.pop()
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    said = [f"names without {prefix}"] if prefix else []
    own = UNet(*architecture(path, found)).state_dict()
    unused = sorted((set(tensors) - {prefix + name for name in found}) | (set(found) - set(own)))
    said += [f"left out {', '.join(unused[:5])}"] if unused else []
    biases = {name for name in own if name.endswith(("double_conv.0.bias", "double_conv.3.bias"))}
    if biases.isdisjoint(found):
        found |= {name: np.zeros(own[name].shape, np.float32) for name in biases}
        said.append("its 3x3 convolutions have no biases")
    counts = {name for name in own if name.endswith("num_batches_tracked")} - set(found)
    found |= {name: np.zeros((), np.int64) for name in counts}
    if said:
        print(f"{path}: weights that others trained: {'; '.join(said)}")
    return {name: found[name] for name in own if name in found}


def architecture(path, tensors):
    """What UNet() is to be called with for a net's tensors, told by their names and shapes.

    Raises InputError where that is no net, or one so much larger than the file that it can't be its: who asks for
    terabytes should have sent some.
    """
    try:
        base_channels, n_channels = tensors[FIRST].shape[:2]
        n_classes = tensors[LAST].shape[0]
        sizes = {FIRST: 9 * base_channels * n_channels, LAST: base_channels * n_classes}
        sizes["down4.maxpool_conv.1.double_conv.3.weight"] = 9 * (8 * base_channels) ** 2
        whole = all(tensors[name].size >= max(size, 1) for name, size in sizes.items())
    except (KeyError, IndexError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"{path}: doesn't hold a U-Net's weights")
    return n_channels, n_classes, "up1.up.weight" not in tensors, base_channels


def fill(path, net, tensors):
    """Load a checkpoint's net tensors into the net. Raises InputError where they don't fit."""
    own = net.state_dict()
    odd = set(own) ^ set(tensors) or {n for n in own if not alike(own[n], tensors[n])}
    odd = odd or {n for n in own if n.endswith("running_var") and tensors[n].min() < 0}
    if odd:
        what = "tensors missing, unknown, of another shape or type, or not finite, among them"
        raise InputError(f"{path}: doesn't hold this U-Net: {len(odd)} {what} {min(odd)}")
    # tensor(), not from_numpy(): the array's memory is not ours to keep
    net.load_state_dict({n: flow.tensor(tensors[n], dtype=own[n].dtype) for n in own})


def alike(own, tensor):
    """Whether an array can take the place of a tensor of ours: shape, kind of number, finite."""
    if tuple(own.shape) != tensor.shape:
        return False
    if not own.dtype.is_floating_point:
        return np.issubdtype(tensor.dtype, np.integer)
    # From beyond 1e30 nothing finite would come.
    return np.issubdtype(tensor.dtype, np.floating) and bool((np.abs(tensor) < 1e30).all())


# --------------------------------------------------------------------------------- resuming


def contents(net, optimizer):
    """What a run goes on from -> ({name: array}, the optimizer's metadata), whatever the optimizer keeps.

    A tensor that it keeps of a parameter is `optimizer.WHAT.PARAMETER`. Raises InputError where it keeps anything but
    such tensors and numbers.
    """
    tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    kind, numbers, names = type(optimizer).__name__, {}, list(parameters_of(net, optimizer))
    for key, value in optimizer.state_dict()["state"].items():
        if isinstance(key, str) and isinstance(value, int | float):
            numbers[key] = value
        elif isinstance(key, int) and all(isinstance(tensor, flow.Tensor) for tensor in value.values()):
            tensors |= {f"optimizer.{what}.{names[key]}": tensor.numpy() for what, tensor in value.items()}
        else:
            raise InputError(f"{kind}: its state {key} is neither a number nor tensors, no checkpoint can hold it")
    return tensors, {"name": kind, "state": numbers}


def parameters_of(net, optimizer):
    """{name: parameter} in the optimizer's order, which need not be the net's."""
    name_of = {id(parameter): name for name, parameter in net.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group.parameters]
    return {name_of.get(id(parameter), f"parameter{i}"): parameter for i, parameter in enumerate(parameters)}


def resume(path, net, optimizer):
    """Load a checkpoint into net and optimizer; returns its metadata.

    Raises InputError where it holds only weights, another net, another optimizer's state or what makes no sense.
    """
    tensors, kept, metadata = read(path)
    saved, kind = metadata.get("optimizer"), type(optimizer).__name__
    if not isinstance(saved, dict):
        raise InputError(f"{path}: {WEIGHTS_ONLY}")
    if saved.get("name") != kind:
        raise InputError(f"{path}: was trained with {saved.get('name')}, not with {kind}, so it can't go on here")
    fill(path, net, tensors)
    state, parameters = optimizer.state_dict(), parameters_of(net, optimizer)
    whats = {name.split(".")[1] for name in kept}
    expected = {f"optimizer.{what}.{name}": parameter for what in whats for name, parameter in parameters.items()}
    odd = {name for name in kept if name not in expected or not alike(expected[name], kept[name])}
    # A parameter without a gradient has nothing kept of it.
    begun = {name for name in parameters if any(f"optimizer.{what}.{name}" in kept for what in whats)}
    odd |= {f"optimizer.{what}.{name}" for what in whats for name in begun} - set(kept)
    if odd:
        raise InputError(f"{path}: what its optimizer kept is damaged, {min(odd)} for one")
    numbers = {key: value for key, value in state["state"].items() if isinstance(key, str)}
    if not makes_sense(metadata, saved.get("state"), numbers):
        raise InputError(f"{path}: its epoch, best, rows or optimizer make no sense")
    for index, (name, parameter) in enumerate(parameters.items()):
        if name in begun:
            arrays = {what: kept[f"optimizer.{what}.{name}"] for what in whats}
            state["state"][index] = {what: flow.tensor(a, dtype=parameter.dtype) for what, a in arrays.items()}
    optimizer.load_state_dict({**state, "state": state["state"] | saved["state"]})
    return metadata


def makes_sense(metadata, numbers, own):
    """Whether epoch, best, rows and an optimizer's numbers are what a run writes: a stranger may have written them.

    own: the numbers of an optimizer that has made no step.
    """
    epoch, best = metadata.get("epoch"), metadata.get("best")
    try:
        sound = type(epoch) is int and 0 < epoch < 2**31 and are_rows(metadata.get("rows"), epoch - 1)
        sound &= {key: type(number) for key, number in numbers.items()} == {key: type(own[key]) for key in own}
        sound &= all(0 <= number < 2**31 for number in numbers.values())
        if best is not None:
            sound &= isinstance(best["by"], str) and isinstance(best["epoch"], int)
            sound &= math.isfinite(best["loss"]) and 0 <= best["threshold"] <= 1
        return sound
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return False


def arguments_of(path, init=False):
    """The training arguments of a checkpoint, with what its run found out for those that were left open.

    init: only those of the net, which other weights have too. Raises InputError for a checkpoint without them.
    """
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder can't be trained further, only predicted with")
    tensors, metadata = read_net(path)
    saved, found = metadata.get("arguments"), metadata.get("found")
    *_, bilinear, base_channels = architecture(path, tensors)
    net = {"bilinear": bilinear, "base_channels": base_channels}
    if init:
        return net
    if not isinstance(saved, dict) or not isinstance(found, dict):
        raise InputError(f"{path}: {WEIGHTS_ONLY}")
    return saved | {name: found[name] for name in ("crop", "dropout") if name in found} | net
