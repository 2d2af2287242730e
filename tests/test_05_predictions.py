"""Lesson: what a memory must predict (Eq. 2), asked cheaply. Whatever is drawn, the mean is that of
asking everywhere."""
import math

import pytest
import torch
import torch.nn.functional as F
import tiny
from tiny import B, K, M, T, V, gen, networks, recipe, sequences

import smt
from losses import cross_entropy, draw, last_inputs, near_and_far, predictive
from model import Decoder, Heads

ALL = 1000  # more memories than there are


def asked(changes, heads=None, y=None, seed=0):
    """(decoder, memories, times, x, y, what predictive says) with S = 7 times a sequence."""
    _, decoder, _ = networks()
    x, own = sequences()
    y = own if y is None else y
    m, t = torch.randn(B, 7, K, M, generator=gen(5)), torch.arange(4, 11).expand(B, -1)
    cfg = recipe(smt, **dict(first=0.0, futures=0, lambda_fut=1.0) | changes)
    density = float((y.gather(1, t) >= 0).double().mean())
    return decoder, m, t, x, y, predictive(decoder, heads, m, t, x, y, cfg, gen(seed), density)


def masked():
    """Targets of which a third is not asked."""
    y = sequences()[1]
    return y.masked_fill(torch.rand(y.shape, generator=gen(2)) < 0.35, -1)


# ----------------------------------------------------------------------- the paper's: whole futures

def test_futures_against_a_loop():
    """Every memory's Tf targets, given the inputs between them, over sequences and times; a mean
    over targets, not over memories."""
    decoder, m, t, x, y, got = asked(dict(futures=ALL), y=masked())
    nats, targets = 0.0, 0
    for b in range(B):
        for i, now in enumerate(t[b].tolist()):
            logits = decoder(m[b:b + 1, i], x[b:b + 1, now + 1:now + 4], torch.tensor([now]))[0]
            future = y[b, now:now + 4]
            nats += F.cross_entropy(logits[:len(future)], future, ignore_index=-1, reduction="sum")
            targets += int((future >= 0).sum())
    assert torch.allclose(got["futures"], nats / targets, atol=1e-5)


def test_a_part_of_the_futures_is_drawn_without_replacement():
    """--futures memories are read, none twice; over many steps each as often as any other."""
    counts = torch.zeros(B * 7)
    for seed in range(200):
        read = []
        cfg = recipe(smt, first=0.0, futures=5)
        m = torch.arange(B * 7.0).view(B, 7, 1, 1)

        def decoder(rows, x_fut, t):
            read.extend(rows.flatten().long().tolist())
            return torch.zeros(len(rows), 1 + x_fut.shape[1], V)

        decoder.c = tiny.config()
        predictive(decoder, None, m, torch.arange(7).expand(B, -1), *sequences(), cfg, gen(seed))
        assert len(set(read)) == len(read) == 5
        counts[read] += 1
    expected = 200 * 5 / len(counts)
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("first", [0, 5])
def test_futures_near_and_far(first):
    """--octaves: one sequence in two is asked at its last time alone, the other at times 20 and 40.
    A memory lies 1, 2-3, 4-7 .. times before a target, each octave as often; where memories
    begin only at `first`, those before it count as the first."""
    y, Tf, n = torch.full((2, 64), -1), 17, 40_000
    y[0, 63], y[1, 20], y[1, 40] = 0, 0, 0
    t = (first + torch.arange(64 - first)).expand(2, -1)
    rows = near_and_far(y, t, n, Tf, gen(0))
    b, at = rows // t.shape[1], t.flatten()[rows]
    for sequence, targets in ((0, [63]), (1, [20, 40])):
        assert (b == sequence).sum() == n // 2
        expected = torch.zeros(64)
        for target in targets:
            for k in range(1, Tf):  # Tf ** u lies in [k, k + 1) for this part of all u
                expected[max(target - k, first)] += math.log((k + 1) / k, Tf) / len(targets)
        got = at[b == sequence].bincount(minlength=64) / (n // 2)
        assert (got - expected).abs().max() < 0.012


# ---------------------------------------------------------------------- y_t alone, where it is hard

@pytest.mark.parametrize("n", [1, 4, 6, 20])
def test_draw_is_unbiased(n, monkeypatch):
    """Over all offsets the mean of weight * value is the mean of value over all rows; rows of score
    0 are left out, and there are always n."""
    score = torch.tensor([0, 3, 1, 0, 5, 2, 1, 0])
    value = torch.randn(8, generator=gen(1))
    estimates, seen = [], torch.zeros(8)
    for offset in ((torch.arange(2000) + 0.5) / 2000).tolist():
        monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor(offset))
        rows, weights = draw(score.float(), n, gen())
        assert rows.shape == weights.shape == (n,)
        estimates.append((weights * value[rows]).mean())
        seen += torch.bincount(rows, minlength=8) / 2000
    assert not seen[score == 0].any() and abs(seen.sum() - n) < 1e-3
    assert torch.allclose(torch.stack(estimates).mean(), (value * (score > 0)).sum() / 8, atol=2e-3)
    if n == 1:  # nobody would be drawn twice: in proportion
        assert torch.allclose(seen, score / 12, atol=2e-3)


