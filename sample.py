"""Draw from an RNN: it starts alone from m_0, samples y_t, reads it back as x_{t+1}, and so on.

    python sample.py                                        # the checkpoint of results/glyphs
    python sample.py --ckpt runs/dmt-mnist/ckpt.pt --n 64 --temperature 0.9
    python sample.py --ckpt runs/dmt-mnist/ckpt.pt --prefix # completes test images (needs data)

    python sample.py --ckpt runs/dmt-tinystories/ckpt.pt --prompt "Once upon a time" --chars 500

Images go to --out as one PNG, text is printed. Synthetic tasks, whose inputs are not their outputs,
print test sequences and the RNN's answers.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, demand, fail, flags_in, parser, path, pick_device, refuse
import os

import numpy as np
import torch
from torch import Tensor

import flags
from checkpoints import build
from data import READS, TEXTS, sequences_to_images
from model import RNN, autocast, on_device
from sources import text
from sources.files import Data, written_whole
from sources.images import grid, save_png

DEFAULT_CKPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "glyphs",
                            "rnn.pt")


def pick(logits: Tensor, temperature: float, top_k: int, gen: torch.Generator) -> Tensor:
    """One symbol per row of logits (N, V) -> (N,) int64; temperature 0 is argmax, top_k 0 keeps
    all."""
    logits = logits.float().cpu()
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if temperature < 1e-6:  # 0, or so near that the division would overflow
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=gen)[:, 0]


@torch.no_grad()
def generate(rnn: RNN, n: int, T: int, gen: torch.Generator, temperature: float = 1.0,
             top_k: int = 0, given: Tensor | None = None, known: Tensor | None = None) -> Tensor:
    """n sequences of T symbols from the RNN alone: (n, T) int64 on the CPU.

    Row i keeps the first known[i] symbols of given (n, T) and continues from there.
    """
    device = rnn.m0.device
    m, out = rnn.start(n), torch.zeros(n, T, dtype=torch.int64)
    with autocast(str(device)):  # around the loop: here every weight is cast once
        for t in range(T):
            if t:
                now = torch.full((n,), t, device=device)
                m = rnn.update(m, on_device(out[:, t - 1], device), now)
            out[:, t] = pick(rnn.logits(m), temperature, top_k, gen)
            if given is not None:
                out[:, t] = torch.where(t < known, given[:, t], out[:, t])
    return out


def draw_samples(out_dir: str, task: Data, rnn: RNN, n: int = 40) -> None:
    """samples.png: n drawings of the RNN alone. samples.txt for tasks that are not pictures."""
    gen = torch.Generator().manual_seed(0)
    if task.image is None:
        told = continuations(rnn, 3, task.T, gen) if task.name in TEXTS else answers(task, rnn, 16)
        path = os.path.join(out_dir, "samples.txt")
        with written_whole(path, "w") as f:
            f.write(told)
        return
    drawn = sequences_to_images(task, generate(rnn, n, task.T, gen))
    save_png(os.path.join(out_dir, "samples.png"), grid(np.asarray(drawn), 8))


def continuations(rnn: RNN, n: int, chars: int, gen: torch.Generator, temperature: float = 1.0,
                  top_k: int = 0, prompt: str = "") -> str:
    """n texts of `chars` bytes that continue the prompt, one below the other."""
    start = text.to_ids(prompt)
    given = torch.zeros(n, len(start) + chars, dtype=torch.int64)
    given[:, :len(start)] = torch.tensor(start)
    known = torch.full((n,), len(start))
    out = generate(rnn, *given.shape, gen, temperature, top_k, given, known)
    return "".join(f"--- {i + 1}\n{text.to_text(row)}\n" for i, row in enumerate(out))


@torch.no_grad()
def answers(task: Data, rnn: RNN, n: int) -> str:
    """Test sequences with their targets, and below each what the RNN, reading it alone, answers."""
    held = task.held_out("test", n)
    x, y = held["x"], held["y"]
    guess = rnn.logits(rnn.memories(x)).argmax(-1).where(y >= 0, -1)
    return "".join(f"{task.show(a, b)}\n{task.show(a, g)}   says the RNN\n"
                   for a, b, g in zip(x, y, guess))


def read_flags(argv):
    p = parser("sample.py", __doc__)
    p.add_argument("--ckpt", default=DEFAULT_CKPT, type=path, metavar="CKPT",
                   help="checkpoint with an RNN (default: the one in results/glyphs)")
    p.add_argument("--n", type=int, default=0,
                   help="how many; 0 = 40 images, 16 answers or 3 texts (default: %(default)s)")
    p.add_argument("--prompt", default="", help="text to continue (default: none)")
    p.add_argument("--chars", type=int, default=400,
                   help="length of a text in bytes (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0,
                   help="0 = the most likely symbol (default: %(default)s)")
    p.add_argument("--top_k", type=int, default=0,
                   help="choose among the k most likely symbols; 0 = all (default: %(default)s)")
    p.add_argument("--prefix", action="store_true",
                   help="complete n test images from 0, 1/8, 1/4, 1/2 and 3/4 of their pixels "
                        "(default: draw freely)")
    flags.add_data_flags(p)
    p.add_argument("--device", default="auto", help="(default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    p.add_argument("--out", default="samples.png", type=path, metavar="OUT",
                   help="picture to write (default: %(default)s)")
    a = p.parse_args(argv)
    for name, low, high in (("n", 0, 10_000), ("chars", 1, 10 ** 7), ("temperature", 0, 1e18),
                            ("top_k", 0, 10 ** 6), ("seed", 0, 10 ** 18)):
        demand(name, getattr(a, name), low, high)
    if not a.out.lower().endswith(".png"):
        fail(f"--out {a.out}: pictures are written as PNG; give a name that ends with .png")
    return a


def refuse_useless(ckpt: dict, flags) -> None:
    """Refuse, among the flags given, what means nothing to this checkpoint. Raises UserError."""
    name, image = ckpt["config"]["dataset"], ckpt["image"]
    nothing = "chars prompt data_file" if image else \
        "prefix out data_dir data_file" if name in TEXTS else \
        "chars prompt prefix out data_dir data_file temperature top_k seed"
    refuse(nothing, flags, f"to this checkpoint, which was trained on {name}")
    if image and not ("prefix" in flags and name in READS):
        refuse("data_dir", flags, "where no data is read")


def main(argv) -> None:
    a = read_flags(argv)
    ckpt = flags.open_checkpoint(a.ckpt)
    if "rnn" not in ckpt:
        fail(f"--ckpt {a.ckpt} holds no RNN (it is from {ckpt['script']}.py); "
             "give one of smt.py, dmt.py or bptt.py")
    refuse_useless(ckpt, flags_in(argv))
    if os.path.realpath(a.out) == os.path.realpath(a.ckpt):
        fail(f"--out {a.out} is the checkpoint; give another name")
    if a.temperature == 0:
        refuse("seed top_k", flags_in(argv), "with --temperature 0, which draws nothing")
    device = pick_device(a.device)
    rnn = build(ckpt, "rnn")[0].to(device)
    image, T, name = ckpt["image"], rnn.c.T, ckpt["config"]["dataset"]
    config = ckpt["config"] | flags.data_places(vars(a), ckpt["config"])
    gen = torch.Generator().manual_seed(a.seed)
    if name in TEXTS:
        told = continuations(rnn, a.n or 3, a.chars, gen, a.temperature, a.top_k, a.prompt)
        return print(told, end="")
    if image is None:
        return print(answers(flags.load_data(config, device, ckpt), rnn, a.n or 16), end="")
    n, columns, begun, known = a.n or 40, 8, None, None
    if a.prefix:  # one test image a row: 0, 1/8 .. 3/4 of it given, at the right the image itself
        known = torch.tensor([0, T // 8, T // 4, T // 2, 3 * T // 4, T]).repeat(n)
        begun = flags.load_data(config, "cpu", ckpt).held_out("test", n)["y"]
        begun = begun.repeat_interleave(6, 0)
        n, columns, known = len(begun), 6, known[:len(begun)]
    out = generate(rnn, n, T, gen, a.temperature, a.top_k, begun, known)
    save_png(a.out, grid(out.view(-1, *image).numpy() / (rnn.c.n_out - 1), columns))
    print(f"{len(out)} images in {a.out}")


if __name__ == "__main__":
    cli(main)
