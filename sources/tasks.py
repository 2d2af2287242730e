"""The synthetic tasks: endless, seeded, and with their exact Bayes optimum at every position.

    retrieval     remember one symbol among distractors until the end        long credit
    copy          say a string again, backwards (or forwards)                capacity
    stack         which symbol does a pop take away?                         state tracking
    recall        the value of a key                                         associative recall
    modular       y = w x + b (mod p), w and b to be found from examples     in-context learning
    parity        of all bits so far                                         state tracking
    permutation   of `items` things after every swap or rotation; five: the word problem of S5
    recency       a symbol drawn from the past, mostly a late one            forgetting
    primacy       a symbol drawn from the past, mostly an early one          keeping

The first five have two variants. "paper" is the authors' task with BOS in front, so T is one more
than theirs. "ours" is another task of the same name. Each function describes its process in `about`
and returns a `Data`. `make(n, generator)` draws x and the clean targets for n sequences at once;
loops run over time, never over the batch.
"""
import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sources.files import Data, check

HELD_OUT_SEED = dict(val=7_000_000, test=8_000_000)  # of each split's first chunk of sequences
CHUNK = 1_000


def endless(name, T, vocab, n_out, make, about, show, device, noise=0.0, posterior=None):
    """A Data from make(n, generator) -> x, clean (n, T), clean = -1 where there is no target.

    With probability `noise` a target is redrawn uniformly over all n_out symbols, the true one
    included. posterior(x, clean) -> (n, T, n_out) is the best prediction; left out, x tells the
    clean target and only the redraw is uncertain.
    """
    def noisy(clean, g):
        if not noise:
            return clean
        redraw = (torch.rand(clean.shape, generator=g) < noise) & (clean >= 0)
        return torch.where(redraw, torch.randint(n_out, clean.shape, generator=g), clean)

    def draw(n, g):
        x, clean = make(n, g)
        return x, noisy(clean, g), clean

    def batch(n, generator):
        x, y, _ = draw(n, generator)
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def held_out(split, n=None):
        n = CHUNK if n is None else n
        chunks = [draw(CHUNK, torch.Generator().manual_seed(HELD_OUT_SEED[split] + i))
                  for i in range(max(1, math.ceil(n / CHUNK)))]  # whole: the first n never change
        x, y, clean = (torch.cat(parts)[:n] for parts in zip(*chunks))
        if posterior:
            best = posterior(x, clean)
        else:
            best = (1 - noise) * F.one_hot(clean.clamp(min=0), n_out) + noise / n_out
        out = dict(x=x, y=y, clean=clean, posterior=best * (clean >= 0)[..., None])
        return {key: value.to(device) for key, value in out.items()}

    some = make(CHUNK, torch.Generator().manual_seed(0))[1]
    density = float((some >= 0).double().mean())
    return Data(name, T=T, vocab=vocab, n_out=n_out, units="nats/target", timestamps=True,
                image=None, density=lambda length: density, batch=batch, held_out=held_out,
                about=about, show=show)


def letter(i) -> str:
    """Symbol i for the eye: a .. z, then numbers."""
    return chr(ord("a") + int(i)) if int(i) < 26 else f"<{int(i)}>"


