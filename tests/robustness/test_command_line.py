"""
Lesson: the command line is part of the program. Whoever mistypes gets one line that names the flag
or the file and what to do, exit code 2, and an untouched disk; every flag that is accepted changes
what is computed; and numbers that others parse (JSON, log.csv, a pipe) are clean.
"""
import csv
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny import recipe

import console
import data
import flags
import presets
import trainer
from sources import images, tasks

SCRIPTS = ("smt", "dmt", "bptt", "transformer", "evaluate", "sample")


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_smt):
    """A folder with one finished run of each kind under runs/, and files that are no
    checkpoints."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "file").write_text("not a folder")
    from conftest import RUN, SIZES, TASK
    for script, flags in (("smt", f"{TASK} {SIZES}"), ("dmt", f"--ckpt {tiny_smt}"),
                          ("bptt", f"{TASK} {SIZES}"), ("bptt", f"--init {tiny_smt}"),
                          ("transformer", f"{TASK} {SIZES}")):
        out_dir = folder / "runs" / ("init" if "--init" in flags else script)
        line = f"{flags} {RUN} --eval_every 0 --out_dir {out_dir}"
        importlib.import_module(script).main(line.split())
    return folder


def files(folder):
    return {str(p): p.stat().st_mtime_ns for p in Path(folder).rglob("*")}


# -------------------------------------------------------------------------------- bad command lines

BAD = [  # command, what its one line must mention
    ("smt.py {TINY} --stepz 3", "--stepz"),
    ("smt.py {TINY} --step 3", "--step"),  # no guessing of shortened flags
    ("smt.py {TINY} extra", "extra"),
    ("smt.py {TINY} --steps", "--steps"),
    ("smt.py {TINY} --dataset cifar", "--dataset"),
    ("smt.py {TINY} --rnn lstm", "--rnn"),
    ("smt.py {TINY} --encoder causl", "--encoder"),
    ("smt.py {TINY} --preset huge", "--preset"),
    ("smt.py {TINY} --steps many", "--steps"),
    ("smt.py {TINY} --steps 1.5", "--steps"),
    ("smt.py {TINY} --steps -3", "--steps"),
    ("smt.py {TINY} --steps 0 --minutes 0", "--steps"),
    ("smt.py {TINY} --minutes -1", "--minutes"),
    ("smt.py {TINY} --minutes nan", "--minutes"),
    ("smt.py {TINY} --minutes inf", "--minutes"),
    ("smt.py {TINY} --stop_after nan", "--stop_after"),
    ("smt.py {TINY} --lr 0", "--lr"),
    ("smt.py {TINY} --lr -0.1", "--lr"),
    ("smt.py {TINY} --lr nan", "--lr"),
    ("smt.py {TINY} --lr inf", "--lr"),
    ("smt.py {TINY} --lambda_dyn -1", "--lambda_dyn"),
    ("smt.py {TINY} --lambda_unif nan", "--lambda_unif"),
    ("smt.py {TINY} --seed -1", "--seed"),
    ("smt.py {TINY} --seed 1" + "0" * 30, "--seed"),
    ("smt.py {TINY} --threads 1000000", "--threads"),
    ("smt.py {TINY} --batch_size 0", "--batch_size"),
    ("smt.py {TINY} --log_every 0", "--log_every"),
    ("smt.py {TINY} --times 1", "--times"),  # no transition
    ("smt.py {TINY} --times -1", "--times"),
    ("smt.py {TINY} --first 1.5", "--first"),
    ("smt.py {TINY} --rnn_batch -1", "--rnn_batch"),
    ("smt.py {TINY} --heads -1", "--heads"),
    ("smt.py {TINY} --heads 9", "--heads 9 does not fit into sequences of 8; give at most 8"),
    ("smt.py {TINY} --heads_part 0", "--heads_part"),
    ("smt.py {TINY} --heads_part 2", "--heads_part"),
    ("smt.py {TINY} --heads 0 --heads_part 0.5", "--heads_part means nothing with --heads 0"),
    ("smt.py {TINY} --past -1", "--past"),
    ("smt.py {TINY} --horizon 9", "--horizon 9 does not fit into sequences of 8; give at most 8"),
    ("smt.py {TINY} --times 9", "--times 9 does not fit"),
    ("smt.py {TINY} --fut_len 9", "--fut_len 9 does not fit"),
    ("smt.py {TINY} --ctx_len 9", "--ctx_len 9 does not fit"),
    ("smt.py {TINY} --times 2 --horizon 4", "--horizon means nothing with --times 2"),
    ("bptt.py {TINY} --truncate 9", "--truncate 9 does not fit"),
    ("smt.py {TINY} --past 8", "--past 8 does not fit into sequences of 8; give at most 7"),
    ("smt.py {TINY} --lambda_past 1", "--lambda_past means nothing with --past 0"),
    ("bptt.py {TINY} --heads 2", "--heads means nothing with --lambda_heads 0"),
    ("bptt.py {TINY} --first 0", "--first 0 leaves BPTT no output"),
    ("bptt.py {TINY} --first 0 --lambda_heads 1", "--first 0 leaves BPTT no"),
    ("bptt.py {TINY} --lambda_heads 1 --heads 999", "--heads 999 does not fit"),
    ("smt.py {TINY} --mem_dim -1", "--mem_dim"),
    ("smt.py {TINY} --timestamps maybe", "--timestamps"),
    ("smt.py {TINY} --runs 2", "--runs"),  # a flag of format 1
    ("smt.py {TINY} --micro 0", "--micro"),
    ("smt.py {TINY} --mem_tokens 0", "--mem_tokens"),
    ("smt.py {TINY} --d_model 15", "--d_model"),
    ("smt.py {TINY} --n_heads 0", "--n_heads"),
    ("smt.py {TINY} --d_model 6", "--head_dim"),
    ("smt.py {TINY} --head_dim 3", "--head_dim"),
    ("smt.py {TINY} --ctx_len 1", "--ctx_len"),
    ("smt.py {TINY} --ctx_len 6", "--ctx_len"),  # the query would never be seen
    ("bptt.py {TINY} --enc_layers 2", "--enc_layers"),  # no encoder there
    ("bptt.py {TINY} --heads 4", "--heads"),
    ("transformer.py {TINY} --mem_tokens 2", "--mem_tokens"),  # no memory there
    ("transformer.py {TINY} --mem_dim 8", "--mem_dim"),
    ("transformer.py {TINY} --heads 4", "--heads"),
    ("smt.py {TINY} --fut_len -1", "--fut_len"),
    ("smt.py {TINY} --image_size 14", "--image_size"),
    ("smt.py {TINY} --glyphs abc", "--glyphs"),
    ("smt.py {RUN} --dataset glyphs --length 8", "--length"),
    ("smt.py {RUN} --dataset glyphs --glyphs ''", "--glyphs"),
    ("smt.py {TINY} --length 2", "--length"),
    ("smt.py {TINY} --symbols 1", "--symbols"),
    ("smt.py {TINY} --micro 3", "--micro"),
    ("smt.py {TINY} --enc_layers 1000000000", "--enc_layers"),
    ("smt.py {TINY} --mem_tokens 1000000000000000000", "--mem_tokens"),
    ("smt.py {TINY} --d_model 1000000", "out of memory"),
    ("smt.py --dataset recall --key_len 1000000000000", "--key_len"),
    ("bench.py --dataset text", "--dataset"),
    ("smt.py {TINY} --noise 1.5", "--noise"),
    ("smt.py {TINY} --noise nan", "--noise"),
    ("smt.py {TINY} --needle_range 7", "--needle_range"),
    ("smt.py {TINY} --variant theirs", "--variant"),
    ("smt.py {RUN} --dataset parity --variant ours", "--variant"),
    ("smt.py {RUN} --dataset recall --noise 0.1", "--noise"),
    ("smt.py {RUN} --dataset recency --gamma 1.5", "--gamma"),
    ("smt.py {TINY} --gamma 0.5", "--gamma"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --variant ours", "--variant"),
    ("smt.py {RUN} --dataset mnist --levels 3", "--levels"),
    ("smt.py {RUN} --dataset mnist --data_dir nowhere", "--data_dir"),
    ("smt.py {RUN} --dataset mnist --data_dir nowhere", "train-images"),
    ("smt.py {TINY} --device cuda:99", "--device"),
    ("smt.py {TINY} --device toaster", "--device"),
    ("smt.py {TINY} --device meta", "--device"),
    ("smt.py {TINY} --out_dir file", "--out_dir file"),
    ("smt.py {TINY} --out_dir file/below", "--out_dir file/below"),
    ("smt.py {TINY} --out_dir /proc/nobody/writes/here", "--out_dir"),
    ("smt.py {TINY} --out_dir runs/smt", "--overwrite"),
    ("smt.py {TINY} --out_dir runs/smt --resume --overwrite", "--overwrite"),
    ("smt.py {TINY} --out_dir runs/nothing --resume", "runs/nothing"),
    ("smt.py {TINY} --out_dir runs/bptt --resume", "bptt.py"),
    ("smt.py --out_dir runs/smt --resume --lr 0.1", "--lr"),
    ("smt.py --out_dir runs/smt --resume --d_model 32", "--d_model"),
    ("smt.py --out_dir runs/smt --resume --length 9", "--length"),
    ("smt.py --out_dir runs/smt --resume --dataset glyphs", "--dataset"),
    ("smt.py --out_dir runs/smt --resume --decay 1", "--decay"),
    ("smt.py --ckpt runs/smt/ckpt.pt", "--ckpt"),  # the flag is another script's
    ("dmt.py {RUN}", "--ckpt"),
    ("dmt.py {RUN} --ckpt nowhere.pt", "nowhere.pt"),
    ("dmt.py {RUN} --ckpt runs", "runs"),
    ("dmt.py {RUN} --ckpt runs/bptt/ckpt.pt", "runs/bptt/ckpt.pt"),
    ("dmt.py {RUN} --ckpt runs/transformer/ckpt.pt", "runs/transformer/ckpt.pt"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --d_model 16", "--d_model"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --length 8", "--length"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --dataset glyphs", "--dataset"),
    ("dmt.py {RUN} --ckpt runs/init/ckpt.pt", "is from bptt.py"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --horizon -1", "--horizon"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --span 0", "--span"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --span 9", "--span 9 does not fit"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --spans -1", "--spans"),
    ("smt.py {TINY} --decay 1.5", "--decay"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --first 2", "--first"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --lambda_mse inf", "--lambda_mse"),
    ("dmt.py {RUN} --ckpt runs/smt/ckpt.pt --heads 3", "--heads"),
    ("dmt.py --out_dir runs/dmt --resume --lambda_mse 3", "--lambda_mse"),
    ("dmt.py --out_dir runs/dmt --resume --ckpt runs/smt/ckpt.pt", "--ckpt"),
    ("bptt.py {TINY} --truncate -1", "--truncate"),
    ("bptt.py {TINY} --lambda_dyn 1", "--lambda_dyn"),
    ("bptt.py {RUN} --init nowhere.pt", "nowhere.pt"),
    ("bptt.py {RUN} --init runs/transformer/ckpt.pt", "runs/transformer/ckpt.pt"),
    ("bptt.py {RUN} --init runs/smt/ckpt.pt --mem_tokens 2", "--mem_tokens"),
    ("transformer.py {TINY} --ckpt runs/smt/ckpt.pt", "--ckpt"),
    ("transformer.py {TINY} --batch_size 2.5", "--batch_size"),
    ("evaluate.py", "--ckpt"),
    ("evaluate.py --ckpt nowhere.pt", "nowhere.pt"),
    ("evaluate.py --ckpt runs/smt/ckpt.pt --n_test 0", "--n_test"),
    ("evaluate.py --ckpt runs/smt/ckpt.pt --n_test all", "--n_test"),
    ("evaluate.py --ckpt runs/smt/ckpt.pt --split train", "--split"),
    ("evaluate.py --ckpt runs/smt/ckpt.pt --threads -1", "--threads"),
    ("evaluate.py --ckpt runs/smt/ckpt.pt --seed 1" + "0" * 30, "--seed"),
    ("evaluate.py --ckpt runs/smt/ckpt.pt --device toaster", "--device"),
    ("sample.py --ckpt nowhere.pt", "nowhere.pt"),
    ("sample.py --ckpt runs/transformer/ckpt.pt", "runs/transformer/ckpt.pt"),
    ("sample.py --ckpt runs/smt/ckpt.pt --n -1", "--n"),
    ("sample.py --ckpt runs/smt/ckpt.pt --temperature -1", "--temperature"),
    ("sample.py --ckpt runs/smt/ckpt.pt --temperature nan", "--temperature"),
    ("sample.py --ckpt runs/smt/ckpt.pt --top_k -1", "--top_k"),
    ("sample.py --ckpt runs/smt/ckpt.pt --seed 1" + "0" * 30, "--seed"),
    # retrieval has no images to complete
    ("sample.py --ckpt runs/smt/ckpt.pt --prefix", "--prefix"),
    ("sample.py --ckpt runs/smt/ckpt.pt --device toaster", "--device"),
    ("sample.py --ckpt ''", "--ckpt"),
    ("sample.py --out ''", "--out"),
    ("evaluate.py --ckpt ''", "--ckpt"),
    ("data.py --n 3", "--n"),
    ("data.py glyphs --out ''", "--out"),
    ("smt.py {TINY} --lambda_dec 0 --heads 3", "--heads"),
    ("reproduce.py --list --quick", "--quick"),
    ("reproduce.py fig11 --results_dir file", "--results_dir"),
    ("reproduce.py fig11 --runs_dir ''", "--runs_dir"),
]


@pytest.mark.parametrize("line, named", BAD)
def test_a_mistake_is_one_line_and_leaves_no_trace(line, named, here, command, monkeypatch):
    """A bad command line exits with 2 and one line that names the culprit, before anything is
    written."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(images, "MIRRORS", ("http://127.0.0.1:9/",))  # nobody listens: offline
    before = files(here)
    code, out, err = command(line)
    assert code == 2
    assert err.count("\n") == 1 and err.startswith(line.split()[0]
                                                   + ": error: ") and named in err, err
    assert "Traceback" not in out + err
    assert files(here) == before


