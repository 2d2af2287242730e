"""How good is a checkpoint? Teacher, one-step and rollout, side by side, on fixed test data.

    python evaluate.py --ckpt runs/dmt-mnist/ckpt.pt
    python evaluate.py --ckpt runs/dmt-mnist/ckpt.pt --n_test 10000 --json
    python evaluate.py --ckpt runs/dmt-stack/ckpt.pt --length 256    # longer than it was trained

    teacher    the encoder reads x_0 .. x_t, the decoder predicts y_t
    one step   the encoder reads x_0 .. x_{t-1}, the RNN reads x_t and predicts (no likelihood of
               the RNN alone)
    rollout    the RNN alone, from m_0, on its own memories: the exact likelihood of the sequences
    window     with --length: the teacher again, reading no more than it did in training; a causal
               encoder is, as "teacher", given everything, at positions never trained on

The gap between the three is the method. (Labels of a causal encoder end at Tc. Where that is
shorter than a text's window, teacher and one step are means over t < Tc, and the table says so.)
All is computed in fp32, on every device. Prints a table (or JSON alone) and writes evaluation.png
beside the checkpoint.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, demand, fail, flags_in, parser, path, pick_device
import contextlib
import json
import math
import os
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import flags
from checkpoints import RANGES, build
from data import OPTIONS, bayes, refuse_useless
from losses import futures
from model import ROWS, RNN, Decoder, Encoder, autocast, on_device
from sources.files import Data, UserError, written_whole

# MPS has no float64, where sums over millions of numbers keep their digits
exact = lambda v: v.float() if v.device.type == "mps" else v.double()

COLUMNS = ("teacher", "one_step", "rollout", "window")


class Score:
    """One column, sequence by sequence: nats, correct answers, KL to the exact posterior; nats and
    KL once more from time `late_from` on."""

    def __init__(self, per_sequence: bool, late_from: int | None):
        self.per_sequence, self.late_from = per_sequence, late_from
        self.nats, self.right, self.excess, self.late, self.late_excess = [], [], [], [], []

    def add(self, logits: Tensor, y: Tensor, clean: Tensor | None,
            posterior: Tensor | None) -> None:
        """logits (B, L, V) float, y and clean (B, L) with -1 = no target, posterior (B, L, V)."""
        logp = logits.float().log_softmax(-1)
        valid = y >= 0
        # A picture's likelihood is the sum of its pixels'; elsewhere tasks of any length shall
        # compare.
        count = 1 if self.per_sequence else valid.sum(1).clamp(min=1)
        late = y.shape[1] if self.late_from is None else self.late_from

        def add_to(whole: list, end: list, each: Tensor) -> None:
            whole.append((each * valid).sum(1) / count)
            if late < y.shape[1]:
                end.append((each * valid)[:, late:].sum(1) / valid[:, late:].sum(1).clamp(min=1))

        add_to(self.nats, self.late, -logp.gather(-1, y.clamp(min=0)[..., None])[..., 0])
        if clean is not None:
            self.right.append(((logp.argmax(-1) == clean) & valid).sum(1) / count)
        if posterior is not None:
            kl = (torch.xlogy(posterior, posterior) - posterior * logp).sum(-1)
            add_to(self.excess, self.late_excess, kl)

    def mean(self, name: str) -> float | None:
        values = getattr(self, name)
        return float(exact(torch.cat(values)).mean()) if values else None

    def stderr(self, name: str = "nats") -> float | None:
        values = exact(torch.cat(getattr(self, name) or [torch.empty(0)]))
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


@dataclass
class Memories:
    """Of a batch, (B, T, K, d) each, which may end before the sequences do; None where a
    checkpoint lacks the network."""
    label: Tensor | None      # the encoder's
    one_step: Tensor | None   # one update from the encoder's; m_0 is the RNN's own
    own: Tensor | None        # the RNN's, alone from m_0
    window: Tensor | None = None  # the encoder's, from the last few tokens


def windowed(encoder: Encoder, x: Tensor, Tc: int) -> Tensor:
    """Memories of x (B, T) that read the last Tc tokens each: (B, T, K, d)."""
    last = torch.tensor([Tc - 1])
    later = [encoder(x[:, t + 1 - Tc:t + 1], last) for t in range(Tc, x.shape[1])]
    return torch.cat([encoder(x[:, :Tc]), *later], dim=1)


def memories(x: Tensor, rnn: RNN | None, encoder: Encoder | None, Tc: int = 0) -> Memories:
    """Ways to have read x (B, T) int64; with Tc one more, a teacher that reads Tc tokens."""
    own = rnn.memories(x) if rnn is not None else None
    if rnn is None or encoder is None:
        return Memories(None, None, own)
    # Labels of a causal encoder end at Tc; the RNN goes on.
    T = min(x.shape[1], encoder.c.ctx_len) if encoder.c.encoder == "causal" else x.shape[1]
    x, times = x[:, :T], torch.arange(T)
    m = encoder(x, times)
    made = rnn.update(m[:, :-1], x[:, 1:], on_device(times[1:], x.device))
    one = torch.cat([rnn.start(len(x))[:, None], made], dim=1)
    return Memories(m, one, own, windowed(encoder, x, Tc) if Tc else None)


def predictions(x: Tensor, m: Memories, rnn: RNN | None, decoder: Decoder | None) -> dict:
    """Column -> logits of y_0 .. from each kind of memory, as far as it goes: (B, T, V)."""
    if rnn is None:  # a plain language model, which reads x itself
        nothing = torch.empty(len(x), 0, decoder.c.mem_dim, device=x.device)
        return dict(teacher=decoder(nothing, x, x.new_full((len(x),), -1)))
    out = dict(rollout=rnn.logits(m.own))
    if m.label is not None:
        out["teacher"] = decoder.logits(m.label)
        out["one_step"] = rnn.logits(m.one_step)
    if m.window is not None:
        out["window"] = decoder.logits(m.window)
    return out


class Drift:
    """Sums over batches: how far the RNN's memories are from the encoder's, and how far the
    encoder's are from each other, in float64."""

    def __init__(self):
        self.rows, self.total, self.squares = 0, 0.0, 0.0    # of all memories of the encoder
        self.error, self.error_one = 0.0, 0.0                # (T,) of rollout and one step

    def add(self, m: Memories) -> None:
        # Sums, not lists: all memories of a test set would not fit.
        flat = exact(m.label.flatten(0, 1).flatten(1))                          # (B T, K d)
        self.rows += len(flat)
        self.total = self.total + flat.sum(0)
        self.squares += float(flat.square().sum())
        own = m.own[:, :m.label.shape[1]]
        self.error = self.error + exact(own - m.label).square().sum((0, 2, 3))
        self.error_one = self.error_one + exact(m.one_step - m.label).square().sum((0, 2, 3))

    def numbers(self) -> dict:
        """1 - R^2 by time and overall, with one variance over all (sequence, t)."""
        if not self.rows:
            return dict(drift=None, drift_by_time=None, one_step_drift=None, variance=None)
        spread = self.squares / self.rows - float((self.total / self.rows).square().sum())
        spread = max(spread, 1e-12)  # of memories that have collapsed
        n = self.rows // len(self.error)
        by_time = self.error / n / spread
        # at t = 0 there is no update yet
        return dict(drift=float(by_time[1:].mean()), drift_by_time=by_time.tolist(),
                    one_step_drift=float(self.error_one[1:].mean() / n / spread),
                    variance=spread / len(self.total))


