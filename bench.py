"""How fast? Each way of ours against a plain implementation of the reference's, as ratios.

    python bench.py                                 # laptop sizes, MNIST 14x14, a few minutes
    python bench.py --preset gpu --device cuda

The reference's way, for the same networks and the same data:

    SMT   one time t a batch; two bidirectional passes make m_{t-1} and m_t; the decoder reads one
          of them; one transition
    DMT   one rollout of T steps with its graph; a label at every 16th step, each from a
          bidirectional pass that builds a graph too; backpropagation through everything; one
          optimiser step

Ours is what smt.py and dmt.py do with their presets when the RNN runs alone over the whole
sequence; SMT once more with nothing on-policy, and once with the paper's pair of times. A labelled
transition is a pair (m_{t-1}, x_t) -> m_t with a label from the encoder that an optimiser step
learns from; on-policy m_{t-1} is another one, and so is each update of a span. Both ways process
whole batches, of SMT's size, and end with an optimiser step, ours of the preset's optimiser, the
reference's of AdamW. MNIST at laptop sizes is timed at 14x14 and, because labels cost the reference
a context each, at 28x28.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, demand, flags_in, parser, pick_device
import dataclasses
import functools
import json
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import bptt
import data as datasets
import dmt
import flags
import presets
import smt
import trainer
from checkpoints import RANGES
from losses import cross_entropy, futures
from model import RNN, Decoder, Encoder, Heads, autocast

LABEL_EVERY = 16  # of the reference's DMT


# ------------------------------------------------------------ the reference's way, written plainly

def reference_smt(encoder: Encoder, decoder: Decoder, rnn: RNN, x: Tensor, y: Tensor, t: int,
                  cfg) -> Tensor:
    """Eq. 5 with one transition (t-1 -> t) a sequence; t >= 1. Returns the loss."""
    before, after = encoder.encode_window(x, t - 1), encoder.encode_window(x, t)
    b, when = torch.arange(len(x), device=x.device), x.new_full((len(x),), t - 1)
    x_fut, y_fut = futures(x, y, b, when, decoder.c.fut_len)
    dec = cross_entropy(decoder(before, x_fut, when), y_fut)
    dyn = F.mse_loss(rnn.update(before, x[:, t], torch.full_like(x[:, t], t)), after)
    unif = smt.uniformity(torch.stack([before, after]), torch.Generator().manual_seed(0))
    return cfg.lambda_dec * dec + cfg.lambda_dyn * dyn + cfg.lambda_unif * unif


def reference_dmt(encoder: Encoder, rnn: RNN, x: Tensor, y: Tensor) -> Tensor:
    """Eq. 6 along one rollout from m_0, graph and all. Returns the loss."""
    own = rnn.memories(x)
    when = range(LABEL_EVERY - 1, x.shape[1], LABEL_EVERY)
    labels = torch.stack([encoder.encode_window(x, t) for t in when], dim=1)
    return 10 * F.mse_loss(own[:, LABEL_EVERY - 1::LABEL_EVERY], labels) + \
        cross_entropy(rnn.logits(own.detach()), y)


# -------------------------------------------------------------------------------- one step of each

class Bench:
    """Networks, data and optimiser of a laptop or GPU run, and a method for everything to time. The
    reference has a bidirectional encoder of its own."""

    def __init__(self, preset: str, dataset: str, device: str, data_dir: str,
                 compile: bool = False, **task):
        self.device = device
        config = functools.partial(flags.config, preset=preset, dataset=dataset, data_dir=data_dir,
                                   **task)
        self.smt = config("smt", smt.Config, lr=1e-5)  # a benchmark goes nowhere
        self.dmt, self.of_bptt = config("dmt", dmt.Config), config("bptt", bptt.Config)
        self.task = flags.load_data(vars(self.smt), device)
        c = trainer.model_config(self.smt, self.task)
        # A graph over a whole rollout: the reference has no memory for DMT's large batch. Counted
        # were 122 bytes for each number of the updater's stream; 30 GB fit everywhere
        row = 122 * c.T * c.update_layers * (c.mem_tokens + 1) * c.d_model
        self.few = max(1, min(self.dmt.batch_size, self.smt.batch_size, int(3e10) // row))
        torch.manual_seed(0)
        self.encoder, self.decoder, self.rnn = (
            net(c).to(device) for net in (Encoder, Decoder, RNN))
        self.heads = Heads(c).to(device) if c.heads or c.past else None
        self.their_encoder = Encoder(dataclasses.replace(c, encoder="bidirectional")).to(device)
        self.gen = torch.Generator().manual_seed(0)
        self.walk, self.one = None, torch.ones((), device=device)
        nets = dict(encoder=self.encoder, decoder=self.decoder, rnn=self.rnn)
        nets |= dict(heads=self.heads) if self.heads else {}
        theirs = nets | dict(encoder=self.their_encoder)
        if compile:
            trainer.compile_blocks(nets | dict(theirs=self.their_encoder))
        params = lambda nets: [p for net in nets.values() for p in net.parameters()]
        self.optimizers = trainer.make_optimizers(self.smt, nets, [params(nets)], device)
        self.adamw = [torch.optim.AdamW(params(theirs), lr=1e-5, fused=device != "mps")]

    def learn(self, loss: Tensor, optimizers: list) -> None:
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def smt_ours(self, on_policy: bool = True, plain: bool = False) -> int:
        """Returns the number of labelled transitions. `plain` is the paper's step: two times, one
        future a sequence."""
        cfg, heads = self.smt, None if plain else self.heads
        if plain:
            cfg = dataclasses.replace(cfg, times=2, rnn_batch=0, decode_own=False, first=0.0,
                                      futures=cfg.batch_size)
        x, y = self.task.batch(cfg.batch_size, self.gen)
        times = smt.sample_times(self.task.T, cfg.times, self.gen)
        horizon = min(cfg.horizon or len(times), len(times)) if on_policy else 1
        with autocast(self.device):
            losses = smt.objective(self.encoder, self.decoder, self.rnn, heads, x, y, times,
                                   horizon, cfg, self.gen)
        self.learn(losses["loss"], self.optimizers)
        return len(x[:cfg.rnn_batch or None]) * (len(times) - 1) * (2 if horizon > 1 else 1)

    def smt_reference(self) -> int:
        x, y = self.task.batch(self.smt.batch_size, self.gen)
        t = int(torch.randint(1, self.task.T, (), generator=self.gen))
        with autocast(self.device):
            loss = reference_smt(self.their_encoder, self.decoder, self.rnn, x, y, t, self.smt)
        self.learn(loss, self.adamw)
        return len(x)

    def dmt_sets_out(self) -> None:
        """What a run of dmt.py does once: labels and own memories of a batch."""
        cfg = self.dmt = dataclasses.replace(self.dmt, span=min(self.dmt.span, self.task.T - 1))
        batch = self.task.batch(cfg.batch_size, self.gen)
        with autocast(self.device):
            self.walk = dmt.begin(batch, self.encoder, self.rnn, self.task.T, cfg,
                                  self.gen)

    def dmt_ours(self) -> int:
        """One step, and on to the next spans."""
        if self.walk is None:
            self.dmt_sets_out()
        with autocast(self.device):
            losses, made = dmt.objective(self.rnn, self.heads, self.walk, self.one, self.dmt,
                                         self.gen)
        self.learn(losses["loss"], self.optimizers)
        if self.dmt.spans:
            self.dmt_sets_out()  # new sequences for every step
        else:
            with autocast(self.device):
                dmt.go_on(self.walk, made, self.task, self.encoder, self.task.T, self.gen)
        return made.shape[0] * made.shape[1]

    def dmt_reference(self) -> int:
        x, y = self.task.batch(self.few, self.gen)
        with autocast(self.device):
            loss = reference_dmt(self.their_encoder, self.rnn, x, y)
        self.learn(loss, self.adamw)
        return len(x) * (self.task.T // LABEL_EVERY)

    def bptt(self, batch: int = 0) -> int:
        """One step of bptt.py, 0: with SMT's batch; its transitions have no labels of their own."""
        x, y = self.task.batch(batch or self.smt.batch_size, self.gen)
        with autocast(self.device):
            own = bptt.unroll(self.rnn, None, x, 0, self.of_bptt.recompute)
            loss = bptt.objective(self.rnn, None, own, x, y, 0, self.of_bptt, self.gen)["loss"]
        self.learn(loss, self.optimizers)
        return len(x) * (self.task.T - 1)


