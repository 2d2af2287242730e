"""Eq. 2: what a memory must predict. Encoder, RNN and readout are all judged by these functions.

The paper decodes the whole future of one memory a sequence. Asked cheaply, all memories of a step
can answer; here Eq. 2 is the sum of four questions:

    futures   the paper's: a causal decoder reads the memory and the inputs to come, and predicts
              Tf outputs (--futures of them a step). In SMT alone, as in the paper
    first     y_t alone, from the memory alone: what the readout will be used for. Only a part is
              decoded (--first), most of it where a cheap guess goes wrong
    heads     the next F targets from every memory, by one linear map (--heads; model.Heads), the
              first as much as all together. They make the guess
    past      the last P inputs from every memory, by another (--past). A gradient that crosses few
              updates cannot say that an old input will be needed; who keeps them all is ready

With --first 0 --heads 0 --past 0 --lambda_fut 1 it is Eq. 2 as in the paper's SMT; in its DMT,
--first 1.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Decoder, Heads, on_device


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean nats over the valid targets of y (...,) with logits (..., V); 0 where every target is
    masked. With V = 1 it is the logit of symbol 1 over that of symbol 0, and there are no others.
    """
    logits, y = logits.flatten(0, -2).float(), y.flatten()
    valid = y >= 0
    # Sum and count instead of torch's mean, which is NaN where every target is masked.
    count = valid.sum().clamp(min=1)
    if logits.shape[1] == 1:  # half the time of two logits
        return F.binary_cross_entropy_with_logits(logits[:, 0], y.float(), weight=valid.float(),
                                                  reduction="sum") / count
    if logits.shape[1] < 16:  # few symbols: a CPU is three times as fast along the rows
        logits, y = logits.T[None], y[None]
    return F.cross_entropy(logits, y, ignore_index=-1, reduction="sum") / count


def futures(x: Tensor, y: Tensor, b: Tensor, t: Tensor, Tf: int) -> tuple[Tensor, Tensor]:
    """What a decoder is given and asked for at time t (N,) of sequence b (N,).

    x, y (B, T) int64 -> x_fut (N, Tf-1) = x_{t+1} .., y_fut (N, Tf) = y_t ..; past the end inputs
    repeat the last one and targets are -1.
    """
    T = x.shape[1]
    when = t[:, None] + torch.arange(Tf, device=x.device)                       # (N, Tf)
    inside = when.clamp(max=T - 1)
    return x[b[:, None], inside[:, 1:]], y[b[:, None], inside].masked_fill(when >= T, -1)


def with_target(y: Tensor) -> Tensor:
    """Times of y (N, T), those with a target first, in order: (N, T) int64."""
    return (y < 0).int().argsort(dim=1, stable=True)


def next_targets(y: Tensor, t: Tensor, n: int) -> Tensor:
    """The n next valid targets of y (N, T) at or after the times t (N, S), -1 where there are no
    more: (N, S, n). In a picture that is y_t .. y_{t+n-1}; in a task that asks once, at the end, it
    is that answer."""
    valid = y >= 0
    passed = (valid.cumsum(1) - valid.long()).gather(1, t)  # how many of them lie before t
    index = passed[..., None] + torch.arange(n, device=y.device)                # (N, S, n)
    inside = index.clamp(max=y.shape[1] - 1).flatten(1)
    found = y.gather(1, with_target(y).gather(1, inside)).view(index.shape)
    return found.masked_fill(index >= valid.sum(1)[:, None, None], -1)


def last_inputs(x: Tensor, t: Tensor, n: int, bos: int) -> Tensor:
    """The n inputs that were read last at the times t (N, S) of x (N, T), newest first: x_t ..
    x_{t-n+1} (N, S, n); -1 for what was before x_0 and for BOS, which in texts comes up again."""
    # Backwards in time the inputs lie side by side, newest first: windows of a padded row.
    back = F.pad(x.masked_fill(x == bos, -1).flip(1), (0, n - 1), value=-1)
    row = torch.arange(len(x), device=x.device)[:, None]
    return back.unfold(1, n, 1)[row, x.shape[1] - 1 - t]


def near_and_far(y: Tensor, t: Tensor, n: int, Tf: int, gen: torch.Generator) -> Tensor:
    """Ours: n of the memories of y (N, T) at consecutive times t (N, S) -> their rows (n,) among
    the N S. A target is drawn, then how many updates before it the memory lies: 1 as often as 2 to
    3, as 4 to 7 .., less than Tf."""
    # Where one target, at the end, hangs on all inputs, the memories just before it must hold most
    # and are learnt last; among all times they are few.
    N, S = t.shape
    b = on_device(torch.randperm(N, generator=gen)[torch.arange(n) % N], y.device)
    which, octave = on_device(torch.rand(2, n, generator=gen), y.device)
    target = with_target(y)[b, (which * (y >= 0).sum(1)[b]).long()]
    before = (Tf ** octave).long().clamp(max=Tf - 1)
    return b * S + (target - before - t[b, 0]).clamp(0, S - 1)


def part(n: int, share: float, gen: torch.Generator, device) -> Tensor | slice:
    """An index of a random part of n rows, at least one; of all of them if share is 1."""
    if share == 1:
        return slice(None)
    return on_device(torch.randperm(n, generator=gen)[:max(1, round(share * n))], device)


