"""Figures 3 and 13, and tables of the rest: the synthetic tasks."""
import math

import numpy as np

import data
from figures import style
from figures.runs import SMT_SHARE, Job, Lab, both, looks, scores, table, train
from presets import recipe

UPDATER = dict(rnn="gru")  # the one that BPTT does best with; the paper's is the Transformer
# task -> the flag on the paper's axis, three values of it, the rest of the task
TASKS = {
    "retrieval": ("length", (32, 64, 128), {}),
    "copy": ("length", (9, 17, 33), {}),
    "recall": ("keys", (2, 4, 8), dict(key_len=1)),
    "modular": ("examples", (4, 8, 16), {}),
    "stack": ("depth", (2, 5, 10), {}),
}
# BPTT is run at two rates, and the better one counts, point by point: no rate suits all tasks
RATES = {("gru", "retrieval"): (2e-3, 1e-2), ("gru", "modular"): (5e-3, 1e-2)}
MINUTES = 3.0
# SMT's part of them, the races'; in recall, where DMT lives on its start, twice as much (seed 7,
# four pairs: 0.018 nats over the optimum with an eighth, 8e-4 with a quarter)
SHARE = dict(recall=2 * SMT_SHARE)
REACH = {64: 2.0, 128: 3.0, 256: 5.0, 512: 8.0, 1024: 8.0}  # T -> minutes of each method
AXES = dict(length="T", keys="pairs", examples="examples", depth="depth")

OTHERS = {
    "recency": dict(dataset="recency"),
    "primacy": dict(dataset="primacy"),
    "recall, all pairs": dict(dataset="recall", variant="ours", keys=8),
    "retrieval, noise 0.3": dict(dataset="retrieval", length=32, noise=0.3),
    "permutation": dict(dataset="permutation", length=32),
}
# the middle one of figure 3's difficulties with the paper's updater
TRANSFORMER = {f"{task}, {values[1]}": dict(dataset=task, rnn="transformer") | {axis: values[1]} |
               rest for task, (axis, values, rest) in TASKS.items()}


def runs_of(name: str, flags: dict, seed: int) -> list[Job]:
    """SMT, DMT, BPTT with heads that guess the next targets, as SMT and DMT have them, and BPTT at
    each of its rates; BPTT has as many minutes as the first two together."""
    task, flags = flags["dataset"], UPDATER | flags
    rates = RATES.get((flags["rnn"], task), (2e-3, 5e-3))
    share = SHARE.get(task, SMT_SHARE)
    decoded = recipe("dmt", "laptop", data.kinds(task, flags["rnn"]))["first"]
    return both(name, flags, (MINUTES * share, MINUTES * (1 - share)), seed) + \
        [Job(f"{name}-bptt-heads-{seed}", "bptt", MINUTES,
             flags | dict(lr=max(rates), lambda_heads=1.0, first=decoded, seed=seed))] + \
        [Job(f"{name}-bptt-{lr:g}-{seed}", "bptt", MINUTES, flags | dict(lr=lr, seed=seed))
         for lr in rates]


def compared(lab: Lab, jobs: dict):
    """Trains {key: runs_of(..)} and yields (key, a row of numbers) for each run that has
    finished."""
    got = scores(lab, train(lab, sum(jobs.values(), [])), 1000)
    for key, runs in jobs.items():
        for job in runs:
            if s := got.get(job.name):
                method = "bptt-heads" if "lambda_heads" in job.flags else job.script
                yield key, dict(method=method, lr=job.flags.get("lr"), excess=s["excess"],
                                stderr=s["excess_stderr"],
                                late_excess=(s["late_excess"] or {}).get("rollout"),
                                teacher=s["excess_all"]["teacher"],
                                accuracy=(s["accuracy"] or {}).get("rollout"), bayes=s["bayes"])


def counted(rows: list[dict]) -> list[dict]:
    """Without the worse of BPTT's rates."""
    best = {}
    for r in sorted(rows, key=lambda r: -r["excess"]):  # the last one stays
        best[r["task"], r.get("value"), r["seed"], r["method"]] = r
    return [r for r in rows if any(r is b for b in best.values())]


