"""Figures 4, 5, 17, 18 and 20, and stories: what RNNs draw and write, and how they complete what
they are given."""
import numpy as np
import torch

from figures import races, style
from figures.nets import opened
from figures.runs import Job, Lab, both, curves, read_csv, scores, table, train
from model import RNN
from sample import continuations, generate
from sources.files import written_whole

INK = ".#"  # how a CSV spells two levels; digits alone would be read as a number


def spell(y: torch.Tensor) -> str:
    """A row of pixels (T,) as text; darker than half is ink."""
    return "".join(INK[int(v)] for v in y)


def unspell(rows: list[dict], key: str = "pixels") -> np.ndarray:
    """The square pictures of a CSV: (n, H, W) in 0..1."""
    flat = np.array([[INK.index(c) for c in row[key]] for row in rows], dtype=float)
    side = int(round(flat.shape[1] ** 0.5))
    return flat.reshape(-1, side, side)


def drawn(lab: Lab, names: dict, n: int):
    """CSV rows: n pictures of each run in names (label -> run), unpicked, seed 0, with the test
    loss."""
    done = train(lab, names["jobs"])
    labels = {label: name for label, name in names["shown"].items() if name in done}
    got = scores(lab, labels.values(), 1000)
    for label, name in labels.items():
        task, rnn = opened(lab, name, "rnn")
        y, s = generate(rnn, n, task.T, torch.Generator().manual_seed(0)), got[name]
        bptt, heads = (got.get(labels.get(label.replace("SMT → DMT", rival)))
                       for rival in ("BPTT", "BPTT + heads"))
        for row in y:
            yield dict(label=label, nats=s["rollout"], stderr=s["stderr"], teacher=s["teacher"]) | \
                races.paired(s, bptt) | races.paired(s, heads, "over_heads") | \
                dict(pixels=spell(row * 2 // task.n_out))
    every = task.held_out("test", 1000)["y"]  # may be sorted by class
    for row in every[::max(1, len(every) // n)][:n]:
        yield dict(label="data", nats=None, pixels=spell(row * 2 // task.n_out))


def show(lab: Lab, names: dict, n: int, columns: int, across: int) -> tuple[str, str]:
    """Sample, write, draw: a panel for each label."""
    rows = table(lab, lambda: drawn(lab, names, 2 if lab.quick else n))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    down = -(-len(labels) // across)
    height = 8.2 / across * -(-n // columns) / columns + 0.5
    fig, axes = style.panels(across, rows=down, height=height)
    for ax in np.ravel(axes):
        ax.axis("off")
    for ax, label in zip(np.ravel(axes), labels):
        mine = [row for row in rows if row["label"] == label][:n]
        method, *rest = label.split(", ", 1)
        rest += [f"{mine[0]['nats']:.1f} nats"] if "nats" in mine[0] else []
        style.pictures(ax, unspell(mine), columns, f"{method}\n{': '.join(rest)}")
    style.save(fig, lab.out(f"{lab.name}.png"))
    ends = {row["label"]: row for row in rows if "nats" in row}
    outcomes = [races.outcome(row[key], row[f"{key}_stderr"]) for label, row in ends.items()
                for key in ("over_bptt", "over_heads") if "SMT" in label and key in row]
    told = ", ".join(f"{k} {row['nats']:.1f}" for k, row in ends.items())
    return f"nats per test image: {told}", races.said(outcomes)


def raced(race: str, updaters) -> dict:
    """Runs of a race, seed 0."""
    return dict(jobs=races.race_jobs(race, (0,), updaters, extra=False),
                shown={f"{how}, {rnn}": f"{race}-{rnn}-{method}-0" for rnn in updaters
                       for how, method in (("BPTT", "bptt"), ("SMT → DMT", "dmt"))})


def with_adamw(names: dict) -> dict:
    """The same runs, and once more with the paper's optimiser: AdamW, no averaging."""
    lr = dict(smt=1e-3, dmt=3e-4, bptt=1e-3)  # 3e-4 at the paper's size; small networks want more
    jobs = [Job(f"adamw-{job.name}", job.script, job.minutes, job.flags | dict(
        optimizer="adamw", ema=0.0, lr=lr[job.script]), job.after and f"adamw-{job.after}")
        for job in names["jobs"]]
    shown = {f"{label}, {how}": start + name for label, name in names["shown"].items()
             for start, how in (("", "Muon"), ("adamw-", "AdamW"))}
    return dict(jobs=names["jobs"] + jobs, shown=shown)


def fig4(lab: Lab) -> tuple[str, str]:
    """Samples of MNIST 14x14 at equal minutes, with our optimiser and with the paper's."""
    updaters = ("gru",) if lab.quick else ("transformer", "gru")
    told, verdict = show(lab, with_adamw(raced("race14", updaters)), 24, 6, 3)
    nats = {row["label"]: row["nats"] for row in read_csv(lab.out("fig4.csv")) if "nats" in row}
    plain = {label.removesuffix(", AdamW"): v for label, v in nats.items() if "AdamW" in label}
    return told + "; what plain AdamW costs: " + ", ".join(
        f"{label} {v - nats[f'{label}, Muon']:.1f}" for label, v in plain.items()), verdict


def fig17(lab: Lab) -> tuple[str, str]:
    """MNIST 28x28, where a sequence has 784 pixels, with our optimiser."""
    updaters = ("gru",) if lab.quick else races.UPDATERS
    return show(lab, raced("race28", updaters), 25, 5, 4)


def sketchy() -> dict:
    """SMT -> DMT and both kinds of BPTT on drawings of 32x32, one updater, equal minutes."""
    flags = dict(dataset="sketchy", rnn="gru", past=256)
    bptt = flags | dict(lr=5e-3, seed=0)
    jobs = both("sketchy-gru", flags, (2.5, 17.5), dmt=dict(span=64, eval_every=400)) + \
        [Job("sketchy-gru-bptt-0", "bptt", 20.0, bptt),
         Job("sketchy-gru-bptt-heads-0", "bptt", 20.0,
             bptt | races.CHEAP | dict(batch_size=24, heads=64))]
    return dict(jobs=jobs, shown={"SMT → DMT": jobs[1].name, "BPTT": jobs[2].name,
                                  "BPTT + heads": jobs[3].name})


def fig5(lab: Lab) -> tuple[str, str]:
    """Sketches drawn at equal minutes."""
    return show(lab, sketchy(), 16, 4, 4)


def fig18(lab: Lab) -> tuple[str, str]:
    """More of the same runs."""
    return show(lab, sketchy(), 60, 10, 2)


@torch.no_grad()
def rest(rnn: RNN, x: torch.Tensor, y: torch.Tensor, known: int) -> torch.Tensor:
    """Nats of y_known .. y_{T-1} given what comes before: (B,)."""
    logp = rnn.logits(rnn.memories(x)).float().log_softmax(-1)
    return -logp.gather(-1, y[..., None])[:, known:, 0].sum(1)


def fig20(lab: Lab) -> tuple[str, str]:
    """Test images completed by the RNN alone from growing prefixes."""
    jobs = races.race_jobs("race14", (0,), ("gru",), extra=False)
    # the upper eighth is margin
    name, parts, n = "race14-gru-dmt-0", (0, 1 / 4, 3 / 8, 1 / 2, 3 / 4), 2 if lab.quick else 8

    def measure():
        train(lab, [job for job in jobs if job.script != "bptt"])
        task, rnn = opened(lab, name, "rnn")
        held = task.held_out("test", 200 if not lab.quick else n)
        for part in parts:
            known = int(part * task.T)
            nats = rest(rnn, held["x"], held["y"], known)
            made = generate(rnn, n, task.T, torch.Generator().manual_seed(0), given=held["y"][:n],
                            known=torch.full((n,), known))
            for row, one in zip(made, nats):
                yield dict(known=known, nats=float(one), mean=float(nats.mean()),
                           pixels=spell(row))
        for row in held["y"][:n]:
            yield dict(known=task.T, nats=0.0, mean=0.0, pixels=spell(row))

    rows = table(lab, measure)
    mean = {row["known"]: row["mean"] for row in rows}
    fig, axes = style.panels(len(mean), height=len(rows) / len(mean) / 2 * 0.85 + 0.4)
    for ax, known in zip(axes, mean):
        mine = [row for row in rows if row["known"] == known]
        pages = unspell(mine)
        given = np.arange(pages[0].size).reshape(pages[0].shape) < known
        # another shade: grey ink on a tinted ground
        style.pictures(ax, np.where(given, np.where(pages > 0, 0.55, 0.06), pages), 2,
                       f"{known} given" + (f"\nrest {mine[0]['mean']:.1f} nats" if
                                           known < pages[0].size else "\nthe image"))
    style.save(fig, lab.out("fig20.png"))
    return "nats of the rest: " + ", ".join(f"{v:.1f} after {k}" for k, v in mean.items()), \
        "open"  # fewer pixels are left each time: it could not come out otherwise


def stories_runs() -> list[Job]:
    """SMT -> DMT, BPTT, and SMT -> DMT -> BPTT, half of the minutes each, as in the races."""
    f = dict(dataset="tinystories", rnn="gru", length=256, n_val=40)
    dmt = dict(span=64, batch_size=64, n_val=40, eval_every=400)
    bptt = dict(n_val=40, eval_every=100, seed=0)
    jobs = both("stories-gru", f, (2.5, 17.5), dmt=dmt)
    half = Job("stories-gru-half-0", "dmt", 7.5, jobs[1].flags, jobs[0].name)
    return jobs + [half, Job("stories-gru-bptt-0", "bptt", 20.0, f | bptt),
                   Job("stories-gru-smt+dmt+bptt-0", "bptt", 10.0, bptt | dict(lr=1.25e-3),
                       half.name)]


def stories(lab: Lab) -> tuple[str, str]:
    """TinyStories in the same twenty minutes of one core; what each RNN writes after the same words
    goes to a text file."""
    jobs = stories_runs()
    names = {job.name.split("-")[2]: job.name for job in jobs}
    # method -> the runs that are its curve; SMT, at twice the nats, is in the CSV alone
    parts = {"bptt": ("bptt",), "dmt": ("dmt",), "smt+dmt+bptt": ("half", "smt+dmt+bptt")}

    def measure():
        done = train(lab, jobs)
        got = scores(lab, [names[method] for method in parts if names[method] in done], 1000)
        yield from curves(lab, jobs, done)
        for method in parts:
            if s := got.get(names[method]):
                yield dict(task="test", method=method, nats=s["rollout"], stderr=s["stderr"],
                           teacher=s["teacher"], late=s["late"]["rollout"]) | \
                    races.paired(s, got.get(names["bptt"]))
                _, rnn = opened(lab, names[method], "rnn")
                gen = torch.Generator().manual_seed(0)
                with written_whole(lab.out(f"stories-{method}.txt"), "w") as out:
                    out.write(continuations(rnn, 4, 20 if lab.quick else 600, gen, 0.7,
                                            prompt="Once upon a time"))

    rows = table(lab, measure)
    fig, axes = style.panels(1, "minutes of one core", "nats per validation character", height=4.0)
    for method, runs in parts.items():
        at = [(r["minutes"], r["nats"]) for r in rows
              if r["task"] == "stories" and r["method"] in runs]
        if at:
            axes[0].plot(*zip(*at), **style.of(method) | dict(ms=3))
    best = min(r["nats"] for r in rows if r["task"] == "test")
    axes[0].set(xlim=(0, None), ylim=(None, 1.5 * best))  # the first minute is far above
    axes[0].legend()
    style.save(fig, lab.out("stories.png"))
    test = {r["method"]: r for r in rows if r["task"] == "test"}
    told = ", ".join(f"{style.METHODS[m][0]} {r['nats']:.3f} ({r['late']:.3f} from the middle on)"
                     for m, r in test.items())
    apart, error = (test.get("dmt", {}).get(k) for k in ("over_bptt", "over_bptt_stderr"))
    return f"nats per test character: {told}", \
        "open" if apart is None or abs(apart) < 2 * error else \
        "agrees" if apart < 0 else "disagrees"
