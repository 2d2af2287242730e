"""What all figures share: training runs that resume, their scores, CSV files, rows of results.

    jobs = both("stack-0", dict(dataset="stack"), minutes=(4, 2))   # SMT, then DMT
    done = train(lab, jobs)                 # names of those that are finished; others have failed
    scores(lab, done, n=1000)               # name -> what evaluate.py --json says
    rows = table(lab, measure)              # measure() yields dicts; with --draw the CSV is read

A run lives in runs/reproduce/NAME. job.json there says what it is, so a run that was cut off goes
on, a finished one is used again, by other figures too, and one whose settings have changed, or the
preset's, is made anew. Runs are processes of their own, some at a time; with --quick they are
function calls at toy size.
"""
import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field

import data
import presets
from console import fail
from sources.files import written_whole

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMT_SHARE = 0.125  # of the minutes of SMT and what follows it: races and synthetic tasks


class Planned(Exception):
    """Raised by train() when a figure is only asked which runs it needs; args[0] are the jobs."""


class Stopped(Exception):
    """--stop_after is over, or somebody asked for an end; runs are saved."""


@dataclass
class Job:
    """One training run: flags of a script, and the run whose checkpoint it starts from."""
    name: str
    script: str                # smt, dmt or bptt
    minutes: float
    flags: dict = field(default_factory=dict)
    after: str = ""


@dataclass
class Lab:
    """Where and how figures are made. `name` is the figure at hand; `used` are the runs it used."""
    scripts: dict              # name -> main(argv) of smt, dmt, bptt, evaluate: for --quick
    name: str = ""
    place: str = ""            # its folder in results/, if not its name
    runs: str = os.path.join("runs", "reproduce")
    results: str = os.path.join(ROOT, "results")
    data_dir: str = "data"
    device: str = "auto"
    quick: bool = False
    draw: bool = False         # from the CSV alone
    plan: bool = False         # only ask which runs are needed
    together: int = 2          # runs at a time, one thread each
    seeds: tuple = ()          # instead of a figure's own
    n_test: int = 0            # instead of a figure's own
    only: str = ""             # make only runs whose name contains this
    partial: bool = False      # the figure at hand may be drawn from some of its runs
    stop_at: float = float("inf")
    used: list = field(default_factory=list)
    missing: list = field(default_factory=list)  # runs of the figure at hand that have failed

    def few(self, values, n: int = 1) -> list:
        """All of them, or with --quick the first n."""
        return list(values)[:n] if self.quick else list(values)

    def folder(self, name: str) -> str:
        return os.path.join(self.runs, name)

    def ckpt(self, name: str) -> str:
        return os.path.join(self.folder(name), "ckpt.pt")

    def out(self, name: str) -> str:
        """A file of this figure's folder in results/, whose folder exists afterwards."""
        folder = os.path.join(self.results, self.place or self.name)
        if not self.plan:
            os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, name)


def both(name: str, flags: dict, minutes: tuple, seed: int = 0, dmt: dict = {}) -> list[Job]:
    """SMT and the DMT that follows it, NAME-smt-SEED and NAME-dmt-SEED. `dmt`: flags of its own."""
    smt = Job(f"{name}-smt-{seed}", "smt", minutes[0], flags | dict(seed=seed))
    return [smt, Job(f"{name}-dmt-{seed}", "dmt", minutes[1], dmt | dict(seed=seed), smt.name)]


# ------------------------------------------------------------------------------- one run's command

# what bptt.py does not need; it has no such flags, but for --heads
TEACHER = "encoder", "enc_layers", "ctx_len", "fut_len", "heads", "past"
TOY = dict(d_model=16, n_heads=2, head_dim=0, enc_layers=1, dec_layers=1, rnn_layers=1)


def toy(job: Job) -> Job:
    """The same run in a fraction of a second, without data files: for --quick."""
    f = dict(job.flags)
    if f.get("dataset") in ("mnist", "sketchy"):
        f = {k: v for k, v in f.items() if k not in ("levels", "binarize")}
        f |= dict(dataset="glyphs", image_size=8)
    if f.get("dataset") == "tinystories":
        f |= dict(dataset="pydoc")
    most = dict(length=13, keys=2, symbols=4, examples=3, depth=3, mem_tokens=2, mem_dim=4,
                fut_len=4, heads=4, past=5, horizon=3, span=3, truncate=4, futures=4, rnn_batch=2)
    f |= {k: min(f[k], v) for k, v in most.items() if f.get(k)}
    f |= dict(preset="laptop", batch_size=4, n_val=2, eval_every=0, steps=2)
    return Job(job.name, job.script, 0, f if job.after else TOY | f, job.after)


