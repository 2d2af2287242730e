"""Lesson: the RNN's own memories, at most `horizon` - 1 updates from an encoder's; sequences under
way, each at a time of its own; and Eq. 6 on the spans that they have come to."""
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import B, K, M, T, gen, networks, recipe, sequences

import dmt
from checkpoints import CheckpointError
from losses import cross_entropy
from model import first_piece


def setting(n=B):
    encoder, _, rnn = networks()
    x, _ = sequences(n=n)
    with torch.no_grad():
        rnn.m0.copy_(encoder(torch.full((1, 1), 5))[0, 0])
        return rnn, encoder(x), x


# ------------------------------------------------------------------------------------- own memories

def pieces(rnn, labels, x, times, horizon, start):
    """A plain loop: the encoder's memory where a piece starts, elsewhere one update."""
    own = labels.clone()
    for i in range(1, len(times)):
        if (i - start) % horizon:
            own[:, i] = rnn.update(own[:, i - 1], x[:, i], torch.full((len(x),), int(times[i])))
    return own


@pytest.mark.parametrize("horizon", [2, 3, 5, T - 1])
@pytest.mark.parametrize("times", [torch.arange(T), torch.arange(2, 9)])
def test_pieces(horizon, times):
    """The memory is the encoder's at every `horizon`-th time, the first of them anywhere, and at
    the very first; elsewhere it is one update of the one before. Every place starts a piece."""
    rnn, labels, x = setting()
    labels, x, horizon = labels[:, times], x[:, times], min(horizon, len(times))
    starts = range(horizon) if horizon < len(times) else [0]
    possible = [pieces(rnn, labels, x, times, horizon, start) for start in starts]
    seen = set()
    for seed in range(60):
        own = rnn.own_memories(labels, x, times, horizon,
                               first_piece(len(times), horizon, gen(seed)))
        found = [s for s, p in zip(starts, possible) if torch.allclose(own, p, atol=1e-5)]
        assert len(found) == 1
        seen.add(found[0])
    assert seen == set(starts)


def test_horizon_one_is_behaviour_cloning():
    """With horizon 1 every memory is the encoder's: SMT's pairs."""
    rnn, labels, x = setting()
    assert torch.equal(rnn.own_memories(labels, x, torch.arange(T), 1, 0), labels)


def test_whole_horizon_is_the_rollout():
    """With horizon T the pieces are one rollout from m_0; with less they are not."""
    rnn, labels, x = setting()
    exact, times = rnn.memories(x), torch.arange(T)
    for horizon in (T, T + 7):
        assert torch.allclose(rnn.own_memories(labels, x, times, horizon, 0), exact, atol=1e-5)
    short = rnn.own_memories(labels, x, times, T - 1, 2)
    assert not torch.allclose(short, exact, atol=1e-3)


def test_labels_stay_as_they_are():
    """The RNN runs on a copy, and without a graph, whoever asks."""
    rnn, labels, x = setting()
    labels.requires_grad_()
    before = labels.detach().clone()
    own = rnn.own_memories(labels, x, torch.arange(T), 5, 3)
    assert torch.equal(labels, before) and not own.requires_grad and own is not labels


def test_curriculum_grows_to_the_whole():
    """The horizon never shrinks, starts short, and has reached the whole sequence at 60 % of the
    run."""
    h = [dmt.horizon_at(p / 100, 196) for p in range(101)]
    assert h[0] == 16 and h == sorted(h) and h[60] == h[100] == 196
    # no longer than the sequence
    assert [dmt.horizon_at(p, 5) for p in (0.0, 0.3, 1.0)] == [5, 5, 5]


# -------------------------------------------------------------------------------------------- spans

