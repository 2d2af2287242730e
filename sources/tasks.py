"""The synthetic tasks: endless, seeded, and with their exact Bayes optimum at every position.

    retrieval     remember one marked symbol among distractors until the end        long credit
    copy          say a string again, backwards (or forwards)                       capacity
    stack         what lies on top after every push and pop                         state tracking
    recall        values of keys, in another order                                  associative recall
    modular       y = a x + b (mod p), a and b to be found from examples            in-context learning
    parity        of all bits so far                                                state tracking
    permutation   of `items` things after every swap or rotation; five: the word problem of S5

Each function describes its process in `about` and returns a `data.Data`. `make(n, generator)` draws x and the clean
targets for n sequences at once; loops run over time, never over the batch.
"""
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

    With probability `noise` a target is redrawn uniformly over all n_out symbols, the true one included. posterior(x,
    clean) -> (n, T, n_out) is the best prediction; left out, x tells the clean target and only the redraw is uncertain.
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
        return x.to(device), y.to(device)

    def held_out(split, n=None):
        n = CHUNK if n is None else n
        chunks = [draw(CHUNK, torch.Generator().manual_seed(HELD_OUT_SEED[split] + i))
                  for i in range(max(1, math.ceil(n / CHUNK)))]  # whole chunks, cut: the first n never change
        x, y, clean = (torch.cat(parts)[:n] for parts in zip(*chunks))
        best = posterior(x, clean) if posterior else (1 - noise) * F.one_hot(clean.clamp(min=0), n_out) + noise / n_out
        out = dict(x=x, y=y, clean=clean, posterior=best * (clean >= 0)[..., None])
        return {key: value.to(device) for key, value in out.items()}

    return Data(name, T=T, vocab=vocab, n_out=n_out, units="nats/target", timestamps=True, image=None, batch=batch,
                held_out=held_out, about=about, show=show)


def letter(i) -> str:
    """Symbol i for the eye: a .. z, then numbers."""
    return chr(ord("a") + int(i)) if int(i) < 26 else f"<{int(i)}>"