def command_line(flags: dict) -> list[str]:
    """dict(rnn="gru", decay=False) -> ["--rnn", "gru", "--no-decay"]."""
    out = []
    for name, value in flags.items():
        if isinstance(value, bool):
            out.append(f"--{'' if value else 'no-'}{name}")
        else:
            out += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return out


def argv_of(lab: Lab, job: Job, resume: bool) -> list[str]:
    """The command line of a run, without the script's name."""
    flags = {k: v for k, v in job.flags.items() if job.script != "bptt" or k not in TEACHER or
             k == "heads" and job.flags.get("lambda_heads") and not job.after}
    if flags.get("rnn") == "gru":
        flags.pop("rnn_layers", None)  # it has none, and says so
    how = dict(minutes=job.minutes) if job.minutes else {}
    start = {"bptt": "init"}.get(job.script, "ckpt")
    how |= {start: lab.ckpt(job.after)} if job.after else {}
    how |= dict(device=lab.device, threads=1, out_dir=lab.folder(job.name))
    # saved often: a run that is cut off shall lose little
    return command_line(dict(preset="laptop", ckpt_every=100) | flags | how) + \
        ["--resume" if resume else "--overwrite"]


def record(lab: Lab, job: Job, jobs: dict) -> dict:
    """What makes this run what it is: the presets' part, and the runs before it, included."""
    before = record(lab, jobs[job.after], jobs) if job.after in jobs else None
    task = before["task"] if before else [job.flags.get(k, "") for k in ("dataset", "rnn")]
    recipe = {} if job.script == "evaluate" else presets.recipe(
        job.script, job.flags.get("preset", "laptop"), data.kinds(*task))
    return asdict(job) | dict(toy=lab.quick, before=before, task=task, recipe=recipe)


def stored(lab: Lab, name: str, file: str) -> dict | None:
    with contextlib.suppress(OSError, ValueError), open(os.path.join(lab.folder(name), file)) as f:
        return json.load(f)


def store(lab: Lab, name: str, file: str, content: dict) -> None:
    os.makedirs(lab.folder(name), exist_ok=True)
    with written_whole(os.path.join(lab.folder(name), file), "w") as f:
        json.dump(content, f, indent=1)


def finished(lab: Lab, job: Job, jobs: dict) -> bool:
    return stored(lab, job.name, "finished.json") is not None and \
        stored(lab, job.name, "job.json") == record(lab, job, jobs)


