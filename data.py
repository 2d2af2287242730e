"""Every dataset and task behind one small interface: `load(name, ...)` returns a `Data`.

    python data.py                       # the list
    python data.py stack --depth 3       # look before you train: what it is, examples

A sequence is a pair (x, y) of equal length T. x holds input ids and always starts with BOS; y_t is
the target after x_0..x_t has been read, -1 where there is none.

    sources/images.py   glyphs, mnist, sketchy, images     pixels in raster order: x_t is y_{t-1}
    sources/text.py     tinystories, shakespeare, pydoc, text     bytes: x_t is y_{t-1}
    sources/tasks.py    retrieval, copy, stack, recall, modular, parity, permutation, recency,
                        primacy     endless, with exact Bayes optima; the first five in two variants

To add one: write a function that returns a `Data` (for pictures `images.image_data` does it), give
it a line in OPTIONS, in ABOUT and in `load`, and its name in TEXTS or SYNTHETIC if it is one, in
READS if it reads files from --data_dir; a new option wants a line in HELP.
"""
# before the slow imports, during which it answers Ctrl-C
from console import cli, demand, flags_in, parser, path, refuse
import argparse
import dataclasses
import os

import torch

from sources import images, tasks, text
from sources.files import Data, DataError, check

# What each dataset understands, with defaults; the command line offers the same names as flags.
OPTIONS = {
    "glyphs": dict(image_size=12, glyphs="0123456789", jitter=0.35),
    "mnist": dict(image_size=28, levels=2, binarize=None),  # None: static at 28, threshold at 14
    "sketchy": dict(image_size=32),
    "images": dict(image_size=32),  # any pictures below data_dir
    "tinystories": dict(length=256),
    "shakespeare": dict(length=256),
    "pydoc": dict(length=256),
    "text": dict(length=256, data_file=""),
    # needle_range 0: the first half, in `ours` the first quarter. modulus 0: 32, in `ours` 7
    "retrieval": dict(variant="paper", length=64, shortest=0, symbols=8, noise=0.0,
                      needle_range=0),
    "copy": dict(variant="paper", length=33, shortest=0, symbols=8, noise=0.0, reverse=True),
    "stack": dict(variant="paper", length=64, shortest=0, symbols=4, depth=5),
    "recall": dict(variant="paper", keys=8, symbols=8, key_len=2, gap=0, shortest=0),
    "modular": dict(variant="paper", examples=8, modulus=0),
    "parity": dict(length=64, shortest=0),
    "permutation": dict(length=32, shortest=0, items=5),
    "recency": dict(length=64, symbols=8, gamma=0.5),
    "primacy": dict(length=64, symbols=8, gamma=0.5),
}
ABOUT = {  # what a token is, and what is asked
    "glyphs": "a pixel of a digit in matplotlib's fonts; nothing to download",
    "mnist": "a pixel of a handwritten digit",
    "sketchy": "a pixel of a drawing of the Sketchy Database, which you unpack yourself",
    "images": "a pixel of the pictures in a folder of yours (--data_dir)",
    "tinystories": "a byte of simple stories; the end of a story is a byte, too",
    "shakespeare": "a byte of Shakespeare's plays",
    "pydoc": "a byte of Python's help topics; nothing to download",
    "text": "a byte of a text of yours (--data_file)",
    "retrieval": "symbols; at the end, which one came after the marker?",
    "copy": "a string of symbols; then say it backwards",
    "stack": "pushes and pops; what does a pop take away?",
    "recall": "pairs of a key and a value; then one key, and what was its value?",
    "modular": "pairs of x and y = w x + b (mod p); what is the next y?",
    "parity": "bits; at every step, is the number of ones odd?",
    "permutation": "swaps and rotations; at every step, in which order do the things lie?",
    "recency": "symbols; at every step one of the past, mostly a late one",
    "primacy": "symbols; at every step one of the past, mostly an early one",
}
HELP = {
    "image_size": "pixels a side",
    "levels": "grey levels: 2 or 256",
    "binarize": "2 levels by threshold at half intensity, or static: one fixed Bernoulli draw",
    "glyphs": "the characters",
    "jitter": "strength of the random affine maps",
    "length": "sequence length T, BOS included",
    "shortest": "train on sequences (recall: gaps) of T, T/2 .. down to this; 0 = of T alone",
    "data_file": "the text to learn, any UTF-8 file, plain or gzipped",
    "variant": "paper: the task as the paper's authors define it; ours: another of that name",
    "symbols": "number of symbols",
    "noise": "probability that a target is redrawn",
    "needle_range": "last position of the needle; 0 = the end of the first half, with --variant "
                    "ours of the first quarter",
    "reverse": "ask for the string backwards",
    "depth": "height of a full stack",
    "keys": "number of key-value pairs",
    "key_len": "symbols in a key",
    "gap": "pauses between the pairs and the question",
    "examples": "examples in context",
    "modulus": "p of y = w x + b (mod p); 0 = 32, with --variant ours 7",
    "items": "things that are permuted",
    "gamma": "factor on a symbol's weight for each step of its age, or position",
}
TEXTS = ("tinystories", "shakespeare", "pydoc", "text")
SYNTHETIC = ("retrieval", "copy", "stack", "recall", "modular", "parity", "permutation", "recency",
             "primacy")
