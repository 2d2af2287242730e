"""Lesson: the decoder sees the past through m_t alone, and the future one token at a time."""
import torch
from tiny import B, K, M, T, V, networks, sequences


def test_causality():
    """Output k does not change when a future input behind it changes, and does when one before it
    changes."""
    _, decoder, _ = networks()
    m, x = torch.randn(B, K, M), torch.randint(V, (B, 6))
    t = torch.tensor([0, 2, 4])
    before = decoder(m, x, t)
    assert before.shape == (B, 7, V)
    for i in range(6):
        other = x.clone()
        other[:, i] = (x[:, i] + 1) % V
        change = (decoder(m, other, t) - before).abs().amax((0, 2))
        assert (change[:i + 1] == 0).all() and (change[i + 1:] > 1e-5).all()


def test_every_output_reads_the_memory():
    """Changing one memory token changes the first and the last prediction."""
    _, decoder, _ = networks()
    m, x = torch.randn(B, K, M), torch.randint(V, (B, 4))
    other = m.clone()
    other[:, 0] += 1
    t = torch.zeros(B, dtype=torch.int64)
    change = (decoder(other, x, t) - decoder(m, x, t)).abs()
    assert (change.amax((0, 2)) > 1e-5).all()


def test_without_memory_it_is_a_language_model():
    """K = 0: logits for every token, from it and those before it."""
    _, decoder, _ = networks()
    x, _ = sequences()
    before = decoder(torch.empty(B, 0, M), x, torch.full((B,), -1))
    assert before.shape == (B, T, V)
    other = x.clone()
    other[:, 5] = (x[:, 5] + 1) % V
    after = decoder(torch.empty(B, 0, M), other, torch.full((B,), -1))
    change = (after - before).abs().amax((0, 2))
    assert (change[:5] == 0).all() and (change[5:] > 1e-5).all()


def test_timestamps_are_those_of_the_tokens():
    """The same future at another time gives other predictions, if everybody is told the time."""
    for who in ("all", "encoder", "none"):
        _, decoder, _ = networks(timestamps=who)
        m, x = torch.randn(1, K, M), torch.tensor([[1, 2]])
        a, b = (decoder(m, x, torch.tensor([t])) for t in (0, 3))
        assert torch.equal(a, b) == (who != "all")
