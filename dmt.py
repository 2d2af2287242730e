"""DAgger Memory Training (Eq. 6): teach an SMT-trained RNN on the memories it really has, its own.

    python dmt.py --ckpt runs/smt-mnist/ckpt.pt
    python dmt.py --ckpt runs/smt-mnist/ckpt.pt --detach_dec --lambda_mse 10     # the paper's loss
    python dmt.py --ckpt runs/smt-mnist/ckpt.pt --rollout parallel --horizon 4

One round: the RNN runs on its own memories, without a graph; the frozen encoder says where it
should have been. Then a few optimiser steps learn from random pairs (own m_{t-1}, x_t) of the
round, in parallel over time: the new memory shall be the encoder's m_t (Eq. 6), and it shall
predict the future (Eq. 2 on the RNN's memory). No gradient goes back further than the one update
in question. Writes runs/dmt-<dataset>.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import flags
import trainer
from console import cli, fail
from evaluate import evaluate, summary
from flags import flag
from model import RNN, Decoder, Encoder, ModelConfig, autocast, build, cross_entropy, futures
from sample import draw_samples


@dataclass(kw_only=True)
class Config(flags.Config):
    ckpt: str = flag("checkpoint of smt.py (or of dmt.py) to start from; required", default="")
    lambda_dec: float = flag("weight of Eq. 2 on the RNN's own memories, read by its readout")
    detach_dec: bool = flag("the gradient of that loss stays in the readout")
    lambda_kl: float = flag("weight of the KL of the decoder's futures")
    lambda_mse: float = flag("weight of Eq. 6, in units of the labels' variance")
    tube: float = flag("error, in that unit, that puts the RNN back on its label; 0 = never")
    pairs: int = flag("transitions an optimiser step regresses on")
    decode: int = flag("of these, how many futures are decoded; 0 = all")
    horizon: int = flag("steps the RNN runs alone, growing to this; 0 = the sequence")
    rollout: str = flag("step by step, or `horizon` sweeps over all times at once",
                        choices=("sequential", "parallel"))


def horizon_at(done: float, most: int) -> int:
    """Curriculum: 16 steps at first, growing geometrically to `most` when 60 % of the run is
    done."""
    return min(most, round(16 * (most / 16) ** min(1.0, done / 0.6)))


@torch.no_grad()
def own_memories(rnn: RNN, labels: Tensor, x: Tensor, horizon: int, offset: int, mode: str,
                 most: float) -> Tensor:
    """The RNN's own memories, never further than `horizon` updates from an encoder's: (B, T, K, d).

    labels (B, T, K, d) are the encoder's memories of x (B, T). sequential: every sequence is cut at
    the times t = offset (mod horizon); there, and at t = 0, the memory is the encoder's, and from
    there the RNN runs alone, all pieces at once. parallel: `horizon` Jacobi sweeps
    m_t <- f(m_{t-1}, x_t) over all times, from the encoder's; T - 1 sweeps are the exact rollout
    from m_0.

    A memory with a mean square error above `most` is put back on the label (the tube): it has lost
    what the label holds, no later input brings that back, and a pair that starts there would teach
    the RNN to forget.
    """
    B, T = x.shape
    own = labels.clone()

    def step(m: Tensor, x_now: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """m, label (B, n, K, d), x_now (B, n), t (n,) -> (B, n, K, d)."""
        m = rnn.update(m.flatten(0, 1), x_now.flatten(), t.repeat(B)).view_as(label).to(label.dtype)
        lost = (m - label).square().mean((2, 3), keepdim=True) > most
        return torch.where(lost, label, m)

    if mode == "parallel":
        t = torch.arange(1, T, device=x.device)
        for _ in range(min(horizon, T - 1)):
            own[:, 1:] = step(own[:, :-1], x[:, 1:], t, labels[:, 1:])
        return own
    for age in range(1, horizon):
        first = (offset + age) % horizon or horizon     # times t >= 1 with t - offset = age
        t = torch.arange(first, T, horizon, device=x.device)
        if len(t):
            own[:, first::horizon] = step(own[:, first - 1:T - 1:horizon], x[:, t], t,
                                          labels[:, first::horizon])
    return own


def objective(decoder: Decoder, rnn: RNN, m_own: Tensor, x_now: Tensor, t: Tensor, m_label: Tensor,
              x_fut: Tensor, y_fut: Tensor, variance: Tensor, cfg: Config) -> dict[str, Tensor]:
    """Eq. 6, and Eq. 2 on the RNN's memory, on N pairs. Named scalars.

    Own memory m_own = m_{t-1} (N, K, d) and x_now = x_t (N,) at t (N,) should give the encoder's
    m_label = m_t (N, K, d) and predict y_fut (N, Tf) given x_fut (N, Tf-1), the futures of t.
    """
    m = rnn.update(m_own.detach(), x_now, t)
    mse = F.mse_loss(m.float(), m_label.float()) / variance     # Eq. 6; 1 = no better than the mean

    # The future as Eq. 2 asks for it, predicted from the RNN's memory by its own readout. The
    # gradient reaches the one update that made m, and the readout learns to read what the RNN
    # writes.
    some = slice(cfg.decode or len(m))                                  # pairs come in random order
    m, m_label, x_fut, y_fut, t = m[some], m_label[some], x_fut[some], y_fut[some], t[some]
    logits = rnn.readout(m.detach() if cfg.detach_dec else m, x_fut, t)
    dec = cross_entropy(logits, y_fut)
    loss = cfg.lambda_mse * mse + cfg.lambda_dec * dec
    named = dict(mse=mse, dec=dec)

    # Two memories are equal when they predict the same future: KL(encoder's || RNN's) through the
    # frozen decoder
    if cfg.lambda_kl:
        with torch.no_grad():
            p = decoder(m_label, x_fut, t).float().log_softmax(-1)
        q = decoder(m, x_fut, t).float().log_softmax(-1)
        valid = y_fut >= 0
        each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        named["kl"] = (each * valid).sum() / valid.sum().clamp(min=1)
        loss = loss + cfg.lambda_kl * named["kl"]
    return dict(loss=loss) | named


@torch.no_grad()
def variance_of(encoder: Encoder, x: Tensor, times: Tensor) -> Tensor:
    """Of an entry of the encoder's memories of x (B, T), over sequences and times: a scalar, the
    unit of Eq. 6 and of the tube."""
    m = encoder(x, times).float().flatten(0, 1)
    return m.var(0, correction=0).mean().clamp(min=1e-8)


def sequential_layers(c: ModelConfig, cfg: Config, horizon: int) -> tuple[int, int]:
    """Layers that must run one after another: of a round (the encoder's and the rollout's), and of
    each of its steps (one update and the readout)."""
    updates = min(horizon, c.T - 1) if cfg.rollout == "parallel" else min(horizon, c.T) - 1
    return c.enc_layers + updates * c.update_layers, c.update_layers + c.dec_layers


def demand_teacher(ckpt: dict | None) -> None:
    """Refuse a run without one. Raises UserError."""
    if ckpt is None:
        fail("--ckpt is missing; give a checkpoint of smt.py, such as runs/smt-glyphs/ckpt.pt")
    if "encoder" not in ckpt or "rnn" not in ckpt:
        fail(f"--ckpt {ckpt['path']} holds no encoder (it is from {ckpt['script']}.py); "
             "give one of smt.py")


def main(argv) -> None:
    cfg, ckpt = flags.parse("dmt", Config, argv, __doc__)
    demand_teacher(ckpt)
    device, task = trainer.setup(cfg, ckpt)
    encoder, decoder, rnn = (net.to(device) for net in build(ckpt, "encoder", "decoder", "rnn"))
    for p in (*encoder.parameters(), *decoder.parameters(), rnn.m0):
        p.requires_grad_(False)  # the teacher stays as it is; updater and readout learn
    nets = dict(encoder=encoder, decoder=decoder, rnn=rnn)
    trained = [[*rnn.updater.parameters()], [*rnn.readout.parameters()]]
    c = rnn.c
    T = min(task.T, c.ctx_len) if c.encoder == "causal" else task.T            # labels: t < T
    times = torch.arange(T)
    x, _ = task.batch(64, torch.Generator().manual_seed(0))
    variance = variance_of(encoder, x, times)
    tube = (cfg.tube or math.inf) * float(variance)
    steps_a_round = max(1, cfg.batch_size * (T - 1) // cfg.pairs)  # every pair is used once

    run = trainer.Run("dmt", cfg, nets, trained, c, task, device)
    while run.unfinished():
        # a round: the RNN's own memories, and where the encoder says they should have been
        x, y = (v[:, :T] for v in task.batch(cfg.batch_size, run.gen))
        horizon = horizon_at(run.progress, min(cfg.horizon or T, T))
        offset = int(torch.randint(horizon, (1,), generator=run.gen)) if horizon < T else 0
        with torch.no_grad(), autocast(device):
            labels = encoder(x, times)                                          # (B, T, K, d)
            own = own_memories(rnn, labels, x, horizon, offset, cfg.rollout, tube)
            x_fut, y_fut = futures(x, y, times, c.fut_len)
        layers_of_round, layers_of_step = sequential_layers(c, cfg, horizon)
        run.count(x.numel(), layers_of_round)

        # the steps that learn from it: random pairs, in parallel over time
        order = torch.randperm(len(x) * (T - 1), generator=run.gen)
        for pick in order.split(cfg.pairs)[:steps_a_round]:
            run.set_learning_rate()
            b, t = (v.to(device) for v in (pick // (T - 1), pick % (T - 1) + 1))
            with autocast(device):
                losses = objective(decoder, rnn, own[b, t - 1], x[b, t], t, labels[b, t],
                                   x_fut[b, t], y_fut[b, t], variance, cfg)
            losses["loss"].backward()
            run.update(losses, layers=layers_of_step)
            if run.done:
                break

        # Only here, between rounds: a resumed run begins with a new round, and to be the run that
        # was never interrupted it must not lose the rest of an old one.
        if run.time_to_evaluate() or run.time_to_save():
            with run.averaged():
                if run.time_to_evaluate():
                    got = evaluate(task, rnn, encoder, decoder, "val", cfg.n_val, kl_sequences=16)
                    run.report(summary(got), best="rollout")
                    draw_samples(cfg.out_dir, task, rnn, n=min(40, cfg.n_val))
                if run.time_to_save():
                    run.save()
    run.finish()
    print(f"next: python evaluate.py --ckpt {run.path('ckpt.pt')} and "
          f"python sample.py --ckpt {run.path('ckpt.pt')}")


if __name__ == "__main__":
    cli(main)
