"""What the training loops share: learning rate, clipping, average, log, checkpoints, resume.

A script's own file holds its objective and its loop; the loop makes these small calls:

    run = trainer.Run("smt", cfg, nets, trained, c, task, device)   # out_dir, optimiser, resume
    while run.unfinished():
        run.set_learning_rate()
        losses = objective(...)
        losses["loss"].backward()
        run.update(losses, tokens, layers)          # clip, step, average, count, log
        if run.time_to_evaluate() or run.time_to_save():
            with run.averaged():                    # the networks hold averaged weights
                if run.time_to_evaluate():
                    run.report(summary(evaluate(...)), best="rollout")
                if run.time_to_save():
                    run.save()
    run.finish("evaluate.py")                       # and what may be run next

A run writes into out_dir: ckpt.pt (newest state, resumable), best.pt (best on the validation
split), log.csv, config.json, curve.png and samples.png (or samples.txt).
"""
import contextlib
import csv
import dataclasses
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time

import torch
from torch import nn

import ranks
from console import fail, hush, pick_device
from flags import load_data
from graph import graph_updates
from model import FORMAT, CheckpointError, ModelConfig, load_checkpoint
from muon import Muon
from sources.files import Data, lock, regular, writing, written_whole


def setup(cfg, ckpt: dict | None = None) -> tuple[str, Data]:
    """Device and data of a run, which fit the checkpoint it starts from; seeds torch."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    device = ranks.join(pick_device(cfg.device))
    return device, load_data(vars(cfg), device, ckpt)


def model_config(cfg, task: Data) -> ModelConfig:
    """Network sizes from flags and data; Tc, Tf and F are cut to the sequence. Raises
    UserError."""
    # 0 means the whole sequence, and no more than that can be read or predicted.
    cut = lambda n: min(n, task.T) if n else task.T
    if cfg.encoder == "causal" and task.timestamps and cut(cfg.ctx_len) < task.T:
        fail(f"--ctx_len {cfg.ctx_len} is shorter than the sequences of {task.T}, and a causal "
             "encoder makes no labels beyond it; give 0, or --encoder bidirectional, whose window "
             "slides")
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    sizes = {k: v for k, v in vars(cfg).items() if k in names}
    return ModelConfig(**sizes | dict(
        vocab=task.vocab, n_out=task.n_out, T=task.T, ctx_len=cut(cfg.ctx_len),
        fut_len=cut(cfg.fut_len), heads=min(cfg.heads, task.T),
        timestamps=cfg.timestamps if task.timestamps else "none"))


def compile_blocks(nets: dict[str, nn.Module]) -> None:
    """torch.compile both halves of every Transformer block, once for all lengths; state_dict keeps
    its names."""
    # All blocks share one code, compiled anew for each mixture of widths, mask, graph and dtype;
    # torch gives up after 8
    torch._dynamo.config.recompile_limit = 64
    for block in (b for net in nets.values() for b in net.modules() if hasattr(b, "w_qkv")):
        block.qkv = torch.compile(block.qkv, dynamic=True)
        block.mix = torch.compile(block.mix, dynamic=True)


def make_optimizers(cfg, nets: dict[str, nn.Module], trained: list[list[nn.Parameter]],
                    device: str) -> list:
    """AdamW with the paper's betas (0.9, 0.95) and weight decay 0.01; or Muon for the matrices
    within a network (w_*) and of the GRU's cell, and that AdamW for the rest: embeddings,
    registers, m_0, what ends in logits, biases."""
    # Muon steps equally far along all directions of a map from stream to stream. The rows of an
    # embedding or of a last layer are symbols, most of them seldom seen; they shall not all move
    # equally far.
    rest, matrices = [p for group in trained for p in group], []
    if cfg.optimizer == "muon":
        inside = {id(p) for net in nets.values() for name, p in net.named_parameters()
                  if ("w_" in name or "cell.weight" in name) and p.ndim == 2}
        matrices = [p for p in rest if id(p) in inside]
        rest = [p for p in rest if id(p) not in inside]
    out = []
    if rest:
        out.append(torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.01,
                                     fused=device != "mps"))  # which has no fused kernel
    if matrices:
        out.append(Muon(matrices, lr=cfg.lr))
    return out


OLD = "best.pt", "curve.png", "samples.png", "samples.txt"  # go where a run is replaced


class Run:
    """One training run.

    nets       name -> module, all saved
    trained    groups of parameters to train
    gen        all randomness of training; evaluation has its own, so it changes nothing
    """

    def __init__(self, script: str, cfg, nets: dict[str, nn.Module],
                 trained: list[list[nn.Parameter]], model: ModelConfig, task: Data, device: str):
        self.script, self.cfg, self.nets, self.trained = script, cfg, nets, trained
        self.model, self.task, self.device = model, task, device
        self.optimizers = make_optimizers(cfg, nets, trained, device)
        # A rollout multiplies the noise that the last few steps left in the weights; their average
        # has less.
        self.average = [p.detach().clone() for p in self.parameters()] if cfg.ema else []
        self.newest = None  # weights that training goes on with, while the networks hold averages
        # On the CPU, whatever the device: the same seed gives the same batches everywhere.
        self.gen = torch.Generator().manual_seed(cfg.seed + 1_000_003 * ranks.RANK)
        self.step, self.tokens, self.layers = 0, 0, 0  # what was spent, and seconds of it
        self.spent, self.best = 0.0, math.inf
        self.sums, self.metrics = {}, {}  # losses since the last log line; the last evaluation
        self.history, self.columns, self.written = [], [], -1  # log.csv, and how much is in it
        # One thread of a CPU has a clock of its own, which a busy machine does not push on: races
        # between methods stay fair whatever else runs.
        self.clock = time.process_time if device == "cpu" and cfg.threads == 1 else time.time
        self.began = self.last_log = self.clock()
        self.table = self.open_log()
        if cfg.resume:
            self.load(load_checkpoint(self.path("ckpt.pt")))
        self.tokens_logged = self.tokens
        # The old run stays until this one has a checkpoint. Of the ranks only the first writes.
        self.replaces = bool(ranks.RANK or cfg.overwrite and os.path.exists(self.path("ckpt.pt")))
        self.begin_files()
        if cfg.compile:
            compile_blocks(nets)
        if cfg.graph and "rnn" in nets:
            graph_updates(nets["rnn"])
        self.asked = 0  # to stop, by the signal of this number
        self.called = time.time()
        self.look_at_the_clock()
        self.stopped = False  # not before something can be saved
        self.handlers = {s: signal.signal(s, self.ask_to_stop)
                         for s in (signal.SIGINT, signal.SIGTERM)}
        self.say_hello()

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for group in self.trained for p in group]

    # ------------------------------------------------------------------------------ begin and end

    def say_hello(self) -> None:
        here = os.path.dirname(os.path.abspath(__file__))
        commit = ""
        with contextlib.suppress(OSError):  # git may be absent
            commit = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"],
                                    capture_output=True, text=True).stdout.strip()
        machine = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else \
            platform.machine()
        self.say(f"{self.script} on {self.cfg.dataset} | preset {self.cfg.preset} | "
            f"torch {torch.__version__} | {self.device} ({machine}, {torch.get_num_threads()} "
            f"threads) | commit {commit or 'unknown'}")
        trained = {id(p) for p in self.parameters()}
        for name, net in self.nets.items():
            sizes = {id(p): p.numel() for p in net.parameters()}
            self.say(f"  {name}: {sum(sizes.values()):,} parameters, "
                f"{sum(n for p, n in sizes.items() if p in trained):,} trained")
        self.say("  " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(self.cfg).items()
                            if v not in (None, "")))
        if self.step:
            self.say(f"  resumed at step {self.step}, {self.spent / 60:.1f} minutes spent")

    def say(self, line: str) -> None:
        """Print it, the first rank. Where nobody reads any more, stop as after Ctrl-C."""
        if ranks.RANK:
            return
        try:
            print(line, flush=True)
        except OSError:  # the reader of a pipe has left, or the disk with the output is full
            hush()
            self.asked = self.asked or 13  # SIGPIPE

    def ask_to_stop(self, number, frame) -> None:
        """Ctrl-C or SIGTERM: the loop ends after this turn. Asked again: at once, unsaved."""
        if self.asked:
            sys.exit(128 + number)
        self.asked = number
        with contextlib.suppress(OSError):  # print could not be called while it prints
            os.write(2, b"stopping after this step, saved; Ctrl-C again stops at once, unsaved\n")

    def elapsed(self) -> float:
        """Seconds, all resumes together."""
        return self.spent + self.clock() - self.began

    def look_at_the_clock(self) -> None:
        """How far is the run, and shall it end? Asked once an update and at no other time: the
        questions below, a few milliseconds apart, must agree on whether this turn is the last."""
        # The part that is done counts whichever limit is nearer, --steps or --minutes.
        c, seconds = self.cfg, time.time() - self.called
        progress = min(1.0, max(self.step / c.steps if c.steps else 0.0,
                                self.elapsed() / 60 / c.minutes if c.minutes else 0.0))
        stopped = bool(self.asked or c.stop_after and seconds > 60 * c.stop_after)
        # clocks differ, and processes that disagree would wait for each other for ever
        self.progress, stopped = ranks.decided(progress, stopped)
        self.done, self.stopped = self.progress >= 1, bool(stopped)

    def unfinished(self) -> bool:
        """Shall there be another turn of the loop? False when --steps or --minutes are over, and
        when Ctrl-C, SIGTERM or --stop_after asked for an end."""
        self.turn = self.step  # where this turn begins
        self.write_log()  # the last turn's row is whole
        return not self.done and not self.stopped

    def time_to_evaluate(self) -> bool:
        return not ranks.RANK and (self.done or self.passed(self.cfg.eval_every))

    def time_to_save(self) -> bool:
        return self.done or self.stopped or self.passed(self.cfg.ckpt_every)

    def passed(self, every: int) -> bool:
        """Did this turn of the loop reach a multiple of `every` steps?"""
        # Not step % every == 0: a turn of DMT makes many steps and may jump over the multiple.
        return bool(every) and self.step // every > self.turn // every

    def finish(self, *then: str) -> None:
        """Say where everything is and which scripts come next; a run that was stopped exits here
        and says how to go on."""
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        self.write_log()
        os.close(self.table)
        ranks.least(0)  # nobody leaves before rank 0 has written everything
        c = self.cfg
        if not self.done:
            here = sys.argv[0] if os.path.basename(sys.argv[0]) == f"{self.script}.py" else \
                f"{self.script}.py"  # called by another script
            self.say(f"stopped at step {self.step}; continue with: python {shlex.quote(here)} "
                     f"--resume --out_dir {shlex.quote(c.out_dir)}")
            sys.exit(128 + self.asked if self.asked else 0)  # what a shell expects: 130 is Ctrl-C
        made = [name for name in ("ckpt.pt", "log.csv", *OLD) if os.path.exists(self.path(name))]
        self.say(f"done: {self.step} steps, {self.elapsed() / 60:.1f} minutes; results in "
                 f"{c.out_dir}: {', '.join(made)}")
        ckpt = shlex.quote(self.path("ckpt.pt"))
        self.say("next: " + " and ".join(f"python {script} --ckpt {ckpt}" for script in then))

    # --------------------------------------------------------------------------------- one step

    def set_learning_rate(self) -> None:
        c, cosine = self.cfg, 0.5 * (1 + math.cos(math.pi * self.progress))
        # The cosine begins at step 0, not after the warm-up; in that hundredth of a run it falls by
        # 0.03 %.
        total = c.steps or (self.step + 1) / max(self.progress, 1e-6)  # a clock: a guess
        warmup = c.warmup if c.warmup >= 1 else c.warmup * total
        scale = min(1.0, (self.step + 1) / max(1, warmup))  # step + 1: at rate 0 a step is lost
        scale *= c.decay + (1 - c.decay) * cosine
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.cfg.lr * scale

    def count(self, tokens: int, layers: int) -> None:
        """What training costs, on the axes of the paper's Fig. 6: tokens seen, and layers of a
        forward pass that had to run one after another."""
        self.tokens += tokens
        self.layers += layers

    def update(self, losses: dict[str, torch.Tensor], tokens: int = 0, layers: int = 0) -> None:
        """One optimiser step with the gradients that are there, and all that follows from it."""
        self.count(tokens, layers)
        # Summed where they are: to read a number from a GPU after every step would make it wait.
        for k, v in losses.items():
            self.sums[k] = self.sums.get(k, 0.0) + v.detach()
        # The paper clips teacher and RNN apart. Their gradients have different sizes, and one scale
        # for both would let the larger decide how far the smaller one steps.
        ranks.average_gradients(self.parameters())
        for group in self.trained:  # each by itself: a burst in one must not shrink another's step
            norm = nn.utils.clip_grad_norm_(group, 1.0)
            self.sums["grad"] = self.sums.get("grad", 0.0) + norm
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.sums["count"] = self.sums.get("count", 0) + 1
        # A short memory at first, or the random first weights would stay in the average for long
        decay = min(self.cfg.ema, (self.step + 1) / (self.step + 10))
        if self.average:
            with torch.no_grad():  # all at once: one kernel instead of one for each
                torch._foreach_lerp_(self.average, self.parameters(), 1 - decay)
        self.step += 1
        self.look_at_the_clock()
        if self.done or self.step % self.cfg.log_every == 0:
            self.log()

    # -------------------------------------------------------------------------------------- log

    def log(self) -> None:
        """One line, and one row of log.csv, of what happened since the last."""
        c, count = self.cfg, self.sums.pop("count")
        means, self.sums = {k: float(v) / count for k, v in self.sums.items()}, {}
        self.demand_finite(means)
        if ranks.RANK:
            return
        seconds = max(self.clock() - self.last_log, 1e-9)
        speed = (self.tokens - self.tokens_logged) / seconds
        self.last_log, self.tokens_logged = self.clock(), self.tokens
        # All optimisers have the same rate; where there are both a step limit and a clock, the
        # nearer one ends.
        lr = self.optimizers[0].param_groups[0]["lr"]
        left = [(c.steps - self.step) * seconds / count] * bool(c.steps) + \
            [c.minutes * 60 - self.elapsed()] * bool(c.minutes)
        self.say(f"step {self.step}{f'/{c.steps}' if c.steps else ''} | " +
            " | ".join(f"{k} {v:.4f}" for k, v in means.items()) +
            f" | lr {lr:.1e} | {speed / 1e3:.1f}k tok/s | eta {max(0, min(left)) / 60:.1f}m")
        self.record(dict(lr=lr) | means)

    def report(self, numbers: dict, best: str) -> None:
        """Keep what an evaluation on the validation split found; best.pt holds the weights with
        the lowest `best`. Inside averaged()."""
        if self.replaces and ranks.WORLD == 1:  # others would have to send what a checkpoint holds
            self.save()
        self.metrics = {k: v for k, v in numbers.items() if isinstance(v, (int, float))}
        self.say(f"step {self.step} | {self.elapsed() / 60:.1f}m | validation | " +
            " | ".join(f"{k} {v:.4g}" for k, v in self.metrics.items()))
        if self.metrics[best] < self.best:
            self.best = self.metrics[best]
            with self.open("best.pt") as f:
                torch.save(self.state(), f)
        self.record({"val_" + k: v for k, v in self.metrics.items()})
        with self.open("curve.png") as f:
            draw_curve(self.history, f)

    def record(self, row: dict) -> None:
        """Add to the history, one row a step: an evaluation after a log line joins its row."""
        row = dict(step=self.step, seconds=round(self.elapsed(), 2), tokens=self.tokens,
                   layers=self.layers) | row
        if self.history and self.history[-1]["step"] == self.step:
            row = self.history.pop() | row
        else:
            self.write_log()
        self.history.append(row)

    def open_log(self) -> int:
        """log.csv, open and locked while this process lives: two runs in one folder would mix. It
        grows, so it is the one file that is not written whole. Raises UserError."""
        with writing(self.path("log.csv"), self.mend()):
            os.makedirs(self.cfg.out_dir, exist_ok=True)
            file = os.open(regular(self.path("log.csv")), os.O_RDWR | os.O_CREAT, 0o666)
        if not ranks.RANK and lock(file) is False:
            fail(f"--out_dir {self.cfg.out_dir}: another run is writing there; wait for it, or "
                 "give another folder")
        return file

    def open_table(self):
        """log.csv as a file; to close it leaves the lock."""
        return open(self.table, "r+", newline="", encoding="utf-8", errors="replace",
                    closefd=False)

    def write_log(self) -> None:
        """Append to log.csv what it lacks. A resumed run, and new columns such as those of the
        first evaluation, write all of it again."""
        if self.replaces or self.written == len(self.history):
            return
        rows = self.history[max(self.written, 0):]
        columns = list(dict.fromkeys([*self.columns, *(k for row in rows for k in row)]))
        with writing(self.path("log.csv"), self.mend()), self.open_table() as f:
            f.seek(0, os.SEEK_END)
            if self.written < 0 or columns != self.columns:
                f.seek(0)
                rows = [dict(zip(columns, columns))] * bool(columns) + self.history
            csv.DictWriter(f, columns).writerows(rows)
            f.truncate()
        self.columns, self.written = columns, len(self.history)

    def read_log(self) -> list[dict]:
        """The rows of log.csv up to this step. What a killed run left behind it is cut off, and so
        is what is damaged."""
        rows, number = [], lambda v: int(v) if v.isdigit() else float(v)
        with self.open_table() as f, contextlib.suppress(KeyError, ValueError, TypeError,
                                                         AttributeError, csv.Error):
            for row in csv.DictReader(f):
                row = {k: number(v) for k, v in row.items() if v}
                if row["step"] > self.step:
                    break
                rows.append(row)
        return rows

    def demand_finite(self, numbers: dict[str, float]) -> None:
        if bad := [k for k, v in numbers.items() if not math.isfinite(v)]:
            path = self.path("ckpt.pt")
            last = f"the last good checkpoint is {path}" if os.path.exists(path) else \
                "there is no checkpoint yet"
            fail(f"{', '.join(bad)} is not finite at step {self.step}; {last}; train again with a "
                 "smaller --lr")

    # ------------------------------------------------------------------------------ checkpoints

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the networks hold the average of their weights over the last steps: that is what
        is evaluated, sampled and saved. Afterwards they hold the newest weights again, whatever
        happened, and training goes on as if nobody had looked."""
        began = self.clock()
        # A log line sees the losses only every so many steps. One look at the weights finds what
        # broke since.
        weights = sum(p.detach().float().norm() for p in self.parameters())
        self.demand_finite({"weights": float(weights)})  # or good files would be overwritten
        # Swap: the average goes into the networks, so that evaluation, samples and files all use it
        # without knowing. Training must not go on from it, it lags behind; so the newest weights
        # wait here.
        self.newest = [p.detach().clone() for p in self.parameters()]
        with torch.no_grad():
            # With --ema 0 there is no average, and the newest weights stay where they are.
            for p, slow in zip(self.parameters(), self.average):
                p.copy_(slow)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, newest in zip(self.parameters(), self.newest):
                    p.copy_(newest)
            self.newest = None
            self.last_log += self.clock() - began  # looking is no part of the speed

    def state(self) -> dict:
        """What a user of the trained networks needs: plain types and tensors."""
        return dict(format=FORMAT, script=self.script, step=self.step, tokens=self.tokens,
                    layers=self.layers, config=dataclasses.asdict(self.cfg),
                    model=dataclasses.asdict(self.model), image=self.task.image,
                    metrics=self.metrics,
                    data=self.task.mark) | \
            {name: net.state_dict() for name, net in self.nets.items()}

    def save(self) -> None:
        """ckpt.pt: what a user needs, and what the next step needs. Inside averaged()."""
        rng = ranks.gathered(self.gen.get_state())
        if ranks.RANK:
            return
        # The networks in the file are averages; `newest`, optimisers and generators are for
        # --resume alone. With all of them a resumed run takes the steps that the uninterrupted one
        # takes.
        full = self.state() | dict(
            optimizers=[o.state_dict() for o in self.optimizers], newest=self.newest,
            elapsed=self.elapsed(), best=self.best, sums=self.sums,
            rng=rng, torch_rng=torch.get_rng_state())
        self.write_log()  # first: what lies behind a checkpoint is cut off, before it nothing lacks
        with self.open("ckpt.pt") as f:
            torch.save(full, f)
        if self.replaces:
            self.replaces = False
            for name in OLD:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.path(name))
            self.begin_files()

    def begin_files(self) -> None:
        """log.csv and config.json of this run."""
        self.write_log()
        if not self.replaces:
            with self.open("config.json", "w") as f:
                json.dump(dataclasses.asdict(self.cfg), f, indent=1)

    def load(self, ckpt: dict) -> None:
        """Go on from a checkpoint of this run. Raises CheckpointError, UserError."""
        if ckpt.get("data", self.task.mark) != self.task.mark:
            fail(f"{ckpt['path']}: the run began with another text than the one that is there now; "
                 "put that one back, or start again with another --out_dir")
        try:
            if ckpt["model"] != dataclasses.asdict(self.model):
                raise ValueError("its sizes are not those of its config")
            for name, net in self.nets.items():
                net.load_state_dict(ckpt[name])
            self.average = [p.detach().clone() for p in self.parameters()] if self.cfg.ema else []
            with torch.no_grad():
                for p, newest in zip(self.parameters(), ckpt["newest"], strict=True):
                    p.copy_(newest.view(p.shape))
            for optimizer, state in zip(self.optimizers, ckpt["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]  # made of the flags, as ever
                optimizer.load_state_dict(dict(state=state["state"], param_groups=groups))
                for p, kept in optimizer.state.items():
                    if any(v.shape not in (p.shape, ()) for v in kept.values()):
                        raise ValueError("optimizers of other networks")
            self.step, self.spent, self.best = ckpt["step"], ckpt["elapsed"], ckpt["best"]
            self.tokens, self.layers = ckpt["tokens"], ckpt["layers"]
            self.sums, self.metrics = ckpt["sums"], ckpt["metrics"]
            states = ckpt["rng"].split(len(self.gen.get_state()))  # one of each rank
            if len(states) != ranks.WORLD:
                raise ValueError(f"it is a run of {len(states)} processes, not {ranks.WORLD}")
            self.gen.set_state(states[ranks.RANK].clone())  # torch crashes on a part of a tensor
            torch.set_rng_state(ckpt["torch_rng"])
        except (AttributeError, KeyError, ValueError, RuntimeError, TypeError) as e:
            reason = str(e).splitlines()[0][:120]
            raise CheckpointError(f"{self.path('ckpt.pt')}: cannot be resumed ({reason}); start "
                                  "again with --overwrite or another --out_dir") from None
        self.history = self.read_log()

    def path(self, name: str) -> str:
        return os.path.join(self.cfg.out_dir, name)

    def mend(self) -> str:
        return f"make room, or give another folder than --out_dir {self.cfg.out_dir}"

    def open(self, name: str, mode: str = "wb"):
        """A file of out_dir to write, whole or not at all. Raises UserError."""
        return written_whole(self.path(name), mode, self.mend())


def draw_curve(history: list[dict], file) -> None:
    """Training losses, and the validation numbers that share a unit, against minutes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    no_loss = "step", "seconds", "tokens", "layers", "lr", "grad"
    # Columns come in the order in which they were first logged; not all rows have all of them.
    losses = [k for k in dict.fromkeys(k for row in history for k in row)
              if k not in no_loss and not k.startswith("val_")]
    panels = {"training": losses,
              "validation loss": ["val_teacher", "val_one_step", "val_rollout"],
              "validation drift (1 - R²) and KL": ["val_drift", "val_one_step_drift", "val_kl"]}
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for ax, (title, names) in zip(axes, panels.items()):
        for name in names:
            points = [(r["seconds"] / 60, r[name]) for r in history if name in r]
            if points:
                ax.plot(*zip(*points), ".-", label=name.removeprefix("val_"))
        ax.set(title=title, xlabel="minutes")
        if ax.lines:
            ax.legend()
    fig.tight_layout()
    fig.savefig(file, dpi=90, format="png")
    plt.close(fig)
