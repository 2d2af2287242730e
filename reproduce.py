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
import dataclasses
import math
import os
import signal
import tempfile
import time

import bptt
import dmt
import evaluate
import flags
import smt
from console import cli, demand, fail, parser
from figures import races
from figures.runs import Lab, Planned, Stopped, commit, finished, read_csv, say, write_csv
from model import CheckpointError
from sources.files import UserError, written_whole

SCRIPTS = dict(smt=smt.main, dmt=dmt.main, bptt=bptt.main, evaluate=evaluate.main)
# name -> (what the paper claims, what we run, the function that does it)
FIGURES = {
    "race14": ("MNIST 14×14: SMT → DMT draws and predicts better than BPTT",
               "three updaters, every method, 6 minutes a run", races.race),
    "race28": ("MNIST 28×28, T = 784: SMT → DMT is better than BPTT",
               "three updaters, every method, 40 minutes a run", races.race),
}
PLACES = dict(race14="backbones", race28="backbones")  # folders in results/ with another name
BEGIN, END = "<!-- reproduce.py writes from here -->", "<!-- to here -->"


def main(argv) -> None:
    a = read_flags(argv)
    lab = Lab(SCRIPTS, runs=a.runs_dir, results=a.results_dir, data_dir=a.data_dir,
              device=a.device, quick=a.quick, draw=a.draw, together=a.together, n_test=a.n_test,
              seeds=tuple(range(a.seeds)), only=a.only)
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs save and end
    skipped = {}
    for name in list(FIGURES) if "all" in a.figures else a.figures:
        try:
            make(lab, name)
        except (UserError, CheckpointError) as e:
            skipped[name] = str(e)
            say(f"{name} | skipped: {e}")
        except Stopped:
            return say(f"{name} | stopped after {a.stop_after:g} minutes; runs are saved, the same "
                       "command goes on")
    if skipped:
        fail(f"not made: {', '.join(skipped)}; the reasons are above")


def make(lab: Lab, name: str) -> None:
    """One figure: runs, numbers, picture, and its row among the results. Raises UserError,
    Stopped."""
    claim, _, function = FIGURES[name]
    lab = dataclasses.replace(lab, name=name, place=PLACES.get(name, ""), used=[])
    began = time.time()
    ours, verdict = function(lab)
    say(f"{name} | {verdict}: {ours} | {lab.out('')}")
    if lab.draw:
        return  # the numbers are the old ones, and so is their row
    minutes = sum(job.minutes for job in lab.used) or (time.time() - began) / 60
    seeds = sorted({job.flags.get("seed", 0) for job in lab.used} or {0})
    row = dict(figure=name, claim=claim, ours=ours, verdict=verdict, minutes=round(minutes, 1),
               seeds=" ".join(map(str, seeds)), commit=commit())
    path = os.path.join(lab.results, "figures.csv")
    rows = {r["figure"]: r for r in (read_csv(path) if os.path.exists(path) else [])} | {name: row}
    rows = [rows[k] for k in FIGURES if k in rows]
    write_csv(path, rows)
    put_rows(os.path.join(lab.results, "README.md"), rows)


def put_rows(path: str, rows: list[dict]) -> None:
    """The table of all figures, between its two marks in results/README.md, or at its end."""
    link = lambda k: f"[{k}]({PLACES.get(k, k)})"
    lines = ["| figure | the paper's claim | ours | | minutes | seeds | commit |",
             "|---|---|---|---|---|---|---|"]
    lines += [f"| {link(r['figure'])} | {r['claim']} | {r['ours']} | **{r['verdict']}** | "
              f"{r['minutes']} | {r['seeds']} | {r['commit']} |" for r in rows]
    old = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            old = f.read()
    if BEGIN not in old:
        old = old.rstrip() + f"\n\n## Figures of the paper\n\n{BEGIN}\n{END}\n"
    before, rest = old.split(BEGIN, 1)
    with written_whole(path, "w", mend="give another --results_dir") as f:
        f.write(before + "\n".join([BEGIN, *lines, END]) + rest.split(END, 1)[1])


def list_all(lab: Lab) -> None:
    """--list: a block a figure; minutes come from the runs that the figure itself asks for."""
    path = os.path.join(lab.results, "figures.csv")
    told = {r["figure"]: r for r in (read_csv(path) if os.path.exists(path) else [])}
    every = {}
    for name, (claim, what, function) in FIGURES.items():
        known = planned(dataclasses.replace(lab, name=name, plan=True), function)
        every |= known
        there = sum(finished(lab, job, known) for job in known.values())
        minutes = sum(job.minutes for job in known.values())
        cost = f"{len(known)} runs of {minutes:.0f} minutes in all, {there} of them are there" \
            if known else "no training, or that of other figures"
        row = told.get(name)
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
    p.add_argument("--runs_dir", default=Lab.runs, help="(default: %(default)s)")
    p.add_argument("--results_dir", default=Lab.results, help="(default: results/ of the project)")
    p.add_argument("--data_dir", default=flags.Config.data_dir, help="(default: %(default)s)")
    p.add_argument("--device", default="auto", help="of all runs (default: %(default)s)")
    p.add_argument("--together", type=int, default=2, help="runs at a time (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=0,
                   help="so many seeds instead of a figure's own number (default: %(default)s)")
    p.add_argument("--n_test", type=int, default=0,
                   help="test sequences; 0 = a figure's own number (default: %(default)s)")
    p.add_argument("--only", default="",
                   help="only runs whose name contains this, and what they start from "
                        "(default: all)")
    p.add_argument("--stop_after", type=float, default=0.0,
                   help="end after so many minutes; runs are saved (default: never)")
    a = p.parse_args(argv)
    for name in a.figures:
        if name not in FIGURES and name != "all":
            fail(f"{name}: no such figure; choose from {', '.join(FIGURES)}, all")
    if not a.figures and not a.list:
        fail(f"no figure is named; give --list, all, or some of {', '.join(FIGURES)}")
    if a.quick and a.draw:
        fail("--quick makes new numbers and --draw makes none; give one of them")
    demand("together", a.together, 1, 1000)
    demand("seeds", a.seeds, 0, 1000)
    demand("n_test", a.n_test, 0, 10 ** 9)
    demand("stop_after", a.stop_after, 0, math.inf)
    return a


if __name__ == "__main__":
    cli(main)
