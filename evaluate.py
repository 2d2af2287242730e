"""How good is a checkpoint? Teacher, one-step and rollout, side by side, on fixed test data.

    python evaluate.py --ckpt runs/dmt-mnist/ckpt.pt
    python evaluate.py --ckpt runs/dmt-mnist/ckpt.pt --n_test 10000 --json

    teacher    the encoder reads x_0 .. x_t, the decoder predicts y_t
    one step   the encoder reads x_0 .. x_{t-1}, the RNN reads x_t and predicts (not a likelihood of the RNN alone)
    rollout    the RNN alone, from m_0, on its own memories: the exact likelihood of the test sequences

The gap between the three is the method. Prints a table (or JSON alone) and writes evaluation.png beside the
checkpoint.
"""
import argparse
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

import data as datasets
import flags
import trainer
from model import RNN, Decoder, Encoder, build, futures

COLUMNS = ("teacher", "one_step", "rollout")


class Score:
    """Sums of one column over batches: nats, correct answers and KL to the exact posterior; nats
    and KL once more from time `late_from` on."""

    def __init__(self, per_sequence: bool, late_from: int | None):
        self.per_sequence, self.late_from = per_sequence, late_from
        self.nats, self.right, self.excess, self.late, self.late_excess = [], [], [], [], []

    def add(self, logits: Tensor, y: Tensor, clean: Tensor | None, posterior: Tensor | None) -> None:
        """logits (B, L, V) float, y and clean (B, L) with -1 = no target, posterior (B, L, V)."""
        logp = logits.float().log_softmax(-1)
        valid = y >= 0
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
        return float(torch.cat(values).double().mean()) if values else None

    def stderr(self) -> float | None:
        values = torch.cat(self.nats).double()
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


