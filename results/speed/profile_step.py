"""Where does the time of a step go, and how far is it from what the machine can do?

    python results/speed/profile_step.py            # laptop sizes, MNIST 14x14, one thread

Prints, for a step of SMT, of DMT and of BPTT, the share of time in matrix products,
attention and the rest (element-wise work, copies, overhead), and the rate of the matrix products
beside that of one large product.
"""
import os
import sys

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import bench  # noqa: E402
import flags  # noqa: E402
from console import cli, parser  # noqa: E402


def shares(step, repeat: int) -> tuple[dict[str, float], float]:
    """Kind of operation -> milliseconds a step; and floating-point operations a second within
    matrix products."""
    step()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as p:
        for _ in range(repeat):
            step()
    spent, flops = {}, 0
    for e in p.key_averages():
        name = e.key.removeprefix("aten::")
        kind = "matrix products" if name in ("mm", "bmm", "addmm", "baddbmm") else \
            "attention" if "dot_product" in name else \
            "gelu" if "gelu" in name else "other"
        spent[kind] = spent.get(kind, 0.0) + e.self_cpu_time_total / 1e3 / repeat
        flops += e.flops / repeat if kind == "matrix products" else 0
    return spent, flops / spent["matrix products"] * 1e3


def main(argv: list[str]) -> None:
    parser("profile_step.py", __doc__).parse_args(argv)  # it has no flags, and says so
    torch.set_num_threads(1)
    b = bench.Bench("laptop", "mnist", "cpu", flags.Config.data_dir)
    print(f"large matrix product: {bench.matmul_rate('cpu') / 1e9:.0f} GFLOP/s")
    for name, step, repeat in (("SMT, a step", b.smt_ours, 8), ("DMT, a step", b.dmt_ours, 3),
                               ("BPTT, a step", b.bptt, 3)):
        spent, rate = shares(step, repeat)
        total = sum(spent.values())
        kinds = sorted(spent.items(), key=lambda kv: -kv[1])
        print(f"{name}: {total:.0f} ms | " + " | ".join(f"{k} {v / total:.0%}" for k, v in kinds) +
              f" | matrix products at {rate / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    cli(main)
