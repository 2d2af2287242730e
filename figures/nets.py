"""Trained networks and their data, for figures that look inside; and maps to two or three numbers
that can be drawn."""
import torch
from torch import Tensor

import flags
from checkpoints import build
from figures.runs import Lab


def opened(lab: Lab, name: str, *networks: str) -> tuple:
    """(task, network, ..) of a run's checkpoint; networks are "encoder", "decoder", "rnn"."""
    ckpt = flags.open_checkpoint(lab.ckpt(name))
    config = ckpt["config"] | flags.data_places(dict(data_dir=lab.data_dir), ckpt["config"])
    return flags.load_data(config, "cpu", ckpt), *build(ckpt, *networks)


def pca(v: Tensor, n: int) -> tuple[Tensor, list[float]]:
    """v (N, D) -> its n principal components (N, n), each of variance 1, and the shares of the
    variance that they hold."""
    v = v.double() - v.double().mean(0)
    _, s, directions = torch.linalg.svd(v, full_matrices=False)
    # the sign of a direction is arbitrary: make its largest entry positive, on every machine
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    parts = (v @ (directions * largest.sign())[:n].T)
    shares = (s.square() / s.square().sum().clamp(min=1e-30))[:n].tolist()
    return parts / parts.std(0).clamp(min=1e-12), shares


def tsne(v: Tensor, perplexity: float = 30.0, steps: int = 500) -> Tensor:
    """t-SNE (van der Maaten and Hinton, 2008) of v (N, D) in two dimensions, (N, 2) float64.

    All N^2 pairs, so N is a few thousand at most. Starts from the two principal components: no
    random numbers.
    """
    v, N = v.double(), len(v)
    perplexity = min(perplexity, max(1.0, (N - 1) / 3))
    apart = torch.cdist(v, v).square()
    p = neighbours(apart, perplexity)
    p = (p + p.T) / (2 * N)
    at = pca(v, 2)[0] * 1e-2
    speed, gain = torch.zeros_like(at), torch.ones_like(at)
    for step in range(steps):
        close = 1 / (1 + torch.cdist(at, at).square())
        close.fill_diagonal_(0)
        q = close / close.sum()
        early = step < steps // 4   # exaggerated at first: clusters form before they spread
        pull = ((12 if early else 1) * p - q) * close
        slope = 4 * (pull.sum(1, keepdim=True) * at - pull @ at)
        same = slope.sign() == speed.sign()
        gain = torch.where(same, gain * 0.8, gain + 0.2).clamp(min=0.01)
        speed = (0.5 if early else 0.8) * speed - max(N / 48, 10.0) * gain * slope
        at = at + speed
        at = at - at.mean(0)
    return at


def neighbours(apart: Tensor, perplexity: float) -> Tensor:
    """Squared distances (N, N) -> rows of probabilities (N, N), each a Gaussian whose width is
    searched by bisection until the row's perplexity is the one asked for."""
    N = len(apart)
    own = torch.eye(N, dtype=torch.bool)
    low, high = torch.full((N, 1), -30.0).double(), torch.full((N, 1), 30.0).double()  # log widths
    near = apart.masked_fill(own, torch.inf).min(1, keepdim=True).values
    for _ in range(60):
        width = ((low + high) / 2).exp()
        p = (-(apart - near) * width).masked_fill(own, -torch.inf).softmax(1)
        entropy = -torch.xlogy(p, p).sum(1, keepdim=True)
        wide = entropy > torch.tensor(perplexity).log()   # too many neighbours: narrow it
        low, high = torch.where(wide, (low + high) / 2, low), torch.where(wide, high,
                                                                        (low + high) / 2)
    return p
