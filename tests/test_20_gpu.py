"""Lesson: nothing is left on the wrong device. Every script runs whole on a pretended GPU, whose
tensors have shapes and no values, and in bf16, where a wrong dtype fails as a wrong device does."""
import copy
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SIZES, TASK
from tiny import T, gen, networks, sequences

import graph
import model

sys.path.append(str(ROOT / "results" / "gpu"))
pretend = pytest.importorskip("pretend", reason="PyTorch moved its dispatch modes",
                              exc_type=ImportError)

SCRIPTS = "smt", "dmt", "bptt", "bench", "transformer"
RUN = "--preset laptop --batch_size 4 --n_val 4 --eval_every 0 --ckpt_every 0 --device {device}"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Curves are drawn from numbers and see no device; they would take half of the time."""
    monkeypatch.setattr("trainer.draw_curve", lambda *a: None)
    monkeypatch.setattr("evaluate.draw", lambda *a: None)


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU; inside, --device meta means it."""
    pretend.allow_fused_adamw(monkeypatch)
    return pretend.PretendedGPU()


def whole_path(command, folder, device, more=""):
    """Each script once: objective, evaluation, samples, checkpoint, resume."""
    def run(line):
        code, out, err = command(line.replace("{device}", device))
        assert code == 0, err
        return out

    run(f"smt.py {TASK} {SIZES} {RUN} {more} --steps 2 --out_dir {folder}/smt")
    run(f"smt.py --resume --steps 3 --out_dir {folder}/smt")
    run(f"dmt.py --ckpt {folder}/smt/ckpt.pt {RUN} --steps 2 --span 3 --out_dir {folder}/dmt")
    run(f"dmt.py --resume --steps 3 --out_dir {folder}/dmt")
    run(f"bptt.py --init {folder}/dmt/ckpt.pt {RUN} --steps 1 --recompute 3 --out_dir {folder}/b")
    run(f"bptt.py {TASK} {SIZES} {RUN} --steps 2 --truncate 3 --out_dir {folder}/bptt")
    run(f"bptt.py --resume --steps 3 --out_dir {folder}/bptt")
    run(f"sample.py --ckpt {folder}/dmt/ckpt.pt --device {device}")
    return json.loads(run(f"evaluate.py --ckpt {folder}/dmt/ckpt.pt --n_test 4 --device {device} "
                          "--json"))


@pytest.mark.parametrize("encoder, rnn", [("causal", "transformer"), ("causal", "mlp"),
                                          ("bidirectional", "gru")])
def test_every_script_on_a_pretended_gpu(command, gpu, tmp_path, encoder, rnn):
    """Training, evaluation, samples, checkpoint and resume; and the kernels were asked for, so the
    run did not quietly happen on the CPU."""
    with gpu:
        result = whole_path(command, tmp_path, "meta", f"--encoder {encoder} --rnn {rnn}")
    assert result["teacher"] is not None and gpu.launches > 1000


def test_pictures_text_and_the_benchmark_on_a_pretended_gpu(command, gpu, tmp_path, monkeypatch):
    """What tasks without pictures do not reach: drawing, completing, continuing a text."""
    monkeypatch.setattr("bench.interleaved", lambda ways, *a: {name: (1.0, way())
                                                               for name, way in ways.items()})
    lines = (f"smt.py --dataset glyphs --image_size 8 {SIZES} {RUN} --steps 1 --out_dir {{d}}/g",
             "sample.py --ckpt {d}/g/ckpt.pt --n 2 --prefix --out {d}/s.png --device {device}",
             f"smt.py --dataset pydoc --length 12 {SIZES} {RUN} --steps 1 --out_dir {{d}}/p",
             "sample.py --ckpt {d}/p/ckpt.pt --n 1 --chars 5 --prompt a --device {device}",
             f"transformer.py {TASK} --d_model 16 {RUN} --steps 2 --out_dir {{d}}/t",
             "bench.py --dataset modular --seconds 0 --threads 1 --json --device {device}")
    with gpu:
        for line in lines:
            code, _, err = command(line, d=tmp_path, device="meta")
            assert code == 0, err


def on_cpu(function):
    """The same function, whose result a careless edit left on the CPU."""
    def wrong(*a, **k):
        out = function(*a, **k)
        back = lambda v: torch.zeros(v.shape, dtype=v.dtype)
        return tuple(map(back, out)) if isinstance(out, tuple) else back(out)
    return wrong


@pytest.mark.parametrize("place", ["model.angles_for", "model.norm", "losses.next_targets",
                                   "losses.draw", "smt.with_made", "muon.orthogonalize"])
def test_a_tensor_left_behind_is_found(place, gpu, monkeypatch, tmp_path):
    """Faults planted in networks, losses, objective and optimiser: each run fails."""
    module, name = place.split(".")
    module = importlib.import_module(module)
    monkeypatch.setattr(module, name, on_cpu(getattr(module, name)))
    run = f"{TASK} {SIZES} {RUN} --rnn_from 0 --steps 1 --out_dir {tmp_path}".format(device="meta")
    with gpu, pytest.raises(pretend.WrongDevice):
        importlib.import_module("smt").main(run.split())


