"""DAgger Memory Training (Eq. 6): teach an SMT-trained RNN on the memories it really has, its own.

    python dmt.py --ckpt runs/smt-mnist/ckpt.pt
    python dmt.py --ckpt runs/smt-mnist/ckpt.pt --span 1         # no gradient through time at all
    python dmt.py --ckpt runs/smt-mnist/ckpt.pt --preset paper   # the paper's loss

One round: the RNN runs on its own memories, without a graph; the frozen encoder says where it
should have been. Then a few optimiser steps learn from random spans of the round, in parallel over
time: from its own m_{t-1} the RNN makes --span updates, and what it makes shall be the encoder's
(Eq. 6) and predict (Eq. 2). A gradient crosses one span at most. Writes runs/dmt-<dataset>.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, fail
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import flags
import ranks
import trainer
from evaluate import evaluate, summary
from flags import flag
from losses import predictive
from model import RNN, Encoder, Heads, ModelConfig, autocast, build, on_device
from sample import draw_samples


@dataclass(kw_only=True)
class Config(flags.Config):
    ckpt: str = flag("checkpoint of smt.py (or of dmt.py) to start from; required", default="")
    span: int = flag("updates in a row that a gradient crosses; the paper: 1")
    spans: int = flag("spans an optimiser step learns from")
    lambda_mse: float = flag("weight of Eq. 6, in units of the labels' variance")
    lambda_dec: float = flag("weight of the predictions, Eq. 2, read by the readout")
    detach_dec: bool = flag("predictions teach the readout alone; the paper: yes")
    futures: int = flag("spans whose last memory must predict its future; the paper: 0")
    lambda_fut: float = flag("weight of these futures within Eq. 2; the paper: 1")
    first: float = flag("part of the memories that must predict y_t alone; the paper: 1")
    horizon: int = flag("updates the RNN runs alone; 0 = from 16 to all of them")
    sweeps: bool = flag("find the own memories by sweeps over all times at once")
    tube: float = flag("an error of so many variances puts the RNN on its label; 0 = never")
    reuse: int = flag("times a round is learnt from; 0 = for one step, the paper")


def horizon_at(progress: float, most: int) -> int:
    """Curriculum: 16 updates at first, growing geometrically to `most` when 60 % of the run is
    done."""
    # After SMT the RNN drifts more with every update; far from its labels there is little to learn.
    # The last 40 % are for whole rollouts, which is what counts.
    return min(most, round(16 * (most / 16) ** min(1.0, progress / 0.6)))


def choose_spans(n: int, T: int, span: int, reuse: int, gen: torch.Generator) -> Tensor:
    """The spans of a round of n sequences, in random order: sequence and time of the first update
    (N, 2) int64. Spans of a sequence lie side by side behind a random offset; one that would reach
    over an end is pushed inside. So every transition is learnt from, those near an end up to twice:
    there some tasks ask. `reuse` times, with another offset each time."""
    out = []
    for _ in range(max(1, reuse)):
        # Without an offset no span would ever begin elsewhere than at 1, 1 + span, 1 + 2 span ..
        offset = torch.randint(min(span, T - span), (n, 1), generator=gen)
        t = 1 - offset + span * torch.arange(T // span + 2)                     # (n, many)
        b, inside = torch.arange(n)[:, None].expand_as(t), t < T
        spans = torch.stack([b, t.clamp(1, T - span)], -1)[inside]
        out.append(spans[torch.randperm(len(spans), generator=gen)])
    return torch.cat(out)


def steps_of_round(spans: Tensor, cfg: Config) -> tuple[Tensor, ...]:
    """The spans (N, 2) of a round, --spans of them a step. One step with --reuse 0, the paper.

    Otherwise many: the round's rollout is T updates in a row, the dearest part, and makes many more
    transitions than a step needs. They age a little until the next round.
    """
    # Whole steps only: the gradient of a last one with few spans would be noise.
    steps = max(1, ranks.least(len(spans) // cfg.spans)) if cfg.reuse else 1
    return spans[:steps * cfg.spans].split(cfg.spans)


def objective(rnn: RNN, heads: Heads | None, own: Tensor, labels: Tensor, x: Tensor, y: Tensor,
              b: Tensor, t: Tensor, variance: Tensor, cfg: Config, gen: torch.Generator,
              density: float = 1.0) -> dict[str, Tensor]:
    """Eq. 6 and Eq. 2 on N spans -> named scalars. Span i begins with the update at time t (N,) of
    sequence b (N,) of x, y (B, T), from the RNN's own memory there; own, labels (B, T, K, d)."""
    when = t[:, None] + torch.arange(cfg.span, device=t.device)                 # (N, S)
    # The memory that a span begins with is a number, not a graph: there the gradient ends.
    at = b[:, None], when
    made = rnn.rollout(own[b, t - 1], x[at], t)                                 # (N, S, K, d)
    mse = F.mse_loss(made.float(), labels[at].float()) / variance   # Eq. 6; 1 = the mean's error
    # The paper's way: predictions teach the readout to read, and the updater learns from Eq. 6
    # alone.
    read = made.detach() if cfg.detach_dec else made
    dec = predictive(rnn.readout, heads, read, when, x[b], y[b], cfg, gen, density,
                     ends=True)                                                 # Eq. 2
    return dict(loss=cfg.lambda_mse * mse + cfg.lambda_dec * dec["dec"], mse=mse) | dec


