"""
Lesson: a checkpoint is everything the next step needs. A run that is killed and resumed is, bit for
bit, the run that was never interrupted; whatever stops a run (Ctrl-C, a time limit, NaN, a full
disk), the last good state stays on disk and the last line says how to go on.
"""
import csv
import errno
import math
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, RUN, SIZES, TASK

import checkpoints
import trainer

LONG = "--steps 24 --ckpt_every 6 --log_every 4 --eval_every 8 --warmup 3"
START = {
    "smt": "{TINY} --lr 0.02 --micro 2 --horizon 5",
    "dmt": "{RUN} --ckpt {tiny_smt} --span 2",
    "bptt": "--dataset parity --length 8 {SIZES} {RUN} --truncate 3 --first 0.5 --lambda_heads 1",
    "transformer": "{TINY}",
}


class Killed(BaseException):
    """Nothing in the program catches this, as nothing catches a power cut."""


def kill_after(monkeypatch, steps):
    real = trainer.Run.update

    def update(self, *args, **more):
        real(self, *args, **more)
        if self.step == steps:
            raise Killed
    monkeypatch.setattr(trainer.Run, "update", update)


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal in every bit, whatever is nested in it."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("script", START)
def test_killed_and_resumed_equals_uninterrupted(script, command, tiny_smt, tmp_path, monkeypatch):
    """After a kill between two checkpoints the resumed run ends with the same weights, optimiser,
    generator, log and best checkpoint as one that ran through."""
    start = f"{script}.py {START[script]} {LONG} --out_dir {tmp_path}"
    code, _, err = command(start + "/straight", tiny_smt=tiny_smt)
    assert code == 0, err
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 14)
        command(start + "/killed", tiny_smt=tiny_smt)
    at = read(tmp_path / "killed" / "ckpt.pt")["step"]
    assert at == 12
    code, out, err = command(f"{script}.py --resume --out_dir {tmp_path}/killed")
    assert code == 0 and f"resumed at step {at}" in out, err

    for name in ("ckpt.pt", "best.pt"):
        a, b = (read(tmp_path / run / name) for run in ("straight", "killed"))
        for key in a.keys() - {"config", "elapsed", "history"}:
            assert same(a[key], b[key]), (name, key)
    rows = [list(csv.DictReader(open(tmp_path / run / "log.csv")))
            for run in ("straight", "killed")]
    for row in rows[0] + rows[1]:
        del row["seconds"]
    assert rows[0] == rows[1]
    assert [int(r["step"]) for r in rows[0]] == [4, 8, 12, 16, 20, 24]


def test_the_comparison_can_fail(command, tmp_path, monkeypatch):
    """A resume that forgets the optimiser's moments does not pass for an uninterrupted run."""
    start = f"smt.py {START['smt']} {LONG} --eval_every 0 --out_dir {tmp_path}"
    command(start + "/straight")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 14)
        command(start + "/killed")
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    assert command(f"smt.py --resume --out_dir {tmp_path}/killed")[0] == 0
    assert not same(read(tmp_path / "straight/ckpt.pt")["encoder"],
                    read(tmp_path / "killed/ckpt.pt")["encoder"])


def test_a_finished_run_can_be_prolonged(command, tiny_smt, tmp_path):
    """--resume with more --steps goes on from the end, also in the middle of a round of DMT."""
    assert command(f"dmt.py {START['dmt']} --steps 3 --out_dir {tmp_path}/run",
                   tiny_smt=tiny_smt)[0] == 0
    code, _, err = command(f"dmt.py --resume --steps 7 --log_every 1 --out_dir {tmp_path}/run")
    assert code == 0 and read(tmp_path / "run/ckpt.pt")["step"] == 7, err
    steps = [int(r["step"]) for r in csv.DictReader(open(tmp_path / "run/log.csv"))]
    assert steps == [3, 4, 5, 6, 7]
    assert command(f"dmt.py --resume --out_dir {tmp_path}/run")[0] == 0  # nothing left to do
    assert steps == [int(r["step"]) for r in csv.DictReader(open(tmp_path / "run/log.csv"))]


