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
from checkpoints import FORMAT, load_checkpoint
from console import fail, hush, pick_device
from curve import draw_curve
from flags import load_data
from graph import graph_updates
from model import ModelConfig
from muon import Muon, make_optimizers
from sources.files import Data, lock, regular, writing, written_whole


def setup(cfg, ckpt: dict | None = None) -> tuple[str, Data]:
    """Device and data of a run, which fit the checkpoint it starts from; seeds torch."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    device = ranks.join(pick_device(cfg.device))
    return device, load_data(vars(cfg), device, ckpt)


def model_config(cfg, task: Data) -> ModelConfig:
    """Network sizes from flags and data; Tc, Tf, F and P are cut to the sequence. Raises
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
        fut_len=cut(cfg.fut_len), heads=min(cfg.heads, task.T), past=min(cfg.past, task.T - 1),
        timestamps=cfg.timestamps if task.timestamps else "none"))


def compile_blocks(nets: dict[str, nn.Module]) -> None:
    """torch.compile both halves of every Transformer block, once for all lengths; state_dict keeps
    its names. Raises UserError where torch cannot compile."""
    try:  # a kernel of one line, because what compiles blocks does so in the first step
        torch.compile(torch.exp)(next(p.data for net in nets.values() for p in net.parameters()))
    except Exception as e:  # no compiler, no headers, no Triton: each has a type of its own
        fail(f"--compile cannot be used here ({' '.join(str(e).split())[:160]}); leave it out")
    # All blocks share one code, compiled anew for each mixture of widths, mask, graph and dtype;
    # torch gives up after 8
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else \
        "cache_size_limit"  # its name before torch 2.7
    setattr(torch._dynamo.config, limit, 64)
    for block in (b for net in nets.values() for b in net.modules() if hasattr(b, "w_qkv")):
        block.qkv = torch.compile(block.qkv, dynamic=True)
        block.mix = torch.compile(block.mix, dynamic=True)


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
        # a rollout multiplies the noise that the last steps left in the weights; averages have less
        self.average = self.copies() if cfg.ema else []
        # On the CPU, whatever the device: the same seed gives the same batches everywhere.
        self.gen = torch.Generator().manual_seed(cfg.seed + 1_000_003 * ranks.RANK)
        self.step, self.tokens, self.layers = 0, 0, 0
        self.spent = 0.0  # seconds of earlier calls
        self.best = math.inf
        self.kept = {}  # tensors that the script itself needs to go on
        self.sums, self.metrics = {}, {}  # losses since the last log line; the last evaluation
        self.history, self.columns = [], []  # rows of log.csv, and what it has columns for
        if cfg.compile:  # before anything is written: it may be refused
            compile_blocks(nets)
        # One thread of a CPU has a clock of its own, which a busy machine does not push on: races
        # between methods stay fair whatever else runs.
        alone = device.startswith("cpu") and cfg.threads == 1
        self.clock = time.process_time if alone else time.time
        self.began = self.last_log = self.clock()
        self.table = self.open_log()
        if cfg.resume:
            self.load(load_checkpoint(self.path("ckpt.pt")))
        self.tokens_logged = self.tokens
        # The first rank alone writes, and over an old run only when it has a checkpoint.
        self.waits = ranks.RANK or cfg.overwrite and os.path.exists(self.path("ckpt.pt"))
        if not self.waits:
            self.begin_files()
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

    def copies(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    @torch.no_grad()
    def put(self, weights: list[torch.Tensor]) -> None:
        """Into the networks."""
        for p, v in zip(self.parameters(), weights, strict=True):
            p.copy_(v.view(p.shape))  # another shape is refused, not broadcast

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
        """How far is the run, and shall it end? Asked once an update: the questions below, some
        milliseconds apart, must agree on whether this turn is the last."""
        # The part that is done counts whichever limit is nearer, --steps or --minutes.
        c, seconds = self.cfg, time.time() - self.called
        progress = min(1.0, max(self.step / c.steps if c.steps else 0.0,
                                self.elapsed() / 60 / c.minutes if c.minutes else 0.0))
        stopped = bool(self.asked or c.stop_after and seconds > 60 * c.stop_after)
        # clocks differ, and processes that disagree would wait for each other for ever
        self.progress, stopped = ranks.decided(progress, stopped)
        # a clock may be over before it began: a run has one step at least, which can be saved
        self.done, self.stopped = self.progress >= 1 and self.step > 0, bool(stopped)

    def unfinished(self) -> bool:
        """Shall there be another turn of the loop? Not when the run is over or shall stop."""
        return not self.done and not self.stopped

    def time_to_evaluate(self) -> bool:
        return self.due(self.done, self.cfg.eval_every)

    def time_to_save(self) -> bool:
        return self.due(self.done or self.stopped, self.cfg.ckpt_every)

    def due(self, now: bool, every: int) -> bool:
        """For the first rank: now, or is this a multiple of `every` steps?"""
        return not ranks.RANK and (now or every > 0 and self.step % every == 0)

    def finish(self, *then: str) -> None:
        """Say which scripts come next. A run that was stopped exits here and says how to go on."""
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        file = self.table.fileno()
        self.table.close()
        os.close(file)  # and the lock goes
        ranks.least(0)  # nobody leaves before rank 0 has written everything
        c = self.cfg
        if not self.done:
            here = sys.argv[0] if os.path.basename(sys.argv[0]) == f"{self.script}.py" else \
                f"{self.script}.py"  # called by another script
            self.say(f"stopped at step {self.step}; continue with: python {shlex.quote(here)} "
                     f"--resume --out_dir {shlex.quote(c.out_dir)}")
            sys.exit(128 + self.asked if self.asked else 0)  # what a shell expects: 130 is Ctrl-C
        self.say(f"done: {self.step} steps, {self.elapsed() / 60:.1f} minutes; results in "
                 f"{c.out_dir}")
        ckpt = shlex.quote(self.path("ckpt.pt"))
        self.say("next: " + " and ".join(f"python {script} --ckpt {ckpt}" for script in then))

    # --------------------------------------------------------------------------------- one step

    def set_learning_rate(self) -> None:
        c, cosine = self.cfg, 0.5 * (1 + math.cos(math.pi * self.progress))
        # The cosine begins at step 0; in the hundredth of a run that is warm-up it falls by 0.03 %.
        total = c.steps or (self.step + 1) / max(self.progress, 1e-6)  # a clock: a guess
        warmup = c.warmup if c.warmup >= 1 else c.warmup * total
        scale = min(1.0, (self.step + 1) / max(1, warmup))  # step + 1: at rate 0 a step is lost
        scale *= c.decay + (1 - c.decay) * cosine
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = c.lr * scale

    def count(self, tokens: int, layers: int) -> None:
        """Training's cost, on the axes of the paper's Fig. 6: tokens seen, and layers of a forward
        pass that had to run one after another."""
        self.tokens += tokens
        self.layers += layers

    def update(self, losses: dict[str, torch.Tensor], tokens: int = 0, layers: int = 0) -> None:
        """One optimiser step with the gradients that are there, and all that follows from it."""
        if self.sums and losses.keys() - self.sums.keys():
            self.log()  # a loss that joins now, as the RNN's, shall not be averaged over all steps
        self.count(tokens, layers)
        # Summed where they are: to read a number from a GPU after every step would make it wait.
        for k, v in losses.items():
            self.sums[k] = self.sums.get(k, 0.0) + v.detach()
        ranks.average_gradients(self.parameters())
        # The paper clips teacher and RNN apart. Their gradients have different sizes, and one scale
        # for both would let the larger decide how far the smaller one steps.
        for group in self.trained:
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
        self.rng = ranks.gathered(self.gen.get_state())  # here all ranks are; the first one saves
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
        # all optimisers have one rate; of a step limit and a clock the nearer one ends
        lr = self.optimizers[0].param_groups[0]["lr"]
        left = [(c.steps - self.step) * seconds / count] * bool(c.steps) + \
            [c.minutes * 60 - self.elapsed()] * bool(c.minutes)
        self.say(f"step {self.step}{f'/{c.steps}' if c.steps else ''} | " +
            " | ".join(f"{k} {v:.4f}" for k, v in means.items()) +
            f" | lr {lr:.1e} | {speed / 1e3:.1f}k tok/s | eta {max(0, min(left)) / 60:.1f}m")
        self.record(dict(lr=lr) | means)

    def report(self, numbers: dict, best: str) -> None:
        """Keep what an evaluation found; best.pt has the lowest `best`. Inside averaged()."""
        if self.waits:
            self.save()
        self.metrics = {k: v for k, v in numbers.items() if isinstance(v, (int, float))}
        self.say(f"step {self.step} | {self.elapsed() / 60:.1f}m | validation | " +
            " | ".join(f"{k} {v:.4g}" for k, v in self.metrics.items()))
        if self.metrics[best] < self.best:
            self.best = self.metrics[best]
            with written_whole(self.path("best.pt")) as f:
                torch.save(self.state(), f)
        self.record({"val_" + k: v for k, v in self.metrics.items()})
        with written_whole(self.path("curve.png")) as f:
            draw_curve(self.history, f)

    def record(self, row: dict) -> None:
        """One row a step in history and log.csv: an evaluation joins the log line before it, whose
        seconds stay those of the step."""
        row = dict(step=self.step, seconds=round(self.elapsed(), 4), tokens=self.tokens,
                   layers=self.layers) | row
        if self.history and self.history[-1]["step"] == self.step:
            before = self.history.pop()
            row = before | row | dict(seconds=before["seconds"])
        else:
            self.last_row = self.table.tell()
        self.history.append(row)
        self.write_log()

    def open_log(self):
        """log.csv, locked while this process lives: two runs in one folder would mix. It grows, so
        it is the one file that is not written whole. Raises UserError."""
        with writing(f"--out_dir {self.cfg.out_dir}"):
            os.makedirs(self.cfg.out_dir, exist_ok=True)
        with writing(self.path("log.csv")):
            file = os.open(regular(self.path("log.csv")), os.O_RDWR | os.O_CREAT, 0o666)
        if not ranks.RANK and lock(file) is False:
            fail(f"--out_dir {self.cfg.out_dir}: another run is writing there; wait for it, or "
                 "give another folder")
        return open(file, "r+", newline="", encoding="utf-8", closefd=False)

    def write_log(self) -> None:
        """Write the last row; all of them where one has new columns, as the first evaluation's."""
        if self.waits or not self.history:
            return
        known = self.columns or (k for row in self.history for k in row)
        columns = list(dict.fromkeys([*known, *self.history[-1]]))
        out = csv.DictWriter(self.table, columns)
        with writing(self.path("log.csv")):
            if columns != self.columns:
                self.table.seek(0)
                out.writerows([dict(zip(columns, columns)), *self.history[:-1]])
                self.last_row = self.table.tell()
            self.table.seek(self.last_row)
            out.writerow(self.history[-1])
            self.table.truncate()  # and flush
        self.columns = columns

    def demand_finite(self, numbers: dict[str, float]) -> None:
        if bad := [k for k, v in numbers.items() if not math.isfinite(v)]:
            path = self.path("ckpt.pt")
            last = f"the last good checkpoint is {path}" if os.path.exists(path) else \
                "there is no checkpoint yet"
            fail(f"{', '.join(bad)} is not finite at step {self.step}; {last}; train again with a "
                 "smaller --lr, and --overwrite")

    # ------------------------------------------------------------------------------ checkpoints

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the networks hold the average of their weights over the last steps, which is
        evaluated, sampled and saved; afterwards the newest weights again, whatever happened."""
        began = self.clock()
        # the log sees losses only every so many steps: what broke since, the weights show
        weights = sum(p.detach().float().norm() for p in self.parameters())
        self.demand_finite({"weights": float(weights)})  # or good files would be overwritten
        # Evaluation, samples and files all use the average without knowing. Training must not go on
        # from it, it lags behind; so the newest weights wait here.
        self.newest = self.copies()
        self.put(self.average or self.newest)  # with --ema 0 there is no average
        try:
            yield
        finally:
            self.put(self.newest)
            self.newest = None
            self.last_log += self.clock() - began  # looking is no part of the speed

    def state(self) -> dict:
        """What a user of the trained networks needs: plain types and tensors."""
        return dict(format=FORMAT, script=self.script, step=self.step, tokens=self.tokens,
                    layers=self.layers, config=dataclasses.asdict(self.cfg),
                    model=dataclasses.asdict(self.model), image=self.task.image,
                    metrics=self.metrics, data=self.task.mark) | \
            {name: net.state_dict() for name, net in self.nets.items()}

    def save(self) -> None:
        """ckpt.pt: what a user needs, and what the next step needs. Inside averaged()."""
        # The networks in the file are averages. The rest is for --resume, which takes the very same
        # steps as a run that was never interrupted.
        full = self.state() | dict(
            optimizers=[o.state_dict() for o in self.optimizers], newest=self.newest,
            elapsed=self.elapsed(), best=self.best, sums=self.sums, history=self.history,
            kept=self.kept, rng=self.rng, torch_rng=torch.get_rng_state())
        with written_whole(self.path("ckpt.pt")) as f:
            torch.save(full, f)
        if self.waits:
            for name in OLD:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.path(name))
            self.begin_files()

    def begin_files(self) -> None:
        """log.csv and config.json of this run. The log of one that was killed is cut back: history
        is its checkpoint's."""
        self.waits = False
        self.table.truncate(0)
        self.write_log()
        with written_whole(self.path("config.json"), "w") as f:
            json.dump(dataclasses.asdict(self.cfg), f, indent=1)

    def load(self, ckpt: dict) -> None:
        """Go on from a checkpoint of this run. Raises UserError."""
        if ckpt.get("data", "") not in ("", self.task.mark):
            fail(f"{ckpt['path']}: the run began with another text, or other pictures, than are "
                 "there now; put them back, or start again with another --out_dir")
        try:
            if ckpt["model"] != dataclasses.asdict(self.model):
                raise ValueError("its sizes are not those of its config")
            for name, net in self.nets.items():
                net.load_state_dict(ckpt[name])
            self.average = self.copies() if self.cfg.ema else []
            self.put(ckpt["newest"])
            for optimizer, state in zip(self.optimizers, ckpt["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]  # made of the flags, as ever
                optimizer.load_state_dict(dict(state=state["state"], param_groups=groups))
                keeps = {"momentum_buffer"} if isinstance(optimizer, Muon) else \
                    {"step", "exp_avg", "exp_avg_sq"}
                for p, kept in optimizer.state.items():
                    if kept.keys() != keeps or any(v.shape not in (p.shape, ())
                                                   for v in kept.values()):
                        raise ValueError("optimizers of other networks")
            self.spent, self.history = ckpt["elapsed"], list(ckpt.get("history", []))
            for name in ("step", "tokens", "layers", "best", "sums", "metrics", "kept"):
                setattr(self, name, ckpt[name])
            states = ckpt["rng"].split(len(self.gen.get_state()))  # one of each rank
            if len(states) != ranks.WORLD:
                raise ValueError(f"it is a run of {len(states)} processes, not {ranks.WORLD}")
            self.gen.set_state(states[ranks.RANK].clone())  # torch crashes on a part of a tensor
            torch.set_rng_state(ckpt["torch_rng"])
        except (AttributeError, KeyError, ValueError, RuntimeError, TypeError) as e:
            fail(f"{ckpt['path']}: cannot be resumed ({str(e)[:120]}); start again with "
                 "--overwrite or another --out_dir")

    def path(self, name: str) -> str:
        return os.path.join(self.cfg.out_dir, name)