@torch.no_grad()
def variance_of(encoder: Encoder, x: Tensor, times: Tensor) -> Tensor:
    """Of an entry of the encoder's memories of x (B, T), over sequences and times: a scalar, the
    unit of Eq. 6 and of the tube."""
    # One number for the whole run. A variance of every batch would make the loss's weight flicker.
    m = encoder(x, times).float().flatten(0, 1)
    # Memories that collapsed have none; a run shall go on and show it, not divide by 0.
    return m.var(0, correction=0).mean().clamp(min=1e-8)


def sequential_layers(c: ModelConfig, cfg: Config, horizon: int) -> tuple[int, int]:
    """Layers that must run one after another: of a round (the encoder's and the rollout's), and of
    each of its steps (a span and the readout)."""
    return (c.enc_layers + (horizon - 1) * c.update_layers,
            cfg.span * c.update_layers + c.dec_layers)


def demand_teacher(ckpt: dict | None) -> None:
    """Refuse a run without one. Raises UserError."""
    if ckpt is None:
        fail("--ckpt is missing; give a checkpoint of smt.py, such as runs/smt-glyphs/ckpt.pt")
    if "encoder" not in ckpt or "rnn" not in ckpt:
        fail(f"--ckpt {ckpt['path']} holds no encoder (it is from {ckpt['script']}.py); "
             "give one of smt.py")


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
    device, task = trainer.setup(cfg, ckpt)
    nets, trained = teacher_and_rnn(ckpt, device)
    encoder, decoder, rnn, heads = (nets.get(k) for k in ("encoder", "decoder", "rnn", "heads"))
    c = rnn.c
    most = min(task.T, c.ctx_len) if c.encoder == "causal" else task.T         # labels: t < most
    # 64 sequences will do for a unit. Seed 0, so that a resumed run finds the same one.
    x, _ = task.batch(64, torch.Generator().manual_seed(0))
    variance = variance_of(encoder, x[:, :most], torch.arange(min(x.shape[1], most)))
    tube = (cfg.tube or math.inf) * float(variance)

    mine = ranks.share(cfg)  # all of it, but under torchrun
    run = trainer.Run("dmt", cfg, nets, trained, c, task, device)
    while run.unfinished():
        # a round: the RNN's own memories, and where the encoder says they should have been
        x, y = (v[:, :most] for v in task.batch(mine.batch_size, run.gen))
        T = x.shape[1]
        times, mine.span = torch.arange(T), min(cfg.span, T - 1)
        horizon = min(cfg.horizon, T) or horizon_at(run.progress, T)
        with torch.no_grad(), autocast(device):
            labels = encoder(x, times)                                          # (B, T, K, d)
            own = rnn.own_memories(labels, x, times, horizon, run.gen, cfg.sweeps, tube)
        # Counted apart: the rollout is sequential, and its steps are few layers each.
        layers_of_round, layers_of_step = sequential_layers(c, mine, horizon)
        run.count(cfg.batch_size * T, layers_of_round)

        # the steps that learn from it: random spans, in parallel over time
        todo = on_device(choose_spans(len(x), T, mine.span, cfg.reuse, run.gen), device)
        for pick in steps_of_round(todo, mine):
            run.set_learning_rate()
            with autocast(device):
                losses = objective(rnn, heads, own, labels, x, y, *pick.unbind(1), variance, mine,
                                   run.gen, task.density(T))
            losses["loss"].backward()
            run.update(losses, layers=layers_of_step)
            if run.done:
                break

        # Only here, between rounds: a resumed run begins with a new round, and to be the run that
        # was never interrupted it must not lose the rest of an old one.
        if run.time_to_evaluate() or run.time_to_save():
            with run.averaged():
                if run.time_to_evaluate():
                    got = evaluate(task, rnn, encoder, decoder, "val", cfg.n_val, kl_sequences=16,
                                   fast=True)
                    run.report(summary(got), best="rollout")
                    draw_samples(cfg.out_dir, task, rnn, n=min(40, cfg.n_val))
                if run.time_to_save():
                    run.save()
    run.finish("evaluate.py", "sample.py")


if __name__ == "__main__":
    cli(main)
