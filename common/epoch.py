"""An epoch of training: its batches, validation, and what is written at its end."""

import time
from pathlib import Path

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common import checkpoint, scores, start
from common.arguments import RESUMED, InputError
from common.begin import digest_of, is_synthetic, mixed_precision, seed_everything, sum_over_ranks
from common.files import check_output, lock, make_folder
from common.log import row_of, table_path, write_log

import numpy as np
import oneflow as flow
from oneflow.optim.lr_scheduler import ConstantLR, CosineAnnealingLR
from tqdm import tqdm


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
        self.first_epoch, self.best, self.rows = 1, None, []
        checkpoint.contents(net, optimizer)
        if args.resume:
            self.resume(checkpoint.resume(args.resume, net, optimizer))
        elif args.init:
            checkpoint.fill(args.init, net, checkpoint.read_net(args.init)[0])
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
            # Running statistics are each rank's own until the next forward fetches rank 0's.
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
            what = f"the loss became {losses.mean()} in epoch {self.epoch}"
            raise FloatingPointError(f"{what}: try a smaller --lr; {start.kept}")
        for loss in losses.tolist():
            # DistributedSampler fills its last round up with slices that were dealt already: they don't count again.
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

        Means over the slices: val_loss, without weights; val_misclassification, the share of pixels on the wrong side
        of P(interior) = 0.5; val_v_rand and val_v_info, each at its best threshold; val_threshold, that of V_Rand.
        The ranks share the slices out between them.
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

        `best` is of the best epoch: "loss", by --best_by (1 - V_Rand for v_rand), and "threshold", which parts cells
        best there. Raises FloatingPointError where the epoch has spoilt the net, before anything is written.
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
