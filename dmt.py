"""DAgger Memory Training (Eq. 6): teach an SMT-trained RNN on the memories it really has, its own.

    python dmt.py --ckpt runs/smt-mnist/ckpt.pt
    python dmt.py --ckpt runs/smt-mnist/ckpt.pt --span 1         # no gradient through time at all
    python dmt.py --ckpt runs/paper/ckpt.pt --preset paper       # of smt.py --preset paper

Many sequences are under way at once, each at a time of its own. In a step the RNN makes --span
updates of each, from its own m_{t-1}; what it makes shall be what the frozen encoder makes there
(Eq. 6), and predict (Eq. 2). A gradient crosses one span at most, and all spans are learnt from in
parallel. Then each sequence goes on where its span ended, and one that is over makes room for a new
one. So every update that is made is learnt from; but a memory was made by weights that are up to
T / S steps old. The paper draws new sequences for every step (--spans) and rolls them out, without
a graph. Writes runs/dmt-<dataset>.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, fail
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import flags
import ranks
import trainer
from checkpoints import CheckpointError, build
from evaluate import evaluate, summary
from flags import flag
from losses import cross_entropy, predictive
from model import RNN, Encoder, Heads, ModelConfig, autocast, first_piece, on_device
from sample import draw_samples


@dataclass(kw_only=True)
class Config(flags.Config):
    ckpt: str = flag("checkpoint of smt.py (or of dmt.py) to start from; required", default="")
    span: int = flag("updates in a row that a gradient crosses; the paper: 1")
    spans: int = flag("0: one span of each sequence, which then goes on; else so many random spans "
                      "of new sequences in every step, the paper")
    lambda_mse: float = flag("weight of Eq. 6, in units of the labels' variance")
    lambda_dec: float = flag("weight of the predictions, Eq. 2, read by the readout")
    detach_dec: bool = flag("predictions teach the readout alone; the paper: yes")
    lambda_past: float = flag("weight of recalling the last inputs (--past) within Eq. 2")
    first: float = flag("part of the memories that must predict y_t alone; the paper: 1")
    horizon: int = flag("updates the RNN runs alone, about, but a span at least, all along; 0: 16 "
                        "at first, all in the end")


def horizon_at(progress: float, most: int) -> int:
    """Curriculum: 16 updates at first, growing geometrically to `most` when 60 % of the run is
    done."""
    # After SMT the RNN drifts more with every update; far from its labels there is little to learn.
    # The last 40 % are for whole rollouts, which is what counts.
    return min(most, round(16 * (most / 16) ** min(1.0, progress / 0.6)))


def spans_in(T: int, span: int) -> int:
    """The fewest spans that cover all T - 1 updates of a sequence."""
    return -(-(T - 1) // span)


def span_starts(n: int, T: int, span: int, gen: torch.Generator) -> Tensor:
    """When the spans of n sequences begin: (n, G) int64 on the CPU, ascending; G = spans_in(T,
    span). The first begins at 1, the last ends at T - 1, the others lie side by side behind a
    random offset: near the ends, where some tasks ask, an update comes up to twice."""
    G = spans_in(T, span)
    # Without an offset no span would ever begin elsewhere than at 1, 1 + span, 1 + 2 span .. The
    # smallest one still lets G spans reach the end, so that all sequences have as many.
    offset = torch.randint(T - 1 - (G - 1) * span, span + 1, (n, 1), generator=gen)
    later = 1 + offset + span * torch.arange(G - 1)
    return torch.cat([torch.ones(n, 1, dtype=torch.int64), later], dim=1).clamp(max=T - span)


@dataclass
class Walk:
    """B sequences under way, and the N spans that the next step learns from."""
    x: Tensor       # (B, T) int64
    y: Tensor       # (B, T) int64
    labels: Tensor  # (B, T, K, d), the encoder's memories
    starts: Tensor  # (B, G) int64 on the CPU: when the spans of each sequence begin
    b: Tensor       # (N,) int64 on the CPU: the sequence of a span ..
    i: Tensor       # (N,) int64 on the CPU: .. and which of its spans it is
    m: Tensor       # (N, K, d), the RNN's own memory before it

    @property
    def t(self) -> Tensor:
        """(N,) int64 on the CPU, the time of the first update of each span."""
        return self.starts[self.b, self.i]


def begin(batch: tuple, encoder: Encoder, rnn: RNN, horizon: int, cfg: Config,
          gen: torch.Generator) -> Walk:
    """Set out with sequences x, y (B, T): the RNN runs over them alone, without a graph."""
    x, y = batch
    (B, T), device = x.shape, x.device
    starts = span_starts(B, T, cfg.span, gen)
    G = starts.shape[1]
    if cfg.spans:
        pick = torch.randperm(B * G, generator=gen)[:cfg.spans]
        b, i = pick // G, pick % G
    else:  # evenly over their spans: as many sequences end, and are replaced, in every step
        b, i = torch.arange(B), torch.arange(B) * G // B
    first = first_piece(T, horizon, gen)
    # A context of its own: autocast keeps the weights' bf16 copies until it ends, and those made
    # without a graph left the updater without a gradient in older torch.
    with torch.no_grad(), autocast(str(device)):
        if cfg.spans:  # a span each, and where pieces begin: the others nobody will read
            need = torch.zeros(B, T, dtype=torch.bool)
            need[:, 0] = need[:, first::horizon] = True
            need[b[:, None], starts[b, i][:, None] + torch.arange(cfg.span)] = True
            labels = labels_where(encoder, x, need)
        else:
            labels = labels_of(encoder, x, i)
        own = rnn.own_memories(labels, x, torch.arange(T), horizon, first)
    m = own[on_device(b, device), on_device(starts[b, i] - 1, device)]
    return Walk(x, y, labels, starts, b, i, m)


def labels_of(encoder: Encoder, x: Tensor, i: Tensor) -> Tensor:
    """The encoder's memories of x (B, T): (B, T, K, d). One pass for all sequences of equal i (B,),
    which is how go_on makes them: other passes would have other last digits, and a resumed run
    shall have the same."""
    out = None
    for k in i.unique():
        at = on_device((i == k).nonzero()[:, 0], x.device)
        m = encoder(x[at], torch.arange(x.shape[1]))
        out = m.new_empty(len(x), *m.shape[1:]) if out is None else out
        out[at] = m
    return out


def labels_where(encoder: Encoder, x: Tensor, need: Tensor) -> Tensor:
    """The encoder's memories of x (B, T) where `need` (B, T), bool on the CPU, says so, elsewhere
    0 or what comes for nothing: (B, T, K, d)."""
    if encoder.c.encoder == "causal":  # one pass makes all
        return encoder(x, torch.arange(x.shape[1]))
    out = None
    for t in need.any(0).nonzero()[:, 0]:  # a pass for every time, of those rows that need it
        at = on_device(need[:, t].nonzero()[:, 0], x.device)
        m = encoder(x[at], t[None])[:, 0]
        out = m.new_zeros(*x.shape, *m.shape[1:]) if out is None else out
        out[at, int(t)] = m
    return out


@torch.no_grad()
def go_on(walk: Walk, made: Tensor, task, encoder: Encoder, horizon: int,
          gen: torch.Generator) -> int:
    """To the next span of every sequence, with what the RNN has just made (B, S, K, d). A sequence
    that is over makes room for a new one; returns how many were."""
    (B, T), device, before = walk.x.shape, made.device, walk.t
    walk.i = (walk.i + 1) % walk.starts.shape[1]
    over = (walk.i == 0).nonzero()[:, 0]
    if len(over):
        x, y = (v[:, :T] for v in task.batch(len(over), gen))
        walk.starts[over] = span_starts(len(over), T, made.shape[1], gen)
        at = on_device(over, device)
        walk.x[at], walk.y[at] = x, y
        with autocast(str(device)):
            walk.labels[at] = encoder(x, torch.arange(T)).to(walk.labels.dtype)
    # the last span may overlap the one before it, so the memory is not always the newest
    behind = on_device((walk.t - before - 1).clamp(min=0), device)
    m = made.detach()[torch.arange(B, device=device), behind]
    label = walk.labels[torch.arange(B, device=device), on_device(walk.t - 1, device)]
    # Put back on the label: who begins, and, while rollouts are short, about every `horizon`
    # updates.
    back = walk.i == 0
    if horizon < T:
        back = back | (torch.rand(B, generator=gen) < made.shape[1] / horizon)
    walk.m = torch.where(on_device(back, device)[:, None, None], label, m.to(label.dtype))
    return len(over)


def objective(rnn: RNN, heads: Heads | None, walk: Walk, variance: Tensor, cfg: Config,
              gen: torch.Generator, density: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
    """Eq. 6 and Eq. 2 on the N spans of a walk -> named scalars, and the memories that the RNN made
    (N, S, K, d)."""
    b, t = on_device(walk.b, walk.x.device), on_device(walk.t, walk.x.device)
    x, y, when = walk.x[b], walk.y[b], t[:, None] + torch.arange(cfg.span, device=t.device)
    # The memory that a span begins with is a number, not a graph: there the gradient ends.
    made = rnn.rollout(walk.m, x.gather(1, when), t)                            # (N, S, K, d)
    label = walk.labels[b[:, None], when]
    mse = F.mse_loss(made.float(), label.float()) / variance    # Eq. 6; 1: no better than a mean
    # The paper's way: predictions teach the readout to read, and the updater learns from Eq. 6
    # alone.
    read = made.detach() if cfg.detach_dec else made
    dec = predictive(rnn.readout, heads, read, when, x, y, cfg, gen, density)           # Eq. 2
    if cfg.first:
        dec["dec"] = dec["dec"] + start_says(rnn, walk, cfg.span)
    return dict(loss=cfg.lambda_mse * mse + cfg.lambda_dec * dec["dec"], mse=mse) | dec, made


def start_says(rnn: RNN, walk: Walk, span: int) -> Tensor:
    """Ours: nats of y_0 said by m_0, in those spans that begin with it, as a part of the mean over
    all updates: a scalar. m_0 stays and no span makes it, but the readout moves."""
    new = (walk.t == 1).nonzero()[:, 0]
    if not len(new):
        return torch.zeros((), device=walk.x.device)
    at, b = on_device(new, walk.x.device), on_device(walk.b[new], walk.x.device)
    said = cross_entropy(rnn.logits(walk.m[at]), walk.y[b, 0])
    return said * len(new) / (len(walk.b) * span)


@torch.no_grad()
def variance_of(encoder: Encoder, x: Tensor, times: Tensor) -> Tensor:
    """Of an entry of the encoder's memories of x (B, T), over sequences and times: a scalar, the
    unit of Eq. 6."""
    # One number for the whole run. A variance of every batch would make the loss's weight flicker.
    m = encoder(x, times).float().flatten(0, 1)
    # Memories that collapsed have none; a run shall go on and show it, not divide by 0.
    return m.var(0, correction=0).mean().clamp(min=1e-8)


def sequential_layers(c: ModelConfig, cfg: Config, horizon: int) -> tuple[int, int]:
    """Layers that must run one after another: to set out (the encoder's and the rollout's), and of
    a step (a span, the readout, and the encoder for sequences that are new)."""
    labels = 0 if cfg.spans else c.enc_layers
    return (c.enc_layers + (horizon - 1) * c.update_layers,
            cfg.span * c.update_layers + c.dec_layers + labels)


def kept(walk: Walk) -> dict[str, Tensor]:
    """What a checkpoint keeps of a walk. Labels are many, and can be made again."""
    return {k: getattr(walk, k) for k in ("x", "y", "starts", "i", "m")}


@torch.no_grad()
def resumed(kept: dict[str, Tensor], encoder: Encoder, B: int, T: int, span: int,
            device: str) -> Walk:
    """The walk that a checkpoint kept. Raises CheckpointError where it is none of this run's."""
    c, G = encoder.c, spans_in(T, span)
    shapes = dict(x=(B, T), y=(B, T), starts=(B, G), i=(B,), m=(B, c.mem_tokens, c.mem_dim))
    bounds = dict(x=(0, c.vocab), y=(-1, c.n_out), starts=(1, T - span + 1), i=(0, G))
    if {k: tuple(v.shape) for k, v in kept.items()} != shapes or not all(
            kept[k].dtype == torch.int64 and a <= kept[k].min() and kept[k].max() < b
            for k, (a, b) in bounds.items()):
        raise CheckpointError("the sequences under way are not those of its config; start again")
    x, y, m = (kept[k].to(device) for k in ("x", "y", "m"))
    with autocast(device):
        labels = labels_of(encoder, x, kept["i"])
    return Walk(x, y, labels, kept["starts"], torch.arange(B), kept["i"], m)


