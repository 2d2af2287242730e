"""Figures 7, 8, 9, 12 and 16: TinyStories, in windows of 128 bytes. Runs are shared, one seed."""
import math

from figures import style
from figures.runs import Job, Lab, both, log, scores, table, train

LOOKS = dict(n_val=50, eval_every=100)
TEXT = dict(dataset="tinystories", rnn="gru") | LOOKS
MINUTES = (1.2, 1.8)       # SMT, DMT; BPTT has both
STEPS = (600, 800)         # for every size the same, as in the paper: small ones take less time
SIZES = {                  # panel -> (what is changed, values, the preset's own among them)
    "context": ("ctx_len", (8, 16, 32, 64), 128),
    "memory": ("numbers", (4, 16, 64, 128, 512), 256),
    "width": ("d_model", (32, 128), 64),
    "depth": ("rnn_layers", (1, 4), 2),
}
LAYERS = "enc_layers", "dec_layers", "rnn_layers"


def runs_of(lab: Lab, panel: str) -> dict:
    """value -> SMT and DMT jobs, sorted by value. K = 4, d = 64, two layers and the whole window
    are common to all panels."""
    flag, values, usual = SIZES[panel]
    jobs = {usual: steps_of("text-base", {})} if panel != "depth" else {}
    for value in [*lab.few(values), *([usual] if panel == "depth" else [])]:
        changed = dict.fromkeys(LAYERS, value) if panel == "depth" else {flag: value}
        if panel == "memory":  # K tokens of 64 numbers, or one that is smaller
            changed = dict(mem_tokens=value // 64) if value > 63 else \
                dict(mem_tokens=1, mem_dim=value)
        # a GRU has one layer whatever it is told: depth is a question to the Transformer updater
        changed |= dict(rnn="transformer") if panel == "depth" else {}
        jobs[value] = steps_of(f"text-{panel}-{value}", changed)
    return dict(sorted(jobs.items()))


def steps_of(name: str, changed: dict) -> list[Job]:
    """SMT and DMT of STEPS."""
    smt, dmt = STEPS
    return both(name, TEXT | changed | dict(steps=smt), (0, 0), dmt=LOOKS | dict(steps=dmt))


def sizes(lab: Lab, panels: tuple[str, str]) -> tuple[str, str]:
    """Test loss of RNN and teacher against two sizes."""
    jobs = {panel: runs_of(lab, panel) for panel in panels}

    def measure():
        done = train(lab, [job for runs in jobs.values() for pair in runs.values() for job in pair])
        got = scores(lab, done, 200)
        for panel, runs in jobs.items():
            for value, (_, dmt) in runs.items():
                if s := got.get(dmt.name):
                    yield dict(panel=panel, value=value) | \
                        {k: s[k] for k in ("teacher", "one_step", "rollout", "stderr", "drift")}

    rows = table(lab, measure)
    fig, axes = style.panels(2, "", "nats per character")
    told, better = [], []
    for ax, panel in zip(axes, panels):
        mine = [r for r in rows if r["panel"] == panel]
        # a teacher that reads Tc bytes says nothing of later ones: no mean over as many times
        for key, method in (("teacher", "teacher"), ("rollout", "dmt"))[panel == "context":]:
            ax.errorbar([r["value"] for r in mine], [r[key] for r in mine],
                        yerr=[r["stderr"] for r in mine], capsize=2, **style.of(method))
        ax.set(xlabel={"context": "Tc, the length that it learns from", "width": "d",
                       "memory": "numbers in the memory",
                       "depth": "layers of each network"}[panel], xscale="log", title=panel)
        ax.set_xticks([r["value"] for r in mine], [str(r["value"]) for r in mine])
        ax.minorticks_off()
        best = min(mine, key=lambda r: r["rollout"])
        told.append(f"{panel} {mine[0]['value']} to {mine[-1]['value']}: "
                    f"{mine[0]['rollout']:.3f} to {mine[-1]['rollout']:.3f}, "
                    f"best at {best['value']}: {best['rollout']:.3f}")
        if panel in ("width", "depth"):
            told[-1] += ", the teacher's less {:.3f} to {:.3f}".format(
                *(mine[i]["teacher"] - mine[i]["rollout"] for i in (0, -1)))
        better.append(best is mine[-1])
    axes[1].legend()
    style.save(fig, lab.out(f"{lab.name}.png"))
    return "nats per character, " + "; ".join(told), \
        "agrees" if all(better) else "open" if any(better) else "disagrees"


def fig7(lab: Lab) -> tuple[str, str]:
    return sizes(lab, ("context", "memory"))


def fig8(lab: Lab) -> tuple[str, str]:
    return sizes(lab, ("width", "depth"))


def fig9(lab: Lab) -> tuple[str, str]:
    """Steps and minutes of training until a validation loss is reached, against the size of the
    memory. A step on a smaller memory takes less time."""
    jobs = runs_of(lab, "memory")

    def measure():
        train(lab, sum(jobs.values(), []))
        for value, pair in jobs.items():
            steps, minutes = 0, 0.0
            for job in pair:
                for r in log(lab, job.name):
                    if "val_rollout" in r:
                        yield dict(numbers=value, steps=steps + r["step"],
                                   minutes=minutes + r["seconds"] / 60, nats=r["val_rollout"])
                steps += log(lab, job.name)[-1]["step"]
                minutes += log(lab, job.name)[-1]["seconds"] / 60

    rows = table(lab, measure)
    end = {n: min(r["nats"] for r in rows if r["numbers"] == n)
           for n in dict.fromkeys(r["numbers"] for r in rows)}
    fig, axes = style.panels(3, "numbers in the memory", height=3.4)
    for n, colour in zip(end, style.COLOURS):
        mine = [r for r in rows if r["numbers"] == n]
        axes[0].plot([r["steps"] for r in mine], [r["nats"] for r in mine], ".-", color=colour,
                     label=f"{n} numbers")
    axes[0].set(xlabel="steps", ylabel="nats per character",
                ylim=(None, 2 * max(end.values())))  # SMT's RNN begins far above
    axes[0].legend()
    told, longer = [], []
    for ax, unit in zip(axes[1:], ("steps", "minutes")):
        pairs = []
        # three losses that the largest one reaches
        for k, line in zip(range(3), ("o-", "s--", "D:")):
            level = max(end.values()) - k * (max(end.values()) - min(end.values())) / 2.5
            at = [(n, reached([r for r in rows if r["numbers"] == n], unit, level)) for n in end
                  if end[n] <= level]
            ax.plot(*zip(*at), line, color="0.3", label=f"{level:.2f} nats")
            pairs += [a[1] > b[1] for a, b in zip(at, at[1:])]
        ax.set(ylabel=f"{unit} to this loss", xscale="log")
        told.append(f"more {unit} in {sum(pairs)} of {len(pairs)} pairs")
        longer.append(sum(pairs) / max(1, len(pairs)))
    axes[2].legend()
    style.save(fig, lab.out("fig9.png"))
    return f"to the same loss the smaller memory takes {' and '.join(told)}", \
        "agrees" if min(longer) > 0.8 else "open" if max(longer) > 0.8 else "disagrees"


def reached(rows: list[dict], unit: str, level: float) -> float:
    """Where a run's loss falls to the level for the first time; a line between two looks at it."""
    before = rows[0]
    for r in rows:
        if r["nats"] <= level:
            part = (before["nats"] - level) / (before["nats"] - r["nats"] or 1.0)
            return before[unit] + part * (r[unit] - before[unit])
        before = r


# ---------------------------------------------------------------------------- Fig. 12 and Fig. 16

DYN, UNIF = (0.03, 0.1, 0.3, 1.0, 3.0), (0.0, 0.001, 0.01)


def grid_jobs(dyn: float, unif: float) -> list:
    """SMT with these weights, and the DMT that follows it."""
    return both(f"text-grid-{dyn:g}-{unif:g}", TEXT | dict(lambda_dyn=dyn, lambda_unif=unif),
                MINUTES, dmt=LOOKS)


# The paper's DMT: one update a gradient, labels teach the updater and predictions the readout
# alone. As many updates a step as ours, which learns from spans of 16 and most from predictions.
PAPERS = dict(span=1, batch_size=2048, lambda_mse=1.0, detach_dec=True)


def fig12(lab: Lab) -> tuple[str, str]:
    """Drift and loss before and after DMT, ours and the paper's, over lambda_dyn; does one-step
    drift foretell the rollout's?"""
    jobs = {dyn: grid_jobs(dyn, 0.001) for dyn in lab.few(DYN, 2)}
    for dyn, (smt, dmt) in jobs.items():
        jobs[dyn].append(Job(f"text-papers-{dyn:g}-0", "dmt", dmt.minutes, dmt.flags | PAPERS,
                             smt.name))

    def measure():
        got = scores(lab, train(lab, sum(jobs.values(), [])), 200)
        for dyn, runs in jobs.items():
            for after, job in zip(("smt", "dmt", "dmt-papers"), runs):
                if s := got.get(job.name):
                    yield dict(dyn=dyn, after=after, nats=s["rollout"], drift=s["drift"],
                               one_step_drift=s["one_step_drift"])

    rows = table(lab, measure)
    fig, axes = style.panels(3, "λ_dyn", height=3.2)
    there = dict.fromkeys(r["after"] for r in rows)
    for method in there:
        mine = [r for r in rows if r["after"] == method]
        for ax, key in zip(axes, ("drift", "nats")):
            ax.plot([r["dyn"] for r in mine], [r[key] for r in mine], **style.of(method))
        axes[2].plot([r["one_step_drift"] for r in mine], [r["drift"] for r in mine],
                     **style.of(method) | dict(ls=""))
    axes[0].set(xscale="log", ylabel="drift of the rollout, 1 - R²")
    axes[1].set(xscale="log", ylabel="rollout, nats per character")
    axes[2].set(xlabel="drift of one step, 1 - R²", ylabel="drift of the rollout")
    axes[1].legend(loc="center")  # where no curve is
    style.save(fig, lab.out("fig12.png"))
    by, told, well = {(r["dyn"], r["after"]): r for r in rows}, [], {}
    for method in [m for m in there if m != "smt"]:
        pairs = [(by[d, "smt"], by[d, method]) for d in jobs if (d, method) in by]
        better = {k: sum(b[k] < a[k] for a, b in pairs) for k in ("drift", "nats")}
        told.append(f"{style.METHODS[method][0]}: lower drift in {better['drift']}, lower loss in "
                    f"{better['nats']} of {len(pairs)} settings")
        well[method] = min(better.values()) >= len(pairs) - 1
    return "; ".join(told), "agrees" if well.get("dmt-papers") else "open"


def fig16(lab: Lab) -> tuple[str, str]:
    """The RNN's loss after SMT over lambda_dyn and lambda_unif."""
    jobs = {(d, u): grid_jobs(d, u)[0] for d in lab.few(DYN, 2) for u in lab.few(UNIF, 2)}

    def measure():
        got = scores(lab, train(lab, list(jobs.values())), 200)
        for (d, u), job in jobs.items():
            if s := got.get(job.name):
                yield dict(dyn=d, unif=u, rollout=s["rollout"], teacher=s["teacher"],
                           drift=s["drift"])

    rows = table(lab, measure)
    fig, axes = style.panels(2, "λ_dyn", "λ_unif", height=3.0)
    dyns, unifs = (sorted({r[k] for r in rows}) for k in ("dyn", "unif"))
    for ax, key in zip(axes, ("rollout", "teacher")):
        at = {(r["dyn"], r["unif"]): r[key] for r in rows}
        best = min(at.values())
        image = ax.imshow([[100 * (at.get((d, u), math.nan) / best - 1) for d in dyns]
                           for u in unifs], cmap=style.MAP, aspect="auto", vmin=0, vmax=10)
        for (d, u), v in at.items():
            ax.text(dyns.index(d), unifs.index(u), f"{v:.3f}", ha="center", va="center",
                    fontsize=8, bbox=dict(color="white", alpha=0.7, pad=1))
        ax.set(xticks=range(len(dyns)), yticks=range(len(unifs)), title=f"{key}, nats/character")
        ax.set_xticklabels(f"{d:g}" for d in dyns)
        ax.set_yticklabels(f"{u:g}" for u in unifs)
        ax.grid(False)
    fig.colorbar(image, ax=axes, label="% above the best", extend="max")
    style.save(fig, lab.out("fig16.png"))
    best = min(rows, key=lambda r: r["rollout"])
    worst = max(r["rollout"] for r in rows)
    told = f"best at λ_dyn {best['dyn']:g}, λ_unif {best['unif']:g}: {best['rollout']:.3f} nats; " \
        f"worst {worst:.3f}"
    return told, "agrees" if worst < 1.05 * best["rollout"] else "open"
