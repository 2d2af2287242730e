"""Lesson: `--preset paper` is the paper's recipe. Its numbers, its schedule, its rounds."""
import dataclasses
from types import SimpleNamespace

import pytest
import torch

import bptt
import data
import dmt
import flags
import model
import presets
import smt
import trainer

# As the paper and its code state them; what differs is said in the README.
NETWORKS = dict(encoder="bidirectional", d_model=256, n_heads=8, head_dim=64, mem_tokens=16,
                mem_dim=0, enc_layers=8, dec_layers=4, rnn_layers=8, ctx_len=256, fut_len=64,
                heads=0, past=0, timestamps="none")
SMT = dict(optimizer="adamw", lr=3e-4, warmup=0.01, decay=1.0, ema=0.0, batch_size=128,
           steps=150_000, minutes=0.0, lambda_dec=1.0, lambda_dyn=0.1, lambda_unif=0.001,
           detach_rnn=False, times=2, rnn_batch=0, first=0.0, lambda_fut=1.0, decode_own=False,
           horizon=1)
DMT = dict(optimizer="adamw", lr=3e-5, warmup=0.01, decay=0.0, ema=0.0, batch_size=32, steps=1500,
           minutes=0.0, lambda_mse=10.0, lambda_dec=1.0, detach_dec=True, horizon=256, span=1,
           spans=32 * 256 // 16, first=1.0)
TASKS = dict(retrieval=dict(times=0, ctx_len=0, fut_len=0), copy=dict(times=0, ctx_len=0),
             mnist=dict(levels=256, image_size=28, times=2), tinystories=dict(length=256 + 64))


def resolved(script, dataset="glyphs"):
    return vars(flags.config(script.__name__, script.Config, "paper", dataset))


@pytest.mark.parametrize("script, said", [(smt, NETWORKS | SMT), (dmt, DMT)])
def test_every_known_number(script, said):
    """Sizes, optimiser, weights and lengths, as the flags have them after all blocks of presets."""
    got = resolved(script)
    assert {k: got[k] for k in said} == said
    # one time of each sequence is decoded in the mean
    if script is smt:
        assert got["futures"] * got["micro"] == got["batch_size"]


@pytest.mark.parametrize("dataset", TASKS)
def test_what_a_task_changes(dataset):
    """Synthetic tasks: Tc = Tf = T, all memories of a sequence. MNIST: 256 grey levels. Text: a
    window holds one full context and one full future."""
    assert TASKS[dataset].items() <= resolved(smt, dataset).items()


def test_a_synthetic_step_decodes_every_memory():
    assert resolved(smt, "retrieval")["futures"] >= 128 * 512


def rates(script, steps, **changes):
    """The learning rate of every step of a run, in parts of its peak."""
    cfg = flags.config(script.__name__, script.Config, "paper", **dict(steps=steps) | changes)
    group, out = {}, []
    for step in range(steps):
        run = SimpleNamespace(cfg=cfg, step=step, progress=step / steps,
                              optimizers=[SimpleNamespace(param_groups=[group])])
        trainer.Run.set_learning_rate(run)
        out.append(group["lr"] / cfg.lr)
    return out


def test_schedule_of_smt():
    """One hundredth of the run is a linear warm-up, whatever its length; then the rate stays."""
    for steps in (300, 1000):
        n = steps // 100
        assert rates(smt, steps) == pytest.approx([min(1, (i + 1) / n) for i in range(steps)])
    assert rates(smt, 50)[0] == 1  # a hundredth of 50 is less than a step


def test_schedule_of_dmt():
    """The same warm-up, then along a cosine to 0."""
    got = rates(dmt, 1000)
    assert got[0] == pytest.approx(0.1) and got[500] == pytest.approx(0.5) and got[-1] < 1e-5
    assert got[10:] == sorted(got[10:], reverse=True)
    assert rates(dmt, 1000, decay=0.05)[-1] == pytest.approx(0.05, abs=1e-4)


def test_warmup_of_a_run_with_a_clock(monkeypatch):
    """Nobody knows how many steps it will have; the clock says how far it is."""
    cfg, group = flags.config("smt", smt.Config, "paper", steps=0, minutes=10.0), {}
    for progress, part in ((0.001, 0.1), (0.005, 0.5), (0.5, 1.0)):
        trainer.Run.set_learning_rate(SimpleNamespace(
            cfg=cfg, step=40, progress=progress,
            optimizers=[SimpleNamespace(param_groups=[group])]))
        assert group["lr"] / cfg.lr == pytest.approx(part)


SMALL = ("--d_model 8 --n_heads 1 --head_dim 0 --mem_tokens 2 --enc_layers 1 --dec_layers 1 "
         "--rnn_layers 1 --eval_every 0 --n_val 2 --threads 1 --device cpu --preset paper").split()


class Enough(Exception):
    """Ends a run whose loop has been seen."""


def seen(script, monkeypatch, tmp_path, argv, places, n):
    """What the first n calls of the objective are given at `places`."""
    calls, real = [], script.objective

    def objective(*args):
        calls.append([args[i] for i in places])
        if len(calls) == n:
            raise Enough
        return real(*args)

    monkeypatch.setattr(script, "objective", objective)
    with pytest.raises(Enough):
        script.main([*argv, "--out_dir", str(tmp_path / script.__name__)])
    return calls


def test_a_time_of_a_text_has_its_whole_future(monkeypatch, tmp_path):
    """The last time drawn is Tf before the window's end, and it does come up."""
    argv = [*SMALL, *"--dataset pydoc --length 12 --ctx_len 6 --fut_len 4 --batch_size 8 "
                     "--futures 2".split()]
    times = [t for (t,) in seen(smt, monkeypatch, tmp_path, argv, [6], 60)]
    last = {int(t[-1]) for t in times}
    assert max(last) == 12 - 4 and all(len(t) == 2 for t in times)
    assert len({tuple(t.tolist()) for t in times[:4]}) > 1  # the micro-batches of a step differ


def test_a_fresh_batch_every_step_of_dmt(monkeypatch, tmp_path, tiny_smt):
    """No sequence is learnt from twice, and a step learns from so many transitions as said."""
    argv = ["--ckpt", str(tiny_smt), "--preset", "paper", *"--batch_size 8 --spans 5 --eval_every "
            "0 --n_val 2 --threads 1 --device cpu".split()]
    walks = [walk for (walk,) in seen(dmt, monkeypatch, tmp_path, argv, [2], 6)]
    assert all(len(walk.m) == 5 and len(walk.x) == 8 for walk in walks)
    assert all(not torch.equal(a.x, b.x) for a, b in zip(walks, walks[1:]))


def test_horizon_of_the_paper_does_not_grow(monkeypatch, tmp_path, tiny_smt):
    """256 updates from the first step to the last; cut where a sequence is shorter."""
    horizons, real = [], dmt.RNN.own_memories

    def own_memories(self, labels, x, times, horizon, *more):
        horizons.append(horizon)
        return real(self, labels, x, times, horizon, *more)

    monkeypatch.setattr(dmt.RNN, "own_memories", own_memories)
    for flag, expected in (["--horizon", "3"], {3}), ([], {8}):
        horizons.clear()
        out = tmp_path / str(len(flag))
        dmt.main(["--ckpt", str(tiny_smt), "--preset", "paper", *flag, *"--batch_size 4 --spans 5 "
                  "--steps 4 --eval_every 0 --n_val 2 --threads 1 --device cpu".split(),
                  "--out_dir", str(out)])
        assert len(horizons) == 4 and set(horizons) == expected


@pytest.mark.parametrize("preset", ["gpu", "paper"])
@pytest.mark.parametrize("rnn", ["mlp", "gru"])
def test_updaters_of_one_size(preset, rnn):
    """With the large presets the three updaters have the same number of parameters, to a tenth."""
    def size(rnn):
        cfg = flags.config("smt", smt.Config, preset, "mnist", rnn=rnn)
        names = [f.name for f in dataclasses.fields(model.ModelConfig)]
        sizes = {k: v for k, v in vars(cfg).items() if k in names}
        with torch.device("meta"):
            net = model.UPDATERS[rnn](model.ModelConfig(vocab=257, n_out=256, T=784, **sizes))
        return sum(p.numel() for p in net.parameters())

    assert size(rnn) == pytest.approx(size("transformer"), rel=0.1)


def test_an_updater_brings_its_width(command, tmp_path, monkeypatch):
    """On the command line, in the help, and not over a width that is given."""
    monkeypatch.chdir(tmp_path)  # here there may be a run of the quick start
    parse = lambda *argv: flags.parse("smt", smt.Config, [*argv, "--preset", "gpu"], "")[0]
    monkeypatch.setattr(flags, "pick_device", lambda name: "cpu")
    assert parse("--rnn", "gru").mem_dim == 84 and parse().mem_dim == 0
    assert parse("--rnn", "gru", "--mem_dim", "32").mem_dim == 32
    _, out, _ = command("smt.py --preset gpu --rnn=gru --help")
    assert "--mem_dim int" in out and "(default: 84)" in out


@pytest.mark.parametrize("preset", ["laptop", "gpu"])
def test_many_symbols_have_few_heads(preset):
    """Linear heads ask for (F + P) V numbers of a memory: a thousand or so, with bytes as with
    bits, unless somebody asks for more."""
    for dataset, changes in (("glyphs", {}), ("tinystories", {}), ("mnist", dict(levels=256))):
        cfg = flags.config("smt", smt.Config, preset, dataset, **changes)
        V = 256 if dataset == "tinystories" else cfg.levels or 2
        assert 200 < (cfg.heads + cfg.past) * V <= 1024, dataset
    assert flags.config("smt", smt.Config, preset, "mnist", levels=256, past=9).past == 9


def test_every_dataset_has_a_recipe():
    """Of every method, and none leaves a flag open."""
    for script in (smt, dmt, bptt):
        for dataset, options in data.OPTIONS.items():
            got = resolved(script, dataset)
            unset = {k for k, v in got.items() if v is None} - set(data.HELP)
            assert not unset and {k: got[k] for k in options}.keys() == options.keys()


@pytest.mark.parametrize("preset, kind", [k for k in presets.KINDS if k[1] in data.SYNTHETIC])
def test_a_task_has_the_last_word(preset, kind):
    """What is said of one task holds there, whatever is said of all synthetic ones."""
    for column, method in enumerate(presets.METHODS):
        got = presets.recipe(method, preset, data.kinds(kind, "gru"))
        for flag, value in presets.KINDS[preset, kind].items():
            value = value[column] if isinstance(value, tuple) else value
            assert value is None or got[flag] == value, (method, flag)
