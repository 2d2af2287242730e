"""Tiny networks for the lessons: every size different, so that a swapped axis cannot go
unnoticed."""
import torch

import flags
from model import RNN, Decoder, Encoder, Heads, ModelConfig

B, T, K, D, V = 3, 11, 2, 12, 5  # BOS = V: inputs 0..V, outputs 0..V-1
M, F, P = 8, 6, 4                # width of a memory token, targets and inputs that heads say


def config(**changes) -> ModelConfig:
    base = dict(vocab=V + 1, n_out=V, T=T, d_model=D, n_heads=3, mem_tokens=K, mem_dim=M,
                enc_layers=2, dec_layers=2, rnn_layers=1, ctx_len=T, fut_len=4, heads=F,
                past=P)
    return ModelConfig(**base | changes)


def recipe(script, **changes):
    """The Config of smt, dmt or bptt that the laptop's recipe gives, with changes."""
    return flags.config(script.__name__, script.Config, **changes)


def networks(seed: int = 0, **changes):
    """(encoder, decoder, rnn) with random weights, output layers included."""
    torch.manual_seed(seed)
    c = config(**changes)
    nets = Encoder(c), Decoder(c), RNN(c)
    for net in (nets[1], nets[2].readout):
        torch.nn.init.normal_(net.head.weight, std=0.5)
    return nets


def heads(seed: int = 0, **changes) -> Heads:
    """With random weights, that guess one thing and not another."""
    torch.manual_seed(seed)
    made = Heads(config(**changes))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


def sequences(seed: int = 1, n: int = B, length: int = T):
    """Autoregressive x, y (n, length): y is random, x is BOS and y shifted."""
    y = torch.randint(V, (n, length), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.full((n, 1), V), y[:, :-1]], dim=1), y


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