def demand_teacher(ckpt: dict | None) -> None:
    """Refuse a run without one. Raises UserError."""
    if ckpt is None:
        fail("--ckpt is missing; give a checkpoint of smt.py, such as runs/smt-glyphs/ckpt.pt")
    if "encoder" not in ckpt or "rnn" not in ckpt:
        fail(f"--ckpt {ckpt['path']} holds no encoder (it is from {ckpt['script']}.py); "
             "give one of smt.py")
    if ckpt["script"] == "bptt":
        fail(f"--ckpt {ckpt['path']} is from bptt.py, which has trained m_0; labels begin with the "
             "encoder's; give one of smt.py or dmt.py")


def teacher_and_rnn(ckpt: dict, device: str) -> tuple[dict, list]:
    """Networks of a checkpoint by name, the teacher frozen, and the parameters that DMT trains."""
    names = [name for name in ("encoder", "decoder", "rnn", "heads") if name in ckpt]
    nets = {name: net.to(device) for name, net in zip(names, build(ckpt, *names))}
    rnn = nets["rnn"]
    for p in (*nets["encoder"].parameters(), *nets["decoder"].parameters(), rnn.m0):
        p.requires_grad_(False)  # the teacher stays as it is
    # One group: the paper clips the gradients of updater and readout together.
    trained = [rnn.updater, rnn.readout, *(net for name, net in nets.items() if name == "heads")]
    return nets, [[p for net in trained for p in net.parameters()]]


