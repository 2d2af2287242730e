"""Lesson: which input, which memory, which target. The six-token example of model.py, executed."""
import torch
from tiny import K, networks

from model import futures

S = torch.tensor([[10, 11, 12, 13, 14, 15]])     # s_0 .. s_5, as names
BOS = 99
X = torch.tensor([[BOS, 10, 11, 12, 13, 14]])


def test_six_tokens():
    """m_2 is asked for y_2 y_3 y_4 and is given x_3 x_4; past the end there is no target."""
    x_fut, y_fut = futures(X, S, torch.tensor([2, 5]), Tf=3)
    assert x_fut[0, 0].tolist() == [12, 13]
    assert y_fut[0, 0].tolist() == [12, 13, 14]
    assert y_fut[0, 1].tolist() == [15, -1, -1]
    assert 15 not in X  # the last symbol is never an input


def test_futures_with_many_sequences():
    """futures agrees with a loop over sequences, times and offsets."""
    x = torch.arange(21).view(3, 7)
    y = x + 100
    times = torch.tensor([0, 3, 4, 6])
    x_fut, y_fut = futures(x, y, times, Tf=4)
    for b in range(3):
        for i, t in enumerate(times.tolist()):
            for k in range(4):
                assert y_fut[b, i, k] == (y[b, t + k] if t + k < 7 else -1)
                if k and t + k < 7:
                    assert x_fut[b, i, k - 1] == x[b, t + k]


def test_output_sits_on_the_token_that_arrived_last():
    """decode(m_2, [x_3, x_4]) gives y_2 from the memory alone, y_3 when x_3 is there, y_4 when x_4
    is there."""
    encoder, decoder, _ = networks()
    x = torch.tensor([[5, 0, 1, 2, 3, 4]])
    m = encoder(x, torch.tensor([2]))[:, 0]
    t = torch.tensor([2])
    full = decoder(m, x[:, 3:5], t)
    assert full.shape == (1, 3, 5)
    assert torch.allclose(full[:, :1], decoder(m), atol=1e-5)
    assert torch.allclose(full[:, :2], decoder(m, x[:, 3:4], t), atol=1e-5)
    assert m.shape == (1, K, 12)
