"""Lesson: the numbers are what they say. A likelihood sums to one over all sequences; drift is 1 -
R^2."""
import itertools
import json
import math

import pytest
import torch
from tiny import T, networks, sequences

import data
from sources import images
import evaluate
from sample import generate

V, L = 2, 4  # all 16 sequences of four binary symbols, as "images" of 2 x 2


def every_sequence() -> data.Data:
    pictures = torch.tensor(list(itertools.product(range(V), repeat=L)),
                            dtype=torch.uint8).view(-1, 2, 2)
    return images.image_data("all", dict(train=pictures, val=pictures, test=pictures), V)


def nets(**changes):
    return networks(vocab=V + 1, n_out=V, T=L, ctx_len=L, **changes)


def nats_of_each(column: str, monkeypatch, **changes) -> torch.Tensor:
    """What evaluate adds up: the nats of every single sequence in a column, (16,)."""
    task, (encoder, decoder, rnn) = every_sequence(), nets(**changes)
    scores, make = [], evaluate.Score
    monkeypatch.setattr(evaluate, "Score", lambda *a: scores.append(make(*a)) or scores[-1])
    evaluate.evaluate(task, rnn, encoder, decoder, "test")
    return torch.cat(dict(zip(evaluate.COLUMNS, scores))[column].nats)


@pytest.mark.parametrize("column, kind", [("rollout", "causal"), ("teacher", "causal"),
                                          ("teacher", "bidirectional")])
def test_likelihoods_sum_to_one(column, kind, monkeypatch):
    """The rollout's and the teacher's numbers are exact log-likelihoods: exp(-nats) over all
    sequences adds to 1."""
    assert abs(float((-nats_of_each(column, monkeypatch, encoder=kind)).exp().sum()) - 1) < 1e-4


def test_language_model_sums_to_one():
    """So are those of the plain Transformer."""
    task, (_, decoder, _) = every_sequence(), nets()
    got = evaluate.evaluate(task, None, None, decoder, "test")
    assert got["rollout"] is None and got["teacher"] > 4 * math.log(2) - 1
    nothing = torch.empty(16, 0, decoder.c.mem_dim)
    held = task.held_out("test")
    with torch.no_grad():
        logp = decoder(nothing, held["x"], torch.full((16,), -1)).log_softmax(-1)
        logp = logp.gather(-1, held["y"][..., None]).sum((1, 2))
    assert abs(float(logp.exp().sum()) - 1) < 1e-4
    assert abs(got["teacher"] + float(logp.mean())) < 1e-4


def test_rollout_is_what_sampling_does(monkeypatch):
    """Samples come from the distribution that the rollout scores: empirical frequencies match
    exp(-nats)."""
    _, _, rnn = nets()
    probability = (-nats_of_each("rollout", monkeypatch)).exp()
    with torch.no_grad():
        out = generate(rnn, 20_000, L, torch.Generator().manual_seed(0))
    index = (out * torch.tensor([8, 4, 2, 1])).sum(1)
    seen = torch.bincount(index, minlength=16) / len(out)
    assert (seen - probability).abs().max() < 0.012


def test_teacher_is_the_encoder_at_every_time():
    """The one-pass teacher column equals encoding every prefix by itself."""
    task, (encoder, decoder, rnn) = every_sequence(), nets()
    held, total = task.held_out("test"), 0.0
    for t in range(L):
        with torch.no_grad():
            logits = decoder(encoder(held["x"][:, :t + 1], torch.tensor([t]))[:, 0])[:, 0]
        total += torch.nn.functional.cross_entropy(logits, held["y"][:, t])
    assert abs(evaluate.evaluate(task, rnn, encoder, decoder,
                                 "test")["teacher"] - float(total)) < 1e-4


def test_drift_is_one_minus_r_squared():
    """Drift equals its textbook definition with one variance over all (sequence, t); m_0, before
    the first update, does not count."""
    task, (encoder, decoder, rnn) = every_sequence(), nets()
    got = evaluate.evaluate(task, rnn, encoder, decoder, "test")
    x = task.held_out("test")["x"]
    with torch.no_grad():
        m, own = encoder(x, torch.arange(L)), rnn.memories(x)
    spread = (m - m.mean((0, 1))).square().sum((2, 3)).mean()
    by_time = (own - m).square().sum((2, 3)).mean(0) / spread
    assert torch.allclose(torch.tensor(got["drift_by_time"]), by_time, rtol=1e-3)
    assert abs(got["drift"] - float(by_time[1:].mean())) < 1e-3 * got["drift"]
    assert got["kl"] > 0


