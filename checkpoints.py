"""What a checkpoint holds, and how one is opened: whoever gets it may trust its types and sizes.

    rnn = checkpoints.load("results/glyphs/rnn.pt")             # the RNN alone, ready to be stepped
    encoder, rnn = build(load_checkpoint(path), "encoder", "rnn")

A file may be a stranger's, or cut off: it is read as plain types and tensors, and refused in one
line if anything in it is not what it must be. trainer.py writes them.
"""
import dataclasses
import math
import os
import warnings
import zipfile

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from model import RNN, UPDATERS, Decoder, Encoder, Heads, ModelConfig
from sources.files import UserError

FORMAT = 3  # of checkpoints; counted up when older files cannot be used any more
NETWORKS = {"encoder": Encoder, "decoder": Decoder, "rnn": RNN, "heads": Heads}
# What every checkpoint holds, and what one holds besides that can be resumed.
HOLDS = dict(format=int, script=str, config=dict, model=dict)
RESUMES = dict(step=int, tokens=int, layers=int, elapsed=float, best=float, metrics=dict, sums=dict,
               kept=dict, newest=list, optimizers=list, rng=Tensor, torch_rng=Tensor)
# Smallest and largest value of sizes and of flags; 0 and 1e12 where nothing is said.
RANGES = {name: (low, high) for names, low, high in (
    ("T vocab", 2, 10 ** 7), ("n_out d_model mem_tokens", 1, 10 ** 6),
    ("head_dim mem_dim", 0, 10 ** 6), ("ctx_len fut_len heads past", 0, 10 ** 7),
    ("n_heads enc_layers dec_layers rnn_layers", 1, 1000), ("n_val", 1, 10 ** 5),
    ("batch_size log_every span micro", 1, 10 ** 9), ("first ema decay", 0, 1),
    ("rnn_from", 0, 0.9), ("heads_part", 1e-9, 1), ("lr", 1e-12, 1e18), ("seed", 0, 10 ** 18),
    ("threads", 0, 1024),  # torch crashes on absurd numbers
) for name in names.split()}
CHOICES = dict(rnn=tuple(sorted(UPDATERS)), encoder=("bidirectional", "causal"),
               timestamps=("all", "encoder", "none"))


class CheckpointError(UserError):
    """A file that is not a usable checkpoint."""


def problem(values: dict, fields) -> str | None:
    """The first of the values that its dataclass field cannot have, as a line; None: all are
    fine."""
    for f in fields:
        v, choices = values.get(f.name), f.metadata.get("choices") or CHOICES.get(f.name)
        if f.name not in values or v is None and f.default is None:
            continue
        kinds = (int, float) if f.type is float else (f.type,)  # but a bool is no number
        if type(v) not in kinds or choices and v not in choices:
            return f"--{f.name} {v!r} is not allowed"
        low, high = RANGES.get(f.name, (0, 1e12))
        if f.type in (int, float) and not low <= v <= high:  # NaN is in no range
            return f"--{f.name} {v} is not allowed; give a number from {low:g} to {high:g}"


def odd_heads(c) -> str | None:
    """Why attention cannot have the sizes of c (a ModelConfig, or flags), as a line."""
    if not c.head_dim and c.d_model % c.n_heads:
        return f"--d_model {c.d_model} is not a multiple of --n_heads {c.n_heads}; " \
               "change one, or give --head_dim"
    if (hd := c.head_dim or c.d_model // c.n_heads) % 2:
        return f"--head_dim {hd} is odd; RoPE rotates pairs, make it even"


def demand_usable(ckpt, flags) -> None:
    """The one check of a checkpoint: whoever holds it may trust its types, sizes and numbers, and
    its config's values of `flags` (fields). Raises ValueError, or what odd values raise."""
    ckpt = ckpt if isinstance(ckpt, dict) else {}
    # first: another version's may hold other parts
    if type(ckpt.get("format")) is int and ckpt["format"] != FORMAT:
        raise ValueError(f"of format {ckpt['format']}, and this version reads format {FORMAT}; "
                         "train again")
    holds = HOLDS | (RESUMES if "newest" in ckpt else {})
    bad = [name for name, kind in holds.items() if type(ckpt.get(name)) is not kind]
    if bad or not {"dataset", "preset"} <= ckpt["config"].keys() \
            or not {"rnn", "decoder"} & ckpt.keys() or "decoder" not in ckpt and "encoder" in ckpt:
        raise ValueError(f"not a checkpoint of this project: look at its {bad or 'parts'}")
    c, image = ModelConfig(**ckpt["model"]), ckpt["image"]
    if bad := problem(ckpt["config"], flags) or problem(vars(c), dataclasses.fields(c)) \
            or odd_heads(c):
        raise ValueError(bad)
    if not max(c.ctx_len, c.fut_len, c.heads, c.past) <= c.T or not c.ctx_len or not c.fut_len:
        raise ValueError("Tc, Tf, F and P do not fit its T")
    if image is not None and (list(map(type, image)) != [int, int] or math.prod(image) != c.T):
        raise ValueError(f"its picture is {image}")
    names = [name for name in NETWORKS if name in ckpt]
    shapes = lambda d: {k: v.shape for k, v in d.items()}
    for name in names:
        with torch.device("meta"):  # no memory: the sizes may be absurd
            if shapes(ckpt[name]) != shapes(NETWORKS[name](c).state_dict()):
                raise ValueError(f"its {name} has not the sizes that it says")
    for row in ckpt.get("history", []):
        if not {"step", "seconds"} <= row.keys() or {*map(type, row.values())} - {int, float}:
            raise ValueError(f"a row of its log is {row}")
    numbers = tree_leaves([ckpt.get(k) for k in (*names, "newest", "optimizers", "sums", "kept")])
    if not all(torch.as_tensor(v).isfinite().all() for v in numbers if v is not None) \
            or not all(ckpt.get(k, 0) >= 0 for k in ("step", "tokens", "layers", "elapsed")):
        raise ValueError("it holds numbers that are not finite, or below 0")


def load_checkpoint(path: str, flags=()) -> dict:
    """The checkpoint at `path` as plain types and CPU tensors, whose config fits the `flags`
    (dataclass fields). Raises CheckpointError."""
    try:
        if not os.path.isfile(path):
            raise ValueError("no such file")
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles: the one line below says it all
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
        demand_usable(ckpt, flags)
    except Exception as e:  # what comes from a stranger's file raises a dozen types
        reason = " ".join(str(e).split()) or type(e).__name__
        reason = "it holds more than plain types" if reason.startswith("Weights only") else reason
        raise CheckpointError(f"{path}: not a usable checkpoint ({reason[:160]}); give "
                              "another one, or train one") from None
    return ckpt | dict(path=path)


def build(ckpt: dict, *names: str) -> list[nn.Module]:
    """The networks `names` ("encoder", "decoder", "rnn", "heads") of a checkpoint, with its
    weights, in eval mode. Raises CheckpointError where it does not hold them."""
    out = []
    for name in names:
        if name not in ckpt:
            raise CheckpointError(f"{ckpt['path']}: no {name} in it, it is from "
                                  f"{ckpt['script']}.py; give another script's")
        net = NETWORKS[name](ModelConfig(**ckpt["model"]))
        net.load_state_dict(ckpt[name])
        out.append(net.eval())
    return out


def load(path: str, device: str = "cpu") -> RNN:
    """The trained RNN of any checkpoint, ready to be stepped (README shows how). Raises
    CheckpointError."""
    return build(load_checkpoint(path), "rnn")[0].to(device)
