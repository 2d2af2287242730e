"""Draws table.csv: what the RNN alone reaches, backbone by backbone, after the same minutes of each
method.

    python results/backbones/table.py        # writes table.png beside this file
"""
import csv
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
from console import cli, parser  # noqa: E402

METHODS = {"bptt": "BPTT", "smt": "SMT, a part of the minutes", "dmt": "SMT, then DMT",
           "smt+bptt": "SMT, then BPTT"}
TASKS = {"retrieval": "retrieval, nats over the optimum", "stack": "stack, nats over the optimum",
         "mnist": "MNIST 14×14, nats per image"}
RNNS = ("transformer", "mlp", "gru")


def main(argv) -> None:
    parser("table.py", __doc__).parse_args(argv)  # it has no flags, and says so
    with open(os.path.join(HERE, "table.csv")) as f:
        rows = [r for r in csv.DictReader(f) if r["phase"] == "final"]
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for ax, (task, title) in zip(axes, TASKS.items()):
        for i, (script, label) in enumerate(METHODS.items()):
            got = [(k + (i - 1.5) * 0.2, float(r["rollout"]))
                   for k, rnn in enumerate(RNNS) for r in rows
                   if (r["dataset"], r["rnn"], r["script"]) == (task, rnn, script)]
            if got:  # SMT, then BPTT: on MNIST only
                ax.scatter(*zip(*got), label=label, color=("0.5", "C1", "C0", "C2")[i],
                           marker="sodv"[i])
        ax.set(title=title, xticks=range(3), xlim=(-0.5, 2.5),
               yscale="linear" if task == "mnist" else "log")
        ax.set_xticklabels(["Transformer", "MLP", "GRU"])
    axes[2].legend(fontsize=8, loc="upper center")
    fig.tight_layout()
    fig.savefig(os.path.join(HERE, "table.png"), dpi=90)


if __name__ == "__main__":
    cli(main)