def fig3(lab: Lab) -> tuple[str, str]:
    """Nats over the Bayes optimum on five tasks at three difficulties each, equal minutes."""
    jobs = {}
    for task, (axis, values, rest) in TASKS.items():
        for value in lab.few(values):
            for seed in lab.seeds or ((0,) if lab.quick else (0, 1)):
                jobs[task, value, seed] = runs_of(f"{task}-{value}",
                                                  dict(dataset=task) | {axis: value} | rest, seed)

    def measure():
        for (task, value, seed), row in compared(lab, jobs):
            yield dict(task=task, value=value, seed=seed) | row

    rows = counted(table(lab, measure))
    fig, axes = style.panels(5, rows=1, y="nats over the Bayes optimum (least: 1e-6)", height=3.4)
    for ax, (task, (axis, _, _)) in zip(axes, TASKS.items()):
        for method in ("bptt", "bptt-heads", "teacher", "dmt"):
            key, source = ("teacher", "dmt") if method == "teacher" else ("excess", method)
            at = {}
            for r in rows:
                if (r["task"], r["method"]) == (task, source):
                    # a seed says as much of others as its standard error over sequences
                    error = r["stderr"] if method != "teacher" else 0.0
                    at.setdefault(r["value"], []).extend(
                        max(r[key] + e, 1e-6) for e in (-error, 0.0, error))
            if not at:
                continue
            middle = [np.mean(v[1::3]) for v in at.values()]
            bars = [[abs(f(v) - m) for v, m in zip(at.values(), middle)] for f in (min, max)]
            ax.errorbar([*at], middle, yerr=bars, capsize=2, **style.of(method))
        ax.set(title=task, xlabel=AXES[axis], xscale="log", yscale="log", ylim=(5e-7, 10))
        ax.set_xticks([*at], labels=map(str, at))
        ax.minorticks_off()
    axes[3].legend(loc="lower left")  # where no curve is
    style.save(fig, lab.out("fig3.png"))
    return against_bptt(rows)


def judged(rows: list[dict]) -> tuple[str, str]:
    """At how many points SMT -> DMT is nearer to the optimum than BPTT, with heads or without, in
    the mean over seeds. Where both are within 0.001 nats of it the task is solved, and what is
    within two standard errors, over test sequences and seeds, is a tie: nobody wins."""
    points, count = {}, dict(nearer=0, lost=0, solved=0, tie=0)
    for r in rows:
        points.setdefault((r["task"], r.get("value")), {}).setdefault(r["method"], []).append(r)
    for at in points.values():
        mean = {m: np.mean([r["excess"] for r in of]) for m, of in at.items()}
        rival = min(("bptt", "bptt-heads"), key=lambda m: mean.get(m, math.inf))
        if "dmt" in at and rival in at:
            dmt, bptt = mean["dmt"], mean[rival]
            error = math.hypot(*(r["stderr"] / len(at[m]) for m in ("dmt", rival) for r in at[m]),
                               *(np.std([r["excess"] for r in at[m]], ddof=1) / len(at[m]) ** 0.5
                                 for m in ("dmt", rival) if len(at[m]) > 1))
            count["solved" if max(dmt, bptt) < 1e-3 else "tie" if abs(dmt - bptt) <= 2 * error else
                  "nearer" if dmt < bptt else "lost"] += 1
    return f"at {count['nearer']} of {sum(count.values())} points, BPTT at {count['lost']}, a " \
        f"tie at {count['tie']}, solved by both {count['solved']}", \
        "agrees" if count["nearer"] and not count["lost"] else \
        "open" if count["nearer"] else "disagrees"


def against_bptt(rows: list[dict]) -> tuple[str, str]:
    """Against BPTT as the paper has it, whose verdict counts, and against the better of it and BPTT
    with heads."""
    plain, verdict = judged([r for r in rows if r["method"] != "bptt-heads"])
    return f"SMT → DMT is nearer to the optimum than BPTT {plain}; than the better of BPTT and " \
        f"BPTT + heads {judged(rows)[0]}", verdict