@pytest.mark.parametrize("most, every", [(8192, 1), (22, 2), (21, 3)])
def test_kl_of_futures_against_a_loop(most, every, monkeypatch):
    """Label and own memory decode the same future; 11 times of 4 outputs each, or every second or
    third of them where that is too many."""
    monkeypatch.setattr(evaluate, "MOST_OUTPUTS", most)
    encoder, decoder, rnn = networks()
    x, y = sequences()
    y[0, 5] = -1
    total, targets = 0.0, 0
    with torch.no_grad():
        m = evaluate.memories(x, rnn, encoder)
        got = evaluate.kl_of_futures(decoder, m, x, y, 2)
        for b in range(2):
            for t in range(0, T, every):
                p, q = (decoder(v[b:b + 1, t], x[b:b + 1, t + 1:t + 4], torch.tensor([t]))[0]
                        .log_softmax(-1) for v in (m.label, m.own))
                valid = y[b, t:t + 4] >= 0
                total += float((p.exp() * (p - q)).sum(-1)[valid].sum())
                targets += int(valid.sum())
    assert got == (pytest.approx(total, rel=1e-4), targets) and total > 0


def test_bayes_and_excess():
    """The floor is the exact entropy of retrieval's noisy label; a uniform guess exceeds it by log
    S minus it."""
    task = data.load("retrieval", length=8, symbols=4, noise=0.4)
    encoder, decoder, rnn = networks(vocab=task.vocab, n_out=4, T=8, ctx_len=8, fut_len=8)
    torch.nn.init.zeros_(rnn.readout.head.weight)
    got = evaluate.evaluate(task, rnn, encoder, decoder, "test", 300)
    p = torch.tensor([0.7, 0.1, 0.1, 0.1])  # 1 - 0.4 + 0.4 / 4, and 0.4 / 4 for each of the others
    floor = -float((p * p.log()).sum())
    assert abs(got["bayes"] - floor) < 1e-4
    assert abs(got["rollout"] - math.log(4)) < 1e-4
    assert abs(got["excess"] - (math.log(4) - floor)) < 1e-4
    assert 0.1 < got["accuracy"]["rollout"] < 0.45


def test_evaluation_uses_no_random_numbers():
    """Two evaluations agree exactly, and the global generator is where it was."""
    task, (encoder, decoder, rnn) = every_sequence(), nets()
    state = torch.get_rng_state()
    a, b = (evaluate.evaluate(task, rnn, encoder, decoder, "val") for _ in range(2))
    assert a == b and torch.equal(state, torch.get_rng_state())


def test_the_rollout_goes_on_where_labels_end():
    """With a causal context shorter than the windows the RNN is still scored on all of them, as a
    BPTT run would be."""
    task = data.load("pydoc", length=12)
    encoder, decoder, rnn = networks(vocab=256, n_out=256, T=12, ctx_len=5, fut_len=3,
                                     timestamps="none")
    got = evaluate.evaluate(task, rnn, encoder, decoder, "val", 7)
    alone = evaluate.evaluate(task, rnn, None, None, "val", 7)
    assert got["rollout"] == pytest.approx(alone["rollout"])
    assert got["late"]["rollout"] == pytest.approx(alone["late"]["rollout"])
    assert len(got["drift_by_time"]) == 5 and got["late"]["teacher"] is None  # no label at t >= 6
    assert got["rollout"] != pytest.approx(got["late"]["rollout"])
    # means over other times than the RNN's: the table says so, and only here
    said = "teacher, one step: of t < 5 alone; rollout: of all 12"
    assert said in evaluate.table(got) and "alone" not in evaluate.table(alone)


def test_late_means_the_second_half():
    """The loss at t >= T/2, averaged over its targets."""
    task = data.load("pydoc", length=12)
    _, _, rnn = networks(vocab=256, n_out=256, T=12, ctx_len=12, timestamps="none")
    held = task.held_out("val", 7)
    with torch.no_grad():
        logp = rnn.logits(rnn.memories(held["x"])).log_softmax(-1)
        logp = logp.gather(-1, held["y"][..., None])[..., 0]
    got = evaluate.evaluate(task, rnn, None, None, "val", 7)
    assert got["late"]["rollout"] == pytest.approx(float(-logp[:, 6:].mean()), rel=1e-4)


def test_late_losses_of_a_rule_that_goes_on():
    """Recency: all positions and the last tenth are reported apart, each with its excess over the
    posterior. There is no accuracy, because the targets are drawn."""
    task = data.load("recency", length=20, symbols=3)
    encoder, decoder, rnn = networks(vocab=task.vocab, n_out=3, T=20, ctx_len=20, fut_len=5)
    got, held = evaluate.evaluate(task, rnn, encoder, decoder, "val", 30), task.held_out("val", 30)
    with torch.no_grad():
        logp = rnn.logits(rnn.memories(held["x"])).log_softmax(-1)
    p = held["posterior"]
    late, late_excess = got["late"]["rollout"], got["late_excess"]["rollout"]
    for start, nats, excess in ((1, got["rollout"], got["excess"]), (18, late, late_excess)):
        y, q, best = held["y"][:, start:], logp[:, start:], p[:, start:]
        kl = (torch.xlogy(best, best) - best * q).sum(-1)
        assert nats == pytest.approx(-float(q.gather(-1, y[..., None]).mean()), rel=1e-4)
        assert excess == pytest.approx(float(kl.mean()), rel=1e-3)
    assert got["late_from"] == 18 and got["accuracy"] is None
    assert all(got["late_excess"][k] > 0 for k in evaluate.COLUMNS[:3])
    lines = {line[:16].strip() for line in evaluate.table(got).split("\n")}
    assert {"t >= 18", "excess, t >= 18", "excess nats"} <= lines and "accuracy" not in lines


