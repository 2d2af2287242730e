"""
Lesson: whoever writes files can destroy them. One function writes everything, whole or not at all,
over plain files alone; one run at a time owns a folder; an old run goes when the new one can take
its place; and what was packed for later is used only if it is still what was written.
"""
import csv
import gzip
import os
import shlex
import signal
import stat
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, RUN, SIZES, TASK

import data
import trainer
from sources import files, text
from sources import images as pictures
from sources.files import DataError, UserError, written_whole

LINE = f"{TASK} {SIZES} {RUN} --threads 1"


def start(script, line, cwd, **more):
    """The script as a process of its own, with one thread."""
    return subprocess.Popen([sys.executable, ROOT / script, *line.split()], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | dict(OMP_NUM_THREADS="1"), **more)


def steps(folder):
    return [int(r["step"]) for r in csv.DictReader(open(folder / "log.csv"))]


# --------------------------------------------------------------------------------- plain files only

def odd_file(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path)
    else:
        path.symlink_to("/dev/null")


@pytest.mark.parametrize("kind", ["pipe", "folder", "a link to itself", "a link to a device"])
def test_only_plain_files_are_replaced(kind, tmp_path):
    """A device or a pipe stays what it is; to open a pipe would wait for ever."""
    path = tmp_path / "out"
    odd_file(kind, path)
    before = os.lstat(path)
    with pytest.raises(UserError, match="out.*cannot be written.*not a regular file.*or"):
        with written_whole(path) as f:
            f.write(b"x")
    after = os.lstat(path)
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)
    assert os.listdir(tmp_path) == ["out"] and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_link_is_followed(tmp_path):
    """What it points to is replaced, or made, and the link stays."""
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):
        link, target = tmp_path / name, tmp_path / "there" / name
        link.symlink_to(target)
        if name == "old":
            target.write_bytes(b"old")
        with written_whole(link) as f:
            f.write(b"new")
        assert link.is_symlink() and target.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path / "there")) == ["new", "old"]


def test_no_script_replaces_a_device_or_hangs(command, tiny_smt, tmp_path):
    """Whatever stands where a run writes, it is one line and stays."""
    for name in ("log.csv", "ckpt.pt", "config.json", "curve.png", "samples.txt"):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        os.mkfifo(folder / name)
        code, _, err = command(f"smt.py {{TINY}} --out_dir {folder}")
        assert code == 2 and err.count("\n") == 1 and name in err and "--out_dir" in err, err
        assert stat.S_ISFIFO(os.lstat(folder / name).st_mode)


def test_what_a_dead_process_left_is_removed(tmp_path):
    """A part without a lock is nobody's. One that a living process writes stays."""
    litter, other = tmp_path / "a.1.part", tmp_path / "b.1.part"
    alive = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; sys.path.insert(0, sys.argv[1])\n"
         "from sources.files import written_whole\n"
         "with written_whole(sys.argv[2]) as f: print(f.name, flush=True); time.sleep(60)",
         ROOT, tmp_path / "a"], stdout=subprocess.PIPE, text=True)
    try:
        theirs = alive.stdout.readline().strip()
        litter.write_bytes(b"x")
        other.write_bytes(b"x")
        for part in (litter, other, theirs):
            os.utime(part, (1, 1))
        with written_whole(tmp_path / "a") as f:
            f.write(b"y")
        assert sorted(os.listdir(tmp_path)) == sorted(["a", other.name, os.path.basename(theirs)])
        alive.kill()
        alive.wait()
        with written_whole(tmp_path / "a") as f:
            f.write(b"z")
        assert sorted(os.listdir(tmp_path)) == ["a", other.name]
    finally:
        alive.kill()
        alive.wait()


def test_a_full_disk_names_the_place_that_is_full(tmp_path, monkeypatch):
    """Packing a text says where the packed copy was to go, not that the source is bad."""
    source = tmp_path / "source.gz"
    source.write_bytes(gzip.compress(os.urandom(300_000).hex().encode()))
    place = tmp_path / "cache"
    place.mkdir()
    monkeypatch.setattr(files, "cache_path", lambda source, suffix, *facts: place / ("p" + suffix))
    resource = pytest.importorskip("resource", reason="POSIX only")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=f"^{place}/p.bytes: cannot be written .*make room"):
            text.pack(str(source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(place) == []


# ------------------------------------------------------------------------------- sources and caches

@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"",
                                    lambda b: b[:99] + b"?" + b[100:]])
