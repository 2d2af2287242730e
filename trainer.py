"""What the training scripts share: device, optimiser, schedule, log, checkpoints, resume.

A script's own file holds its objective and its loop; this file is everything around them:

    run = trainer.Run(cfg, script, ...)                           # out_dir, optimiser, resume
    for step in run.loop():                                       # lr, log, evaluation, checkpoints, the end
        run.backward(losses)
        run.update()

A run writes into out_dir: ckpt.pt (newest state, resumable), best.pt (best on the validation split), log.csv,
config.json, curve.png and samples.png (or samples.txt).
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
from tqdm import tqdm

from console import fail, pick_device
from flags import load_data
from model import CheckpointError, ModelConfig, load_checkpoint
from muon import Muon
from sources.files import Data


def autocast(device: str):
    """bf16 on CUDA; fp32 elsewhere (bf16 is slower than fp32 on the CPUs tried)."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


def setup(cfg, ckpt: dict | None = None) -> tuple[str, Data]:
    """Device and data of a run, which fit the checkpoint it starts from; seeds torch."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    device = pick_device(cfg.device)
    return device, load_data(vars(cfg), device, ckpt)


def model_config(cfg, task: Data) -> ModelConfig:
    """Network sizes from flags and data; Tc and Tf are cut to the sequence. Raises UsageError."""
    cut = lambda n: min(n, task.T) if n else task.T
    if cfg.encoder == "causal" and task.timestamps and cut(cfg.ctx_len) < task.T:
        fail(f"--ctx_len {cfg.ctx_len} is shorter than the sequences of {task.T}, and a causal encoder makes no labels "
             "beyond it; give 0, or --encoder bidirectional, whose window slides")
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    given = {k: v for k, v in vars(cfg).items() if k in names}
    return ModelConfig(**given | dict(vocab=task.vocab, n_out=task.n_out, T=task.T, ctx_len=cut(cfg.ctx_len),
                                      fut_len=cut(cfg.fut_len), timestamps=cfg.timestamps and task.timestamps))


def compile_blocks(nets: dict[str, nn.Module]) -> None:
    """torch.compile both halves of every Transformer block, once for all lengths; state_dict keeps its names."""
    for block in (b for net in nets.values() for b in net.modules() if hasattr(b, "w_qkv")):
        block.qkv = torch.compile(block.qkv, dynamic=True)
        block.mix = torch.compile(block.mix, dynamic=True)


def make_optimizers(cfg, nets: dict[str, nn.Module], trained: list[list[nn.Parameter]], device: str) -> list:
    """AdamW with the paper's betas (0.9, 0.95) and weight decay 0.01; or Muon for the matrices of blocks (w_*) and of the
    GRU's cell, and that AdamW for the rest: embeddings, registers, m_0, heads, biases."""
    rest, matrices = [p for group in trained for p in group], []
    if cfg.optimizer == "muon":
        inside = {id(p) for net in nets.values() for name, p in net.named_parameters()
                  if ("w_" in name or "cell.weight" in name) and p.ndim == 2}
        matrices = [p for p in rest if id(p) in inside]
        rest = [p for p in rest if id(p) not in inside]
    out = [torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=device != "mps")] if rest else []
    if matrices:
        out.append(Muon(matrices, lr=cfg.lr))
    return out


# ------------------------------------------------------------------------------------------------ the run