@pytest.mark.parametrize("length, span", [(T, 1), (T, 3), (T, 5), (T, T - 1), (64, 16), (2, 1)])
def test_spans_cover_every_transition(length, span):
    """In every sequence each transition 1 .. T - 1 is learnt from; on average those in the middle
    once, those near an end up to twice. All sequences have as many spans, and none too many."""
    n = 600
    starts = dmt.span_starts(n, length, span, gen())
    assert starts.shape == (n, math.ceil((length - 1) / span))
    assert (starts[:, 0] == 1).all() and (starts[:, -1] == length - span).all()
    assert (starts.diff() > 0).all()
    count = torch.zeros(n, length)
    for k in range(span):
        count.scatter_add_(1, starts + k, torch.ones(starts.shape))
    assert (count[:, 0] == 0).all() and (count[:, 1:] >= 1).all() and count.max() <= 2
    if span == 1 or span == length - 1:
        assert (count[:, 1:] == 1).all()
    elif length > 3 * span:
        assert (count[:, 2 * span:-2 * span] == 1).all()
        # spans begin everywhere: behind a start as well as in the middle
        assert len(starts[:, 1].unique()) > 1


# ----------------------------------------------------------------------------------------- the walk

def after(x):
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


class Task:
    """Endless sequences; those that were handed out."""
    def __init__(self):
        self.drawn = []

    def batch(self, n, generator):
        x = torch.randint(5, (n, T), generator=generator)
        x[:, 0] = 5
        self.drawn.append(x)
        return x, after(x)


def under_way(span=3, horizon=T, n=10, seed=0, **changes):
    # networks as they were drawn are chaotic: in fp32 last digits grow with every update
    encoder, _, rnn = (net.double() for net in networks())
    with torch.no_grad():
        rnn.m0.copy_(encoder(torch.full((1, 1), 5))[0, 0])
    cfg, task, g = recipe(dmt, span=span, batch_size=n, **changes), Task(), gen(seed)
    walk = dmt.begin(task.batch(n, g), encoder, rnn, horizon, cfg, g)
    return encoder, rnn, cfg, task, g, walk


@pytest.mark.parametrize("span", [1, 3, 4, T - 1])
def test_a_walk_is_the_rollout(span):
    """While the RNN stays as it is, the memory that a span begins with is always the RNN's own,
    alone from m_0: at the start, behind each span, where the last one overlaps, and in sequences
    that came later."""
    encoder, rnn, cfg, task, g, walk = under_way(span)
    G, rows = walk.starts.shape[1], torch.arange(10)
    new = 0
    for step in range(2 * G + 1):
        own = rnn.memories(walk.x)
        assert torch.allclose(walk.m, own[rows, walk.t - 1], atol=1e-8)
        assert torch.allclose(walk.labels, encoder(walk.x), atol=1e-5)
        made = dmt.objective(rnn, None, walk, torch.ones(()), cfg, g)[1]
        new += dmt.go_on(walk, made, task, encoder, T, g)
        assert torch.equal(walk.y, after(walk.x))
    assert 2 * 10 <= new <= 3 * 10 and sum(map(len, task.drawn)) == 10 + new


def test_every_step_has_all_ages():
    """As many sequences begin as are under way and end; in one turn each is learnt from whole."""
    encoder, rnn, cfg, task, g, walk = under_way(span=2, n=20)
    assert walk.i.bincount().tolist() == [4] * 5
    seen = torch.zeros(20, T)
    first = walk.x.clone()
    for step in range(5):
        mine = (walk.x == first).all(1)
        for k in range(2):
            seen[mine, (walk.t + k)[mine]] += 1
        made = dmt.objective(rnn, None, walk, torch.ones(()), cfg, g)[1]
        assert dmt.go_on(walk, made, task, encoder, T, g) == 4
        assert walk.i.bincount().tolist() == [4] * 5
    for n in range(20):  # from where it was to its end
        t = int(seen[n, 1:].argmax()) + 1
        assert (seen[n, t:] >= 1).all() and (seen[n, :t] == 0).all()