def test_a_damaged_packed_text_is_packed_again(damage, tmp_path):
    """Half the data, or one other byte, is not used as if nothing had happened."""
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"once upon a time " * 200))
    load = lambda: text.load_bytes("text", tmp_path, str(path))[1]["train"].tobytes()
    whole = load()
    for name in ("*.bytes", "*.sha256"):
        [packed] = tmp_path.glob(name)
        packed.write_bytes(damage(packed.read_bytes()))
        assert load() == whole


def test_a_text_that_shrinks_while_in_use(tmp_path):
    """A message, where to touch the lost pages would kill the process."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"once upon a time " * 10_000)
    task = data.load("text", data_file=str(path), length=8)
    gen = torch.Generator().manual_seed(0)
    task.batch(4, gen)
    os.truncate(path, 5)
    for use in (lambda: task.batch(4, gen), lambda: task.held_out("test")):
        with pytest.raises(DataError, match=f"{path}.*shorter.*--resume"):
            use()


@pytest.mark.parametrize("when", ["memmap", "randint"])
def test_a_text_that_shrinks_within_a_read(when, tmp_path, monkeypatch):
    """Just after it was opened, or after a batch was begun: the bytes are not touched."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"once upon a time " * 10_000)
    module, gen = (np, torch)[when == "randint"], torch.Generator().manual_seed(0)
    real = getattr(module, when)

    def then_cut(*args, **more):
        out = real(*args, **more)
        os.truncate(path, 5)
        return out

    monkeypatch.setattr(module, when, then_cut)
    task = data.load("text", data_file=str(path), length=8)
    with pytest.raises(DataError, match=f"{path}.*shorter.*--resume"):
        task.batch(4, gen)


def test_a_pipe_is_no_picture(tmp_path):
    """A FIFO with a picture's name is left out, not waited for."""
    from PIL import Image
    for i in range(60):
        Image.new("L", (8, 8), 255 * (i % 2)).save(tmp_path / f"{i}.png")
    os.mkfifo(tmp_path / "x.png")
    got = pictures.folder_images("images", tmp_path, 8)
    assert sum(map(len, got.values())) == 60


@pytest.mark.parametrize("change", [lambda b: b"T" + b[1:], lambda b: b + b"x" * 400])
def test_resume_on_another_text_is_refused(change, command, tmp_path):
    """The same name, but not the text that the run began with; the right one is welcome."""
    tale = tmp_path / "tale.txt"
    tale.write_bytes(b"once upon a time " * 200)
    line = f"smt.py --dataset text --data_file {tale} --length 8 {{SIZES}} {{RUN}} --n_val 2"
    assert command(f"{line} --out_dir {tmp_path}/run")[0] == 0
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    right = tale.read_bytes()
    tale.write_bytes(change(right))
    resume = f"smt.py --resume --steps 5 --out_dir {tmp_path}/run"
    code, _, err = command(resume)
    assert code == 2 and err.count("\n") == 1 and "another text" in err, err
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before
    tale.write_bytes(right)
    assert command(resume)[0] == 0


def idx_file(path, seed):
    """So many random pictures as an MNIST file."""
    pixels = np.random.default_rng(seed).integers(256, size=(5_010, 28, 28), dtype=np.uint8)
    path.write_bytes(struct.pack(">IIII", 0x803, *pixels.shape) + pixels.tobytes())


