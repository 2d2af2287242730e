"""
Lesson: trust is checked once, at the door. A checkpoint with a flipped bit, or with a value that no
run would have written, is refused by one line that names the file; what is let in computes what it
did on the day it was saved.
"""
import io
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import checkpoints

GONE = object()


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal in every bit, whatever is nested in it."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ------------------------------------------------------------------------------------ damaged bytes

def damaged(good, dice):
    """The bytes with one of the accidents of disks: a flipped bit, a zeroed block, a lost end,
    a repeated block."""
    kind, bad, at = dice.randrange(4), bytearray(good), dice.randrange(len(good))
    if kind == 0:
        bad[at] ^= 1 << dice.randrange(8)
    elif kind == 1:
        size = dice.choice((1, 16, 512, 4096))
        bad[at:at + size] = bytes(len(bad[at:at + size]))
    elif kind == 2:
        del bad[at:]
    else:
        size = dice.choice((16, 512))
        bad[at:at + size] = bad[max(0, at - size):at] or b"x"
    return bytes(bad)


def test_no_damage_loads_with_other_values(tiny_smt, tmp_path):
    """200 accidents: each is a CheckpointError, or changed nothing that is read."""
    good, want, refused = tiny_smt.read_bytes(), read(tiny_smt), 0
    path = tmp_path / "ckpt.pt"
    for seed in range(200):
        path.write_bytes(damaged(good, random.Random(seed)))
        try:
            got = checkpoints.load_checkpoint(str(path))
        except checkpoints.CheckpointError as e:
            refused += 1
            assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
        else:
            got.pop("path")
            assert same(got, want), seed
    assert refused > 100  # else the accidents were none


def test_torch_alone_would_load_damage(tiny_smt, tmp_path):
    """So the test above has something to find: some accident changes weights without a word."""
    good, want = tiny_smt.read_bytes(), read(tiny_smt)

    def silent(seed):
        try:
            return not same(read(io.BytesIO(damaged(good, random.Random(seed)))), want)
        except Exception:
            return False
    assert any(silent(seed) for seed in range(100))


# --------------------------------------------------------------------------------------- odd values

HOSTILE = (None, True, -1, 0, 1, 3, 10 ** 6, 10 ** 18, 0.5, -0.5, math.nan, math.inf, "", "x",
           "mnist", "gru", "none", [], {}, [1], (2, 3), torch.zeros(2), torch.tensor(math.nan),
           GONE)


