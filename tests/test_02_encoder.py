"""Lesson: the label m_t is a function of x_0 .. x_t, and one causal pass gives the labels of all
times."""
import pytest
import torch
from tiny import B, D, K, M, T, V, networks, sequences

from model import norm, rope

BOTH = pytest.mark.parametrize("kind", ["bidirectional", "causal"])


@BOTH
def test_label_ignores_the_future_and_reads_the_past(kind):
    """Changing x_{t+1} leaves m_t as it was; changing any of x_0 .. x_t changes it."""
    encoder, _, _ = networks(encoder=kind)
    x, _ = sequences()
    t = 5
    before = encoder(x)[:, t]
    assert before.shape == (B, K, M)
    for when in range(T):
        other = x.clone()
        other[:, when] = (x[:, when] + 1) % (V + 1)
        change = (encoder(other)[:, t] - before).abs().amax()
        assert change == 0 if when > t else change > 1e-4, (kind, when, change)


@BOTH
def test_all_times_at_once_equal_each_prefix_alone(kind):
    """One call for all times, one for some in any order, and one for every prefix by itself give
    the same memories."""
    encoder, _, _ = networks(encoder=kind)
    x, _ = sequences()
    every = encoder(x)
    assert every.shape == (B, T, K, M)
    times = torch.tensor([9, 0, 4, 4, 10])
    assert torch.allclose(encoder(x, times), every[:, times], atol=1e-5)
    for t in range(T):
        alone = encoder(x[:, :t + 1], torch.tensor([t]))[:, 0]
        assert torch.allclose(alone, every[:, t], atol=1e-5)


def test_causal_memory_is_a_linear_reading_of_the_token():
    """A Transformer with a triangular mask, whose tokens are told the one before, and of the state
    of token t K linear maps, each normalised."""
    encoder, _, _ = networks()
    x, _ = sequences()
    events = encoder.event(x, torch.arange(T))
    h = events.clone()
    for t in range(T):
        h[:, t] += events[:, max(t - 1, 0)] @ encoder.w_before.weight.T
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    for block in encoder.blocks:
        h = block.mix(h, *block.qkv(h, rope(torch.arange(T), 4)), mask)
    rows = encoder.w_memory.weight.view(K, M, D)
    expected = torch.stack([norm(norm(h) @ rows[k].T) for k in range(K)], dim=2)
    assert torch.allclose(encoder(x), expected, atol=1e-5)


def test_bidirectional_memory_is_what_registers_have_read():
    """The paper's: tokens, then K learned registers, all look at all; a pass for each time."""
    encoder, _, _ = networks(encoder="bidirectional")
    x, _ = sequences()
    for t in (0, 6):
        h = torch.cat([encoder.event(x[:, :t + 1], torch.arange(t + 1)),
                       torch.stack([encoder.registers] * B)], dim=1)
        for block in encoder.blocks:
            h = block(h, rope(torch.arange(t + 1 + K), 4))
        expected = norm(encoder.w_memory(h[:, -K:]))
        assert torch.allclose(encoder(x, torch.tensor([t]))[:, 0], expected, atol=1e-5)


def test_window_slides():
    """Bidirectional with Tc = 4: m_t depends on x_{t-3} .. x_t alone."""
    encoder, _, _ = networks(encoder="bidirectional", ctx_len=4)
    x, _ = sequences()
    t, before = 8, encoder(x, torch.tensor([8]))
    for when in range(T):
        other = x.clone()
        other[:, when] = (x[:, when] + 1) % (V + 1)
        changed = not torch.equal(encoder(other, torch.tensor([t])), before)
        assert changed == (t - 4 < when <= t)


def test_causal_labels_end_at_the_context():
    """Asking the causal encoder for a time beyond Tc is an error that says what to do."""
    encoder, _, _ = networks(ctx_len=6)
    x, _ = sequences()
    for times in (torch.tensor([6]), None):
        with pytest.raises(AssertionError, match="--ctx_len"):
            encoder(x, times)
    assert encoder(x, torch.tensor([5])).shape == (B, 1, K, M)


def test_memory_tokens_have_unit_scale():
    """Every memory token has root-mean-square 1, from either encoder and from the updater alike."""
    x, _ = sequences()
    for m in (networks()[0](x), networks(encoder="bidirectional")[0](x),
              networks()[2].memories(x)[:, 1:]):
        assert torch.allclose(m.square().mean(-1).sqrt(), torch.ones(()), atol=1e-3)


@pytest.mark.parametrize("who", ["all", "encoder", "none"])
def test_who_is_told_the_time(who):
    """The same symbol again and again: an encoder that is told the time makes other memories of
    it, one that is not cannot tell the times apart; decoder and updater have a say of their own."""
    encoder, decoder, rnn = networks(timestamps=who)
    m = encoder(torch.full((1, T), 2))
    told = not torch.allclose(m, m[:, :1].expand_as(m), atol=1e-4)
    assert told == (who != "none")
    assert [net.event.time is not None for net in (decoder, rnn.updater)] == [who == "all"] * 2


def test_attention_follows_positions_only_relatively():
    """RoPE: shifting all positions by one constant changes no attention output."""
    encoder, _, _ = networks()
    h = torch.randn(2, 7, D)
    block = encoder.blocks[0]
    a, b = (block(h, rope(torch.arange(7) + shift, 4), causal=True) for shift in (0, 23))
    c = block(h, rope(torch.arange(7) * 2, 4), causal=True)
    assert torch.allclose(a, b, atol=1e-4) and not torch.allclose(a, c, atol=1e-3)
