"""Train a U-Net on one device: a GPU where there is one, else the CPU.

    python3 TrainUnetDataSet.py
    python3 TrainUnetDataSet.py --resume checkpoints/last.safetensors --epochs 200

`diff TrainUnetDataSet.py ddp_train.py` shows what data parallel training takes.
"""

from common import arguments, begin, start
from common.epoch import Run
from cpu_kernels import accelerate
from dataloader import AUGMENTATIONS, SelfDataSet
from unet import UNet

from oneflow import nn, optim
from oneflow.utils.data import DataLoader, RandomSampler


def Train_Unet(net, device, args):
    train_set, val_set = begin.data_sets(SelfDataSet, args)
    sampler = RandomSampler(train_set)
    loader = DataLoader(train_set, args.batch_size, sampler=sampler, num_workers=args.num_workers)
    optimizer = optim.Adam(net.parameters(), lr=args.lr)
    criterion = nn.BCEWithLogitsLoss(reduction="none")  # on logits: the net has no sigmoid
    run = Run(net, optimizer, device, args, train_set, val_set)  # goes on from --resume
    schedule = run.schedule(len(loader))

    for epoch in range(run.first_epoch, args.epochs + 1):
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
    Train_Unet(net, device, args)


if __name__ == "__main__":
    start.run(lambda: main(arguments.parse_args(__doc__, AUGMENTATIONS)))
