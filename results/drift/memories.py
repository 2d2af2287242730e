"""Has the memory collapsed? What the encoder's memories look like, and how the RNN follows them.

    python results/drift/memories.py runs/smt-mnist/ckpt.pt ..

One line a checkpoint, on 32 validation sequences and all times: the variance of a memory's entries
over time within a sequence; that over sequences at one time, which no clock explains and which is
near 0 when nothing but the time is held; L_unif of the memory tokens; the effective rank of whole
memories, exp(entropy of the normalised squared singular values); and what the run's own validation
said.
"""
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import flags  # noqa: E402
import smt  # noqa: E402
from console import cli, parser  # noqa: E402
from model import build  # noqa: E402


@torch.no_grad()
def describe(path: str, n: int = 32) -> dict[str, float]:
    ckpt = flags.open_checkpoint(path)
    encoder, = build(ckpt, "encoder")
    config = ckpt["config"] | flags.data_places({}, ckpt["config"])
    task = flags.load_data(config, "cpu", ckpt)
    x = task.held_out("val", n)["x"]
    m = encoder(x)                                                      # (n, T, K, d)
    gen = torch.Generator().manual_seed(0)
    flat = m.flatten(0, 1).flatten(1)
    s = torch.linalg.svdvals(flat - flat.mean(0)).square()
    s = s / s.sum()
    rank = torch.exp(-(s * s.clamp(min=1e-12).log()).sum())
    return dict(time=m.var(1, correction=0).mean(), sequences=m.var(0, correction=0).mean(),
                unif=smt.uniformity(m, gen, 2048), rank=rank) | ckpt["metrics"]


def main(argv: list[str]) -> None:
    p = parser("memories.py", __doc__)
    p.add_argument("ckpt", nargs="+", help="checkpoints of smt.py or dmt.py")
    paths = p.parse_args(argv).ckpt
    columns = ("time", "sequences", "unif", "rank", "teacher", "one_step", "rollout", "drift",
               "one_step_drift")
    print(" ".join(f"{c:>14}" for c in columns))
    for path in paths:
        got = describe(path)
        print(" ".join(f"{float(got[c]):14.4g}" for c in columns), path)


if __name__ == "__main__":
    cli(main)
