"""Supervised Memory Training (Eq. 2-5): encoder, decoder and RNN learn together, nothing recurs.

    python smt.py                                   # glyphs: nothing to download, 5 minutes
    python smt.py --dataset mnist                   # 14x14 on a CPU, 28x28 on a GPU
    python smt.py --dataset retrieval --detach_rnn  # ablation: L_dyn does not shape the memories

One step: the encoder makes the memories of a few short runs of consecutive times, the decoder
predicts the future from each of them, and the RNN learns the transition inside each run. Writes
runs/smt-<dataset>.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import flags
import trainer
from console import cli
from evaluate import evaluate, summary
from flags import flag
from model import RNN, Decoder, Encoder, ModelConfig, autocast, cross_entropy, futures
from sample import draw_samples


@dataclass(kw_only=True)
class Config(flags.Config):
    lambda_dec: float = flag("weight of the decoder's loss, Eq. 2")
    lambda_dyn: float = flag("weight of the one-step dynamics loss, Eq. 3")
    lambda_unif: float = flag("weight of the uniformity loss, Eq. 4")
    detach_rnn: bool = flag("the RNN does not shape the memories: no gradient, no --decode_own")
    runs: int = flag("runs of consecutive times in each sequence")
    run_len: int = flag("times in a run, which holds run_len - 1 transitions")
    chain: float = flag("how often a transition starts from the RNN's memory; the paper: 0")
    decode_own: float = flag("how often the decoder reads what the RNN made; the paper: 0")
    decode: int = flag("memories of each sequence that the decoder reads; 0 = all")
    micro: int = flag("micro-batches a step, each with times of its own")


def sample_times(T: int, runs: int, run_len: int, gen: torch.Generator) -> Tensor:
    """Runs of consecutive times, (runs, run_len) int64 on the CPU. Starts may fall before 0 or late
    and are pushed inside: the first and the last time come up as often as those in the middle,
    their neighbours up to twice."""
    run_len = min(run_len, T)
    start = torch.randint(1 - run_len, T, (runs, 1), generator=gen).clamp(0, T - run_len)
    return start + torch.arange(run_len)


def uniformity(m: Tensor, gen: torch.Generator, most: int = 512) -> Tensor:
    """L_unif, Eq. 4, on at most 512 memory tokens: log of the mean of exp(-2 |a - b|^2) over all
    pairs of different tokens, scaled to unit length. m (..., d) -> scalar; 0 when all are equal,
    lower when spread."""
    m = m.flatten(0, -2)
    # 262,144 pairs; all 1,536 tokens of a laptop's step have 2.4 million, and GPU steps far more
    pick = torch.randint(len(m), (min(most, len(m)),), generator=gen).to(m.device)
    unit = F.normalize(m[pick].float(), dim=-1)
    same = pick[:, None] == pick  # the same token twice is no pair
    distance = (2 - 2 * unit @ unit.T).masked_fill(same, torch.inf)
    return torch.logsumexp(-2 * distance.flatten(), 0) - (~same).sum().clamp(min=1).log()


def objective(encoder: Encoder, decoder: Decoder, rnn: RNN, x: Tensor, y: Tensor, times: Tensor,
              cfg: Config, gen: torch.Generator) -> dict[str, Tensor]:
    """Eq. 2-5 on x, y (B, T) int64 at `times` (runs, run_len) int64 -> named scalars; "loss" is
    Eq. 5."""
    flat, dev = times.flatten(), x.device
    m = encoder(x, flat)                                                        # (B, n, K, d)
    B, n = m.shape[:2]

    # L_dyn, Eq. 3: (m_{t-1}, x_t) -> m_t inside each run. With probability `chain` the next input
    # is what the RNN itself just made, without its graph: it learns to correct its errors. Such
    # pairs do not pull at the encoder.
    label = m.detach() if cfg.detach_rnn else m
    label = label.unflatten(1, times.shape).unbind(2)                   # run_len x (B, runs, K, d)
    coins = lambda p, *shape: (torch.rand(*shape, 1, 1, generator=gen) < p).to(dev)
    before, own = label[0], torch.zeros(B, len(times), 1, 1, dtype=torch.bool, device=dev)
    made, errors = [before], []
    for i in range(1, times.shape[1]):
        now = times[:, i].to(dev)                                               # (runs,)
        new = rnn.update(before.flatten(0, 1), x[:, now].flatten(), now.repeat(B))
        made.append(new.view_as(before))
        target = torch.where(own, label[i].detach(), label[i])
        errors.append((made[i].float() - target.float()).square().mean())
        own = coins(cfg.chain, B, len(times))
        before = torch.where(own, made[i].detach(), label[i])
    dyn = torch.stack(errors).mean()

    # L_dec, Eq. 2: the memory predicts the future, and is all the decoder sees of the past. With
    # probability `decode_own` it is the memory that the RNN has just made: its errors matter as far
    # as they spoil predictions.
    x_fut, y_fut = futures(x, y, flat, decoder.c.fut_len)               # (B, n, Tf - 1), (B, n, Tf)
    read = torch.where(coins(0 if cfg.detach_rnn else cfg.decode_own, B, n),
                       torch.stack(made, 2).flatten(1, 2), m)
    some = torch.rand(B, n, generator=gen).argsort(1)[:, :cfg.decode or n]  # of the n, in each row
    b, i = torch.arange(B)[:, None].expand_as(some).flatten().to(dev), some.flatten().to(dev)
    logits = decoder(read[b, i], x_fut[b, i], flat.to(dev)[i])
    dec = cross_entropy(logits, y_fut[b, i])

    unif = uniformity(m, gen)                                                   # Eq. 4
    loss = cfg.lambda_dec * dec + cfg.lambda_dyn * dyn + cfg.lambda_unif * unif  # Eq. 5
    spread = m.detach().float().var((0, 1), correction=0).mean()        # 0: memory has collapsed
    return dict(loss=loss, dec=dec, dyn=dyn, unif=unif, variance=spread)


def sequential_layers(c: ModelConfig, cfg: Config) -> int:
    """Layers of one step that must run one after another: the encoder's, those of a run's chained
    updates (without a chain all transitions are made at once), the decoder's."""
    updates = min(cfg.run_len, c.T) - 1 if cfg.chain else 1
    return c.enc_layers + updates * c.update_layers + c.dec_layers


