"""The races on MNIST: every updater and every method in the same minutes, one core a run.

    python reproduce.py race14                     # 14x14, 6 minutes a run
    python reproduce.py race28 --only gru          # 28x28, 40 minutes a run, one updater
    python reproduce.py racegpu --together 1       # 28x28 at the gpu preset's sizes, 17 minutes

Besides BPTT, as everyone has it, and SMT -> DMT: BPTT that decodes a quarter of the outputs and has
linear heads guess the next targets, as SMT does; BPTT after SMT; that faster BPTT for the second
half after SMT -> DMT; on the first seed DMT that crosses one update (--span 1, our loss), and the
walk alone: DMT without labels (--lambda_mse 0) of an updater that SMT never saw. With the GRU what
else could explain a result: DMT after SMT without labels, or without recalling the past
(--lambda_past 0), BPTT whose gradient crosses no more than DMT's does (--truncate) from scratch and
after SMT. What starts from another run has the minutes that are left. Figures 4, 6 and
17 use these runs.
"""
import math
import os
import shutil
import statistics

import torch

from console import fail
from figures import style
from figures.runs import SMT_SHARE, Job, Lab, log, scores, stored, table, train
from presets import recipe

UPDATERS = ("transformer", "mlp", "gru")
RACES = {
    "race14": dict(minutes=6.0, seeds=(0, 1, 2), n_val=2000, span=16, flags=dict(
        smt=dict(dataset="mnist", image_size=14, n_val=100),
        dmt=dict(n_val=100),
        bptt=dict(n_val=100))),
    # four times the pixels: smaller batches, and longer spans
    "race28": dict(minutes=40.0, seeds=(0,), n_val=2000, n_test=1000, span=64, flags=dict(
        smt=dict(dataset="mnist", image_size=28, n_val=50, batch_size=6, fut_len=56, heads=56,
                 past=224, lr=5e-3),
        dmt=dict(n_val=50, batch_size=128, eval_every=200),
        bptt=dict(n_val=50, batch_size=24, eval_every=40, ckpt_every=25)),
        cheap=dict(eval_every=75, heads=56)),  # as many heads as SMT has; shorter steps
    # sizes, batches and rates are the preset's
    "racegpu": dict(minutes=17.0, seeds=(0, 1), n_val=5000, n_test=10_000, span=64, flags=dict(
        smt=dict(dataset="mnist", image_size=28, preset="gpu"),
        dmt=dict(preset="gpu", batch_size=128),
        bptt=dict(preset="gpu", recompute=28))),  # memory for 784 steps of 8 layers
}
# At laptop sizes: the peak rate of BPTT that goes on from SMT or DMT, at most half of what it
# starts with elsewhere: weights are there, a large rate would destroy them.
AFTER_SMT = dict(transformer=1.2e-3, mlp=1.2e-3, gru=2.5e-3)
AFTER_DMT = dict(transformer=1.2e-3, mlp=1.2e-3, gru=1.25e-3)
CHEAP = dict(first=0.25, lambda_heads=1.0)  # BPTT that decodes a part, as SMT does
EXPLAINED = "gru"  # the updater whose first seed has these
EXTRA = "dmt-span1", "dmt-mse0", "dmt-past0", "truncated", "smt+truncated", "new", "walk"
# method -> its script, the run it starts from, its part of the minutes
METHODS = {
    "bptt": ("bptt", "", 1.0),
    "bptt-heads": ("bptt", "", 1.0),
    "truncated": ("bptt", "", 1.0),
    "smt": ("smt", "", SMT_SHARE),
    "dmt": ("dmt", "smt", 1 - SMT_SHARE),
    "dmt-span1": ("dmt", "smt", 1 - SMT_SHARE),
    "dmt-mse0": ("dmt", "smt", 1 - SMT_SHARE),
    "dmt-past0": ("dmt", "smt", 1 - SMT_SHARE),
    "new": ("smt", "", 0.0),  # one step of SMT: networks as they are drawn
    "walk": ("dmt", "new", 1.0),
    "smt+bptt": ("bptt", "smt", 1 - SMT_SHARE),
    "smt+truncated": ("bptt", "smt", 1 - SMT_SHARE),
    "half": ("dmt", "smt", 0.5 - SMT_SHARE),  # DMT that ends early, so that ..
    "smt+dmt+bptt": ("bptt", "half", 0.5),    # .. BPTT has the second half
    "half-walk": ("dmt", "new", 0.5),
    "walk+bptt": ("bptt", "half-walk", 0.5),
}


