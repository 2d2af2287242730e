"""Lesson: two processes make the step of one. Each has half of a batch; gradients are averaged, and
one of them decides, logs and saves."""
import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, RUN, SIZES, TASK

import flags
import ranks
import smt
from sources.files import UserError

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")

# What every process runs: the command lines that it is given, one after another. With HALVES a
# process gets its part of a batch that all draw alike.
PROGRAM = """
import dataclasses, importlib, json, os, sys
sys.path.insert(0, {root!r})
import torch, ranks, trainer
torch.set_num_threads(1)
def halves(*a, load=trainer.load_data, **k):
    task, gen = load(*a, **k), torch.Generator().manual_seed(5)
    def batch(n, _):
        rows = slice(ranks.RANK * n, (ranks.RANK + 1) * n)
        return tuple(v[rows] for v in task.batch(n * ranks.WORLD, gen))
    return dataclasses.replace(task, batch=batch)
if "HALVES" in os.environ:
    trainer.load_data = halves
for line in json.loads(sys.argv[1]):
    script, *argv = line.split()
    sys.argv[0] = script
    importlib.import_module(script.removesuffix(".py")).main(argv)
"""


def run(folder, lines, processes, **env):
    """The lines in so many processes: what they printed."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone",
                                        f"--nproc_per_node={processes}"]
    done = subprocess.run([sys.executable, *launch, str(program), json.dumps(lines)],
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(OMP_NUM_THREADS="1") | env)
    return done.returncode, done.stdout, done.stderr


def newest(folder, name):
    return torch.load(folder / name / "ckpt.pt", weights_only=True)["newest"]


PLAIN = "--ema 0 --eval_every 0 --log_every 1 --n_val 4"
# nothing random but the batch: all times, no uniformity, no rows that are drawn
EXACT = "--lambda_unif 0 --first 0 --futures 0 --horizon 1 --rnn_batch 0 --optimizer adamw " \
    "--lr 1e-3 --rnn_from 0"


def test_two_halves_make_the_step_of_the_whole(tmp_path):
    """SMT and BPTT: the same weights after three steps, the same count of tokens, one log."""
    lines = [f"smt.py {TASK} {SIZES} {RUN} {PLAIN} {EXACT} --out_dir {tmp_path}/N/smt",
             f"bptt.py {TASK} {SIZES} {RUN} {PLAIN} --optimizer adamw --lr 1e-3 "
             f"--out_dir {tmp_path}/N/bptt"]
    for n in (1, 2):
        code, out, err = run(tmp_path, [line.replace("/N/", f"/{n}/") for line in lines], n,
                             HALVES="1")
        assert code == 0, err
        assert out.count("step 3/3") == 2 and out.count("next: ") == 2  # smt and bptt, once each
    for name in ("smt", "bptt"):
        one, two = (newest(tmp_path / n, name) for n in "12")
        assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(one, two, strict=True))
        rows = [list(csv.DictReader(open(tmp_path / n / name / "log.csv"))) for n in "12"]
        tokens = [[r["tokens"] for r in log] for log in rows]
        assert tokens[0] == tokens[1] and len(tokens[0]) == 3


def test_a_run_of_two_is_resumed(tmp_path):
    """Each process goes on with its own generator: SMT stopped after two steps of four ends where
    the run without a stop ends, bit for bit; DMT runs; one process cannot take over."""
    # nothing that depends on how much of the run is left
    smt = f"smt.py {TASK} {SIZES} {RUN} {PLAIN} --decay 1 --horizon 1 --rnn_from 0"
    lines = [f"{smt} --steps 4 --out_dir {tmp_path}/whole",
             f"{smt} --steps 2 --out_dir {tmp_path}/parts",
             f"smt.py --resume --steps 4 --out_dir {tmp_path}/parts",
             f"dmt.py --ckpt {tmp_path}/whole/ckpt.pt {RUN} --span 3 "
             f"--out_dir {tmp_path}/dmt"]
    code, _, err = run(tmp_path, lines, 2)
    assert code == 0, err
    whole, parts = (torch.load(tmp_path / n / "ckpt.pt", weights_only=True)
                    for n in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole["newest"], parts["newest"], strict=True))
    states = whole["rng"].chunk(2)
    assert not torch.equal(*states) and torch.equal(whole["rng"], parts["rng"])
    code, _, err = run(tmp_path, [f"smt.py --resume --steps 6 --out_dir {tmp_path}/parts"], 1)
    assert code and "a run of 2 processes" in err


def test_an_old_run_is_replaced_by_the_first_process(tmp_path):
    """--overwrite: all of it stays until the new run has a checkpoint, also where an evaluation
    comes first; then nothing of it is left, and the state of both generators is there."""
    smt = f"smt.py {TASK} {SIZES} {RUN} --n_val 4 --out_dir {tmp_path}/run"
    assert run(tmp_path, [f"{smt} --steps 2 --log_every 1"], 2)[0] == 0
    old = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    bptt = smt.replace("smt.py", "bptt.py")
    code, _, err = run(tmp_path, [f"{bptt} --overwrite --steps 9 --lr 1e18 --warmup 0"], 2)
    assert code and "not finite" in err, err  # before the first checkpoint
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == old
    code, _, err = run(tmp_path, [f"{smt} --overwrite --steps 4 --seed 1 --log_every 2 "
                                  "--eval_every 2 --ckpt_every 3"], 2)
    assert code == 0, err
    ckpts = [torch.load(tmp_path / "run" / name, weights_only=True) for name in
             ("ckpt.pt", "best.pt")]
    assert [c["config"]["seed"] for c in ckpts] == [1, 1] and ckpts[0]["step"] == 4
    assert not torch.equal(*ckpts[0]["rng"].chunk(2))
    rows = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert [r["step"] for r in rows] == ["2", "4"]


@pytest.mark.parametrize("env", [dict(RANK="1"), dict(WORLD_SIZE="abc"), dict(WORLD_SIZE="2"),
                                 dict(RANK="-1")])
def test_a_stray_environment(env, tmp_path):
    """What another launcher left there is one line, not a run that nobody saves."""
    line = f"{TASK} {SIZES} {RUN} --out_dir {tmp_path}/a".split()
    done = subprocess.run([sys.executable, str(ROOT / "smt.py"), *line], capture_output=True,
                          text=True, timeout=100, env=os.environ | env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "RANK" in done.stderr
    assert not (tmp_path / "a").exists()


def test_a_slow_process_is_not_refused(tmp_path, monkeypatch):
    """The first process has written its files before another one looks at the folder."""
    (tmp_path / "config.json").write_text("{}")
    line = [*TASK.split(), *SIZES.split(), "--out_dir", str(tmp_path)]
    with pytest.raises(UserError, match="config.json of a run"):
        flags.parse("smt", smt.Config, line, "")
    monkeypatch.setattr(ranks, "RANK", 1)
    assert flags.parse("smt", smt.Config, line, "")[0].out_dir == str(tmp_path)


def test_a_batch_that_does_not_divide(tmp_path):
    """One line that names the flag."""
    code, _, err = run(tmp_path, [f"smt.py {TASK} {SIZES} {RUN} --batch_size 5 "
                                  f"--out_dir {tmp_path}/a"], 2)
    assert code and "--batch_size 5 does not divide among 2 processes; give a multiple" in err
