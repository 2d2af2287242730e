"""
Lesson: what the synthetic tasks ask, told a second time in plain Python, and that their Bayes optimum is exact: among
all sequences that begin alike, y_t comes up as often as the posterior says.
"""
from collections import Counter, defaultdict

import pytest
import torch

import data
from data import DataError

SMALL = {  # every synthetic task, small enough to see every sequence many times
    "retrieval": dict(length=4, symbols=2, noise=0.5),
    "copy": dict(length=5, symbols=2, noise=0.3),
    "stack": dict(length=5, symbols=2, depth=2),
    "recall": dict(keys=2, symbols=2, key_len=1),
    "modular": dict(examples=3, modulus=2),
    "parity": dict(length=5),
    "permutation": dict(length=4, items=3),
}
USUAL = {name: {} for name in SMALL} | {"copy": dict(noise=0.2), "retrieval": dict(noise=0.3)}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SMALL)
def test_the_posterior_is_the_frequency_of_the_target_among_equal_pasts(name):
    """P(y_t | x_0 .. x_t), counted over many sequences, is the posterior within five standard errors."""
    d = data.load(name, **SMALL[name])
    h = d.held_out("test", 20_000)
    assert torch.allclose(h["posterior"].sum(-1), (h["y"] >= 0).float())
    for t in range(d.T):
        seen, claimed = defaultdict(Counter), {}
        for past, y, p in zip(h["x"][:, :t + 1].tolist(), h["y"][:, t].tolist(), h["posterior"][:, t].tolist()):
            seen[tuple(past)][y] += 1
            assert claimed.setdefault(tuple(past), p) == p  # a function of the past and of nothing else
        for past, counts in seen.items():
            n = counts.total() if hasattr(counts, "total") else sum(counts.values())
            assert (set(counts) == {-1}) == (sum(claimed[past]) == 0)
            for symbol, p in enumerate(claimed[past]):
                assert abs(counts[symbol] / n - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1e-6


def stack_by_hand(ops, S, depth):
    """What lies on top after each operation: a Python list does what the tensors claim to do."""
    pile = []
    for op in ops:
        if op == S:
            assert pile, "popped an empty stack"
            pile.pop()
        else:
            pile.append(op)
        assert len(pile) <= depth
        yield pile[-1] if pile else S


def clean_by_hand(name, d, x):
    """The targets of one sequence without noise, as a list; x is a list of input ids."""
    S, T = d.n_out, len(x)
    if name == "retrieval":
        return [-1] * (T - 1) + [next(i for i in x if S <= i < 2 * S) - S]
    if name == "copy":
        string = x[1:T // 2 + 1]
        return [-1] * (T // 2 + 1) + string[::-1]
    if name == "stack":
        return [-1, *stack_by_hand(x[1:], S - 1, 5)]
    if name == "recall":
        told, out = {}, [-1] * T
        ask = x.index(2 * S)
        for i in range(1, ask, 3):
            told[tuple(x[i:i + 2])] = x[i + 2] - S
        assert len(told) == 8, "the keys differ"
        for i in range(ask + 1, T, 2):
            out[i + 1] = told.pop(tuple(x[i:i + 2]))
        assert not told, "every key is asked for once"
        return out
    if name == "modular":
        fits = [(a, b) for a in range(7) for b in range(7)
                if all((a * x[i] + b) % 7 == x[i + 1] - 7 for i in range(1, T - 1, 2))]
        assert fits
        return [-1 if t % 2 == 0 else x[t + 1] - 7 if t + 1 < T else {(a * x[t] + b) % 7 for a, b in fits} for t in range(T)]
    if name == "parity":
        return [-1] + [sum(x[1:t + 1]) % 2 for t in range(1, T)]
    things, out = [0, 1, 2, 3, 4], [-1]
    for op in x[1:]:
        things = things[1:] + things[:1] if op else [things[1], things[0], *things[2:]]
        out.append(sum(sum(other < one for other in things[i + 1:]) * [24, 6, 2, 1, 1][i] for i, one in enumerate(things)))
    return out  # the rank of an order among all orders is its Lehmer code


@pytest.mark.parametrize("name", SMALL)
def test_targets_told_in_plain_python(name):
    """Every clean target follows from the inputs by the rule of its task, told without tensors."""
    d = data.load(name, **USUAL[name])
    h = d.held_out("val", 50)
    for x, clean in zip(h["x"].tolist(), h["clean"].tolist()):
        for want, got in zip(clean_by_hand(name, d, x), clean, strict=True):
            assert got in want if isinstance(want, set) else got == want


@pytest.mark.parametrize("name", SMALL)
def test_noise_redraws_a_share_of_the_targets_and_no_others(name):
    """y differs from the clean target in noise * (1 - 1 / n_out) of the valid places, and never elsewhere."""
    d = data.load(name, **USUAL[name])
    h = d.held_out("test", 1_000)
    valid = h["clean"] >= 0
    assert torch.equal(valid, h["y"] >= 0)
    noise = USUAL[name].get("noise", 0)
    share = (h["y"] != h["clean"])[valid].float().mean().item()
    expected = noise * (1 - 1 / d.n_out)
    assert abs(share - expected) <= 5 * (expected * (1 - expected) / valid.sum().item()) ** 0.5


@pytest.mark.parametrize("name", SMALL)
def test_batches_follow_their_generator_and_differ_from_what_is_held_out(name):
    """The same generator gives the same batch, another one another; ids are in range, BOS comes first and only there."""
    d = data.load(name)
    x, y = d.batch(30, rng(1))
    again, other = d.batch(30, rng(1)), d.batch(30, rng(2))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])
    assert x.shape == y.shape == (30, d.T) and x.dtype == y.dtype == torch.int64
    assert (x[:, 0] == d.bos).all() and (x[:, 1:] < d.bos).all() and x.min() >= 0
    assert y.min() == -1 and y.max() < d.n_out
    assert not torch.equal(d.held_out("val", 30)["x"], d.held_out("test", 30)["x"])
    assert torch.equal(d.held_out("test", 1200)["x"][:30], d.held_out("test", 30)["x"])


OTHER = dict(length=9, symbols=5, noise=0.9, needle_range=3, reverse=False, depth=1, keys=3, key_len=3, examples=4,
             modulus=5, items=4)


@pytest.mark.parametrize("name, option", [(name, option) for name in SMALL for option in data.OPTIONS[name]])
def test_every_option_changes_the_task(name, option):
    """None is accepted and then forgotten."""
    def drawn(**options):
        x, y = data.load(name, **options).batch(50, rng())
        return x.tolist(), y.tolist()
    assert drawn() != drawn(**{option: OTHER[option]})


def test_a_larger_stack_and_longer_keys():
    """Depth and key length are what they say: a stack of one forgets nothing it could tell, keys of three differ."""
    d = data.load("stack", length=40, symbols=3, depth=1)
    x, y = d.batch(20, rng())
    assert (y[:, 1::2] < 3).all() and (y[:, 2::2] == 3).all()  # push, pop, push, pop
    d = data.load("recall", keys=5, symbols=2, key_len=3)
    x, _ = d.batch(200, rng())
    keys = x[:, 1:21].view(200, 5, 4)[:, :, :3] @ torch.tensor([4, 2, 1])
    assert all(len(set(row)) == 5 for row in keys.tolist())
    assert set(keys.flatten().tolist()) == set(range(8))


@pytest.mark.parametrize("name", SMALL)
def test_every_task_can_be_read_aloud(name):
    """show() gives one line, and it ends with what is asked for."""
    d = data.load(name, **SMALL[name])
    x, y = d.batch(1, rng())
    line = d.show(x[0], y[0])
    assert line.startswith("^") and "\n" not in line and "->" in line
    assert d.about and "\n" not in d.about


def test_two_lines_read_aloud():
    """Worked examples: what a reader sees."""
    d = data.load("retrieval", length=6, symbols=3)
    assert d.show(torch.tensor([7, 0, 5, 1, 0, 6]), torch.tensor([-1, -1, -1, -1, -1, 1])) == "^a[c]ba? -> b"
    d = data.load("stack", length=5, symbols=3)
    assert d.show(torch.tensor([4, 0, 2, 3, 3]), torch.tensor([-1, 0, 2, 0, 3])) == "^ac-- -> aca."


@pytest.mark.parametrize("name, options, flag", [
    ("copy", dict(length=8), "--length"), ("copy", dict(length=1), "--length"), ("copy", dict(symbols=1), "--symbols"),
    ("copy", dict(noise=1.5), "--noise"), ("stack", dict(depth=0), "--depth"), ("stack", dict(length=1), "--length"),
    ("recall", dict(keys=65), "--keys"), ("recall", dict(keys=0), "--keys"), ("recall", dict(key_len=6), "--key_len"),
    ("modular", dict(modulus=1), "--modulus"), ("modular", dict(examples=0), "--examples"), ("parity", dict(length=1), "--length"),
    ("permutation", dict(items=7), "--items"), ("permutation", dict(noise=0.1), "--noise")])
def test_impossible_tasks_are_refused(name, options, flag):
    """One line that begins with the flag."""
    with pytest.raises(DataError, match=flag) as e:
        data.load(name, **options)
    assert "\n" not in str(e.value)