def test_every_script_in_bf16(command, monkeypatch, tmp_path):
    """Autocast as on CUDA, on real CPU tensors: no operation meets two dtypes, and numbers stay
    finite."""
    for name in SCRIPTS + ("evaluate", "sample"):
        monkeypatch.setattr(importlib.import_module(name), "autocast",
                            lambda device: torch.autocast("cpu", torch.bfloat16))
    for rnn in ("transformer", "mlp", "gru"):
        result = whole_path(command, tmp_path / rnn, "cpu", f"--rnn {rnn}")
        assert result["rollout"] < 10


def replayed(rnn):
    """The same RNN, updates without a gradient replayed: on a CPU the twin of what CUDA records."""
    other = copy.deepcopy(rnn)
    graph.graph_updates(other)
    return other


@pytest.mark.parametrize("updater", ["transformer", "mlp", "gru"])
def test_replayed_updates_are_the_plain_loop(updater):
    """Whole rollouts and pieces of many lengths: not a bit differs, though every replay reads and
    writes the same memory."""
    encoder, _, rnn = networks(rnn=updater)
    x, _ = sequences()
    other, times = replayed(rnn), torch.arange(T)
    with torch.no_grad():
        labels = encoder(x, times)
        assert torch.equal(other.memories(x), rnn.memories(x))
        for horizon in (2, 4, T):
            assert torch.equal(*(r.own_memories(labels, x, times, horizon, horizon // 2)
                                 for r in (rnn, other)))


def test_a_replay_sees_new_weights_and_leaves_gradients_alone():
    """An optimiser changes weights where they lie, and the next replay must read them there; with
    a gradient the plain update runs."""
    _, _, rnn = networks()
    x, _ = sequences()
    other = replayed(rnn)
    with torch.no_grad():
        old = other.memories(x)
        for r in (rnn, other):
            for p in r.updater.parameters():
                p.mul_(1.5)
        assert torch.equal(other.memories(x), rnn.memories(x)) and not torch.equal(
            old, other.memories(x))
    other.memories(x).sum().backward()
    rnn.memories(x).sum().backward()
    assert torch.equal(other.updater.event.symbol.weight.grad, rnn.updater.event.symbol.weight.grad)


def test_few_graphs_are_kept_and_large_updates_are_not_recorded(monkeypatch):
    """Each graph has its own memory; a curriculum meets many shapes."""
    calls = []
    one = graph.Replayed(lambda v: calls.append(len(v)) or v + 1)
    for n in [*range(1, graph.MOST_GRAPHS + 2), 1]:
        assert torch.equal(one(torch.zeros(n)), torch.ones(n))
        assert len(one.made) <= graph.MOST_GRAPHS
    _, _, rnn = networks()
    monkeypatch.setattr(graph, "MOST_ROWS", 2)
    monkeypatch.setattr(graph.Replayed, "__call__", lambda *a: pytest.fail("recorded 3 rows"))
    with torch.no_grad():
        replayed(rnn).memories(sequences(n=3)[0])


def test_training_with_graph_is_training_without(command, monkeypatch, tmp_path):
    """`--graph` changes how fast a run is, and no number of it; both scripts do replay."""
    logs, record, recorded = [], graph.Replayed.record, []
    monkeypatch.setattr(graph.Replayed, "record",
                        lambda self, places: recorded.append(1) or record(self, places))
    for more in "", "--graph":
        code, _, err = command(f"smt.py {TASK} {SIZES} {RUN} {more} --rnn_from 0 --steps 3 "
                               f"--out_dir {tmp_path}/smt{more}", device="cpu")
        assert code == 0, err
        assert bool(recorded) == bool(more)
        recorded.clear()
        code, _, err = command(f"dmt.py --ckpt {tmp_path}/smt/ckpt.pt {RUN} {more} --steps 3 "
                               f"--out_dir {tmp_path}/dmt{more}", device="cpu")
        assert code == 0, err
        assert bool(recorded) == bool(more)
        recorded.clear()
        logs.append([torch.load(tmp_path / f"{s}{more}" / "ckpt.pt")["rnn"]
                     for s in ("smt", "dmt")])
    for plain, fast in zip(*logs):
        assert all(torch.equal(plain[k], fast[k]) for k in plain)


def test_what_is_on_the_device_is_not_pinned_again():
    """CUDA refuses to pin what it holds already; times are moved by objective, then handed on."""
    def pin():
        raise RuntimeError("only dense CPU tensors can be pinned")
    there = SimpleNamespace(device=torch.device("cuda"), pin_memory=pin, to=lambda device: device)
    assert model.on_device(there, "cuda:0") == "cuda:0"


@pytest.mark.parametrize("updater", ["transformer", "mlp", "gru"])
def test_memories_are_fp32_in_bf16_autocast(updater):
    """Labels, and what the RNN makes alone, keep small changes; a rollout in pieces is a whole
    one's."""
    encoder, _, rnn = networks(rnn=updater)
    x, _ = sequences()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        labels = encoder(x)
        assert labels.dtype == torch.float32
        own = rnn.own_memories(labels, x, torch.arange(T), T, 0)
        assert torch.equal(own[:, 1:], rnn.rollout(labels[:, 0], x[:, 1:], 1))
