"""Every dataset and task behind one small interface: `load(name, ...)` returns a `Data`.

    python data.py stack --depth 3                  # look before you train: what it is, its sizes, some examples

A sequence is a pair (x, y) of equal length T. x holds input ids and always starts with BOS; y_t is the target after
x_0..x_t has been read, -1 where there is none.

    images.py   glyphs, mnist, sketchy, images     pixels in raster order; autoregressive: x_t is y_{t-1}
    text.py     tinystories, shakespeare, pydoc, text     bytes; autoregressive
    tasks.py    retrieval, copy, stack, recall, modular, parity, permutation, recency, primacy
                endless, with exact Bayes optima; the first five in two variants

To add one: write a function that returns a `Data` (for pictures `images.image_data` does it), give it a line in OPTIONS
and one in `load`.
"""
import argparse
import contextlib
import hashlib
import http.client
import os
import sys
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm


class DataError(Exception):
    """A problem with the data or its options that the user can fix; str(e) is one line that says how."""


# What each dataset understands, with defaults; the command line offers the same names as flags.
OPTIONS = {
    "glyphs": dict(image_size=12, glyphs="0123456789", jitter=0.35),
    "mnist": dict(image_size=28, levels=2, binarize=None),  # binarize None: static at 28x28, threshold at 14x14
    "sketchy": dict(image_size=32),
    "images": dict(image_size=32),  # any pictures below data_dir
    "tinystories": dict(length=256),
    "shakespeare": dict(length=256),
    "pydoc": dict(length=256),
    "text": dict(length=256, data_file=""),
    # needle_range 0: the first half, in `ours` the first quarter. modulus 0: 32, in `ours` 7
    "retrieval": dict(variant="paper", length=64, symbols=8, noise=0.0, needle_range=0),
    "copy": dict(variant="paper", length=33, symbols=8, noise=0.0, reverse=True),
    "stack": dict(variant="paper", length=64, symbols=4, depth=5),
    "recall": dict(variant="paper", keys=8, symbols=8, key_len=2),
    "modular": dict(variant="paper", examples=8, modulus=0),
    "parity": dict(length=64),
    "permutation": dict(length=32, items=5),
    "recency": dict(length=64, symbols=8, gamma=0.5),
    "primacy": dict(length=64, symbols=8, gamma=0.5),
}
TEXTS = ("tinystories", "shakespeare", "pydoc", "text")
TRACKING = ("stack", "parity", "permutation")  # of the synthetic tasks: targets all the way
SYNTHETIC = ("retrieval", "copy", "stack", "recall", "modular", "parity", "permutation", "recency",
             "primacy")
VARIANTS = ("paper", "ours")  # of five synthetic tasks: as the authors define it, or another one


@dataclass
class Data:
    name: str
    T: int                # length of x and of y
    vocab: int            # input ids are 0..vocab-1, the last one is BOS
    n_out: int            # output ids are 0..n_out-1
    units: str            # what a loss is called: "nats/image" (summed), "nats/char" or "nats/target" (mean)
    timestamps: bool      # every sequence has this one length, so "the t-th token" means something
    image: tuple | None   # (H, W) if y is a picture
    batch: Callable       # batch(n, generator) -> x, y: random training sequences, int64 (n, T)
    held_out: Callable    # held_out("val" or "test", n=None) -> the first n of a fixed set, a dict of
                          #   x, y       int64 (n, T)
                          #   clean      int64 (n, T), the targets without noise, or None
                          #   posterior  float (n, T, n_out), the best possible prediction of y_t from
                          #              x_0..x_t (zeros where y_t = -1), or None where nobody knows it
    about: str = ""       # one line: how a sequence comes about
    sizes: str = "endless"  # how much of it there is
    show: Callable | None = None  # show(x_row, y_row) -> one sequence as a line; None for pictures
    late_from: int | None = None  # evaluate.py reports the targets at t >= late_from apart as well

    @property
    def bos(self):
        return self.vocab - 1


def load(name, data_dir="data", device="cpu", seed=0, **options):
    """The only door. An option that is None counts as not given. `seed` changes no data: what is held out
    is the same in every run, and training batches follow the generator that is handed to `batch`."""
    import images  # here, because these files import this one
    import tasks
    import text
    if name not in OPTIONS:
        raise DataError(f"--dataset {name}: unknown, choose from {', '.join(OPTIONS)}")
    o = dict(OPTIONS[name])
    for key, value in options.items():
        if value is None:
            continue
        if key not in o:
            raise DataError(f"--{key}: not an option of {name}, which has " + ", ".join("--" + k for k in o))
        kind = str if OPTIONS[name][key] is None else type(OPTIONS[name][key])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise DataError(f"--{key}: expected {kind.__name__}, got {value!r}")
        o[key] = value
    if "variant" in o:
        check(o["variant"] in VARIANTS, "variant", o["variant"], " or ".join(VARIANTS))
    if name == "glyphs":
        about = "characters of matplotlib's fonts, each bent, scaled and shifted at random; black and white"
        return images.image_data(name, images.glyph_images(**o), 2, device, about)
    if name == "mnist":
        pictures = images.mnist_images(data_dir, **o)
        return images.image_data(name, pictures, o["levels"], device, "handwritten digits, pixel by pixel")
    if name in ("sketchy", "images"):
        about = "drawings after photographs, the Sketchy Database" if name == "sketchy" else f"the pictures in {data_dir}"
        return images.image_data(name, images.folder_images(name, data_dir, **o), 2, device, about + "; black and white")
    if name in TEXTS:
        return text.text_data(name, data_dir, device=device, **o)
    return getattr(tasks, name)(device=device, **o)


def check(ok, flag, value, rule):
    if not ok:
        raise DataError(f"--{flag} {value}: must be {rule}")


