"""Table 1, Fig. 6 and the pace: time, memory and layers in a row, of a step, a token, a loss."""
import math
import os
import resource
import statistics
import time
from dataclasses import asdict

import torch

from figures import races, style
from figures.runs import (Job, Lab, argv_of, both, call, curves, last_line, launch, log, say,
                          store, stored, table, train)
from figures.text import LOOKS, MINUTES, TEXT
from console import fail
from model import RNN, UPDATERS, Decoder, ModelConfig, rope

# ------------------------------------------------------------------------------------------ Tab. 1

WAYS = {  # name -> (script, flags, style)
    # one window of 64 tokens is read and 16 are predicted, whatever T is
    "SMT, as the paper": ("smt", dict(
        encoder="bidirectional", ctx_len=64, fut_len=16, times=2, rnn_batch=0, rnn_from=0.0,
        decode_own=False, heads=0, first=0.0, futures=12), "teacher"),
    "SMT, all times": ("smt", dict(rnn_from=0.0, horizon=1), "smt"),
    "SMT, on-policy too": ("smt", dict(rnn_from=0.0), "dmt-span1"),
    "DMT": ("dmt", {}, "dmt"),
    "BPTT": ("bptt", {}, "bptt"),
}
SIZES = {  # of the networks that generate; the plain Transformer has all layers of one RNN step
    "laptop": dict(d_model=64, n_heads=2, mem_tokens=4, rnn_layers=2, dec_layers=2),
    "paper": dict(d_model=256, n_heads=8, head_dim=64, mem_tokens=16, rnn_layers=8, dec_layers=4),
}


def tab1(lab: Lab) -> tuple[str, str]:
    """A training step against T for each method, and a generated token against how many came
    before."""
    lengths = (16, 32) if lab.quick else (64, 128, 256, 512, 1024)
    past = (16, 64) if lab.quick else (1024, 2048, 4096, 8192, 16384)
    if lab.plan:  # no runs to be shared: every step is measured on the spot
        return "", ""

    def measure():
        for T in lengths:
            for name in WAYS:
                yield dict(part="training", name=name, length=T) | training_step(lab, name, T)
        for size in lab.few(SIZES):
            # at the paper's sizes MLP and GRU would have hundreds of millions of parameters
            updaters = UPDATERS if size == "laptop" else ("transformer",)
            for name in (*updaters, "KV cache"):
                for T, seconds, kib in token_costs(name, SIZES[size], past, 8 if lab.quick else 48):
                    yield dict(part=f"token, {size} sizes", name=name, length=T, ms=seconds * 1e3,
                               mib=kib / 1024)

    rows, paper = table(lab, measure), "SMT, as the paper"
    kinds = [k for k in dict.fromkeys(r["part"] for r in rows) if k != "training"]
    draw_costs(rows, kinds, lab.out("tab1.png"))
    first = lambda part, name: [r["ms"] for r in rows if (r["part"], r["name"]) == (part, name)]
    grows = {name: first(kinds[-1], name)[-1] / first(kinds[-1], name)[0]
             for name in ("transformer", "KV cache")}
    ms, mib = ({name: [r[key] for r in rows if r["name"] == name] for name in WAYS}
               for key in ("ms", "mib"))
    flat = all(of[paper][-1] < 1.5 * of[paper][0] for of in (ms, mib))
    Ts = [r["length"] for r in rows if r["name"] == paper]
    from_to = lambda of, name: f"{of[name][0]:.0f} to {of[name][-1]:.0f}"
    return f"from {past[0]} to {past[-1]} tokens a new one costs the RNN " \
        f"{grows['transformer']:.1f} times as much, a Transformer with a cache " \
        f"{grows['KV cache']:.1f} times; T = {Ts[0]} to {Ts[-1]}, a step of the " \
        f"paper's SMT: {from_to(ms, paper)} ms and {from_to(mib, paper)} MiB, one that learns " \
        f"from all times {from_to(mib, 'SMT, all times')} MiB, BPTT's {from_to(ms, 'BPTT')} ms " \
        f"and {from_to(mib, 'BPTT')} MiB", \
        "agrees" if flat and grows["KV cache"] > 2 * grows["transformer"] else "open"


