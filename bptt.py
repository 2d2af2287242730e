"""The baseline: the same RNN and readout, trained by backpropagation through time.

    python bptt.py --dataset mnist
    python bptt.py --dataset mnist --truncate 32              # gradients cross at most 32 steps
    python bptt.py --dataset mnist --image_size 28 --recompute 28   # memory O(sqrt(T))
    python bptt.py --init runs/dmt-mnist/ckpt.pt --lr 1e-3 --minutes 5  # goes on from SMT or DMT

Writes runs/bptt-<dataset>.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, fail
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flags
import ranks
import trainer
from evaluate import evaluate, networks, summary
from flags import flag
from losses import cross_entropy
from model import RNN, ModelConfig, autocast
from sample import draw_samples


@dataclass(kw_only=True)
class Config(flags.Config):
    truncate: int = flag("steps a gradient may cross; 0 = all of them")
    recompute: int = flag("keep every so many-th memory, compute the rest again; 0 = keep all")
    init: str = flag("checkpoint to start from; empty = from scratch", default="")


def objective(rnn: RNN, m: Tensor | None, x: Tensor, y: Tensor, t: int,
              recompute: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Cross-entropy of the readout along a rollout (Eq. 1) with its whole graph.

    m (B, K, d) is m_{t-1}, or None at t = 0, where m_0 stands for "BOS was read"; x, y (B, S) int64
    are x_t .. x_{t+S-1} and their targets. Returns named scalars and the last memory (B, K, d).
    """
    own = []
    # m_0 has read BOS, which is x_0: the first update reads x_1.
    if m is None:
        m = rnn.start(len(x))
        own, x, t = [m[:, None]], x[:, 1:], t + 1
    # With --recompute a part keeps only the memory it begins with and runs again in the backward
    # pass. Parts of about sqrt(T) updates need the least memory, for one more rollout.
    parts = x.split(recompute or x.shape[1], dim=1) if x.shape[1] else ()  # BOS alone: no update
    for part in parts:
        own.append(checkpoint(rnn.rollout, m, part, t, use_reentrant=False) if recompute else
                   rnn.rollout(m, part, t))
        m, t = own[-1][:, -1], t + part.shape[1]
    # Only the updates had to wait for each other: all memories are read out at once.
    own = torch.cat(own, dim=1)                                                 # (B, S, K, d)
    if recompute:  # a readout of all memories at once would keep more than the whole rollout
        logits = torch.cat([checkpoint(rnn.logits, part, use_reentrant=False)
                            for part in own.split(recompute, dim=1)], dim=1)
    else:
        logits = rnn.logits(own)
    loss = cross_entropy(logits, y)
    return dict(loss=loss), own[:, -1]


def sequential_layers(c: ModelConfig, T: int) -> int:
    """Layers of one step that must run one after another: those of T - 1 updates (m_0 needs none)
    and of the readout. What --recompute does twice is counted once."""
    return (T - 1) * c.update_layers + c.dec_layers


def demand_rnn(rnn: RNN | None, ckpt: dict) -> None:
    """Refuse a checkpoint without one. Raises UserError."""
    if rnn is None:
        fail(f"--init {ckpt['path']} holds no RNN (it is from {ckpt['script']}.py); "
             "give one of smt.py, dmt.py or bptt.py")


def main(argv) -> None:
    # The encoder's flags would be accepted and forgotten: nobody makes labels here.
    cfg, ckpt = flags.parse("bptt", Config, argv, __doc__,
                            unused=("encoder", "enc_layers", "ctx_len", "fut_len", "heads",
                                    "past"))
    device, task = trainer.setup(cfg, ckpt)
    if ckpt:
        rnn, encoder, decoder = networks(ckpt, device)
        demand_rnn(rnn, ckpt)
    else:
        rnn, encoder, decoder = RNN(trainer.model_config(cfg, task)).to(device), None, None
    # A checkpoint's teacher is carried along, untrained: evaluations still say how far the RNN is
    # from it.
    nets = {k: v for k, v in dict(encoder=encoder, decoder=decoder, rnn=rnn).items()
            if v is not None}
    c = rnn.c

    mine = ranks.share(cfg)  # all of it, but under torchrun
    run = trainer.Run("bptt", cfg, nets, [[*rnn.parameters()]], c, task, device)
    while run.unfinished():
        run.set_learning_rate()
        x, y = task.batch(mine.batch_size, run.gen)                          # (B, T) each
        m, loss, targets = None, 0.0, (y >= 0).sum().clamp(min=1)
        # Backward after each piece: with --truncate the graph of one piece is all that is kept.
        T = x.shape[1]
        span = cfg.truncate or T
        for t in range(0, T, span):
            part = y[:, t:t + span]
            with autocast(device):
                losses, m = objective(rnn, m, x[:, t:t + span], part, t, cfg.recompute)
            # Pieces have different numbers of targets. Weighed by them, the losses add up to the
            # mean over all targets, whatever the pieces are.
            share = (part >= 0).sum() / targets
            (losses["loss"] * share).backward()
            # The memory goes on to the next piece, its graph does not.
            loss, m = loss + losses["loss"].detach() * share, m.detach()
        run.update(dict(loss=loss), cfg.batch_size * T, sequential_layers(c, T))

        if run.time_to_evaluate() or run.time_to_save():
            with run.averaged():
                if run.time_to_evaluate():
                    got = evaluate(task, rnn, encoder, decoder, "val", cfg.n_val, kl_sequences=4,
                                   fast=True)
                    run.report(summary(got), best="rollout")
                    draw_samples(cfg.out_dir, task, rnn, n=min(40, cfg.n_val))
                if run.time_to_save():
                    run.save()
    run.finish("evaluate.py", "sample.py")


if __name__ == "__main__":
    cli(main)