def reach_runs(T: int, rnn: str) -> list[Job]:
    """SMT, DMT and BPTT on retrieval, and with the GRU BPTT with heads, which ask every memory for
    the answer, as SMT and DMT do. Sequences of T, T/2, T/4 .. down to 8 for SMT and BPTT. The GRU's
    BPTT has its better rate, that of figure 3; for the others nobody knows it."""
    minutes, name = REACH[T], f"reach-{T}" if rnn == "gru" else f"reach-{rnn}-{T}"
    flags = dict(dataset="retrieval", length=T, shortest=8, n_val=50, rnn=rnn)
    rates = RATES["gru", "retrieval"]
    rates = rates[1:] if rnn == "gru" else rates
    jobs = both(name, flags | dict(batch_size=16, heads=1, futures=1),
                (0.1 * minutes, 0.9 * minutes), dmt=dict(n_val=50, eval_every=200))
    for lr in rates:
        # long steps: looked at as often, by the clock
        bptt = flags | dict(eval_every=max(10, 6400 // T), lr=lr, seed=0)
        jobs += [Job(f"{name}-bptt{f'-{lr:g}' * (len(rates) > 1)}-0", "bptt", minutes, bptt)]
    if rnn == "gru":
        jobs += [Job(f"{name}-bptt-heads-0", "bptt", minutes,
                     bptt | dict(heads=1, lambda_heads=1.0))]
    return jobs


def reach(lab: Lab) -> tuple[str, str]:
    """Minutes until the RNN alone is within 0.01 nats of the optimum of retrieval: to T = 1024 with
    the GRU, to 128 with the others, whose updates cost more."""
    jobs = {(rnn, T): reach_runs(T, rnn) for rnn in ("gru", *lab.few(("mlp", "transformer")))
            for T in lab.few(REACH) if rnn == "gru" or T <= 128}

    def measure():
        done = train(lab, sum(jobs.values(), []))
        for (rnn, T), runs in jobs.items():
            for job in (job for job in runs if job.name in done and job.script != "smt"):
                method = "bptt-heads" if "lambda_heads" in job.flags else job.script
                for r in looks(lab, job, runs):
                    yield dict(rnn=rnn, T=T, method=method, lr=job.flags.get("lr"),
                               excess=r["val_excess"], minutes=r["seconds"] / 60)

    rows, told = table(lab, measure), {}
    fig, axes = style.panels(1, "T", "minutes to 0.01 nats over the optimum", height=3.6)
    for rnn, line in (("gru", "-"), ("mlp", "--"), ("transformer", ":")):
        for method in ("dmt", "bptt", "bptt-heads"):
            first = solved([r for r in rows if (r["rnn"], r["method"]) == (rnn, method)])
            if not first:
                continue
            how = style.of(method)
            how["label"] += f", {dict(gru='GRU', mlp='MLP').get(rnn, 'Transformer')}"
            axes[0].plot([*first], [at for at, _ in first.values()], ls=line, **how)
            for T in (T for T, (at, _) in first.items() if math.isnan(at)):
                axes[0].plot(T, REACH[T], how["marker"], mfc="none", mec=how["color"])
                axes[0].annotate("not within", (T, REACH[T]), (0, -14), fontsize=8, ha="center",
                                 textcoords="offset points")
            told[how["label"]] = ", ".join(
                f"{T} " + ("never" if math.isnan(at) else f"{at:.1f}" if at == stays else
                           f"{at:.1f} (for good {stays:.1f})") for T, (at, stays) in first.items())
    axes[0].set(xscale="log", xlim=(50, 1300), ylim=(0, None), xticks=[*REACH])
    axes[0].set_xticklabels(map(str, REACH))
    axes[0].minorticks_off()
    axes[0].legend()
    style.save(fig, lab.out("reach.png"))
    return "minutes until solved, by T: " + "; ".join(f"{k} {v}" for k, v in told.items()), "open"


def solved(rows: list[dict]) -> dict[int, tuple[float, float]]:
    """T -> the minutes of the first look within 0.01 nats of the optimum, and of the first from
    which on all looks are, NaN if there is none; of two rates those that solve it sooner."""
    runs, out = {}, {}
    for r in rows:
        runs.setdefault((r["T"], r.get("lr")), []).append((r["minutes"], r["excess"] < 0.01))
    for (T, _), looks_at in runs.items():
        good = [minutes for minutes, near in looks_at if near]
        away = max([minutes for minutes, near in looks_at if not near], default=-1.0)
        mine = min(good, default=math.nan), min([m for m in good if m > away], default=math.nan)
        out[T] = min(mine, out.get(T, mine), key=lambda v: (math.isnan(v[0]), v[0]))
    return out


def labels_runs(task: str) -> dict[str, Job]:
    """The easiest point of figure 3 with gradients that cross one update: SMT, then DMT with labels
    at full weight, without Eq. 6 (labels are only where it starts anew), and DMT alone, which has
    no use of labels at all, of an updater that SMT never saw."""
    axis, values, rest = TASKS[task]
    # heads in all of them; by default some have none
    flags = dict(dataset=task, heads=28) | {axis: values[0]} | rest | UPDATER
    one = dict(span=1, batch_size=2048)  # as many updates a step as with spans of 32
    smt, dmt = both(f"labels-{task}", flags, (0.75, 2.25), dmt=one | dict(lambda_mse=1.0))
    new = Job(f"labels-{task}-new-0", "smt", 0, flags | dict(seed=0, steps=1))
    none = one | dict(lambda_mse=0.0, seed=0)
    T = data.load(task, "", **{k: v for k, v in flags.items() if k in data.OPTIONS[task]}).T
    alone = dict(horizon=T)  # it is never put back on a label
    return {"smt": smt, "dmt-span1": dmt, "new": new,
            "dmt-mse0": Job(f"labels-{task}-mse0-0", "dmt", 2.25, none, smt.name),
            "walk": Job(f"labels-{task}-walk-0", "dmt", 3.0, none | alone, new.name)}


def labels(lab: Lab) -> tuple[str, str]:
    """The paper's claim itself: labels instead of gradients through time. Nats over the optimum of
    an RNN whose gradients cross one update, with labels and without."""
    jobs = {task: labels_runs(task) for task in lab.few(TASKS)}

    def measure():
        done = train(lab, [job for runs in jobs.values() for job in runs.values()])
        got = scores(lab, [name for name in done if "-new-" not in name], 1000)
        for task, runs in jobs.items():
            for method, job in runs.items():
                if s := got.get(job.name):
                    yield dict(task=task, method=method, excess=s["excess"],
                               stderr=s["excess_stderr"], teacher=s["excess_all"]["teacher"])

    rows = table(lab, measure)
    fig, axes = style.panels(1, y="nats over the Bayes optimum (least: 1e-6)", height=3.6)
    there = [task for task in TASKS if any(r["task"] == task for r in rows)]
    for i, (method, label) in enumerate({
            "walk": "DMT alone, no labels", "dmt-mse0": "SMT → DMT, no Eq. 6",
            "smt": "SMT", "dmt-span1": "SMT → DMT, labels"}.items()):
        at = [(there.index(r["task"]) + (i - 1.5) * 0.12, max(r["excess"], 1e-6)) for r in rows
              if r["method"] == method]
        axes[0].plot(*zip(*at), **style.of(method) | dict(ls="", label=label)) if at else None
    axes[0].set(yscale="log", ylim=(5e-7, 10), xlim=(-0.5, len(there) - 0.5))
    axes[0].set_xticks(range(len(there)), labels=there)
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    style.save(fig, lab.out("labels.png"))
    nats = {(r["task"], r["method"]): r for r in rows}
    told, better = [], []
    for task in there:
        with_, *without = (nats[task, m] for m in ("dmt-span1", "dmt-mse0", "walk"))
        least = min(without, key=lambda r: r["excess"])
        told.append(f"{task} {with_['excess']:.2g} and {least['excess']:.2g}")
        apart = with_["excess"] - least["excess"]
        better.append(apart < -2 * math.hypot(with_["stderr"], least["stderr"]) - 1e-3)
    return "nats over the optimum, gradients across one update, with labels and without (the " \
        f"better of two): {', '.join(told)}", \
        "agrees" if all(better) else "open" if any(better) else "disagrees"


def binding_runs(seed: int) -> list[Job]:
    """recall with 8 pairs, 8 minutes each: SMT and DMT, SMT and BPTT, BPTT at three rates, and DMT
    without labels of an updater that SMT never saw."""
    flags = dict(dataset="recall", keys=8, key_len=1) | UPDATER
    smt, dmt = both("binding", flags, (5.0, 3.0), seed)
    then = Job(f"binding-smt+bptt-{seed}", "bptt", 3.0, dict(lr=1e-3, seed=seed), smt.name)
    new = Job(f"binding-new-{seed}", "smt", 0, flags | dict(seed=seed, steps=1))
    walk = Job(f"binding-walk-{seed}", "dmt", 8.0,
               # whole rollouts (T is 18) and no past: to recall it held the walk back (1.58 nats)
               dict(lr=2e-3, lambda_mse=0.0, lambda_past=0.0, horizon=18, seed=seed), new.name)
    return [smt, dmt, then, new, walk] + [
        Job(f"binding-bptt-{lr:g}-{seed}", "bptt", 8.0, flags | dict(lr=lr, seed=seed))
        for lr in (1e-3, 2e-3, 5e-3)]


def binding(lab: Lab) -> tuple[str, str]:
    """What is a value's key? Nats over the optimum against minutes, where all know for long which
    values there were, and not whose they are."""
    seeds = lab.seeds or ((0,) if lab.quick else (0, 1))
    jobs = [job for seed in seeds for job in binding_runs(seed)]

    def measure():
        done = train(lab, jobs)
        for job in (job for job in jobs if job.name in done and "-new-" not in job.name):
            for r in looks(lab, job, jobs):
                yield dict(method="walk" if "-walk-" in job.name else
                           "smt+bptt" if "smt+bptt" in job.name else job.script,
                           lr=job.flags.get("lr"), seed=job.flags["seed"],
                           minutes=r["seconds"] / 60, excess=r["val_excess"])

    rows, ends = table(lab, measure), {}
    fig, axes = style.panels(1, "minutes of one core", "nats over the Bayes optimum", height=3.6)
    for method, label in {"bptt": "BPTT", "walk": "DMT alone, no labels", "smt": "SMT",
                          "smt+bptt": "SMT → BPTT", "dmt": "SMT → DMT"}.items():
        for lr in dict.fromkeys(r.get("lr") for r in rows if r["method"] == method):
            name = f"BPTT, rate {lr:g}" if method == "bptt" else label
            for seed in dict.fromkeys(r["seed"] for r in rows):
                at = [(r["minutes"], r["excess"]) for r in rows
                      if (r["method"], r.get("lr"), r["seed"]) == (method, lr, seed)]
                if at:
                    of = dict(ms=3, ls="-", label="" if name in ends else name)
                    if method == "bptt":
                        of |= dict(ms=0, ls={1e-3: ":", 5e-3: "--"}.get(lr, "-"))
                    axes[0].plot(*zip(*at), **style.of(method) | of)
                    ends.setdefault(name, []).append(at[-1][1])
    axes[0].set(ylim=(0, 2.2))
    axes[0].legend()
    style.save(fig, lab.out("binding.png"))
    told = ", ".join(f"{k} {' and '.join(f'{v:.2g}' for v in of)}" for k, of in ends.items()
                     if k != "SMT")
    ours = ends.get("SMT → DMT", [])
    theirs = [v for k, of in ends.items() if k.startswith("BPTT") for v in of]
    if not ours or not theirs:  # drawn from some of its runs
        return f"nats over the optimum: {told}", "open"
    return f"nats over the optimum: {told}", \
        "agrees" if max(ours) < min(theirs) - 0.1 else \
        "open" if min(ours) < min(theirs) else "disagrees"


def fig13(lab: Lab) -> tuple[str, str]:
    """Trained on stacks of T = 64 without timestamps, tested on longer ones."""
    # the clock ends at T: nobody may have one
    jobs = both("long-stack", dict(dataset="stack", timestamps="none") | UPDATER, (3.0, 2.0))
    lengths = (13, 20) if lab.quick else (64, 128, 256, 512)

    def measure():
        done = [name for name in train(lab, jobs) if name == jobs[-1].name]
        for T in lengths:
            for name, s in scores(lab, done, 200, length=T).items():
                yield dict(T=T, teacher=s["teacher"], window=s["window"], rollout=s["rollout"],
                           drift=s["drift"], stderr=s["stderr"])

    rows = table(lab, measure)
    fig, axes = style.panels(1, "T of the test sequences", "nats a pop", height=3.6)
    for key, method, label in (("rollout", "dmt", "RNN alone"),
                               ("teacher", "teacher", "teacher, reads everything"),
                               ("window", "smt", "teacher, reads the last 64")):
        at = [(r["T"], r[key]) for r in rows if key in r]
        axes[0].loglog(*zip(*at), **style.of(method) | dict(label=label))
    style.plain_log(axes[0])
    at = [r["T"] for r in rows]
    axes[0].set_xticks(at, labels=map(str, at))
    axes[0].minorticks_off()
    axes[0].axvline(rows[0]["T"], color="0.6", lw=1, ls=":")
    axes[0].text(rows[0]["T"], axes[0].get_ylim()[1], " trained", va="top", fontsize=9)
    axes[0].legend()
    style.save(fig, lab.out("fig13.png"))
    short, long = rows[0], rows[-1]
    # it holds where it is better at the last length than its teacher was at the first
    return f"from T = {short['T']} to {long['T']}: RNN {short['rollout']:.2g} to " \
        f"{long['rollout']:.2g} nats, teacher {short['teacher']:.2g} to {long['teacher']:.2g}", \
        "agrees" if long["rollout"] < short["teacher"] < long["teacher"] / 2 else "open"


def others(lab: Lab) -> tuple[str, str]:
    """Nats over the Bayes optimum on tasks that are not in Figure 3, as there."""
    return side_by_side(lab, OTHERS, lab.seeds or (0,))


def transformer(lab: Lab) -> tuple[str, str]:
    """Figure 3's middle difficulties with the updater that the paper has."""
    return side_by_side(lab, TRANSFORMER, lab.seeds or ((0,) if lab.quick else (0, 1)),
                        "transformer-")


def side_by_side(lab: Lab, points: dict[str, dict], seeds: tuple,
                 prefix: str = "") -> tuple[str, str]:
    """One column for each of the points, {name: flags of the task}. `prefix`: of the runs."""
    jobs = {(task, seed): runs_of(prefix + task.replace(", ", "-").replace(" ", "-"), flags, seed)
            for task, flags in points.items() for seed in seeds}

    def measure():
        for (task, seed), row in compared(lab, jobs):
            yield dict(task=task, seed=seed) | row

    rows = counted(table(lab, measure))
    fig, axes = style.panels(1, y="nats over the Bayes optimum (least: 1e-6)", height=3.6)
    for method in ("bptt", "bptt-heads", "teacher", "dmt"):
        key, source = ("teacher", "dmt") if method == "teacher" else ("excess", method)
        at = [(list(points).index(r["task"]), max(r[key], 1e-6)) for r in rows
              if r["method"] == source]
        axes[0].plot(*zip(*at), **style.of(method) | dict(ls="")) if at else None
    least = min(max(r["excess"], 1e-6) for r in rows)
    axes[0].set(yscale="log", ylim=(least / 2, 10), xlim=(-0.5, len(points) - 0.5))
    axes[0].set_xticks(range(len(points)), labels=points)
    axes[0].legend()
    style.save(fig, lab.out(f"{lab.name}.png"))
    return against_bptt(rows)