def main(argv) -> None:
    cfg, ckpt = flags.parse("dmt", Config, argv, __doc__)
    demand_teacher(ckpt)
    if cfg.shortest:
        cfg.shortest = 0  # they go on side by side: all have the full length
    device, task = trainer.setup(cfg, ckpt)
    nets, trained = teacher_and_rnn(ckpt, device)
    encoder, decoder, rnn, heads = (nets.get(k) for k in ("encoder", "decoder", "rnn", "heads"))
    c = rnn.c
    T = min(task.T, c.ctx_len) if c.encoder == "causal" else task.T            # labels: t < T
    flags.demand_fits(cfg, T, argv)
    cfg.span = min(cfg.span, T - 1)
    # 64 sequences will do for a unit. Seed 0, so that a resumed run finds the same one.
    variance = variance_of(encoder, task.batch(64, torch.Generator().manual_seed(0))[0],
                           torch.arange(T))

    mine = ranks.share(cfg)  # cfg; under torchrun with this process's part of the batch
    run = trainer.Run("dmt", cfg, nets, trained, c, task, device)
    walk = resumed(run.kept, encoder, mine.batch_size, T, cfg.span, device) if run.kept else None
    while run.unfinished():
        run.set_learning_rate()
        horizon = min(cfg.horizon, T) or horizon_at(run.progress, T)
        layers_to_set_out, layers = sequential_layers(c, cfg, horizon)
        if walk is None or cfg.spans:
            batch = [v[:, :T] for v in task.batch(mine.batch_size, run.gen)]
            walk = begin(batch, encoder, rnn, horizon, mine, run.gen)
            run.count(cfg.batch_size * T, layers_to_set_out)
        with autocast(device):
            losses, made = objective(rnn, heads, walk, variance, mine, run.gen, task.density(T))
        losses["loss"].backward()
        new = 0 if cfg.spans else go_on(walk, made, task, encoder, horizon, run.gen)
        run.update(losses, new * T * ranks.WORLD, layers)

        if run.time_to_evaluate() or run.time_to_save():
            with run.averaged():
                # Before report(), which saves when it is the first to write over an old run. Nobody
                # keeps what other processes have under way: they set out anew.
                run.kept = {} if cfg.spans or ranks.WORLD > 1 else kept(walk)
                if run.time_to_evaluate():
                    got = evaluate(task, rnn, encoder, decoder, "val", cfg.n_val, fast=True)
                    run.report(summary(got), best="rollout")
                    draw_samples(cfg.out_dir, task, rnn, n=min(40, cfg.n_val))
                if run.time_to_save():
                    run.save()
    run.finish("evaluate.py", "sample.py")


if __name__ == "__main__":
    cli(main)
