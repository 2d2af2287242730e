"""What the paper leaves open: rollouts in parallel, spans between DMT and BPTT, whether SMT
pretrains, who needs a clock, and a table of records."""
import os
from dataclasses import replace

import torch

from console import fail
from figures import races, style, tasks
from figures.nets import opened
from figures.runs import Job, Lab, both, log, read_csv, scores, table, train

RNN = "gru"


def sweeps(lab: Lab) -> tuple[str, str]:
    """Apply the update to all times at once, again and again, from the encoder's memories: after j
    sweeps every memory is a rollout of j steps, after T - 1 the exact one. How many suffice?"""
    jobs = [job for job in races.race_jobs("race14", (0,), (RNN,), extra=False)
            if job.script != "bptt"]

    def measure():
        for name in train(lab, jobs):
            method = "dmt" if "-dmt-" in name else "smt"
            for j, error in enumerate(sweep_errors(lab, name, 2 if lab.quick else 16)):
                yield dict(method=method, sweeps=j, error=error)

    rows = table(lab, measure)
    fig, axes = style.panels(1, "sweeps over all times at once",
                             "square distance to the rollout / variance", height=3.6)
    need = {}
    for method in ("smt", "dmt"):
        errors = [max(r["error"], 1e-14) for r in rows if r["method"] == method]
        axes[0].semilogy(errors, **style.of(method) | dict(marker=""))
        need[method] = next(j for j, e in enumerate(errors) if e < 1e-3)
    axes[0].axhline(1e-3, color="0.6", lw=1, ls=":")
    axes[0].legend()
    style.save(fig, lab.out("sweeps.png"))
    T = max(r["sweeps"] for r in rows) + 1
    return f"error below 0.1 % of the variance after {need['smt']} sweeps (SMT) and " \
        f"{need['dmt']} (DMT) of {T - 1}", "open"


@torch.no_grad()
def sweep_errors(lab: Lab, name: str, n: int) -> list[float]:
    """Mean square distance to the exact rollout after 0, 1, .. T - 1 sweeps, in units of the
    memories' variance."""
    task, encoder, rnn = opened(lab, name, "encoder", "rnn")
    x, t = task.held_out("val", n)["x"], torch.arange(1, task.T)
    m, exact, out = encoder(x), rnn.memories(x), []
    m[:, 0] = exact[:, 0]
    variance = m.flatten(0, 1).var(0).mean().clamp(min=1e-8)
    for j in range(task.T):
        out.append(float((m - exact).square().mean() / variance))
        m[:, j + 1:] = rnn.update(m[:, j:-1], x[:, j + 1:], t[j:]) if j + 1 < task.T else 0
    return out