def race_jobs(race: str, seeds=(0, 1), updaters=UPDATERS, extra: bool = True) -> list[Job]:
    """All runs of a race, those that matter most first."""
    r, jobs = RACES[race], []
    for seed in seeds:
        for rnn in updaters:
            for method in ("bptt", "smt", "dmt"):
                jobs.append(race_job(race, r, rnn, method, seed))
    if extra:
        jobs += [race_job(race, r, EXPLAINED, method, seeds[0]) for method in EXTRA]
        jobs += [race_job(race, r, rnn, method, seeds[0]) for rnn in updaters if rnn != EXPLAINED
                 for method in ("dmt-span1", "new", "walk")]
        jobs += [race_job(race, r, rnn, method, seed) for seed in seeds[:2] for rnn in updaters
                 for method in ("bptt-heads", "smt+bptt", "half", "smt+dmt+bptt")]
    return jobs


def race_job(race: str, r: dict, rnn: str, method: str, seed: int) -> Job:
    """One run: the method's flags, the updater, its part of the minutes."""
    name = lambda method: f"{race}-{rnn}-{method}-{seed}"
    script, after, share = METHODS[method]
    dmt = r["flags"]["dmt"]
    usual = recipe("dmt", dmt.get("preset", "laptop"), ("mnist", rnn)) | dmt
    cheap = CHEAP | r.get("cheap", {})
    own = {"bptt-heads": cheap, "smt+dmt+bptt": cheap,
           # as many updates a step, however long a span is
           "dmt-span1": dict(span=1, batch_size=usual["batch_size"] * r["span"]),
           "new": dict(steps=1), "walk": dict(lambda_mse=0.0), "half-walk": dict(lambda_mse=0.0),
           "dmt-mse0": dict(lambda_mse=0.0), "dmt-past0": dict(lambda_past=0.0),
           "truncated": dict(truncate=r["span"]),
           "smt+truncated": dict(truncate=r["span"])}.get(method, {})
    own = dict(span=r["span"]) | own if script == "dmt" else own
    laptop = r["flags"][script].get("preset", "laptop") == "laptop"
    if not after:  # updater and task, which a run that follows has from SMT
        task = {k: v for k, v in r["flags"]["smt"].items() if k in ("dataset", "image_size")}
        own = task | dict(rnn=rnn) | own
    elif laptop and script == "bptt":
        own = dict(lr=(AFTER_SMT if after == "smt" else AFTER_DMT)[rnn]) | own
    return Job(name(method), script, r["minutes"] * share, r["flags"][script] | own |
               dict(seed=seed), name(after) if after else "")


def race(lab: Lab) -> tuple[str, str]:
    """Ours: nats per image of the RNN alone, in the same minutes, of validation images, on which
    sizes and rates were chosen; of long sequences on test images, too, on which nothing was."""
    r = RACES[lab.name]
    if lab.name == "racegpu" and not (torch.cuda.is_available() or lab.quick or lab.draw or
                                      lab.plan):
        fail("racegpu needs a CUDA GPU; race28 is the one for a CPU")
    jobs = race_jobs(lab.name, lab.seeds or r["seeds"]) if not lab.quick else \
        race_jobs(lab.name, lab.seeds or (0,), ("gru",))

    rows = table(lab, lambda: race_rows(lab, r, jobs))
    fig, axes = style.panels(1, "", "nats per validation image")
    # SMT alone, at twice the nats of all others, is in the CSV
    there = {row["method"] for row in rows} - {"smt"}
    for i, method in enumerate(m for m in style.METHODS if m in there):
        # no bars: the error of a difference is smaller than a marker
        axes[0].plot(*zip(*((UPDATERS.index(row["rnn"]) + (i - (len(there) - 1) / 2) * 0.09,
                             row["rollout"]) for row in rows if row["method"] == method)),
                     ls="", **style.of(method))
    axes[0].set(xticks=range(3), xlim=(-0.55, 2.55))
    axes[0].set_xticklabels(["Transformer", "MLP", "GRU"])
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    style.save(fig, lab.out(f"{lab.name}.png"))
    return verdict(rows)


