"""
Lesson: a flag that is accepted and ignored is a lie. Walk over all flags of all scripts: each
changes weights, numbers, files or what is printed, or it is refused by name.
"""
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, RUN, SIZES, TASK

# What changes nothing by design: where and how fast it runs, what is a permission, and --help.
NAMED = set("device threads compile graph recompute overwrite resume stop_after minutes preset "
            "out_dir help ckpt_every".split())  # test_resume.py sees to the last
VALUES = dict(  # another value than the default, for the tiny runs below
    dataset="parity", rnn="mlp", encoder="bidirectional", d_model=20, n_heads=4, head_dim=4,
    mem_tokens=3, enc_layers=3, dec_layers=2, rnn_layers=1, ctx_len=3, fut_len=2, mem_dim=12,
    heads=2, heads_part=0.5, past=3, lambda_past=3, lambda_heads=3, timestamps="none", seed=1,
    batch_size=5, optimizer="adamw", lr=0.5, warmup=1,
    decay=0.9, ema=0.1, steps=3, data_dir="elsewhere", log_every=1, eval_every=1, n_val=3,
    ckpt_every=1, lambda_dec=3, lambda_dyn=3, lambda_unif=3, detach_rnn=None, times=4, rnn_batch=2,
    rnn_from=0,
    decode_own=False, horizon=1, futures=3, lambda_fut=3, octaves=None, first=0.7, micro=2, span=1,
    spans=5,
    lambda_mse=3, detach_dec=None, truncate=2, length=9,
    image_size=9, glyphs="ab", jitter=0.1, levels=256, binarize="static", data_file="elsewhere",
    variant="ours", symbols=4, noise=0.9, needle_range=5, reverse=False, depth=2, keys=3,
    key_len=1, examples=3, modulus=5, items=3, gamma=0.1, ckpt="", init="")
