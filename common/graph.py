"""What a static graph needs to train as an eager loop does: shapes, and an optimizer's state and counters shared."""

from functools import cache

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C
from common.arguments import InputError

import oneflow as flow
from oneflow import nn

ADAM = {"exp_avg": "m", "exp_avg_sq": "v"}  # what the eager optimizer keeps of a parameter: a graph's name for it
STATE = {"Adam": ADAM, "AdamW": ADAM, "SGD": {"momentum_buf": "momentum"}}


class TrainingGraph(nn.Graph):
    """One training step, compiled for the shapes of its first call; subclasses have `build`. All work on the net's own
    tensors, the optimizer's, and `count`, the steps so far, int64 (1,), which drives schedule and bias correction."""

    def __init__(self, net, criterion, optimizer, schedule, count, amp):
        super().__init__()
        self.net, self.criterion = net, criterion
        self.add_optimizer(optimizer, lr_sch=schedule)
        if amp:
            self.config.enable_amp(True)
            self.set_grad_scaler(flow.amp.GradScaler())
        optimizer.zero_grad(set_to_none=True)  # a graph before this one leaves its symbols there
        kind = type(optimizer).__name__
        if kind not in STATE:
            raise InputError(f"{kind}: graph_train.py only knows {', '.join(STATE)}; TrainUnetDataSet.py takes any")
        pairs = {} if kind == "SGD" and not optimizer.param_groups[0]["momentum"] else STATE[kind]
        state = {"System-Train-TrainStep": count}
        for name, parameter in net.named_parameters():
            for ours, theirs in pairs.items():
                zeros = flow.zeros_like(parameter)  # where a run begins
                state[f"net.{name}-{theirs}"] = optimizer._state[parameter].setdefault(ours, zeros)
        self.load_state_dict(state)


class Graphs:
    """A step for batches of any shape: Graphs(TrainGraph, net, …)(image, label, weight) calls a graph of that shape."""

    def __init__(self, kind, net, criterion, optimizer, schedule, amp):
        self.net, self.optimizer, self.schedule = net, optimizer, schedule
        self.count = flow.tensor([schedule.last_step], dtype=flow.int64)
        self.of_shape = cache(lambda _: kind(net, criterion, optimizer, schedule, self.count, amp))

    def __call__(self, *inputs):
        return self.of_shape(inputs[0].shape)(*inputs)

    def keep_count(self):
        """Count the steps since the last call where eager ones count themselves; to be called after each epoch."""
        steps = self.count.item() - self.schedule.last_step
        for name, buffer in self.net.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer += steps
        self.optimizer._state["step"] += steps
        self.schedule.last_step += steps - 1
        self.schedule.step()