def commit() -> str:
    """Of this project, with "-dirty" where files differ from it that are no results (those change
    while figures are made); "unknown" without git."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    with contextlib.suppress(OSError):
        changed = git("diff", "--quiet", "HEAD", "--", ".", ":!results").returncode
        if said := git("rev-parse", "--short", "HEAD").stdout.strip():
            return said + "-dirty" * bool(changed)
    return "unknown"


# ------------------------------------------------------------------------------------ many of them

def train(lab: Lab, jobs: list[Job]) -> list[str]:
    """Make the runs that are not there yet -> names of those that are finished, in order. Raises
    DataError where a dataset is missing, Planned if nothing shall run."""
    # by name: two panels may ask for the same run
    jobs = every = [*{job.name: toy(job) if lab.quick else job for job in jobs}.values()]
    if lab.only:
        jobs = with_what_they_need(jobs, lab.only)
        if not jobs:
            fail(f"--only {lab.only}: no run of {lab.name} has that in its name; give a part of "
                 f"{every[0].name}, for example")
    if lab.plan:
        raise Planned(jobs)
    known = {job.name: job for job in every}
    for dataset in {job.flags["dataset"]: job for job in jobs if "dataset" in job.flags}.values():
        options = {k: v for k, v in dataset.flags.items() if k in
                   data.OPTIONS[dataset.flags["dataset"]]}
        data.load(dataset.flags["dataset"], lab.data_dir, **options)  # missing: say so before
    todo, began = [job for job in jobs if not finished(lab, job, known)], {}

    def start(job: Job):
        mine = record(lab, job, known)
        resume = stored(lab, job.name, "job.json") == mine and os.path.exists(lab.ckpt(job.name))
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(lab.folder(job.name), "finished.json"))
        store(lab, job.name, "job.json", mine)
        began[job.name] = commit()  # files may change while it runs
        return job.script, argv_of(lab, job, resume), os.path.join(lab.folder(job.name), "out.txt")

    def end(job: Job) -> None:
        store(lab, job.name, "finished.json", dict(commit=began[job.name]))

    work(lab, todo, start, end)
    done = [job for job in every if finished(lab, job, known)]
    lab.used = [*{job.name: job for job in [*lab.used, *done]}.values()]
    lab.missing += [job.name for job in jobs if job not in done]
    if jobs and not done:
        fail(f"{lab.name}: none of its runs has finished; their last words are in "
             f"{os.path.join(lab.runs, '*', 'out.txt')}")
    if lab.only and len(done) < len(every) and not lab.partial:
        fail(f"--only {lab.only}: {len(done)} of {len(every)} runs are there now, and {lab.name} "
             "needs all; leave --only out")
    return [job.name for job in done]


def with_what_they_need(jobs: list[Job], part: str) -> list[Job]:
    """Those whose name contains `part`, and the runs that they start from."""
    names = {job.name for job in jobs if part in job.name}
    while more := {job.after for job in jobs if job.name in names and job.after} - names:
        names |= more
    return [job for job in jobs if job.name in names]


def scores(lab: Lab, names, n: int = 1000, split: str = "test", length: int = 0) -> dict:
    """name -> what evaluate.py --json says of the first n sequences, of this length if one is
    given. Kept beside the checkpoint."""
    n = 2 if lab.quick else lab.n_test or n
    file = f"{split}-{n}{f'-{length}' * bool(length)}.json"
    path = {name: os.path.join(lab.folder(name), file) for name in names}
    fresh = lambda name: os.path.exists(path[name]) and \
        os.path.getmtime(path[name]) >= os.path.getmtime(lab.ckpt(name))
    todo = [Job(name, "evaluate", 0) for name in names if not fresh(name)]
    # another reproduce.py may be at the same evaluation
    out = lambda job: f"{path[job.name]}.{os.getpid()}"

    def start(job: Job):
        how = dict(ckpt=lab.ckpt(job.name), n_test=n, split=split, threads=1, device=lab.device)
        how |= dict(length=length) if length else {}
        return "evaluate", command_line(how) + ["--json"], out(job)

    def end(job: Job) -> None:
        with open(out(job)) as f:
            said = [line for line in f if line.startswith("{")]  # a warning may follow it
        store(lab, job.name, file, json.loads(said[-1]))
        os.remove(out(job))

    work(lab, todo, start, end)
    return {name: got for name in names if (got := stored(lab, name, file))}


def work(lab: Lab, jobs: list[Job], start, end) -> None:
    """Run jobs, lab.together at a time, each after the one it starts from. start(job) -> script,
    argv, file for its output; end(job) is called when it has succeeded. Where a run fails, those
    that start from it are left out and all others go on. Raises Stopped at lab.stop_at."""
    if lab.quick:
        for job in jobs:
            call(lab, *start(job))
            end(job)
        return
    waiting, running, failed, told = list(jobs), {}, set(), time.time() - 50
    try:
        while waiting or running:
            for job in ready(lab, waiting, running, failed):
                waiting.remove(job)
                script, argv, log = start(job)
                running[job.name] = job, launch(lab, script, argv, log), log, time.time()
            over = [n for n, (_, process, *_) in running.items() if process.poll() is not None]
            for name in over:
                job, process, log, since = running.pop(name)
                if process.returncode == 0:
                    end(job)
                    say(f"{lab.name} | {job.script}.py, {name}: "
                        f"{(time.time() - since) / 60:.1f} minutes")
                else:
                    failed.add(name)
                    say(f"{lab.name} | {name} failed: {last_line(log)}")
            if time.time() >= lab.stop_at:
                raise Stopped
            if time.time() - told >= 60:
                told = time.time()
                say(progress(lab, jobs, waiting, running))
            time.sleep(0.2)
    finally:  # Ctrl-C, --stop_after, an error: a run saves itself when it is asked once
        for _, process, *_ in running.values():
            process.terminate()
        for _, process, *_ in running.values():
            process.wait()


def ready(lab: Lab, waiting: list[Job], running: dict, failed: set) -> list[Job]:
    """The jobs that can start now. Moves those that never can from waiting to failed."""
    for job in [*waiting]:
        if job.after in failed:
            waiting.remove(job)
            failed.add(job.name)
            say(f"{lab.name} | {job.name} is left out, {job.after} has failed")
    unfinished = {job.name for job in waiting} | running.keys()
    able = [job for job in waiting if job.after not in unfinished]
    return able[:max(0, lab.together - len(running))]


def call(lab: Lab, script: str, argv: list[str], log: str) -> None:
    """The script's main in this process, what it prints into a file."""
    with open(log, "w", encoding="utf-8") as f, contextlib.redirect_stdout(f):
        lab.scripts[script](argv)