READS = ("mnist", "sketchy", "images", "tinystories", "shakespeare")  # files in data_dir
VARIANTS = ("paper", "ours")  # of five synthetic tasks: as the authors define it, or another one


def kinds(dataset: str, rnn: str = "", levels: int | str | None = None) -> tuple:
    """The names under which presets.KINDS knows a dataset, with so many grey levels, and an
    updater."""
    wider = ("synthetic",) if dataset in SYNTHETIC else ("text",) if dataset in TEXTS else ()
    bytes_ = ("bytes",) if dataset in TEXTS or str(levels) == "256" else ()
    return (*wider, *bytes_, dataset, rnn)


def load(name, data_dir="data", device="cpu", seed=0, **options) -> Data:
    """The only door. An option that is None counts as not given. `seed` changes no data: what is
    held out is the same in every run, and training batches follow the generator that is handed to
    `batch`."""
    if name not in OPTIONS:
        raise DataError(f"--dataset {name}: unknown, choose from {', '.join(OPTIONS)}")
    o = OPTIONS[name] | {k: v for k, v in options.items() if v is not None}
    for key, value in o.items():
        if key not in OPTIONS[name]:
            has = ", ".join("--" + k for k in OPTIONS[name])
            raise DataError(f"--{key}: not an option of {name}, which has {has}")
        kind = option_type(key)
        if kind is float and type(value) is int:
            o[key] = float(value)
        elif type(value) is not kind and value is not None:
            raise DataError(f"--{key}: expected {kind.__name__}, got {value!r}")
        if kind in (int, float) and value is not None:
            check(abs(value) <= 1e12, key, value, "a number from -1e12 to 1e12")
    if "variant" in o:
        check(o["variant"] in VARIANTS, "variant", o["variant"], " or ".join(VARIANTS))
    if name == "glyphs":
        about = "characters of matplotlib's fonts, each bent, scaled and shifted at random; " \
                "black and white"
        return images.image_data(name, images.glyph_images(**o), 2, device, about)
    if name == "mnist":
        pictures = images.mnist_images(data_dir, **o)
        about = "handwritten digits, pixel by pixel"
        return images.image_data(name, pictures, o["levels"], device, about)
    if name in ("sketchy", "images"):
        about = "drawings after photographs, the Sketchy Database" if name == "sketchy" else \
            f"the pictures in {data_dir}"
        pictures = images.folder_images(name, data_dir, **o)
        return images.image_data(name, pictures, 2, device, about + "; black and white",
                                 mirror=name == "sketchy")  # there are few
    if name in TEXTS:
        return text.text_data(name, data_dir, device=device, **o)
    if "shortest" in o:
        return several_lengths(name, device, **o)
    return getattr(tasks, name)(device=device, **o)