@pytest.fixture(scope="module")
def picture_ckpt(tmp_path_factory):
    """The checkpoint of an untrained RNN for pictures of 2x3 pixels, which is all that sampling
    needs."""
    from checkpoints import FORMAT
    from model import RNN, ModelConfig
    c = ModelConfig(vocab=3, n_out=2, T=6, d_model=8, n_heads=1, mem_tokens=2, rnn_layers=1,
                    dec_layers=1, ctx_len=6, fut_len=6, heads=6)
    path = tmp_path_factory.mktemp("pictures") / "rnn.pt"
    torch.save(dict(format=FORMAT, script="smt", config=dict(dataset="glyphs", preset="laptop"),
                    image=(2, 3),
                    model=dataclasses.asdict(c), rnn=RNN(c).state_dict()), path)
    return path


@pytest.mark.parametrize("out", ["nowhere/a.png", "", "folder"])
def test_a_picture_that_cannot_be_written(out, picture_ckpt, command, tmp_path, monkeypatch):
    """sample.py --out into a missing folder, or onto a folder, is refused and leaves no
    half-written file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    before = files(tmp_path)
    code, _, err = command(f"sample.py --device cpu --n 2 --ckpt {picture_ckpt} --out '{out}'")
    assert code == 2 and err.count("\n") == 1 and "--out" in err, err
    assert files(tmp_path) == before


@pytest.mark.parametrize("temperature", ["0", "1e-40", "1e-300", "1e18"])
def test_extreme_temperatures_still_draw(temperature, picture_ckpt, command, tmp_path):
    """Every temperature from 0 up means something, however small or large."""
    code, _, err = command(f"sample.py --device cpu --n 2 --ckpt {picture_ckpt} "
                           f"--out {tmp_path}/a.png --temperature {temperature}")
    assert code == 0, err
    assert (tmp_path / "a.png").exists()


def test_without_a_compiler(command, tmp_path, monkeypatch):
    """--compile is refused before anything is written, not in the first step."""
    monkeypatch.setattr("torch.compile", lambda f, **how: lambda x: 1 / 0)  # any type of error
    code, _, err = command(f"smt.py {{TINY}} --compile --out_dir {tmp_path}/run")
    assert code == 2 and err.count("\n") == 1 and "--compile" in err, err
    assert not (tmp_path / "run").exists()


def test_other_failures_keep_their_traceback(monkeypatch):
    """cli hides the user's mistakes only: a bug of ours is raised whole, and running out of memory
    is explained."""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    def raising(error):
        def main(argv):
            raise error
        return main

    with pytest.raises(RuntimeError, match="a bug"):
        console.cli(raising(RuntimeError("a bug")))
    with pytest.raises(SystemExit, match="2"):
        console.cli(raising(RuntimeError("CUDA out of memory. Tried to allocate")))
    with pytest.raises(SystemExit, match="130"):
        console.cli(raising(KeyboardInterrupt()))


@pytest.mark.parametrize("mine, want", [
    ({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(mine, want):
    """Before torch is imported, or it would not be heard."""
    code = "import sys, os\nclass Spy:\n    def find_spec(self, name, *rest):\n" \
           "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT')); sys.exit()\n" \
           "sys.meta_path.insert(0, Spy())\nimport console"
    ours = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    env = {k: v for k, v in os.environ.items() if k not in ours} | mine
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True,
                         text=True)
    assert out.stdout.strip() == want, out.stderr


def test_a_real_process(tmp_path):
    """From another folder, in a process of its own: a mistake exits with 2 and one line, --help
    with 0."""
    call = lambda *flags: subprocess.run([sys.executable, ROOT / "smt.py", *flags], cwd=tmp_path,
                                         capture_output=True,
                                         text=True, timeout=120)
    bad = call("--lr", "fast")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "smt.py: error: argument --lr: invalid float value: 'fast'\n"
    good = call("--help")
    assert good.returncode == 0 and good.stderr == "" and "--lambda_dyn" in good.stdout
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- what is printed

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default(script, command):
    """Each flag in --help says what happens without it."""
    code, out, _ = command(f"{script}.py --help")
    flags = re.split(r"\n  (?=-)", re.split(r"\n\w+:\n", out, maxsplit=1)[1])
    assert code == 0 and len(flags) > 5
    for text in flags:
        text = " ".join(re.split(r"\n\n\w+:\n", text)[0].split())  # less the next group's heading
        assert not text or text.startswith("-h") or "(default: " in text or "required" in text, text


@pytest.mark.parametrize("script", SCRIPTS + ("bench", "data"))
def test_help_fits_on_two_pages(script, command):
    """At most 100 lines of 100 columns, wherever $SMT_DATA_DIR is; the groups come in order."""
    code, out, _ = command(f"{script}.py --help")
    lines = [line for line in out.split("\n") if f"{flags.Config.data_dir})" not in line]
    assert code == 0 and out.count("\n") <= 100 and max(map(len, lines)) <= 100
    if script in SCRIPTS[:4]:
        places = [out.index(f"\n{group}:\n") for group in flags.GROUPS]
        assert places == sorted(places)


@pytest.mark.parametrize("script", ["smt", "bptt", "transformer"])
def test_help_is_about_the_dataset_that_is_named(script, command):
    """It shows the options of that dataset and of no other, and the defaults of its recipe."""
    for dataset, options in data.OPTIONS.items():
        _, out, _ = command(f"{script}.py --dataset {dataset} --help")
        shown = {name for name in data.HELP if re.search(rf"\n  --{name}\b", out)}
        assert shown == set(options) and "--dataset NAME --help" in out
        minutes = presets.recipe("smt" if script == "smt" else "bptt", "laptop",
                                 data.kinds(dataset))["minutes"]
        assert re.search(rf"--minutes [^-]* \(default:\s+{minutes}\)", out)


def test_presets_hold_every_recipe():
    """The laptop's block names every flag that has no default of its own, for the methods that have
    it, and no other; later blocks change flags that are there; nothing but a dataset's options is
    added."""
    import bptt
    import dmt
    import smt
    for module in (smt, dmt, bptt):
        wanted = {f.name for f in dataclasses.fields(module.Config)
                  if f.default is dataclasses.MISSING}
        assert presets.recipe(module.__name__, "laptop").keys() == wanted
        for preset in presets.PRESETS:
            for dataset, options in data.OPTIONS.items():
                recipe_of = presets.recipe(module.__name__, preset, data.kinds(dataset))
                assert recipe_of.keys() - options.keys() == wanted, (preset, dataset)


@pytest.mark.parametrize("name", data.SYNTHETIC)
def test_a_synthetic_task_has_the_recipe_of_its_kind(name):
    """Not the one of pictures: labels and futures reach over the whole sequence."""
    assert "synthetic" in data.kinds(name)
    for preset in presets.PRESETS:
        r = presets.recipe("smt", preset, data.kinds(name))
        assert r["ctx_len"] == 0
        assert r["fut_len"] == 0


def test_no_synthetic_task_is_forgotten():
    """What sources/tasks.py makes is in data.SYNTHETIC, by which presets and tests go."""
    assert {name for name in data.OPTIONS if hasattr(tasks, name)} == set(data.SYNTHETIC)


def test_json_is_alone_on_stdout(here, command):
    """evaluate.py --json prints one JSON object and nothing else, with null where a number does not
    apply."""
    keys = set("dataset split n units teacher one_step rollout bayes excess drift drift_by_time "
               "one_step_drift kl stderr".split())
    for script in ("smt", "dmt", "bptt", "transformer"):
        code, out, err = command("evaluate.py --device cpu --n_test 20 --json "
                                 f"--ckpt {here}/runs/{script}/ckpt.pt")
        result = json.loads(out, parse_constant=pytest.fail)  # NaN is no JSON
        assert code == 0 and err == "" and keys <= set(result) and result["n"] == 20
        assert (result["rollout"] is None) == (script == "transformer")
        assert (result["drift"] is None) == (script in ("bptt", "transformer"))
    assert (here / "runs/smt/evaluation.png").exists()


def test_a_pipe_gets_plain_lines_and_log_csv_parses(command, tmp_path):
    """Without a terminal a run prints plain lines, and log.csv holds the same numbers with one row
    a step."""
    code, out, err = command("smt.py {TINY} --steps 7 --log_every 2 --eval_every 3 "
                             f"--out_dir {tmp_path}/run")
    assert code == 0 and err == "" and "\r" not in out
    rows = list(csv.DictReader(open(tmp_path / "run" / "log.csv")))
    assert [int(r["step"]) for r in rows] == [2, 3, 4, 6, 7]
    assert f"step 4/7 | loss {float(rows[2]['loss']):.4f}" in out
    assert float(rows[3]["val_rollout"]) > 0 and float(rows[3]["loss"]) and rows[0]["val_rollout"] \
        == ""


def test_evaluating_does_not_change_training(command, tmp_path):
    """However often a run is evaluated, it ends with the same weights."""
    finals = []
    for every in (2, 5):
        line = f"smt.py {{TINY}} --steps 10 --eval_every {every} --out_dir {tmp_path}/{every}"
        assert command(line)[0] == 0
        finals.append(final(tmp_path / str(every)))
    assert distance(*finals) == 0


def test_a_run_in_steps_has_no_clock(tmp_path, monkeypatch):
    """--steps alone sets no limit in minutes and --minutes alone none in steps, so that steps
    repeat exactly."""
    import smt
    monkeypatch.chdir(tmp_path)  # here there may be a run of the quick start
    parse = lambda *argv: flags.parse("smt", smt.Config, ["--device", "cpu", *argv], "")[0]
    assert parse().minutes == recipe(smt).minutes > 0 and parse().steps == 0
    assert (parse("--steps", "7").steps, parse("--steps", "7").minutes) == (7, 0)
    both = parse("--steps", "7", "--minutes", "2")
    assert (both.steps, both.minutes) == (7, 2)
    assert parse("--preset", "paper").steps == 150_000
    assert parse("--preset", "paper", "--minutes", "2").steps == 0


# ------------------------------------------------------------------------ every flag does something

def final(out_dir):
    """All weights of a run's last checkpoint, by name."""
    ckpt = torch.load(out_dir / "ckpt.pt", weights_only=True)
    return {f"{net}.{k}": v for net in ("encoder", "decoder", "rnn", "heads") for k,
            v in ckpt.get(net, {}).items()}


