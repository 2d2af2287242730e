"""What a step asks of a GPU, counted without one: kernels, copies from the host, values the host
waits for, operations, shapes that attention meets, and the most memory that is alive at once.

    python results/gpu/count.py                            # every script at gpu sizes, 28x28
    python results/gpu/count.py --rnn gru --only "smt.py"  # one of them, with another updater
    python results/gpu/count.py --only "dmt.py" --graph    # updates replayed as CUDA graphs
    python results/gpu/count.py --device cuda              # measured instead

Tensors are pretended (pretend.py). Autocast is imitated: linear maps, products and attention in
bf16, normalisation and losses in fp32. Memory is what PyTorch would hold, without the context of
CUDA (about 0.5 GB), workspaces and gaps. A kernel of a library may be two. Seconds are estimated
from kernels, bytes and operations (pretend.py says how); "busy" is the part of them in which the
GPU does not wait for the host, "used" what it computes of an H100's peak. Measured, a call that is
far from its guess in GUESS ends all with one line: look before more minutes are spent.
"""
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = os.environ.get("CODE", os.path.join(HERE, "..", "..")), HERE
import bench  # noqa: E402
import bptt  # noqa: E402
import evaluate  # noqa: E402
import flags  # noqa: E402
import graph  # noqa: E402
import presets  # noqa: E402
import sample  # noqa: E402
import smt  # noqa: E402
from console import cli, demand, fail, parser, pick_device  # noqa: E402
from model import UPDATERS  # noqa: E402
from pretend import PEAK, SHORTEST, START, PretendedGPU, allow_fused_adamw  # noqa: E402
from sources import images  # noqa: E402

BF16 = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm,
        torch.baddbmm, F.scaled_dot_product_attention}
FP32 = {F.rms_norm, F.mse_loss, F.cross_entropy, torch.logsumexp, torch.cumsum}


class Autocast(TorchFunctionMode):
    """bf16 as torch.autocast would; a parameter is cast once in each of these."""

    def __init__(self):
        super().__init__()
        self.cast = {}

    def lower(self, v):
        if not isinstance(v, torch.Tensor) or v.dtype is not torch.float32:
            return v
        if not (v.is_leaf and v.requires_grad):
            return v.bfloat16()
        if id(v) not in self.cast:
            self.cast[id(v)] = v.bfloat16()
        return self.cast[id(v)]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in BF16:
            args = tree_map(self.lower, args)
        if func in FP32:
            args = tree_map(lambda v: v.float() if isinstance(v, torch.Tensor) and
                            v.is_floating_point() else v, args)
        return kernels(func, *args, **kwargs)


