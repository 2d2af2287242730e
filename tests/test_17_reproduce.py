"""Lesson: every figure of the paper comes from one command. Runs are made once, go on where they
were cut off, and a picture can be drawn again from its numbers alone."""
import dataclasses
import math
import os
import shutil

import pytest
import tiny
import torch

import data
import reproduce
from figures import cost, credit, inside, nets, races, runs, tasks
from figures.runs import Job, Lab


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs and results that the tests of this file share, as figures do."""
    folder = tmp_path_factory.mktemp("reproduce")
    return f"--runs_dir {folder}/runs --results_dir {folder}/results", folder


@pytest.fixture
def no_other_pictures(monkeypatch):
    """Runs and evaluations draw curves of their own, which take longer than a toy run."""
    monkeypatch.setattr("trainer.draw_curve", lambda *a: None)
    monkeypatch.setattr("evaluate.draw", lambda *a: None)


@pytest.mark.parametrize("name", reproduce.FIGURES)
def test_quick(name, folders, command, no_other_pictures):
    """Every figure at toy size: a picture, its numbers, its row; and --draw needs the numbers
    alone."""
    where, folder = folders
    first = "race28 " if name == "records" else ""  # whose numbers it draws
    code, out, err = command(f"reproduce.py {first}{name} --quick --device cpu {where}")
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


def test_committed_numbers_can_be_drawn(command, tmp_path):
    """Every figure whose CSV is committed draws it, without a run."""
    names = [name for name in reproduce.FIGURES if os.path.exists(os.path.join(
        Lab.results, reproduce.PLACES.get(name, name), f"{name}.csv"))]
    shutil.copytree(Lab.results, tmp_path / "results")
    code, out, err = command(f"reproduce.py {' '.join(names)} --draw "
                             f"--results_dir {tmp_path}/results --runs_dir {tmp_path}/none")
    assert names and code == 0, out + err


def test_numbers_are_read_as_numbers_but_commits_as_they_are(tmp_path):
    """An abbreviated hash may have digits alone, or look like a power of ten."""
    for hash in ("0858513", "12e4567"):
        runs.write_csv(tmp_path / "a.csv", [dict(n=3, nats=0.5, empty=None, commit=hash)])
        assert runs.read_csv(tmp_path / "a.csv") == [dict(n=3, nats=0.5, commit=hash)]


def test_only_makes_no_half_figure(command, tmp_path, folders, no_other_pictures):
    """--only that fits no run, or not all that a figure needs, leaves the numbers as they are."""
    where = f"--quick --device cpu --runs_dir {tmp_path}/runs --results_dir {tmp_path}/results"
    for part, said in (("typo", "no run of fig13"), ("-smt-", "1 of 2 runs")):
        code, out, err = command(f"reproduce.py fig13 {where} --only={part}")
        assert code == 2 and said in out and len(err.splitlines()) == 1
        assert not os.path.exists(tmp_path / "results" / "fig13" / "fig13.csv")
    code, *_ = command(f"reproduce.py fig13 {where} --only=-dmt-")  # with what it starts from: all
    assert code == 0


def test_a_race_with_seeds_of_ones_own(command, tmp_path, no_other_pictures):
    """--first_seed 50: nobody has chosen anything on these."""
    code, out, err = command("reproduce.py race14 --quick --device cpu --seeds 2 --first_seed 50 "
                             f"--runs_dir {tmp_path}/runs --results_dir {tmp_path}/results")
    assert code == 0, out + err
    rows = runs.read_csv(tmp_path / "results" / "backbones" / "race14.csv")
    assert {r["seed"] for r in rows if r["method"] == "dmt"} == {50, 51}


def test_missing_data_skips_the_figure_alone(command, folders, tmp_path, monkeypatch,
                                             no_other_pictures):
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


def test_cached_transformer_is_the_transformer():
    """What Tab. 1 times token by token gives the logits of one pass over the whole sequence."""
    torch.manual_seed(0)
    c = tiny.config(mem_tokens=1, timestamps="all")
    decoder, (x, _) = tiny.networks()[1], tiny.sequences()
    n, T = x.shape
    whole = decoder(torch.empty(n, 0, c.mem_dim), x, torch.full((n,), -1))
    cache = cost.empty_cache(c, c.dec_layers, T, n)
    for t in range(T):
        step = cost.cached_logits(decoder, x[:, t], t, cache)
        assert torch.allclose(step, whole[:, t], atol=1e-5)


def groups(n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds in 12 dimensions, and which point is in which."""
    g = torch.Generator().manual_seed(0)
    which = torch.arange(3).repeat_interleave(n)
    centre = 4 * torch.randn(3, 12, generator=g)
    return centre[which] + torch.randn(3 * n, 12, generator=g), which


