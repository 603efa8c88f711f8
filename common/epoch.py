"""What the training scripts call around their loops: device, seeds, data sets, and an epoch's batches and end."""

import os
import time
from pathlib import Path

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
import cpu_kernels
from common import checkpoint, scores, start
from common.arguments import DATA, MIN_CROP, RESUMED, InputError
from common.device import pick
from common.files import check_output, lock, make_folder
from common.log import row_of, table_path, write_log
from unet import MIN_SIDE

import numpy as np
import oneflow as flow
from oneflow.optim.lr_scheduler import ConstantLR, CosineAnnealingLR
from tqdm import tqdm


def pick_device(args, graph=False):
    """ "cpu" or "cuda", as the arguments ask and the machine allows, which is said. Raises InputError.

    graph: whether the script trains by a static graph.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > start.processes:
        raise InputError("this script trains in one process: launch ddp_train.py in several")
    device = pick(args.device)
    amp = mixed_precision(args, device, graph)
    if args.amp == "on" and not amp:
        needs = "a GPU in graph_train.py" if graph or device == "cuda" else "cpu_kernels and a CPU with bfloat16"
        raise InputError(f"--amp on: mixed precision needs {needs}, leave it out")
    if start.rank == 0:
        several = f", {start.processes} processes" if start.processes > 1 else ""
        print(f"device: {device}{several}, {'mixed' if amp else 'single'} precision")
    return device


def mixed_precision(args, device, graph=False):
    """Whether a run computes in mixed precision: on a GPU a graph that is asked to, on a CPU where it has bfloat16."""
    if graph or device == "cuda":
        return graph and device == "cuda" and args.amp == "on"
    has_bfloat16 = getattr(cpu_kernels, "has_bfloat16", lambda: False)
    return args.amp != "off" and args.cpu_kernels == "auto" and has_bfloat16()


def seed_everything(seed, epoch=0):
    """Seed all that is random from (seed, epoch), so that an epoch repeats whatever ran before it."""
    number = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    flow.manual_seed(number + start.rank)  # dropout; a rank's own, since each has other slices
    np.random.seed(number)  # OneFlow's RandomSampler draws from NumPy


def data_sets(SelfDataSet, args):
    """(training set, validation set or None) as the arguments ask.

    Raises InputError, also where the processes don't have the same slices.
    """
    if args.data_path == DATA and not Path(DATA).exists():
        raise InputError(f"no {DATA} here: python3 data/prepare.py isbi (or sample) makes it")
    options = {name: getattr(args, name) for name in ("augment", "crop", "repeat", "border_weight", "seed")}
    kept = slice(None, -args.val_count or None)
    train_set, val_set = SelfDataSet(args.data_path, args.label_path, keep=kept, **options), None
    if not train_set.pairs:
        raise InputError(f"--val_count {args.val_count}: leaves no slice to train on")
    if args.val_path:
        val_set = SelfDataSet(args.val_path, args.val_label_path)
    elif args.val_count:
        val_set = SelfDataSet(args.data_path, args.label_path, keep=slice(-args.val_count, None))
    for data_set in filter(None, (train_set, val_set)):
        for name, shape in zip(data_set.names, data_set.shapes, strict=True):
            if min(shape) < MIN_SIDE or (data_set is train_set and max(shape) < MIN_CROP):
                raise InputError(f"slice {name}: {shape} pixels are too few for the net")
    sides = {side for shape in train_set.shapes for side in shape}
    if args.crop is None:
        side = min(256, *sides) // 16 * 16
        train_set.crop = side if side >= MIN_CROP else 0
    if args.batch_size > 1 and not train_set.crop and len(set(train_set.shapes)) > 1:
        raise InputError(
            f"{args.data_path}: slices of several sizes can't share a batch, pass --batch_size 1 or --crop N"
        )
    start.got_further()
    mine = int(digest_of(train_set, val_set), 16) % 0x7FFFFFFF  # small enough for exact sums in float64
    if sum_over_ranks(mine) != [start.processes * mine]:
        raise InputError(f"{args.data_path}: this process has other slices than another one")
    if start.rank == 0:
        if is_synthetic(args):
            print("The slices are a SYNTHETIC SAMPLE: scores on it mean NOTHING for real tissue.")
        counts = (len(data_set.pairs) if data_set else 0 for data_set in (train_set, val_set))
        print("{} training slices, {} validation slices".format(*counts))
    return train_set, val_set


def digest_of(*sets):
    """16 hexadecimal digits that tell one choice of slices from another."""
    return "".join(data_set.digest[:8] for data_set in sets if data_set)


def is_synthetic(args):
    """Whether the slices are those of data/sample.py: data/prepare.py writes their source beside them."""
    source = Path(args.data_path).parent / "source.txt"
    return source.is_file() and "synthetic" in source.read_text(errors="replace")


def sum_over_ranks(*values):
    """The sums of the numbers over all processes, as floats."""
    total = flow.tensor(values, dtype=flow.float64)
    if start.processes > 1:
        flow.comm.all_reduce(total)
    return [float(value) for value in total.numpy()]


class Run:
    """A training from its first epoch, or the one after args.resume's last, to args.epochs.

    Locks the log and the folder of checkpoints, and makes sure that this net and optimizer can be saved, before
    anything is computed. `first_epoch` is the epoch to begin with. Raises InputError.
    """

    def __init__(self, net, optimizer, device, args, train_set, val_set, graph=False):
        self.net, self.optimizer, self.device, self.args = net, optimizer, device, args
        self.train_set, self.val_set = train_set, val_set
        self.found = {"device": device, "processes": start.processes, "base_channels": net.base_channels}
        self.found |= {"crop": train_set.crop, "slices": digest_of(train_set, val_set)}
        self.found |= {"amp": mixed_precision(args, device, graph), "dropout": net.dropout}
        self.first_epoch, self.best, self.rows, self.improved = 1, None, [], False
        checkpoint.contents(net, optimizer)
        if args.resume:
            self.resume(checkpoint.resume(args.resume, net, optimizer))
        self.last = Path(args.checkpoint_dir) / "last.safetensors"
        if start.rank == 0:
            log = Path(args.log_file)
            check_output(log)
            table = table_path(log)
            if log == table:
                raise InputError(f"--log_file {log}: the .csv is written beside it, name a .txt")
            check_output(table)
            make_folder(self.last.parent)
            for path in (log, table, self.last.parent):
                lock(path)
            if self.last.exists() and not args.resume:
                print(f"starts over: replaces {self.last}, best.safetensors and {log} after the first epoch")
            if self.first_epoch > args.epochs:
                write_log(log, self.rows)

    def resume(self, metadata):
        """Take over where the checkpoint's run was, and say what is not as it was there."""
        path, args = self.args.resume, self.args
        self.first_epoch, self.best, self.rows = (metadata[key] for key in ("epoch", "best", "rows"))
        saved, mine = metadata["arguments"] | metadata["found"], vars(args) | self.found
        start.keep(f"nothing new was finished, {path} is as it was")
        if start.rank:
            return
        for name in dict.fromkeys(("slices", "processes", *RESUMED, "augment")):
            if name in saved and saved[name] != mine[name]:
                change = "other slices" if name == "slices" else f"{name} {saved[name]} -> {mine[name]}"
                print(f"not as {path} was trained: {change}")
        if self.first_epoch > args.epochs:
            print(f"nothing to do: {path} has {self.first_epoch - 1} epochs, a larger --epochs goes on")
        else:
            print(f"resuming {path} at epoch {self.first_epoch}")

    def schedule(self, steps):
        """The schedule of the learning rate, to be stepped after each of an epoch's `steps`.

        A cosine ends at the last of args.epochs, so a run that is resumed with more of them than it was started with
        jumps to the longer cosine.
        """
        if self.args.schedule == "cosine":
            schedule = CosineAnnealingLR(self.optimizer, self.args.epochs * steps)
        else:
            schedule = ConstantLR(self.optimizer, factor=1, total_iters=0)
        schedule.last_step = (self.first_epoch - 1) * steps - 1  # all its state: nothing to save
        schedule.step()
        return schedule

    def batches(self, loader, epoch):
        """The loader's batches as (image, label, weight), float32 (N, 1, H, W) on the device; weights 1 if unused.

        Each is to be followed by count(). Seeds the epoch before them; after them, all ranks hold one net.
        """
        seed_everything(self.args.seed, epoch)
        self.train_set.epoch, self.epoch, self.began, self.place = epoch, epoch, time.monotonic(), start.rank
        self.loss_sum, self.samples, self.steps, self.further = 0.0, 0, 0, {}
        self.net.train()
        # disable=None: no bar where stderr is a file
        hidden = True if start.rank else None
        with tqdm(total=len(loader), desc=f"epoch {epoch}", leave=False, disable=hidden) as self.bar:
            for image, label, *weight in loader:
                weight = weight[0] if weight else flow.ones_like(label)
                yield image.to(self.device), label.to(self.device), weight.to(self.device)
                self.bar.update()
        for parameter in self.net.parameters():
            parameter.numpy()  # waits for the last step, which OneFlow may not have finished
        if start.processes > 1:
            # Running statistics are each rank's own until the next forward fetches rank 0's: fetch them now.
            for buffer in self.net.buffers():
                flow.comm.broadcast(buffer, 0)
        sums = sum_over_ranks(self.loss_sum, self.samples, self.steps, *self.further.values())
        self.loss_sum, self.samples, self.steps = sums[:3]
        self.further = {name: value / self.steps for name, value in zip(self.further, sums[3:], strict=True)}
        self.seconds = time.monotonic() - self.began

    def count(self, losses, **further):
        """Count a step: losses, of each slice before it, a tensor (N,); further: numbers, averaged into the table.

        Raises FloatingPointError for a loss that is not finite: the net is spoilt then, what is on the disk is not.
        """
        losses = losses.numpy()
        start.got_further()
        if not np.isfinite(losses).all():
            raise FloatingPointError(
                f"the loss became {losses.mean()} in epoch {self.epoch}: try a smaller --lr; {start.kept}"
            )
        for loss in losses.tolist():
            # DistributedSampler deals the slices out like cards, and fills the last round up with slices that were
            # dealt already: they don't count again.
            if self.place < len(self.train_set):
                self.loss_sum += loss
                self.samples += 1
            self.place += start.processes
        self.steps += 1
        for name, value in further.items():
            self.further[name] = self.further.get(name, 0.0) + float(value)
        self.bar.set_postfix(loss=f"{losses.mean():.4f}", refresh=False)

    def validate(self, criterion):
        """Scores of the validation slices; {} without slices, None in an epoch that leaves it out.

        Means over the slices: "val_loss", without weights; "val_misclassification", the share of pixels on the wrong
        side of P(interior) = 0.5; "val_v_rand" and "val_v_info" (see scores.py), each at its best threshold;
        "val_threshold", that of V_Rand. The ranks share the slices out between them.
        """
        if self.val_set is None:
            return {}
        if self.epoch % self.args.val_every and self.epoch not in (1, self.args.epochs):
            return None
        self.net.eval()
        thresholds = scores.THRESHOLDS[1:-1]
        pixels, cells = np.zeros(2), np.zeros((2, len(thresholds)))
        with flow.no_grad():
            for index in range(start.rank, len(self.val_set), start.processes):
                image, label = (flow.tensor(a[None]).to(self.device) for a in self.val_set[index])
                logits = self.net.forward(image)  # net(image) would wait for ranks that have no slice left
                probability, interior = flow.sigmoid(logits).numpy()[0, 0], label.numpy()[0, 0] > 0.5
                wrong = np.mean((logits.numpy()[0, 0] > 0) != interior)
                pixels += criterion(logits, label).mean().item(), wrong
                found = scores.evaluate([probability], [interior], thresholds)
                start.got_further()
                cells += found["v_rand"], found["v_info"]
        loss, wrong, *sums = np.array(sum_over_ranks(*pixels, *cells.ravel())) / len(self.val_set)
        found = dict(zip(("v_rand", "v_info"), np.reshape(sums, cells.shape), strict=True))
        v_rand, threshold = scores.best(found, "v_rand", thresholds)
        found = {"val_v_rand": v_rand, "val_v_info": scores.best(found, "v_info", thresholds)[0]}
        return {"val_loss": float(loss), "val_misclassification": float(wrong), **found, "val_threshold": threshold}

    def finish(self, val_scores):
        """Write the epoch's checkpoints, then its log, and print its line; val_scores: what validate() returned.

        `best` becomes {"epoch", "loss", "by", "threshold"} of the best epoch: "loss" is what --best_by asks for,
        1 - V_Rand for v_rand; "threshold" parts cells best there, 0.5 without validation.
        Raises FloatingPointError where the epoch has spoilt the net, before anything is written.
        """
        train_loss, found = self.loss_sum / self.samples, val_scores or {}
        values = (*found.values(), *(tensor.numpy() for tensor in self.net.state_dict().values()))
        if not all(np.isfinite(value).all() for value in values):
            what = f"weights or validation are no longer finite after epoch {self.epoch}"
            raise FloatingPointError(f"{what}: try a smaller --lr; {start.kept}")
        by, loss = ("val_loss", found["val_loss"]) if found else ("train_loss", train_loss)
        if found and self.args.best_by == "v_rand":
            by, loss = "val_v_rand", 1 - found["val_v_rand"]
        improved = self.best is None or self.best["by"] != by or loss < self.best["loss"]
        improved &= val_scores is not None
        if improved:
            threshold = found.get("val_threshold", 0.5)
            self.best = {"epoch": self.epoch, "loss": loss, "by": by, "threshold": threshold}
        if start.rank:
            return
        lr, further = self.optimizer.param_groups[0]["lr"], {**found, **self.further}
        self.rows.append(row_of(self.epoch, train_loss, self.samples, self.seconds, lr, further))
        if improved:
            self.save(self.last.with_name("best.safetensors"))
        self.save(self.last)
        start.keep(f"epoch {self.epoch} is in {self.last}, go on with --resume {self.last}")
        write_log(self.args.log_file, self.rows)
        line = f"epoch: {self.epoch} avg loss: {train_loss:.6f} time: {self.seconds:.0f} s"
        line += "".join(f" {name.replace('_', ' ')}: {value:.4f}" for name, value in further.items())
        print(line + f" (best {by.replace('_', ' ')})" * improved, flush=True)

    def save(self, path):
        """Write a checkpoint: the net, the optimizer and what else resuming and predicting need."""
        tensors, optimizer = checkpoint.contents(self.net, self.optimizer)
        model = {name: getattr(self.net, name) for name in ("n_channels", "n_classes", "bilinear", "base_channels")}
        metadata = {
            "epoch": self.epoch + 1,  # the next one to run
            "best": self.best,
            "rows": self.rows,
            "model": model,
            "normalisation": "each slice to mean 0 and standard deviation 1",
            "threshold": (self.best or {}).get("threshold", 0.5),
            "amp": self.found["amp"],
            "synthetic": is_synthetic(self.args),
            "optimizer": optimizer,
            "arguments": vars(self.args),
            "found": self.found,
            "versions": {"oneflow": flow.__version__, "numpy": np.__version__},
        }
        checkpoint.write(path, tensors, metadata)
