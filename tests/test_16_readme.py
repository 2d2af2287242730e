"""Lesson: the README tells the truth. Its commands run, in its order, at tiny size; its Python and
its map are checked."""
import dataclasses
import glob
import gzip
import os
import re
import shlex
import struct

import pytest
import tiny
import torch

import bptt
import data
import dmt
import evaluate
import flags
import model
import sample
import smt
import transformer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = open(os.path.join(ROOT, "README.md")).read()
SCRIPTS = dict(smt=smt, dmt=dmt, bptt=bptt, transformer=transformer, evaluate=evaluate,
               sample=sample)
SIZES = "--d_model 8 --n_heads 1 --dec_layers 1".split()
LENGTH = "--steps 1 --eval_every 0 --threads 1 --batch_size 2 --overwrite".split()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


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
        argv = [os.path.join(ROOT, word) if word.startswith("results/") else word for word in argv]
        # what reads no files refuses to be told where they are
        where = ["--data_dir", tiny_mnist] if any("mnist" in word for word in argv) else []
        if name in ("evaluate", "sample"):
            argv += ["--n_test", "2"] if name == "evaluate" else ["--n", "1"]
            if name == "evaluate" or "--prefix" in argv:
                argv += where
        else:
            for flag in ("--minutes", "--steps", "--threads"):  # a reader's hour is not ours
                if flag in argv:
                    del argv[argv.index(flag):argv.index(flag) + 2]
            argv += LENGTH + where + ([] if "--ckpt" in argv or "--init" in argv else SIZES)
            if "--resume" in argv:
                argv.remove("--overwrite")
                argv = argv[:argv.index("--steps")] + ["--steps", "2"]
        SCRIPTS[name].main(argv)
    assert seen == set(SCRIPTS), f"the README shows no command of {set(SCRIPTS) - seen}"


def test_python_example_runs(capsys):
    """The lines that step the RNN through a sequence work on the checkpoint that comes with the
    project."""
    code = next(block for block in blocks("python") if "checkpoints.load" in block)
    scope = {}
    exec(code.replace('"results/', f'"{ROOT}/results/'), scope)
    assert scope["m"].shape[1:] == scope["rnn"].m0.shape


def test_dataset_example_runs(monkeypatch):
    """The lines that add a dataset of one's own give sequences that follow the index convention."""
    page = open(os.path.join(ROOT, "results", "data.md")).read()
    code = next(block for block in blocks("python", page) if "image_data" in block)
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


# ----------------------------------------------------------------------------- paper, code, lesson

def test_map_covers_the_paper():
    """Each equation, m_0, DMT and BPTT has a place in the code and a lesson that proves it."""
    rows = [line.split("|")[1:4] for line in README.splitlines() if "`tests/test_" in line]
    for words in ("Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Eq. 5", "Eq. 6", "m_0", "DMT", "BPTT"):
        found = [(code, lesson) for paper, code, lesson in rows if words in paper]
        assert found and all(".py` `" in code and "` `test_" in lesson for code, lesson in found), \
            words


def test_what_must_be_read_is_counted():
    """The number of lines is that of the named files, to a tenth."""
    said = re.search(r"\*\*What must I read\?\*\*(.*?)about ([\d,]+) lines", README, re.S)
    files = re.findall(r"`(\w+\.py)`", said[1])
    assert "model.py" in files and "smt.py" in files
    lines = sum(len(open(os.path.join(ROOT, f)).readlines()) for f in files)
    assert abs(lines - int(said[2].replace(",", ""))) < 0.1 * lines


def test_first_screen():
    """The first command by line 25, all of it in 170 lines."""
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("python ")) <= 25
    assert len(lines) <= 170