def bayes(held):
    """Mean loss of the best possible predictor on a held-out dict, in nats per target; None where nobody knows it."""
    p, y = held["posterior"], held["y"]
    if p is None:
        return None
    entropy = -torch.xlogy(p, p).sum(-1)
    return float((entropy.sum(1) / (y >= 0).sum(1).clamp(min=1)).double().mean())


def sequences_to_images(data, y):
    """Targets (n, T), or samples of them, as pictures (n, H, W) from 0 to 1."""
    return y.reshape(-1, *data.image).float() / (data.n_out - 1)


# ---------------------------------------------------------------------------------------------------------
# files: looked for in data_dir, otherwise downloaded once

TIMEOUT = 30             # seconds without a byte before the next mirror is tried
CACHE = "~/.cache/smt"   # what was made of files whose own folder is not for writing
BAD_CONTENT = OSError, ValueError, EOFError, zlib.error  # what reading a broken file raises


def local_file(places, name):
    """The first of `places` that has `name`, zipped or not; None if none has."""
    for place in places:
        for path in (place / name, place / name.removesuffix(".gz"), place / (name + ".gz")):
            if os.path.isfile(path):
                return path


def find_file(data_dir, folder, name, mirrors, size=None, sha256=None, inspect=None):
    """`name` in data_dir or data_dir/folder, zipped or not; otherwise downloaded to data_dir/folder from the first
    mirror that delivers it. size (bytes), sha256 and inspect(path), which raises BAD_CONTENT, are held against
    downloads only. Raises DataError."""
    if path := local_file((Path(data_dir), Path(data_dir, folder)), name):
        return path
    path = Path(data_dir, folder, name)
    failures = []
    for mirror in mirrors:
        try:
            download(mirror + name, path, size, sha256, inspect)
            return path
        except (*BAD_CONTENT, http.client.HTTPException) as e:  # URLError and timeouts are OSErrors
            failures.append(f"{mirror + name} ({one_line(e)})")
    raise DataError(f"{path}: missing, and could not be downloaded from {', '.join(failures)}; "
                    f"fetch it by hand and put it there, or name its folder with --data_dir")


def download(url, path, size=None, sha256=None, inspect=None):
    """`path` is whole or absent. Without a known size the server's word for it is taken, without a known sha256 none is
    checked. Raises BAD_CONTENT."""
    digest, got = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        if size is None and not (size := int(response.headers.get("Content-Length") or 0)):
            raise OSError("the server does not say how long the file is")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as f, tqdm(total=size, desc=path.name, unit="B", unit_scale=True,
                                            disable=not sys.stderr.isatty()) as bar:
            while got <= size and (block := response.read(1 << 16)):
                f.write(block)
                digest.update(block)
                got += len(block)
                bar.update(len(block))
            if got != size:
                raise OSError(f"{got} bytes came instead of {size}")
            if sha256 and digest.hexdigest() != sha256:
                raise OSError("wrong sha256")
            f.flush()
            if inspect:
                inspect(f.name)


@contextlib.contextmanager
def written_whole(path):
    """A file to write under a temporary name beside `path`; becomes `path` at the end, or vanishes if anything fails,
    Ctrl-C included."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            yield f
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cache_path(source, suffix, *facts):
    """Where to keep what is made of a file or folder: with it, or in CACHE if its folder is not for writing (a folder
    without a w bit is not, even for root). The name depends on the source's path and the facts."""
    source = Path(os.path.abspath(source))
    name = f"{source.name}.{hashlib.sha256(repr((str(source), *facts)).encode(errors='replace')).hexdigest()[:12]}{suffix}"
    folder = source if source.is_dir() else source.parent
    if os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:
        return folder / name
    path = Path(CACHE).expanduser() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        print(f"{folder} is not for writing; keeping a packed copy in {path}", file=sys.stderr)
    return path


def one_line(e):
    return " ".join(str(e).split()) or type(e).__name__


# ---------------------------------------------------------------------------------------------------------
# python data.py DATASET

def main(argv=None):
    import flags  # the command line alone needs these two
    import sample
    p = argparse.ArgumentParser(prog="data.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = flags.fail
    p.add_argument("dataset", choices=OPTIONS, help="what to look at")
    p.add_argument("--data_dir", default=os.environ.get("SMT_DATA_DIR", "data"), help="(default: %(default)s)")
    p.add_argument("--out", default="preview.png", help="where the examples of a picture dataset go (default: %(default)s)")
    p.add_argument("--n", type=int, default=0, help="how many examples; 0 = 40 pictures or 5 lines (default: %(default)s)")
    flags.add_task_flags(p)
    given = vars(p.parse_args(argv))
    name, n = given["dataset"], given["n"]
    flags.demand("n", n, 0, 10_000)
    flags.check_task_flags(name, given)
    d = load(name, given["data_dir"], **{k: v for k, v in given.items() if k in OPTIONS[name]})
    floor = bayes(d.held_out("test"))
    print(f"{name}: {d.about}")
    print(f"T = {d.T}, inputs 0..{d.vocab - 1} (BOS = {d.bos}), targets 0..{d.n_out - 1}, {d.units}, {d.sizes}")
    print("Bayes optimum: " + ("nobody knows" if floor is None else f"{floor:.6g} nats per target"))
    x, y = d.batch(n or (40 if d.image else 5), torch.Generator().manual_seed(0))
    if d.image:
        sample.save_png(given["out"], sample.grid(sequences_to_images(d, y).numpy(), 8))
        print(f"{len(y)} training examples in {given['out']}")
    else:
        print("\n".join(d.show(a, b) for a, b in zip(x, y)))


if __name__ == "__main__":
    import data  # this file once more, under the name that the others import
    import flags
    flags.cli(data.main)