def paths_of(value, at=()):
    """Every place in nested dicts and lists."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*at, key)
        if isinstance(value[key], (dict, list)) and value[key]:
            yield from paths_of(value[key], (*at, key))


def change(ckpt, place, value):
    for key in place[:-1]:
        ckpt = ckpt[key]
    if value is GONE:
        del ckpt[place[-1]]
    else:
        ckpt[place[-1]] = value


READERS = {
    "evaluate": "evaluate.py --device cpu --n_test 4 --json --ckpt {path}",
    "sample": "sample.py --device cpu --n 4 --ckpt {path}",
    "dmt": "dmt.py {RUN} --out_dir {tmp}/new --overwrite --ckpt {path}",
    "bptt": "bptt.py {RUN} --out_dir {tmp}/new --overwrite --init {path}",
    "resume": "smt.py --resume --steps 8 --device cpu --out_dir {tmp}/run",
}


@pytest.mark.parametrize("reader", READERS)
def test_no_odd_value_surprises(reader, command, tiny_smt, tmp_path):
    """40 times one value of a good checkpoint becomes another: the script refuses it by one line,
    or runs; it never raises, and it prints no NaN."""
    good, path = tiny_smt.read_bytes(), tmp_path / "run" / "ckpt.pt"
    path.parent.mkdir()
    for seed in range(40):
        dice = random.Random(f"{reader} {seed}")
        ckpt = torch.load(io.BytesIO(good), weights_only=True)
        part = dice.choice(("model", "config", "model", "config", None, "optimizers", "rnn"))
        places = list(paths_of(ckpt[part], (part,)) if part else ((k,) for k in ckpt))
        place, value = dice.choice(places), dice.choice(HOSTILE)
        change(ckpt, place, value)
        torch.save(ckpt, path)
        code, out, err = command(READERS[reader], path=path, tmp=tmp_path)
        told = (place, value, out[-300:], err)
        assert code in (0, 2) and err.count("\n") == (1 if code else 0), told
        assert not code or "error: " in err, told
        if reader == "evaluate" and code == 0:
            result = json.loads(out, parse_constant=pytest.fail)
            assert math.isfinite(result["rollout"]), told


ODD = {  # what is changed, and to what: each of them reached a script once
    "a million layers": ("model", "enc_layers", 10 ** 6),
    "a huge width": ("model", "d_model", 10 ** 6),
    "a size that is a float": ("model", "d_model", 16.0),
    "a size that is a bool": ("model", "rnn_layers", True),
    "a negative size": ("model", "dec_layers", -1),
    "an unknown pattern": ("model", "encoder", "causl"),
    "futures without end": ("model", "fut_len", 10 ** 6),
    "another length": ("model", "T", 10 ** 6),
    "a flag of another type": ("config", "length", "8"),
    "a flag that is negative": ("config", "batch_size", -4),
    "a flag that is NaN": ("config", "lr", math.nan),
    "no dataset": ("config", "dataset", None),
    "a step of another type": ("step", "3"),
    "a negative step": ("step", -3),
    "no generator": ("rng", [1, 2]),
    "weights that are no tensors": ("rnn", "m0", 1.0),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_odd_is_refused_at_the_door(what, command, tiny_smt, tmp_path):
    """By the first check, the same for every script, at once."""
    *place, value = ODD[what]
    ckpt = read(tiny_smt)
    change(ckpt, place, value)
    torch.save(ckpt, tmp_path / "odd.pt")
    code, _, err = command(f"evaluate.py --ckpt {tmp_path}/odd.pt")
    assert code == 2 and err.count("\n") == 1 and f"{tmp_path}/odd.pt: " in err, err


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite(number, command, tiny_smt, tmp_path):
    """They would make every number NaN without a word."""
    ckpt = read(tiny_smt)
    ckpt["rnn"]["m0"][0, 0] = number
    torch.save(ckpt, tmp_path / "nan.pt")
    code, out, err = command(f"evaluate.py --ckpt {tmp_path}/nan.pt")
    assert code == 2 and out == "" and "not finite" in err


def test_weights_of_half_precision_are_welcome(tiny_smt, tmp_path):
    """results/ keeps some; they are used in full precision."""
    ckpt = read(tiny_smt)
    small = {k: v for k, v in ckpt.items() if k not in checkpoints.RESUMES or k == "step"}
    small["rnn"] = {k: v.half() for k, v in ckpt["rnn"].items()}
    torch.save(small, tmp_path / "half.pt")
    rnn = checkpoints.load(str(tmp_path / "half.pt"))
    assert all(p.dtype == torch.float32 for p in rnn.parameters())


# ---------------------------------------------------------------------------- what evaluate.py says

def test_numbers_come_before_the_picture(command, tiny_smt, tmp_path):
    """A picture that cannot be written is a warning; the numbers are there, and the exit code is
    0."""
    (tmp_path / "ckpt.pt").write_bytes(tiny_smt.read_bytes())
    (tmp_path / "evaluation.png").mkdir()
    code, out, err = command(f"evaluate.py --device cpu --n_test 4 --ckpt {tmp_path}/ckpt.pt")
    assert code == 0 and "rollout" in out and err.count("\n") == 1 and "warning" in err, err
    code, out, err = command(f"evaluate.py --device cpu --n_test 4 --json "
                             f"--ckpt {tmp_path}/ckpt.pt")
    assert code == 0 and json.loads(out)["n"] == 4 and "evaluation.png" in err


def test_json_has_no_nan():
    """null where a number is none, at any depth."""
    from evaluate import as_json
    told = as_json(dict(a=math.nan, b=[1.0, math.inf], c=dict(d=-math.inf, e=2), f="x", g=None))
    assert json.loads(told, parse_constant=pytest.fail) == dict(a=None, b=[1.0, None],
                                                                c=dict(d=None, e=2), f="x", g=None)


# ----------------------------------------------------------------------------------- real processes

def test_closed_outputs_raise_nothing(tiny_smt, tmp_path):
    """Called with stdout or both outputs closed, a script does its work without a traceback."""
    for closed in (">&-", ">&- 2>&-"):
        line = f"{sys.executable} {ROOT}/evaluate.py --device cpu --n_test 4 --ckpt {tiny_smt} " \
               f"--json {closed}"
        got = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True,
                             timeout=120, env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert got.returncode == 0 and got.stderr == "", got.stderr
