"""Lesson: the RNN's own memories, at most `horizon` - 1 updates from an encoder's, and Eq. 6 on
spans that start there."""
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import B, K, M, T, gen, networks, recipe, sequences

import dmt
from losses import cross_entropy


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
        own = rnn.own_memories(labels, x, times, horizon, gen(seed))
        found = [s for s, p in zip(starts, possible) if torch.allclose(own, p, atol=1e-5)]
        assert len(found) == 1
        seen.add(found[0])
    assert seen == set(starts)


def test_horizon_one_is_behaviour_cloning():
    """With horizon 1 every memory is the encoder's: SMT's pairs, or no sweep at all."""
    rnn, labels, x = setting()
    for sweeps in (False, True):
        assert torch.equal(rnn.own_memories(labels, x, torch.arange(T), 1, gen(), sweeps), labels)


def test_whole_horizon_is_the_rollout():
    """With horizon T the pieces are one rollout from m_0, and so are T - 1 sweeps, and no fewer."""
    rnn, labels, x = setting()
    exact, times = rnn.memories(x), torch.arange(T)
    for horizon in (T, T + 7):
        for sweeps in (False, True):
            own = rnn.own_memories(labels, x, times, horizon, gen(), sweeps)
            assert torch.allclose(own, exact, atol=1e-5)
    short = rnn.own_memories(labels, x, times, T - 1, gen(), True)
    assert not torch.allclose(short, exact, atol=1e-3)


def test_sweeps_age_by_one():
    """After j sweeps m_t is j updates from the encoder's m_{t-j}, for all t at once."""
    rnn, labels, x = setting()
    own = rnn.own_memories(labels, x, torch.arange(T), 4, gen(), sweeps=True)
    for t in range(1, T):
        j = min(3, t)
        alone = rnn.rollout(labels[:, t - j], x[:, t - j + 1:t + 1], t - j + 1)[:, -1]
        assert torch.allclose(own[:, t], alone, atol=1e-5)


@pytest.mark.parametrize("sweeps", [False, True])
def test_tube_puts_lost_memories_back(sweeps):
    """No memory is further from its label than the tube is wide, and those inside the tube are the
    RNN's own."""
    rnn, labels, x = setting()
    times = torch.arange(T)
    free = rnn.own_memories(labels, x, times, T, gen(), sweeps)
    error = (free - labels).square().mean((2, 3))
    # at t = 1 some sequences are inside and some are not
    width = float(error[:, 1].sort().values[1])
    own = rnn.own_memories(labels, x, times, T, gen(), sweeps, width)
    assert (own - labels).square().mean((2, 3)).max() <= width + 1e-6
    back = (own == labels).all(3).all(2)
    assert back[:, 1].tolist() == (error[:, 1] > width).tolist()
    assert not back[:, 1].all() and back[:, 1].any()
    # what was put back goes on from there
    for t in range(2, T) if not sweeps else ():
        new = rnn.update(own[:, t - 1], x[:, t], torch.full((B,), t))
        lost = (new - labels[:, t]).square().mean((1, 2), keepdim=True) > width
        assert torch.allclose(own[:, t], torch.where(lost, labels[:, t], new), atol=1e-5)


