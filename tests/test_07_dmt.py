"""Lesson: the RNN's own memories, at most `horizon` steps from an encoder's, two ways."""
import math

import pytest
import torch
from tiny import B, T, networks, recipe, sequences

import dmt
from model import futures


def setting():
    encoder, _, rnn = networks()
    x, _ = sequences()
    with torch.no_grad():
        labels = encoder(x, torch.arange(T))
        rnn.m0.copy_(encoder(torch.full((1, 1), 5), torch.tensor([0]))[0, 0])
    return rnn, labels, x


@pytest.mark.parametrize("horizon, offset", [(2, 0), (2, 1), (3, 2), (5, 4), (T - 1, 3)])
def test_sequential_pieces(horizon, offset):
    """m_t is the encoder's at t = offset (mod horizon) and at t = 0, and one update of m_{t-1}
    elsewhere."""
    rnn, labels, x = setting()
    own = dmt.own_memories(rnn, labels, x, horizon, offset, "sequential", math.inf)
    for t in range(T):
        if t == 0 or (t - offset) % horizon == 0:
            assert torch.equal(own[:, t], labels[:, t])
        else:
            expected = rnn.update(own[:, t - 1], x[:, t], torch.full((B,), t))
            assert torch.allclose(own[:, t], expected, atol=1e-5)
            assert not torch.allclose(own[:, t], labels[:, t], atol=1e-2)


def test_horizon_one_is_behaviour_cloning():
    """With horizon 1 every memory is the encoder's: SMT's pairs."""
    rnn, labels, x = setting()
    assert torch.equal(dmt.own_memories(rnn, labels, x, 1, 0, "sequential", math.inf), labels)


def test_whole_horizon_is_the_rollout():
    """With horizon T the pieces are one rollout from m_0, and so are T - 1 parallel sweeps, and no
    fewer."""
    rnn, labels, x = setting()
    exact = rnn.memories(x)
    assert torch.allclose(dmt.own_memories(rnn, labels, x, T, 0, "sequential", math.inf), exact,
                          atol=1e-5)
    assert torch.allclose(dmt.own_memories(rnn, labels, x, T - 1, 0, "parallel", math.inf), exact,
                          atol=1e-5)
    assert not torch.allclose(dmt.own_memories(rnn, labels, x, T - 2, 0, "parallel", math.inf),
                              exact, atol=1e-3)


def test_parallel_sweeps_age_by_one():
    """After j sweeps m_t is a j-step rollout from the encoder's m_{t-j}."""
    rnn, labels, x = setting()
    own, t, j = dmt.own_memories(rnn, labels, x, 3, 0, "parallel", math.inf), 7, 3
    expected = rnn.rollout(labels[:, t - j], x[:, t - j + 1:t + 1], t - j + 1)[:, -1]
    assert torch.allclose(own[:, t], expected, atol=1e-5)


def test_curriculum_grows_to_the_whole():
    """The horizon never shrinks, starts short, and has reached the whole sequence at 60 % of the
    run."""
    h = [dmt.horizon_at(p / 100, 196) for p in range(101)]
    assert h[0] == 16 and h == sorted(h) and h[60] == h[100] == 196
    # no longer than the sequence
    assert [dmt.horizon_at(p, 5) for p in (0.0, 0.3, 1.0)] == [5, 5, 5]


def test_perfect_memory_has_no_loss():
    """Where the update gives exactly the encoder's memory, MSE and KL are 0; elsewhere both are
    positive."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    own = rnn.memories(x).detach()
    t, b = torch.tensor([3, 5, 8]), torch.arange(B)
    args = (x[:, 4:7], y[:, 3:7], torch.ones(()), recipe(dmt, lambda_kl=1.0))
    right = dmt.objective(decoder, rnn, own[b, t - 1], x[b, t], t, own[b, t], *args)
    wrong = dmt.objective(decoder, rnn, own[b, t - 1], x[b, t], t, own[b, t - 1], *args)
    assert right["mse"] < 1e-8 and right["kl"].abs() < 1e-6
    assert wrong["mse"] > 1e-3 and wrong["kl"] > 1e-4


def test_objective_against_its_parts():
    """The loss is the weighted sum of MSE over variance, the future's cross-entropy from the RNN's
    memory, and the KL."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    labels = encoder(x, torch.arange(T)).detach()
    t, b = torch.tensor([3, 5, 8]), torch.arange(B)
    x_fut, y_fut = (v[b, t] for v in futures(x, y, torch.arange(T), 4))
    cfg = recipe(dmt, lambda_mse=0.7, lambda_dec=1.3, lambda_kl=0.4)
    got = dmt.objective(decoder, rnn, labels[b, t - 1], x[b, t], t, labels[b, t], x_fut, y_fut,
                        torch.tensor(0.5), cfg)
    m = rnn.update(labels[b, t - 1], x[b, t], t)
    mse = (m - labels[b, t]).square().mean() / 0.5
    p, q = decoder(labels[b, t], x_fut, t).softmax(-1), decoder(m, x_fut, t).softmax(-1)
    valid = y_fut >= 0
    kl = (p * (p / q).log()).sum(-1)[valid].mean()
    logp = rnn.readout(m, x_fut, t).log_softmax(-1)
    dec = -logp.gather(-1, y_fut.clamp(min=0)[..., None])[..., 0][valid].mean()
    assert valid.sum() < valid.numel()  # the last future reaches past the end
    assert torch.allclose(got["loss"], 0.7 * mse + 1.3 * dec + 0.4 * kl, atol=1e-5)


def test_masked_targets_are_finite():
    """No valid target among the pairs: what the futures say is 0, and the gradient is finite."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    labels = encoder(x, torch.arange(T)).detach()
    got = dmt.objective(decoder, rnn, labels[:1, 2], x[:1, 3], torch.tensor([3]), labels[:1, 3],
                        x[:1, 4:7],
                        torch.full((1, 4), -1), torch.ones(()), recipe(dmt, lambda_kl=1.0))
    got["loss"].backward()
    assert got["kl"] == 0 and got["dec"] == 0 and torch.isfinite(got["loss"])
    assert all(torch.isfinite(p.grad).all() for p in rnn.parameters() if p.grad is not None)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_tube_puts_lost_memories_back(mode):
    """No memory is further from its label than the tube is wide, and those inside the tube are the
    RNN's own."""
    rnn, labels, x = setting()
    free = dmt.own_memories(rnn, labels, x, T, 0, mode, math.inf)
    error = (free - labels).square().mean((2, 3))
    # at t = 1 some sequences are inside and some are not
    width = float(error[:, 1].sort().values[1])
    own = dmt.own_memories(rnn, labels, x, T, 0, mode, width)
    assert (own - labels).square().mean((2, 3)).max() <= width + 1e-6
    back = (own == labels).all(3).all(2)
    assert back[:, 1].tolist() == (error[:, 1] > width).tolist()
    assert not back[:, 1].all() and back[:, 1].any()