@pytest.mark.parametrize("n", [3, 30, 300, 600])
def test_who_is_drawn_for_sure_is_drawn_once(n):
    """However unequal scores are, n rows are hardly ever fewer; where these are all that have a
    score, they weigh the same."""
    for seed in range(20):
        score = torch.rand(1000, generator=gen(seed)) ** 20 + 0.02  # few are far above the rest
        score[600:] = 0
        rows, weights = draw(score, n, gen(seed))
        assert len(rows.unique()) >= 0.98 * n
        assert n < 600 or torch.allclose(weights, torch.full((n,), 0.6), rtol=0.05)


@pytest.mark.parametrize("offset", [0.0, 2 ** -24, 0.5, 1 - 2 ** -24])
@pytest.mark.parametrize("N", [3, 4000])
def test_score_zero_is_never_drawn(offset, N, monkeypatch):
    """Not at either end either, where an offset of 0 or a rounded one would fall."""
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor(offset))
    for seed in range(20):
        score = torch.empty(N).uniform_(generator=gen(seed))
        score[[0, -1]] = 0
        for n in (1, N, 5 * N):
            rows, weights = draw(score, n, gen())
            assert (score[rows] > 0).all() and rows.shape == (n,) and weights.isfinite().all()


def test_one_score_among_many_is_drawn_alone():
    """Fewer rows with a score than are drawn: nobody else is, however many there are."""
    score = torch.zeros(20_000)
    score[7] = 0.3
    rows, weights = draw(score, 5000, gen())
    assert (rows == 7).all() and torch.allclose(weights, torch.full((5000,), 1 / 20_000))


def test_no_score_at_all_means_anywhere():
    """All scores 0: rows are drawn evenly, with weights that are finite."""
    rows, weights = draw(torch.zeros(6), 12, gen())
    assert torch.bincount(rows, minlength=6).tolist() == [2] * 6
    assert torch.allclose(weights, torch.ones(12))


def test_everything_first_is_exact():
    """--first 1 without heads decodes every valid place once: no estimate, but the mean itself."""
    for y in (None, masked()):
        decoder, m, t, _, y, got = asked(dict(first=1.0), y=y)
        exact = cross_entropy(decoder(m.flatten(0, 1))[:, 0], y.gather(1, t).flatten())
        assert torch.allclose(got["first"], exact, atol=1e-5)
        assert torch.equal(got["dec"], got["first"])


@pytest.mark.parametrize("with_heads", [False, True])
def test_a_part_of_the_first_is_unbiased(with_heads):
    """A quarter of the places, most of them where the heads guess wrong: over many draws the mean
    is that of all, within five standard errors."""
    heads = tiny.heads() if with_heads else None
    got = []
    for seed in range(400):
        decoder, m, t, _, y, losses = asked(dict(first=0.25), heads, masked(), seed)
        got.append(float(losses["first"].detach()))
    exact = cross_entropy(decoder(m.flatten(0, 1))[:, 0], y.gather(1, t).flatten())
    got = torch.tensor(got)
    assert got.std() > 1e-3 and abs(got.mean() - exact) < 5 * got.std() / len(got) ** 0.5


def test_wrong_guesses_are_decoded_more_often():
    """Where the heads are sure and right, a place is seldom drawn."""
    y = torch.zeros(1, T, dtype=torch.int64)
    m = torch.zeros(1, T, 1, 2)
    m[0, :8, 0, 0], m[0, 8:, 0, 1] = 1, 1                        # two kinds of memory
    heads = Heads(tiny.config(mem_tokens=1, mem_dim=2, past=0))
    with torch.no_grad():
        heads.linear.weight[0, 0] = 9                           # the first says symbol 0: right
    read = []

    def decoder(rows, *_):
        read.extend(rows[:, 0, 1].tolist())
        return torch.zeros(len(rows), 1, V)

    for seed in range(100):
        predictive(decoder, heads, m, torch.arange(T)[None], torch.full_like(y, V), y,
                   recipe(smt, first=0.5, futures=0), gen(seed))
    hard = sum(read) / len(read)
    assert abs(hard - 0.5) < 0.02  # 6 of 11 places are decoded, all 3 hard ones among them


# ------------------------------------------------------------------------------------ cheap guesses

def test_heads_against_a_loop():
    """From every memory its next F valid targets, and once more the very next one."""
    heads, y = tiny.heads(), masked()
    _, m, t, _, _, got = asked({}, heads, y)
    every, very_next = [], []
    for b in range(B):
        for i, now in enumerate(t[b].tolist()):
            left = [v for v in y[b, now:].tolist() if v >= 0][:tiny.F]
            logp = (heads.linear.weight.view(tiny.F, V, K * M) @ m[b, i].flatten()).log_softmax(-1)
            every += [-logp[k, v] for k, v in enumerate(left)]
            very_next += every[-len(left):][:1] if left else []
    mean = lambda v: torch.stack(v).mean()
    assert torch.allclose(got["heads"], mean(every) + mean(very_next), atol=1e-5)


