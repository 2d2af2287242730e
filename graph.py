"""--graph: an RNN's update as one CUDA graph. Not yet tried on a GPU, so nobody gets it unasked.

A rollout is T updates in a row, of a hundred small kernels each, and to start a kernel takes the
host longer than to run it takes the GPU. A graph is recorded once for each shape and started in
one go. Without a gradient only: SMT's and DMT's own memories, evaluation.
"""
import torch
from torch import Tensor

from model import RNN, in_autocast

MOST_ROWS = 4096   # of one update; with more, the kernels themselves take longer than their start
MOST_GRAPHS = 16   # each keeps its memory; a curriculum passes through many shapes


def graph_updates(rnn: RNN) -> None:
    """From now on updates without a gradient are replayed, where there are few enough rows."""
    plain, replayed = rnn.next_memory, Replayed(rnn.next_memory)

    def next_memory(m: Tensor, event: Tensor) -> Tensor:
        small = not torch.is_grad_enabled() and event[..., 0].numel() <= MOST_ROWS
        return (replayed if small else plain)(m, event)

    rnn.next_memory = next_memory


class Replayed:
    """f(*tensors) -> tensor, without a gradient: the same values from recorded kernels. They read
    and write the same memory each time, so inputs are copied there, and the output from there."""

    def __init__(self, f):
        self.f, self.made = f, {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        # what was recorded in bf16 is not what fp32 would do
        key = in_autocast(inputs[0].device), *((v.shape, v.dtype) for v in inputs)
        if key not in self.made:
            if len(self.made) == MOST_GRAPHS:
                self.made.clear()
            self.made[key] = self.record([v.clone() for v in inputs])
        replay, places, out = self.made[key]
        for place, v in zip(places, inputs):
            place.copy_(v)
        replay()
        return out.clone()  # the next replay writes over it

    def record(self, places: list[Tensor]) -> tuple:
        """(what runs the kernels again, where they read, where they write)."""
        device = places[0].device
        if device.type != "cuda":  # the tested twin: the same places, the plain function
            out = self.f(*places)
            return lambda: out.copy_(self.f(*places)), places, out
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        # Outside a graph autocast keeps each weight's bf16 copy until its context ends. A graph
        # must make its own, or it would read old weights for ever.
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"),
                            enabled=in_autocast(device), cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up on the first calls
                for _ in range(3):
                    self.f(*places)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                out = self.f(*places)
        return graph.replay, places, out