def spans(lab: Lab) -> tuple[str, str]:
    """One curve from DMT as in the paper, whose gradient crosses one update, to BPTT, whose
    gradient crosses all: the same SMT, then the same minutes with growing spans."""
    of = {job.name.removeprefix(f"race14-{RNN}-")[:-2]: job
          for job in races.race_jobs("race14", (0,), (RNN,))}
    jobs, dmt = [of["smt"], of["smt+bptt"], of["bptt"]], of["dmt"]
    curve = {1: of["dmt-span1"], 16: dmt} | {
        s: Job(f"spans-{RNN}-{s}-0", "dmt", dmt.minutes,
               dmt.flags | dict(span=s, batch_size=2048 // s), dmt.after)
        for s in lab.few((4, 32, 64, 195))}

    def measure():
        done = train(lab, jobs + list(curve.values()))
        got = scores(lab, done, 1000)
        for span, job in curve.items():
            if s := got.get(job.name):
                yield dict(method="dmt", span=span, nats=s["rollout"], stderr=s["stderr"],
                           drift=s["drift"], steps=log(lab, job.name)[-1]["step"])
        for job in jobs:
            if s := got.get(job.name):
                yield dict(method=job.name.split("-")[2], nats=s["rollout"], stderr=s["stderr"])

    rows = table(lab, measure)
    mine = sorted((r for r in rows if "span" in r), key=lambda r: r["span"])
    fig, axes = style.panels(1, "updates that a gradient crosses", "nats per test image",
                             height=3.6)
    axes[0].errorbar([r["span"] for r in mine], [r["nats"] for r in mine],
                     yerr=[r["stderr"] for r in mine], capsize=2, **style.of("dmt"))
    for r in rows:
        if r["method"] in ("bptt", "smt+bptt"):  # SMT alone, far above, is in the CSV
            how = style.of(r["method"])
            axes[0].axhline(r["nats"], color=how["color"], ls="--", label=how["label"])
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks([r["span"] for r in mine], labels=[r["span"] for r in mine])
    axes[0].legend()
    style.save(fig, lab.out("spans.png"))
    return "nats per image by span: " + ", ".join(f"{r['span']}: {r['nats']:.1f}" for r in mine), \
        "open"


def pretrain_runs(seeds: tuple) -> dict:
    """(task, updater, method, seed, rate) -> job. MNIST: race14's runs, and plain BPTT after half
    of the minutes of SMT and DMT, or of the walk, which is DMT without SMT and labels; permutation,
    divided alike, each method of BPTT at two rates."""
    jobs = {("mnist", rnn, method, seed, None):
            races.race_job("race14", races.RACES["race14"], rnn, method, seed)
            for seed in seeds for rnn in races.UPDATERS
            for method in ("new", "half-walk", "walk+bptt")}
    for job in races.race_jobs("race14", seeds):
        rnn, method = job.name.removeprefix("race14-").rsplit("-", 1)[0].split("-", 1)
        if method in ("bptt", "smt", "smt+bptt", "half"):
            jobs["mnist", rnn, method, job.flags["seed"], None] = job
        elif method == "smt+dmt+bptt":  # there with heads; here as BPTT alone has it
            plain = {k: v for k, v in job.flags.items() if k not in races.CHEAP}
            jobs["mnist", rnn, method, job.flags["seed"], None] = \
                replace(job, name=job.name.replace("race14", "pretrain"), flags=plain)
    for seed in seeds:
        smt, _, _, *alone = tasks.runs_of("permutation", tasks.OTHERS["permutation"], seed)
        half = Job(f"permutation-half-{seed}", "dmt", alone[0].minutes / 2 - smt.minutes,
                   dict(seed=seed), smt.name)
        for method, job in ("smt", smt), ("half", half):
            jobs["permutation", RNN, method, seed, None] = job
        for job in alone:
            lr, minutes = job.flags["lr"], job.minutes
            jobs["permutation", RNN, "bptt", seed, lr] = job
            jobs["permutation", RNN, "smt+bptt", seed, lr] = Job(
                f"permutation-smt+bptt-{lr:g}-{seed}", "bptt", minutes - smt.minutes,
                dict(lr=lr, seed=seed), smt.name)
            jobs["permutation", RNN, "smt+dmt+bptt", seed, lr / 4] = Job(  # race14's quarter, too
                f"permutation-smt+dmt+bptt-{lr / 4:g}-{seed}", "bptt", minutes / 2,
                dict(lr=lr / 4, seed=seed), half.name)
    return jobs


def pretrain(lab: Lab) -> tuple[str, str]:
    """What the paper's title says: BPTT that goes on from SMT, or from SMT and DMT, against BPTT
    alone, in the same minutes, all by the loss that everyone's BPTT has; and, which counts for
    nothing, after the walk. Where there are two rates, the better one counts."""
    jobs = pretrain_runs(lab.seeds or ((0,) if lab.quick else (0, 1)))

    def measure():
        done = [name for name in train(lab, list(jobs.values())) if "bptt" in name]
        got = scores(lab, [n for n in done if not n.startswith("permutation")], 2000, "val") | \
            scores(lab, [n for n in done if n.startswith("permutation")], 1000)
        for (task, rnn, method, seed, lr), job in jobs.items():
            if s := got.get(job.name):
                yield dict(task=task, rnn=rnn, seed=seed, method=method, lr=lr, stderr=s["stderr"],
                           nats=s["excess"] if task == "permutation" else s["rollout"])

    best = {}  # of two rates
    for r in sorted(table(lab, measure), key=lambda r: -r["nats"]):
        best[r["task"], r["rnn"], r["seed"], r["method"]] = r
    draw_pretrained(best, lab.out("pretrain.png"))
    told, won = [], []
    for method in ("smt+bptt", "smt+dmt+bptt", "walk+bptt"):
        pairs = [(r["nats"], best[(*cell, "bptt")]["nats"]) for (*cell, how), r in best.items()
                 if how == method and (*cell, "bptt") in best]
        if pairs:
            if "smt" in method:
                won.append(sum(a < b for a, b in pairs) / len(pairs))
            told.append(f"{style.METHODS[method][0]} is better than BPTT in "
                        f"{sum(a < b for a, b in pairs)} of {len(pairs)} cells")
    if not won:  # some of its runs, and no two of a cell
        return "nothing to compare yet", "open"
    return ", ".join(told), "agrees" if min(won) == 1 else "open" if max(won) > 0.5 else "disagrees"


def draw_pretrained(best: dict, path: str) -> None:
    """(task, updater, seed, method) -> row: MNIST on the left, permutation on the right."""
    fig, axes = style.panels(2, y="nats per validation image", height=3.4, width_ratios=(3, 1))
    for i, ax in enumerate(axes):
        for k, method in enumerate(("bptt", "smt+bptt", "smt+dmt+bptt", "walk+bptt")):
            at = [(races.UPDATERS.index(rnn) + 0.16 * k + 0.06 * seed, r)
                  for (task, rnn, seed, how), r in best.items()
                  if how == method and (task == "permutation") == i]
            if at:
                ax.errorbar([x for x, _ in at], [r["nats"] for _, r in at],
                            yerr=[r["stderr"] for _, r in at], ls="", **style.of(method))
    axes[0].set(title="MNIST 14×14", xticks=range(3), xlim=(-0.4, 2.9))
    axes[0].set_xticklabels(["Transformer", "MLP", "GRU"])
    axes[1].set(title="permutation", ylabel="nats over the optimum", yscale="log",
                xticks=[2], xlim=(1.7, 2.5))
    axes[1].set_xticklabels(["GRU"])
    axes[0].legend()
    style.save(fig, path)


def clock_runs(lab: Lab) -> dict:
    """(updater, who is told the time, seed) -> SMT, DMT and BPTT."""
    jobs, seeds = {}, lab.seeds or ((0,) if lab.quick else (0, 1))
    few = races.RACES["race14"]["flags"]["smt"]
    for rnn in lab.few(races.UPDATERS):
        for told in ("all", "encoder", "none"):
            for seed in seeds:
                f = few | dict(rnn=rnn, timestamps=told)
                jobs[rnn, told, seed] = both(f"clock-{told}-{rnn}", f, (0.5, 1.5), seed,
                                            dmt=dict(n_val=few["n_val"]))
                if told != "encoder":  # BPTT has no encoder
                    jobs[rnn, told, seed].append(
                        Job(f"clock-{told}-{rnn}-bptt-{seed}", "bptt", 2.0, f | dict(seed=seed)))
    return jobs


def clock(lab: Lab) -> tuple[str, str]:
    """MNIST 14x14 with timestamps for all networks, for the encoder alone, for none."""
    jobs = clock_runs(lab)

    def measure():
        got = scores(lab, train(lab, sum(jobs.values(), [])), 1000)
        for (rnn, told, seed), runs in jobs.items():
            for job in runs:
                if s := got.get(job.name):
                    yield dict(rnn=rnn, timestamps=told, method=job.script, seed=seed,
                               nats=s["rollout"], stderr=s["stderr"], drift=s["drift"],
                               steps=log(lab, job.name)[-1]["step"])

    rows, told = table(lab, measure), ("all", "encoder", "none")
    means = {}
    fig, axes = style.panels(3, "who is told the time", "nats per test image", height=3.0,
                             sharey=True)
    for ax, rnn in zip(axes, races.UPDATERS):
        for method in ("smt", "dmt", "bptt"):
            at = [(told.index(r["timestamps"]), r["nats"]) for r in rows
                  if (r["rnn"], r["method"]) == (rnn, method)]
            if at and method != "smt":  # SMT alone is far above: in the CSV
                aside = 0.08 if method == "dmt" else -0.08
                ax.plot(*zip(*((i + aside, nats) for i, nats in at)),
                        **style.of(method) | dict(ls=""))
            for i, nats in at:
                means.setdefault((method, told[i]), []).append(nats)
        ax.set(title=rnn, xticks=range(3), xlim=(-0.4, 2.4))
        ax.set_xticklabels(told)
    axes[0].legend()
    style.save(fig, lab.out("clock.png"))
    mean = {k: sum(v) / len(v) for k, v in means.items()}
    return "mean over updaters, nats per image: " + ", ".join(
        f"{style.METHODS[m][0]} {t} {v:.1f}" for (m, t), v in mean.items()), "open"


# Test nats of binarised 28x28 MNIST, as published; static stochastic binarisation but for the last.
LADDER = {"NADE": 88.3, "EoNADE": 85.1, "DARN": 84.1, "PixelCNN": 81.3, "PixelRNN": 79.2,
          "LMConv": 77.6}


def records(lab: Lab) -> tuple[str, str]:
    """Our best runs of 28x28 beside the public ladder: from the CSV of race28, which must be
    there."""
    source = os.path.join(lab.results, "backbones", "race28.csv")
    if lab.plan:
        return "", ""

    def measure():
        if not os.path.exists(source):
            fail(f"{source}: missing; make it with python reproduce.py race28")
        for r in read_csv(source):
            if r["method"] in ("bptt", "bptt-heads", "dmt", "smt+bptt",
                               "smt+dmt+bptt"):
                yield dict(name=f"{style.METHODS[r['method']][0]}, {r['rnn']}",
                           nats=r["test_rollout"], stderr=r["test_stderr"], n=r["test_n"],
                           minutes=r["minutes"])
        for name, nats in LADDER.items():
            yield dict(name=name, nats=nats, stderr=0.0)

    rows = sorted(table(lab, measure), key=lambda r: -r["nats"])
    fig, axes = style.panels(1, "nats per image", height=0.6 + 0.24 * len(rows))
    for i, r in enumerate(rows):
        axes[0].errorbar(r["nats"], i, xerr=r["stderr"], marker="o", capsize=2,
                         color=style.COLOURS[0] if "n" in r else "0.5")
        axes[0].text(r["nats"] + r["stderr"], i, f"   {r['nats']:.1f}", va="center", fontsize=8)
    axes[0].margins(x=0.12)  # for the numbers
    axes[0].set_yticks(range(len(rows)), labels=[r["name"] for r in rows])
    axes[0].set_title("28×28 MNIST, test images: ours (blue; our own Bernoulli draw) and published "
                      "(grey)", fontsize=9)
    style.save(fig, lab.out("records.png"))
    best = min((r for r in rows if "n" in r), key=lambda r: r["nats"])
    return f"{best['name']}: {best['nats']:.1f} ± {best['stderr']:.1f} nats in " \
        f"{best['minutes']:g} minutes of one core (PixelRNN 79.2)", "open"
