"""
Every dataset and task behind one small interface: `load(name, ...)` returns a `Data`.

A sequence is a pair (x, y) of equal length T. x holds input ids and always starts with BOS; y_t is the
target after x_0..x_t has been read, -1 where there is none. For images, pixels s in raster order, T = H*W:

    t    0     1     2     3     4     5            (a 2x3 image)
    x_t  BOS   s_0   s_1   s_2   s_3   s_4          the last pixel s_5 is never an input
    y_t  s_0   s_1   s_2   s_3   s_4   s_5

  glyphs     characters of the fonts that come with matplotlib, jittered; black and white, no download
  mnist      the real files, from --data_dir or downloaded once; 28x28 or 14x14, 2 or 256 levels
  retrieval  remember one marked symbol until the end; endless, with its exact Bayes optimum

To add one: write a function that returns a `Data` (or a dict of images for `image_data`), give it a line in
OPTIONS and a line in `load`.
"""
import functools
import gzip
import hashlib
import http.client
import math
import os
import struct
import sys
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from tqdm import tqdm


class DataError(Exception):
    """A problem with the data or its options that the user can fix; str(e) is one line that says how."""


# What each dataset understands, with defaults; the command line offers the same names as flags.
OPTIONS = {
    "glyphs": dict(image_size=12, glyphs="0123456789", jitter=0.5),
    "mnist": dict(image_size=28, levels=2, binarize=None),  # binarize None: static at 28x28, threshold at 14x14
    "retrieval": dict(length=64, symbols=8, noise=0.0, needle_range=0),  # needle_range 0: the first quarter
}


@dataclass
class Data:
    name: str
    T: int                # length of x and of y
    vocab: int            # input ids are 0..vocab-1, the last one is BOS
    n_out: int            # output ids are 0..n_out-1
    units: str            # what a summed loss is called: "nats/image" or "nats/target"
    timestamps: bool      # every sequence has this one length, so "the t-th token" means something
    image: tuple | None   # (H, W) if y is a picture
    batch: Callable       # batch(n, generator) -> x, y: random training sequences, int64 (n, T)
    held_out: Callable    # held_out("val" or "test", n=None) -> the first n of a fixed set, a dict of
                          #   x, y       int64 (n, T)
                          #   clean      int64 (n, T), the targets without noise, or None
                          #   posterior  float (n, T, n_out), the best possible prediction of y_t from
                          #              x_0..x_t (zeros where y_t = -1), or None where nobody knows it

    @property
    def bos(self):
        return self.vocab - 1


def load(name, data_dir="data", device="cpu", seed=0, **options):
    """The only door. An option that is None counts as not given. `seed` changes no data: what is held out
    is the same in every run, and training batches follow the generator that is handed to `batch`."""
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
    if name == "glyphs":
        return image_data(name, glyph_images(**o), 2, device)
    if name == "mnist":
        return image_data(name, mnist_images(data_dir, **o), o["levels"], device)
    return retrieval(device=device, **o)


def check(ok, flag, value, rule):
    if not ok:
        raise DataError(f"--{flag} {value}: must be {rule}")


# ---------------------------------------------------------------------------------------------------------
# images: any dict of uint8 pictures {"train", "val", "test": (N, H, W), values 0..levels-1} becomes a Data

def image_data(name, images, levels, device="cpu"):
    H, W = images["train"].shape[1:]
    flat = {split: v.flatten(1).to(device) for split, v in images.items()}  # uint8: all of MNIST is 55 MB

    def sequences(pixels):
        y = pixels.long()
        x = torch.cat([torch.full_like(y[:, :1], levels), y[:, :-1]], 1)  # BOS, then all but the last pixel
        return x, y

    def batch(n, generator):
        train = flat["train"]
        return sequences(train[torch.randint(len(train), (n,), generator=generator).to(device)])

    def held_out(split, n=None):
        assert split in ("val", "test"), split
        x, y = sequences(flat[split][:n])
        return dict(x=x, y=y, clean=None, posterior=None)

    return Data(name, T=H * W, vocab=levels + 1, n_out=levels, units="nats/image", timestamps=True,
                image=(H, W), batch=batch, held_out=held_out)


