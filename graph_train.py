"""Train a U-Net on one device by a static graph: forward, backward, optimizer and schedule, compiled.

    python3 graph_train.py
    python3 graph_train.py --device cuda --amp on

On a CPU the graph runs OneFlow's own kernels, several times slower than cpu_kernels: train with TrainUnetDataSet.py
there. Each shape of a batch takes seconds to compile: train on crops, not on whole slices of many sizes.
"""

from common import arguments, begin, start
from common.epoch import Run
from common.graph import Graphs, TrainingGraph
from cpu_kernels import accelerate
from dataloader import AUGMENTATIONS, SelfDataSet
from unet import UNet

from oneflow import nn, optim
from oneflow.utils.data import DataLoader, RandomSampler


class TrainGraph(TrainingGraph):
    def build(self, image, label, weight):
        net, criterion = self.net, self.criterion
        losses = (criterion(net(image), label) * weight).mean((1, 2, 3))  # of each slice
        losses.mean().backward()
        return losses


def Train_Unet(net, device, args):
    train_set, val_set = begin.data_sets(SelfDataSet, args)
    sampler = RandomSampler(train_set)
    loader = DataLoader(train_set, args.batch_size, sampler=sampler, num_workers=args.num_workers)
    optimizer = optim.Adam(net.parameters(), lr=args.lr)
    criterion = nn.BCEWithLogitsLoss(reduction="none")  # on logits: the net has no sigmoid
    run = Run(net, optimizer, device, args, train_set, val_set, graph=True)  # goes on from --resume
    schedule = run.schedule(len(loader))
    step = Graphs(TrainGraph, net, criterion, optimizer, schedule, run.amp)

    for epoch in range(run.first_epoch, args.epochs + 1):
        for image, label, weight in run.batches(loader, epoch):
            losses = step(image, label, weight)
            run.count(losses)
        step.keep_count()
        run.finish(run.validate(criterion))


def main(args):
    device = begin.pick_device(args, graph=True)
    begin.seed_everything(args.seed)
    net = UNet(1, 1, args.bilinear, args.base_channels or arguments.WIDTH[device]).to(device)
    if args.dropout:
        print("no dropout: in a graph OneFlow draws the same for every seed")
    if args.cpu_kernels == "auto":
        accelerate(net)  # on a CPU, for validation; does nothing on a GPU
    Train_Unet(net, device, args)


if __name__ == "__main__":
    start.run(lambda: main(arguments.parse_args(__doc__, AUGMENTATIONS)))