def test_principal_components_hold_the_variance():
    """They are uncorrelated, and a cloud that is flat lies in two of them."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(50, 2, generator=g) @ torch.randn(2, 7, generator=g) + 3
    parts, shares = nets.pca(v, 2)
    assert abs(sum(shares) - 1) < 1e-6 and shares[0] >= shares[1] > 0
    assert torch.allclose(torch.cov(parts.T), torch.eye(2).double(), atol=1e-6)


def test_tsne_keeps_neighbours():
    """Points of a cloud stay together: every point's nearest neighbour on the page is of its own
    cloud."""
    v, which = groups()
    at = nets.tsne(v, perplexity=10, steps=300)
    nearest = torch.cdist(at, at).fill_diagonal_(torch.inf).argmin(1)
    assert (which[nearest] == which).all() and at.isfinite().all()


def test_tsne_gives_every_point_as_many_neighbours_as_asked():
    v, _ = groups()
    p = nets.neighbours(torch.cdist(v, v).square().double(), 10.0)
    assert torch.allclose(p.sum(1), torch.ones(len(v)).double())
    assert torch.allclose((-torch.xlogy(p, p).sum(1)).exp(), torch.tensor(10.0).double(), rtol=1e-3)


def test_states_are_counted():
    """Three clouds that are far apart for their size are three places, one chain of points is
    one."""
    v, _ = groups()
    assert inside.clusters(v, apart=7.0) == 3
    assert inside.clusters(torch.arange(9.0)[:, None], apart=1.5) == 1


def test_smt_gradients_are_those_of_one_network():
    """In SMT the loss that m_t answers for lies one network away, so weights times four change how
    gradients depend on t by a factor; in BPTT by a power of the distance."""
    task = data.load("retrieval", length=64)
    x, y = task.batch(credit.B, torch.Generator().manual_seed(0))
    spread = {}
    for method in ("bptt", "smt"):
        ends = []
        for scale in (1.0, 4.0):
            encoder, decoder, rnn = credit.scaled_networks(task, "transformer", scale)
            g = credit.bptt_gradients(rnn, x, y) if method == "bptt" else \
                credit.smt_gradients(encoder, decoder, rnn, x, y)
            assert len(g) == task.T - 1
            ends.append(g[0] / g[-1])
        spread[method] = ends[1] / ends[0]
    assert 0.1 < spread["smt"] < 10 and spread["bptt"] > 1e6


def test_a_run_is_made_anew_when_its_preset_changes(tmp_path, monkeypatch):
    """A recipe is a part of what a run is, though no flag of the job says so."""
    calls, jobs = [], runs.both("a", dict(dataset="stack"), (1, 1))
    lab = lab_of(tmp_path, calls)
    runs.train(lab, jobs)
    old = runs.presets.recipe
    monkeypatch.setattr(runs.presets, "recipe", lambda method, *a: old(method, *a) | (
        dict(lr=1.0) if method == "dmt" else {}))
    runs.train(lab, jobs)
    assert calls[2:] == [("a-dmt-0", False)]  # SMT's recipe is as it was


def test_paired_differences_against_torch():
    """Image by image: the mean of the differences, and the standard error of that mean."""
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = races.paired(dict(nats_each=a.tolist()), dict(nats_each=b.tolist()))
    assert abs(got["over_bptt"] - (a.mean() - b.mean())) < 1e-12
    error = ((a - b) - (a - b).mean()).square().sum().div(49 * 50).sqrt()
    assert abs(got["over_bptt_stderr"] - error) < 1e-12
    same = dict(nats_each=a.tolist())
    assert races.paired(same, same) == {} == races.paired(same, None)


def test_a_race_is_judged_by_paired_differences_and_a_tie_is_no_win():
    def row(rnn, seed, apart, method="dmt", **heads):
        return dict(rnn=rnn, method=method, seed=seed, rollout=30.0 + apart, over_bptt=apart,
                    over_bptt_stderr=0.3) | heads
    verdict = lambda *rows: races.verdict(list(rows))[1]
    assert races.verdict([row("gru", 0, -1.0), row("gru", 1, -2.0), row("gru", 0, 9.0, "smt"),
                          dict(rnn="gru", method="dmt", seed=2, rollout=99.0)]) == \
        ("SMT → DMT, nats per image, and over: gru 28.5 (BPTT -1.50 ± 0.58)", "agrees")
    heads = dict(over_heads=0.7, over_heads_stderr=0.1)  # one seed has it; it is what counts
    assert races.verdict([row("gru", 0, -1.0, **heads), row("gru", 1, -2.0)]) == \
        ("SMT → DMT, nats per image, and over: gru 28.5 (BPTT -1.50 ± 0.58) "
         "(BPTT + heads +0.70 ± 0.10)", "disagrees")
    assert verdict(row("gru", 0, -0.5)) == "open"  # within two standard errors ..
    # and more seeds on the same images do not make it more
    assert verdict(row("gru", 0, -0.5), row("gru", 1, -0.5)) == "open"
    assert verdict(row("gru", 0, -1.0), row("gru", 1, -0.9)) == "agrees"
    assert verdict(row("gru", 0, -1.0), row("gru", 1, -3.5)) == "open"  # seeds differ too much
    assert verdict(row("gru", 0, -1.0), row("mlp", 0, 0.5)) == "open"
    assert verdict(row("gru", 0, 1.0), row("mlp", 0, 0.5)) == "disagrees"
    assert verdict(row("gru", 0, 1.0), row("mlp", 0, -1.0)) == "open"
    assert verdict(row("gru", 0, 1.0, "smt")) == "open"  # nobody raced


def test_what_both_have_solved_or_what_is_within_the_error_has_no_winner():
    """Means over seeds; both within 0.001 nats of the optimum, or two standard errors apart, is
    no win; a point that one of them lacks is left out."""
    row = lambda task, method, excess, stderr=0.01: dict(task=task, method=method, excess=excess,
                                                         stderr=stderr)
    rows = [row("solved", "dmt", 1e-9), row("solved", "bptt", 9e-4, 1e-6),
            row("tie", "dmt", 0.10), row("tie", "bptt", 0.11),
            # 0.15 against 0.17; each mean has an error of 0.01 / sqrt(2)
            row("tie of means", "dmt", 0.1), row("tie of means", "dmt", 0.2),
            row("tie of means", "bptt", 0.16), row("tie of means", "bptt", 0.18),
            row("won", "dmt", 0.1), row("won", "bptt", 0.2), row("alone", "dmt", 0.0)]
    said, verdict = tasks.judged(rows)
    assert "at 1 of 4 points, BPTT at 0, a tie at 2, solved by both 1" in said
    assert verdict == "agrees"
    # heads help BPTT: 0.05 is nearer than 0.1; where they do not they count for nothing
    heads = [row("won", "bptt-heads", 0.05), row("tie", "bptt-heads", 9.0)]
    assert "at 0 of 4 points, BPTT at 1, a tie at 2" in tasks.judged(rows + heads)[0]
    # both are told; the verdict is that against BPTT as the paper has it
    said, verdict = tasks.against_bptt(rows + heads)
    assert verdict == "agrees" and said.index("at 1 of 4 points") < said.index("at 0 of 4 points")
    lost = [row("lost", "dmt", 2.0), row("lost", "bptt", 1.0)]
    assert tasks.judged(rows + lost)[1] == "open" and tasks.judged(lost)[1] == "disagrees"
    # seeds that differ say as little as sequences that do: 0.1 against 0.2, and one seed of 0.1
    near, far = ([row("seeds", m, v) for m, v in (("dmt", 0.1), ("dmt", 0.102), ("bptt", low),
                                                  ("bptt", high))]
                 for low, high in ((0.199, 0.201), (0.1, 0.3)))
    assert "at 2 of 5 points, BPTT at 0, a tie at 2" in tasks.judged(rows + near)[0]
    assert "at 1 of 5 points, BPTT at 0, a tie at 3" in tasks.judged(rows + far)[0]


def test_when_a_task_is_solved_and_when_for_good():
    """Of two rates the one that is there sooner counts; a run that leaves the optimum again is not
    there for good."""
    looks = lambda T, lr, *excess: [dict(T=T, lr=lr, minutes=float(i), excess=e)
                                    for i, e in enumerate(excess, 1)]
    got = tasks.solved(looks(64, None, 1, 0.001, 0.2, 0.001, 0.002) +
                       looks(128, 0.01, 1, 1, 0.001) + looks(128, 0.002, 1, 0.001, 0.001) +
                       looks(256, None, 0.001, 1) + looks(512, 0.01, 1, 1))
    assert got[64] == (2, 4) and got[128] == (2, 2)
    assert got[256][0] == 1 and math.isnan(got[256][1]) and all(map(math.isnan, got[512]))


def test_the_better_rate_of_bptt_counts():
    """Seed by seed and point by point; a run of ours at the same point stays."""
    row = lambda method, value, seed, excess: dict(task="copy", method=method, value=value,
                                                   seed=seed, excess=excess)
    rows = [row("dmt", 9, 0, 0.3), row("bptt", 9, 0, 0.1), row("bptt", 9, 0, 0.2),
            row("bptt", 9, 1, 0.4), row("bptt", 9, 1, 0.2), row("bptt", 17, 0, 0.5)]
    assert tasks.counted(rows) == [rows[i] for i in (0, 1, 4, 5)]


def test_a_curve_counts_what_went_before(tmp_path):
    """SMT -> DMT -> BPTT: the third run's minutes, tokens, layers come on top of both others'."""
    jobs = [Job("task-gru-smt-0", "smt", 1.0), Job("task-gru-half-0", "dmt", 1.0, {},
                                                  "task-gru-smt-0"),
            Job("task-gru-smt+dmt+bptt-0", "bptt", 1.0, {}, "task-gru-half-0")]
    for i, job in enumerate(jobs):
        (tmp_path / job.name).mkdir()
        ends = dict(step=2, seconds=60 * 10 ** i, tokens=10 ** i, layers=2 * 10 ** i, val_rollout=i)
        runs.write_csv(str(tmp_path / job.name / "log.csv"), [ends])
    rows = list(runs.curves(Lab({}, runs=str(tmp_path)), jobs, [job.name for job in jobs]))
    assert [(r["method"], r["minutes"], r["tokens"], r["layers"]) for r in rows] == [
        ("smt", 1, 1, 2), ("half", 11, 11, 22), ("smt+dmt+bptt", 111, 111, 222)]