def test_resume_needs_no_other_file(command, tiny_smt, tmp_path):
    """The checkpoint that DMT or bptt.py --init started from may be gone: the run's own holds all
    of it."""
    for script, flag in (("dmt", "ckpt"), ("bptt", "init")):
        source = tmp_path / f"{script}.pt"
        source.write_bytes(tiny_smt.read_bytes())
        assert command(f"{script}.py {{RUN}} --{flag} {source} --out_dir {tmp_path}/{script}")[0] \
            == 0
        source.unlink()
        code, _, err = command(f"{script}.py --resume --steps 5 --out_dir {tmp_path}/{script}")
        assert code == 0, err
        ckpt = read(tmp_path / script / "ckpt.pt")
        assert {"encoder", "decoder", "rnn"} <= ckpt.keys() and ckpt["step"] == 5
        assert same(ckpt["encoder"], read(tiny_smt)["encoder"])  # neither trains the teacher


def test_bptt_goes_on_with_the_heads_of_smt(command, tiny_smt, tmp_path):
    """Heads that SMT taught know its memories: BPTT + heads begins with them, not with new ones."""
    flags = "--first 0.5 --lambda_heads 1 --lr 1e-12"  # a step of which nothing moves
    code, _, err = command(f"bptt.py {{RUN}} --init {tiny_smt} {flags} --out_dir {tmp_path}/run")
    assert code == 0, err
    taught = read(tiny_smt)["heads"]["linear.weight"]
    assert taught.any() and torch.equal(read(tmp_path / "run/ckpt.pt")["heads"]["linear.weight"],
                                        taught)


def test_overwrite_starts_again(command, tmp_path):
    """--overwrite removes the old run first: nothing of it is mistaken for the new one's."""
    flags = f"bptt.py {{TINY}} --out_dir {tmp_path}/run"
    assert command(flags + " --steps 9 --log_every 2")[0] == 0
    assert command(flags + " --steps 4 --overwrite")[0] == 0
    assert read(tmp_path / "run/ckpt.pt")["step"] == 4
    assert [r["step"] for r in csv.DictReader(open(tmp_path / "run/log.csv"))] == ["4"]


# ------------------------------------------------------------------------------- stopped on purpose