TEXT = f"--dataset pydoc --length 8 --rnn gru {SIZES} --mem_tokens 2"
STARTS = {
    "smt": f"{TEXT} --enc_layers 1",
    "bptt": TEXT,
    "dmt": "--ckpt {text}/ckpt.pt --span 3 --horizon 4",
    "transformer": f"--dataset pydoc --length 8 {SIZES} --enc_layers 1",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of a picture's, a text's and a synthetic task's run."""
    import smt
    out = {}
    for kind, task in (("picture", "--dataset glyphs --image_size 8"), ("text", TEXT),
                       ("synthetic", TASK)):
        out[kind] = tmp_path_factory.mktemp(kind)
        smt.main(f"{task} {SIZES} {RUN} --steps 1 --eval_every 0 --n_val 2 "
                 f"--out_dir {out[kind]}".split())
    return out


def flags_of(script, command):
    """As --help shows them, less what is named above."""
    _, out, _ = command(f"{script}.py {'--dataset pydoc' if script in STARTS else ''} --help")
    found = re.findall(r"\n  --(?:\[?no-\]?)?(\w+)", out)
    assert len(found) > 4
    return [name for name in dict.fromkeys(found) if name not in NAMED]


def spelled(name):
    value = VALUES[name]
    return f"--{name}" if value is None else f"--no-{name}" if value is False else \
        f"--{name} {value}"


def refused(code, err, name):
    assert code in (0, 2), err
    return code == 2 and err.count("\n") == 1 and f"--{name}" in err


def traces(folder):
    """What a run leaves: weights, the numbers of its log, the names of its files."""
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    weights = [v for net in ("encoder", "decoder", "rnn") for v in ckpt.get(net, {}).values()]
    # its seconds, and what one printed line in the middle shows, are the machine's
    rows = [[cell for i, cell in enumerate(row.split(",")) if i != 1]
            for row in (folder / "log.csv").read_text().splitlines()]
    return weights, rows, sorted(p.name for p in folder.iterdir())


def alike(a, b):
    return a[1:] == b[1:] and len(a[0]) == len(b[0]) and all(map(torch.equal, a[0], b[0]))


@pytest.mark.parametrize("script", STARTS)
def test_training_flags_have_an_effect_or_are_refused(script, command, runs, tmp_path):
    """On a text, with the GRU: where most of what is meant for other tasks and updaters means
    nothing."""
    def run(name, more=""):
        line = f"{script}.py {STARTS[script].format(**runs)} {RUN} --steps 2 --eval_every 2 " \
               f"--log_every 2 --n_val 2 --warmup 2 {more} --out_dir {tmp_path}/{name}"
        code, _, err = command(line)
        return code, err, None if code else traces(tmp_path / name)

    code, err, plain = run("plain")
    assert code == 0, err
    ignored = []
    for name in flags_of(script, command):
        code, err, got = run(name, spelled(name))
        if not refused(code, err, name) and (code or alike(plain, got)):
            ignored.append(name)
    assert ignored == []


CALLS = {  # what changes nothing else than what is printed, or one file
    "evaluate": dict(split="val", n_test=5, length=9, json=None, data_dir="elsewhere",
                     data_file="elsewhere"),
    "sample": dict(n=2, prompt="x", chars=7, temperature=0, top_k=1, prefix=None, seed=1,
                   out="other.png", data_dir="elsewhere", data_file="elsewhere"),
}


@pytest.mark.parametrize("kind", ["picture", "text", "synthetic"])
@pytest.mark.parametrize("script", CALLS)
def test_flags_that_read_a_checkpoint(script, kind, command, runs, tmp_path, monkeypatch):
    """evaluate.py and sample.py, on each kind of checkpoint."""
    def run(more=""):
        for old in tmp_path.iterdir():
            old.unlink()
        code, out, err = command(f"{script}.py --device cpu --ckpt {runs[kind]}/ckpt.pt "
                                 f"{'--n_test 4' if script == 'evaluate' else ''} {more}")
        return code, err, (out, {p.name: p.read_bytes() for p in tmp_path.iterdir()})

    monkeypatch.chdir(tmp_path)
    code, err, plain = run()
    assert code == 0, err
    assert set(flags_of(script, command)) - {"ckpt"} == set(CALLS[script])
    for name, value in CALLS[script].items():
        code, err, got = run(f"--{name}" + (f" {value}" if value is not None else ""))
        assert refused(code, err, name) or code == 0 and got != plain, (name, err)


@pytest.mark.parametrize("line", [
    "smt.py {TASK} {SIZES} {RUN} --rnn gru --rnn_layers 3",
    "smt.py --dataset pydoc {SIZES} {RUN} --timestamps encoder",
    "smt.py {TASK} {SIZES} {RUN} --data_dir .", "data.py parity --data_dir .",
    "data.py parity --out x.png", "smt.py {TASK} {SIZES} {RUN} --futures 0 --lambda_fut 2",
    "smt.py {TASK} {SIZES} {RUN} --lambda_dec 0 --lambda_dyn 0 --lambda_unif 0",
    "dmt.py --ckpt {synthetic}/ckpt.pt {RUN} --lambda_dec 0 --lambda_mse 0",
    "dmt.py --ckpt {synthetic}/ckpt.pt {RUN} --lambda_dec 0 --detach_dec",
    "sample.py --ckpt {picture}/ckpt.pt --chars 9", "sample.py --ckpt {text}/ckpt.pt --out x.png",
    "sample.py --ckpt {synthetic}/ckpt.pt --temperature 2",
    "sample.py --ckpt {synthetic}/ckpt.pt --seed 2",
    "sample.py --ckpt {picture}/ckpt.pt --temperature 0 --seed 2",
    "smt.py {TASK} {SIZES} {RUN} --futures 0 --first 0 --heads 0",
    "sample.py --ckpt {picture}/ckpt.pt --data_dir .",
    "evaluate.py --ckpt {synthetic}/ckpt.pt --data_dir .",
    "evaluate.py --ckpt {picture}/ckpt.pt --data_file x", "bench.py --dataset parity --data_dir .",
    "evaluate.py --ckpt {synthetic}/ckpt.pt --seed 1",
    "reproduce.py fig3 --first_seed 5", "reproduce.py fig4 --quick --device cpu --seeds 2",
    "reproduce.py fig3 --draw --seeds 5", "reproduce.py fig3 --draw --n_test 7",
    "dmt.py --ckpt {synthetic}/ckpt.pt {RUN} --lambda_mse 0 --detach_dec",
    "smt.py {TASK} {SIZES} {RUN} --lambda_dyn 0 --no-decode_own",
    "bptt.py {TASK} {SIZES} {RUN} --truncate 4 --lambda_heads 1",
    "bptt.py {TASK} {SIZES} {RUN} --truncate 4 --first 0.5",
    "sample.py --ckpt {picture}/ckpt.pt --out x.jpg",
    "smt.py --dataset pydoc --length 9 {SIZES} {RUN} --fut_len 4 --times 7",
    "smt.py --preset paper --dataset pydoc --length 16 {SIZES} --steps 1 --times 2"])
def test_what_means_nothing_is_refused(line, command, runs, tmp_path, monkeypatch):
    """Each of these was accepted and ignored once."""
    monkeypatch.chdir(tmp_path)
    code, _, err = command(line, **runs)
    assert code == 2 and err.count("\n") == 1, err
    assert re.findall(r"--(\w+)", line)[-1] in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["speed/profile_step", "yardstick/transformer"])
def test_scripts_of_results_refuse_like_the_others(script, tmp_path):
    """One line that names the flag, exit code 2, before anything is made."""
    got = subprocess.run([sys.executable, ROOT / "results" / f"{script}.py", "--bogus"],
                         cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert got.returncode == 2 and got.stdout == "" and got.stderr.count("\n") == 1, got.stderr
    assert "--bogus" in got.stderr or "ckpt" in got.stderr