def sequences_to_images(data, y):
    """Targets (n, T), or samples of them, as pictures (n, H, W) from 0 to 1."""
    return y.reshape(-1, *data.image).float() / (data.n_out - 1)


# ---------------------------------------------------------------------------------------------------------
# glyphs

# Of matplotlib's fonts, and how much each is fattened: at 12x12 a hairline would fall between the pixels.
# Left out: the boldest, whose 8 and 9 close up at this size, and the one with a dotted 0, which would be an 8.
FONTS = {"DejaVuSans": 2, "DejaVuSans-Oblique": 2, "DejaVuSerif": 2, "STIXGeneralBol": 1, "cmss10": 2, "cmtt10": 2}
GLYPH_COUNT = dict(train=20_000, val=1_000, test=2_000)
GLYPH_SEED = dict(train=101, val=102, test=103)  # fixed: the three sets are part of the task's definition
MASTER = 64       # side of the picture that each (font, character) is drawn in once,
MASTER_INK = 50   # and the side of the box in its middle that the character just fits into
INK = 0.45        # a pixel is ink when this share of it is covered; lower thickens, higher breaks thin strokes


def glyph_masters(glyphs):
    """One grey picture for each font and character: (len(FONTS) * len(glyphs), 1, 64, 64), 1 = ink."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont
    masters, drawn = [], set()
    for name, fatten in FONTS.items():
        path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", name + ".ttf"))
        font = ImageFont.truetype(path, 128, layout_engine=ImageFont.Layout.BASIC)
        has = FT2Font(path).get_charmap()
        for char in glyphs:
            if ord(char) not in has:
                continue  # another font may have it
            large = Image.new("L", (384, 384))
            ImageDraw.Draw(large).text((128, 96), char, font=font, fill=255, stroke_width=fatten)
            box = large.getbbox()
            if box is None:
                continue  # a space
            ink = large.crop(box)
            ratio = MASTER_INK / max(ink.size)
            ink = ink.resize([max(1, round(side * ratio)) for side in ink.size], Image.Resampling.BOX)
            picture = Image.new("L", (MASTER, MASTER))
            picture.paste(ink, ((MASTER - ink.width) // 2, (MASTER - ink.height) // 2))
            masters.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
            drawn.add(char)
    for char in glyphs:
        if char not in drawn:
            raise DataError(f"--glyphs: no bundled font draws {char!r}, leave it out")
    return torch.stack(masters).view(-1, 1, MASTER, MASTER).float() / 255


@functools.lru_cache(maxsize=2)  # a process that loads the task again does not draw it again
def glyph_images(image_size, glyphs, jitter):
    """{"train", "val", "test"}: uint8 (N, size, size) in {0, 1}: a random master, rotated, scaled, sheared
    and shifted at random. At jitter 0 the held-out pictures are all training pictures too."""
    check(8 <= image_size <= 64, "image_size", image_size, "between 8 and 64 for glyphs")
    check(len(glyphs) > 0, "glyphs", repr(glyphs), "at least one character")
    check(0 <= jitter <= 4, "jitter", jitter, "between 0 and 4")
    masters = glyph_masters(glyphs)
    fine = max(1, round(36 / image_size))  # each pixel is the mean of fine * fine points

    def draw(n, generator):
        u = jitter * (2 * torch.rand(6, n, generator=generator) - 1)  # six uniform numbers a picture
        angle, shear = 0.18 * u[0], 0.15 * u[1]                       # 0.18 rad is 10 degrees
        wide, high = torch.exp(0.12 * u[2]), torch.exp(0.10 * u[3])
        shift = 0.12 * u[4:6]                                         # of half the side: 0.7 pixels at 12x12
        # affine_grid wants the way back: where in the master (-1..1) a point of the picture comes from
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack([torch.stack([cos / wide, (sin + shear) / wide, shift[0]], -1),
                             torch.stack([-sin / high, cos / high, shift[1]], -1)], 1)
        which = torch.randint(len(masters), (n,), generator=generator)
        grid = F.affine_grid(theta, (n, 1, image_size * fine, image_size * fine), align_corners=False)
        covered = F.avg_pool2d(F.grid_sample(masters[which], grid, align_corners=False), fine)
        return (covered[:, 0] >= INK).to(torch.uint8)

    images = {}
    for split, count in GLYPH_COUNT.items():
        generator = torch.Generator().manual_seed(GLYPH_SEED[split])
        images[split] = torch.cat([draw(500, generator) for _ in range(count // 500)])  # 500: little memory
    return images


# ---------------------------------------------------------------------------------------------------------
# mnist

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
           "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_FILES = {  # bytes and sha256 of the published files; only downloads are held to them
    "train-images-idx3-ubyte.gz": (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "t10k-images-idx3-ubyte.gz": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
}
MNIST_VAL = 5_000                               # the last training images are the validation split
STATIC_SEED = dict(train=2008, test=2009)       # of the one Bernoulli draw behind --binarize static
TIMEOUT = 30                                    # seconds without a byte before the next mirror is tried


def mnist_images(data_dir, image_size, levels, binarize):
    """{"train", "val", "test"}: uint8 (N, size, size) with values 0..levels-1, 0 = paper."""
    check(image_size in (14, 28), "image_size", image_size, "28 or 14 for mnist")
    check(levels in (2, 256), "levels", levels, "2 or 256")
    check(binarize in (None, "static", "threshold"), "binarize", binarize, "static or threshold")
    check(levels == 2 or binarize is None, "binarize", binarize, "left out with --levels 256, which keeps the greys")
    binarize = binarize or ("static" if image_size == 28 else "threshold")

    paths = [find_file(data_dir, name) for name in MNIST_FILES]
    split = {}
    for key, path in zip(("train", "test"), paths):
        grey = read_idx(path)
        if image_size == 14:  # mean of 2x2 pixels, halves rounded up, so that the threshold below stays exact
            grey = F.avg_pool2d(grey.float(), 2).add_(0.5).floor_().to(torch.uint8)
        if levels == 2 and binarize == "threshold":
            grey = (grey >= 128).to(torch.uint8)  # at least half of full scale
        elif levels == 2:
            # ink with probability grey/255, drawn once and for ever: r is uniform on 0..254
            generator = torch.Generator().manual_seed(STATIC_SEED[key])
            for images in grey.split(5_000):
                r = torch.randint(255, images.shape, dtype=torch.uint8, generator=generator)
                images.copy_(images > r)
        split[key] = grey
    if len(split["train"]) <= MNIST_VAL:
        raise DataError(f"{paths[0]}: {len(split['train'])} images, too few: the last {MNIST_VAL} validate")
    return dict(train=split["train"][:-MNIST_VAL], val=split["train"][-MNIST_VAL:], test=split["test"])


def read_idx(path):
    """An IDX file of 28x28 images, plain or gzipped. Header, big-endian: magic (0, 0, 8 = uint8, 3 = number
    of dimensions), then the three dimensions."""
    try:
        with open(path, "rb") as f:
            zipped = f.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(path, "rb") as f:
            header = f.read(16)
            if len(header) < 16 or header[:4] != b"\0\0\x08\x03":
                raise ValueError("not an IDX file of images")
            n, h, w = struct.unpack(">III", header[4:])
            if (h, w) != (28, 28) or not 1 <= n <= 1_000_000:
                raise ValueError(f"{n} images of {h}x{w} instead of 28x28")
            body = f.read(n * h * w + 1)  # one more, to notice a longer file
        if len(body) != n * h * w:
            raise ValueError(f"{'more' if len(body) > n * h * w else 'fewer'} bytes than its {n} images need")
    except (ValueError, OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: {one_line(e)}; put the MNIST file there, or delete it to have it downloaded")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(n, h, w)


def find_file(data_dir, name):
    """The file in data_dir or data_dir/mnist, zipped or not; otherwise downloaded to data_dir/mnist."""
    for folder in (Path(data_dir), Path(data_dir, "mnist")):
        for path in (folder / name, folder / name.removesuffix(".gz")):
            if os.path.isfile(path):
                return path
    path = Path(data_dir, "mnist", name)
    failures = []
    for mirror in MIRRORS:
        try:
            download(mirror + name, path, *MNIST_FILES[name])
            return path
        except (OSError, http.client.HTTPException) as e:  # URLError and timeouts are OSErrors
            failures.append(f"{mirror + name} ({one_line(e)})")
    raise DataError(f"{path}: missing, and could not be downloaded from {', '.join(failures)}; "
                    f"fetch it by hand and put it there, or name its folder with --data_dir")


def download(url, path, size, sha256):
    """To a temporary name beside `path`, checked, then renamed: `path` is whole or absent."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    digest, got = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as f, tqdm(total=size, desc=path.name, unit="B", unit_scale=True,
                                             disable=not sys.stderr.isatty()) as bar:
                while got <= size and (block := response.read(1 << 16)):
                    f.write(block)
                    digest.update(block)
                    got += len(block)
                    bar.update(len(block))
        if got != size:
            raise OSError(f"{got} bytes came instead of {size}")
        if digest.hexdigest() != sha256:
            raise OSError("wrong sha256")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # after a failure, Ctrl-C included; after success it is already gone