def test_ctrl_c_saves_and_says_how_to_resume(command, tmp_path):
    """SIGINT ends a run after the current step with exit code 130, a checkpoint and the command
    that continues it."""
    line = f"{TASK} {SIZES} {RUN} --threads 1 --steps 1000000 --log_every 5 --out_dir " \
           f"{tmp_path}/run"
    with subprocess.Popen([sys.executable, ROOT / "smt.py", *line.split()], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            for line in process.stdout:
                if line.startswith("step 10"):
                    process.send_signal(signal.SIGINT)
                    break
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and "\r" not in out
    assert err.count("\n") == 1 and "stopping after this step" in err
    found = re.search(r"stopped at step (\d+); continue with: "
                      r"python (\S+ --resume --out_dir \S+)\n$", out)
    assert found[2].startswith(f"{ROOT}/smt.py ")  # as it was called
    step = int(found[1])
    assert step >= 10 and read(tmp_path / "run/ckpt.pt")["step"] == step
    code, out, err = command(f"{found[2].removeprefix(f'{ROOT}/')} --steps {step + 2}")
    assert code == 0 and read(tmp_path / "run/ckpt.pt")["step"] == step + 2, err


def test_minutes_count_over_resumes_and_stop_after_does_not(command, tmp_path):
    """--stop_after ends one call, saved and resumable; --minutes is the budget of the whole run."""
    elapsed, steps = [], []
    flags = "smt.py {TINY} --steps 0 --minutes 60"
    for _ in range(3):
        code, out, err = command(f"{flags} --stop_after 0.001 --out_dir {tmp_path}/run")
        assert code == 0 and "continue with: python smt.py --resume" in out, err
        ckpt = read(tmp_path / "run/ckpt.pt")
        elapsed.append(ckpt["elapsed"])
        steps.append(ckpt["step"])
        assert ckpt["config"]["minutes"] == 60
        flags = "smt.py --resume"
    assert elapsed[0] >= 0.06 and elapsed[1] >= elapsed[0] + 0.06 and elapsed[2] >= elapsed[1] \
        + 0.06
    assert steps[0] < steps[1] < steps[2]
    code, out, _ = command(f"smt.py --resume --minutes {elapsed[2] / 60} --out_dir {tmp_path}/run")
    assert code == 0 and f"done: {steps[2]} steps" in out  # the budget was spent already


# ------------------------------------------------------------------------------- stopped by trouble

@pytest.mark.parametrize("log_every", [1, 1000])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(log_every, command, tmp_path,
                                                              monkeypatch):
    """Weights that are not finite end the run with one line and never reach the disk, logged or
    not."""
    real = trainer.Run.update

    def poisoned(self, *args, **more):
        real(self, *args, **more)
        if self.step == 5:
            self.parameters()[0].data.fill_(math.nan)
    monkeypatch.setattr(trainer.Run, "update", poisoned)
    code, _, err = command(f"smt.py {{TINY}} --steps 9 --ckpt_every 3 --log_every {log_every} "
                           f"--out_dir {tmp_path}/run")
    assert code == 2 and err.count("\n") == 1 and "not finite" in err \
        and f"{tmp_path}/run/ckpt.pt" in err
    assert read(tmp_path / "run/ckpt.pt")["step"] == 3
    rnn = checkpoints.load(str(tmp_path / "run/ckpt.pt"))
    assert all(p.isfinite().all() for p in rnn.parameters())


def test_an_absurd_learning_rate_is_named(command, tmp_path):
    """A run that diverges before its first checkpoint says so and writes none."""
    code, _, err = command("bptt.py {TINY} --lr 1e18 --warmup 0 --steps 9 "
                           f"--out_dir {tmp_path}/run")
    assert code == 2 and err.count("\n") == 1 and "there is no checkpoint yet" in err \
        and "--lr" in err
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "log.csv"}


@pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt(),
                                   OSError(errno.ENOSPC, "disk full")])