def test_resume_on_other_pictures_is_refused(command, tmp_path):
    """Another idx file, or another picture in the folder; the right ones are welcome."""
    from PIL import Image
    images, mnist = tmp_path / "images", tmp_path / "mnist"
    images.mkdir()
    mnist.mkdir()
    for i in range(60):
        Image.new("L", (8, 8), 255 * (i % 2)).save(images / f"{i}.png")
    for name in pictures.MNIST_FILES:
        idx_file(mnist / name, 0)
    for task, change, back in (
            ("images --image_size 8", lambda: Image.new("L", (8, 8)).save(images / "new.png"),
             lambda: (images / "new.png").unlink()),
            ("mnist --image_size 14", lambda: idx_file(mnist / name, 1),
             lambda: idx_file(mnist / name, 0))):
        data_dir = tmp_path / task.split()[0]
        out_dir = tmp_path / "runs" / data_dir.name
        assert command(f"bptt.py --dataset {task} --data_dir {data_dir} {{SIZES}} {{RUN}} "
                       f"--n_val 2 --eval_every 0 --steps 1 --out_dir {out_dir}")[0] == 0
        resume = f"bptt.py --resume --steps 2 --out_dir {out_dir}"
        change()
        code, _, err = command(resume)
        assert code == 2 and err.count("\n") == 1 and "other pictures" in err, err
        back()
        code, _, err = command(resume)
        assert code == 0, err


# ----------------------------------------------------------------------------- a run and its folder

def test_the_old_run_stays_until_the_new_one_has_a_checkpoint(command, tmp_path, monkeypatch):
    """--overwrite, killed early, loses nothing; afterwards nothing of the old run is left."""
    class Killed(BaseException):
        pass

    line = f"smt.py {{TINY}} --out_dir {tmp_path}"
    assert command(f"{line} --steps 6 --log_every 2")[0] == 0
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "samples.png").write_bytes(b"of the old run")
    real = trainer.Run.update

    def update(self, *args, **more):
        real(self, *args, **more)
        if self.step == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.Run, "update", update)
        command(f"{line} --overwrite --steps 9 --log_every 1 --seed 1")
    assert all((tmp_path / name).read_bytes() == content for name, content in old.items())
    assert command(f"{line} --overwrite --steps 5 --log_every 1 --ckpt_every 3 --eval_every 2 "
                   "--seed 1")[0] == 0
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["config"]["seed"] == 1
    assert steps(tmp_path) == [1, 2, 3, 4, 5] and not (tmp_path / "samples.png").exists()
    assert torch.load(tmp_path / "best.pt", weights_only=True)["config"]["seed"] == 1
    assert '"seed": 1' in (tmp_path / "config.json").read_text()


def test_a_run_does_not_replace_where_it_starts_from(command, tiny_smt, tmp_path):
    """--out_dir is not the folder of --ckpt or --init, by whatever name."""
    (tmp_path / "ckpt.pt").write_bytes(tiny_smt.read_bytes())
    (tmp_path / "same").symlink_to(tmp_path)
    for script, flag in (("dmt", "ckpt"), ("bptt", "init")):
        for out_dir in (tmp_path, tmp_path / "same"):
            code, _, err = command(f"{script}.py {{RUN}} --{flag} {tmp_path}/ckpt.pt --overwrite "
                                   f"--out_dir {out_dir}")
            assert code == 2 and err.count("\n") == 1 and "--out_dir" in err, err
    link = tmp_path / "elsewhere" / "link.pt"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "ckpt.pt")
    code, _, err = command(f"dmt.py {{RUN}} --ckpt {link} --overwrite --out_dir {tmp_path}")
    assert code == 2 and err.count("\n") == 1 and "--out_dir" in err, err
    code, _, err = command(f"sample.py --ckpt {link} --out {tmp_path}/ckpt.pt")
    assert code == 2 and err.count("\n") == 1, err
    assert (tmp_path / "ckpt.pt").read_bytes() == tiny_smt.read_bytes()


@pytest.mark.parametrize("name", ["best.pt", "config.json"])
def test_what_is_left_of_a_run_is_not_replaced_unasked(name, command, tmp_path):
    """A folder whose ckpt.pt was moved away still holds somebody's run."""
    (tmp_path / name).write_text("mine")
    code, _, err = command(f"smt.py {{TINY}} --out_dir {tmp_path}")
    assert code == 2 and err.count("\n") == 1 and "--overwrite" in err, err
    assert "--resume" not in err  # there is nothing to resume
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_shortest_run_has_a_step(command, tmp_path):
    """However short its minutes: what is called done can be used."""
    code, out, err = command(f"smt.py {{TINY}} --steps 0 --minutes 1e-9 --out_dir {tmp_path}")
    assert code == 0 and "done: 1 steps" in out and (tmp_path / "ckpt.pt").exists(), out + err


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_closed_outputs_are_not_the_log(closed, tmp_path):
    """A run whose stdin, stdout and stderr are closed writes nothing else into its files."""
    line = [sys.executable, str(ROOT / "smt.py"), *f"{TASK} {SIZES} {RUN}".split(),
            "--out_dir", str(tmp_path / "run")]
    done = subprocess.run(["sh", "-c", shlex.join(line) + " " + closed], timeout=120)
    assert done.returncode == 0
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len({row.count(",") for row in rows}) == 1 and len(rows) > 1