def one_line(e):
    return " ".join(str(e).split()) or type(e).__name__


# ---------------------------------------------------------------------------------------------------------
# retrieval

HELD_OUT_SEED = dict(val=7_000_000, test=8_000_000)  # of each split's first chunk of sequences
CHUNK = 1_000


def retrieval(length, symbols, noise, needle_range, device="cpu"):
    """x = BOS, `length` - 2 uniform distractors of which the one at a uniform position in 1..needle_range is
    replaced by a marked uniform symbol, QUERY; the only target, at QUERY, is that symbol, redrawn with
    probability `noise` uniformly over all symbols, itself included."""
    T, S = length, symbols
    check(T >= 3, "length", T, "at least 3: BOS, one symbol, QUERY")
    check(S >= 2, "symbols", S, "at least 2")
    check(0 <= noise <= 1, "noise", noise, "between 0 and 1")
    check(0 <= needle_range <= T - 2, "needle_range", needle_range, f"between 0 and --length - 2 = {T - 2}")
    R = needle_range or max(1, T // 4)
    query, bos = 2 * S, 2 * S + 1  # 0..S-1 are distractors, S..2S-1 the same symbols marked

    def make(n, g):
        x = torch.randint(S, (n, T), generator=g)
        x[:, 0], x[:, -1] = bos, query
        needle = torch.randint(S, (n,), generator=g)
        where = torch.randint(1, R + 1, (n,), generator=g)
        x[torch.arange(n), where] = S + needle
        redraw = torch.rand(n, generator=g) < noise
        target = torch.where(redraw, torch.randint(S, (n,), generator=g), needle)
        return x, needle, target

    def at_query(value):
        y = torch.full((len(value), T), -1)
        y[:, -1] = value
        return y

    def batch(n, generator):
        x, _, target = make(n, generator)
        return x.to(device), at_query(target).to(device)

    def held_out(split, n=None):
        n = 1_000 if n is None else n
        chunks = [make(CHUNK, torch.Generator().manual_seed(HELD_OUT_SEED[split] + i))
                  for i in range(max(1, math.ceil(n / CHUNK)))]  # whole chunks, cut: the first n never change
        x, needle, target = (torch.cat(parts)[:n] for parts in zip(*chunks))
        posterior = torch.zeros(len(x), T, S)  # x shows the needle, so only the redraw is uncertain
        posterior[:, -1] = (1 - noise) * F.one_hot(needle, S) + noise / S
        out = dict(x=x, y=at_query(target), clean=at_query(needle), posterior=posterior)
        return {key: value.to(device) for key, value in out.items()}

    return Data("retrieval", T=T, vocab=2 * S + 2, n_out=S, units="nats/target", timestamps=True, image=None,
                batch=batch, held_out=held_out)


def describe(data, x_row, y_row):
    """One retrieval sequence as one line: ^ is BOS, ? is QUERY, the marked symbol stands in brackets."""
    S = data.n_out
    name = (lambda i: chr(ord("a") + i)) if S <= 26 else (lambda i: f"{i} ")
    x = x_row.tolist()
    where = next(t for t, i in enumerate(x) if S <= i < 2 * S)
    needle = name(x[where] - S).strip()
    text = "".join("^" if i == 2 * S + 1 else "?" if i == 2 * S else name(i) if i < S else f"[{needle}]" for i in x)
    if len(text) > 80:
        text = text[:60] + " ... ?"
    return f"{text}  needle '{needle}' at {where} of {data.T}, target '{name(int(y_row[-1])).strip()}'"
