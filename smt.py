"""Supervised Memory Training (Eq. 2-5): encoder, decoder, RNN learn together, no gradient recurs.

    python smt.py                                   # glyphs: nothing to download, 3 minutes
    python smt.py --dataset mnist                   # 14x14 on a CPU, 28x28 on a GPU
    python smt.py --dataset retrieval --detach_rnn  # ablation: L_dyn does not shape the memories

The encoder makes the memories of all times at once; the RNN, which joins half-way, learns the
transitions of some sequences at once, also from memories of its own. A gradient crosses one update.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, fail, flags_in
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import flags
import ranks
import trainer
from evaluate import evaluate, summary
from flags import flag
from losses import predictive
from model import (RNN, Decoder, Encoder, Heads, ModelConfig, autocast, first_piece, fp32,
                   on_device)
from sample import draw_samples


@dataclass(kw_only=True)
class Config(flags.Config):
    lambda_dec: float = flag("weight of the predictions, Eq. 2")
    lambda_dyn: float = flag("weight of the one-step dynamics loss, Eq. 3")
    lambda_unif: float = flag("weight of the uniformity loss, Eq. 4")
    detach_rnn: bool = flag("the RNN does not shape the encoder's memories")
    times: int = flag("memories of a sequence in a step; 0 = all; the paper: 2")
    rnn_batch: int = flag("the RNN learns from so many sequences of a part; 0 = all")
    rnn_from: float = flag("part of the run in which the teacher learns alone; paper: 0")
    decode_own: bool = flag("what the RNN makes must predict, too; the paper: no")
    horizon: int = flag("updates alone first: 4, growing to this; 0 = to all; paper: 1")
    futures: int = flag("memories of a part that must predict their whole future")
    octaves: bool = flag("these lie 1, 2-3, 4-7 .. before a target; paper: anywhere")
    lambda_fut: float = flag("weight of these futures within Eq. 2; the paper: 1")
    lambda_past: float = flag("weight of recalling the last inputs (--past) within Eq. 2")
    first: float = flag("part of the memories that predict y_t alone; the paper: 0")
    micro: int = flag("parts of a step; each has times of its own")


def sample_times(T: int, n: int, gen: torch.Generator) -> Tensor:
    """n consecutive times, (n,) int64 on the CPU; all of them for n = 0. The start may fall before
    0 or late and is pushed inside: for n <= T / 2 the first and the last time come up as often as
    those in the middle, their neighbours up to twice."""
    # The RNN alone begins at time 0, many tasks ask at the last time: both must come up as often as
    # the others.
    n = min(n or T, T)
    start = int(torch.randint(1 - n, T, (), generator=gen)) if n < T else 0
    return min(max(start, 0), T - n) + torch.arange(n)


def horizon_at(progress: float, most: int) -> int:
    """Curriculum: 4 at first, growing geometrically to `most` when 80 % of the RNN's part of the
    run is done. At first the RNN's own memories are no place to learn from."""
    # Geometrically, 4 -> 8 -> 16 ..: each doubling takes as long, and most of a run stays cheap.
    return min(most, round(4 * (most / 4) ** min(1.0, progress / 0.8)))


def uniformity(m: Tensor, gen: torch.Generator, most: int = 512) -> Tensor:
    """L_unif, Eq. 4, on at most 512 memory tokens: log of the mean of exp(-2 |a - b|^2) over all
    pairs of different tokens, scaled to unit length. m (..., d) -> scalar; 0 when all are equal,
    lower when spread."""
    m, n = m.flatten(0, -2), m[..., 0].numel()
    # 262,144 pairs; all 6,912 tokens of a laptop's step have 48 million, and GPU steps far more.
    # Drawn one by one: shuffling 800,000 tokens of a GPU's step would take longer than the step.
    pick = torch.arange(n) if n <= most else torch.randint(n, (most,), generator=gen)
    pick = on_device(pick, m.device)
    unit = F.normalize(m[pick].float(), dim=-1)
    same = pick[:, None] == pick  # the same token twice is no pair
    with fp32(m.device):  # close tokens differ in digits that bf16 does not have
        distance = (2 - 2 * unit @ unit.T).masked_fill(same, torch.inf)
    return torch.logsumexp(-2 * distance.flatten(), 0) - (~same).sum().clamp(min=1).log()