def test_links_lead_somewhere():
    """Files and headings that the pages point at exist."""
    pages = glob.glob("results/**/*.md", root_dir=ROOT, recursive=True)
    assert len(pages) > 8
    for page in ("README.md", "tests/README.md", *pages):
        text = open(os.path.join(ROOT, page)).read()
        for path, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if path.startswith("https://"):
                continue  # no test needs the network
            target = os.path.join(ROOT, os.path.dirname(page), path) if path else \
                os.path.join(ROOT, page)
            assert os.path.exists(target), path
            if anchor:
                headings = re.findall(r"^#+ (.*)$", open(target).read(), re.M)
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in slugs, anchor


# ----------------------------------------------------------------------------- what differs from it

LISTED = "encoder timestamps heads past".split()  # of the networks' flags; the others are sizes


def resolved(script, preset, dataset="mnist"):
    return vars(flags.config(script.__name__, script.Config, preset, dataset))


def differing(script):
    """Flags of the method, not sizes and lengths, whose value is not the paper preset's."""
    ours, paper = resolved(script, "laptop"), resolved(script, "paper")
    names = [f.name for f in dataclasses.fields(script.Config)
             if f.metadata["group"] == "method" or f.name in LISTED and script is smt]
    return {n for n in names if ours[n] != paper[n]} - {"preset"}


def rows_of_the_list():
    page = open(os.path.join(ROOT, "results", "paper", "README.md")).read()
    cells = [[c.strip() for c in line.split("|")[1:6]] for line in page.splitlines()
             if line.startswith("| `--")]
    return {row[0].strip("`-"): row[1:] for row in cells}


def test_list_of_deviations_is_complete():
    """Every flag by which the default differs from `paper` is in the table and in the README."""
    listed = rows_of_the_list()
    section = README[README.index("## Where we differ"):README.index("## Troubleshooting")]
    for script, columns in ((smt, slice(0, 2)), (dmt, slice(2, 4))):
        assert {n for n, row in listed.items() if any(row[columns])} == differing(script)
    assert all(f"`--{name}`" in section for name in listed), set(listed)
    known = {f.name for script in (smt, dmt) for f in dataclasses.fields(script.Config)}
    assert set(re.findall(r"`--(\w+)", section)) <= known  # and no flag of old


@pytest.mark.parametrize("name", rows_of_the_list())
def test_values_of_the_list(name):
    """A row's values are those that the scripts resolve."""
    row = iter(rows_of_the_list()[name])
    for script in (smt, dmt):
        for preset in ("laptop", "paper"):
            cell = next(row)
            assert cell == "" or cell == str(resolved(script, preset)[name])


def test_numbers_in_the_text():
    """The span, the sizes of the presets, and what other data have."""
    span = resolved(dmt, "laptop")["span"]
    length = data.load("glyphs").T
    assert f"at most S = {span} of {length - 1} updates" in README.replace("\n", " ")
    for preset in ("laptop", "gpu", "paper"):
        c = resolved(smt, preset)
        sizes = f"d {c['d_model']}, K {c['mem_tokens']}, " \
                f"{c['enc_layers']} + {c['dec_layers']} + " \
                f"{'GRU' if c['rnn'] == 'gru' else c['rnn_layers']}"
        assert re.search(rf"`{preset}` \|[^|]*\| {re.escape(sizes)} ", README), sizes
    paper = resolved(smt, "paper")
    assert f"{paper['batch_size'] // paper['micro']} sequences of a `paper` step" in README


def test_what_no_flag_changes():
    """The other list: no gains, no biases, embeddings of one's own, all dimensions turned, memories
    of root-mean-square 1."""
    encoder, decoder, rnn = tiny.networks(timestamps="none")
    for net in (encoder, decoder, rnn):
        for name, p in net.named_parameters():
            assert p.ndim == 2, f"{name} is a gain or a bias"
    tables = [net.event.symbol.weight for net in (encoder, decoder, rnn.updater)]
    assert len({t.data_ptr() for t in tables}) == 3
    cos, _ = model.rope(torch.tensor([1]), 8)
    assert cos.shape == (1, 4) and (cos < 1).all()  # four pairs: eight of eight dimensions