@torch.no_grad()
def evaluate(task: datasets.Data, rnn: RNN | None, encoder: Encoder | None = None, decoder: Decoder | None = None,
             split: str = "test", n: int | None = None, kl_sequences: int = 64) -> dict:
    """A dict with the keys of the JSON output, None where one does not apply.

    encoder and decoder are the teacher (None for a BPTT run from scratch); rnn is None and decoder a plain
    language model for transformer.py. The first n sequences of `split`. Uses no random numbers.
    """
    held = task.held_out(split, n)
    x_all, y_all = held["x"], held["y"]
    device = str(x_all.device)
    c = (rnn or decoder).c
    # causal labels end at Tc; the RNN goes on
    T = min(task.T, c.ctx_len) if encoder is not None and c.encoder == "causal" else task.T
    scores = {name: Score(task.image is not None, task.late_from) for name in COLUMNS}
    size = c.mem_tokens * c.d_model
    total, total_sq, rows, kl, targets = torch.zeros(size, dtype=torch.float64, device=device), 0.0, 0, 0.0, 0
    error, error_one = torch.zeros(2, T, dtype=torch.float64, device=device)
    times = torch.arange(T)
    batch = max(1, min(100, int(2e8) // (T * size)))
    for i in range(0, len(x_all), batch):
        x, y, *extra = (v if v is None else v[i:i + batch] for v in (x_all, y_all, held["clean"], held["posterior"]))
        with trainer.autocast(device):
            own = rnn.memories(x) if rnn is not None else None                 # (B, T, K, d)
            if own is not None:
                scores["rollout"].add(rnn.logits(own), y, *extra)
            if rnn is None:
                nothing = torch.empty(len(x), 0, c.d_model, device=device)
                scores["teacher"].add(decoder(nothing, x, x.new_full((len(x),), -1)), y, *extra)
            if encoder is None or rnn is None:
                continue
            x, y, own, *extra = (v if v is None else v[:, :T] for v in (x, y, own, *extra))
            m = encoder(x, times)
            scores["teacher"].add(decoder(m.flatten(0, 1))[:, 0].view(len(x), T, -1), y, *extra)
            step = rnn.update(m[:, :-1].flatten(0, 1), x[:, 1:].flatten(), times[1:].to(device).repeat(len(x)))
            one = torch.cat([rnn.start(len(x))[:, None], step.view(len(x), T - 1, *m.shape[2:])], dim=1)
            scores["one_step"].add(rnn.logits(one), y, *extra)
            if i < kl_sequences:  # do both memories predict the same Tf future outputs?
                few = min(len(x), kl_sequences - i)
                x_fut, y_fut = futures(x[:few], y[:few], times, c.fut_len)
                for b in range(few):  # one sequence at a time: T * Tf positions are plenty
                    p, q = (decoder(v[b], x_fut[b], times.to(device)).float().log_softmax(-1) for v in (m, own))
                    kl += float((F.kl_div(q, p, log_target=True, reduction="none").sum(-1) * (y_fut[b] >= 0)).sum())
                targets += int((y_fut >= 0).sum())
        flat = m.flatten(0, 1).flatten(1).double()
        total, total_sq, rows = total + flat.sum(0), total_sq + float(flat.square().sum()), rows + len(flat)
        error += (own - m).double().square().sum((0, 2, 3))
        error_one += (one - m).double().square().sum((0, 2, 3))
    out = dict(dataset=task.name, split=split, n=len(x_all), units=task.units)
    out |= {name: scores[name].mean("nats") for name in COLUMNS}
    main = "rollout" if rnn is not None else "teacher"
    known, text = held["posterior"] is not None, task.units == "nats/char"
    apart = task.late_from is not None
    out |= dict(bayes=datasets.bayes(held), excess=scores[main].mean("excess"),
                excess_all={k: scores[k].mean("excess") for k in COLUMNS} if known else None,
                accuracy={k: scores[k].mean("right") for k in COLUMNS} if held["clean"] is not None else None,
                bits_per_pixel=out[main] / (task.T * math.log(2)) if task.image else None,
                bits_per_char=out[main] / math.log(2) if text else None,
                late={k: scores[k].mean("late") for k in COLUMNS} if apart else None,
                late_excess={k: scores[k].mean("late_excess") for k in COLUMNS}
                if apart and known else None,
                late_from=task.late_from)
    out |= dict(drift=None, drift_by_time=None, one_step_drift=None, kl=None, variance=None)
    if rows:
        spread = max(total_sq / rows - float((total / rows).square().sum()), 1e-12)  # one variance over all (sequence, t)
        by_time = error / len(x_all) / spread
        out |= dict(drift=float(by_time.mean()), drift_by_time=by_time.tolist(), kl=kl / max(1, targets),
                    one_step_drift=float(error_one[1:].mean() / len(x_all) / spread), variance=spread / size)
    out["stderr"] = scores[main].stderr()
    return out


def summary(result: dict) -> dict:
    """The few numbers that a training run logs."""
    keys = ("teacher", "one_step", "rollout", "excess", "drift", "one_step_drift", "kl", "variance")
    return {k: result[k] for k in keys if result[k] is not None}


def table(r: dict) -> str:
    """The result as text."""
    show = lambda v: "-" if v is None else f"{v:.4f}" if abs(v) < 10 else f"{v:.2f}"
    lines = [f"{r['dataset']}, {r['split']} split, N = {r['n']} sequences", "",
             f"{'':16}{'teacher':>10}{'one step':>10}{'rollout':>10}",
             f"{r['units']:16}" + "".join(f"{show(r[k]):>10}" for k in COLUMNS) + f"   ± {show(r['stderr'])} (standard error)"]
    late = f"t >= {r['late_from']}"
    for name, key in (("accuracy", "accuracy"), ("excess nats", "excess_all"), (late, "late"),
                      (f"excess, {late}", "late_excess")):
        if r[key]:
            lines.append(f"{name:16}" + "".join(f"{show(r[key][k]):>10}" for k in COLUMNS))
    for label, key in (("Bayes optimum", "bayes"), ("bits per pixel", "bits_per_pixel"),
                       ("bits per character", "bits_per_char"), ("drift 1-R², rollout", "drift"),
                       ("drift 1-R², one step", "one_step_drift"), ("KL of futures, rollout", "kl"),
                       ("variance of memory", "variance")):
        if r[key] is not None:
            lines.append(f"{label:26}{show(r[key])}")
    return "\n".join(lines)


def draw(r: dict, path: str) -> None:
    """The result as a picture: the three losses, and drift against time."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    names = [k for k in COLUMNS if r[k] is not None]
    left.bar([n.replace("_", " ") for n in names], [r[n] for n in names], color=["0.6", "0.75", "C0"][:len(names)])
    left.set(ylabel=r["units"], title=f"{r['dataset']}, {r['split']}, N = {r['n']}")
    for i, name in enumerate(names):
        left.text(i, r[name], f"{r[name]:.3g}", ha="center", va="bottom")
    if r["bayes"] is not None:
        left.axhline(r["bayes"], color="k", ls=":", label="Bayes optimum")
        left.legend()
    if r["drift_by_time"]:
        right.plot(r["drift_by_time"])
        right.set(xlabel="t", ylabel="1 - R²", title="drift of the rollout from the encoder's memory", ylim=(0, None))
    else:
        right.text(0.5, 0.5, "no encoder in this checkpoint:\nno drift to measure", ha="center", va="center")
        right.axis("off")
    fig.tight_layout()
    fig.savefig(path, dpi=90)
    plt.close(fig)


def networks(ckpt: dict, device: str) -> tuple[RNN | None, Encoder | None, Decoder | None]:
    """(rnn, encoder, decoder) of a checkpoint; None for what it does not hold."""
    return tuple(build(ckpt, name)[0].to(device) if name in ckpt else None for name in ("rnn", "encoder", "decoder"))


def main(argv=None) -> None:
    p = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = flags.fail
    p.add_argument("--ckpt", required=True, help="checkpoint of any training script; required")
    flags.add_data_flags(p)
    p.add_argument("--device", default="auto", help="(default: %(default)s)")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0,
                   help="seed of torch; the test data does not depend on it (default: %(default)s)")
    p.add_argument("--split", choices=("test", "val"), default="test", help="(default: %(default)s)")
    p.add_argument("--n_test", type=int, default=1000,
                   help="the first so many sequences of the split (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON and nothing else (default: a table)")
    a = p.parse_args(argv)
    for name, low, high in (("n_test", 1, 10 ** 9), ("threads", 0, flags.MOST_THREADS), ("seed", 0, 10 ** 18)):
        flags.demand(name, getattr(a, name), low, high)
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    ckpt = flags.open_checkpoint(a.ckpt)
    device = flags.pick_device(a.device)
    task = trainer.load_data(ckpt["config"] | flags.where(vars(a), ckpt["config"]), device, ckpt)
    rnn, encoder, decoder = networks(ckpt, device)
    result = evaluate(task, rnn, encoder, decoder, a.split, a.n_test)
    picture = os.path.join(os.path.dirname(a.ckpt), "evaluation.png")
    try:
        draw(result, picture)
    except OSError as e:
        flags.fail(f"{picture}: cannot be written ({e.strerror}); copy the checkpoint to a folder you may write")
    print(json.dumps(result) if a.json else table(result) + f"\n\npicture: {picture}")


if __name__ == "__main__":
    flags.cli(main)