def test_a_part_of_the_heads_is_unbiased():
    """--heads_part 0.25: every memory is asked for its next target, a quarter for all F; over many
    draws the mean is that of asking all, within five standard errors."""
    heads = tiny.heads(past=0)
    once = lambda share, seed=0: \
        asked(dict(heads_part=share), heads, seed=seed)[-1]["heads"].item()
    got = torch.tensor([once(0.25, seed) for seed in range(400)])
    assert got.std() > 1e-3 and abs(got.mean() - once(1.0)) < 5 * got.std() / len(got) ** 0.5


def test_past_against_a_loop():
    """From every memory the last P inputs it has read; BOS is none of them."""
    heads = tiny.heads()
    _, m, t, x, _, got = asked({}, heads)
    every = []
    for b in range(B):
        for i, now in enumerate(t[b].tolist()):
            logp = (heads.past.weight.view(tiny.P, V, K * M) @ m[b, i].flatten()).log_softmax(-1)
            every += [-logp[k, x[b, now - k]] for k in range(tiny.P) if now - k >= 1]
    assert torch.allclose(got["past"], torch.stack(every).mean(), atol=1e-5)


def test_of_two_symbols_one_logit_will_do():
    """The logit of one over that of the other is all that a loss asks for."""
    heads = tiny.heads(n_out=2, vocab=3)
    m, y = torch.randn(50, K, M), torch.randint(-1, 2, (50, tiny.F))
    both = heads.linear(m.flatten(1)).view(50, tiny.F, 2)
    assert heads(m).shape == (50, tiny.F, 1) and heads.recall(m).shape == (50, tiny.P, 1)
    assert torch.allclose(cross_entropy(heads(m), y), cross_entropy(both, y), atol=1e-6)


def test_bos_between_two_texts_is_not_recalled():
    """It has no class among those of the past."""
    x, bos = torch.tensor([[9, 3, 9, 4, 5]]), 9
    assert last_inputs(x, torch.tensor([[3, 0]]), 5, bos).tolist() == \
        [[[4, -1, 3, -1, -1], [-1] * 5]]


def test_the_four_questions_add_up():
    """"dec" is their sum, futures and past in it weighed; a question that is not asked is not
    there, and none at all is 0."""
    got = asked(dict(first=0.5, futures=4, lambda_fut=0.3, lambda_past=0.7), tiny.heads())[-1]
    assert got.keys() == {"dec", "heads", "first", "futures", "past"}
    assert torch.allclose(got["dec"], got["heads"] + got["first"] + 0.3 * got["futures"] +
                          0.7 * got["past"])
    assert asked({}, tiny.heads(heads=0))[-1].keys() == {"dec", "past"}
    assert asked({}, tiny.heads(past=0))[-1].keys() == {"dec", "heads"}
    assert asked(dict(futures=4))[-1].keys() == {"dec", "futures"}
    assert asked({})[-1] == dict(dec=0)


def test_without_a_target_there_is_no_loss():
    """All masked: every part is 0, and every gradient is finite."""
    decoder, heads = networks()[1], tiny.heads(past=0)  # the past needs no target
    m = torch.randn(B, T, K, M, requires_grad=True)
    x, y = sequences()
    got = predictive(decoder, heads, m, torch.arange(T).expand(B, -1), x, torch.full_like(y, -1),
                     recipe(smt), gen())
    assert all(v == 0 for v in got.values()) and got.keys() > {"heads", "first", "futures"}
    got["dec"].backward()
    for p in (m, *decoder.parameters(), *heads.parameters()):
        assert p.grad is None or (p.grad == 0).all()
    assert cross_entropy(torch.randn(2, 3, V), torch.full((2, 3), -1)) == 0


@pytest.mark.parametrize("symbols", [2, 40])
def test_cross_entropy_is_a_mean_over_valid_targets(symbols):
    """Of few symbols and of many, which are computed along different dimensions."""
    logits, y = torch.randn(3, 4, symbols), torch.randint(symbols, (3, 4))
    y[1, 2:] = -1
    each = [-logits[b, i].log_softmax(-1)[y[b, i]] for b in range(3) for i in range(4)
            if y[b, i] >= 0]
    assert torch.allclose(cross_entropy(logits, y), torch.stack(each).mean(), atol=1e-5)


def test_first_loss_is_uniform():
    """Untrained, decoder and heads predict every symbol with equal probability."""
    c = tiny.config()
    x, y = sequences()
    got = predictive(Decoder(c), Heads(c), torch.randn(B, T, K, M), torch.arange(T).expand(B, -1),
                     x, y, recipe(smt), gen())
    for name, times in (("heads", 2), ("first", 1), ("futures", 1), ("past", 1)):
        assert got[name].item() == pytest.approx(times * math.log(V), abs=1e-4), name