def draw_costs(rows: list[dict], kinds: list[str], path: str) -> None:
    """Training in the upper row; in the lower one tokens, at the first and the last of the sizes
    (kinds)."""
    fig, axes = style.panels(3, "T", rows=2, height=2.9)
    for ax, key, unit in zip(axes[0], ("ms", "mib", "layers"),
                             ("ms a step", "MiB, whole process", "layers in a row, a step")):
        for name, (_, _, method) in WAYS.items():
            at = [(r["length"], r[key]) for r in rows if r["name"] == name and key in r]
            # dashes: of two lines that lie on each other both are seen
            dash = {"SMT, as the paper": ":", "BPTT": "--"}.get(name, "-")
            ax.loglog(*zip(*at), **style.of(method) | dict(label=name, ls=dash))
        ax.set(ylabel=unit, title="training", xticks=[r["length"] for r in rows if
                                                      r["name"] == "BPTT"])
    for ax, key, part, unit in zip(axes[1], ("ms", "ms", "mib"), (kinds[0], kinds[-1], kinds[-1]),
                                   ("ms a token", "ms a token", "MiB of state a sequence")):
        for i, name in enumerate((*UPDATERS, "KV cache")):
            at = [(r["length"], r[key]) for r in rows if (r["name"], r["part"]) == (name, part)]
            if at:
                # other colours than the methods' above
                ax.loglog(*zip(*at), marker="osDX"[i], color=style.COLOURS[(6, 8, 9, 3)[i]],
                          label="Transformer, KV cache" if name == "KV cache" else f"RNN, {name}")
        ax.set(ylabel=unit, xlabel="tokens before", title=part, xticks=[v for v, _ in at])
    for ax in axes.flat:
        style.plain_log(ax)
        ax.set_xticks(ax.get_xticks(), labels=[f"{v:g}" if v < 1024 else f"{v / 1024:g}k"
                                               for v in ax.get_xticks()])
        ax.minorticks_off()
    for ax in (axes[0][0], axes[1][0]):
        ax.set_ylim(None, 6 * ax.get_ylim()[1])  # for the legend
        ax.legend()
    style.save(fig, path)


def training_step(lab: Lab, name: str, T: int) -> dict:
    """ms, peak MiB of the process and sequential layers of one step of the shipped script, in a
    short run on windows of T bytes: the median of its last steps, whose rollouts have their full
    length."""
    script, flags, _ = WAYS[name]
    few = 2 if lab.quick else 12
    named = lambda way: f"tab1-{way.replace(',', '').replace(' ', '-')}-{T}"
    job = Job(named(name), script, 0, flags | dict(
        steps=10, batch_size=few, log_every=1, eval_every=0, n_val=1, ckpt_every=0))
    if script == "dmt":
        job.after = named("SMT, on-policy too")
    else:
        toy = dict(d_model=16, n_heads=2, ctx_len=8, fut_len=8) if lab.quick else {}
        job.flags |= dict(dataset="pydoc", length=T) | toy
    known = not lab.quick and stored(lab, job.name, "step.json")
    if known and known["job"] == asdict(job):
        return known["step"]  # measured before the table was cut off
    os.makedirs(lab.folder(job.name), exist_ok=True)
    said = os.path.join(lab.folder(job.name), "out.txt")
    if lab.quick:
        call(lab, script, argv_of(lab, job, False), said)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    else:
        process = launch(lab, script, argv_of(lab, job, False), said)
        _, code, usage = os.wait4(process.pid, 0)   # the only way to ask for one child's memory
        if code:
            fail(f"{job.name}: {last_line(said)}")
        peak = usage.ru_maxrss
        say(f"tab1 | {name}, T = {T}")
    rows = log(lab, job.name)
    ends = [r["seconds"] for r in rows[-4:]]
    step = dict(ms=1e3 * statistics.median(b - a for a, b in zip(ends, ends[1:])), mib=peak / 1024,
                layers=rows[-1]["layers"] - rows[-2]["layers"])
    store(lab, job.name, "step.json", dict(job=asdict(job), step=step))
    return step