class Fused(TorchFunctionMode):
    """Outside autocast: one kernel where CUDA has one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return kernels(func, *args, **kwargs or {})


def kernels(func, *args, **kwargs):
    """The call, with the fused kernels of CUDA instead of their parts."""
    on_gpu = isinstance(args[0], torch.Tensor) and args[0].is_meta if args else False
    if on_gpu and func is F.rms_norm:  # without a device its parts; layer_norm is as large and one
        return F.layer_norm(args[0], args[1])
    if on_gpu and func is F.scaled_dot_product_attention:
        q, k, v = args
        mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
        if mask is not None:  # bool becomes 0 and -inf
            mask = torch.zeros(mask.shape, dtype=q.dtype, device="meta").masked_fill(~mask, -1e9)
            mask = mask.expand(*q.shape[:2], *mask.shape)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, True, 0.0, causal)[0]
    return func(*args, **kwargs)


def pictures(size: int, device: str):
    """A task of the shape of MNIST; what the pictures show does not matter."""
    draw = lambda n: torch.randint(2, (n, size, size), dtype=torch.uint8)
    return images.image_data("mnist", dict(train=draw(1000), val=draw(1000), test=draw(1000)), 2,
                             device)


def pretend_autocast() -> None:
    """Autocast has no bf16 for pretended devices; imitate it, in what is computed again too."""
    for module in (bench, bptt, evaluate, sample):
        module.autocast = lambda device: Autocast()
    if hasattr(bptt, "checkpoint"):
        def again(f, *a, checkpoint=bptt.checkpoint, **k):
            def both(*a):
                with Autocast():
                    return f(*a)
            return checkpoint(both, *a, **k)
        bptt.checkpoint = again


def ways(b: bench.Bench) -> dict:
    """What is counted, by name."""
    nets = b.rnn, b.encoder, b.decoder
    n, few = b.smt.n_val, f", batch {b.few}"
    return {
        "smt.py, teacher alone": lambda: teacher_alone(b),
        "smt.py, a step": b.smt_ours,
        "dmt.py, setting out": b.dmt_sets_out,
        "dmt.py, a step": b.dmt_ours,
        "bptt.py, a step": lambda: b.bptt(b.of_bptt.batch_size),
        "a validation": lambda: evaluate.evaluate(b.task, *nets, "val", n, fast=True),
        "40 samples": lambda: sample.generate(b.rnn, 40, b.task.T, torch.Generator()),
        "bench.py, reference SMT": b.smt_reference,
        "bench.py, one transition": lambda: b.smt_ours(False, True),
        "bench.py, ref. DMT" + few: b.dmt_reference,
        "bench.py, BPTT": b.bptt,
    }


def teacher_alone(b: bench.Bench) -> None:
    """A step before --rnn_from."""
    x, y = b.task.batch(b.smt.batch_size, b.gen)
    with bench.autocast(b.device):
        losses = smt.teacher_alone(b.encoder, b.decoder, b.heads, x, y,
                                   torch.arange(b.task.T), b.smt, b.gen)
    b.learn(losses["loss"], b.optimizers)


def graphs_start_faster(b: bench.Bench, gpu: PretendedGPU) -> None:
    """--graph: one start for all kernels of an update."""
    graph.graph_updates(b.rnn)
    plain = b.rnn.next_memory

    def quick(m, event):
        if torch.is_grad_enabled() or event[..., 0].numel() > graph.MOST_ROWS:
            return plain(m, event)
        gpu.start, gpu.seconds = SHORTEST, gpu.seconds + START
        out = plain(m, event)
        gpu.start = START
        return out

    b.rnn.next_memory = quick


# What the other stages of run.sh count on: seconds and GB a call, at gpu sizes and 28x28. Estimated
# from the counts, with room; never measured.
GUESS = {"smt.py, teacher alone": (0.2, 40), "smt.py, a step": (0.5, 40),
         "dmt.py, setting out": (15, 40), "dmt.py, a step": (1, 40),
         "bptt.py, a step": (25, 40), "a validation": (30, 40)}


def measured(way, device: str) -> tuple[float, int, float]:
    """Seconds, kernels (0 on a CPU, and where a trace of them would be huge) and peak GB of the
    third call."""
    cuda = device.startswith("cuda")
    way()
    way()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    way()
    if cuda:
        torch.cuda.synchronize()
    seconds, kernels = time.perf_counter() - start, 0
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    if cuda and seconds < 0.5:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            way()
        # the host's calls that start them are events as well
        kernels = sum(e.count for e in p.key_averages()
                      if e.device_type == torch.autograd.DeviceType.CUDA)
    return seconds, kernels, peak


def measure(a) -> None:
    """A table, until a guess was wrong by far."""
    device = pick_device(a.device)
    flags.load_data = lambda *x, **k: pictures(a.size, device)
    b = bench.Bench(a.preset, "mnist", device, "data", rnn=a.rnn, image_size=a.size)
    if a.graph:
        graph.graph_updates(b.rnn)
    print(f"{'':29}{'seconds':>10}{'kernels':>10}{'GB':>7}", flush=True)
    for name, way in ways(b).items():
        if a.only not in name:
            continue
        seconds, kernels, peak = measured(way, device)
        print(f"{name:29}{seconds:>10.3f}{kernels:>10,}{peak:>7.1f}", flush=True)
        most = [a.guess * v for v in GUESS.get(name, ())]
        if any(most) and (seconds > most[0] or peak > most[1]):
            fail(f"{name}: {seconds:.1f} s and {peak:.0f} GB a call, guessed were at most "
                 f"{most[0]:g} s and {most[1]:g} GB; give that script a smaller --batch_size in "
                 "run.sh before the other stages")


class Patch:
    """What pytest's monkeypatch does, without the way back."""
    setattr = staticmethod(setattr)


def counted(way, gpu: PretendedGPU) -> str:
    """A row of the table."""
    names = "launches", "copies", "questions", "flops", "seconds", "busy"
    began, gpu.peak, gpu.shapes = [getattr(gpu, k) for k in names], gpu.live, set()
    way()
    row = [getattr(gpu, k) - then for k, then in zip(names, began)]
    return f"{row[0]:>10,}{row[1]:>8}{row[2]:>7}{len(gpu.shapes):>8}{gpu.peak / 1e9:>7.1f}" \
        f"{row[3] / 1e12:>9.3g}{row[4]:>9.3g}{row[5] / row[4]:>6.0%}{row[3] / row[4] / PEAK:>6.0%}"


def count(a) -> None:
    """The table, without a GPU."""
    allow_fused_adamw(Patch)
    pretend_autocast()
    with PretendedGPU() as gpu, Fused():
        flags.load_data = lambda *x, **k: pictures(a.size, "meta")
        b = bench.Bench(a.preset, "mnist", "meta", "data", rnn=a.rnn, image_size=a.size)
        if a.graph:
            graphs_start_faster(b, gpu)
        print(f"{'':29}{'kernels':>10}{'copies':>8}{'waits':>7}{'shapes':>8}{'GB':>7}{'TFLOP':>9}"
              f"{'seconds':>9}{'busy':>6}{'used':>6}")
        b.smt_ours()  # a first step makes angles and the optimiser's averages
        for name, way in ways(b).items():
            if a.only in name:
                if a.graph:
                    way()  # records
                print(f"{name:29}{counted(way, gpu)}", flush=True)


def main(argv) -> None:
    p = parser("count.py", __doc__)
    p.add_argument("--preset", choices=presets.PRESETS, default="gpu", help="(default: gpu)")
    p.add_argument("--rnn", choices=sorted(UPDATERS), default="transformer",
                   help="(default: %(default)s)")
    p.add_argument("--size", type=int, default=28, help="of a picture (default: %(default)s)")
    p.add_argument("--only", default="", help="what has this in its name (default: all)")
    p.add_argument("--graph", action="store_true", help="updates replayed (default: started)")
    p.add_argument("--device", default="", help="measure on it; empty = count without one")
    p.add_argument("--guess", type=float, default=1.0,
                   help="measuring stops above so many times GUESS; 0 = never (default: 1)")
    a = p.parse_args(argv)
    demand("size", a.size, 2, 64)
    demand("guess", a.guess, 0, 1e9)
    measure(a) if a.device else count(a)


if __name__ == "__main__":
    cli(main)
