"""Time and memory of one step against the sequence length T (Tab. 1 of the paper, measured).

    python results/scaling/scaling.py

Windows of T bytes of pydoc, laptop sizes and batches, one CPU thread. SMT and DMT are the defaults
with the RNN alone over the whole window; DMT is a round, labels and own memories, with all the
steps that learn from it. BPTT is full, on SMT's batches. Every point is a fresh process: seconds
are the median of three steps, memory is the peak resident set above what the process had before its
first step. Draws scaling.png beside this file.
"""
import json
import os
import resource
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
LENGTHS = (64, 128, 256, 512, 1024)
WAYS = {"SMT": "smt_ours", "DMT, a round": "dmt_ours", "BPTT": "bptt"}


def point(way: str, length: int) -> dict:
    """Seconds and peak MiB of one way at one length, in this process."""
    import torch

    import bench
    torch.set_num_threads(1)
    step = getattr(bench.Bench("laptop", "pydoc", "cpu", "data", length=length), way)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = []
    for _ in range(4):
        start = time.perf_counter()
        step()
        spent.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(seconds=sorted(spent[1:])[1], mib=(peak - before) / 1024)


def main() -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, way in WAYS.items():
        call = lambda T: subprocess.run([sys.executable, __file__, way, str(T)], check=True,
                                        capture_output=True, text=True)
        points = [json.loads(call(T).stdout) for T in LENGTHS]
        for ax, key in zip(axes, ("seconds", "mib")):
            ax.loglog(LENGTHS, [p[key] for p in points], ".-", label=name, base=2)
        cells = (f"{p['seconds']:.2f} s, {p['mib']:.0f} MiB" for p in points)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    axes[0].set(xlabel="T", ylabel="seconds a step")
    axes[1].set(xlabel="T", ylabel="peak MiB")
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(os.path.join(HERE, "scaling.png"), dpi=80)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(point(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
