"""Train a U-Net on one device: a GPU where there is one, else the CPU.

    python3 TrainUnetDataSet.py
    python3 TrainUnetDataSet.py --data_path data/train_image --val_count 5 --crop 256 --epochs 100
    python3 TrainUnetDataSet.py --resume checkpoints/last.safetensors --epochs 200

`diff TrainUnetDataSet.py ddp_train.py` shows what data parallel training takes.
"""

import engine
from cpu_kernels import accelerate
from unet import UNet

from oneflow import nn, optim
from oneflow.utils.data import DataLoader, RandomSampler


def Train_Unet(args):
    train_set, val_set = engine.data_sets(args)
    device = engine.start(args)

    net = UNet(1, 1, args.bilinear, args.base_channels, args.dropout).to(device)
    if args.cpu_kernels == "auto":
        accelerate(net)  # on a CPU; does nothing on a GPU
    optimizer = optim.Adam(net.parameters(), lr=args.lr)
    criterion = nn.BCEWithLogitsLoss(reduction="none")  # on logits: the net has no sigmoid
    first_epoch, best = engine.resume(args, net, optimizer)
    engine.start_log(args, first_epoch)

    sampler = RandomSampler(train_set)
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
        engine.seed_epoch(args.seed, epoch)
        train_set.epoch = epoch
        trained = engine.train_one_epoch(net, loader, step, device, epoch)
        scores = engine.validate(args, net, val_set, criterion, device, epoch)
        best = engine.finish_epoch(args, net, optimizer, epoch, best, trained, scores)


if __name__ == "__main__":
    engine.run(lambda: Train_Unet(engine.parse_args(__doc__)))
