"""Every figure and table of the paper from one command.

    python reproduce.py --list            # claim, what we run, minutes, what came out
    python reproduce.py fig13             # trains into runs/reproduce, draws results/fig13
    python reproduce.py fig4 fig17 race14 # runs that figures share are made once
    python reproduce.py all --quick       # all of them at toy size, into a temporary folder
    python reproduce.py fig13 --draw      # from the committed CSV, without training

A run that was cut off goes on where it was when the same command is given again. Runs are made two
at a time, each on one core; minutes are those of one core. Writes results/FIGURE/FIGURE.png, the
numbers as CSV beside it, and a row of results/README.md.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, demand, fail, flags_in, parser, path, pick_device, refuse
import dataclasses
import math
import os
import signal
import tempfile
import time

import torch

import bptt
import dmt
import evaluate
import flags
import smt
from figures import cost, credit, inside, ours, pictures, races, tasks, text
from figures.runs import (Lab, Planned, Stopped, commit, finished, log, read_csv, say, stored,
                          write_csv)
from sources.files import UserError, written_whole

SCRIPTS = dict(smt=smt.main, dmt=dmt.main, bptt=bptt.main, evaluate=evaluate.main)
# name -> (what the paper claims, what we run, the function that does it)
FIGURES = {
    "tab1": ("a step of SMT is flat in T, BPTT's grows; an RNN's token costs the same at any T",
             "steps of the shipped scripts at T = 64 to 1024 and single tokens at T = 1k to 16k, "
             "about 25 minutes", cost.tab1),
    "fig3": ("SMT → DMT beats BPTT on five synthetic tasks and all settings",
             "five tasks, three difficulties, GRU, equal minutes, BPTT at two rates, two seeds",
             tasks.fig3),
    "fig4": ("MNIST: BPTT draws streaks, SMT → DMT digits",
             "14×14, the runs of race14 and the same with AdamW", pictures.fig4),
    "fig5": ("Sketchy: SMT → DMT draws strokes", "32×32, GRU, 20 minutes for each side",
             pictures.fig5),
    "fig6": ("SMT needs far fewer layers in a row than BPTT for the same loss",
             "logs of race14 and of the same on TinyStories", cost.fig6),
    "fig7": ("the RNN gains smoothly with Tc and with the size of its memory",
             "TinyStories, GRU, windows of 128 bytes, 600 + 800 steps for every size; 25 minutes",
             text.fig7),
    "fig8": ("it gains smoothly with width and depth, and follows its teacher more closely",
             "TinyStories, GRU and Transformer, 600 + 800 steps for every size; 28 minutes",
             text.fig8),
    "fig9": ("for a fixed loss more compute buys a smaller memory", "the logs of fig7", text.fig9),
    "fig10": ("detached SMT needs Tf = T, joint SMT solves the task with any Tf",
              "retrieval, T = 16, the paper's SMT alone, 4,000 steps; two seeds, 28 minutes",
              credit.fig10),
    "fig11": ("BPTT's gradient vanishes or explodes with the initialisation, SMT's is flat",
              "retrieval, T = 64, networks as initialised", credit.fig11),
    "fig12": ("DMT cuts drift and improves the loss for all λ_dyn",
              "TinyStories, GRU, five values", text.fig12),
    "fig13": ("stack: longer than in training the RNN holds and the teacher does not",
              "stack without timestamps, T = 64, tested up to 512", tasks.fig13),
    "fig14": ("small memories: a few states for retrieval, a tree for copy",
              "retrieval and copy with a memory of three numbers", inside.fig14),
    "fig16": ("λ_dyn and λ_unif matter little over a wide range",
              "TinyStories, GRU, SMT alone", text.fig16),
    "fig17": ("MNIST 28×28: BPTT draws streaks, SMT → DMT digits",
              "the runs of race28; a GPU would help", pictures.fig17),
    "fig18": ("Sketchy, more samples", "the runs of fig5", pictures.fig18),
    "fig19": ("memories as colours follow the image", "a run of race14", inside.fig19),
    "fig20": ("the RNN completes images from growing prefixes", "a run of race14", pictures.fig20),
    "fig21": ("trajectories of the memory differ between digits", "a run of race14", inside.fig21),
    "fig22": ("final memories, PCA: classes lie apart", "a run of race14", inside.fig22),
    "fig23": ("final memories, t-SNE: classes lie apart", "a run of race14", inside.fig23),
    "sweeps": ("open in the paper: can a rollout be made in parallel?",
               "Jacobi sweeps on runs of race14", ours.sweeps),
    "spans": ("open in the paper: what lies between DMT and BPTT?",
              "14×14, GRU, DMT with spans 1 to T after one SMT", ours.spans),
    "reach": ("not in the paper: how far back does it reach, and after how long?",
              "retrieval, T = 64 to 1024 with the GRU, to 128 with the others, up to 8 minutes",
              tasks.reach),
    "labels": ("with gradients across one update, labels teach the RNN",
               "the easiest points of fig3, GRU, gradients that cross one update, with labels and "
               "without, 3 minutes a run", tasks.labels),
    "binding": ("associative recall: SMT → DMT beats BPTT",
                "recall, 8 pairs, GRU, two seeds, 8 minutes a side, BPTT at three rates",
                tasks.binding),
    "stories": ("TinyStories: SMT → DMT predicts better than BPTT, and writes stories",
                "GRU, windows of 256 bytes, 20 minutes of one core for each side",
                pictures.stories),
    "pace": ("not in the paper: how much sooner than its own way is the loss there?",
             "14×14, GRU: the paper's SMT and DMT at laptop sizes, 3 + 3 minutes, beside race14",
             cost.pace),
    "pretrain": ("the title: SMT pretrains what BPTT then trains",
                 "plain BPTT after SMT, after SMT → DMT, and alone: race14's runs, and permutation",
                 ours.pretrain),
    "clock": ("not in the paper: who must be told the time?",
              "14×14, timestamps for all, for the encoder, for none; 2 minutes a run", ours.clock),
    "transformer": ("SMT → DMT beats BPTT on five synthetic tasks, with the paper's updater",
                    "fig3's middle difficulties, Transformer, two seeds", tasks.transformer),
    "tasks": ("not in the paper, or only its code: tasks that Figure 3 leaves out",
              "recency, primacy and three more, GRU, equal minutes, BPTT at two rates",
              tasks.others),
    "race14": ("MNIST 14×14: SMT → DMT predicts better than BPTT",
               "three updaters, every method, 6 minutes a run", races.race),
    "race28": ("MNIST 28×28, T = 784: SMT → DMT predicts better than BPTT",
               "three updaters, every method, 40 minutes a run; a GPU would help", races.race),
    "racegpu": ("the same on a GPU",
                "28×28 at the gpu preset's sizes, 17 minutes a run: needs a CUDA GPU",
                races.race),
    "records": ("not in the paper: 28×28 MNIST beside published likelihoods",
                "the numbers of race28", ours.records),
}
# Folders in results/ with another name than the figure's.
PLACES = dict(race14="backbones", race28="backbones", racegpu="backbones")
BEGIN, END = "<!-- reproduce.py writes from here -->", "<!-- to here -->"


def main(argv) -> None:
    a = read_flags(argv)
    lab = Lab(SCRIPTS, runs=a.runs_dir, results=a.results_dir, data_dir=a.data_dir,
              device=a.device, quick=a.quick, draw=a.draw, together=a.together, n_test=a.n_test,
              seeds=tuple(range(a.first_seed, a.first_seed + a.seeds)), only=a.only)
    if a.stop_after:
        lab.stop_at = time.time() + 60 * a.stop_after
    if a.list:
        return list_all(lab)
    if a.quick:
        folder = tempfile.mkdtemp(prefix="reproduce-")
        if a.runs_dir == Lab.runs:
            lab.runs = os.path.join(folder, "runs")
        if a.results_dir == Lab.results:
            lab.results = os.path.join(folder, "results")
    if not a.draw:
        pick_device(a.device)
    torch.set_num_threads(1)  # samples are drawn here, by small networks; other cores may be busy
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs save and end
    skipped = {}
    for name in list(FIGURES) if "all" in a.figures else a.figures:
        try:
            make(lab, name, asked=name in a.figures)
        except UserError as e:
            skipped[name] = str(e)
            say(f"{name} | skipped: {e}")
        except Stopped:
            return say(f"{name} | stopped after {a.stop_after:g} minutes; runs are saved, the same "
                       "command goes on")
    if skipped:
        fail(f"not made: {', '.join(skipped)}; the first: {next(iter(skipped.values()))}")


def make(lab: Lab, name: str, asked: bool = True) -> None:
    """One figure: runs, numbers, picture, and its row among the results. `asked`: by its name.
    Raises UserError, Stopped."""
    claim, _, function = FIGURES[name]
    if lab.seeds and asked:
        demand_seeds(lab, name)
    partial = function in (races.race, tasks.reach, tasks.binding, ours.pretrain)
    lab = dataclasses.replace(lab, name=name, place=PLACES.get(name, ""), used=[], missing=[],
                              partial=partial)
    began = time.time()
    try:
        found, verdict = function(lab)
    except (KeyError, IndexError, ValueError, TypeError):
        if lab.missing:
            fail(f"it cannot be drawn without {', '.join(lab.missing)}, which failed; the same "
                 "command tries again")
        if not lab.draw:
            raise
        fail(f"{lab.out('')}: its CSV does not hold this figure's numbers; make it without --draw")
    say(f"{name} | {verdict}: {found} | {lab.out('')}")
    path = os.path.join(lab.results, "figures.csv")
    rows, row = told(path), dict(figure=name, claim=claim, ours=found, verdict=verdict)
    if not lab.draw:  # else the numbers are the old ones, and only the words may be new
        row |= cost_of(lab, began)
    rows[name] = rows.get(name, {}) | row
    if "commit" not in rows[name]:
        return  # drawn from a CSV that somebody brought along
    rows = [rows[k] for k in FIGURES if k in rows]
    write_csv(path, rows)
    put_rows(os.path.join(lab.results, "README.md"), rows)


def demand_seeds(lab: Lab, name: str) -> None:
    """Refuse --seeds for a figure that would not listen. Raises UserError."""
    jobs = planned(dataclasses.replace(lab, name=name, plan=True), FIGURES[name][2]).values()
    if {job.flags.get("seed", 0) for job in jobs} != {*lab.seeds}:
        fail("its seeds are fixed; leave --seeds out")


def cost_of(lab: Lab, began: float) -> dict:
    """Minutes, seeds and commits of the runs that a figure used."""
    minutes = sum(job.minutes or log(lab, job.name)[-1]["seconds"] / 60 for job in lab.used) or \
        (time.time() - began) / 60
    seeds = sorted({job.flags.get("seed", 0) for job in lab.used} or {0})
    commits = sorted({stored(lab, job.name, "finished.json")["commit"] for job in lab.used})
    return dict(minutes=round(minutes, 1), seeds=" ".join(map(str, seeds)),
                commit=" ".join(commits) or commit())


def told(path: str) -> dict:
    """The rows of figures.csv by figure; none where there is no file yet. Raises UserError."""
    rows = read_csv(path) if os.path.exists(path) else []
    columns = "figure", "claim", "ours", "verdict", "minutes", "seeds", "commit"
    if any(r.keys() != {*columns} for r in rows):
        fail(f"{path}: not the table that reproduce.py writes; put it back, or delete it")
    return {r["figure"]: r for r in rows}


def put_rows(path: str, rows: list[dict]) -> None:
    """The table of all figures, between its two marks in results/README.md, or at its end."""
    link = lambda k: f"[{k}]({PLACES.get(k, k)})"
    lines = ["| figure | the paper's claim | ours | | minutes | seeds | commit |",
             "|---|---|---|---|---|---|---|"]
    # a bar would end the cell
    clean = lambda text: str(text).replace("|", "\\|")
    lines += [f"| {link(r['figure'])} | {r['claim']} | {clean(r['ours'])} | **{r['verdict']}** | "
              f"{r['minutes']} | {r['seeds']} | {r['commit']} |" for r in rows]
    old = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            old = f.read()
    if BEGIN not in old:
        old = old.rstrip() + f"\n\n## Figures of the paper\n\n{BEGIN}\n{END}\n"
    before, rest = old.split(BEGIN, 1)
    with written_whole(path, "w") as f:
        f.write(before + "\n".join([BEGIN, *lines, END]) + rest.split(END, 1)[1])


def list_all(lab: Lab) -> None:
    """--list: a block a figure; minutes come from the runs that the figure itself asks for."""
    path = os.path.join(lab.results, "figures.csv")
    came_out, every = told(path), {}
    for name, (claim, what, function) in FIGURES.items():
        known = planned(dataclasses.replace(lab, name=name, plan=True), function)
        every |= known
        there = sum(finished(lab, job, known) for job in known.values())
        minutes = sum(job.minutes for job in known.values())
        cost = f"{len(known)} runs" + f" of {minutes:.0f} minutes in all" * (minutes > 0) + \
            f", {there} of them are there" if known else "no training, or that of other figures"
        row = came_out.get(name)
        print(f"{name:8} {claim}\n         we run: {what} ({cost})\n         came out: " +
              (f"{row['verdict']}: {row['ours']} (commit {row['commit']})" if row else
               "not made yet"))
    hours = sum(job.minutes for job in every.values()) / 60
    print(f"\n{len(every)} different runs, {hours:.0f} core-hours; {lab.together} at a time")


def planned(lab: Lab, function) -> dict:
    """name -> job of the runs a figure asks for; empty if it needs none."""
    try:
        function(lab)
    except Planned as e:
        return {job.name: job for job in e.args[0]}
    return {}


def read_flags(argv):
    p = parser("reproduce.py", __doc__)
    p.usage = "python reproduce.py [figures] [flags]"
    p.add_argument("figures", nargs="*", metavar="figure", help=f"{', '.join(FIGURES)}, or all")
    p.add_argument("--list", action="store_true", help="what there is, what it costs, what came "
                   "out; makes nothing (default: no)")
    p.add_argument("--quick", action="store_true", help="toy sizes, seconds, into a temporary "
                   "folder: does everything run? (default: no)")
    p.add_argument("--draw", action="store_true", help="draw again from the CSV (default: no)")
    p.add_argument("--runs_dir", default=Lab.runs, type=path, metavar="FOLDER",
                   help="(default: %(default)s)")
    p.add_argument("--results_dir", default=Lab.results, type=path, metavar="FOLDER",
                   help="(default: results/ of the project)")
    p.add_argument("--data_dir", default=flags.Config.data_dir, help="(default: %(default)s)")
    p.add_argument("--device", default="auto", help="of all runs (default: %(default)s)")
    p.add_argument("--together", type=int, default=2, help="runs at a time (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=0,
                   help="so many seeds instead of a figure's own number, where that may change "
                   "(default: %(default)s)")
    p.add_argument("--first_seed", type=int, default=0,
                   help="with --seeds: the first of them (default: %(default)s)")
    p.add_argument("--n_test", type=int, default=0,
                   help="test sequences; 0 = a figure's own number (default: %(default)s)")
    p.add_argument("--only", default="",
                   help="make only runs whose name contains this, and what they start "
                        "from; races are drawn from some, figures when all are there (default: "
                        "all)")
    p.add_argument("--stop_after", type=float, default=0.0,
                   help="end after so many minutes; runs are saved (default: never)")
    a = p.parse_args(argv)
    demand_sense(a, argv)
    return a


def demand_sense(a, argv) -> None:
    """Refuse flags that contradict each other, or mean nothing. Raises UserError."""
    for name in a.figures:
        if name not in FIGURES and name != "all":
            fail(f"{name}: no such figure; choose from {', '.join(FIGURES)}, all")
    if not a.figures and not a.list:
        fail(f"no figure is named; give --list, all, or some of {', '.join(FIGURES)}")
    if a.quick and a.draw:
        fail("--quick makes new numbers and --draw makes none; give one of them")
    if a.list:
        refuse("quick draw together device n_test only stop_after", flags_in(argv), "with --list")
    if a.draw:
        refuse("together device seeds first_seed n_test only stop_after", flags_in(argv),
               "with --draw")
    if a.first_seed and not a.seeds:
        fail("--first_seed says which seeds --seeds begins with; give both")
    for name in ("runs_dir", "results_dir"):
        if os.path.exists(getattr(a, name)) and not os.path.isdir(getattr(a, name)):
            fail(f"--{name} {getattr(a, name)} is no folder; give another")
    demand("together", a.together, 1, 1000)
    demand("seeds", a.seeds, 0, 1000)
    demand("first_seed", a.first_seed, 0, 10 ** 6)
    demand("n_test", a.n_test, 0, 10 ** 5)
    demand("stop_after", a.stop_after, 0, math.inf)


if __name__ == "__main__":
    cli(main)
