"""Lesson: what training costs. Tokens seen, and layers that must run one after another: the axes of
Fig. 6.

However many sequences and times an SMT step trains on, it is as deep as encoder, a few updates and
decoder; a BPTT step is as deep as the sequence is long. On a machine that runs the rest in
parallel, depth is time.
"""
import csv

import pytest
import torch
from tiny import config, recipe

import bptt
import dmt
import smt
from model import ModelConfig

LAPTOP = ModelConfig(vocab=3, n_out=2, T=196)  # MNIST 14x14 on 2 + 2 + 2 layers


def test_a_step_at_laptop_size():
    """SMT: 2 + 7 updates of 2 + 2. BPTT: 195 updates of 2 (m_0 is there already), and the
    readout."""
    assert smt.sequential_layers(LAPTOP, recipe(smt)) == 18
    assert bptt.sequential_layers(LAPTOP) == 392


def test_depth_of_smt_does_not_grow_with_the_sequence():
    """That of BPTT does; the paper's Eq. 3, without a chain, makes all transitions at once."""
    longer = ModelConfig(vocab=3, n_out=2, T=784)
    assert smt.sequential_layers(longer, recipe(smt)) == 18
    assert smt.sequential_layers(longer, recipe(smt, chain=0.0)) == 6
    assert bptt.sequential_layers(longer) == 1568
    # no run is longer than the sequence
    assert smt.sequential_layers(config(T=3), recipe(smt)) == 2 + 2 * 1 + 2


def test_a_gru_is_one_layer_an_update():
    """Its one cell counts once, whatever --rnn_layers says; an MLP has as many layers as it
    says."""
    depth = {kind: bptt.sequential_layers(config(rnn=kind, rnn_layers=3))
             for kind in ("gru", "mlp", "transformer")}
    assert depth == dict(gru=10 * 1 + 2, mlp=10 * 3 + 2, transformer=10 * 3 + 2)


@pytest.mark.parametrize("rollout, horizon, updates", [
    ("sequential", 4, 3), ("sequential", 11, 10), ("parallel", 4, 4), ("parallel", 11, 10)])
def test_a_round_of_dmt_rolls_out_once(rollout, horizon, updates):
    """Labels and rollout are a round's; each of its steps is one update and one readout."""
    cfg = recipe(dmt, rollout=rollout)
    assert dmt.sequential_layers(config(), cfg, horizon) == (2 + updates, 1 + 2)


@pytest.mark.parametrize("rollout", ["sequential", "parallel"])
def test_the_count_is_what_is_called(rollout, monkeypatch):
    """own_memories calls the updater as often as sequential_layers says, wherever the pieces
    begin."""
    from tiny import T, networks, sequences
    _, _, rnn = networks()
    x, _ = sequences()
    calls, update = [], rnn.update
    monkeypatch.setattr(rnn, "update", lambda *a: calls.append(1) or update(*a))
    labels = torch.randn(len(x), T, 2, 12)
    for horizon in (1, 3, T):
        calls.clear()
        dmt.own_memories(rnn, labels, x, horizon, 0, rollout, float("inf"))
        said = dmt.sequential_layers(config(), recipe(dmt, rollout=rollout), horizon)[0] - 2
        assert len(calls) == said * rnn.c.update_layers


def rows(folder):
    return list(csv.DictReader(open(folder / "log.csv")))


def test_log_csv_holds_both(command, tiny_smt, tmp_path):
    """Cumulative, for every method, over a resume too; a round of DMT is read once, however many
    steps learn from it."""
    T, B = 8, 4
    start = dict(smt="{TINY} --steps 4", bptt="{TINY} --steps 4",
                 dmt=f"--ckpt {tiny_smt} {{RUN}} --steps 6 --pairs 14")
    for script, line in start.items():
        line = f"{script}.py {line} --log_every 1 --out_dir {tmp_path}/{script}"
        code, _, err = command(line)
        assert code == 0, err
    code, _, err = command(f"smt.py --resume --steps 6 --out_dir {tmp_path}/smt")
    assert code == 0, err
    column = lambda script, name: [int(r[name]) for r in rows(tmp_path / script)]
    assert column("smt", "tokens") == [B * T * s for s in range(1, 7)]
    assert column("smt", "layers") == [(2 + 7 * 2 + 1) * s for s in range(1, 7)]
    assert column("bptt", "layers") == [(7 * 2 + 1) * s for s in range(1, 5)]
    # 28 pairs a round, 14 a step: two steps a round, the whole sequence is the horizon
    assert column("dmt", "tokens") == [32, 32, 64, 64, 96, 96]
    assert column("dmt", "layers") == [19, 22, 41, 44, 63, 66]
    ckpt = torch.load(tmp_path / "smt" / "ckpt.pt", weights_only=True)
    assert (ckpt["tokens"], ckpt["layers"]) == (B * T * 6, 17 * 6)


def test_an_older_checkpoint_counts_from_zero(command, tmp_path):
    """Runs that began before there were counters go on."""
    assert command(f"bptt.py {{TINY}} --out_dir {tmp_path}")[0] == 0
    path = tmp_path / "ckpt.pt"
    old = {k: v for k, v in torch.load(path, weights_only=True).items()
           if k not in ("tokens", "layers")}
    torch.save(old, path)
    code, _, err = command(f"bptt.py --resume --steps 5 --out_dir {tmp_path}")
    assert code == 0 and torch.load(path, weights_only=True)["tokens"] == 2 * 4 * 8, err