class Run:
    """One training run: schedule, log, evaluation, checkpoints.

    nets       name -> module, all saved
    trained    groups of parameters to train; the gradient of each group is clipped by itself
    validate   () -> {name: float}: numbers on the validation split; the run keeps the lowest `select` in best.pt
    draw       (out_dir) -> None: writes samples
    refresh    called before every evaluation and checkpoint
    every      the run stops and saves only at multiples of this many steps (DMT: one round of labels)
    """

    def __init__(self, cfg, script: str, nets: dict[str, nn.Module], trained: list[list[nn.Parameter]],
                 model: ModelConfig, task: Data, device: str, validate, draw, select: str,
                 refresh=lambda: None, every: int = 1):
        self.cfg, self.script, self.nets, self.model, self.task, self.device = cfg, script, nets, model, task, device
        self.validate, self.draw, self.select, self.refresh, self.every = validate, draw, select, refresh, every
        self.trained, self.optimizers = trained, make_optimizers(cfg, nets, trained, device)
        self.average = [p.detach().clone() for p in self.parameters()] if cfg.ema else []
        self.gen = torch.Generator().manual_seed(cfg.seed)  # all randomness of training; evaluation has its own
        self.step, self.spent, self.best = 0, 0.0, math.inf
        self.history, self.sums, self.metrics = [], {}, {}  # rows of log.csv; sums of losses since the last; validation
        self.began = self.last_log = time.time()
        if cfg.resume:
            self.load(load_checkpoint(self.path("ckpt.pt")))
        self.write("config.json", lambda f: json.dump(dataclasses.asdict(cfg), f, indent=1))
        if cfg.overwrite:
            for name in ("ckpt.pt", "best.pt", "log.csv", "curve.png", "samples.png", "samples.txt"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.path(name))
        if cfg.compile:
            compile_blocks(nets)
        self.say_hello()

    def path(self, name: str) -> str:
        return os.path.join(self.cfg.out_dir, name)

    def say(self, line: str) -> None:
        tqdm.write(line) if self.on_terminal() else print(line, flush=True)

    @staticmethod
    def on_terminal() -> bool:
        return sys.stderr.isatty() and sys.stdout.isatty()

    def say_hello(self) -> None:
        here = os.path.dirname(os.path.abspath(__file__))
        commit = ""
        with contextlib.suppress(OSError):  # git may be absent
            commit = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True,
                                    text=True).stdout.strip()
        where = torch.cuda.get_device_name() if self.device.startswith("cuda") else platform.machine()
        self.say(f"{self.script} on {self.cfg.dataset} | preset {self.cfg.preset} | torch {torch.__version__} | "
                 f"{self.device} ({where}, {torch.get_num_threads()} threads) | commit {commit or 'unknown'}")
        trained = {id(p) for p in self.parameters()}
        for name, net in self.nets.items():
            self.say(f"  {name}: {sum(p.numel() for p in net.parameters()):,} parameters, "
                     f"{sum(p.numel() for p in net.parameters() if id(p) in trained):,} trained")
        self.say("  " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(self.cfg).items() if v not in (None, "")))
        if self.step:
            self.say(f"  resumed at step {self.step}, {self.spent / 60:.1f} minutes spent")

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for group in self.trained for p in group]

    def elapsed(self) -> float:
        return self.spent + time.time() - self.began

    def progress(self) -> float:
        """Fraction of the run that is done, 0 .. 1: by steps, by minutes, or by whichever is further."""
        c = self.cfg
        return min(1.0, max(self.step / c.steps if c.steps else 0.0,
                            self.elapsed() / 60 / c.minutes if c.minutes else 0.0))

    def loop(self):
        """Yield step numbers until the run is over; between two, do everything that is not the objective."""
        c, stop = self.cfg, []
        old = {s: signal.signal(s, lambda num, _: stop.append(num) if not stop else sys.exit(1))
               for s in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {postfix}", disable=not self.on_terminal())
        try:
            while (done := self.progress()) < 1:
                scale = min(1.0, (self.step + 1) / max(1, c.warmup))
                if c.decay:
                    scale *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
                for optimizer in self.optimizers:
                    optimizer.param_groups[0]["lr"] = c.lr * scale
                yield self.step
                self.step += 1
                if self.step % c.log_every == 0:
                    self.log(bar)
                if c.eval_every and self.step % c.eval_every == 0 and self.progress() < 1:
                    self.evaluate()
                if self.step % self.every == 0:
                    late = c.stop_after and time.time() - self.began > 60 * c.stop_after
                    if stop or late:
                        self.save()
                        self.say(f"stopped at step {self.step}; continue with: python {self.script}.py --resume "
                                 f"--out_dir {shlex.quote(c.out_dir)}")
                        sys.exit(130 if stop else 0)
                    if c.ckpt_every and self.step % c.ckpt_every < self.every:
                        self.save()
            if self.sums:
                self.log(bar)
            self.evaluate()
            self.save()
            made = [n for n in ("curve.png", "samples.png", "samples.txt") if os.path.exists(self.path(n))]
            self.say(f"done: {self.step} steps, {self.elapsed() / 60:.1f} minutes; results in {c.out_dir}: "
                     f"ckpt.pt, best.pt, log.csv, {', '.join(made)}")
        finally:
            bar.close()
            for s, handler in old.items():
                signal.signal(s, handler)

    def backward(self, losses: dict[str, torch.Tensor], weight: float = 1.0) -> None:
        """Accumulate gradients of losses["loss"] and keep the means of all for the log."""
        (losses["loss"] * weight).backward()
        for k, v in losses.items():
            self.sums[k] = self.sums.get(k, 0.0) + v.detach() * weight

    def update(self) -> None:
        """Clip each group's gradient to norm 1 by itself and take the optimiser's step."""
        for group in self.trained:
            self.sums["grad"] = self.sums.get("grad", 0.0) + nn.utils.clip_grad_norm_(group, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.sums["count"] = self.sums.get("count", 0) + 1
        decay = min(self.cfg.ema, (self.step + 1) / (self.step + 10))  # a short memory at first
        for slow, fast in zip(self.average, self.parameters()):
            slow.lerp_(fast.detach(), 1 - decay)

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the networks hold the average of their weights over the last steps instead of the newest ones."""
        def swap():
            for slow, fast in zip(self.average, self.parameters()):
                newest = fast.detach().clone()
                fast.data.copy_(slow)
                slow.copy_(newest)
        swap()
        try:
            yield
        finally:
            swap()

    def log(self, bar) -> None:
        """One line, and one row of log.csv, of what happened since the last."""
        c, now, count = self.cfg, time.time(), self.sums.pop("count")
        means, self.sums = {k: float(v) / count for k, v in self.sums.items()}, {}
        self.demand_finite(means)
        rate, lr = count / max(now - self.last_log, 1e-9), self.optimizers[0].param_groups[0]["lr"]
        self.last_log = now
        left = [(c.steps - self.step) / rate] * bool(c.steps) + [c.minutes * 60 - self.elapsed()] * bool(c.minutes)
        line = f"step {self.step}{f'/{c.steps}' if c.steps else ''} | " + \
            " | ".join(f"{k} {v:.4f}" for k, v in means.items()) + \
            f" | lr {lr:.1e} | {rate * c.batch_size * self.task.T / 1e3:.1f}k tok/s | eta {max(0, min(left)) / 60:.1f}m"
        if bar.disable:
            print(line, flush=True)
        else:
            bar.update(100 * self.progress() - bar.n)
            bar.set_postfix_str(line)
        self.record(dict(lr=lr) | means)

    def evaluate(self) -> None:
        """Numbers and pictures of the averaged weights; keeps best.pt. Leaves the training state as it was."""
        self.check_weights()
        with self.averaged():
            self.refresh()
            self.metrics = {k: v for k, v in self.validate().items() if isinstance(v, (int, float))}
            self.say(f"step {self.step} | {self.elapsed() / 60:.1f}m | validation | " +
                     " | ".join(f"{k} {v:.4g}" for k, v in self.metrics.items()))
            if self.metrics[self.select] < self.best:
                self.best = self.metrics[self.select]
                self.write("best.pt", lambda f: torch.save(self.state(), f), "wb")
            self.draw(self.cfg.out_dir)
        self.record({"val_" + k: v for k, v in self.metrics.items()})
        self.draw_curve()
        self.last_log = time.time()

    def record(self, row: dict) -> None:
        """Add to the history, one row a step. log.csv is the whole of it, so a resumed run leaves no gap or double."""
        row = dict(step=self.step, seconds=round(self.elapsed(), 2)) | row
        if self.history and self.history[-1]["step"] == self.step:
            row = self.history.pop() | row
        self.history.append(row)
        columns = list(dict.fromkeys(k for r in self.history for k in r))
        rows = [dict(zip(columns, columns))] + self.history
        self.write("log.csv", lambda f: csv.DictWriter(f, columns).writerows(rows))

    def demand_finite(self, numbers: dict[str, float]) -> None:
        if bad := [k for k, v in numbers.items() if not math.isfinite(v)]:
            path = self.path("ckpt.pt")
            last = f"the last good checkpoint is {path}" if os.path.exists(path) else "there is no checkpoint yet"
            fail(f"{', '.join(bad)} is not finite at step {self.step}; {last}; train again with a smaller --lr")

    def check_weights(self) -> None:
        """Stop before anything good is overwritten with weights that are not finite."""
        self.demand_finite({"weights": float(sum(p.detach().float().norm() for p in self.parameters()))})

    # ------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict:
        """What a user of the trained networks needs: plain types and tensors."""
        return dict(format=1, script=self.script, step=self.step, config=dataclasses.asdict(self.cfg),
                    model=dataclasses.asdict(self.model), image=self.task.image, metrics=self.metrics) | \
            {name: net.state_dict() for name, net in self.nets.items()}

    def save(self) -> None:
        self.check_weights()
        full = dict(optimizers=[o.state_dict() for o in self.optimizers], elapsed=self.elapsed(), best=self.best,
                    history=self.history, sums=self.sums, rng=self.gen.get_state(), torch_rng=torch.get_rng_state(),
                    newest=[p.detach().clone() for p in self.parameters()])
        with self.averaged():
            self.refresh()
            full |= self.state()
            self.write("ckpt.pt", lambda f: torch.save(full, f), "wb")

    def load(self, ckpt: dict) -> None:
        try:
            if ckpt["model"] != dataclasses.asdict(self.model):
                raise ValueError("its sizes are not those of its config")
            for name, net in self.nets.items():
                net.load_state_dict(ckpt[name])
            self.average = [p.detach().clone() for p in self.parameters()] if self.cfg.ema else []
            with torch.no_grad():
                for p, newest in zip(self.parameters(), ckpt["newest"], strict=True):
                    p.copy_(newest)
            for optimizer, state in zip(self.optimizers, ckpt["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step, self.spent, self.best = ckpt["step"], ckpt["elapsed"], ckpt["best"]
            self.history, self.sums, self.metrics = ckpt["history"], ckpt["sums"], ckpt["metrics"]
            self.gen.set_state(ckpt["rng"])
            torch.set_rng_state(ckpt["torch_rng"])
        except (KeyError, ValueError, RuntimeError, TypeError) as e:
            raise CheckpointError(f"{self.path('ckpt.pt')}: cannot be resumed ({str(e).splitlines()[0][:120]}); "
                                  "start again with --overwrite or another --out_dir") from None

    def write(self, name: str, writer, mode: str = "w") -> None:
        """Write out_dir/name so that it is either the old file or the whole new one, whatever happens."""
        temporary = self.path(name + ".tmp")
        try:
            os.makedirs(self.cfg.out_dir, exist_ok=True)
            with open(temporary, mode) as f:
                writer(f)
            os.replace(temporary, self.path(name))
        except (OSError, RuntimeError) as e:
            cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides a full disk behind an error of its own
            if not isinstance(cause, OSError):
                raise
            fail(f"--out_dir {self.cfg.out_dir}: {name} cannot be written ({cause.strerror or cause}); "
                 "make room, or give another folder")
        finally:
            with contextlib.suppress(OSError):  # gone already, unless something failed
                os.remove(temporary)

    def draw_curve(self) -> None:
        """curve.png: training losses, and the validation numbers that share the unit of `select`."""
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        fig, axes = plt.subplots(1, 3, figsize=(13, 3.6))
        losses = [k for k in dict.fromkeys(k for row in self.history for k in row)
                  if k not in ("step", "seconds", "lr", "grad") and not k.startswith("val_")]
        panels = {"training": losses, "validation loss": ["val_teacher", "val_one_step", "val_rollout"],
                  "validation drift (1 - R²) and KL": ["val_drift", "val_one_step_drift", "val_kl"]}
        for ax, (title, names) in zip(axes, panels.items()):
            for name in names:
                points = [(r["seconds"] / 60, r[name]) for r in self.history if name in r]
                if points:
                    ax.plot(*zip(*points), ".-", label=name.removeprefix("val_"))
            ax.set(title=title, xlabel="minutes")
            if ax.lines:
                ax.legend()
        fig.tight_layout()
        self.write("curve.png", lambda f: fig.savefig(f, dpi=90, format="png"), "wb")
        plt.close(fig)