def retrieval(length, symbols, noise, needle_range, device="cpu"):
    T, S = length, symbols
    check(T >= 3, "length", T, "at least 3: BOS, one symbol, QUERY")
    check(S >= 2, "symbols", S, "at least 2")
    check(0 <= noise <= 1, "noise", noise, "between 0 and 1")
    check(0 <= needle_range <= T - 2, "needle_range", needle_range, f"between 0 and --length - 2 = {T - 2}")
    R = needle_range or max(1, T // 4)
    query, bos = 2 * S, 2 * S + 1  # 0..S-1 are distractors, S..2S-1 the same symbols marked

    def make(n, g):
        x = torch.randint(S, (n, T), generator=g)
        x[:, 0], x[:, -1] = bos, query
        needle = torch.randint(S, (n,), generator=g)
        x[torch.arange(n), torch.randint(1, R + 1, (n,), generator=g)] = S + needle
        clean = torch.full((n, T), -1)
        clean[:, -1] = needle
        return x, clean

    def show(x, y):
        spelled = {bos: "^", query: "?"} | {i: letter(i) if i < S else f"[{letter(i - S)}]" for i in range(2 * S)}
        return "".join(spelled[i] for i in x.tolist()) + " -> " + letter(y[-1])

    about = f"uniform distractors; at a uniform place in 1..{R} a marked uniform symbol; asked at the end, the answer is " \
            f"redrawn uniformly with probability {noise}"
    return endless("retrieval", T, 2 * S + 2, S, make, about, show, device, noise)


def copy(length, symbols, noise, reverse, device="cpu"):
    T, S, L = length, symbols, length // 2
    check(T >= 3 and T % 2 == 1, "length", T, "odd and at least 3: BOS, a string, and as many questions")
    check(S >= 2, "symbols", S, "at least 2")
    check(0 <= noise <= 1, "noise", noise, "between 0 and 1")
    query, bos = S, S + 1

    def make(n, g):
        string = torch.randint(S, (n, L), generator=g)
        x = torch.cat([torch.full((n, 1), bos), string, torch.full((n, L), query)], 1)
        return x, torch.cat([torch.full((n, L + 1), -1), string.flip(1) if reverse else string], 1)

    def show(x, y):
        return "^" + "".join(map(letter, x[1:L + 1])) + "?" * L + " -> " + "".join(map(letter, y[L + 1:]))

    about = f"a uniform string of {L} symbols, then {L} questions for it, {'backwards' if reverse else 'forwards'}; an " \
            f"answer is redrawn uniformly with probability {noise}"
    return endless("copy", T, S + 2, S, make, about, show, device, noise)


def stack(length, symbols, depth, device="cpu"):
    T, S, D = length, symbols, depth
    check(T >= 2, "length", T, "at least 2: BOS and one operation")
    check(S >= 2, "symbols", S, "at least 2")
    check(D >= 1, "depth", D, "at least 1")
    pop, bos, empty = S, S + 1, S  # inputs 0..S-1 push; the target `empty` says that nothing lies there

    def make(n, g):
        x, clean = torch.full((n, T), bos), torch.full((n, T), -1)
        pushed, coin = torch.randint(S, (n, T), generator=g), torch.rand(n, T, generator=g) < 0.5
        cells = torch.full((n, D + 1), empty)  # cells[:, h] is the symbol at height h; height 0 is the ground
        height, rows = torch.zeros(n, dtype=torch.int64), torch.arange(n)
        for t in range(1, T):
            push = torch.where(height == 0, True, torch.where(height == D, False, coin[:, t]))
            height = height + torch.where(push, 1, -1)
            cells[rows, height] = torch.where(push, pushed[:, t], cells[rows, height])
            x[:, t] = torch.where(push, pushed[:, t], pop)
            clean[:, t] = cells[rows, height]
        return x, clean

    def show(x, y):
        return "^" + "".join("-" if i == pop else letter(i) for i in x[1:]) + " -> " + \
            "".join("." if i == empty else letter(i) for i in y[1:])

    about = f"a fair coin pushes a uniform symbol or pops (an empty stack is pushed, {D} high it is popped); the target is " \
            "what lies on top afterwards, or that nothing does"
    return endless("stack", T, S + 2, S + 1, make, about, show, device)


def recall(keys, symbols, key_len, device="cpu"):
    P, S, k = keys, symbols, key_len
    check(S >= 2, "symbols", S, "at least 2")
    check(1 <= k <= 16 and S ** k <= 100_000, "key_len", k, "at least 1, with symbols ** key_len at most 100,000")
    check(1 <= P <= S ** k, "keys", P, f"between 1 and symbols ** key_len = {S ** k}, the number of different keys")
    query, bos = 2 * S, 2 * S + 1  # 0..S-1 spell keys, S..2S-1 are values
    ask = 2 + P * (k + 1)          # time of the first question's first symbol
    T = ask + P * k

    def spell(key):  # (n, P) numbers -> (n, P, k) symbols
        return torch.stack([key // S ** (k - 1 - i) % S for i in range(k)], -1)

    def make(n, g):
        key = torch.rand(n, S ** k, generator=g).topk(P, 1).indices  # P different keys in random order
        value = torch.randint(S, (n, P), generator=g)
        order = torch.rand(n, P, generator=g).argsort(1)
        told = torch.cat([spell(key), S + value[..., None]], -1).flatten(1)
        asked = spell(key.gather(1, order)).flatten(1)
        x = torch.cat([torch.full((n, 1), bos), told, torch.full((n, 1), query), asked], 1)
        clean = torch.full((n, T), -1)
        clean[:, ask + k - 1::k] = value.gather(1, order)
        return x, clean

    def show(x, y):
        spelled = lambda ids: "".join(letter(i) for i in ids)
        told = " ".join(spelled(x[i:i + k]) + "=" + letter(x[i + k] - S) for i in range(1, ask - 1, k + 1))
        return f"^ {told} ? " + " ".join(spelled(x[i:i + k]) + "->" + letter(y[i + k - 1]) for i in range(ask, T, k))

    about = f"{P} different uniform keys of {k} symbols, each with a uniform value; then every key once more in random " \
            "order, and its value is the target"
    return endless("recall", T, 2 * S + 2, S, make, about, show, device)


def modular(examples, modulus, device="cpu"):
    n_ex, p = examples, modulus
    check(n_ex >= 1, "examples", n_ex, "at least 1")
    check(2 <= p <= 64, "modulus", p, "between 2 and 64")
    T, bos = 2 * n_ex, 2 * p  # BOS u_1 v_1 u_2 v_2 .. u_n; v_n is never an input.  u is 0..p-1, v is p..2p-1

    def make(n, g):
        a, b = torch.randint(p, (2, n, 1), generator=g)
        u = torch.randint(p, (n, n_ex), generator=g)
        v = (a * u + b) % p
        x = torch.cat([torch.full((n, 1), bos), torch.stack([u, v + p], -1).flatten(1)[:, :-1]], 1)
        clean = torch.full((n, T), -1)
        clean[:, 1::2] = v
        return x, clean

    def posterior(x, clean):
        """Of all p * p pairs (a, b), those that fit the examples so far are equally likely."""
        a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
        fits, out = torch.ones(len(x), p * p), torch.zeros(len(x), T, p)
        for t in range(1, T, 2):
            says = (a * x[:, t:t + 1] + b) % p                                  # (n, p * p)
            out[:, t].scatter_add_(1, says, fits / fits.sum(1, keepdim=True))
            fits = fits * (says == clean[:, t:t + 1])
        return out

    def show(x, y):
        return "^ " + " ".join(f"{int(u)}->{int(v)}" for u, v in zip(x[1::2], y[1::2])) + f" (mod {p})"

    about = f"uniform a and b; {n_ex} uniform u, each asking for v = a u + b (mod {p}), which is then told"
    return endless("modular", T, 2 * p + 1, p, make, about, show, device, posterior=posterior)


def tracked(name, T, n_ops, n_states, table: Tensor, about, show, device):
    """State tracking: uniform inputs 0..n_ops-1 move the state from 0 by table (n_states, n_ops) int64; the target is it."""
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
    swap, rotate = (lambda o: (o[1], o[0], *o[2:])), (lambda o: (*o[1:], o[0]))  # together they make the whole group
    table = torch.tensor([[index[swap(o)], index[rotate(o)]] for o in orders])
    order = lambda i: "".join(map(str, orders[int(i)]))
    about = f"a fair coin swaps the first two of {items} things or moves the first to the end; the target is their order, " \
            f"one of {len(orders)}"
    return tracked("permutation", length, 2, len(orders), table, about,
                   lambda x, y: "^" + "".join("sr"[int(i)] for i in x[1:]) + f" -> .. {order(y[-1])}", device)