def launch(lab: Lab, script: str, argv: list[str], log: str) -> subprocess.Popen:
    """The script as a process. A session of its own: Ctrl-C reaches it through us, once, because
    asked twice it would end unsaved."""
    with open(log, "w", encoding="utf-8") as f:
        # not as --data_dir, which tasks without files refuse
        return subprocess.Popen([sys.executable, os.path.join(ROOT, f"{script}.py"), *argv],
                                stdout=f, stderr=subprocess.STDOUT, start_new_session=True,
                                env=os.environ | dict(SMT_DATA_DIR=lab.data_dir))


def last_line(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as f:
        return ([line.strip() for line in f if line.strip()] or ["it said nothing"])[-1]


def progress(lab: Lab, jobs: list[Job], waiting: list[Job], running: dict) -> str:
    """One line: how many runs are done, and minutes left if the cores are ours alone; of runs that
    are counted in steps nobody knows."""
    left = sum(job.minutes for job in waiting) + sum(
        max(0.0, job.minutes - (time.time() - since) / 60) for job, _, _, since in running.values())
    about = f", about {left / lab.together:.0f} minutes left" if left else ""
    return f"{lab.name} | {len(jobs) - len(waiting) - len(running)} of {len(jobs)} done{about} | " \
        f"now {', '.join(running)}"


def say(line: str) -> None:
    print(line, flush=True)


# -------------------------------------------------------------------------------- numbers on paper

def log(lab: Lab, name: str) -> list[dict]:
    """The rows of a run's log.csv, numbers as floats, empty cells left out."""
    return read_csv(os.path.join(lab.folder(name), "log.csv"))


def looks(lab: Lab, job: Job, jobs: list[Job]):
    """The rows of a run's log that have a validation of the RNN alone; what they cost comes on top
    of the runs that it goes on from."""
    named, earlier = {job.name: job for job in jobs}, job.after
    before = dict(seconds=0, tokens=0, layers=0)
    while earlier:
        before = {k: v + log(lab, earlier)[-1][k] for k, v in before.items()}
        earlier = named[earlier].after
    for r in log(lab, job.name):
        if "val_rollout" in r:
            yield r | {k: v + r[k] for k, v in before.items()}


def curves(lab: Lab, jobs: list[Job], done: list[str]):
    """CSV rows of the validation losses of the jobs that are done."""
    for job in (job for job in jobs if job.name in done):
        task, rnn, method = job.name.rsplit("-", 1)[0].split("-", 2)
        for r in looks(lab, job, jobs):
            yield dict(task=task, rnn=rnn, method=method, nats=r["val_rollout"],
                       minutes=r["seconds"] / 60, tokens=r["tokens"], layers=r["layers"])


def read_csv(path: str) -> list[dict]:
    """Rows with numbers as int or float; empty cells are left out. Raises UserError."""
    def number(text: str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text

    try:
        with open(path, newline="", encoding="utf-8") as f:
            # a commit may look like a number: 0858513, 12e4567
            return [{k: v if k == "commit" else number(v) for k, v in row.items() if v}
                    for row in csv.DictReader(f)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        why = getattr(e, "strerror", None) or "it is no CSV"
        fail(f"{path}: cannot be read ({why}); make it without --draw")


def write_csv(path: str, rows: list[dict]) -> None:
    """Columns in the order in which they come up; floats with five digits."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    short = lambda v: f"{v:.5g}" if isinstance(v, float) else "" if v is None else v
    with written_whole(path, "w") as f:
        out = csv.DictWriter(f, columns, lineterminator="\n")
        out.writeheader()
        out.writerows([{k: short(v) for k, v in row.items()} for row in rows])


def table(lab: Lab, measure, name: str = "") -> list[dict]:
    """The numbers of the figure at hand: with --draw from its CSV, else measured, written there and
    read again, so that both draw the same picture."""
    path = lab.out(f"{name or lab.name}.csv")
    if not lab.draw:
        rows = [dict(row) for row in measure()]
        if not rows:  # or good numbers would be overwritten with none
            fail(f"{lab.name}: nothing was measured; the last words of its runs are in "
                 f"{os.path.join(lab.runs, '*', 'out.txt')}")
        write_csv(path, rows)
    return read_csv(path)
