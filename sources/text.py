"""Text as bytes: `tinystories`, `shakespeare`, `pydoc` (embedded) and `text`, any UTF-8 file.

    text   .. O n c e ¶ O n e ..    byte 255 is not in UTF-8: as ¶ it ends a story, and it is BOS
    t      0    1    2    3         (a window of length 4 that happens to begin at the c)
    x_t    BOS  c    e    ¶         every window starts afresh: what came before it is not seen
    y_t    c    e    ¶    O

Nothing is held in memory that is not in a batch: plain files are memory-mapped as they are; gzipped
ones and TinyStories, whose `<|endoftext|>` lines become ¶, are packed once into a file of bytes
that is.
"""
import codecs
import gzip
import hashlib
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sources.files import (BAD_CONTENT, Data, DataError, cached, check, find_file, fingerprint,
                           local_file, one_line)

BOUNDARY = 255                # the last of 256 ids, so it is also BOS
SEPARATOR = "<|endoftext|>"   # how a boundary is written in files and prompts
HELD_OUT = 2_000              # windows of a split, unless more are asked for
BLOCK = 1 << 20               # bytes read at once
LONGEST = 1 << 20             # bytes of a story; no separator for so long: not TinyStories

MIRRORS = {
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",),
    "tinystories": ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/",
                    "https://hf-mirror.com/datasets/roneneldan/TinyStories/resolve/main/"),
}
SHAKESPEARE = ("input.txt", 1_115_394,
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
STORIES = (("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"),
           ("TinyStories-train.txt", "TinyStories-valid.txt"))
ABOUT = {
    "tinystories": "short stories in a small child's words, written by GPT-3.5 and GPT-4",
    "shakespeare": "a megabyte of Shakespeare's plays",
    "pydoc": f"the help topics of Python {sys.version_info[0]}.{sys.version_info[1]}",
}


def to_ids(text):
    """A string as a list of ids; a separator, with the newlines around it, is one boundary."""
    separator = rb"[\r\n]*" + re.escape(SEPARATOR).encode() + rb"[\r\n]*"
    return list(re.sub(separator, b"\xff", text.encode(errors="replace")))


def to_text(ids, boundary=f"\n{SEPARATOR}\n"):
    """Ids, a list or a tensor, as a string; what is not UTF-8, such as half a character, becomes
    U+FFFD."""
    parts = bytes(torch.as_tensor(ids).tolist()).split(b"\xff")
    return boundary.join(part.decode(errors="replace") for part in parts)


def show(x, y):
    text = to_text(y, "¶").replace("\n", "⏎")
    return "".join(c if c.isprintable() else "·" for c in text)


def text_data(name, data_dir, length, data_file="", device="cpu"):
    T = length
    check(T >= 2, "length", T, "at least 2: BOS and one byte")
    source, parts, mark = load_bytes(name, data_dir, data_file)
    for split, part in parts.items():
        if len(part) < T:
            raise DataError(f"{source}: too short for --length {T}, its {split} split has only "
                            f"{len(part)} bytes")

    def sequences(split, places):
        # To touch a mapped page behind the end of its file kills a process without a word. What
        # remains: a file that is cut in the microseconds between this look at it and the next line.
        path = getattr(parts[split], "filename", None)
        used = sum(len(v) for v in parts.values() if getattr(v, "filename", None) == path)
        if path and os.path.exists(path) and os.path.getsize(path) < used:
            raise DataError(f"{path}: became shorter while it was in use; put it back and go on "
                            "with --resume")
        rows = parts[split][places].reshape(-1, T)
        y = torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)
        return torch.cat([torch.full_like(y[:, :1], BOUNDARY), y[:, :-1]], 1), y

    def batch(n, generator):
        begin = torch.randint(len(parts["train"]) - T + 1, (n, 1), generator=generator)
        return sequences("train", (begin + torch.arange(T)).numpy())

    def held_out(split, n=None):
        assert split in ("val", "test"), split
        n = min(len(parts[split]) // T, HELD_OUT if n is None else n)
        x, y = sequences(split, slice(n * T))  # windows side by side
        return dict(x=x, y=y, clean=None, posterior=None)

    sizes = ", ".join(f"{len(part):,} {split}" for split, part in parts.items()) + " bytes"
    return Data(name, T=T, vocab=256, n_out=256, units="nats/char", timestamps=False, image=None,
                batch=batch, held_out=held_out, sizes=sizes, show=show, late_from=T // 2, mark=mark,
                about=f"{ABOUT.get(name, source)}; windows of {T} bytes from anywhere")


# ----------------------------------------------------------------------------------------------
# where the bytes come from

def load_bytes(name, data_dir, data_file=""):
    """(what it is called, {"train", "val", "test": uint8 array}, the fingerprint of its bytes); the
    arrays of files are memory maps. The last 5 % test and the 5 % before validate; of TinyStories
    the last 5 % of the training file validate."""
    if name == "tinystories":
        packed = [(path, *pack(path, separated=True)) for path in story_files(data_dir)]
        train, test = [mapped(source, path) for source, path, _ in packed]
        mark = " ".join(mark for _, _, mark in packed)
        cut = len(train) * 95 // 100
        # the next boundary: no story lies on both sides
        cut += int((train[cut:cut + LONGEST] == BOUNDARY).argmax()) + 1
        return Path(data_dir, name), dict(train=train[:cut], val=train[cut:], test=test), mark
    if name == "pydoc":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise DataError("--dataset pydoc: this Python comes without its help topics; "
                            "choose another dataset")
        joined = b"\xff".join(topics[key].encode() for key in sorted(topics))
        source, whole = "pydoc", np.frombuffer(joined, np.uint8)
        mark = hashlib.sha256(joined).hexdigest()  # another Python has other topics
    else:
        if name == "shakespeare":  # in a folder of its own: many a file is called input.txt
            source = find_file(Path(data_dir, name), "", SHAKESPEARE[0], MIRRORS[name],
                               *SHAKESPEARE[1:])
        elif not data_file:
            raise DataError("--data_file is missing; name the text file to learn")
        elif not os.path.isfile(source := data_file):
            wrong = "not a file" if os.path.exists(data_file) else "no such file"
            raise DataError(f"--data_file {data_file}: {wrong}")
        path, mark = pack(source)
        whole = mapped(source, path)
    a, b = len(whole) * 90 // 100, len(whole) * 95 // 100
    return source, dict(train=whole[:a], val=whole[a:b], test=whole[b:]), mark


def story_files(data_dir):
    """The training and the validation file: a pair that is there, or the newer pair, downloaded."""
    here = Path(data_dir), Path(data_dir, "tinystories")
    for names, places in ((STORIES[0], here), (STORIES[1], here),
                          (("train.txt", "valid.txt"), here[1:])):
        found = [local_file(places, name) for name in names]
        if all(found):
            return found
    return [find_file(data_dir, "tinystories", name, MIRRORS["tinystories"], inspect=read_through)
            for name in STORIES[0]]


def read_through(path):
    """Raises BAD_CONTENT if it is not TinyStories."""
    for _ in split_stories(blocks(path)):
        pass


def mapped(source, path):
    if os.path.getsize(path) == 0:
        raise DataError(f"{source}: empty")
    return np.memmap(path, dtype=np.uint8, mode="r")


def pack(path, separated=False):
    """(The file that holds the bytes of a text, its fingerprint): a packed one, made at the first
    call, or `path` itself if it is plain text with nothing to replace, which is then only read
    through. Raises DataError."""
    try:
        with open(path, "rb") as f:
            zipped = f.read(2) == b"\x1f\x8b"
        if not zipped and not separated:
            for _ in blocks(path):
                pass
            return path, fingerprint(path)
        stat = os.stat(path)
        pieces = lambda: split_stories(blocks(path)) if separated else blocks(path)
        return cached(path, ".bytes", (stat.st_size, stat.st_mtime_ns, separated),
                      lambda f: f.writelines(pieces()))
    except BAD_CONTENT as e:
        raise DataError(f"{path}: {one_line(e)}")


def blocks(path):
    """A text file, plain or gzipped, in blocks of bytes. Raises BAD_CONTENT, ValueError if it is
    not UTF-8."""
    utf8 = codecs.getincrementaldecoder("utf-8")()  # remembers half a character between blocks
    with open(path, "rb") as raw, \
            tqdm(total=os.path.getsize(path), desc="reading " + os.path.basename(path), unit="B",
                 unit_scale=True, delay=1, disable=not sys.stderr.isatty()) as bar:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        f = gzip.GzipFile(fileobj=raw) if zipped else raw
        block = True
        while block:
            block = f.read(BLOCK)
            try:
                utf8.decode(block, final=not block)
            except UnicodeDecodeError:
                raise ValueError("not UTF-8 text")
            bar.update(raw.tell() - bar.n)
            if block:
                yield block


def split_stories(blocks):
    """Blocks of text with separators between stories -> stories, each without newlines around it
    and with a boundary behind it. The beginning of a story waits for the rest, so a separator may
    lie across blocks."""
    separator, end, begun, found = SEPARATOR.encode(), bytes([BOUNDARY]), b"", False
    for block in blocks:
        *whole, begun = (begun + block).split(separator)
        found = found or bool(whole)
        stripped = (story.strip(b"\r\n") for story in whole)
        yield b"".join(story + end for story in stripped if story)
        if len(begun) > LONGEST:
            raise ValueError(f"not TinyStories: no {SEPARATOR} within {LONGEST:,} bytes")
    if not found:
        raise ValueError(f"not TinyStories: no {SEPARATOR} in it")
    if last := begun.strip(b"\r\n"):
        yield last + end
