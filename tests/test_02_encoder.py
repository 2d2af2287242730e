"""Lesson: the label m_t is a function of x_0 .. x_t, and one causal pass gives the labels of many
times."""
import pytest
import torch
from tiny import B, D, K, T, V, config, networks, sequences

from model import Encoder, norm, rope


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_label_ignores_the_future_and_reads_the_past(kind):
    """Changing x_{t+1} leaves m_t as it was; changing any of x_0 .. x_t changes it."""
    encoder, _, _ = networks(encoder=kind)
    x, _ = sequences()
    t = 5
    before = encoder(x, torch.tensor([t]))
    assert before.shape == (B, 1, K, D)
    for when in range(T):
        other = x.clone()
        other[:, when] = (x[:, when] + 1) % (V + 1)
        change = (encoder(other, torch.tensor([t])) - before).abs().amax()
        assert change == 0 if when > t else change > 1e-4, (kind, when, change)


def test_many_times_in_one_pass_equal_each_time_alone():
    """Register groups do not see one another; more than one chunk of groups, times in any order."""
    torch.manual_seed(0)
    encoder = Encoder(config(T=40, ctx_len=40))
    x = torch.randint(V, (B, 40))
    times = torch.randperm(40)
    together = encoder(x, times)
    alone = torch.cat([encoder(x[:, :t + 1], torch.tensor([t])) for t in times.tolist()], dim=1)
    assert torch.allclose(together, alone, atol=1e-5)


def test_chunks_agree_with_one_dense_mask():
    """Token pass and register pass together are one Transformer over [tokens, groups] with a (T +
    nK)^2 mask."""
    encoder, _, _ = networks()
    x, _ = sequences()
    times = torch.tensor([0, 4, 4, 10])
    n = len(times)
    position = torch.cat([torch.arange(T)] + [t + 1 + torch.arange(K) for t in times])
    mask = torch.zeros(T + n * K, T + n * K, dtype=torch.bool)
    for i in range(T):
        mask[i, :i + 1] = True
    for g, t in enumerate(times.tolist()):
        rows = slice(T + g * K, T + g * K + K)
        mask[rows, :t + 1] = True
        mask[rows, rows] = True
    h = torch.cat([encoder.event(x, torch.arange(T)),
                   encoder.registers.repeat(n, 1).expand(B, -1, -1)], dim=1)
    for block in encoder.blocks:
        h = block.mix(h, *block.qkv(h, rope(position, 4)), mask)
    assert torch.allclose(encoder(x, times), norm(h[:, T:]).view(B, n, K, D), atol=1e-5)


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
    with pytest.raises(AssertionError, match="--ctx_len"):
        encoder(sequences()[0], torch.tensor([6]))


def test_memory_tokens_have_unit_scale():
    """Every memory token has root-mean-square 1, from the encoder and from the updater alike."""
    encoder, _, rnn = networks()
    x, _ = sequences()
    for m in (encoder(x, torch.arange(T)), rnn.memories(x)[:, 1:]):
        assert torch.allclose(m.square().mean(-1).sqrt(), torch.ones(()), atol=1e-3)


def test_attention_follows_positions_only_relatively():
    """RoPE: shifting all positions by one constant changes no attention output."""
    encoder, _, _ = networks()
    h = torch.randn(2, 7, D)
    block = encoder.blocks[0]
    a, b = (block(h, rope(torch.arange(7) + shift, 4), causal=True) for shift in (0, 23))
    c = block(h, rope(torch.arange(7) * 2, 4), causal=True)
    assert torch.allclose(a, b, atol=1e-4) and not torch.allclose(a, c, atol=1e-3)


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_the_teacher_draws_from_what_it_predicts(kind, monkeypatch):
    """Token by token, with keys and values kept, the teacher's logits are those of a fresh pass
    over the whole past."""
    import sample
    encoder, decoder, _ = networks(encoder=kind)
    seen, choose = [], sample.pick
    keep = lambda logits, *a: seen.append(logits) or choose(logits, *a)
    monkeypatch.setattr(sample, "pick", keep)
    out = sample.generate_teacher(encoder, decoder, 4, T, torch.Generator().manual_seed(0))
    x = torch.cat([torch.full((4, 1), encoder.c.vocab - 1), out[:, :-1]], dim=1)
    with torch.no_grad():
        fresh = torch.cat([decoder(encoder(x[:, :t + 1], torch.tensor([t]))[:, 0])
                           for t in range(T)], dim=1)
    assert torch.allclose(torch.stack(seen, 1), fresh, atol=1e-4)