def interleaved(ways: dict, seconds: float, device: str) -> dict[str, tuple[float, int]]:
    """name -> (median seconds a call, transitions a call). One call of each in turn, so that a
    noisy machine disturbs all alike; the first calls warm up."""
    spent, made = {name: [] for name in ways}, {}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or min(map(len, spent.values())) < 3:
        for name, way in ways.items():
            start = time.perf_counter()
            made[name] = way()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - start)
    return {name: (sorted(s[1:])[len(s[1:]) // 2], made[name]) for name, s in spent.items()}


def matmul_rate(device: str, n: int = 2048) -> float:
    """Floating-point operations a second of a large matrix product, the most this machine can do
    (fp32; bf16 on CUDA)."""
    kind = torch.bfloat16 if device.startswith("cuda") else torch.float32
    a = torch.randn(n, n, device=device, dtype=kind)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def comparisons(a, device: str) -> dict:
    """What is compared: (one way's name, the way, the other's name, the other)."""
    sizes, pairs = [{}], {}
    if a.dataset == "mnist" and a.preset == "laptop":
        sizes = [dict(image_size=14), dict(image_size=28)]
    for size in sizes:
        b = Bench(a.preset, a.dataset, device, a.data_dir, a.compile, **size)
        reference, at = ("reference", b.smt_reference), f", T = {b.task.T}"
        pairs |= {
            "SMT" + at: ("ours", b.smt_ours, *reference),
            "SMT, nothing on-policy" + at: ("ours", lambda b=b: b.smt_ours(False), *reference),
            "SMT, one transition" + at: ("ours", lambda b=b: b.smt_ours(False, True), *reference),
            "DMT" + at: ("ours", b.dmt_ours, "reference", b.dmt_reference),
            "SMT and BPTT" + at: ("SMT", b.smt_ours, "BPTT", b.bptt),
        }
    return pairs


def main(argv) -> None:
    p = parser("bench.py", __doc__)
    p.add_argument("--preset", choices=presets.PRESETS, default="laptop",
                   help="sizes of networks and batches (default: %(default)s)")
    p.add_argument("--dataset", default="mnist", metavar="str", help="(default: %(default)s)",
                   choices=[d for d in datasets.OPTIONS if d not in ("text", "images")])
    p.add_argument("--data_dir", default=flags.Config.data_dir, help="(default: %(default)s)")
    p.add_argument("--device", default="auto", help="(default: %(default)s)")
    p.add_argument("--threads", type=int, default=0,
                   help="CPU threads; 0 = torch's choice (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=60.0,
                   help="for each comparison (default: %(default)s)")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile the blocks, for both ways (default: eager)")
    p.add_argument("--json", action="store_true",
                   help="print JSON and nothing else (default: a table)")
    a = p.parse_args(argv)
    datasets.refuse_useless(a.dataset, flags_in(argv))
    demand("threads", a.threads, *RANGES["threads"])
    demand("seconds", a.seconds, 0, 1e6)
    if a.threads:
        torch.set_num_threads(a.threads)
    device = pick_device(a.device)
    pairs = comparisons(a, device)
    rate, rows = matmul_rate(device), []
    for what, (one, way, other, plain) in pairs.items():
        got = interleaved({one: way, other: plain}, a.seconds, device)
        (t1, n1), (t2, n2) = got[one], got[other]
        rows.append(dict(what=what, ways=[one, other], seconds=[t1, t2], transitions=[n1, n2],
                         per_step=t2 / t1, per_transition=(t2 / n2) / (t1 / n1)))
        if not a.json:
            print(f"{what:34} {one}: {t1 * 1e3:.0f} ms for {n1:,} transitions | "
                  f"{other}: {t2 * 1e3:.0f} ms for {n2:,} | {t2 / t1:.2f}x a call, "
                  f"{rows[-1]['per_transition']:.1f}x a transition", flush=True)
    out = dict(preset=a.preset, dataset=a.dataset, device=device, threads=torch.get_num_threads(),
               torch=torch.__version__, compile=a.compile, gflops=rate / 1e9, rows=rows)
    print(json.dumps(out) if a.json else
          f"large matrix product: {rate / 1e9:.0f} GFLOP/s, {out['threads']} threads")


if __name__ == "__main__":
    cli(main)
