"""What all sources share: the sequences they return, how they refuse, and their files.

A file is looked for in data_dir and otherwise downloaded once. Whatever this project writes, it
writes with `written_whole`: a file is the old one or the whole new one, never a part. The one
exception is the log of a run, which grows.
"""
import contextlib
import errno
import glob
import hashlib
import http.client
import os
import sys
import time
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None


class UserError(Exception):
    """Something the user can mend; str(e) is one line that names it and says how."""


class DataError(UserError):
    """A problem with the data or their options."""


@dataclass
class Data:
    name: str
    T: int                # length of x and of y
    vocab: int            # input ids are 0..vocab-1, the last one is BOS
    n_out: int            # output ids are 0..n_out-1
    units: str            # of a loss: "nats/image" (summed), "nats/char" or "nats/target" (mean)
    timestamps: bool      # every sequence has this one length: "the t-th token" means something
    image: tuple | None   # (H, W) if y is a picture
    batch: Callable       # batch(n, generator) -> x, y: random training sequences, int64 (n, T)
    held_out: Callable    # held_out("val" or "test", n=None) -> the first n of a fixed set, a dict
                          #   x, y       int64 (n, T)
                          #   clean      int64 (n, T), the targets without noise, or None
                          #   posterior  float (n, T, n_out), the best possible prediction of y_t
                          #              from x_0..x_t (zeros where y_t = -1), or None where
                          #              nobody knows it
    about: str = ""       # one line: how a sequence comes about
    sizes: str = "endless"  # how much of it there is
    show: Callable | None = None  # show(x_row, y_row) -> a line of text; None for pictures
    density: Callable = lambda length: 1.0  # part of a sequence's times that have a target, about
    late_from: int | None = None  # evaluate.py reports the targets at t >= late_from apart as well
    mark: str = ""        # changes with the text or the pictures; "" for endless tasks

    @property
    def bos(self):
        return self.vocab - 1


def check(ok, flag, value, rule):
    """Refuse an option of a dataset. Raises DataError."""
    if not ok:
        raise DataError(f"--{flag} {value}: must be {rule}")


def one_line(e):
    return " ".join(str(e).split()) or type(e).__name__


# ------------------------------------------------------------------------------------- writing

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # what a write raises where no more fits


def lock(file) -> bool | None:
    """Keep an open file for this process, until that ends, however it ends. False: another process
    has it; None: this system cannot tell."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, AttributeError):  # a file system without locks, or fcntl is None
        return None


def regular(path):
    """Where a write to `path` goes: through symbolic links. Raises OSError for what is there and no
    plain file: a device would be replaced, a pipe would hang."""
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        raise OSError(errno.EINVAL, "not a regular file", target)
    return target


def remove_parts(path):
    """Remove what processes that died left beside `path`: nobody has them locked."""
    for part in glob.glob(f"{glob.escape(path)}.*.part"):
        # one that was begun in this second may still be waiting for its lock
        with contextlib.suppress(OSError), open(part, "r+b") as f:
            if time.time() - os.path.getmtime(part) > 1 and lock(f):
                os.remove(part)


@contextlib.contextmanager
def writing(path, *ours):
    """Inside, what the disk refuses is a UserError. With `ours`, only if it has no room left or
    refuses one of these files: the caller may read others."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        # torch.save hides a full disk behind a RuntimeError of its own
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError) or \
                ours and cause.errno not in FULL and cause.filename not in ours:
            raise
        raise UserError(f"{path}: cannot be written ({cause.strerror or cause}); make room there, "
                        "or name another place (--out_dir, --out, --results_dir)") from None


@contextlib.contextmanager
def written_whole(path, mode="wb"):
    """A file to write under a temporary name beside `path`. It becomes `path` at the end, or it
    vanishes if anything fails, Ctrl-C included. Raises UserError."""
    target = os.path.realpath(path)
    part = f"{target}.{os.getpid()}.part"
    try:
        with writing(path, target, part):
            remove_parts(regular(path))
            with open(part, mode, encoding=None if "b" in mode else "utf-8") as f:
                lock(f)
                yield f
            os.replace(part, target)
    finally:
        with contextlib.suppress(OSError):  # gone already, unless something failed
            os.remove(part)


# ----------------------------------------------------------------------- finding, downloading

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
    """`name` in data_dir or data_dir/folder, zipped or not; otherwise downloaded to data_dir/folder
    from the first mirror that delivers it. size (bytes), sha256 and inspect(path), which raises
    BAD_CONTENT, are held against downloads only. Raises DataError."""
    if path := local_file((Path(data_dir), Path(data_dir, folder)), name):
        return path
    path = Path(data_dir, folder, name)
    failures = []
    for mirror in mirrors:
        try:
            download(mirror + name, path, size, sha256, inspect)
            return path
        except (*BAD_CONTENT, http.client.HTTPException) as e:  # URLError, timeouts are OSErrors
            failures.append(f"{mirror + name} ({one_line(e)})")
    raise DataError(f"{path}: missing, and could not be downloaded from {', '.join(failures)}; "
                    f"fetch it by hand and put it there, or name its folder with --data_dir")


def download(url, path, size=None, sha256=None, inspect=None):
    """`path` is whole or absent. Without a known size the server's word for it is taken. Raises
    BAD_CONTENT."""
    got = 0
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        if size is None and not (size := int(response.headers.get("Content-Length") or 0)):
            raise OSError("the server does not say how long the file is")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as f, tqdm(total=size, desc=path.name, unit="B", unit_scale=True,
                                            disable=not sys.stderr.isatty()) as bar:
            while got <= size and (block := response.read(1 << 16)):
                f.write(block)
                got += len(block)
                bar.update(len(block))
            if got != size:
                raise OSError(f"{got} bytes came instead of {size}")
            f.flush()
            if sha256 and fingerprint(f.name) != f"{got} {sha256}":
                raise OSError("wrong sha256")
            if inspect:
                inspect(f.name)


def cache_path(source, suffix, *facts):
    """Where to keep what is made of a file or folder: with it, or in CACHE if its folder is not for
    writing (a folder without a w bit is not, even for root). The name depends on the source's path
    and the facts."""
    source = Path(os.path.abspath(source))
    key = hashlib.sha256(repr((str(source), *facts)).encode(errors="replace")).hexdigest()[:12]
    name = f"{source.name}.{key}{suffix}"
    folder = source if source.is_dir() else source.parent
    if os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:
        return folder / name
    path = Path(os.path.expanduser(CACHE)) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        print(f"{folder} is not for writing; keeping a packed copy in {path}", file=sys.stderr)
    return path


def fingerprint(path):
    """Bytes and sha256 of a file, as a line."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return f"{os.path.getsize(path)} {digest.hexdigest()}"


def cached(source, suffix, facts, make):
    """(The path of what make(file) writes, its fingerprint). The file of an earlier call with this
    source and these facts is used if the fingerprint beside it says that it is whole."""
    path = cache_path(source, suffix, *facts)
    beside = Path(f"{path}.sha256")
    with contextlib.suppress(OSError, ValueError):  # one of them is not there, or is no text
        if path.is_file() and beside.is_file() and \
                (mark := fingerprint(path)) == beside.read_text():
            return path, mark
    with written_whole(path) as f:
        make(f)
    mark = fingerprint(path)
    with written_whole(beside, "w") as f:
        f.write(mark)
    return path, mark