def test_what_is_late_is_the_datas_to_say():
    """A text is read better in its second half. Most tasks have no late part: none is reported."""
    assert data.load("pydoc", length=13).late_from == 6
    for name in ("retrieval", "stack", "glyphs"):
        assert data.load(name).late_from is None
    task = data.load("stack", length=6)
    got = evaluate.evaluate(task, networks(vocab=6, n_out=4, T=6)[2], n=5)
    assert got["late"] is got["late_excess"] is got["late_from"] is None and got["excess"] > 0
    assert "t >=" not in evaluate.table(got)


def test_one_sequence_has_no_standard_error():
    """With N = 1 there is none to report."""
    task = data.load("retrieval", length=8)
    assert evaluate.evaluate(task, networks(vocab=task.vocab, n_out=8, T=8)[2],
                             n=1)["stderr"] is None


def test_heads_are_no_part_of_the_numbers(command, tiny_smt, tmp_path):
    """They help to train. With their weights changed, or without them, evaluation and samples are
    what they were, to the last digit."""
    ckpt = torch.load(tiny_smt, weights_only=True)
    changed = dict(ckpt, heads={k: v + 1 for k, v in ckpt["heads"].items()})
    without = {k: v for k, v in ckpt.items() if k != "heads"}
    said = []
    for name, content in dict(given=ckpt, changed=changed, without=without).items():
        torch.save(content, tmp_path / f"{name}.pt")
        for line in ("evaluate.py --n_test 20 --json", "sample.py --n 5"):
            code, out, err = command(f"{line} --device cpu --ckpt {tmp_path}/{name}.pt")
            assert code == 0 and out, err
            said.append(out)
    assert said[:2] == said[2:4] == said[4:]


def test_a_window_forgets_what_lies_before_it():
    """`windowed` gives the encoder's own memory of the last Tc tokens, and of nothing before."""
    encoder, _, rnn = networks(timestamps="none")
    x, _ = sequences()
    m = evaluate.windowed(encoder, x, 4)
    assert torch.allclose(m[:, :4], encoder(x)[:, :4], atol=1e-6)
    assert torch.allclose(m[:, 9], encoder(x[:, 6:10])[:, 3], atol=1e-6)
    other = x.clone()
    other[:, 5] = (x[:, 5] + 1) % 5
    assert torch.equal(evaluate.windowed(encoder, other, 4)[:, 9:], m[:, 9:])
    assert not torch.allclose(evaluate.windowed(encoder, other, 4)[:, 8], m[:, 8])


@pytest.mark.parametrize("encoder", ("causal", "bidirectional"))
def test_longer_sequences_than_in_training(command, tmp_path, encoder):
    """--length tests at any length where nobody was told the time; where T is the length of
    training, the window is the whole past and both teachers are one."""
    out = tmp_path / "run"
    code, _, err = command(f"smt.py --dataset stack --length 8 {{SIZES}} {{RUN}} --timestamps none "
                           f"--encoder {encoder} --times 4 --horizon 1 --steps 20 --shortest 6 "
                           f"--out_dir {out}")
    assert code == 0, err
    results = {}
    for length in (5, 8, 21):
        code, printed, err = command(f"evaluate.py --ckpt {out}/ckpt.pt --length {length} "
                                     "--n_test 7 --json")
        assert code == 0, err
        results[length] = json.loads(printed)
        assert results[length]["T"] == length
    assert results[8]["window"] == pytest.approx(results[8]["teacher"], abs=1e-6)
    if encoder == "causal":
        assert results[21]["window"] != pytest.approx(results[21]["teacher"], abs=1e-6)
    plain = json.loads(command(f"evaluate.py --ckpt {out}/ckpt.pt --n_test 7 --json")[1])
    assert plain["rollout"] == results[8]["rollout"] and plain["window"] is None


def test_length_is_refused_where_it_means_nothing(command, tiny_smt):
    """Networks that know the times of training know no others."""
    code, _, err = command(f"evaluate.py --ckpt {tiny_smt} --length 20")
    assert code == 2 and "--length 20" in err and "--timestamps none" in err