@pytest.mark.parametrize("sweeps", [False, True])
def test_labels_stay_as_they_are(sweeps):
    """The RNN runs on a copy, and without a graph, whoever asks."""
    rnn, labels, x = setting()
    labels.requires_grad_()
    before = labels.detach().clone()
    own = rnn.own_memories(labels, x, torch.arange(T), 5, gen(), sweeps, tube=0.5)
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
    once, those near an end up to twice."""
    n = 600
    spans = dmt.choose_spans(n, length, span, 1, gen())
    b, t = spans.unbind(1)
    assert t.min() == 1 and t.max() == length - span
    count = torch.zeros(n, length)
    for k in range(span):
        count.index_put_((b, t + k), torch.ones(len(b)), accumulate=True)
    assert (count[:, 0] == 0).all() and (count[:, 1:] >= 1).all()
    mean = count.mean(0)[1:]
    assert mean.max() < 2.05
    if span == 1 or span == length - 1:
        assert (count[:, 1:] == 1).all()
    elif length > 3 * span:
        assert torch.allclose(mean[span:-span], torch.ones(()))


def test_spans_come_in_random_order_and_anew():
    """Reuse goes through a round again with other offsets; the order mixes sequences; a seed
    repeats it."""
    once, twice = (dmt.choose_spans(50, 30, 4, reuse, gen()) for reuse in (1, 2))
    assert torch.equal(once, twice[:len(once)])
    again = twice[len(once):]
    assert {tuple(s) for s in once.tolist()} != {tuple(s) for s in again.tolist()}
    for part in (once, again):
        assert set(part[:, 0].tolist()) == set(range(50))
        assert not torch.equal(part[:, 0], part[:, 0].sort().values)


def test_steps_of_a_round():
    """Whole steps, every span in one of them; a short round is one step; 0 reuses: the first."""
    spans = torch.arange(22).view(11, 2)
    cfg = lambda reuse, n=4: tiny.recipe(dmt, spans=n, reuse=reuse)
    parts = dmt.steps_of_round(spans, cfg(1))
    assert [len(p) for p in parts] == [4, 4] and torch.equal(torch.cat(parts), spans[:8])
    assert [len(p) for p in dmt.steps_of_round(spans, cfg(1, 100))] == [11]
    assert [len(p) for p in dmt.steps_of_round(spans, cfg(0))] == [4]


# ---------------------------------------------------------------------------------------- objective

def losses(nets, own, labels, b, t, heads=None, variance=0.5, y=None, **changes):
    cfg = recipe(dmt, **dict(first=0.0, futures=1000, lambda_fut=1.0, span=1) | changes)
    x, given = sequences()
    return dmt.objective(nets[2], heads, own, labels, x, given if y is None else y, b, t,
                         torch.tensor(variance), cfg, gen())


@pytest.mark.parametrize("span", [1, 3])
def test_objective_against_a_loop(span):
    """From the RNN's own m_{t-1} `span` updates (Eq. 1); each result shall be the encoder's
    (Eq. 6, the paper with span 1) and its readout predict (Eq. 2): y_t from each, the future from
    the last; the loss is the weighted sum."""
    nets = _, _, rnn = networks()
    x, y = sequences()
    own, labels = (torch.randn(B, T, K, M, generator=gen(s)) for s in (3, 4))
    b, t = torch.tensor([0, 2, 1, 2]), torch.tensor([8, 1, 5, 5])
    got = losses(nets, own, labels, b, t, span=span, first=1.0, lambda_mse=0.7, lambda_dec=1.3)
    square, nats, first, targets = [], 0.0, [], 0
    for i in range(4):
        m, n = own[b[i], t[i] - 1][None], b[i]
        for now in range(int(t[i]), int(t[i]) + span):
            m = rnn.update(m, x[n:n + 1, now], torch.tensor([now]))
            square.append((m[0] - labels[n, now]).square().mean())
            first.append(cross_entropy(rnn.readout(m)[:, 0], y[n:n + 1, now]))
        logits = rnn.readout(m, x[n:n + 1, now + 1:now + 4], torch.tensor([now]))[0]
        future = y[n, now:now + 4]
        nats += F.cross_entropy(logits[:len(future)], future, reduction="sum")
        targets += len(future)
    mse = torch.stack(square).mean() / 0.5
    dec = nats / targets + torch.stack(first).mean()
    assert torch.allclose(got["mse"], mse, atol=1e-5) and torch.allclose(got["dec"], dec, atol=1e-5)
    assert torch.allclose(got["loss"], 0.7 * mse + 1.3 * dec, atol=1e-5)


def test_heads_see_every_memory_of_a_span():
    """They guess from what the RNN made, with the targets of its sequence and time."""
    nets, heads = networks(), tiny.heads()
    x, y = sequences()
    own = nets[2].memories(x).detach()
    b, t = torch.tensor([2, 0]), torch.tensor([4, 7])
    got = losses(nets, own, own, b, t, heads, span=3, futures=0)
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
    nets, heads = networks(), tiny.heads()
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