def several_lengths(name, device, shortest, **options) -> Data:
    """A synthetic task whose training batches have a random length each: `length` (of recall
    `gap`), half of it, a quarter .. down to `shortest`; 0: that alone. What is held out has the
    full one.

    A short sequence shows in a few steps what a long one asks for, and costs little.
    """
    key, least = ("gap", 1) if name == "recall" else ("length", 3)
    whole, make = options[key], getattr(tasks, name)
    check(shortest == 0 or least <= shortest <= whole, "shortest", shortest,
          f"0, or between {least} and --{key} {whole}")
    # A string to copy is halved, and 1 + 2 of its lengths are the sequence.
    half = lambda n: 1 + 2 * ((n - 1) // 4) if name == "copy" else n // 2
    lengths = [whole]
    while shortest and half(lengths[-1]) >= shortest:
        lengths.append(half(lengths[-1]))
    each = [make(device=device, **options)]
    for n in lengths[1:]:
        try:
            each.append(make(device=device, **options | {key: n}))
        except DataError as e:
            raise DataError(f"--shortest {shortest}: with it {e}") from None

    def batch(n, generator):
        pick = int(torch.randint(len(each), (), generator=generator)) if shortest else 0
        return each[pick].batch(n, generator)

    density = {task.T: task.density(task.T) for task in each}
    return dataclasses.replace(each[0], batch=batch, density=density.__getitem__)


def bayes(held):
    """Mean loss of the best possible predictor on a held-out dict, in nats per target; None where
    nobody knows it."""
    p, y = held["posterior"], held["y"]
    if p is None:
        return None
    entropy = -torch.xlogy(p, p).sum(-1)
    return float((entropy.sum(1) / (y >= 0).sum(1).clamp(min=1)).double().mean())


def sequences_to_images(data, y):
    """Targets (n, T), or samples of them, as pictures (n, H, W) from 0 to 1."""
    return y.reshape(-1, *data.image).float() / (data.n_out - 1)


# ---------------------------------------------------------------------- options as flags

def option_type(option) -> type:
    """int, float, bool or str."""
    default = next(o[option] for o in OPTIONS.values() if option in o)
    return str if default is None else type(default)


def add_options(p, dataset) -> None:
    """Offer every option as a flag. What is not given stays absent; the help leaves out options of
    other datasets than `dataset`, which are understood so that they can be refused by name."""
    for option, about in HELP.items():
        default = OPTIONS.get(dataset, {}).get(option)
        shown = "-" if default in (None, "") else default
        kind = option_type(option)
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else \
            dict(type=kind, metavar=kind.__name__)
        p.add_argument(f"--{option}", default=argparse.SUPPRESS, **how,
                       help=f"{about} (default: {shown})" if option in OPTIONS.get(dataset, {}) else
                       argparse.SUPPRESS)


def refuse_useless(dataset, given) -> None:
    """Refuse, among the flags given, an option of another dataset, and --data_dir where none is
    read. Raises UserError."""
    foreign = [name for name in HELP if name not in OPTIONS[dataset]]
    foreign += [] if dataset in READS else ["data_dir"]
    refuse(" ".join(foreign), given, f"to --dataset {dataset}")


# ----------------------------------------------------------------------- python data.py DATASET

def main(argv):
    dataset = next((word for word in argv if word in OPTIONS), None)
    p = parser("data.py", __doc__)
    p.usage = "python data.py [dataset] [flags]"
    p.add_argument("dataset", nargs="?", choices=OPTIONS, metavar="dataset",
                   help="what to look at; left out: the list; --help shows its options")
    p.add_argument("--data_dir", default=os.environ.get("SMT_DATA_DIR", "data"),
                   help="where the files are (default: %(default)s)")
    p.add_argument("--out", default="preview.png", type=path, metavar="OUT",
                   help="where the examples of a picture dataset go (default: %(default)s)")
    p.add_argument("--n", type=int, default=0,
                   help="how many examples; 0 = 40 pictures or 5 lines (default: %(default)s)")
    add_options(p, dataset)
    given = vars(p.parse_args(argv))
    name, n = given["dataset"], given["n"]
    if name is None:
        refuse(" ".join(flags_in(argv)), flags_in(argv), "without a dataset")
        print("\n".join(f"{name:12} {about}" for name, about in ABOUT.items()))
        return
    demand("n", n, 0, 10_000)
    refuse_useless(name, flags_in(argv))
    d = load(name, given["data_dir"], **{k: v for k, v in given.items() if k in OPTIONS[name]})
    if not d.image:
        refuse("out", flags_in(argv), f"to --dataset {name}, which is no picture")
    floor = bayes(d.held_out("test"))
    print(f"{name}: {d.about}")
    print(f"T = {d.T}, inputs 0..{d.vocab - 1} (BOS = {d.bos}), targets 0..{d.n_out - 1}, "
          f"{d.units}, {d.sizes}")
    print("Bayes optimum: " +
          ("nobody knows" if floor is None else f"{floor:.6g} nats per target"))
    x, y = d.batch(n or (40 if d.image else 5), torch.Generator().manual_seed(0))
    if d.image:
        images.save_png(given["out"], images.grid(sequences_to_images(d, y).numpy(), 8))
        print(f"{len(y)} training examples in {given['out']}")
    else:
        print("\n".join(d.show(a, b) for a, b in zip(x, y)))


if __name__ == "__main__":
    cli(main)
