"""Train a U-Net data parallel, one process a device: GPUs where there are some, else the CPU.

    python3 -m oneflow.distributed.launch --nproc_per_node 8 ./ddp_train.py
    python3 -m oneflow.distributed.launch --nproc_per_node 2 ./ddp_train.py --device cpu --crop 256

Every process takes its share of the slices; the gradients are averaged at each step, so that all
keep the same weights. `diff TrainUnetDataSet.py ddp_train.py` shows all that this takes.

Ctrl-C ends the launcher with 1 and the processes with it, often before they can say what is kept:
checkpoints/last.safetensors holds the last finished epoch, --resume goes on from it.
"""

import engine
from cpu_kernels import accelerate
from unet import UNet

from oneflow import nn, optim
from oneflow.nn.parallel import DistributedDataParallel as ddp
from oneflow.utils.data import DataLoader
from oneflow.utils.data.distributed import DistributedSampler


def Train_Unet(args):
    train_set, val_set = engine.data_sets(args)
    device = engine.start(args)

    net = UNet(1, 1, args.bilinear, args.base_channels, args.dropout).to(device)
    if args.cpu_kernels == "auto":
        accelerate(net)  # on a CPU; does nothing on a GPU
    net = ddp(net)
    optimizer = optim.Adam(net.parameters(), lr=args.lr)
    criterion = nn.BCEWithLogitsLoss(reduction="none")  # on logits: the net has no sigmoid
    first_epoch, best = engine.resume(args, net, optimizer)
    engine.start_log(args, first_epoch)

    sampler = DistributedSampler(train_set, seed=args.seed)
    workers = args.num_workers
    loader = DataLoader(train_set, args.batch_size, sampler=sampler, num_workers=workers)
    schedule = engine.learning_rate_schedule(args, optimizer, len(loader), first_epoch)

    def step(image, label, weight):
        losses = (criterion(net(image), label) * weight).mean((1, 2, 3))  # of each slice
        losses.mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return losses

    for epoch in range(first_epoch, args.epochs + 1):
        sampler.set_epoch(epoch)
        engine.seed_epoch(args.seed, epoch)
        train_set.epoch = epoch
        trained = engine.train_one_epoch(net, loader, step, device, epoch)
        scores = engine.validate(args, net, val_set, criterion, device, epoch)
        best = engine.finish_epoch(args, net, optimizer, epoch, best, trained, scores)


if __name__ == "__main__":
    engine.run(lambda: Train_Unet(engine.parse_args(__doc__)))
