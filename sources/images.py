"""Pictures as sequences of pixels in raster order: `glyphs` (embedded), `mnist`, `sketchy`,
`images` (any folder), and any dict of pictures.

    t    0     1     2     3     4     5            (a 2x3 image)
    x_t  BOS   s_0   s_1   s_2   s_3   s_4          the last pixel s_5 is never an input
    y_t  s_0   s_1   s_2   s_3   s_4   s_5
"""
import functools
import gzip
import hashlib
import os
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sources.files import (BAD_CONTENT, Data, DataError, cached, check, find_file, one_line,
                           written_whole)

# ----------------------------------------------------------------------------------------------
# any pictures

def image_data(name, images, levels, device="cpu", about="", mirror=False):
    """A Data from uint8 pictures {"train", "val", "test": (N, H, W)} with values 0..levels-1; 0 is
    paper. With `mirror` half of the pictures of a training batch are mirrored, left to right."""
    H, W = images["train"].shape[1:]
    flat = {split: v.flatten(1).to(device) for split, v in images.items()}  # uint8: MNIST is 55 MB
    mark = hashlib.sha256(b"".join(v.numpy().tobytes() for v in images.values())).hexdigest()

    def sequences(pixels):
        y = pixels.long()
        x = torch.cat([torch.full_like(y[:, :1], levels), y[:, :-1]], 1)  # BOS s_0 .. s_{T-2}
        return x, y

    def batch(n, generator):
        train = flat["train"]
        picked = train[torch.randint(len(train), (n,), generator=generator)
                       .to(device, non_blocking=True)]
        if mirror:
            turn = (torch.rand(n, 1, 1, generator=generator) < 0.5).to(device)
            picked = picked.view(n, H, W)
            picked = torch.where(turn, picked.flip(2), picked).flatten(1)
        return sequences(picked)

    def held_out(split, n=None):
        assert split in ("val", "test"), split
        x, y = sequences(flat[split][:n])
        return dict(x=x, y=y, clean=None, posterior=None)

    sizes = ", ".join(f"{len(v):,} {split}" for split, v in images.items()) + " images"
    return Data(name, T=H * W, vocab=levels + 1, n_out=levels, units="nats/image", timestamps=True,
                image=(H, W), batch=batch, held_out=held_out, about=about, sizes=sizes, mark=mark)


# ----------------------------------------------------------------------------------------------
# glyphs

# Of matplotlib's fonts, and how much each is fattened: at 12x12 a hairline would fall between the
# pixels. Left out: the boldest, whose 8 and 9 close up at this size, and the one with a dotted 0,
# which would be an 8.
FONTS = {"DejaVuSans": 2, "DejaVuSerif": 2, "STIXGeneralBol": 1}
GLYPH_COUNT = dict(train=20_000, val=1_000, test=2_000)
GLYPH_SEED = dict(train=101, val=102, test=103)  # fixed: the sets are part of the task
MASTER = 64       # side of the picture that each (font, character) is drawn in once,
MASTER_INK = 50   # and the side of the box in its middle that the character just fits into
INK = 0.45        # a pixel is ink when this share of it is covered; higher breaks thin strokes