def draw(score: Tensor, n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """n rows about in proportion to score (N,) >= 0, hardly one of them twice -> (rows (n,),
    weights (n,)): the mean over them of weight * value estimates the mean of value over all N
    without bias, where score > 0.

    Systematic sampling: one random offset, then even steps through the cumulated scores. It draws
    evenly, always n rows, and asks the device for nothing.
    """
    exact = torch.float32 if score.device.type == "mps" else torch.float64  # Apple's has no more
    share = score.to(exact) + 1e-30  # all zero: no place is special
    # Who would be drawn for sure need not be drawn twice: what is above 1 / n goes to the others;
    # where fewer than n have a score, all of them have the same.
    most = 1 / (score > 0).sum().clamp(1, n).to(exact)
    for _ in range(8):
        share = torch.minimum(share / share.sum(), most)
    share = share / share.sum()
    # an offset in (0, 1] finds a row whose score moves the sum, never one of score 0 at either end
    up_to, offset = share.cumsum(0), 1 - torch.rand((), generator=gen).item()
    even = (torch.arange(n, device=score.device, dtype=exact) + offset) / n
    rows = torch.searchsorted(up_to, even * up_to[-1]).clamp(max=len(score) - 1)  # NaN goes on
    return rows, (1 / (len(score) * share[rows])).float()


def ask_past(heads: Heads, rows: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Nats of the last P inputs at times t (N, S), recalled by every memory of rows (N S, K, d)."""
    return cross_entropy(heads.recall(rows), last_inputs(x, t, heads.P, heads.bos).flatten(0, 1))


def ask_heads(heads: Heads, rows: Tensor, y: Tensor, t: Tensor, share: float,
              gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nats of the next F targets, said by a part `share` of rows (N S, K, d), plus those of the
    very next one, said by all, which counts as much; and the logits of the latter (N S, V)."""
    ahead = next_targets(y, t, heads.F).flatten(0, 1)                           # (N S, F)
    some = part(len(rows), share, gen, rows.device)
    far = heads(rows[some])                                                     # (some, F, V)
    guess = far[:, 0] if share == 1 else heads(rows, 1)[:, 0]                   # (N S, V)
    return cross_entropy(guess, ahead[:, 0]) + cross_entropy(far, ahead[some]), guess


def how_wrong(guess: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Where to look, (N,): 1 - probability of the target (N,) by the heads' logits (N, V), with a
    floor; 0 where there is no target (valid (N,) is 0)."""
    # It says where to look; it shall not teach the heads to be wrong there, hence detach.
    sure = guess.detach().float()
    sure = F.pad(sure, (1, 0)) if sure.shape[1] == 1 else sure      # 0 is the other's logit
    right = sure.softmax(-1).gather(1, target.clamp(min=0)[:, None])
    wrong = (1 - right[:, 0]) * valid
    # a fifth of the mean: it bounds the weights
    return wrong + valid * (0.2 * wrong.sum() / valid.sum().clamp(min=1) + 1e-9)


def ask_first(decoder: Decoder, rows: Tensor, target: Tensor, valid: Tensor, score: Tensor,
              share: float, gen: torch.Generator) -> Tensor:
    """Nats of y_t, decoded from a part `share` of the memories rows (N, K, d) alone."""
    # A pixel of the margin teaches nothing: decode where the guess goes wrong, weigh by how seldom
    # that is, and what is expected stays the mean over all.
    some, scale = draw(score, max(1, round(share * len(rows))), gen)
    logits = decoder(rows[some])[:, 0].float()
    nats = F.cross_entropy(logits, target[some], ignore_index=-1, reduction="none")
    # the mean over all rows becomes that over those with a target
    return (scale * nats).mean() / valid.mean().clamp(min=1e-9)


def ask_futures(decoder: Decoder, rows: Tensor, x: Tensor, y: Tensor, t: Tensor, n: int,
                octaves: bool, gen: torch.Generator) -> Tensor:
    """Nats of whole futures, Eq. 2 as the paper has it, of n memories out of rows (N S, K, d)."""
    Tf = min(decoder.c.fut_len, x.shape[1])
    some = near_and_far(y, t, n, Tf, gen) if octaves else \
        on_device(torch.randperm(len(rows), generator=gen)[:n], rows.device)
    now = t.flatten()[some]
    x_fut, y_fut = futures(x, y, some // t.shape[1], now, Tf)
    return cross_entropy(decoder(rows[some], x_fut, now), y_fut)


def predictive(decoder: Decoder, heads: Heads | None, m: Tensor, t: Tensor, x: Tensor, y: Tensor,
               cfg, gen: torch.Generator, density: float = 1.0) -> dict[str, Tensor]:
    """L_dec, Eq. 2: memories m (N, S, K, d) at times t (N, S) of sequences x, y (N, T) int64 must
    predict. Named scalars; "dec" is their sum, weighed by --lambda_past, _heads and _fut.
    `decoder` is the teacher's, or the RNN's readout. `density` is the part of all times that have a
    target, about (to count them would mean to wait for a GPU).
    """
    out, rows, target = {}, m.flatten(0, 1), y.gather(1, t).flatten()
    valid = (target >= 0).float()
    score = valid                               # where to look: without heads no place is special
    if heads is not None and heads.P:
        out["past"] = ask_past(heads, rows, x, t)
    if heads is not None and heads.F:
        out["heads"], guess = ask_heads(heads, rows, y, t, cfg.heads_part, gen)
        score = how_wrong(guess, target, valid)
    if cfg.first:
        out["first"] = ask_first(decoder, rows, target, valid, score, cfg.first * density, gen)
    if whole := getattr(cfg, "futures", 0):                 # DMT has no such flag
        out["futures"] = ask_futures(decoder, rows, x, y, t, whole, cfg.octaves, gen)
    flag = dict(past="lambda_past", heads="lambda_heads", futures="lambda_fut")  # where cfg has it
    total = sum((getattr(cfg, flag.get(k, ""), 1.0) * v for k, v in out.items()),
                torch.zeros((), device=m.device))
    return dict(dec=total) | out