def race_rows(lab: Lab, r: dict, jobs: list[Job]):
    """CSV rows of the runs of a race r that have finished; their logs are put beside the CSV."""
    done = [name for name in train(lab, jobs) if "-new-" not in name]  # they know nothing yet
    got = scores(lab, done, r["n_val"], "val")
    test = scores(lab, done, r["n_test"]) if "n_test" in r else {}
    for job in jobs:
        if job.name not in got:
            continue
        s, last = got[job.name], log(lab, job.name)[-1]
        _, rnn, method = job.name.rsplit("-", 1)[0].split("-", 2)
        seed = job.flags["seed"]
        shutil.copy(os.path.join(lab.folder(job.name), "log.csv"),
                    lab.out(f"{lab.name}-{rnn}-{method}-{seed}.csv"))
        yield dict(rnn=rnn, method=method, seed=seed,
                   minutes=r["minutes"] * (SMT_SHARE if method == "smt" else 1),
                   smt_minutes=r["minutes"] * SMT_SHARE * ("smt" in job.name + job.after),
                   steps=last["step"], tokens=last["tokens"], layers=last["layers"]) | \
            {k: s[k] for k in ("n", "teacher", "one_step", "rollout", "stderr", "drift",
                               "one_step_drift", "kl", "variance")} | \
            compared(job.name, got) | tested(job.name, test) | \
            dict(commit=stored(lab, job.name, "finished.json")["commit"])


def compared(name: str, got: dict) -> dict:
    """A run minus both kinds of BPTT with its race, updater and seed, where they are there."""
    run, seed = name.rsplit("-", 1)
    race, rnn, _ = run.split("-", 2)
    return paired(got[name], got.get(f"{race}-{rnn}-bptt-{seed}")) | \
        paired(got[name], got.get(f"{race}-{rnn}-bptt-heads-{seed}"), "over_heads")


def tested(name: str, got: dict) -> dict:
    """Columns of a run's test images; none where the race has no test."""
    if name not in got:
        return {}
    s = dict(n=got[name]["n"], rollout=got[name]["rollout"], stderr=got[name]["stderr"])
    return {f"test_{k}": v for k, v in (s | compared(name, got)).items()}


def paired(s: dict, bptt: dict | None, name: str = "over_bptt") -> dict:
    """A run minus BPTT, image by image: the mean and its standard error."""
    if bptt is None or s is bptt:
        return {}
    a, b = (torch.tensor(v["nats_each"], dtype=torch.float64) for v in (s, bptt))
    apart = a - b
    return {name: float(apart.mean()),
            f"{name}_stderr": float(apart.std()) / math.sqrt(len(apart))}


def verdict(rows: list[dict]) -> tuple[str, str]:
    """Updater by updater: SMT -> DMT minus BPTT, the mean over the seeds that have both; then minus
    BPTT + heads. To agree, every updater must win, against BPTT + heads where that was run."""
    told, results = [], []
    for rnn in UPDATERS:
        mine = [row for row in rows if (row["rnn"], row["method"]) == (rnn, "dmt")
                and ("over_bptt" in row or "over_heads" in row)]
        if mine:
            nats = sum(row["rollout"] for row in mine) / len(mine)
            told.append(f"{rnn} {nats:.1f}")
            for key, name in (("over_bptt", "BPTT"), ("over_heads", "BPTT + heads")):
                raced = [row for row in mine if key in row]
                if raced:
                    apart = [row[key] for row in raced]
                    # all seeds have the same images: more of them make that error no smaller
                    images = statistics.mean(row[f"{key}_stderr"] for row in raced)
                    seeds = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
                    error = math.hypot(images, seeds)
                    told[-1] += f" ({name} {statistics.mean(apart):+.2f} ± {error:.2f})"
                    result = outcome(statistics.mean(apart), error)
            results.append(result)
    return "SMT → DMT, nats per image, and over: " + ", ".join(told), said(results)


def outcome(apart: float, error: float) -> int:
    """Of a difference in nats: 1 better, -1 worse, 0 a tie, within two standard errors of it."""
    return 0 if abs(apart) <= 2 * error else 1 if apart < 0 else -1


def said(outcomes: list[int]) -> str:
    """Of a claim to be better, everywhere."""
    return "agrees" if outcomes and min(outcomes) > 0 else \
        "disagrees" if outcomes and min(outcomes) < 0 and max(outcomes) < 1 else "open"
