"""Lesson: what training costs. Tokens seen, and layers that must run one after another: the axes of
Fig. 6.

However many sequences and times an SMT step trains on, it is as deep as encoder, one update and
decoder, and as the RNN is let run alone, without a graph; a BPTT step is as deep as the sequence is
long. On a machine that runs the rest in parallel, depth is time.
"""
import csv

import pytest
import tiny
import torch
from tiny import B, K, M, T, config, gen, networks, recipe, sequences

import bptt
import dmt
import smt
from model import ModelConfig

LAPTOP = ModelConfig(vocab=3, n_out=2, T=196)  # MNIST 14x14 on 2 + 2 + 2 layers


def test_a_step_at_laptop_size():
    """SMT: 2 + an update of 2 + 2, and 3 more updates where they begin on-policy. DMT: a span of 16
    and the readout. BPTT: 195 updates of 2 (m_0 is there already), and the readout."""
    assert smt.sequential_layers(LAPTOP, 0) == 4 and smt.sequential_layers(LAPTOP, 1) == 6
    assert smt.sequential_layers(LAPTOP, smt.horizon_at(0.0, 196)) == 12
    assert dmt.sequential_layers(LAPTOP, recipe(dmt, span=16), 196) == (2 + 195 * 2, 16 * 2 + 4)
    assert bptt.sequential_layers(LAPTOP, LAPTOP.T) == 392


def test_depth_of_smt_does_not_grow_with_the_sequence():
    """That of BPTT does."""
    longer = ModelConfig(vocab=3, n_out=2, T=784)
    assert smt.sequential_layers(longer, 1) == 6
    assert bptt.sequential_layers(longer, longer.T) == 1568


def test_a_gru_is_one_layer_an_update():
    """Its one cell counts once, whatever --rnn_layers says; an MLP has as many layers as it
    says."""
    depth = {kind: bptt.sequential_layers(config(rnn=kind, rnn_layers=3), config().T)
             for kind in ("gru", "mlp", "transformer")}
    assert depth == dict(gru=10 * 1 + 2, mlp=10 * 3 + 2, transformer=10 * 3 + 2)


def counted(rnn, monkeypatch):
    """A list that grows with every call of the updater."""
    calls, update = [], rnn.next_memory
    monkeypatch.setattr(rnn, "next_memory", lambda *a: calls.append(1) or update(*a))
    return calls


@pytest.mark.parametrize("horizon", [1, 3, T])
def test_the_count_of_smt_is_what_is_called(horizon, monkeypatch):
    """The RNN runs alone for horizon - 1 updates, then one for all transitions; those from the
    encoder's memories, beside it, do not wait for the rollout."""
    encoder, decoder, rnn = networks()
    calls = counted(rnn, monkeypatch)
    smt.objective(encoder, decoder, rnn, tiny.heads(), *sequences(), torch.arange(T), horizon,
                  recipe(smt), gen())
    said = smt.sequential_layers(encoder.c, horizon) - 2 - 2
    assert len(calls) - (horizon > 1) == said


@pytest.mark.parametrize("horizon", [1, 3, T])
def test_the_count_of_dmt_is_what_is_called(horizon, monkeypatch):
    """To set out is one rollout, wherever its pieces begin; a step is one span, one readout, and
    labels for what is new."""
    rnn = networks()[2]
    calls = counted(rnn, monkeypatch)
    cfg = recipe(dmt, span=3)
    said = dmt.sequential_layers(config(), cfg, horizon)
    own = torch.randn(B, T, K, M)
    rnn.own_memories(own, sequences()[0], torch.arange(T), horizon, 0)
    assert len(calls) == said[0] - 2 == horizon - 1
    calls.clear()
    x, y = sequences()
    walk = dmt.Walk(x, y, own, torch.tensor([[1, 4, 8]] * B), torch.arange(B), torch.arange(B),
                    own[:, 0])
    dmt.objective(rnn, None, walk, torch.ones(()), cfg, gen())
    assert len(calls) == said[1] - 2 - 2 == 3


def rows(folder):
    return list(csv.DictReader(open(folder / "log.csv")))


