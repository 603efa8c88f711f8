"""Train a U-Net on one device by a static graph: forward, backward, Adam and schedule, compiled.

    python3 graph_train.py
    python3 graph_train.py --data_path data/train_image --val_count 5 --crop 256 --epochs 100
    python3 graph_train.py --resume checkpoints/last.safetensors --epochs 200
    python3 graph_train.py --device cuda --amp

`diff TrainUnetDataSet.py graph_train.py` shows what that takes. Checkpoints are the same, so a run
can be begun by one script and resumed by the other.

On a CPU the graph runs OneFlow's own kernels, several times slower than cpu_kernels.py, which
computes in NumPy, where no graph can look: train with TrainUnetDataSet.py there. Each shape of a
batch takes seconds to compile and memory of its own: train on squares (--crop), not on whole slices
of many sizes. --amp scales the loss, and no checkpoint holds by how much: it finds that out anew.
There is no dropout (--dropout 0): in a graph OneFlow draws the same numbers for every seed, in both
levels and again after resuming.
"""

import engine
from cpu_kernels import accelerate
from unet import UNet

import oneflow as flow
from oneflow import nn, optim
from oneflow.utils.data import DataLoader, RandomSampler


class TrainGraph(nn.Graph):
    """One training step, compiled when it is first called, for the shapes of that call.

    It works on the net's own tensors and on Adam's, so that graphs of other shapes (a short last
    batch), validation and checkpoints see what it has done. `count`: the steps done so far, int64
    (1,), which all graphs share too. It drives the schedule and Adam's bias correction alike, so
    a run resumed with another number of steps an epoch differs from an eager one at first.
    """

    def __init__(self, net, criterion, optimizer, schedule, count, amp):
        super().__init__()
        self.net = net
        self.criterion = criterion
        self.add_optimizer(optimizer, lr_sch=schedule)
        if amp:
            self.config.enable_amp(True)
            self.set_grad_scaler(flow.amp.GradScaler())
        optimizer.zero_grad(set_to_none=True)  # a graph before this one leaves its symbols there
        adam, state = optimizer.state_dict(), {"System-Train-TrainStep": count}
        for index, (name, parameter) in enumerate(net.named_parameters()):
            for short, moment in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                zeros = flow.zeros_like(parameter)  # where a run begins
                state[f"net.{name}-{short}"] = adam["state"][index].setdefault(moment, zeros)
        optimizer.load_state_dict(adam)
        self.load_state_dict(state)

    def build(self, image, label, weight):
        losses = (self.criterion(self.net(image), label) * weight).mean((1, 2, 3))
        losses.mean().backward()
        return losses


def keep_count(net, optimizer, schedule, count):
    """Count the graphs' steps since the last call where eager ones count themselves."""
    steps = int(count.numpy()[0]) - schedule.last_step
    for name, buffer in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer += steps
    adam = optimizer.state_dict()
    adam["state"]["step"] += steps
    optimizer.load_state_dict(adam)
    schedule.last_step += steps - 1
    schedule.step()


def Train_Unet(args):
    if args.dropout:
        print("the graph trains without dropout: OneFlow's graphs draw the same for every seed")
        args.dropout = 0.0
    train_set, val_set = engine.data_sets(args)
    device = engine.start(args)

    net = UNet(1, 1, args.bilinear, args.base_channels, args.dropout).to(device)
    if args.cpu_kernels == "auto":
        accelerate(net)  # on a CPU, for validation; does nothing on a GPU or in a graph
    if device == "cpu":
        print("the graph runs OneFlow's own slow kernels: TrainUnetDataSet.py is faster on a CPU")
    optimizer = optim.Adam(net.parameters(), lr=args.lr)
    criterion = nn.BCEWithLogitsLoss(reduction="none")  # on logits: the net has no sigmoid
    first_epoch, best = engine.resume(args, net, optimizer)
    engine.start_log(args, first_epoch)

    sampler = RandomSampler(train_set)
    workers = args.num_workers
    loader = DataLoader(train_set, args.batch_size, sampler=sampler, num_workers=workers)
    schedule = engine.learning_rate_schedule(args, optimizer, len(loader), first_epoch)

    graphs = {}
    count = flow.tensor([schedule.last_step], dtype=flow.int64)

    def step(image, label, weight):
        shape = image.shape
        if shape not in graphs:
            graphs[shape] = TrainGraph(net, criterion, optimizer, schedule, count, args.amp)
        return graphs[shape](image, label, weight)

    for epoch in range(first_epoch, args.epochs + 1):
        engine.seed_epoch(args.seed, epoch)
        train_set.epoch = epoch
        trained = engine.train_one_epoch(net, loader, step, device, epoch)
        keep_count(net, optimizer, schedule, count)
        scores = engine.validate(args, net, val_set, criterion, device, epoch)
        best = engine.finish_epoch(args, net, optimizer, epoch, best, trained, scores)


if __name__ == "__main__":
    engine.run(lambda: Train_Unet(engine.parse_args(__doc__, amp=True)))