def test_a_failed_write_leaves_the_old_file(error, command, tmp_path, monkeypatch):
    """A checkpoint is written beside the old one and renamed: failing half-way loses nothing and
    leaves no litter."""
    assert command(f"bptt.py {{TINY}} --out_dir {tmp_path}/run")[0] == 0
    old = (tmp_path / "run/ckpt.pt").read_bytes()

    def broken(obj, f):
        f.write(b"half of a checkp")
        raise error
    monkeypatch.setattr(torch, "save", broken)
    resume = f"bptt.py --resume --steps 5 --out_dir {tmp_path}/run"
    if isinstance(error, RuntimeError):
        # not the user's mistake: the traceback stays
        with pytest.raises(RuntimeError, match="half-way"):
            command(resume)
    else:
        code, _, err = command(resume)
        assert code == (2 if isinstance(error, OSError) else 130) and err.count("\n") == 1
    assert (tmp_path / "run/ckpt.pt").read_bytes() == old
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_disk_that_really_fills_up(command, tmp_path):
    """The system refuses the checkpoint's last bytes (torch.save then raises an error of its own):
    one line, nothing lost."""
    resource = pytest.importorskip("resource",
                                   reason="file size limits exist on POSIX systems only")
    assert command(f"bptt.py {{TINY}} --d_model 128 --out_dir {tmp_path}/run")[0] == 0
    old = (tmp_path / "run/ckpt.pt").read_bytes()
    assert len(old) > 500_000  # the weights, not the picture of the curve, are what does not fit
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        code, _, err = command("bptt.py --resume --steps 5 --eval_every 0 "
                               f"--out_dir {tmp_path}/run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and err.count("\n") == 1 and "--out_dir" in err and "too large" in err
    assert (tmp_path / "run/ckpt.pt").read_bytes() == old
    assert not list((tmp_path / "run").glob("*.part"))


# --- averaged weights -----------------------------------------------------------------------------

def test_what_is_saved_is_the_average_of_the_weights(command, tmp_path, monkeypatch):
    """Saved weights follow a <- a d + w (1 - d) with d = min(ema, (step + 1) / (step + 10));
    training goes on with w."""
    seen, update = [], trainer.Run.update

    def record(self, *args, **more):
        update(self, *args, **more)
        seen.append([p.detach().clone() for p in self.parameters()])

    monkeypatch.setattr(trainer.Run, "update", record)
    first, begin = [], trainer.Run.say_hello
    before = lambda self: first.extend(p.detach().clone() for p in self.parameters()) or begin(self)
    monkeypatch.setattr(trainer.Run, "say_hello", before)
    code, _, err = command("bptt.py {TINY} --steps 20 --ema 0.6 --lr 0.02 --eval_every 7 "
                           "--out_dir {out}", out=tmp_path)
    assert code == 0, err
    average = first
    for step, weights in enumerate(seen):
        d = min(0.6, (step + 1) / (step + 10))
        average = [a * d + w * (1 - d) for a, w in zip(average, weights)]
    ckpt = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    names = [name for name, _ in checkpoints.load(str(tmp_path / "ckpt.pt")).named_parameters()]
    assert all(torch.allclose(ckpt["rnn"][name], a, atol=1e-5) for name,
               a in zip(names, average, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ckpt["newest"], seen[-1], strict=True))
    assert not torch.equal(ckpt["newest"][0], average[0])


def test_averaging_does_not_disturb_training(command, tmp_path):
    """With and without an average the newest weights are the same, and without one they are what is
    saved."""
    ckpts = []
    for ema in ("0.9", "0"):
        code, _, err = command("smt.py {TINY} --steps 6 --eval_every 2 --ema {ema} "
                               "--out_dir {out}/{ema}", ema=ema, out=tmp_path)
        assert code == 0, err
        ckpts.append(torch.load(tmp_path / ema / "ckpt.pt", weights_only=True))
    assert all(torch.equal(a, b) for a,
               b in zip(ckpts[0]["newest"], ckpts[1]["newest"], strict=True))
    saved = [ckpts[1][net][name] for net in ("encoder", "decoder") for name in ckpts[1][net]]
    assert all(torch.equal(a, b) for a, b in zip(saved, ckpts[1]["newest"]))


def test_a_failed_evaluation_leaves_the_newest_weights(command, tmp_path, monkeypatch):
    """Averages are swapped in only while they are looked at, whatever happens then."""
    class Broken(Exception):
        pass

    seen, update = [], trainer.Run.update

    def record(self, *args, **more):
        update(self, *args, **more)
        copy = lambda weights: [p.detach().clone() for p in weights]
        seen[:] = self.parameters(), copy(self.parameters()), copy(self.average)

    def fail(*a, **k):
        weights, _, average = seen
        assert all(torch.equal(a, b) for a, b in zip(weights, average, strict=True))
        raise Broken

    monkeypatch.setattr(trainer.Run, "update", record)
    monkeypatch.setattr("bptt.evaluate", fail)
    with pytest.raises(Broken):
        command("bptt.py {TINY} --steps 3 --lr 0.1 --warmup 0 --out_dir {out}", out=tmp_path)
    weights, newest, average = seen
    assert all(torch.equal(a, b) for a, b in zip(weights, newest, strict=True))
    assert not torch.equal(newest[0], average[0])