def test_log_csv_holds_both(command, tiny_smt, tmp_path):
    """Cumulative, for every method, over a resume too; DMT reads a sequence once, however many of
    its spans are learnt from."""
    T, B = 8, 4
    # four spans of 2 in each of 4 sequences: one of them ends in every step
    start = dict(smt="{TINY} --rnn transformer --steps 4 --horizon 3 --rnn_from 0",
                 bptt="{TINY} --rnn transformer --steps 4",
                 dmt=f"--ckpt {tiny_smt} {{RUN}} --steps 6 --span 2 --batch_size 4")
    for script, line in start.items():
        line = f"{script}.py {line} --log_every 1 --out_dir {tmp_path}/{script}"
        code, _, err = command(line)
        assert code == 0, err
    code, _, err = command(f"smt.py --resume --steps 6 --out_dir {tmp_path}/smt")
    assert code == 0, err
    column = lambda script, name: [int(r[name]) for r in rows(tmp_path / script)]
    assert column("smt", "tokens") == [B * T * s for s in range(1, 7)]
    assert column("smt", "layers") == [(2 + 3 * 2 + 1) * s for s in range(1, 7)]
    assert column("bptt", "layers") == [(7 * 2 + 1) * s for s in range(1, 5)]
    assert column("dmt", "tokens") == [B * T + T * s for s in range(1, 7)]
    # a GRU: 2 + 7 updates to set out; a span of 2 and the readout's 1 a step; 2 for new labels
    assert column("dmt", "layers") == [9 + 5 * s for s in range(1, 7)]
    ckpt = torch.load(tmp_path / "smt" / "ckpt.pt", weights_only=True)
    assert (ckpt["tokens"], ckpt["layers"]) == (B * T * 6, 9 * 6)


def test_what_is_counted_is_what_was_read(command, tmp_path, monkeypatch):
    """Short sequences among the long, and parts of a batch: tokens are those of all parts, updates
    alone no more than the last part's times."""
    seen, objective = [], smt.objective

    def recorded(encoder, decoder, rnn, heads, x, y, times, horizon, *rest):
        seen.append((x.numel(), horizon, len(times)))
        return objective(encoder, decoder, rnn, heads, x, y, times, horizon, *rest)

    monkeypatch.setattr(smt, "objective", recorded)
    code, _, err = command("smt.py {TINY} --shortest 4 --micro 2 --rnn_from 0 --steps 9 "
                           f"--log_every 1 --out_dir {tmp_path}/short")
    assert code == 0, err
    got = rows(tmp_path / "short")
    assert len({n for n, _, _ in seen}) > 1
    assert int(got[-1]["tokens"]) == sum(n for n, _, _ in seen)
    assert all(horizon <= max(1, n if n > 2 else 1) for _, horizon, n in seen)
    assert int(got[-1]["layers"]) == sum(2 + horizon + 1 for _, horizon, _ in seen[1::2])


def test_a_loss_that_joins_late_is_not_diluted(command, tmp_path):
    """The RNN's loss in the log is the mean over the steps that had one."""
    for every in (1, 4):
        code, _, err = command("smt.py {TINY} --rnn_from 0.5 --steps 6 "
                               f"--log_every {every} --out_dir {tmp_path}/{every}")
        assert code == 0, err
    each = {r["step"]: r["dyn"] for r in rows(tmp_path / "1")}
    some = {r["step"]: r["dyn"] for r in rows(tmp_path / "4")}
    assert list(some) == ["3", "4", "6"] and some["3"] == each["3"] == ""
    assert float(some["4"]) == pytest.approx(float(each["4"]))


def test_layers_follow_the_curriculum(command, tmp_path):
    """What a step of SMT adds grows with its horizon, and stops at the sequence or at --times.
    While the teacher is alone it is its layers."""
    code, _, err = command("smt.py {TINY} --rnn transformer --steps 5 --log_every 1 --rnn_from 0 "
                           f"--out_dir {tmp_path}/all")
    assert code == 0, err
    layers = [int(r["layers"]) for r in rows(tmp_path / "all")]
    steps = [b - a for a, b in zip([0, *layers], layers)]
    assert steps == [2 + smt.horizon_at(s / 5, 8) * 2 + 1 for s in range(5)]
    assert steps[0] == 11 and steps[-1] == 19
    code, _, err = command("smt.py {TINY} --rnn transformer --steps 4 --log_every 1 --rnn_from 0.5 "
                           f"--out_dir {tmp_path}/half")
    assert code == 0, err
    # the teacher's 2 + 1, twice; then the curriculum, from its beginning to its end
    half = [int(r["layers"]) for r in rows(tmp_path / "half")]
    assert half[:3] == [3, 6, 6 + 11] and half[3] - half[2] == 2 + smt.horizon_at(0.5, 8) * 2 + 1
    code, _, err = command("smt.py {TINY} --rnn transformer --steps 3 --log_every 1 --times 3 "
                           f"--horizon 8 --rnn_from 0 --out_dir {tmp_path}/few")
    assert code == 0, err
    assert [int(r["layers"]) for r in rows(tmp_path / "few")] == [9, 18, 27]