def distance(a, b):
    """Largest difference of two sets of weights; infinite where their shapes differ."""
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        return float("inf")
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# "a + b": what b changes on top of a.
SMT = ("--seed 1 | --batch_size 5 | --lr 0.01 | --warmup 3 | --warmup 0.5 | --decay 1 | "
       "--lambda_dec 2 | --lambda_dyn 2 | --lambda_unif 2 | --detach_rnn | --times 4 | "
       "--rnn_batch 2 | --rnn_from 0 | "
       "--no-decode_own | --first 0.7 | --futures 3 | --lambda_fut 3 | --octaves | --horizon 1 | "
       "--horizon 3 | --heads 0 | --heads 2 | --heads_part 0.5 | --past 3 | "
        "--past 3 + --lambda_past 3 | "
       "--mem_dim 12 | --timestamps none | "
       "--timestamps encoder | --micro 2 | --encoder bidirectional | --fut_len 2 | "
       "--encoder bidirectional + --ctx_len 3 | --mem_tokens 3 | --d_model 20 | --n_heads 4 | "
       "--head_dim 4 | --enc_layers 1 | --dec_layers 2 | --rnn mlp + --rnn_layers 2 | --rnn mlp | "
       "--rnn transformer | --ema 0.05 | --optimizer adamw | --length 9 | --symbols 4 | "
       "--noise 0.9 | "
       "--needle_range 5").split(" | ")
