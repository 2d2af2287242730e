"""Lesson: which input, which memory, which target. The six-token example of model.py, executed."""
import torch
from tiny import K, M, V, networks

from losses import futures, next_targets

S = torch.tensor([[10, 11, 12, 13, 14, 15]])     # s_0 .. s_5, as names
BOS = 99
X = torch.tensor([[BOS, 10, 11, 12, 13, 14]])


def test_six_tokens():
    """m_2 is asked for y_2 y_3 y_4 and is given x_3 x_4; past the end there is no target."""
    x_fut, y_fut = futures(X, S, torch.tensor([0, 0]), torch.tensor([2, 5]), Tf=3)
    assert x_fut[0].tolist() == [12, 13]
    assert y_fut[0].tolist() == [12, 13, 14]
    assert y_fut[1].tolist() == [15, -1, -1]
    assert 15 not in X  # the last symbol is never an input


def test_futures_with_many_sequences():
    """futures agrees with a loop over rows of any sequence and time, and offsets."""
    x = torch.arange(21).view(3, 7)
    y = x + 100
    b, t = torch.tensor([2, 0, 1, 2, 0]), torch.tensor([0, 3, 4, 6, 6])
    x_fut, y_fut = futures(x, y, b, t, Tf=4)
    assert x_fut.shape == (5, 3) and y_fut.shape == (5, 4)
    for i in range(5):
        for k in range(4):
            inside = t[i] + k < 7
            assert y_fut[i, k] == (y[b[i], t[i] + k] if inside else -1)
            if k and inside:
                assert x_fut[i, k - 1] == x[b[i], t[i] + k]


def test_next_targets_skip_what_is_not_asked():
    """They agree with a plain loop: the next n valid targets at or after t, -1 where none is
    left."""
    gen = torch.Generator().manual_seed(0)
    for share in (0.0, 0.3, 0.8, 1.0):
        y = torch.randint(5, (4, 9), generator=gen)
        y[torch.rand(4, 9, generator=gen) < share] = -1
        t = torch.randint(9, (4, 6), generator=gen)
        got = next_targets(y, t, 3)
        for b in range(4):
            for i in range(6):
                left = [v for v in y[b, t[b, i]:].tolist() if v >= 0]
                assert got[b, i].tolist() == (left + [-1] * 3)[:3]


def test_output_sits_on_the_token_that_arrived_last():
    """decode(m_2, [x_3, x_4]) gives y_2 from the memory alone, y_3 when x_3 is there, y_4 when x_4
    is there."""
    encoder, decoder, _ = networks()
    x = torch.tensor([[5, 0, 1, 2, 3, 4]])
    m = encoder(x, torch.tensor([2]))[:, 0]
    t = torch.tensor([2])
    full = decoder(m, x[:, 3:5], t)
    assert full.shape == (1, 3, V)
    assert torch.allclose(full[:, :1], decoder(m), atol=1e-5)
    assert torch.allclose(full[:, :2], decoder(m, x[:, 3:4], t), atol=1e-5)
    assert m.shape == (1, K, M)
