"""An epoch of training: its batches, validation, and what is written at its end."""

import sys
import time
from pathlib import Path

from common import checkpoint, scores, start
from common.arguments import RESUMED
from common.begin import is_synthetic, mixed_precision, seed_everything, sum_over_ranks
from common.files import check_output, lock, make_folder
from common.log import write_log

import numpy as np
import oneflow as flow
from oneflow.optim.lr_scheduler import ConstantLR, CosineAnnealingLR
from tqdm import tqdm


class Run:
    """A training to args.epochs, from `first_epoch`, where args.resume has got to. Locks what it writes, and makes sure
    that net and optimizer can be saved, before anything is computed. Raises InputError."""

    def __init__(self, net, optimizer, device, args, train_set, val_set, graph=False):
        self.net, self.optimizer, self.device, self.args = net, optimizer, device, args
        self.train_set, self.val_set = train_set, val_set
        self.amp = mixed_precision(args, device, graph=graph)
        found = {"base_channels": net.base_channels, "crop": train_set.crop, "dropout": net.dropout.p, "device": device}
        slices = "".join(data_set.digest[:8] for data_set in (train_set, val_set) if data_set)
        self.arguments = vars(args) | found | {"processes": start.processes, "slices": slices}
        self.first_epoch, self.best, self.rows = 1, None, []
        # What find_mask() needs, until validation finds better ones: docs/recipe.md says what border weights want.
        self.mask = {"threshold": 0.6, "grow": 0.2} if args.border_weight >= 10 else {"threshold": 0.5, "grow": 0.5}
        self.last = Path(args.checkpoint_dir, "last.safetensors")
        checkpoint.contents(net, optimizer)
        if args.resume:
            metadata = checkpoint.resume(args.resume, net, optimizer)
            self.first_epoch, self.best, self.rows = (metadata[key] for key in ("epoch", "best", "rows"))
            start.keep(f"nothing new was finished, {args.resume} is as it was")
            print(f"resuming {args.resume}: has {self.first_epoch - 1} of {args.epochs} epochs, more with --epochs N")
            for name in ("slices", "processes", *RESUMED, "augment"):
                was, now = metadata["arguments"].get(name), self.arguments[name]
                if was not in (None, now):  # older checkpoints don't say all
                    print(f"not as {args.resume} was trained: {name} {was} -> {now}")
        elif args.init:
            tensors, _, metadata = checkpoint.read(args.init)
            checkpoint.fill(args.init, net, tensors)
            if metadata["further"]:
                print(f"{args.init}: has {1 + len(metadata['further'])} nets, training begins with the first")
        if start.rank == 0:
            check_output(args.log_file)
            check_output(Path(args.log_file).with_suffix(".csv"))
            make_folder(self.last.parent)
            lock(self.last.parent)
            if self.last.exists() and not args.resume:
                print(f"starts over: replaces {self.last}, best.safetensors and {args.log_file} after the first epoch")
            if self.first_epoch > args.epochs:
                write_log(args.log_file, self.rows)

    def schedule(self, steps):
        """The schedule of the learning rate, to be stepped after each of an epoch's steps; a cosine to args.epochs."""
        cosine, total = self.args.schedule == "cosine", self.args.epochs * steps
        schedule = CosineAnnealingLR(self.optimizer, total) if cosine else ConstantLR(self.optimizer, 1, 0)
        schedule.last_step = (self.first_epoch - 1) * steps - 1  # all its state: nothing to save
        schedule.step()
        return schedule

    def batches(self, loader, epoch):
        """The loader's batches as (image, label, weight), float32 (N, 1, H, W) on the device; weights 1 if unused;
        after each comes count(). Seeds the epoch before them; after them, all ranks hold one net."""
        seed_everything(self.args.seed, epoch)
        self.train_set.epoch, self.epoch, began = epoch, epoch, time.monotonic()
        self.place, self.sums = start.rank, {}
        self.net.train()
        with tqdm(loader, f"epoch {epoch}", leave=False, disable=True if start.rank else None) as self.bar:
            for image, label, *weight in self.bar:
                yield [tensor.to(self.device) for tensor in (image, label, *(weight or [flow.ones_like(label)]))]
        for parameter in self.net.parameters():
            parameter.numpy()  # waits for the last step, which OneFlow may not have finished
        for buffer in self.net.buffers() if start.processes > 1 else ():
            flow.comm.broadcast(buffer, 0)  # each rank's own until the next forward fetches rank 0's
        loss, self.samples, steps, *further = sum_over_ranks(*self.sums.values())
        self.train_loss, self.seconds = loss / self.samples, time.monotonic() - began
        self.further = {name: value / steps for name, value in zip(list(self.sums)[3:], further, strict=True)}

    def count(self, losses, **further):
        """Count a step: losses, of each slice before it, a tensor (N,); further: numbers, averaged into the table."""
        losses = losses.numpy()
        start.got_further()
        # DistributedSampler fills its last round up with slices that were dealt already: they don't count again.
        new = self.place + start.processes * np.arange(len(losses)) < len(self.train_set)
        self.place += start.processes * len(losses)
        for name, value in {"loss": losses[new].sum(), "samples": new.sum(), "steps": 1, **further}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.bar.set_postfix(loss=f"{losses.mean():.4f}", refresh=False)

    def validate(self, criterion):
        """The validation slices' scores; {} in an epoch without. val_loss is without weights, val_misclassification at
        P(interior) > 0.5, val_v_rand and val_v_info at the best threshold of each: val_threshold is V_Rand's."""
        if self.val_set is None or (self.epoch % self.args.val_every and self.epoch not in (1, self.args.epochs)):
            return {}
        self.net.eval()
        thresholds = scores.THRESHOLDS[1:-1]
        loss, counts = 0.0, np.zeros((len(self.val_set), len(thresholds), 9))
        with flow.no_grad():
            for index in range(start.rank, len(self.val_set), start.processes):  # shared out between the ranks
                image, label = (flow.tensor(a[None]).to(self.device) for a in self.val_set[index])
                logits = self.net.forward(image)  # net(image) would wait for ranks that have no slice left
                loss += criterion(logits, label).mean().item()
                counts[index] = scores.count(logits.sigmoid().numpy()[0, 0], label.numpy()[0, 0] > 0.5, thresholds)
                start.got_further()
        loss, *sums = sum_over_ranks(loss, *counts.ravel())
        found = scores.combine(np.reshape(sums, counts.shape))
        names = "v_rand", "v_info", "pixel_misclassification"
        (v_rand, threshold), (v_info, _), (_, grow) = (scores.best(found, name, thresholds) for name in names)
        self.mask = {"threshold": threshold, "grow": min(threshold, grow)}
        wrong = found["pixel_misclassification"][len(thresholds) // 2]
        columns = {"val_loss": loss / len(self.val_set), "val_misclassification": wrong}
        return columns | {"val_v_rand": v_rand, "val_v_info": v_info, "val_threshold": threshold}

    def finish(self, val_scores):
        """Write checkpoints, then the log, and print the epoch's line; SystemExit if it has spoilt the net."""
        columns = {"train_loss": self.train_loss} | val_scores | self.further
        tensors, optimizer = checkpoint.contents(self.net, self.optimizer)
        if not all(np.isfinite(value).all() for value in (*columns.values(), *tensors.values())):
            sys.exit(f"epoch {self.epoch}: loss or weights overflow, try a smaller --lr; {start.kept}")
        by = "val_" + self.args.best_by if val_scores else "train_loss"
        loss = 1 - columns[by] if by == "val_v_rand" else columns[by]
        better = self.best is None or self.best["by"] != by or loss < self.best["loss"]
        if improved := better and (self.val_set is None or val_scores != {}):
            self.best = {"epoch": self.epoch, "loss": loss, "by": by, **self.mask}
        if start.rank:
            return
        row = {"epoch": str(self.epoch), "lr": f"{self.optimizer.param_groups[0]['lr']:.6g}"}  # lr: after the epoch
        row |= {"seconds": f"{self.seconds:.2f}", "images_per_second": f"{self.samples / self.seconds:.3f}"}
        self.rows.append(row | {name: f"{value:.6f}" for name, value in columns.items()})
        model = {name: getattr(self.net, name) for name in ("n_channels", "n_classes", "bilinear", "base_channels")}
        metadata = {"model": model, "optimizer": optimizer, "arguments": self.arguments, "amp": self.amp}
        metadata |= {"epoch": self.epoch + 1, "best": self.best, "rows": self.rows}  # epoch: the next one to run
        metadata |= {name: self.best[name] for name in self.mask}
        metadata |= {"pixel_size": self.args.pixel_size, "synthetic": is_synthetic(self.args.data_path)}
        metadata |= {
            "versions": {"oneflow": flow.__version__, "numpy": np.__version__},
            "normalisation": "mean 0, std 1",
        }
        for path in [self.last.with_name("best.safetensors")] * improved + [self.last]:
            checkpoint.write(path, tensors, metadata)
        start.keep(f"epoch {self.epoch} is in {self.last}, go on with --resume {self.last}")
        write_log(self.args.log_file, self.rows)
        line = f"epoch: {self.epoch} avg loss: {columns.pop('train_loss'):.6f} time: {self.seconds:.0f} s"
        line += "".join(f" {name.replace('_', ' ')}: {value:.4f}" for name, value in columns.items())
        print(line + f" (best {by.replace('_', ' ')})" * improved, flush=True)
