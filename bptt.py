"""The baseline: the same RNN and readout, trained by backpropagation through time.

    python bptt.py --dataset mnist
    python bptt.py --dataset mnist --truncate 32              # gradients cross at most 32 steps
    python bptt.py --dataset mnist --image_size 28 --recompute 28   # memory O(sqrt(T))
    python bptt.py --init runs/dmt-mnist/ckpt.pt --lr 1e-3 --minutes 5  # goes on from SMT or DMT

Writes runs/bptt-<dataset>.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, fail
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flags
import ranks
import trainer
from checkpoints import build
from evaluate import evaluate, networks, summary
from flags import flag
from losses import cross_entropy, predictive
from model import RNN, Heads, ModelConfig, autocast
from sample import draw_samples


@dataclass(kw_only=True)
class Config(flags.Config):
    truncate: int = flag("steps a gradient may cross; 0 = all of them")
    first: float = flag("part of the memories whose y_t is decoded; 1 = all, the usual way")
    lambda_heads: float = flag("weight of linear heads that guess the next targets; 0 = none")
    recompute: int = flag("keep every so many-th memory, compute the rest again; 0 = keep all")
    init: str = flag("checkpoint to start from; empty = from scratch", default="")


def unroll(rnn: RNN, m: Tensor | None, x: Tensor, t: int, recompute: int = 0) -> Tensor:
    """The RNN's own memories of x (B, S) int64, which are x_t .. x_{t+S-1}, with their whole graph:
    (B, S, K, d). m (B, K, d) is m_{t-1}, or None at t = 0, where m_0 stands for "BOS was read"."""
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
    return torch.cat(own, dim=1)


def few_targets(density: float, T: int) -> bool:
    """More times than the first, BOS, have no target."""
    return density * T < T - 1.5


def objective(rnn: RNN, heads: Heads | None, own: Tensor, x: Tensor, y: Tensor, t: int, cfg,
              gen: torch.Generator, density: float = 1.0) -> dict[str, Tensor]:
    """Cross-entropy of the readout on memories own (B, S, K, d) of times t .. t+S-1 (Eq. 1), of
    sequences x, y (B, T) int64; or what SMT and DMT ask instead (losses.predictive). Where few
    times have a target only those are read out, as there; in pieces, --truncate, all. Named
    scalars."""
    asked = few_targets(density, y.shape[1]) and not cfg.truncate
    if cfg.first < 1 or heads is not None or asked:
        when = (t + torch.arange(own.shape[1], device=x.device)).expand(len(x), -1)
        dec = predictive(rnn.readout, heads, own, when, x, y, cfg, gen, density)
        return dict(loss=dec.pop("dec")) | dec
    # Only the updates had to wait for each other: all memories are read out at once, or with
    # --recompute in parts, which keep less than the whole rollout did.
    part = cfg.recompute or own.shape[1]
    read = [checkpoint(rnn.logits, m, use_reentrant=False) if cfg.recompute else rnn.logits(m)
            for m in own.split(part, dim=1)]
    return dict(loss=cross_entropy(torch.cat(read, dim=1), y[:, t:t + own.shape[1]]))


def sequential_layers(c: ModelConfig, T: int) -> int:
    """Layers of one step that must run one after another: those of T - 1 updates (m_0 needs none)
    and of the readout. What --recompute does twice is counted once."""
    return (T - 1) * c.update_layers + c.dec_layers


def begin(cfg: Config, ckpt: dict | None, task, device: str) -> tuple[dict, ModelConfig]:
    """Networks by name, new ones or those of --init: the RNN, heads where --lambda_heads wants
    them, and a checkpoint's teacher, which is carried along untrained, so that evaluate.py still
    says how far the RNN is from it. Raises UserError where a checkpoint has no RNN."""
    if ckpt:
        rnn, encoder, decoder = networks(ckpt, device)
        if rnn is None:
            fail(f"--init {ckpt['path']} holds no RNN (it is from {ckpt['script']}.py); "
                 "give one of smt.py, dmt.py or bptt.py")
    else:
        rnn, encoder, decoder = RNN(trainer.model_config(cfg, task)).to(device), None, None
    c = dataclasses.replace(rnn.c, past=0)  # nobody asks for it here
    heads = Heads(c).to(device) if cfg.lambda_heads and c.heads else None
    if heads is not None and ckpt and "heads" in ckpt:
        heads.linear = build(ckpt, "heads")[0].linear.to(device)  # they know these memories
    nets = dict(encoder=encoder, decoder=decoder, rnn=rnn, heads=heads)
    return {name: net for name, net in nets.items() if net is not None}, c


def demand_targets(cfg: Config, task) -> None:
    """Refuse pieces that ask heads, or a part of their memories, where few times have a target.
    Raises UserError."""
    # pieces are weighed by their targets, and those without any would ask heads for nothing
    few = few_targets(task.density(task.T), task.T)
    if cfg.truncate and (cfg.first < 1 or cfg.lambda_heads) and few:
        fail("--truncate with --lambda_heads, or --first below 1, needs targets at all times, "
             f"and {cfg.dataset} has fewer; leave one of them out")


def main(argv) -> None:
    # The encoder's flags would be accepted and forgotten: nobody makes labels here.
    cfg, ckpt = flags.parse("bptt", Config, argv, __doc__,
                            unused=("encoder", "enc_layers", "ctx_len", "fut_len", "past"))
    device, task = trainer.setup(cfg, ckpt)
    flags.demand_fits(cfg, task.T, argv)
    demand_targets(cfg, task)
    nets, c = begin(cfg, ckpt, task, device)
    rnn, heads = nets["rnn"], nets.get("heads")
    trained = [p for net in (rnn, heads) if net is not None for p in net.parameters()]

    mine = ranks.share(cfg)  # all of it, but under torchrun
    run = trainer.Run("bptt", cfg, nets, [trained], c, task, device)
    while run.unfinished():
        run.set_learning_rate()
        x, y = task.batch(mine.batch_size, run.gen)                          # (B, T) each
        m, means, targets = None, {}, (y >= 0).sum().clamp(min=1)
        # Backward after each piece: with --truncate the graph of one piece is all that is kept.
        T = x.shape[1]
        span = cfg.truncate or T
        for t in range(0, T, span):
            with autocast(device):
                own = unroll(rnn, m, x[:, t:t + span], t, cfg.recompute)
                losses = objective(rnn, heads, own, x, y, t, cfg, run.gen, task.density(T))
            # Pieces have different numbers of targets. Weighed by them, the losses add up to the
            # mean over all targets, whatever the pieces are.
            share = (y[:, t:t + span] >= 0).sum() / targets
            (losses["loss"] * share).backward()
            # The memory goes on to the next piece, its graph does not.
            m = own[:, -1].detach()
            means = {k: means.get(k, 0.0) + v.detach() * share for k, v in losses.items()}
        run.update(means, cfg.batch_size * T, sequential_layers(c, T))

        if run.time_to_evaluate() or run.time_to_save():
            with run.averaged():
                if run.time_to_evaluate():
                    # the teacher is evaluate.py's: it would take longer than the RNN
                    got = evaluate(task, rnn, None, None, "val", cfg.n_val, fast=True)
                    run.report(summary(got), best="rollout")
                    draw_samples(cfg.out_dir, task, rnn, n=min(40, cfg.n_val))
                if run.time_to_save():
                    run.save()
    run.finish("evaluate.py", "sample.py")


if __name__ == "__main__":
    cli(main)
