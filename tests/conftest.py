"""What all tests share: imports from anywhere, one thread, a command line in process, one tiny
trained model."""
import importlib
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = str(ROOT), str(ROOT / "results" / "yardstick")
torch.set_num_threads(1)
# A shell starts what runs in its background deaf to Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

import console  # noqa: E402
from sources import files  # noqa: E402

TASK = "--dataset retrieval --length 8 --symbols 3"
# what every script understands
SIZES = "--d_model 16 --n_heads 2 --dec_layers 1"
RUN = "--preset laptop --device cpu --batch_size 4 --steps 3"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """No test writes to the home folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(files, "CACHE", str(folder))
    return folder


def run_command(monkeypatch, capsys, line):
    """`python LINE` in this process, through console.cli: (exit code, stdout, stderr)."""
    argv = shlex.split(line)
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    code, handlers = 0, [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        console.cli(importlib.import_module(argv[0].removesuffix(".py")).main)
    except SystemExit as e:
        code = e.code or 0
    finally:
        for handler in handlers:  # a run that breaks in this process keeps its own
            signal.signal(*handler)
    return code, *capsys.readouterr()


@pytest.fixture
def command(monkeypatch, capsys):
    """command("smt.py --steps 3") -> (exit code, stdout, stderr); {TINY}, {RUN} and friends are
    filled in."""
    words = dict(TASK=TASK, SIZES=SIZES, RUN=RUN, TINY=f"{TASK} {SIZES} {RUN}")
    return lambda line, **more: run_command(monkeypatch, capsys, line.format(**words | more))


@pytest.fixture(scope="session")
def tiny_smt(tmp_path_factory):
    """Path of the checkpoint of a tiny SMT run on retrieval: good for trying things, not for
    results."""
    out_dir = tmp_path_factory.mktemp("tiny") / "smt"
    importlib.import_module("smt").main(
        f"{TASK} {SIZES} {RUN} --past 3 --steps 6 --lr 0.02 --warmup 0 --eval_every 0".split()
        + ["--out_dir", str(out_dir)])
    return out_dir / "ckpt.pt"
