"""Lesson: what a GPU would be asked for can be counted without one."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

GPU = ROOT / "results" / "gpu"
sys.path.append(str(GPU))
pretend = pytest.importorskip("pretend", reason="PyTorch moved its dispatch modes",
                              exc_type=ImportError)


def test_kernels_operations_and_bytes_of_a_product():
    """By hand: 2 n m k operations; inputs and output live together; what is dropped is free."""
    with pretend.PretendedGPU() as gpu:
        a, b = (torch.empty(n, 256, device="meta") for n in (128, 512))
        c = a @ b.T
        assert (gpu.launches, gpu.flops, gpu.copies) == (1, 2 * 128 * 256 * 512, 0)
        assert gpu.peak == 4 * (128 * 256 + 512 * 256 + 128 * 512)
        del a, b, c
        assert gpu.live == 0


def test_an_estimate_is_the_longest_of_start_bytes_and_operations():
    """A tiny kernel takes its start, a large sum its bytes, a large product its operations."""
    def spent(run):
        with pretend.PretendedGPU() as gpu:
            run()
        return gpu.seconds, gpu.busy

    full = lambda *shape: torch.empty(shape, device="meta")
    assert spent(lambda: full(3) + 1) == (pretend.START, pretend.SHORTEST)
    wide, n = full(10 ** 9), 20_000
    assert spent(lambda: wide + 1)[0] == pytest.approx(8e9 / pretend.BANDWIDTH)
    assert spent(lambda: full(n, n) @ full(n, n))[1] == pytest.approx(2 * n ** 3 / pretend.RATE)


def count(*flags):
    """The rows that results/gpu/count.py prints, and how it ended."""
    got = subprocess.run([sys.executable, GPU / "count.py", "--preset", "laptop", "--size", "4",
                          *flags], capture_output=True, text=True,
                         env=os.environ | dict(OMP_NUM_THREADS="1"))
    rows = [line.split() for line in got.stdout.splitlines()[1:]]
    return {" ".join(r[:-9]): r[-9:] for r in rows}, got


def test_replayed_updates_leave_the_work_as_it_is():
    """DMT sets out with --graph: the same operations in less time, since fewer kernels wait for
    their start."""
    (plain, got), (quick, _) = (count("--only", "dmt.py", *more) for more in ((), ("--graph",)))
    assert got.returncode == 0, got.stderr
    plain, quick = (rows["dmt.py, setting out"] for rows in (plain, quick))
    assert plain[5] == quick[5] != "0" and float(quick[6]) < float(plain[6])


def test_a_wrong_guess_stops_the_measurement():
    """One line that names the script, exit code 2, and nothing behind it is run."""
    _, got = count("--device", "cpu", "--only", "smt.py", "--guess", "1e-6")
    assert got.returncode == 2 and len(got.stderr.splitlines()) == 1
    assert "smt.py" in got.stderr and "smt.py, a step" not in got.stdout