def test_put_back_on_the_label():
    """Nobody on the way, with whole rollouts; about every `horizon` updates with a short one."""
    encoder, rnn, cfg, task, g, walk = under_way(span=2, n=40)
    made = dmt.objective(rnn, None, walk, torch.ones(()), cfg, gen(1))[1].detach()
    rows = torch.arange(40)
    dmt.go_on(walk, made, task, encoder, T, g)
    label = walk.labels[rows, walk.t - 1]
    assert ((walk.m == label).all(2).all(1) == (walk.i == 0)).all()
    back = 0
    for seed in range(20):
        again = under_way(span=2, n=40)
        dmt.go_on(again[-1], made, again[3], encoder, 8, gen(seed))
        old = again[-1].i > 0
        back += float((again[-1].m == label)[old].all(2).all(1).float().mean()) / 20
    assert abs(back - 2 / 8) < 0.05
    again = under_way(span=2, n=40)
    dmt.go_on(again[-1], made, again[3], encoder, 2, again[4])
    assert torch.equal(again[-1].m, again[-1].labels[rows, again[-1].t - 1])


def test_new_sequences_every_step():
    """With --spans, the paper: any spans of any sequence, each at most once, from its own m."""
    encoder, rnn, cfg, task, g, walk = under_way(span=1, n=4, spans=25)
    pairs = {(int(b), int(t)) for b, t in zip(walk.b, walk.t)}
    assert len(pairs) == 25 == len(walk.m) and {b for b, _ in pairs} == {0, 1, 2, 3}
    assert torch.allclose(walk.m, rnn.memories(walk.x)[walk.b, walk.t - 1], atol=1e-5)


