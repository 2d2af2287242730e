"""Lesson: every figure of the paper comes from one command. Runs are made once, go on where they
were cut off, and a picture can be drawn again from its numbers alone."""
import dataclasses
import os

import pytest

import reproduce
from figures import runs
from figures.runs import Job, Lab


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs and results that the tests of this file share, as figures do."""
    folder = tmp_path_factory.mktemp("reproduce")
    return f"--runs_dir {folder}/runs --results_dir {folder}/results", folder


@pytest.mark.parametrize("name", reproduce.FIGURES)
def test_quick(name, folders, command):
    """Every figure at toy size: a picture, its numbers, its row; and --draw needs the numbers
    alone."""
    where, folder = folders
    code, out, err = command(f"reproduce.py {name} --quick --device cpu {where}")
    assert code == 0, out + err
    place = folder / "results" / reproduce.PLACES.get(name, name)
    picture, numbers = place / f"{name}.png", runs.read_csv(place / f"{name}.csv")
    assert numbers and picture.read_bytes()[:4] == b"\x89PNG"
    assert f"| [{name}](" in (folder / "results" / "README.md").read_text()
    before = picture.read_bytes()
    picture.unlink()
    code, out, err = command(f"reproduce.py {name} --draw --results_dir {folder}/results "
                             f"--runs_dir {folder}/nothing")
    assert code == 0, out + err
    assert picture.read_bytes() == before


def test_list_says_what_everything_costs(command, tmp_path):
    """--list asks the figures themselves, makes nothing, and counts a shared run once."""
    code, out, _ = command(f"reproduce.py --list --runs_dir {tmp_path}/a "
                           f"--results_dir {tmp_path}/b")
    assert code == 0 and os.listdir(tmp_path) == []
    assert all(f"\n{name} " in "\n" + out for name in reproduce.FIGURES)
    assert "core-hours" in out.splitlines()[-1]


def test_mistakes_are_one_line(command):
    for line, named in (("fig99", "fig99"), ("", "--list"), ("race14 --quick --draw", "--quick"),
                        ("race14 --together 0", "--together")):
        code, out, err = command(f"reproduce.py {line}")
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and named in err


def test_missing_data_skips_the_figure_alone(command, folders, tmp_path, monkeypatch):
    """The figure without data says why; the next is made."""
    def broken(lab):
        return runs.train(lab, [Job("x", "smt", 1, dict(dataset="images"))])

    monkeypatch.setitem(reproduce.FIGURES, "race28", ("claim", "runs", broken))
    code, out, err = command("reproduce.py race28 race14 --quick --device cpu "
                             f"--data_dir {tmp_path}/none " + folders[0])
    assert code == 2 and "race28 | skipped: --data_dir" in out and "not made: race28;" in err
    assert "race14 | " in out


def lab_of(tmp_path, calls, broken=()) -> Lab:
    """A lab whose scripts do nothing but leave a checkpoint, or fail."""
    def main(argv):
        out_dir = argv[argv.index("--out_dir") + 1]
        calls.append((os.path.basename(out_dir), "--resume" in argv))
        if os.path.basename(out_dir) in broken:
            raise KeyboardInterrupt
        open(os.path.join(out_dir, "ckpt.pt"), "w").close()

    return Lab(dict(smt=main, dmt=main, bptt=main), name="test", quick=True,
               runs=str(tmp_path / "runs"), results=str(tmp_path / "results"))


def test_a_finished_run_is_used_again(tmp_path):
    """Until its settings change, or those of the run that it starts from."""
    calls, jobs = [], runs.both("a", dict(dataset="stack"), (1, 1))
    lab = lab_of(tmp_path, calls)
    assert runs.train(lab, jobs) == ["a-smt-0", "a-dmt-0"] == [name for name, _ in calls]
    assert runs.train(lab, jobs) == ["a-smt-0", "a-dmt-0"] and len(calls) == 2
    runs.train(lab, [jobs[0], dataclasses.replace(jobs[1], flags=dict(seed=0, lr=1e-3))])
    assert calls[2:] == [("a-dmt-0", False)]
    runs.train(lab, runs.both("a", dict(dataset="stack", lr=1e-3), (1, 1)))
    assert calls[3:] == [("a-smt-0", False), ("a-dmt-0", False)]


def test_an_unfinished_run_is_resumed(tmp_path):
    """A checkpoint of the same settings goes on; one of others does not."""
    calls, job = [], Job("a", "smt", 1, dict(dataset="stack"))
    lab = lab_of(tmp_path, calls, broken=("a",))
    for changed in ({}, {}, dict(lr=1e-3)):
        with pytest.raises(KeyboardInterrupt):
            runs.train(lab, [dataclasses.replace(job, flags=job.flags | changed)])
        open(lab.ckpt("a"), "w").close()  # what a run leaves when it is cut off
    assert calls == [("a", False), ("a", True), ("a", False)]


def test_a_failed_run_leaves_the_others(tmp_path, capsys):
    """As processes: what starts from it is left out, the rest is made, and its last words are
    told."""
    lab = dataclasses.replace(lab_of(tmp_path, []), quick=False, device="cpu")
    tiny = dict(dataset="parity", length=4, d_model=8, n_heads=1, steps=1, n_val=1, eval_every=0)
    jobs = [Job("bad", "smt", 0, tiny | dict(d_model=9, n_heads=2)),
            Job("child", "dmt", 0, {}, "bad"), Job("good", "bptt", 0, tiny)]
    assert runs.train(lab, jobs) == ["good"]
    out = capsys.readouterr().out
    assert "bad failed: smt.py: error: --d_model 9" in out and "child is left out" in out
