"""Train a U-Net data parallel, one process a device: GPUs where there are some, else the CPU.

    python3 -m oneflow.distributed.launch --nproc_per_node 8 ./ddp_train.py

Each process takes its share of the slices; the gradients are averaged, so that all keep the same weights.
"""

import common.ranks  # noqa: F401  the processes find each other
from common import arguments, begin, start
from common.epoch import Run
from cpu_kernels import accelerate
from dataloader import AUGMENTATIONS, SelfDataSet
from unet import UNet

from oneflow import nn, optim
from oneflow.utils.data import DataLoader, distributed


def Train_Unet(net, device, args):
    train_set, val_set = begin.data_sets(SelfDataSet, args)
    sampler = distributed.DistributedSampler(train_set, seed=args.seed)
    loader = DataLoader(train_set, args.batch_size, sampler=sampler, num_workers=args.num_workers)
    optimizer = optim.Adam(net.parameters(), lr=args.lr)
    criterion = nn.BCEWithLogitsLoss(reduction="none")  # on logits: the net has no sigmoid
    run = Run(net, optimizer, device, args, train_set, val_set)  # goes on from --resume
    schedule = run.schedule(len(loader))

    for epoch in range(run.first_epoch, args.epochs + 1):
        sampler.set_epoch(epoch)
        for image, label, weight in run.batches(loader, epoch):
            losses = (criterion(net(image), label) * weight).mean((1, 2, 3))  # of each slice
            losses.mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.count(losses)
        run.finish(run.validate(criterion))


def main(args):
    device = begin.pick_device(args)
    begin.seed_everything(args.seed)
    net = UNet(1, 1, args.bilinear, args.base_channels or arguments.WIDTH[device], args.dropout).to(device)
    if args.cpu_kernels == "auto":
        accelerate(net, begin.mixed_precision(args, device))  # on a CPU; does nothing on a GPU
    Train_Unet(nn.parallel.DistributedDataParallel(net), device, args)


if __name__ == "__main__":
    start.run(lambda: main(arguments.parse_args(__doc__, AUGMENTATIONS)))
