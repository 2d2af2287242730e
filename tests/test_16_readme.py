"""Lesson: the README tells the truth. Its commands run, in its order, at tiny size; its Python and
its map are checked."""
import gzip
import os
import re
import shlex
import struct

import pytest
import torch

import bptt
import dmt
import evaluate
import sample
import smt
import transformer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = open(os.path.join(ROOT, "README.md")).read()
SCRIPTS = dict(smt=smt, dmt=dmt, bptt=bptt, transformer=transformer, evaluate=evaluate,
               sample=sample)
SIZES = "--d_model 8 --n_heads 1 --dec_layers 1".split()
LENGTH = "--steps 1 --eval_every 0 --threads 1 --batch_size 2 --overwrite".split()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[list[str]]:
    """Every `python script.py ...` of the README's shell blocks, in order, as argument lists."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    parts = [shlex.split(part) for line in lines for part in line.split("&&")]
    return [p[1:] for p in parts if p[:1] == ["python"] and p[1].endswith(".py")]


@pytest.fixture(scope="module")
def tiny_mnist(tmp_path_factory):
    """MNIST's files, with noise for pictures and the last 5,000 for validation."""
    folder = tmp_path_factory.mktemp("mnist")
    for name, count in (("train-images-idx3-ubyte.gz", 5_020), ("t10k-images-idx3-ubyte.gz", 20)):
        pixels = torch.randint(256, (count, 28, 28), dtype=torch.uint8,
                               generator=torch.Generator().manual_seed(0))
        with gzip.open(folder / name, "wb", compresslevel=1) as f:
            f.write(b"\0\0\x08\x03" + struct.pack(">III", count, 28, 28) + pixels.numpy().tobytes())
    return str(folder)


def test_commands_run_in_order(tiny_mnist, tmp_path, monkeypatch):
    """A reader who types the README from top to bottom meets no error."""
    monkeypatch.chdir(tmp_path)
    # 196 steps of drawing, many times over: elsewhere
    monkeypatch.setattr("sample.draw_samples", lambda *a, **k: None)
    for script in (smt, dmt, bptt):
        monkeypatch.setattr(script, "draw_samples", lambda *a, **k: None)
        monkeypatch.setattr(script, "evaluate", lambda *a,
                            **k: dict.fromkeys(("teacher", "one_step", "rollout"), 1.0))
        monkeypatch.setattr(script, "summary", lambda r: r)
    seen = set()
    for script, *argv in commands():
        name = os.path.basename(script).removesuffix(".py")
        assert os.path.exists(os.path.join(ROOT, script))
        seen.add(name)
        if name in ("evaluate", "sample"):
            argv += ["--n_test", "2"] if name == "evaluate" else ["--n", "1"]
            if name == "evaluate" or "--prefix" in argv:
                argv += ["--data_dir", tiny_mnist]
        else:
            for flag in ("--minutes", "--steps", "--threads"):  # a reader's hour is not ours
                if flag in argv:
                    del argv[argv.index(flag):argv.index(flag) + 2]
            argv += LENGTH + ["--data_dir",
                              tiny_mnist] + ([] if "--ckpt" in argv or "--init" in argv else SIZES)
            if "--resume" in argv:
                argv.remove("--overwrite")
                argv = argv[:argv.index("--steps")] + ["--steps", "2"]
        SCRIPTS[name].main(argv)
    assert seen == set(SCRIPTS), f"the README shows no command of {set(SCRIPTS) - seen}"


def test_python_example_runs(capsys):
    """The lines that step the RNN through a sequence work on the checkpoint that comes with the
    project."""
    code = next(block for block in blocks("python") if "model.load" in block)
    scope = {}
    exec(code.replace('"results/', f'"{ROOT}/results/'), scope)
    assert scope["m"].shape[1:] == scope["rnn"].m0.shape


def test_dataset_example_runs(monkeypatch):
    """The lines that add a dataset of one's own give sequences that follow the index convention."""
    code = next(block for block in blocks("python") if "image_data" in block)
    scope = {}
    exec(code, scope)
    task = scope["stripes"]()
    x, y = task.batch(3, torch.Generator().manual_seed(0))
    assert (x[:, 0] == task.bos).all() and torch.equal(x[:, 1:], y[:, :-1]) and y.max() < task.n_out


def test_map_points_at_code():
    """Every function that the paper-to-code table names exists in the file it names."""
    rows = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", README)
    assert len(rows) >= 8
    for file, name in rows:
        source = open(os.path.join(ROOT, file)).read()
        assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", source,
                         re.M), f"{file} has no {name}"
