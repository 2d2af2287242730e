"""An outside yardstick: a plain causal Transformer of the teacher's size and next-token loss.

    python results/yardstick/transformer.py --dataset mnist

It is the Decoder without memory, with the layers of encoder and decoder together. It reads its
whole past again at every step, so it is no RNN; it says what the data allow. evaluate.py reports it
in the column "teacher". Writes runs/transformer-<dataset>.
"""
import dataclasses
import os
import sys

import torch
from torch import Tensor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import flags  # noqa: E402
import presets  # noqa: E402
import trainer  # noqa: E402
from console import cli  # noqa: E402
from evaluate import evaluate, summary  # noqa: E402
from losses import cross_entropy  # noqa: E402
from model import Decoder, autocast  # noqa: E402


def recipe(preset: str, kinds: tuple) -> dict:
    """SMT's recipe, with BPTT's minutes (those of SMT and DMT together) and small batches."""
    smt, bptt = (presets.recipe(method, preset, kinds) for method in ("smt", "bptt"))
    small = {"batch_size": 24} if preset == "laptop" and "synthetic" in kinds else {}
    return smt | {"minutes": bptt["minutes"]} | small


def objective(decoder: Decoder, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Next-token cross-entropy of x, y (B, T) int64."""
    nothing = torch.empty(len(x), 0, decoder.c.mem_dim, device=x.device)        # K = 0: no memory
    return dict(loss=cross_entropy(decoder(nothing, x, x.new_full((len(x),), -1)), y))


def main(argv) -> None:
    cfg, _ = flags.parse("transformer", flags.Config, argv, __doc__, recipe, unused=(
        "rnn", "encoder", "mem_tokens", "mem_dim", "rnn_layers", "ctx_len", "fut_len", "heads",
        "heads_part", "past"))
    device, task = trainer.setup(cfg)
    c = trainer.model_config(cfg, task)
    c = dataclasses.replace(c, dec_layers=c.enc_layers + c.dec_layers)
    decoder = Decoder(c).to(device)

    run = trainer.Run("transformer", cfg, dict(decoder=decoder), [[*decoder.parameters()]], c, task,
                      device)
    while run.unfinished():
        run.set_learning_rate()
        x, y = task.batch(cfg.batch_size, run.gen)                              # (B, T) each
        with autocast(device):
            losses = objective(decoder, x, y)
        losses["loss"].backward()
        run.update(losses, x.numel(), c.dec_layers)

        if run.time_to_evaluate() or run.time_to_save():
            with run.averaged():
                if run.time_to_evaluate():
                    run.report(summary(evaluate(task, None, None, decoder, "val", cfg.n_val,
                                                fast=True)), best="teacher")
                if run.time_to_save():
                    run.save()
    run.finish("evaluate.py")


if __name__ == "__main__":
    cli(main)