@torch.no_grad()
def hand_over(encoder: Encoder, decoder: Decoder, rnn: RNN) -> None:
    """Give the RNN what SMT does not train: its readout is the decoder, its m_0 = encode([BOS])."""
    rnn.readout.load_state_dict(decoder.state_dict())
    bos = torch.full((1, 1), encoder.c.vocab - 1, device=rnn.m0.device)
    rnn.m0.copy_(encoder(bos, torch.zeros(1, dtype=torch.int64))[0, 0])


def main(argv) -> None:
    cfg, _ = flags.parse("smt", Config, argv, __doc__)
    device, task = trainer.setup(cfg)
    c = trainer.model_config(cfg, task)
    encoder, decoder, rnn = (net(c).to(device) for net in (Encoder, Decoder, RNN))
    nets = dict(encoder=encoder, decoder=decoder, rnn=rnn)
    trained = [[*encoder.parameters(), *decoder.parameters()], [*rnn.updater.parameters()]]
    # a causal encoder makes labels for t < Tc alone
    T = min(task.T, c.ctx_len) if c.encoder == "causal" else task.T

    run = trainer.Run("smt", cfg, nets, trained, c, task, device)
    while run.unfinished():
        run.set_learning_rate()
        means = {}
        for _ in range(cfg.micro):
            x, y = task.batch(cfg.batch_size // cfg.micro, run.gen)             # (B, T) each
            times = sample_times(T, cfg.runs, cfg.run_len, run.gen)             # (runs, run_len)
            with autocast(device):
                losses = objective(encoder, decoder, rnn, x, y, times, cfg, run.gen)
            (losses["loss"] / cfg.micro).backward()
            means = {k: means.get(k, 0.0) + v.detach() / cfg.micro for k, v in losses.items()}
        run.update(means, cfg.batch_size * task.T, sequential_layers(c, cfg))

        # Readout and m_0 are copies: made of averaged weights, and only when somebody looks.
        if run.time_to_evaluate() or run.time_to_save():
            with run.averaged():
                hand_over(encoder, decoder, rnn)
                if run.time_to_evaluate():
                    got = evaluate(task, rnn, encoder, decoder, "val", cfg.n_val, kl_sequences=16)
                    run.report(summary(got), best="one_step")
                    draw_samples(cfg.out_dir, task, rnn, encoder, decoder, n=min(40, cfg.n_val))
                if run.time_to_save():
                    run.save()
    run.finish()
    print(f"next: python dmt.py --ckpt {run.path('ckpt.pt')}")


if __name__ == "__main__":
    cli(main)
