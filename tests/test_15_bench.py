"""Lesson: what is compared with what. The reference's way has our losses, and pays for graphs that
ours never builds."""
import json

import torch
from tiny import T, networks, recipe, sequences

import bench
import smt


def test_reference_smt_is_eq_5_at_one_time():
    """Two bidirectional passes give the dynamics loss of our objective on the same single
    transition."""
    nets = networks(encoder="bidirectional")
    x, y = sequences()
    cfg = recipe(smt, lambda_dec=0.0, lambda_dyn=1.0, lambda_unif=0.0, chain=0.0, decode_own=0.0)
    for t in (1, 4, T - 1):
        ours = smt.objective(*nets, x, y, torch.tensor([[t - 1, t]]), cfg,
                             torch.Generator())["loss"]
        assert torch.allclose(bench.reference_smt(*nets, x, y, t, cfg), ours, atol=1e-5)


def test_reference_dmt_crosses_steps_and_teacher(monkeypatch):
    """Its gradient reaches the first memory and the encoder; the graph of both is what it pays
    for."""
    monkeypatch.setattr(bench, "LABEL_EVERY", 4)
    encoder, _, rnn = networks(encoder="bidirectional")
    bench.reference_dmt(encoder, rnn, *sequences()).backward()
    assert rnn.m0.grad.abs().sum() > 0 and encoder.registers.grad.abs().sum() > 0


def test_bench_runs(command):
    """Every comparison comes back with its times, its transitions and both ratios."""
    code, out, err = command("bench.py --dataset modular --seconds 0 --threads 1 --device cpu "
                             "--json")
    assert code == 0, err
    result = json.loads(out)
    assert len(result["rows"]) == 5 and result["gflops"] > 0
    for row in result["rows"]:
        assert row["per_step"] > 0 and row["per_transition"] > 0 and min(row["transitions"]) > 0


def test_interleaved_calls_take_turns():
    """Each way is called as often as the other, in turn, and the count it returns is kept."""
    calls = []
    got = bench.interleaved({"a": lambda: calls.append("a") or 3,
                             "b": lambda: calls.append("b") or 5}, 0.0, "cpu")
    assert calls == ["a", "b"] * 3 and got["a"][1] == 3 and got["b"][1] == 5