def on_policy(rnn: RNN, label: Tensor, x: Tensor, times: Tensor, horizon: int,
              gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ours: the transitions once more, from where the RNN is after up to horizon - 1 updates alone.
    They are what DMT learns from later; here they share a step with everything else, and they do
    not pull at the encoder. (B, n, K, d) -> new memories (B, n-1, K, d), mean square error."""
    # No graph: where the RNN has come to is given, and the gradient crosses the next update alone.
    own = rnn.own_memories(label, x, times, horizon, first_piece(len(times), horizon, gen))
    made = rnn.update(own[:, :-1], x[:, 1:], times[1:])
    # The label is detached. The encoder shall not move to where an untrained RNN happens to be.
    return made, F.mse_loss(made.float(), label[:, 1:].detach().float())


def with_made(m: Tensor, made: list[Tensor], x: Tensor,
              y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ours: what the RNN made must predict, too; that shapes a memory that an RNN can keep. m (B,
    n, K, d) and each of made (B', n-1, K, d), of the first B' sequences -> memories (N, n, K, d) of
    sequences x, y (N, T)."""
    # An RNN's memories begin after the first update, so the first of a row stays the encoder's.
    few = len(made[0])
    rows = [torch.cat([m[:few, :1], new], dim=1) for new in made]
    x, y = (torch.cat([v] + [v[:few]] * len(made)) for v in (x, y))
    return torch.cat([m, *rows]), x, y


def objective(encoder: Encoder, decoder: Decoder, rnn: RNN, heads: Heads | None, x: Tensor,
              y: Tensor, times: Tensor, horizon: int, cfg: Config,
              gen: torch.Generator, density: float = 1.0) -> dict[str, Tensor]:
    """Eq. 2-5 on x, y (B, T) int64 at consecutive `times` (n,), on the CPU -> named scalars; "loss"
    is Eq. 5. The RNN learns on the first --rnn_batch sequences; horizon 1 leaves out what is
    on-policy; `density`: which part of all times has a target, about."""
    few = slice(cfg.rnn_batch or None)
    m, times = encoder(x, times), on_device(times, x.device)            # (B, n, K, d)
    label, x_now = m[few].detach() if cfg.detach_rnn else m[few], x[few][:, times]
    made = [rnn.update(label[:, :-1], x_now[:, 1:], times[1:])]         # all transitions at once
    # Both sides learn: the RNN to reach the label, the encoder to make labels that one update
    # reaches.
    dyn = F.mse_loss(made[0].float(), label[:, 1:].float())             # Eq. 3
    if horizon > 1:
        again, error = on_policy(rnn, label, x_now, times, horizon, gen)
        made, dyn = [*made, again], (dyn + error) / 2  # a mean: lambda_dyn weighs both alike
    unif = uniformity(m, gen)                                           # Eq. 4
    read, x, y = with_made(m, made, x, y) if cfg.decode_own else (m, x, y)
    dec = predictive(decoder, heads, read, times.expand(len(x), -1), x, y, cfg, gen,
                     density)                                           # Eq. 2
    loss = cfg.lambda_dec * dec["dec"] + cfg.lambda_dyn * dyn + cfg.lambda_unif * unif  # Eq. 5
    spread = m.detach().float().var((0, 1), correction=0).mean()        # 0: memory has collapsed
    return dict(loss=loss, dyn=dyn, unif=unif, variance=spread) | dec


def teacher_alone(encoder: Encoder, decoder: Decoder, heads: Heads | None, x: Tensor, y: Tensor,
                  times: Tensor, cfg: Config, gen: torch.Generator,
                  density: float = 1.0) -> dict[str, Tensor]:
    """Ours, the first --rnn_from of a run: Eq. 2 and 4. Memories that hold nothing yet are no
    labels, and a step without the RNN takes less than half the time."""
    m, times = encoder(x, times), on_device(times, x.device)            # (B, n, K, d)
    unif = uniformity(m, gen)
    dec = predictive(decoder, heads, m, times.expand(len(x), -1), x, y, cfg, gen, density)
    return dict(loss=cfg.lambda_dec * dec["dec"] + cfg.lambda_unif * unif, unif=unif) | dec


def sequential_layers(c: ModelConfig, horizon: int) -> int:
    """Layers of one step that must run one after another: the encoder's, those of horizon - 1
    updates without a graph and of one with it (0: the teacher alone), the decoder's."""
    return c.enc_layers + horizon * c.update_layers + c.dec_layers


@torch.no_grad()
def hand_over(encoder: Encoder, decoder: Decoder, rnn: RNN) -> None:
    """Give the RNN what SMT does not train: its readout is the decoder, its m_0 = encode([BOS])."""
    # Given the memory alone the decoder is a readout, so the RNN need not learn one of its own.
    rnn.readout.load_state_dict(decoder.state_dict())
    bos = torch.full((1, 1), encoder.c.vocab - 1, device=rnn.m0.device)
    rnn.m0.copy_(encoder(bos, torch.zeros(1, dtype=torch.int64))[0, 0])


def times_to_draw(cfg: Config, c: ModelConfig, task, argv) -> int:
    """How many of a sequence's times, from 0 on, a step may draw. Raises UserError."""
    # a causal encoder makes labels for t < Tc alone
    most = min(task.T, c.ctx_len) if c.encoder == "causal" else task.T
    if not cfg.times or task.timestamps:
        return most
    # a text goes on behind its window: draw times whose whole future lies inside
    most, wanted = min(most, task.T - c.fut_len + 1), cfg.times if "times" in flags_in(argv) else 2
    if most < wanted:
        fail(f"--times: a step needs {wanted}, and --fut_len {c.fut_len} and --ctx_len {c.ctx_len} "
             f"leave {max(0, most)} of the {task.T} of a window; give less, or a longer --length")
    return most


def networks(c: ModelConfig, device: str) -> tuple[dict, list]:
    """Networks by name, as they are drawn, and two groups of parameters, whose gradients are
    clipped apart, as the paper does: the teacher's and the updater's."""
    nets = dict(encoder=Encoder(c), decoder=Decoder(c), rnn=RNN(c))
    if c.heads or c.past:
        nets["heads"] = Heads(c)
    nets = {name: net.to(device) for name, net in nets.items()}
    # readout and m_0 of the RNN are copies of the teacher's and not trained
    teacher = [p for name, net in nets.items() if name != "rnn" for p in net.parameters()]
    return nets, [teacher, [*nets["rnn"].updater.parameters()]]


def main(argv) -> None:
    cfg, _ = flags.parse("smt", Config, argv, __doc__)
    device, task = trainer.setup(cfg)
    flags.demand_fits(cfg, task.T, argv)
    c = trainer.model_config(cfg, task)
    nets, trained = networks(c, device)
    encoder, decoder, rnn, heads = (nets.get(k) for k in ("encoder", "decoder", "rnn", "heads"))
    most = times_to_draw(cfg, c, task, argv)

    mine = ranks.share(cfg)  # cfg; under torchrun with this process's part of the batch
    run = trainer.Run("smt", cfg, nets, trained, c, task, device)
    while run.unfinished():
        run.set_learning_rate()
        joined = (run.progress - cfg.rnn_from) / max(1e-9, 1 - cfg.rnn_from)  # below 0: not yet
        horizon = horizon_at(max(0.0, joined), min(cfg.horizon or most, cfg.times or most, most))
        means, tokens = {}, 0
        # The sequences of a part share their times: the paper's encoder has a pass for each.
        # Several parts see more times.
        for _ in range(cfg.micro):
            x, y = task.batch(mine.batch_size // cfg.micro, run.gen)            # (B, T) each
            times = sample_times(min(x.shape[1], most), cfg.times, run.gen)     # (n,)
            # with two times its own memories would be labels, and the transition the same
            alone = min(horizon, len(times)) if len(times) > 2 else 1
            density = task.density(x.shape[1])
            with autocast(device):
                losses = teacher_alone(encoder, decoder, heads, x, y, times, mine, run.gen,
                                       density) if joined < 0 else \
                    objective(encoder, decoder, rnn, heads, x, y, times, alone, mine, run.gen,
                              density)
            (losses["loss"] / cfg.micro).backward()
            tokens += cfg.batch_size // cfg.micro * x.shape[1]
            means = {k: means.get(k, 0.0) + v.detach() / cfg.micro for k, v in losses.items()}
        run.update(means, tokens, sequential_layers(c, 0 if joined < 0 else alone))

        # Readout and m_0 are copies: made of averaged weights, and only when somebody looks.
        if run.time_to_evaluate() or run.time_to_save():
            with run.averaged():
                hand_over(encoder, decoder, rnn)
                if run.time_to_evaluate():
                    got = evaluate(task, rnn, encoder, decoder, "val", cfg.n_val, fast=True)
                    run.report(summary(got), best="one_step")
                    draw_samples(cfg.out_dir, task, rnn, n=min(40, cfg.n_val))
                if run.time_to_save():
                    run.save()
    run.finish("dmt.py")


if __name__ == "__main__":
    cli(main)