def test_two_runs_in_one_folder(command, tmp_path):
    """The second is refused in one line while the first lives, however it is called, and welcome
    when the first was killed."""
    line = f"--steps 1000000 --log_every 1 --ckpt_every 1 --out_dir {tmp_path}/run"
    with start("smt.py", f"{LINE} {line}", tmp_path) as first:
        try:
            assert any(said.startswith("step 3") for said in first.stdout)
            for how in ("smt.py --resume", "smt.py {TINY} --overwrite"):
                code, out, err = command(f"{how} --steps 2 --out_dir {tmp_path}/run")
                assert code == 2 and err.count("\n") == 1 and "another run" in err, err
        finally:
            first.kill()
            first.wait()
    at = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"]
    code, _, err = command(f"smt.py --resume --steps {at + 2} --out_dir {tmp_path}/run")
    assert code == 0 and steps(tmp_path / "run") == list(range(1, at + 3)), err


# ------------------------------------------------------------------------------------------ log.csv

def test_the_log_is_appended_and_cut_back(command, tmp_path):
    """Its first bytes stay; a resumed run begins behind its checkpoint, whatever a killed run or a
    power cut left there."""
    line = f"smt.py {{TINY}} --log_every 1 --eval_every 4 --ckpt_every 2 --out_dir {tmp_path}"
    assert command(f"{line} --steps 8")[0] == 0
    whole = (tmp_path / "log.csv").read_bytes()
    for left in (b"9,1.0,2,3\r\n10,1.5", b"\x00\xff\r\n", b"\r\n\r\nx,y\r\n"):
        (tmp_path / "log.csv").write_bytes(whole + left)
        code, _, err = command(f"smt.py --resume --steps 8 --out_dir {tmp_path}")
        assert code == 0 and (tmp_path / "log.csv").read_bytes() == whole, err
    node = os.stat(tmp_path / "log.csv").st_ino
    assert command(f"smt.py --resume --steps 12 --out_dir {tmp_path}")[0] == 0
    after = (tmp_path / "log.csv").read_bytes()
    assert after.startswith(whole) and os.stat(tmp_path / "log.csv").st_ino == node
    assert steps(tmp_path) == list(range(1, 13))
    (tmp_path / "log.csv").unlink()  # not needed to go on: the checkpoint knows its rows
    assert command(f"smt.py --resume --steps 14 --out_dir {tmp_path}")[0] == 0
    assert steps(tmp_path) == list(range(1, 15))
    assert (tmp_path / "log.csv").read_bytes().startswith(after)


def test_a_row_costs_the_same_however_long_the_log_is(command, tmp_path, monkeypatch):
    """What is written to log.csv grows with the rows, not with their square."""
    written, real = [], csv.DictWriter.writerows

    def count(self, rows):
        rows = list(rows)
        written.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(csv.DictWriter, "writerow", lambda self, row: count(self, [row]))
    monkeypatch.setattr(csv.DictWriter, "writerows", count)
    assert command(f"smt.py {{TINY}} --steps 60 --log_every 1 --eval_every 20 --rnn_from 0.5 "
                   f"--out_dir {tmp_path}")[0] == 0
    assert steps(tmp_path) == list(range(1, 61))
    # each row once; those before again for new columns, at the first evaluation and when the RNN
    # joins
    assert sum(written) <= 60 + 20 + 31 + 5


# ----------------------------------------------------------------------------- stopped from outside

