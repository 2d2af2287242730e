"""How many Jacobi sweeps does a rollout take? m_t <- f(m_{t-1}, x_t) for all t at once.

    python results/drift/parallel.py runs/smt-mnist/ckpt.pt runs/dmt-mnist/ckpt.pt

They start from the encoder's memories. After j sweeps every memory is a j-step rollout from the
encoder's, and T - 1 sweeps are the exact rollout; an RNN that corrects itself is there sooner.
Prints sweeps against error and draws parallel.png beside this file.
"""
import os
import sys

import matplotlib
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import flags  # noqa: E402
from console import cli, fail  # noqa: E402
from model import build  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@torch.no_grad()
def errors(path: str, n: int = 16) -> list[float]:
    """Mean square distance to the exact rollout after 0, 1, .. T - 1 sweeps, in units of the
    memories' variance."""
    ckpt = flags.open_checkpoint(path)
    encoder, rnn = build(ckpt, "encoder", "rnn")
    config = ckpt["config"] | flags.data_places({}, ckpt["config"])
    task = flags.load_data(config, "cpu", ckpt)
    x = task.held_out("val", n)["x"]
    m = encoder(x)
    exact, variance = rnn.memories(x), m.flatten(0, 1).var(0).mean()
    t, out = torch.arange(1, task.T), []
    for j in range(task.T):
        out.append(float((m - exact).square().mean() / variance))
        if j + 1 < task.T:  # m_0 .. m_j are exact by now
            m[:, j + 1:] = rnn.update(m[:, j:-1], x[:, j + 1:], t[j:])
    return out


def main(argv: list[str]) -> None:
    if not argv:
        fail("no checkpoint is given; name some of smt.py or dmt.py")
    for path in argv:
        e = errors(path)
        first = {limit: next((j for j, v in enumerate(e) if v < limit), None)
                 for limit in (0.1, 0.03, 0.01, 1e-3, 1e-6)}
        sweeps = ", ".join(f"{k:g}: {v}" for k, v in first.items())
        print(f"{path} | sweeps until the error is below: {sweeps} (T = {len(e)})")
        plt.semilogy(e, label=os.path.basename(os.path.dirname(os.path.abspath(path))))
    plt.xlabel("sweeps")
    plt.ylabel("error / variance")
    plt.legend()
    plt.savefig(os.path.join(HERE, "parallel.png"), dpi=80)


if __name__ == "__main__":
    cli(main)
