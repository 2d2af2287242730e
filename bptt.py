"""The baseline: the same RNN and readout, trained by backpropagation through time.

    python bptt.py --dataset mnist
    python bptt.py --dataset mnist --truncate 32              # gradients cross at most 32 steps
    python bptt.py --dataset mnist --image_size 28 --recompute 28   # memory O(sqrt(T)) for one more rollout
    python bptt.py --init runs/dmt-mnist/ckpt.pt --lr 1e-3 --minutes 5  # post-training of an SMT or DMT checkpoint

Writes runs/bptt-<dataset>.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flags
import trainer
from console import cli, fail
from evaluate import evaluate, networks, summary
from flags import flag
from model import RNN, cross_entropy
from sample import draw_samples


@dataclass(kw_only=True)
class Config(flags.Config):
    truncate: int = flag("steps a gradient may cross; 0 = all of them")
    recompute: int = flag("keep every so many-th memory, compute the rest again; 0 = keep all")
    init: str = flag("checkpoint to start from; empty = from scratch", default="")


def objective(rnn: RNN, m: Tensor | None, x: Tensor, y: Tensor, t: int,
              recompute: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Cross-entropy of the readout along a rollout (Eq. 1) with its whole graph.

    m (B, K, d) is m_{t-1}, or None at t = 0, where m_0 stands for "BOS was read"; x, y (B, S) int64 are
    x_t .. x_{t+S-1} and their targets. Returns named scalars and the last memory (B, K, d).
    """
    own = []
    if m is None:
        m = rnn.start(len(x))
        own, x, t = [m[:, None]], x[:, 1:], t + 1
    for part in x.split(recompute or x.shape[1], dim=1) if x.shape[1] else ():  # with BOS alone there is no update
        own.append(checkpoint(rnn.rollout, m, part, t, use_reentrant=False) if recompute else rnn.rollout(m, part, t))
        m, t = own[-1][:, -1], t + part.shape[1]
    own = torch.cat(own, dim=1)                                                 # (B, S, K, d)
    loss = cross_entropy(rnn.logits(own), y)
    return dict(loss=loss), own[:, -1]


def main(argv=None) -> None:
    cfg, ckpt = flags.parse("bptt", Config, argv, __doc__, unused=("encoder", "enc_layers", "ctx_len", "fut_len"))
    device, task = trainer.setup(cfg, ckpt)
    if ckpt:
        rnn, encoder, decoder = networks(ckpt, device)
        if rnn is None:
            fail(f"--init {cfg.init} holds no RNN (it is from {ckpt['script']}.py); give one of smt.py, dmt.py or "
                       "bptt.py")
        c = rnn.c
    else:
        c = trainer.model_config(cfg, task)
        rnn, encoder, decoder = RNN(c).to(device), None, None
    nets = {k: v for k, v in dict(encoder=encoder, decoder=decoder, rnn=rnn).items() if v is not None}
    run = trainer.Run(
        cfg, "bptt", nets, [[*rnn.parameters()]], c, task, device, select="rollout",
        validate=lambda: summary(evaluate(task, rnn, encoder, decoder, "val", cfg.n_val, kl_sequences=16)),
        draw=lambda out_dir: draw_samples(out_dir, task, rnn, n=min(40, cfg.n_val)))
    span = cfg.truncate or task.T
    for step in run.loop():
        x, y = task.batch(cfg.batch_size, run.gen)
        m, targets = None, (y >= 0).sum().clamp(min=1)
        for t in range(0, task.T, span):
            part = y[:, t:t + span]
            with trainer.autocast(device):
                losses, m = objective(rnn, m, x[:, t:t + span], part, t, cfg.recompute)
            run.backward(losses, (part >= 0).sum() / targets)
            m = m.detach()
        run.update()
    print(f"next: python evaluate.py --ckpt {run.path('ckpt.pt')} and python sample.py --ckpt {run.path('ckpt.pt')}")


if __name__ == "__main__":
    cli(main)