DMT = ("--seed 1 | --batch_size 5 | --lr 0.01 | --lambda_dec 3 | --detach_dec | "
       "--lambda_mse 5 | --span 1 | --spans 5 | --first 0 | "
       "--lambda_past 3 | --heads_part 0.5 | --ema 0.05 | --horizon 1 | --horizon 3").split(" | ")
BPTT = ("--lr 0.01 | --truncate 1 | --truncate 2 | --truncate 7 | --init {tiny_smt} | "
        "--first 0.5 | --lambda_heads 1 | --lambda_heads 1 + --heads 2 | "
        "--lambda_heads 1 + --heads_part 0.5").split(" | ")
WITHOUT = set("recompute dataset data_dir preset device threads compile graph ckpt init".split()) \
    | set(data.HELP)
# where, on what (tests of the data see to those flags), from what and how it runs


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases"), {}


@pytest.mark.parametrize("script, flag", [
    (s, f) for s, fs in (("smt", SMT), ("dmt", DMT), ("bptt", BPTT)) for f in fs])
def test_every_flag_changes_the_result(script, flag, command, tiny_smt, bases, tmp_path,
                                       monkeypatch):
    """Changing one flag changes the weights after four steps: none is accepted and then
    forgotten."""
    # for the weights alone
    monkeypatch.setattr(trainer.Run, "time_to_evaluate", lambda self: False)

    def weights(flags, out_dir):
        start = "--ckpt {tiny_smt} --span 3" if script == "dmt" else \
            "" if "--init" in flags else "{TASK} {SIZES}"
        code, _, err = command(f"{script}.py {start} {{RUN}} --lr 0.02 --warmup 0 --steps 4 "
                               f"{flags} --out_dir {out_dir}", tiny_smt=tiny_smt)
        assert code == 0, err
        return final(out_dir)

    folder, made = bases
    base, _, change = flag.rpartition(" + ")
    if (script, base) not in made:
        made[script, base] = weights(base, folder / f"{script}{len(made)}")
    assert distance(made[script, base], weights(f"{base} {change}", tmp_path / "run")) > 1e-6


def test_the_table_of_flags_is_complete():
    """Whoever adds a flag to a method adds it to the table above."""
    import bptt
    import dmt
    import smt
    for module, table in ((smt, SMT), (dmt, SMT + DMT), (bptt, SMT + BPTT)):
        tried = {w.removeprefix("--").removeprefix("no-") for line in table for w in line.split()
                 if w.startswith("--")}
        flags = {f.name for f in dataclasses.fields(module.Config) if f.metadata["group"] != "run"}
        assert flags - tried - WITHOUT == set()