def spell(number: Tensor, n: int, base: int) -> Tensor:
    """Numbers (...,) int64 as n digits, the highest first: (..., n)."""
    return torch.stack([number // base ** (n - 1 - i) % base for i in range(n)], -1)


def retrieval(variant, length, symbols, noise, needle_range, device="cpu"):
    """paper: a marker precedes the needle. The same marker comes last and asks for it.
    ours: the needle has an alphabet of its own, so one look at it is enough. A query comes last."""
    T, S, ours = length, symbols, variant == "ours"
    first = 1 if ours else 2  # the earliest needle; BOS precedes it, and the paper's marker
    check(T >= first + 2, "length", T,
          "at least 3: BOS, needle, query" if ours else "at least 4: BOS, marker, needle, marker")
    check(S >= 2, "symbols", S, "at least 2")
    check(0 <= noise <= 1, "noise", noise, "between 0 and 1")
    check(needle_range == 0 or first <= needle_range <= T - 2, "needle_range", needle_range,
          f"0, or between {first} and --length - 2 = {T - 2}")
    R = needle_range or max(first, T // 4 if ours else T // 2)
    # 0..S-1 are symbols, in `ours` S..2S-1 the same ones marked; `asks` is the marker or the query
    asks, bos = (2 * S, 2 * S + 1) if ours else (S, S + 1)

    def make(n, g):
        x = torch.randint(S, (n, T), generator=g)
        x[:, 0], x[:, -1] = bos, asks
        needle, rows = torch.randint(S, (n,), generator=g), torch.arange(n)
        p = torch.randint(first, R + 1, (n,), generator=g)
        if ours:
            x[rows, p] = S + needle
        else:
            x[rows, p - 1], x[rows, p] = asks, needle
        clean = torch.full((n, T), -1)
        clean[:, -1] = needle
        return x, clean

    def show(x, y):
        spelled = {i: letter(i) if i < S else f"[{letter(i - S)}]" for i in range(asks)}
        spelled |= {bos: "^", asks: "?" if ours else "*"}
        return "".join(spelled[i] for i in x.tolist()) + " -> " + letter(y[-1])

    about = "a marked uniform symbol; asked at the end, " if ours else \
        "the needle, a uniform symbol after a marker; the marker at the end asks for it, "
    about = f"uniform distractors; at a uniform place in {first}..{R} {about}" \
            f"the answer is redrawn uniformly with probability {noise}"
    return endless("retrieval", T, bos + 1, S, make, about, show, device, noise)


def copy(variant, length, symbols, noise, reverse, device="cpu"):
    """paper: after the separator the inputs are the answers, one step late.
    ours: every input there is the same question."""
    T, S, L, ours = length, symbols, length // 2, variant == "ours"
    check(T >= 3 and T % 2 == 1, "length", T,
          "odd and at least 3: BOS, a string, and as many answers")
    check(S >= 2, "symbols", S, "at least 2")
    check(0 <= noise <= 1, "noise", noise, "between 0 and 1")
    query, bos = S, S + 1  # the paper's separator is our first question

    def make(n, g):
        string = torch.randint(S, (n, L), generator=g)
        answer, asks = string.flip(1) if reverse else string, torch.full((n, L), query)
        if not ours:
            asks[:, 1:] = answer[:, :-1]  # the true ones: noise comes later and spares the inputs
        x = torch.cat([torch.full((n, 1), bos), string, asks], 1)
        return x, torch.cat([torch.full((n, L + 1), -1), answer], 1)

    def show(x, y):
        told = "".join("?" if i == query else letter(i) for i in x[1:])
        return f"^{told} -> " + "".join(map(letter, y[L + 1:]))

    way = "backwards" if reverse else "forwards"
    about = f"{L} questions for it, {way}" if ours else \
        f"a separator and the string {way}; the targets are one symbol ahead"
    about = f"a uniform string of {L} symbols, then {about}; an answer is redrawn uniformly with " \
            f"probability {noise}"
    return endless("copy", T, S + 2, S, make, about, show, device, noise)


def stack(variant, length, symbols, depth, device="cpu"):
    """paper: only a pop has a target, the symbol that it takes away.
    ours: every operation has one, what lies on top after it, or that nothing does."""
    T, S, D, ours = length, symbols, depth, variant == "ours"
    check(T >= (2 if ours else 3), "length", T,
          "at least 2: BOS and one operation" if ours else "at least 3: BOS, a push and a pop")
    check(S >= 2, "symbols", S, "at least 2")
    check(D >= 1, "depth", D, "at least 1")
    pop, bos, empty = S, S + 1, S  # inputs 0..S-1 push; the target `empty`: nothing lies there

    def make(n, g):
        x, clean = torch.full((n, T), bos), torch.full((n, T), -1)
        pushed, coin = torch.randint(S, (n, T), generator=g), torch.rand(n, T, generator=g) < 0.5
        cells = torch.full((n, D + 1), empty)  # cells[:, h]: what lies at height h; 0 is the ground
        height, rows = torch.zeros(n, dtype=torch.int64), torch.arange(n)
        for t in range(1, T):
            push = torch.where(height == 0, True, torch.where(height == D, False, coin[:, t]))
            top = cells[rows, height]
            height = height + torch.where(push, 1, -1)
            cells[rows, height] = torch.where(push, pushed[:, t], cells[rows, height])
            x[:, t] = torch.where(push, pushed[:, t], pop)
            clean[:, t] = cells[rows, height] if ours else torch.where(push, -1, top)
        return x, clean

    def show(x, y):
        return "^" + "".join("-" if i == pop else letter(i) for i in x[1:]) + " -> " + \
            "".join("." if i in (-1, empty) else letter(i) for i in y[1:])

    about = "a fair coin pushes a uniform symbol or pops (an empty stack is pushed, " \
            f"{D} high it is popped); the target is " + \
            ("what lies on top afterwards, or that nothing does" if ours else
             "what a pop takes away, and a push has none")
    return endless("stack", T, S + 2, S + 1 if ours else S, make, about, show, device)


def recall(variant, keys, symbols, key_len, gap, device="cpu"):
    """paper: a value is as long as a key. One key is asked for; its value is the target and is fed
    back. Here all keys differ. Two of the authors' may be equal: then a question has two answers.
    ours: a value is one symbol, and all keys are asked for: multi-query recall (Zoology, MAD).
    With a gap, which is ours, nothing happens between the last pair and the question."""
    P, S, k, ours = keys, symbols, key_len, variant == "ours"
    check(S >= 2, "symbols", S, "at least 2")
    check(1 <= k <= 16 and S ** k <= 100_000, "key_len", k,
          "at least 1, with symbols ** key_len at most 100,000")
    check(1 <= P <= S ** k, "keys", P,
          f"between 1 and symbols ** key_len = {S ** k}, the number of different keys")
    check(0 <= gap <= 100_000, "gap", gap, "between 0 and 100,000")
    V, asked = (1, P) if ours else (k, 1)  # symbols of a value, and keys asked for
    pauses = gap + (1 if ours else 0)
    pause, bos = 2 * S, 2 * S + (pauses > 0)  # 0..S-1 spell keys, S..2S-1 values
    ask = 1 + P * (k + V) + pauses         # time of the first question's first symbol
    T = ask + asked * k + V - 1

    def make(n, g):
        key = torch.rand(n, S ** k, generator=g).topk(P, 1).indices  # all differ, in random order
        value = torch.randint(S, (n, P, V), generator=g)
        order = torch.rand(n, P, generator=g).argsort(1)[:, :asked]
        pairs = torch.cat([spell(key, k, S), S + value], -1).flatten(1)
        told = torch.cat([torch.full((n, 1), bos), pairs, torch.full((n, pauses), pause)], 1)
        question = spell(key.gather(1, order), k, S).flatten(1)
        answer = value[torch.arange(n)[:, None], order].flatten(1)   # (n, asked * V)
        clean = torch.full((n, T), -1)
        clean[:, ask + k - 1::(k if ours else 1)] = answer
        fed_back = answer[:, :0] if ours else S + answer[:, :-1]
        return torch.cat([told, question, fed_back], 1), clean

    def show(x, y):
        spelled = lambda ids, first=0: "".join(letter(i - first) for i in ids)
        told = [spelled(x[i:i + k]) + "=" + spelled(x[i + k:i + k + V], S)
                for i in range(1, 1 + P * (k + V), k + V)]
        said = [spelled(x[i:i + k]) + "->" + spelled(y[i + k - 1:][:V])
                for i in range(ask, ask + asked * k, k)]
        return " ".join(["^", *told, *(["." * gap] if gap else []), "?", *said])

    about = f"{P} different uniform keys of {k} symbols, each with a uniform value" + \
            (f" of {k}" if not ours else "") + (f"; then {gap} pauses" if gap else "") + \
            ("; then every key once more in random order, and its value is the target" if ours else
             "; then one of the keys once more, and its value is the target")
    return endless("recall", T, bos + 1, S, make, about, show, device)


def modular(variant, examples, modulus, device="cpu"):
    """paper: w and b are below a fifth of p, and the same p symbols spell x and y. p = 32 leaves
    seven values to each of them, 49 pairs as in `ours`; p = 7 would leave two.
    ours: w and b are anything below p, and y has symbols of its own."""
    n_ex, ours = examples, variant == "ours"
    p, most = modulus or (7 if ours else 32), 64 if ours else 256  # the posterior tries all (w, b)
    check(n_ex >= 1, "examples", n_ex, "at least 1")
    check(2 <= p <= most, "modulus", modulus, f"0, or between 2 and {most}")
    below = p if ours else -(-p // 5)  # w and b are 0 .. below - 1: the integers under p / 5
    shift = p if ours else 0           # as an input y is shift .. shift + p - 1
    T, bos = 2 * n_ex, shift + p       # BOS x_1 y_1 x_2 y_2 .. x_n; y_n is never an input

    def make(n, g):
        w, b = torch.randint(below, (2, n, 1), generator=g)
        u = torch.randint(p, (n, n_ex), generator=g)
        v = (w * u + b) % p
        told = torch.stack([u, v + shift], -1).flatten(1)[:, :-1]
        clean = torch.full((n, T), -1)
        clean[:, 1::2] = v
        return torch.cat([torch.full((n, 1), bos), told], 1), clean

    def posterior(x, clean):
        """Of all pairs (w, b), those that fit the examples so far are equally likely."""
        w, b = torch.arange(below).repeat_interleave(below), torch.arange(below).repeat(below)
        fits, out = torch.ones(len(x), len(w)), torch.zeros(len(x), T, p)
        for t in range(1, T, 2):
            says = (w * x[:, t:t + 1] + b) % p                                  # (n, pairs)
            out[:, t].scatter_add_(1, says, fits / fits.sum(1, keepdim=True))
            fits = fits * (says == clean[:, t:t + 1])
        return out

    def show(x, y):
        told = " ".join(f"{int(u)}->{int(v)}" for u, v in zip(x[1::2], y[1::2]))
        return f"^ {told} (mod {p})"

    about = f"uniform w and b below {below}; {n_ex} uniform x, each asking for " \
            f"y = w x + b (mod {p}), which is then told"
    return endless("modular", T, bos + 1, p, make, about, show, device, posterior=posterior)


def tracked(name, T, n_ops, n_states, table: Tensor, about, show, device):
    """State tracking: uniform inputs 0..n_ops-1 move the state from 0 by table (n_states, n_ops)
    int64; the target is the state."""
    check(T >= 2, "length", T, "at least 2: BOS and one input")

    def make(n, g):
        x = torch.randint(n_ops, (n, T), generator=g)
        state, clean = torch.zeros(n, dtype=torch.int64), torch.full((n, T), -1)
        x[:, 0] = n_ops
        for t in range(1, T):
            state = table[state, x[:, t]]
            clean[:, t] = state
        return x, clean

    return endless(name, T, n_ops + 1, n_states, make, about, show, device)


def parity(length, device="cpu"):
    text = lambda row: "".join(str(int(i)) for i in row[1:])
    about = "uniform bits; the target is the parity of all so far"
    return tracked("parity", length, 2, 2, torch.tensor([[0, 1], [1, 0]]), about,
                   lambda x, y: f"^{text(x)} -> {text(y)}", device)


def permutation(length, items, device="cpu"):
    check(2 <= items <= 6, "items", items, "between 2 and 6")
    orders = list(itertools.permutations(range(items)))
    index = {o: i for i, o in enumerate(orders)}
    # swapping the first two and rotating make the whole group together
    swap, rotate = (lambda o: (o[1], o[0], *o[2:])), (lambda o: (*o[1:], o[0]))
    table = torch.tensor([[index[swap(o)], index[rotate(o)]] for o in orders])
    order = lambda i: "".join(map(str, orders[int(i)]))
    about = f"a fair coin swaps the first two of {items} things or moves the first to the end; " \
            f"the target is their order, one of {len(orders)}"
    show = lambda x, y: "^" + "".join("sr"[int(i)] for i in x[1:]) + f" -> .. {order(y[-1])}"
    return tracked("permutation", length, 2, len(orders), table, about, show, device)


def drawn(name, length, symbols, gamma, power, rule, device):
    """The target at t is one of x_1..x_t; x_i has the weight gamma ** power(t, i). `rule` says so.

    In training the last tenth of the positions has no target. Held-out sequences have targets there
    too: they show whether the rule goes on where it was not trained. No draw is more right than
    another, so `clean` is None: there is no accuracy, the excess over the posterior is the measure.
    """
    T, S, late = length, symbols, length - max(1, length // 10)
    check(T >= 3, "length", T, "at least 3: BOS, a symbol with a target, a symbol without")
    check(S >= 2, "symbols", S, "at least 2")
    check(0 <= gamma <= 1, "gamma", gamma, "between 0 and 1")
    t, i = torch.arange(T)[:, None], torch.arange(T)
    weight = gamma ** power(t, i).clamp(min=0).double() * ((1 <= i) & (i <= t))
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1)  # (T, T): rows sum to 1, row 0 to 0
    below = weight.cumsum(1)

    def make(n, g):
        x = torch.randint(S, (n, T), generator=g)
        x[:, 0] = S
        u = torch.rand(T, n, generator=g, dtype=torch.float64)
        pick = torch.searchsorted(below, u, right=True).minimum(t)  # rounding may end it below 1
        y = x.gather(1, pick.T)
        y[:, 0] = -1
        return x, y

    def posterior(x, y):
        seen = F.one_hot(x.clamp(max=S - 1), S).double()  # BOS weighs nothing, so any will do
        return torch.einsum("ti,nis->nts", weight, seen).float()

    def batch(n, generator):
        x, y = task.batch(n, generator)
        y[:, late:] = -1
        return x, y

    def show(x, y):
        return "^" + "".join(map(letter, x[1:])) + " -> " + \
            "".join("." if s < 0 else letter(s) for s in y[1:])

    about = f"uniform symbols; the target at t is one of x_1..x_t, x_i with the weight {rule}; " \
            f"in training there are none at t >= {late}"
    task = endless(name, T, S + 1, S, make, about, show, device, posterior=posterior)
    held_out = lambda split, n=None: task.held_out(split, n) | dict(clean=None)
    return dataclasses.replace(task, batch=batch, held_out=held_out, late_from=late,
                               density=lambda length: (late - 1) / T)


def recency(length, symbols, gamma, device="cpu"):
    rule = f"{gamma} ** (t - i)"
    return drawn("recency", length, symbols, gamma, lambda t, i: t - i, rule, device)


def primacy(length, symbols, gamma, device="cpu"):
    rule = f"{gamma} ** i"  # or i - 1: a common factor changes nothing, and the largest weight is 1
    return drawn("primacy", length, symbols, gamma, lambda t, i: i - 1, rule, device)