def glyph_masters(glyphs):
    """One grey picture for each font and character: (fonts * glyphs, 1, 64, 64), 1 = ink."""
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
            size = [max(1, round(side * ratio)) for side in ink.size]
            ink = ink.resize(size, Image.Resampling.BOX)
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
    """{"train", "val", "test"}: uint8 (N, size, size) in {0, 1}: a random master, rotated, scaled,
    sheared and shifted at random. At jitter 0 the held-out pictures are all training pictures
    too."""
    check(8 <= image_size <= 64, "image_size", image_size, "between 8 and 64 for glyphs")
    check(len(glyphs) > 0, "glyphs", repr(glyphs), "at least one character")
    check(0 <= jitter <= 4, "jitter", jitter, "between 0 and 4")
    masters = glyph_masters(glyphs)
    fine = max(1, round(36 / image_size))  # each pixel is the mean of fine * fine points

    def draw(n, generator):
        u = jitter * (2 * torch.rand(6, n, generator=generator) - 1)  # six a picture
        angle, shear = 0.18 * u[0], 0.15 * u[1]                       # 0.18 rad is 10 degrees
        wide, high = torch.exp(0.12 * u[2]), torch.exp(0.10 * u[3])
        shift = 0.12 * u[4:6]                                         # of half the side
        # affine_grid wants the way back: where in the master (-1..1) a point comes from
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack([torch.stack([cos / wide, (sin + shear) / wide, shift[0]], -1),
                             torch.stack([-sin / high, cos / high, shift[1]], -1)], 1)  # (n, 2, 3)
        which = torch.randint(len(masters), (n,), generator=generator)
        size = (n, 1, image_size * fine, image_size * fine)
        points = F.affine_grid(theta, size, align_corners=False)
        covered = F.avg_pool2d(F.grid_sample(masters[which], points, align_corners=False), fine)
        return (covered[:, 0] >= INK).to(torch.uint8)

    images = {}
    for split, count in GLYPH_COUNT.items():
        generator = torch.Generator().manual_seed(GLYPH_SEED[split])
        parts = [draw(500, generator) for _ in range(count // 500)]  # 500: little memory
        images[split] = torch.cat(parts)
    return images


# ----------------------------------------------------------------------------------------------
# mnist

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
           "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_FILES = {  # bytes and sha256 of the published files; only downloads are held to them
    "train-images-idx3-ubyte.gz":
        (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "t10k-images-idx3-ubyte.gz":
        (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
}
MNIST_VAL = 5_000                               # the last training images are the validation split
STATIC_SEED = dict(train=2008, test=2009)       # of the one Bernoulli draw behind --binarize static


def mnist_images(data_dir, image_size, levels, binarize):
    """{"train", "val", "test"}: uint8 (N, size, size) with values 0..levels-1, 0 = paper."""
    check(image_size in (14, 28), "image_size", image_size, "28 or 14 for mnist")
    check(levels in (2, 256), "levels", levels, "2 or 256")
    check(binarize in (None, "static", "threshold"), "binarize", binarize, "static or threshold")
    check(levels == 2 or binarize is None, "binarize", binarize,
          "left out with --levels 256, which keeps the greys")
    binarize = binarize or ("static" if image_size == 28 else "threshold")

    paths = [find_file(data_dir, "mnist", name, MIRRORS, *known)
             for name, known in MNIST_FILES.items()]
    split = {}
    for key, path in zip(("train", "test"), paths):
        grey = read_idx(path)
        if image_size == 14:  # mean of 2x2 pixels; halves go up: the threshold below stays exact
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
        raise DataError(f"{paths[0]}: {len(split['train'])} images, too few: "
                        f"the last {MNIST_VAL} validate")
    return dict(train=split["train"][:-MNIST_VAL], val=split["train"][-MNIST_VAL:],
                test=split["test"])


def read_idx(path):
    """An IDX file of 28x28 images, plain or gzipped. Header, big-endian: magic (0, 0, 8 = uint8,
    3 = number of dimensions), then the three dimensions."""
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
            which = "more" if len(body) > n * h * w else "fewer"
            raise ValueError(f"{which} bytes than its {n} images need")
    except BAD_CONTENT as e:
        raise DataError(f"{path}: {one_line(e)}; put the MNIST file there, or delete it to have it "
                        "downloaded")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(n, h, w)


# ----------------------------------------------------------------------------------------------
# sketchy and images: folders of pictures

KINDS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
STROKE = 0.25                # a pixel is ink when this share of it is black; thin strokes survive
LARGEST = 20_000_000         # pixels of a picture
SHARE = dict(val=5, test=10) # per cent of the groups; the rest trains
SKETCHY = ("sketchy", "256x256/sketch/tx_000000000000", "sketch/png",
           "sketchy/256x256/sketch/tx_000000000000", "")


def folder_images(name, data_dir, image_size):
    """{"train", "val", "test"}: uint8 (N, size, size), 1 = ink. All sketches of one photo are in
    the same split."""
    check(8 <= image_size <= 128, "image_size", image_size, f"between 8 and 128 for {name}")
    folder, paths = sketchy_files(data_dir) if name == "sketchy" else picture_files(data_dir)
    packed = paths[0].suffix == ".npz"
    stats = [path.stat() for path in paths]
    facts = (name, image_size, [str(path) for path in paths],
             max((s.st_mtime_ns for s in stats), default=0), sum(s.st_size for s in stats))

    def pack(file):
        bits, split = shrunk_drawings(paths[0], image_size) if packed else \
            pack_pictures(folder, paths, image_size, by_photo=name == "sketchy")
        np.savez(file, bits=bits, split=split)

    with np.load(cached(folder, ".npz", facts, pack)[0], allow_pickle=False) as z:
        bits, split = z["bits"], z["split"]
    images = {}
    for i, key in enumerate(("train", "val", "test")):
        pixels = np.unpackbits(bits[split == i], axis=1, count=image_size ** 2)
        images[key] = torch.from_numpy(pixels).view(-1, image_size, image_size)
        if len(pixels) == 0:
            raise DataError(f"{folder}: {len(bits)} pictures are too few, none fell into the {key} "
                            "split; add more")
    return images


def picture_files(data_dir):
    if not os.path.isdir(data_dir):
        raise DataError(f"--data_dir {data_dir}: no such folder")
    paths = sorted(path for path in Path(data_dir).rglob("*")
                   if path.suffix.lower() in KINDS and path.is_file())  # to open a pipe would hang
    if not paths:
        raise DataError(f"--data_dir {data_dir}: no picture in it ({', '.join(KINDS)})")
    return Path(data_dir), paths


def sketchy_files(data_dir):
    """(folder, files): the largest sketchy_*.npz, many drawings in one file, or all pictures."""
    for folder in (Path(data_dir, sub) for sub in ("sketchy", "sketch", "")):
        # a packed copy of ours, in a folder whose name begins so, has its fingerprint beside it
        if packed := [path for path in folder.glob("sketchy_*.npz") if path.is_file()
                      and not os.path.exists(f"{path}.sha256")]:
            return folder, [max(packed, key=lambda path: path.stat().st_size)]
    for folder in (Path(data_dir, sub) for sub in SKETCHY):
        if paths := sorted(path for path in folder.glob("*/*.png") if path.is_file()):
            return folder, paths
    raise DataError(f"{Path(data_dir, SKETCHY[0])}: missing; get the archive of the Sketchy "
                    "Database from http://sketchy.eye.gatech.edu and unpack it there, or name its "
                    "folder with --data_dir")


def part_of(path, by_photo):
    """0, 1, 2 = train, val, test for a picture. class/photo-3.png is the third sketch of
    class/photo."""
    group = path.parent / (path.stem.rpartition("-")[0] or path.stem) if by_photo else path
    u = int(hashlib.sha1(os.fsencode(group.as_posix())).hexdigest()[:8], 16) % 100
    return 1 if u < SHARE["val"] else 2 if u < SHARE["val"] + SHARE["test"] else 0


def shrunk_drawings(path, size):
    """The same of a file with arrays images_packed (N, bytes), bits of drawings with 1 = ink, shape
    (2,), and filenames (N,), class/photo-n.png."""
    try:
        with np.load(path, allow_pickle=False) as z:
            packed, names = z["images_packed"], z["filenames"]
            h, w = (int(v) for v in z["shape"])
        if h != w or not 8 <= h <= 1024 or packed.shape != (len(names), -(-h * w // 8)):
            raise ValueError(f"{len(names)} names, {h}x{w} pixels, but bits {packed.shape}")
        split = [part_of(Path(str(name)), by_photo=True) for name in names]
        bits = []
        for some in packed:  # one by one: little memory
            page = torch.from_numpy(np.unpackbits(some, count=h * w)).view(1, 1, h, w).float()
            ink = F.adaptive_avg_pool2d(page, size)[0, 0] >= STROKE - 1e-5
            bits.append(np.packbits(ink.numpy()))
    except (*BAD_CONTENT, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise DataError(f"{path}: no drawings ({one_line(e)}); delete it, or get it again")
    return np.stack(bits), np.array(split, np.uint8)


def pack_pictures(folder, paths, size, by_photo):
    """(bits (N, bytes), split (N,) with 0, 1, 2 = train, val, test) of the pictures that can be
    read."""
    bits, split, skipped = [], [], []
    for path in tqdm(paths, desc=f"reading {folder.name}", unit="image",
                     disable=not sys.stderr.isatty()):
        try:
            bits.append(np.packbits(read_ink(path, size)))
        except Exception:  # a broken picture raises a dozen types in Pillow
            skipped.append(str(path.relative_to(folder)))
            continue
        split.append(part_of(path.relative_to(folder), by_photo))
    if skipped:
        some = ", ".join(skipped[:3]) + (" .." if len(skipped) > 3 else "")
        print(f"{folder}: skipped {len(skipped)} of {len(paths)}, which cannot be read as "
              f"pictures: {some}", file=sys.stderr)
    if not bits:
        raise DataError(f"{folder}: none of the {len(paths)} pictures can be read")
    return np.stack(bits), np.array(split, np.uint8)


def read_ink(path, size):
    """A picture as uint8 (size, size), 1 = ink; shrunk to fit, on white. Raises whatever Pillow
    raises."""
    from PIL import Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about large pictures, which are refused here
        with Image.open(path) as picture:
            if picture.width * picture.height > LARGEST:
                raise ValueError("too large")
            if picture.mode.startswith("I"):  # 16 bits
                grey = Image.fromarray(np.asarray(picture, np.float32) / 257)
            else:
                colour = picture.convert("RGBA")
                white = Image.new("RGBA", colour.size, "white")
                grey = Image.alpha_composite(white, colour).convert("L")
    ink = Image.fromarray(255 - np.asarray(grey, np.float32))
    shrink = size / max(ink.size)
    ink = ink.resize([max(1, round(side * shrink)) for side in ink.size], Image.Resampling.BOX)
    page = Image.new("F", (size, size))
    page.paste(ink, ((size - ink.width) // 2, (size - ink.height) // 2))
    # 1e-3: a quarter is ink in spite of rounding
    return (np.asarray(page) >= 255 * STROKE - 1e-3).astype(np.uint8)


# ----------------------------------------------------------------------------------------------
# pictures to look at

def grid(images, columns, zoom=3):
    """(n, H, W) in 0..1, 1 = ink -> one uint8 page, dark ink on white, `columns` images a row."""
    n, H, W = images.shape
    rows = -(-n // columns)
    page = np.full((rows * (H + 2), columns * (W + 2)), 225, dtype=np.uint8)  # pale grey frames
    for i, image in enumerate(images):
        top, left = i // columns * (H + 2) + 1, i % columns * (W + 2) + 1
        page[top:top + H, left:left + W] = 255 - np.rint(image * 255)
    return page.repeat(zoom, 0).repeat(zoom, 1)


def save_png(path, page):
    """Raises UserError where it cannot be written."""
    from PIL import Image
    with written_whole(path) as f:
        Image.fromarray(page).save(f, format="PNG")
