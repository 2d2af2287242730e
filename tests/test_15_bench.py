"""Lesson: what is compared with what. The reference's way has our losses, and pays for graphs that
ours never builds."""
import dataclasses
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
    cfg = recipe(smt, lambda_dec=0.0, lambda_dyn=1.0, lambda_unif=0.0, rnn_batch=0)
    for t in (1, 4, T - 1):
        ours = smt.objective(*nets, None, x, y, torch.tensor([t - 1, t]), 1, cfg,
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


def test_transitions_are_counted_as_they_are_learnt():
    """SMT: those of its part of the batch, twice where they begin on-policy too. DMT: every update
    of every span. Both take a step with them."""
    b = bench.Bench("laptop", "modular", "cpu", "data", examples=4)             # T = 8
    b.smt = dataclasses.replace(b.smt, batch_size=5, rnn_batch=3, times=0, horizon=0)
    b.dmt = dataclasses.replace(b.dmt, span=16, batch_size=10)
    assert b.encoder.c.encoder == "causal" and b.their_encoder.c.encoder == "bidirectional"
    before = b.rnn.updater.cell.weight_hh.detach().clone()
    assert b.smt_ours() == 2 * 3 * 7 and b.smt_ours(False) == 3 * 7
    assert b.smt_ours(False, plain=True) == 5
    assert not torch.equal(before, b.rnn.updater.cell.weight_hh)
    assert b.dmt_ours() == b.dmt_ours() == 10 * 7  # spans are cut to the sequence
    b.dmt, b.walk = dataclasses.replace(b.dmt, spans=6), None
    assert b.dmt_ours() == b.dmt_ours() == 6 * 7  # random ones, of new sequences


def test_interleaved_calls_take_turns():
    """Each way is called as often as the other, in turn, and the count it returns is kept."""
    calls = []
    got = bench.interleaved({"a": lambda: calls.append("a") or 3,
                             "b": lambda: calls.append("b") or 5}, 0.0, "cpu")
    assert calls == ["a", "b"] * 3 and got["a"][1] == 3 and got["b"][1] == 5