# Of a sequence, in all futures that are compared. Of T = Tf = 512 they would be 262,144, and take
# longer than all the rest of an evaluation.
MOST_OUTPUTS = 8192


def kl_of_futures(decoder: Decoder, m: Memories, x: Tensor, y: Tensor, few: int):
    """Do label and own memory of the first few sequences predict the same Tf future outputs?
    (sum of KL in nats, number of targets)"""
    T, total, targets = m.label.shape[1], 0.0, 0
    # every k-th time of long sequences
    times = torch.arange(0, T, -(-T * decoder.c.fut_len // MOST_OUTPUTS), device=x.device)
    for b in range(few):
        x_fut, y_fut = futures(x[:, :T], y[:, :T], torch.full_like(times, b), times,
                               decoder.c.fut_len)
        p, q = (decoder(v[b, times], x_fut, times).float().log_softmax(-1)
                for v in (m.label, m.own))
        each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)        # (T, Tf)
        valid = y_fut >= 0
        total, targets = total + float((each * valid).sum()), targets + int(valid.sum())
    return total, targets


@torch.no_grad()
def evaluate(task: Data, rnn: RNN | None, encoder: Encoder | None = None,
             decoder: Decoder | None = None, split: str = "test", n: int | None = None,
             Tc: int = 0, fast: bool = False) -> dict:
    """A dict with the keys of the JSON output, None where one does not apply.

    encoder and decoder are the teacher (None for a BPTT run from scratch); rnn is None and decoder
    a plain language model for results/yardstick/transformer.py. The first n sequences of `split`.
    `fast` is for a look during training: bf16 where training uses it, KL of 4 sequences instead of
    64. Uses no random numbers.
    """
    held = task.held_out(split, n)  # the same sequences for every checkpoint
    c, N = (rnn or decoder).c, len(held["x"])
    scores = {name: Score(task.image is not None, task.late_from) for name in COLUMNS}
    drift, kl, targets = Drift(), 0.0, 0
    device, size = str(held["x"].device), task.T * c.mem_tokens * c.mem_dim
    # All times at once: 800 MB of memories. On a GPU a rollout takes as long for many sequences as
    # for few, so twice that.
    batch = min(100, ROWS // task.T, int(2e8) // size)
    batch = max(1, min(1000, int(4e8) // size) if device.startswith("cuda") else batch)
    for i in range(0, N, batch):
        x, y, *extra = (v if v is None else v[i:i + batch]
                        for v in (held["x"], held["y"], held["clean"], held["posterior"]))
        with autocast(device) if fast else contextlib.nullcontext():
            m = memories(x, rnn, encoder, Tc)
            for name, logits in predictions(x, m, rnn, decoder).items():
                L = logits.shape[1]
                scores[name].add(logits, *(v if v is None else v[:, :L] for v in (y, *extra)))
            if m.label is not None:
                drift.add(m)
                few = min(len(x), max(0, (4 if fast else 64) - i))
                nats, valid = kl_of_futures(decoder, m, x, y, few)
                kl, targets = kl + nats, targets + valid
    out = dict(dataset=task.name, split=split, n=N, T=task.T, units=task.units)
    out |= losses(task, held, scores, "rollout" if rnn is not None else "teacher")
    return out | drift.numbers() | dict(kl=kl / max(1, targets) if drift.rows else None)


def losses(task: Data, held: dict, scores: dict[str, Score], alone: str) -> dict:
    """The numbers of all columns; `alone` is the one that the checkpoint is about."""
    each = lambda what: {name: scores[name].mean(what) for name in COLUMNS}
    nats, text = scores[alone].mean("nats"), task.units == "nats/char"
    known, apart = held["posterior"] is not None, task.late_from is not None
    return each("nats") | dict(
        bayes=bayes(held), excess=scores[alone].mean("excess"), stderr=scores[alone].stderr(),
        excess_stderr=scores[alone].stderr("excess"),
        excess_all=each("excess") if known else None,
        accuracy=each("right") if held["clean"] is not None else None,
        bits_per_pixel=nats / (task.T * math.log(2)) if task.image else None,
        bits_per_char=nats / math.log(2) if text else None,
        late=each("late") if apart else None,
        late_excess=each("late_excess") if apart and known else None, late_from=task.late_from,
        # of every sequence, in order: two checkpoints are compared by their differences
        nats_each=[round(v, 4) for v in torch.cat(scores[alone].nats).tolist()])


def summary(result: dict) -> dict:
    """The few numbers that a training run logs."""
    keys = ("teacher", "one_step", "rollout", "excess", "drift", "one_step_drift", "kl", "variance")
    return {k: result[k] for k in keys if result[k] is not None}


def table(r: dict) -> str:
    """The result as text."""
    show = lambda v: "-" if v is None else f"{v:.4f}" if abs(v) < 10 else f"{v:.2f}"
    columns = [k for k in COLUMNS if k != "window" or r[k] is not None]
    row = lambda name, values: f"{name:16}" + "".join(f"{show(values[k]):>10}" for k in columns)
    lines = [f"{r['dataset']}, {r['split']} split, N = {r['n']} sequences, T = {r['T']}", "",
             " " * 16 + "".join(f"{k.replace('_', ' '):>10}" for k in columns),
             row(r["units"], r) + f"   ± {show(r['stderr'])} (standard error)"]
    if r["drift_by_time"] and (L := len(r["drift_by_time"])) < r["T"]:
        lines.append(f"teacher, one step: of t < {L} alone; rollout: of all {r['T']}")
    late = f"t >= {r['late_from']}"
    for name, key in (("accuracy", "accuracy"), ("excess nats", "excess_all"), (late, "late"),
                      (f"excess, {late}", "late_excess")):
        if r[key]:
            lines.append(row(name, r[key]))
    for label, key in (("Bayes optimum", "bayes"), ("bits per pixel", "bits_per_pixel"),
                       ("bits per character", "bits_per_char"),
                       ("drift 1-R², rollout", "drift"),
                       ("drift 1-R², one step", "one_step_drift"),
                       ("KL of futures, rollout", "kl"),
                       ("variance of memory", "variance")):
        if r[key] is not None:
            lines.append(f"{label:26}{show(r[key])}")
    return "\n".join(lines)


def draw(r: dict, file) -> None:
    """The result as a PNG: the three losses, and drift against time."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    names = [k for k in COLUMNS if r[k] is not None]
    left.bar([n.replace("_", " ") for n in names], [r[n] for n in names],
             color=["0.6", "0.75", "C0", "0.85"][:len(names)])
    left.set(ylabel=r["units"], title=f"{r['dataset']}, {r['split']}, N = {r['n']}")
    for i, name in enumerate(names):
        left.text(i, r[name], f"{r[name]:.3g}", ha="center", va="bottom")
    if r["bayes"] is not None:
        left.axhline(r["bayes"], color="k", ls=":", label="Bayes optimum")
        left.legend()
    if r["drift_by_time"]:
        right.plot(r["drift_by_time"])
        right.set(xlabel="t", ylabel="1 - R²", ylim=(0, None),
                  title="drift of the rollout from the encoder's memory")
    else:
        right.text(0.5, 0.5, "no encoder in this checkpoint:\nno drift to measure",
                   ha="center", va="center")
        right.axis("off")
    fig.tight_layout()
    fig.savefig(file, dpi=90, format="png")
    plt.close(fig)


def as_json(r: dict) -> str:
    """The result as JSON, which has no NaN and no infinity: null."""
    finite = lambda v: {k: finite(w) for k, w in v.items()} if isinstance(v, dict) else \
        [finite(w) for w in v] if isinstance(v, list) else \
        None if isinstance(v, float) and not math.isfinite(v) else v
    return json.dumps(finite(r), allow_nan=False)


def networks(ckpt: dict, device: str) -> tuple[RNN | None, Encoder | None, Decoder | None]:
    """(rnn, encoder, decoder) of a checkpoint; None for what it does not hold."""
    return tuple(build(ckpt, name)[0].to(device) if name in ckpt else None
                 for name in ("rnn", "encoder", "decoder"))


def stretch(ckpt: dict, length: int) -> int:
    """Make the checkpoint's task and networks those of sequences of this length. Without timestamps
    no weight depends on it. Returns the context that the encoder was trained with. Raises
    UserError."""
    task, c = ckpt["config"]["dataset"], ckpt["model"]
    if "length" not in OPTIONS[task]:
        fail(f"--length {length}: {task} has no such option; leave it out")
    if c["timestamps"] != "none":
        fail(f"--length {length}: the networks of {ckpt['path']} know the times up to {c['T'] - 1} "
             "and no others; train with --timestamps none")
    Tc = min(c["ctx_len"], length)
    ckpt["config"] |= dict(length=length, shortest=0)
    c |= dict(T=length, ctx_len=max(c["ctx_len"], length) if c["encoder"] == "causal" else Tc)
    return Tc if "encoder" in ckpt else 0


def main(argv) -> None:
    p = parser("evaluate.py", __doc__)
    p.add_argument("--ckpt", required=True, type=path, metavar="CKPT",
                   help="checkpoint of any training script; required")
    flags.add_data_flags(p)
    p.add_argument("--device", default="auto", help="(default: %(default)s)")
    p.add_argument("--threads", type=int, default=0,
                   help="CPU threads; 0 = torch's choice (default: %(default)s)")
    p.add_argument("--split", choices=("test", "val"), default="test",
                   help="(default: %(default)s)")
    p.add_argument("--n_test", type=int, default=1000,
                   help="the first so many sequences of the split (default: %(default)s)")
    p.add_argument("--length", type=int, default=0,
                   help="T of the test sequences, of tasks that have such an option and networks "
                        "without timestamps; 0 = as in training (default: %(default)s)")
    p.add_argument("--json", action="store_true",
                   help="print JSON and nothing else (default: a table)")
    a = p.parse_args(argv)
    demand("n_test", a.n_test, 1, 10 ** 5)
    demand("threads", a.threads, *RANGES["threads"])
    if a.threads:
        torch.set_num_threads(a.threads)
    ckpt = flags.open_checkpoint(a.ckpt)
    refuse_useless(ckpt["config"]["dataset"], flags_in(argv) & {"data_dir", "data_file"})
    device = pick_device(a.device)
    Tc = stretch(ckpt, a.length) if a.length else 0
    config = ckpt["config"] | flags.data_places(vars(a), ckpt["config"])
    task = flags.load_data(config, device, ckpt)
    result = evaluate(task, *networks(ckpt, device), a.split, a.n_test, Tc=Tc)
    # the numbers first: they took the time, and a picture may have no place
    print(as_json(result) if a.json else table(result), flush=True)
    picture = os.path.join(os.path.dirname(a.ckpt), "evaluation.png")
    try:
        with written_whole(picture) as f:
            draw(result, f)
    except UserError as e:
        return print(f"evaluate.py: warning: {e}", file=sys.stderr)
    if not a.json:
        print(f"\npicture: {picture}")


if __name__ == "__main__":
    cli(main)