@torch.no_grad()
def cached_logits(decoder: Decoder, x: torch.Tensor, t: int, cache: list) -> torch.Tensor:
    """A plain Transformer reads token x (B,) at position t: logits (B, V). cache holds keys and
    values (B, H, T, hd) of every block, filled up to t."""
    h = decoder.event(x, torch.full_like(x, t))[:, None]
    angles = rope(torch.tensor([t]), decoder.blocks[0].hd)
    for block, (keys, values) in zip(decoder.blocks, cache):
        q, keys[:, :, t:t + 1], values[:, :, t:t + 1] = block.qkv(h, angles)
        h = block.mix(h, q, keys[:, :, :t + 1], values[:, :, :t + 1])
    return decoder.head(torch.nn.functional.rms_norm(h, h.shape[-1:]))[:, 0]


def empty_cache(c: ModelConfig, layers: int, T: int, n: int = 1) -> list:
    """Keys and values for T tokens of n sequences."""
    shape = (n, c.n_heads, T, c.head_dim or c.d_model // c.n_heads)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)]


@torch.no_grad()
def token_costs(name: str, sizes: dict, past: tuple, repeats: int):
    """(T, seconds a token after T others, KiB of state) for one sequence on one thread; the median
    over repeats, of processor time. An RNN has nothing that depends on T, and is timed again all
    the same."""
    layers = sizes["rnn_layers"] + sizes["dec_layers"]
    c = ModelConfig(vocab=257, n_out=256, T=max(past) + 1, timestamps="none", heads=0,
                    **sizes | (dict(dec_layers=layers) if name == "KV cache" else dict(rnn=name)))
    net = Decoder(c) if name == "KV cache" else RNN(c)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.zeros(1, dtype=torch.int64)
    for T in past:
        if name == "KV cache":
            cache = empty_cache(c, layers, T + 1)
            step = lambda: cached_logits(net, x, T, cache)
            state = sum(k.numel() + v.numel() for k, v in cache)
        else:
            m = net.start(1).clone()
            step = lambda: net.logits(net.update(m, x, x))
            state = m.numel()
        spent = []
        for _ in range(repeats):
            began = time.process_time()
            step()
            spent.append(time.process_time() - began)
        yield T, sorted(spent[2:])[len(spent[2:]) // 2], state * 4 / 1024
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------ Fig. 6

def fig6(lab: Lab) -> tuple[str, str]:
    """The RNN's validation loss against minutes, tokens and sequential layers, from the logs of
    race14 and of the same runs on TinyStories."""
    jobs = []
    updaters = ("gru",) if lab.quick else races.UPDATERS
    for rnn in updaters:
        f = TEXT | dict(rnn=rnn)
        jobs += both(f"text-{rnn}", f, MINUTES, dmt=LOOKS) + \
            [Job(f"text-{rnn}-bptt-0", "bptt", sum(MINUTES), f | dict(eval_every=25, seed=0))]
    jobs += races.race_jobs("race14", (0,), updaters, extra=False)
    jobs += [job for job in races.race_jobs("race14", (0,), updaters) if "-bptt-heads-" in job.name]

    rows = table(lab, lambda: curves(lab, jobs, train(lab, jobs)))
    fig, axes = style.panels(3, rows=2, height=3.2, sharey="row")
    # above the highest of these the RNN of SMT has hardly begun
    for row, (race, unit, most) in zip(axes, (("text", "TinyStories: nats per character", 6),
                                              ("race14", "MNIST 14×14: nats per image", 60))):
        row[0].set(ylabel=unit)
        for ax, key in zip(row, ("minutes", "tokens", "layers")):
            for rnn, dash in zip(races.UPDATERS, ("-", "--", ":")):
                for method in ("bptt", "bptt-heads", "smt", "dmt"):
                    at = [(r[key], r["nats"]) for r in rows
                          if (r["task"], r["rnn"], r["method"]) == (race, rnn, method)]
                    how = style.of(method)
                    if at:
                        ax.plot(*zip(*at), ms=3, **how | dict(
                            ls=dash, label=f"{how['label']}, {rnn}"))
            ax.set(xlabel={"layers": "layers in a row"}.get(key, key), yscale="log",
                   xscale="linear" if key == "minutes" else "log", ylim=(None, most))
            style.plain_log(ax)
    fig.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
               handlelength=4, title="SMT teaches its RNN in the second half of its minutes only")
    style.save(fig, lab.out("fig6.png"))
    return cheapest(rows)


def cheapest(rows: list[dict]) -> tuple[str, str]:
    """Layers in a row that BPTT and SMT -> DMT need for the worse of their two best losses."""
    told, less = [], []
    for task in dict.fromkeys(r["task"] for r in rows):
        both_ = {m: [r for r in rows if r["task"] == task and
                     r["method"].startswith("bptt") == (m == "bptt")] for m in ("bptt", "ours")}
        level = max(min(r["nats"] for r in part) for part in both_.values())
        need = {m: min(r["layers"] for r in part if r["nats"] <= level)
                for m, part in both_.items()}
        told.append(f"{task}: {need['ours'] / 1e3:.0f}k, BPTT {need['bptt'] / 1e3:.0f}k")
        less.append(need["ours"] < need["bptt"])
    return "layers in a row to the same loss, " + "; ".join(told), \
        "agrees" if all(less) else "open" if any(less) else "disagrees"


# ------------------------------------------------------------------------------------------ pace

# The paper preset at the laptop's sizes; rates are as much larger as small networks want them, and
# decay and averaging are ours, which help it. One update in 16 has a label, as in the paper.
PAPERS_WAY = dict(
    preset="paper", dataset="mnist", levels=2, image_size=14, rnn="gru", n_val=16, ema=0.99,
    batch_size=24, micro=1, d_model=64, n_heads=2, head_dim=0, mem_tokens=4, mem_dim=0,
    enc_layers=2, dec_layers=2, lr=1e-3, warmup=50, eval_every=250)


def pace(lab: Lab) -> tuple[str, str]:
    """Ours: the loss of the RNN alone against minutes, the paper's way and race14's GRU."""
    jobs = both("paper-gru", PAPERS_WAY, (3.0, 3.0), dmt=dict(
        preset="paper", batch_size=24, spans=292, lr=1e-4, ema=0.99, n_val=16, eval_every=20))
    jobs += races.race_jobs("race14", (0,), ("gru",), extra=False)

    rows = table(lab, lambda: curves(lab, jobs, train(lab, jobs)))
    fig, axes = style.panels(1, "minutes of one core", "nats per validation image", height=4.0)
    for task, how in (("paper", "the paper's way"), ("race14", "this project")):
        for method in ("bptt", "smt", "dmt"):
            at = [(r["minutes"], r["nats"]) for r in rows if (r["task"], r["method"]) ==
                  (task, method)]
            name = style.METHODS[method][0]
            if at:
                axes[0].semilogy(*zip(*at), ls=":" if task == "paper" else "-", **style.of(method) |
                                 dict(label=name if method == "bptt" else f"{name}, {how}"))
    style.plain_log(axes[0])
    axes[0].legend()
    style.save(fig, lab.out("pace.png"))
    best = min((r for r in rows if r["task"] == "paper"), key=lambda r: r["nats"])
    ours = [r for r in rows if r["task"] == "race14" and r["method"] != "bptt"]
    when = min((r["minutes"] for r in ours if r["nats"] <= best["nats"]), default=math.inf)
    return f"the paper's way: {best['nats']:.1f} nats after {best['minutes']:.1f} minutes, ours " \
        f"after {when:.1f}, and in the end {min(r['nats'] for r in ours):.1f}", "open"