def test_a_reader_that_leaves_stops_the_run_saved(tmp_path):
    """smt.py | head: as after Ctrl-C there is a checkpoint, and the exit code is not 0."""
    with start("smt.py", f"{LINE} --steps 1000000 --log_every 1 --out_dir {tmp_path}/run",
               tmp_path) as run:
        try:
            assert any(said.startswith("step 5") for said in run.stdout)
            run.stdout.close()
            code, err = run.wait(timeout=120), run.stderr.read()
        finally:
            run.kill()
    assert code == 128 + signal.SIGPIPE and err == ""
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] >= 5
    assert not list((tmp_path / "run").glob("*.part"))


def test_the_second_ctrl_c_saves_nothing_half(tmp_path, tiny_smt):
    """The first says what happens; the second, while the run evaluates, ends it at once."""
    code = "import sys, time; sys.path.insert(0, sys.argv[1])\n" \
           "import console, smt\n" \
           "def slow(*args, **more):\n" \
           "    print('evaluating', flush=True)\n" \
           "    time.sleep(60)\n" \
           "smt.evaluate = slow\n" \
           "sys.argv[1:] = sys.argv[2:]\n" \
           "console.cli(smt.main)"
    line = f"{LINE} --steps 1000000 --ckpt_every 2 --eval_every 5 --out_dir {tmp_path}/run"
    with subprocess.Popen([sys.executable, "-c", code, ROOT, *line.split()], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as run:
        try:
            assert any(said.startswith("evaluating") for said in run.stdout)
            began = time.time()
            run.send_signal(signal.SIGINT)
            said = run.stderr.readline()
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=50)
        finally:
            run.kill()
    assert run.returncode == 130 and time.time() - began < 50
    assert "stopping after this step" in said and err == ""
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == 4
    assert not list((tmp_path / "run").glob("*.part"))


def test_ctrl_c_during_imports_is_one_line(tmp_path):
    """Importing torch takes seconds, and nothing has begun."""
    (tmp_path / "slow" / "torch").mkdir(parents=True)
    (tmp_path / "slow" / "torch" / "__init__.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    for script in ("smt", "dmt", "bptt", "evaluate", "sample", "data", "bench", "reproduce"):
        with subprocess.Popen(
                [sys.executable, "-c", "import runpy, sys\n"
                 "sys.path[:0] = sys.argv[1:3]\n"
                 "runpy.run_path(sys.argv[3], run_name='__main__')",
                 tmp_path / "slow", ROOT, ROOT / f"{script}.py"], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as run:
            try:
                assert run.stdout.readline() == "importing\n"
                run.send_signal(signal.SIGINT)
                _, err = run.communicate(timeout=50)
            finally:
                run.kill()
        assert run.returncode and err == "interrupted\n", (script, err)


# ---------------------------------------------------------------------------------- what is printed

def test_printed_commands_can_be_pasted(command, tmp_path):
    """A folder's name with a blank is quoted, in every command that a run prints."""
    code, out, err = command(f"smt.py {{TINY}} --out_dir '{tmp_path}/a run'")
    assert code == 0 and f"next: python dmt.py --ckpt '{tmp_path}/a run/ckpt.pt'" in out, err
    code, out, err = command(f"dmt.py {{RUN}} --ckpt '{tmp_path}/a run/ckpt.pt' "
                             f"--stop_after 1e-9 --steps 99 --out_dir '{tmp_path}/b run'")
    assert code == 0 and f"--out_dir '{tmp_path}/b run'" in out and \
        (tmp_path / "b run/ckpt.pt").exists(), err


@pytest.mark.parametrize("line, bounds", [
    ("smt.py {TINY} --lr 1e30", "from 1e-12 to 1e+18"),
    ("smt.py {TINY} --steps -1", "from 0 to 1e+12"),
    ("smt.py {TINY} --d_model 0", "from 1 to 1e+06"),
    ("sample.py --n 1000000", "from 0 to 10000"),
    ("evaluate.py --ckpt x --n_test 1000000000", "from 1 to 100000")])
def test_bounds_say_what_they_are(line, bounds, command):
    """The line that refuses a number says which are allowed."""
    code, _, err = command(line)
    assert code == 2 and err.count("\n") == 1 and bounds in err, err
