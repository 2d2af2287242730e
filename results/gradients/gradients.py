"""How much does the answer's loss say about an early memory? |dL/dm_t| against t on retrieval, at
initialisation.

    python results/gradients/gradients.py

BPTT: L is the cross-entropy of the answer at the last step, and its gradient reaches m_t through
T - 1 - t updates. Shown for each updater with its weight matrices scaled. SMT: L is Eq. 5 with one
term for each t, the decoder's loss on the same answer and the dynamics loss, and m_t is one network
away from it. Draws gradients.png beside this file (Fig. 11).
"""
import os
import sys

import matplotlib
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import data  # noqa: E402
from losses import cross_entropy, futures  # noqa: E402
from model import RNN, UPDATERS, Decoder, Encoder, ModelConfig  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

B, SCALES = 16, (0.5, 1.0, 2.0, 4.0)


def lengths(grads: list[torch.Tensor]) -> list[float]:
    """Mean over sequences of the gradient's norm, one number a time; undoes the mean over the
    batch."""
    return [float(g.flatten(1).norm(dim=1).mean()) * B for g in grads]


def bptt(rnn: RNN, x, y) -> list[float]:
    m, own = rnn.start(B), []
    for t in range(1, x.shape[1]):
        m = rnn.update(m, x[:, t], torch.full_like(x[:, t], t))
        own.append(m)
    return lengths(torch.autograd.grad(cross_entropy(rnn.logits(m), y[:, -1]), own))


def smt(encoder: Encoder, decoder: Decoder, rnn: RNN, x, y, lambda_dyn=0.3) -> list[float]:
    T, loss = x.shape[1], 0.0
    memories = [v.detach().requires_grad_() for v in encoder(x).unbind(1)]
    for t in range(1, T):
        when = torch.full((B,), t)
        x_fut, y_fut = futures(x, y, torch.arange(B), when, T)
        loss = loss + cross_entropy(decoder(memories[t], x_fut, when), y_fut)
        made = rnn.update(memories[t - 1], x[:, t], when)
        loss = loss + lambda_dyn * F.mse_loss(made, memories[t])
    return lengths(torch.autograd.grad(loss, memories[1:]))


if __name__ == "__main__":
    task = data.load("retrieval", length=64, variant="ours")
    x, y = task.batch(B, torch.Generator().manual_seed(0))
    fig, axes = plt.subplots(1, len(UPDATERS), figsize=(13, 3.6), sharey=True)
    for ax, name in zip(axes, UPDATERS):
        for scale in SCALES:
            torch.manual_seed(0)
            c = ModelConfig(task.vocab, task.n_out, task.T, ctx_len=task.T, fut_len=task.T,
                            rnn=name)
            encoder, decoder, rnn = Encoder(c), Decoder(c), RNN(c)
            with torch.no_grad():
                # at zero, as training starts, no gradient would pass the head at all
                for net in (decoder, rnn.readout):
                    net.head.weight.normal_(std=c.d_model ** -0.5)
                for p in rnn.updater.parameters():
                    if p.ndim == 2:
                        p *= scale
            g = bptt(rnn, x, y)
            ax.semilogy(range(1, task.T), g, label=f"BPTT, weights × {scale:g}")
            print(f"{name}, weights x {scale:g}: BPTT |dL/dm_1| / |dL/dm_63| = {g[0] / g[-1]:.1e}")
        g = smt(encoder, decoder, rnn, x, y)
        ax.semilogy(range(1, task.T), g, "k--", label=f"SMT, weights × {SCALES[-1]:g}")
        print(f"{name}: SMT |dL/dm_1| / |dL/dm_63| = {g[0] / g[-1]:.1e}")
        ax.set(title=name, xlabel="t")
    axes[0].set(ylabel="|∂L/∂m_t|", ylim=(1e-5, 1e9))  # what explodes leaves the picture
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(os.path.join(HERE, "gradients.png"), dpi=80)
