"""
Lesson: what the synthetic tasks ask, told a second time in plain Python, and that their Bayes
optimum is exact: among all sequences that begin alike, y_t comes up as often as the posterior says.
"""
from collections import Counter, defaultdict

import pytest
import torch

import data
from data import DataError

SMALL = {  # every synthetic task in all its variants, small enough to see every sequence many times
    "retrieval": dict(length=5, symbols=2, needle_range=3, noise=0.5),
    "retrieval, ours": dict(length=4, symbols=2, noise=0.5),
    "copy": dict(length=5, symbols=2, noise=0.3),
    "copy, ours": dict(length=5, symbols=2, noise=0.3),
    "stack": dict(length=6, symbols=2, depth=2),
    "stack, ours": dict(length=5, symbols=2, depth=2),
    "recall": dict(keys=2, symbols=2, key_len=2),
    "recall, ours": dict(keys=2, symbols=2, key_len=1),
    "modular": dict(examples=3, modulus=6),
    "modular, ours": dict(examples=3, modulus=2),
    "parity": dict(length=5),
    "permutation": dict(length=4, items=3),
    "recency": dict(length=5, symbols=2),
    "primacy": dict(length=5, symbols=2),
}
NOISY = {"copy": dict(noise=0.2), "retrieval": dict(noise=0.3)}


def load(case, **options):
    """The task that a key of SMALL names."""
    name, _, variant = case.partition(", ")
    return data.load(name, variant=variant or None, **options)


def usual(case):
    """It at its usual size, with noise where it has any."""
    return load(case, **NOISY.get(case.partition(",")[0], {}))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SMALL)