@pytest.mark.parametrize("span, horizon", [(1, T), (1, 4), (3, 5)])
def test_no_label_is_made_that_nobody_reads(span, horizon, monkeypatch):
    """With --spans and the paper's encoder, which has a pass for every time: the labels of the
    spans and the memories before them are those of all labels made, from fewer passes' rows."""
    encoder, _, rnn = (net.double() for net in networks(encoder="bidirectional"))
    cfg, batch, rows = recipe(dmt, span=span, spans=5), sequences(n=20), []
    real = encoder.encode_window
    monkeypatch.setattr(encoder, "encode_window",
                        lambda x, t: (rows.append(len(x)), real(x, t))[1])
    walk = dmt.begin(batch, encoder, rnn, horizon, cfg, gen(3))
    made = sum(rows)
    when = walk.t[:, None] + torch.arange(span)
    everything = encoder(batch[0])
    assert torch.allclose(walk.labels[walk.b[:, None], when],
                          everything[walk.b[:, None], when], atol=1e-9)
    starts = [i for i in range(horizon) if torch.allclose(
        walk.m, rnn.own_memories(everything, batch[0], torch.arange(T), horizon, i)[
            walk.b, walk.t - 1], atol=1e-7)]
    assert starts and made <= 5 * span + 20 * (1 + -(-T // horizon)) < 20 * T


def test_a_walk_is_kept_and_resumed():
    """What a checkpoint keeps makes the same walk, in every bit, and what is no such walk is
    refused."""
    encoder, rnn, cfg, task, g, walk = under_way(span=3)
    for _ in range(3):
        made = dmt.objective(rnn, None, walk, torch.ones(()), cfg, g)[1]
        dmt.go_on(walk, made, task, encoder, T, g)
    kept = dmt.kept(walk)
    again = dmt.resumed(kept, encoder, 10, T, 3, "cpu")
    for name, value in vars(walk).items():
        assert torch.equal(value, getattr(again, name)), name
    for name, bad in (("x", kept["x"] + 6), ("i", kept["i"] + 9), ("m", kept["m"][1:]),
                      ("starts", kept["starts"].float()), ("y", kept["y"] - 2)):
        with pytest.raises(CheckpointError):
            dmt.resumed(kept | {name: bad}, encoder, 10, T, 3, "cpu")


# ---------------------------------------------------------------------------------------- objective

def losses(nets, own, labels, b, t, heads=None, variance=0.5, y=None, **changes):
    cfg = recipe(dmt, **dict(first=0.0, span=1) | changes)
    x, given = sequences()
    starts = torch.arange(T).expand(B, T)  # span i of a sequence begins at i
    walk = dmt.Walk(x, given if y is None else y, labels, starts, b, t, own[b, t - 1])
    return dmt.objective(nets[2], heads, walk, torch.tensor(variance), cfg, gen())[0]


@pytest.mark.parametrize("span", [1, 3])
def test_objective_against_a_loop(span):
    """From the RNN's own m_{t-1} `span` updates (Eq. 1); each result shall be the encoder's
    (Eq. 6, the paper with span 1) and its readout predict y_t (Eq. 2), y_0 as well, from m_0, where
    a sequence begins; the loss is the weighted sum."""
    nets = _, _, rnn = networks()
    x, y = sequences()
    own, labels = (torch.randn(B, T, K, M, generator=gen(s)) for s in (3, 4))
    b, t = torch.tensor([0, 2, 1, 2]), torch.tensor([8, 1, 5, 5])
    got = losses(nets, own, labels, b, t, span=span, first=1.0, lambda_mse=0.7, lambda_dec=1.3)
    square, first = [], []
    for i in range(4):
        m, n = own[b[i], t[i] - 1][None], b[i]
        if t[i] == 1:
            first.append(cross_entropy(rnn.readout(m)[:, 0], y[n:n + 1, 0]))
        for now in range(int(t[i]), int(t[i]) + span):
            m = rnn.update(m, x[n:n + 1, now], torch.tensor([now]))
            square.append((m[0] - labels[n, now]).square().mean())
            first.append(cross_entropy(rnn.readout(m)[:, 0], y[n:n + 1, now]))
    mse, dec = torch.stack(square).mean() / 0.5, torch.stack(first).sum() / (4 * span)
    assert torch.allclose(got["mse"], mse, atol=1e-5) and torch.allclose(got["dec"], dec, atol=1e-5)
    assert torch.allclose(got["loss"], 0.7 * mse + 1.3 * dec, atol=1e-5)


def test_heads_see_every_memory_of_a_span():
    """They guess from what the RNN made, with the targets of its sequence and time."""
    nets, heads = networks(), tiny.heads()
    x, y = sequences()
    own = nets[2].memories(x).detach()
    b, t = torch.tensor([2, 0]), torch.tensor([4, 7])
    got = losses(nets, own, own, b, t, heads, span=3)
    every, very_next = [], []
    for n, start in ((2, 4), (0, 7)):
        for now in range(start, start + 3):
            guess = heads(own[n, now][None])[0]
            every += [F.cross_entropy(guess[k], y[n, now + k])
                      for k in range(min(tiny.F, T - now))]
            very_next.append(F.cross_entropy(guess[0], y[n, now]))
    expected = torch.stack(every).mean() + torch.stack(very_next).mean()
    assert torch.allclose(got["heads"], expected, atol=1e-5)


def test_perfect_memory_has_no_loss():
    """Where the updates give exactly the encoder's memories the MSE is 0; elsewhere not."""
    nets = networks()
    own = nets[2].memories(sequences()[0]).detach()
    t, b = torch.tensor([3, 5, 8]), torch.arange(B)
    assert losses(nets, own, own, b, t, span=3)["mse"] < 1e-8
    assert losses(nets, own, own.roll(1, 1), b, t, span=3)["mse"] > 1e-3


def test_masked_targets_are_finite():
    """No valid target among the spans: what is predicted costs 0, and the gradient is finite."""
    nets, heads = networks(), tiny.heads(past=0)
    rnn, labels, _ = setting()
    got = losses(nets, labels, labels, torch.tensor([0]), torch.tensor([3]), heads, first=0.5,
                 span=2, y=torch.full((B, T), -1))
    got["loss"].backward()
    assert got["dec"] == 0 and torch.isfinite(got["loss"])
    assert all(torch.isfinite(p.grad).all() for p in nets[2].parameters() if p.grad is not None)


def test_unit_of_the_error_is_the_variance_of_the_labels():
    """A mean square error of 1 is that of always answering the mean memory."""
    encoder, _, _ = networks()
    x, _ = sequences()
    m = encoder(x).flatten(0, 1).detach()
    expected = (m - m.mean(0)).square().mean()
    assert torch.allclose(dmt.variance_of(encoder, x, torch.arange(T)), expected, atol=1e-5)
    assert math.isfinite(expected)