def test_the_posterior_is_the_frequency_of_the_target_among_equal_pasts(name):
    """P(y_t | x_0 .. x_t), counted over many sequences, is it within five standard errors."""
    d = load(name, **SMALL[name])
    h = d.held_out("test", 20_000)
    assert torch.allclose(h["posterior"].sum(-1), (h["y"] >= 0).float())
    for t in range(d.T):
        seen, claimed = defaultdict(Counter), {}
        rows = h["x"][:, :t + 1], h["y"][:, t], h["posterior"][:, t]
        for past, y, p in zip(*(v.tolist() for v in rows)):
            seen[tuple(past)][y] += 1
            assert claimed.setdefault(tuple(past), p) == p  # a function of the past alone
        for past, counts in seen.items():
            n = counts.total() if hasattr(counts, "total") else sum(counts.values())
            assert (set(counts) == {-1}) == (sum(claimed[past]) == 0)
            for symbol, p in enumerate(claimed[past]):
                assert abs(counts[symbol] / n - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1e-6


def stack_by_hand(ops, S, depth, ours):
    """The targets of push and pop: a Python list does what the tensors claim to do."""
    pile = []
    for op in ops:
        popped = -1
        if op == S:
            assert pile, "popped an empty stack"
            popped = pile.pop()
        else:
            pile.append(op)
        assert len(pile) <= depth
        yield (pile[-1] if pile else S) if ours else popped


def recall_by_hand(x, d, T):
    """The paper's variant: eight pairs of two symbols each, one question, its answer fed back."""
    S, told = d.n_out, {}
    for i in range(1, 33, 4):
        assert all(s < S for s in x[i:i + 2]) and all(S <= s < 2 * S for s in x[i + 2:i + 4])
        told[tuple(x[i:i + 2])] = [s - S for s in x[i + 2:i + 4]]
    assert len(told) == 8, "the keys differ"
    answer = told[tuple(x[33:35])]
    assert T == 36 and x[35] == S + answer[0], "the value is fed back"
    return [-1] * 34 + answer


def modular_by_hand(x, T, p, values, shift):
    """A target at every x_i: where the next input does not tell it, any that fits all examples."""
    told = [(x[i], x[i + 1] - shift) for i in range(1, T - 1, 2)]
    fits = [(w, b) for w in values for b in values if all((w * u + b) % p == v for u, v in told)]
    assert fits
    last = {(w * x[T - 1] + b) % p for w, b in fits}
    return [-1 if t % 2 == 0 else told[t // 2][1] if t + 1 < T else last for t in range(T)]


def clean_by_hand(case, d, x):
    """The targets of one sequence without noise, as a list; x is a list of input ids. A set stands
    for "one of these"."""
    S, T = d.n_out, len(x)
    if case == "retrieval":
        assert x.count(S) == 2 and x[-1] == S, "the marker twice, once at the end"
        assert 2 <= x.index(S) + 1 <= T // 2, "the needle lies in the first half"
        return [-1] * (T - 1) + [x[x.index(S) + 1]]
    if case == "retrieval, ours":
        return [-1] * (T - 1) + [next(i for i in x if S <= i < 2 * S) - S]
    if case.startswith("copy"):
        string = x[1:T // 2 + 1]
        asks = [S] * (T // 2) if case == "copy, ours" else [S, *string[:0:-1]]
        assert x[T // 2 + 1:] == asks and all(i < S for i in string)
        return [-1] * (T // 2 + 1) + string[::-1]
    if case.startswith("stack"):
        ours = case == "stack, ours"
        return [-1, *stack_by_hand(x[1:], S - 1 if ours else S, 5, ours)]
    if case == "recall":
        return recall_by_hand(x, d, T)
    if case == "recall, ours":
        told, out = {}, [-1] * T
        ask = x.index(2 * S)
        for i in range(1, ask, 3):
            told[tuple(x[i:i + 2])] = x[i + 2] - S
        assert len(told) == 8, "the keys differ"
        for i in range(ask + 1, T, 2):
            out[i + 1] = told.pop(tuple(x[i:i + 2]))
        assert not told, "every key is asked for once"
        return out
    if case == "modular":
        return modular_by_hand(x, T, 32, [w for w in range(32) if w < 0.2 * 32], 0)
    if case == "modular, ours":
        return modular_by_hand(x, T, 7, range(7), 7)
    if case == "parity":
        return [-1] + [sum(x[1:t + 1]) % 2 for t in range(1, T)]
    if case in ("recency", "primacy"):
        return [-1] + [set(x[1:t + 1]) for t in range(1, T)]
    things, out = [0, 1, 2, 3, 4], [-1]
    for op in x[1:]:
        things = things[1:] + things[:1] if op else [things[1], things[0], *things[2:]]
        rank = [sum(other < one for other in things[i + 1:]) for i, one in enumerate(things)]
        out.append(sum(r * w for r, w in zip(rank, [24, 6, 2, 1, 1])))
    return out  # the rank of an order among all orders is its Lehmer code


@pytest.mark.parametrize("name", SMALL)
def test_targets_told_in_plain_python(name):
    """Every clean target follows from the inputs by the rule of its task, told without tensors."""
    d = usual(name)
    h = d.held_out("val", 50)
    targets = h["y"] if h["clean"] is None else h["clean"]
    for x, clean in zip(h["x"].tolist(), targets.tolist()):
        for want, got in zip(clean_by_hand(name, d, x), clean, strict=True):
            assert got in want if isinstance(want, set) else got == want


@pytest.mark.parametrize("name", [n for n in SMALL if n not in ("recency", "primacy")])
def test_noise_redraws_a_share_of_the_targets_and_no_others(name):
    """y differs from the clean target in noise * (1 - 1 / n_out) of the valid places, and nowhere
    else."""
    d = usual(name)
    h = d.held_out("test", 1_000)
    valid = h["clean"] >= 0
    assert torch.equal(valid, h["y"] >= 0)
    noise = NOISY.get(name.partition(",")[0], {}).get("noise", 0)
    share = (h["y"] != h["clean"])[valid].float().mean().item()
    expected = noise * (1 - 1 / d.n_out)
    assert abs(share - expected) <= 5 * (expected * (1 - expected) / valid.sum().item()) ** 0.5


@pytest.mark.parametrize("name", SMALL)
def test_batches_follow_their_generator_and_differ_from_what_is_held_out(name):
    """The same generator gives the same batch, another one another; ids are in range, BOS comes
    first and only there."""
    d = load(name)
    x, y = d.batch(30, rng(1))
    again, other = d.batch(30, rng(1)), d.batch(30, rng(2))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])
    assert x.shape == y.shape == (30, d.T) and x.dtype == y.dtype == torch.int64
    assert (x[:, 0] == d.bos).all() and (x[:, 1:] < d.bos).all() and x.min() >= 0
    assert y.min() == -1 and y.max() < d.n_out
    assert not torch.equal(d.held_out("val", 30)["x"], d.held_out("test", 30)["x"])
    assert torch.equal(d.held_out("test", 1200)["x"][:30], d.held_out("test", 30)["x"])


@pytest.mark.parametrize("name, targets", [
    ("retrieval", 1), ("retrieval, ours", 1), ("copy", 16), ("copy, ours", 16), ("stack, ours", 63),
    ("recall", 2), ("recall, ours", 8), ("modular", 8), ("modular, ours", 8), ("parity", 63),
    ("permutation", 31), ("recency", 57), ("primacy", 57)])
def test_how_many_targets_a_sequence_has(name, targets):
    """As many as the definition says, and density is their part of all times. (How many pops a
    stack sees is chance.)"""
    d = load(name)
    assert ((d.batch(20, rng())[1] >= 0).sum(1) == targets).all()
    assert abs(d.density(d.T) * d.T - targets) < 1e-6


@pytest.mark.parametrize("needle_range, last", [(0, 8), (5, 5), (14, 14)])
def test_the_needle_stands_behind_the_marker_in_the_first_half(needle_range, last):
    """The paper's retrieval: every place from 2 to T / 2 or needle_range is as likely, and so is
    every symbol. The marker is at p - 1 and at the end, and no distractor is a marker."""
    d = data.load("retrieval", length=16, symbols=5, needle_range=needle_range)
    assert (d.T, d.vocab, d.n_out, d.bos) == (16, 7, 5, 6)
    x, y = d.batch(8000, rng())
    assert ((x == 5).sum(1) == 2).all() and (x[:, -1] == 5).all()
    p = (x == 5).int().argmax(1) + 1
    assert set(p.tolist()) == set(range(2, last + 1))
    assert torch.equal(x.gather(1, p[:, None])[:, 0], y[:, -1]) and (y[:, :-1] == -1).all()
    for counts in (p.bincount()[2:], y[:, -1].bincount(), x[x < 5].bincount()):
        assert (counts / counts.sum() * len(counts) - 1).abs().max() < 0.2


def test_a_push_has_no_target_and_every_pop_has_one():
    """The paper's stack: only pops have targets, and at most five symbols stay at the end."""
    d = data.load("stack")
    x, y = d.batch(200, rng())
    pop = d.n_out
    assert (d.T, d.vocab, d.n_out) == (64, 6, 4)
    assert torch.equal(y >= 0, x == pop)
    pushes, pops = (x[:, 1:] < pop).sum(1), (x == pop).sum(1)
    assert set((pushes - pops).tolist()) <= set(range(6)) and len((pushes - pops).unique()) > 2


@pytest.mark.parametrize("reverse", [True, False])
def test_what_copy_feeds_back_has_no_noise(reverse):
    """The paper's copy: targets are redrawn, and the inputs stay the symbols of the string."""
    d = data.load("copy", length=17, noise=0.9, reverse=reverse)
    h = d.held_out("val", 300)
    said = h["x"][:, 1:9].flip(1) if reverse else h["x"][:, 1:9]
    assert torch.equal(h["x"][:, 10:], said[:, :-1]) and torch.equal(h["clean"][:, 9:], said)
    assert (h["y"][:, 9:] != said).float().mean() > 0.7  # 0.9 * 7 / 8 = 0.79
    assert (h["x"][:, 9] == d.n_out).all() and (h["x"][:, 1:9] < d.n_out).all()


def test_recall_feeds_back_the_value_it_asks_for():
    """The paper's recall: at the last symbol of the key begins the value, and all but its last
    symbol are inputs too. Any of the sixteen keys may be asked for."""
    P, S, k = 16, 4, 3
    d = data.load("recall", keys=P, symbols=S, key_len=k)
    x, y = d.batch(400, rng())
    assert d.T == x.shape[1] == 2 * k * (P + 1) and (d.vocab, d.n_out) == (2 * S + 1, S)
    pairs = x[:, 1:1 + 2 * k * P].view(400, P, 2 * k)
    hit = (pairs[:, :, :k] == x[:, None, 1 + 2 * k * P:][:, :, :k]).all(2)
    assert (hit.sum(1) == 1).all() and hit.any(0).all()
    value = pairs[hit][:, k:] - S
    assert torch.equal(y[:, -k:], value) and (y[:, :-k] == -1).all()
    assert torch.equal(x[:, -k + 1:] - S, value[:, :-1])


def test_the_papers_numbers_are_below_a_fifth_of_p():
    """A multiple of five leaves out p / 5 itself; the smallest p leaves 0 alone."""
    for p, values in ((2, 1), (5, 1), (6, 2), (10, 2), (11, 3), (32, 7), (35, 7)):
        d = data.load("modular", modulus=p, examples=2)
        first = d.held_out("val", 2000)
        zero = first["x"][:, 1] == 0  # y = b here
        seen = set(first["y"][zero, 1].tolist())
        assert seen <= set(range(values)) == {w for w in range(p) if w < 0.2 * p}
        assert len(seen) == values or zero.sum() < 100


@pytest.mark.parametrize("name", ["recency", "primacy"])
@pytest.mark.parametrize("length", [3, 10, 64])
def test_the_last_tenth_is_not_trained_and_is_tested(name, length):
    """Batches have targets at 1 <= t < late_from, held-out sequences at every t >= 1."""
    d = data.load(name, length=length)
    late = {3: 2, 10: 9, 64: 58}[length]
    assert d.late_from == late and length - late == max(1, length // 10)
    times = torch.arange(length)
    for seed in range(3):
        _, y = d.batch(20, rng(seed))
        assert ((y >= 0) == ((1 <= times) & (times < late))).all()
    for split in ("val", "test"):
        h = d.held_out(split, 30)
        assert ((h["y"] >= 0) == (times >= 1)).all() and h["clean"] is None
        assert torch.equal(h["posterior"].sum(2) > 0, h["y"] >= 0)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_weights_of_age_and_position_told_in_plain_python(gamma):
    """The posterior is the sum of a symbol's weights over the sum of all; gamma = 0 means the last
    symbol or the first, gamma = 1 any."""
    for name in ("recency", "primacy"):
        d = data.load(name, length=12, symbols=3, gamma=gamma)
        h = d.held_out("test", 20)
        for x, posterior in zip(h["x"].tolist(), h["posterior"].tolist()):
            for t in range(1, d.T):
                past = range(1, t + 1)
                weight = [gamma ** (t - i if name == "recency" else i - 1) for i in past]
                want = [sum(w for i, w in zip(past, weight) if x[i] == s) / sum(weight)
                        for s in range(3)]
                assert posterior[t] == pytest.approx(want, abs=1e-6)


def test_recency_and_primacy_of_a_b_b():
    """By hand, gamma = 1/2. Age: a 1/4, b 1/2 + 1. Position: a 1/2, b 1/4 + 1/8."""
    for name, a in (("recency", 0.25 / 1.75), ("primacy", 0.5 / 0.875)):
        h = data.load(name, length=4, symbols=2).held_out("val")
        row = h["x"].tolist().index([2, 0, 1, 1])
        assert h["posterior"][row, 3].tolist() == pytest.approx([a, 1 - a])


def test_every_variant_of_every_task_is_in_these_tables():
    """Whoever adds a task adds it above."""
    every = {f"{name}{', ours' * (v == 'ours')}" for name in data.SYNTHETIC
             for v in (data.VARIANTS if "variant" in data.OPTIONS[name] else [""])}
    assert every == set(SMALL)


OTHER = dict(length=9, symbols=5, noise=0.9, needle_range=3, reverse=False, depth=1, keys=3,
             key_len=3, gap=2, examples=4, modulus=5, items=4, gamma=0.9, shortest=4)


@pytest.mark.parametrize("name, option", [
    (name, option) for name in SMALL
    for option in data.OPTIONS[name.partition(",")[0]] if option != "variant"])
def test_every_option_changes_the_task(name, option):
    """None is accepted and then forgotten, in any variant."""
    gap = dict(gap=9) if "recall" in name and option == "shortest" else {}

    def drawn(**options):
        x, y = load(name, **gap, **options).batch(50, rng())
        return x.tolist(), y.tolist()
    assert drawn() != drawn(**{option: OTHER[option]})


@pytest.mark.parametrize("name, length, shortest, lengths", [
    ("retrieval", 32, 8, {32, 16, 8}), ("stack", 20, 9, {20, 10}), ("permutation", 9, 9, {9}),
    ("copy", 31, 3, {31, 15, 7, 3}), ("copy", 33, 5, {33, 17, 9, 5}),
    ("recall", 12, 3, {12, 6, 3}), ("recall, ours", 5, 1, {5, 2, 1})])
def test_training_on_several_lengths(name, length, shortest, lengths):
    """Every batch has one of them, all come up, and each is the task of that length with its own
    density. What is held out has the full length and is what it is without the option. In recall
    it is the gap that is halved."""
    key, rest = ("gap", load(name).T) if "recall" in name else ("length", 0)
    d, g = load(name, shortest=shortest, **{key: length}), rng()
    drawn = [d.batch(4, g) for _ in range(40)]
    assert {x.shape[1] - rest for x, _ in drawn} == lengths
    assert all(x.shape == y.shape and (x[:, 0] == d.bos).all() for x, y in drawn)
    for T in (n + rest for n in lengths):
        alone = load(name, **{key: T - rest})
        assert d.density(T) == alone.density(T)
        targets = torch.stack([(y >= 0).sum(0) > 0 for x, y in drawn if x.shape[1] == T]).any(0)
        possible = (alone.held_out("val")["y"] >= 0).any(0)
        assert not (targets & ~possible).any() and targets.any()
    whole = load(name, **{key: length}).held_out("val", 5)
    assert d.T == length + rest and torch.equal(d.held_out("val", 5)["x"], whole["x"])


@pytest.mark.parametrize("case", ["recall", "recall, ours"])
def test_a_gap_is_pauses_and_nothing_else(case):
    """Without its pauses a sequence is the one that has no gap; nobody asks during a pause."""
    plain, wide = load(case), load(case, gap=5)
    (x, y), (wide_x, wide_y) = plain.batch(20, rng()), wide.batch(20, rng())
    start = 1 + 8 * (2 + (1 if "ours" in case else 2))  # behind BOS and the pairs
    pauses = slice(start, start + 5)
    assert (wide_x[:, pauses] == 2 * wide.n_out).all() and (wide_y[:, pauses] == -1).all()
    less = lambda v: torch.cat([v[:, :start], v[:, start + 5:]], 1)
    assert torch.equal(less(wide_x)[:, 1:], x[:, 1:]) and torch.equal(less(wide_y), y)


def test_a_larger_stack_and_longer_keys():
    """Depth and key length are what they say: a stack of one forgets nothing it could tell, keys of
    three differ."""
    d = data.load("stack", variant="ours", length=40, symbols=3, depth=1)
    x, y = d.batch(20, rng())
    assert (y[:, 1::2] < 3).all() and (y[:, 2::2] == 3).all()  # push, pop, push, pop
    x, y = data.load("stack", length=40, symbols=3, depth=1).batch(20, rng())
    assert torch.equal(y[:, 2::2], x[:, 1:-1:2]) and (y[:, 1::2] == -1).all()
    d = data.load("recall", variant="ours", keys=5, symbols=2, key_len=3)
    x, _ = d.batch(200, rng())
    keys = x[:, 1:21].view(200, 5, 4)[:, :, :3] @ torch.tensor([4, 2, 1])
    assert all(len(set(row)) == 5 for row in keys.tolist())
    assert set(keys.flatten().tolist()) == set(range(8))


@pytest.mark.parametrize("name", SMALL)
def test_every_task_can_be_read_aloud(name):
    """show() gives one line, and it ends with what is asked for."""
    d = load(name, **SMALL[name])
    x, y = d.batch(1, rng())
    line = d.show(x[0], y[0])
    assert line.startswith("^") and "\n" not in line and "->" in line
    assert d.about and "\n" not in d.about


@pytest.mark.parametrize("case, options, x, y, line", [
    ("retrieval", dict(length=7, symbols=3), [4, 0, 3, 2, 1, 0, 3], [-1] * 6 + [2], "^a*cba* -> c"),
    ("retrieval, ours", dict(length=6, symbols=3), [7, 0, 5, 1, 0, 6], [-1] * 5 + [1],
     "^a[c]ba? -> b"),
    ("copy", dict(length=7, symbols=3), [4, 0, 1, 2, 3, 2, 1], [-1] * 4 + [2, 1, 0],
     "^abc?cb -> cba"),
    ("copy, ours", dict(length=7, symbols=3), [4, 0, 1, 2, 3, 3, 3], [-1] * 4 + [2, 1, 0],
     "^abc??? -> cba"),
    ("stack", dict(length=5, symbols=3), [4, 0, 2, 3, 3], [-1, -1, -1, 2, 0], "^ac-- -> ..ca"),
    ("stack, ours", dict(length=5, symbols=3), [4, 0, 2, 3, 3], [-1, 0, 2, 0, 3], "^ac-- -> aca."),
    ("recall", dict(keys=2, symbols=3, key_len=2), [6, 0, 1, 5, 4, 2, 2, 3, 3, 0, 1, 5],
     [-1] * 10 + [2, 1], "^ ab=cb cc=aa ? ab->cb"),
    ("recall", dict(keys=2, symbols=3, key_len=1, gap=3), [7, 0, 5, 2, 3, 6, 6, 6, 2],
     [-1] * 8 + [0], "^ a=c c=a ... ? c->a"),
    ("recall, ours", dict(keys=2, symbols=3, key_len=1), [7, 0, 5, 2, 3, 6, 2, 0],
     [-1] * 6 + [0, 2], "^ a=c c=a ? c->a a->c"),
    ("recall, ours", dict(keys=2, symbols=3, key_len=1, gap=1), [7, 0, 5, 2, 3, 6, 6, 2, 0],
     [-1] * 7 + [0, 2], "^ a=c c=a . ? c->a a->c"),
    ("modular", dict(examples=2, modulus=6), [6, 2, 3, 5], [-1, 3, -1, 0], "^ 2->3 5->0 (mod 6)"),
    ("modular, ours", dict(examples=2, modulus=5), [10, 2, 8, 4], [-1, 3, -1, 0],
     "^ 2->3 4->0 (mod 5)"),
    ("recency", dict(length=4, symbols=3), [3, 0, 2, 1], [-1, 0, 0, -1], "^acb -> aa."),
])
def test_lines_read_aloud(case, options, x, y, line):
    """Worked examples: what a reader sees."""
    d = load(case, **options)
    assert len(x) == len(y) == d.T and x[0] == d.bos
    assert d.show(torch.tensor(x), torch.tensor(y)) == line


@pytest.mark.parametrize("name, options, flag", [
    ("retrieval", dict(length=3), "--length"), ("retrieval, ours", dict(length=2), "--length"),
    ("retrieval", dict(needle_range=1), "--needle_range"),
    ("retrieval", dict(needle_range=63), "--needle_range"),
    ("copy", dict(length=8), "--length"), ("copy", dict(length=1), "--length"),
    ("copy", dict(symbols=1), "--symbols"), ("copy", dict(noise=1.5), "--noise"),
    ("stack", dict(length=2), "--length"), ("stack, ours", dict(length=1), "--length"),
    ("stack", dict(depth=0), "--depth"), ("stack", dict(noise=0.1), "--noise"),
    ("recall", dict(keys=65), "--keys"), ("recall", dict(keys=0), "--keys"),
    ("recall", dict(key_len=6), "--key_len"), ("recall", dict(gap=-1), "--gap"),
    ("modular", dict(examples=0), "--examples"),
    ("modular", dict(modulus=1), "--modulus"), ("modular", dict(modulus=-1), "--modulus"),
    ("modular", dict(modulus=257), "--modulus"), ("modular, ours", dict(modulus=65), "--modulus"),
    ("parity", dict(length=1), "--length"), ("permutation", dict(items=7), "--items"),
    ("permutation", dict(noise=0.1), "--noise"), ("recency", dict(length=2), "--length"),
    ("recency", dict(gamma=1.1), "--gamma"), ("primacy", dict(gamma=float("nan")), "--gamma"),
    ("primacy", dict(symbols=1), "--symbols"), ("stack", dict(gamma=0.5), "--gamma")])
def test_impossible_tasks_are_refused(name, options, flag):
    """One line that begins with the flag."""
    with pytest.raises(DataError, match=flag) as e:
        load(name, **options)
    assert str(e.value).startswith(flag) and "\n" not in str(e.value)
