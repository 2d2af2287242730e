"""
Lesson: text is bytes. A byte that UTF-8 never uses ends a story and begins a window; files are
mapped, not read; what has to be packed is packed once, whole or not at all, and a file that is no
text is refused in one line.
"""
import gzip
import hashlib
import http.server
import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from sources import files, text
from data import DataError

SEP = "<|endoftext|>"
# two-, three- and four-byte characters
TALE = "Es war einmal eine Größe — 猫と犬, 🐈 e\u0301.\r\nEnde\n"
STORIES = [f"Story {i}: über {i * 7}.\n\nThe {'very ' * (i % 5)}end." for i in range(60)]
V2 = text.STORIES[0]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def as_file(stories, sep=f"\n{SEP}\n"):
    return "".join(s + sep for s in stories).encode()


def put(path, content, zipped=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    return path


def listing(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture
def tales(tmp_path):
    """A folder with a small TinyStories."""
    put(tmp_path / "tinystories" / V2[0], as_file(STORIES))
    put(tmp_path / "tinystories" / V2[1], as_file(STORIES[:20]))
    return tmp_path


# --- windows --------------------------------------------------------------------------------------

def test_a_window_is_bos_and_the_text_before(tmp_path):
    """y is a piece of the file; x is BOS and y one step later; every offset occurs, the first and
    the last too."""
    content = bytes(range(32, 127)) * 2 + bytes(10)  # 200 bytes: 180 train
    path = put(tmp_path / "a.txt", content)
    d = data.load("text", data_file=str(path), length=5)
    assert (d.T, d.vocab, d.n_out, d.bos) == (5, 256, 256, 255)
    assert (d.units, d.timestamps, d.image) == ("nats/char", False, None)
    x, y = d.batch(5000, rng())
    assert x.shape == y.shape == (5000, 5) and x.dtype == y.dtype == torch.int64
    assert (x[:, 0] == 255).all() and torch.equal(x[:, 1:], y[:, :-1])
    seen = {bytes(row) for row in y.tolist()}
    assert seen == {content[i:i + 5] for i in range(176)}  # 176 = 180 - 5 + 1 offsets
    assert torch.equal(y, d.batch(5000, rng())[1]) and not torch.equal(y, d.batch(5000, rng(1))[1])


def test_held_out_windows_lie_side_by_side_behind_the_training_text(tmp_path):
    """Validation and test follow each other after 90 and 95 per cent; the first n of them never
    change."""
    content = os.urandom(2000).hex().encode()  # 4000 bytes: 3600, 200, 200
    d = data.load("text", data_file=str(put(tmp_path / "a.txt", content)), length=7)
    for split, begin in (("val", 3600), ("test", 3800)):
        h = d.held_out(split)
        # 28 whole windows in 200 bytes
        assert bytes(h["y"].flatten().tolist()) == content[begin:begin + 28 * 7]
        assert torch.equal(h["x"][:, 1:], h["y"][:, :-1]) and (h["x"][:, 0] == d.bos).all()
        assert h["clean"] is None and h["posterior"] is None
        assert torch.equal(d.held_out(split, 3)["y"],
                           h["y"][:3]) and len(d.held_out(split, 99)["y"]) == 28
    assert "3,600 train, 200 val, 200 test" in d.sizes


def test_without_a_number_held_out_is_capped(tmp_path, monkeypatch):
    """Two gigabytes would be millions of windows; more than the cap must be asked for."""
    monkeypatch.setattr(text, "HELD_OUT", 4)
    d = data.load("text", data_file=str(put(tmp_path / "a.txt", b"x" * 1000)), length=5)
    assert len(d.held_out("val")["y"]) == 4 and len(d.held_out("val", 9)["y"]) == 9


def test_files_are_mapped_not_read(tales, tmp_path):
    """Each split is a view of a memory map: a batch touches only the pages it needs."""
    path = put(tmp_path / "a.txt", TALE.encode() * 50)
    zipped = put(tmp_path / "b.gz", TALE.encode() * 50, zipped=True)
    for name, file in (("tinystories", ""), ("text", str(path)), ("text", str(zipped))):
        _, parts, _ = text.load_bytes(name, tales, file)
        assert all(isinstance(part, np.memmap) and not part.flags.writeable
                   for part in parts.values())


# --- characters -----------------------------------------------------------------------------------

def test_no_character_is_lost():
    """Any string comes back, its ids are below 255, and half a character is shown as a
    replacement."""
    ids = text.to_ids(TALE)
    assert text.to_text(ids) == text.to_text(torch.tensor(ids)) == TALE and max(ids) < 255
    assert text.to_text(text.to_ids("é")[:1]) == "\ufffd"
    assert text.to_ids("") == [] and text.to_text([]) == ""


def test_a_separator_is_one_id():
    """With the newlines around it, in a prompt as in a file; decoding writes it as a line again."""
    for written in (f"a\n{SEP}\nb", f"a{SEP}b", f"a\r\n\r\n{SEP}\r\nb"):
        assert text.to_ids(written) == [ord("a"), 255, ord("b")]
    assert text.to_text([97, 255, 98]) == f"a\n{SEP}\nb"
    assert text.to_ids(SEP) == [255]


def test_a_window_can_be_read_on_one_line(tales):
    """Newlines, boundaries and control characters are shown by signs."""
    d = data.load("tinystories", tales, length=16)
    assert d.show(None, torch.tensor([97, 10, 255, 9, 98])) == "a⏎¶·b"
    assert all(len(d.show(a, b).splitlines()) == 1 for a, b in zip(*d.batch(50, rng())))


def test_the_text_of_a_file_is_all_there(tmp_path):
    """The splits put together are the file."""
    content = TALE.encode() * 40
    for zipped in (False, True):
        path = put(tmp_path / f"file{zipped}", content, zipped)
        _, parts, _ = text.load_bytes("text", tmp_path, str(path))
        assert b"".join(parts[k].tobytes() for k in ("train", "val", "test")) == content


# --- stories --------------------------------------------------------------------------------------

@pytest.mark.parametrize("block", [1, 2, 7, 13, 14, 15, 64, 1 << 20])
def test_blocks_do_not_show(tales, monkeypatch, block):
    """However small the blocks, and wherever they cut a separator or a character, the packed
    stories are the same."""
    monkeypatch.setattr(text, "BLOCK", block)
    _, parts, _ = text.load_bytes("tinystories", tales)
    packed = parts["train"].tobytes() + parts["val"].tobytes()
    assert [s.decode() for s in packed.split(b"\xff")] == STORIES + [""]
    assert 0.03 * len(packed) < len(parts["val"]) <= 0.05 * len(packed)
    assert parts["train"][-1] == text.BOUNDARY  # no story lies on both sides
    # the validation file holds the first 20 stories
    assert parts["test"].tobytes() == packed[:len(parts["test"])]


@pytest.mark.parametrize("sep", [f"\n{SEP}\n", f"\r\n{SEP}\r\n", SEP, f"\n\n{SEP}\n\n",
                                 f"\n{SEP}\n{SEP}\n"])
def test_separators_are_written_in_many_ways(tales, sep):
    """Windows newlines, empty lines and empty stories leave no trace; the last story needs no
    separator."""
    put(tales / "tinystories" / V2[0], as_file(STORIES, sep) + b"last\n")
    _, parts, _ = text.load_bytes("tinystories", tales)
    packed = parts["train"].tobytes() + parts["val"].tobytes()
    assert [s.decode() for s in packed.split(b"\xff")] == STORIES + ["last", ""]


@pytest.mark.parametrize("names", [*text.STORIES, ("train.txt", "valid.txt")])
@pytest.mark.parametrize("folder,zipped",
                         [("", False), ("tinystories", False), ("tinystories", True)])
def test_stories_are_found_where_the_user_put_them(tmp_path, monkeypatch, names, folder, zipped):
    """Either version, plain or zipped, in data_dir or its tinystories; bare train.txt only
    there."""
    monkeypatch.setitem(text.MIRRORS, "tinystories", ())
    for name, n in zip(names, (60, 20)):
        put(tmp_path / folder / (name + ".gz" * zipped), as_file(STORIES[:n]), zipped)
    if folder == "" and names[0] == "train.txt":
        with pytest.raises(DataError, match="missing"):
            data.load("tinystories", tmp_path, length=8)
    else:
        x, y = data.load("tinystories", tmp_path, length=8).batch(400, rng())
        assert (y == 255).any() and (x[:, 1:] == 255).any()


# --- the packed copy ------------------------------------------------------------------------------

def test_a_text_is_packed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    """The second load reads nothing but the packed file; another size or time of the source packs
    anew."""
    path = put(tmp_path / "a.gz", b"old " * 100, zipped=True)
    load = lambda: text.load_bytes("text", tmp_path, str(path))[1]["train"].tobytes()
    assert load().startswith(b"old ") and len(listing(tmp_path)) == 3  # and its sum
    with monkeypatch.context() as m:
        m.setattr(text, "blocks", lambda path: pytest.fail("read again"))
        assert load().startswith(b"old ")
    put(path, b"new " * 100, zipped=True)
    os.utime(path, (1, 1))
    assert load().startswith(b"new ") and len(listing(tmp_path)) == 5


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    """A damaged end of the source, or Ctrl-C in the middle, leaves no packed file behind; the
    source stays."""
    path = put(tmp_path / "a.gz", os.urandom(3000).hex().encode(), zipped=True)
    whole = path.read_bytes()
    monkeypatch.setattr(text, "BLOCK", 100)
    path.write_bytes(whole[:-50])
    with pytest.raises(DataError) as e:
        text.load_bytes("text", tmp_path, str(path))
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value) and listing(tmp_path) \
        == ["a.gz"]
    path.write_bytes(whole)

    def interrupted(path, real=text.blocks):
        yield next(real(path))
        assert len(listing(tmp_path)) == 2  # the source and a temporary file
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(text, "blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            text.load_bytes("text", tmp_path, str(path))
    assert listing(tmp_path) == ["a.gz"]
    assert data.load("text", data_file=str(path), length=9).T == 9


def test_a_folder_that_is_not_for_writing_is_left_alone(tmp_path, cache, capsys):
    """Without a w bit the packed copy goes to the cache folder, and one line says so, once."""
    folder = put(tmp_path / "shelf" / "a.gz", b"abc " * 100, zipped=True).parent
    folder.chmod(0o555)
    try:
        for _ in range(2):
            text.load_bytes("text", tmp_path, str(folder / "a.gz"))
    finally:
        folder.chmod(0o755)
    assert listing(folder) == ["a.gz"] and len(listing(cache)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(folder) in err and str(cache) in err


# --- refusals -------------------------------------------------------------------------------------

NO_TEXT = {
    "byte 255": b"abc " * 50 + b"\xff" + b"abc " * 50,
    "latin-1": "Größe ".encode("latin-1") * 50,
    "half a character at the end": b"abc " * 50 + "猫".encode()[:2],
    "empty": b"",
    "zipped emptiness": gzip.compress(b""),
    "zipped pictures": gzip.compress(bytes(range(256)) * 9),
    "damaged gzip": gzip.compress(os.urandom(3000))[:200] + bytes(3000),
    "too short": b"0123456789" * 15,  # 7 bytes validate
}


@pytest.mark.parametrize("what", NO_TEXT)
def test_what_is_no_text_is_refused_by_name(tmp_path, what):
    """One line that starts with the file; it stays and nothing joins it."""
    path = put(tmp_path / "a.txt", NO_TEXT[what])
    with pytest.raises(DataError) as e:
        data.load("text", data_file=str(path), length=8)
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)
    assert path.read_bytes() == NO_TEXT[what]
    assert what == "zipped emptiness" or listing(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("content", [b"no story ever ends " * 20, b"<html>sorry</html>",
                                     as_file(STORIES) + b"\xff\n"])
def test_stories_of_ones_own_must_be_stories(tales, content):
    """A file without a separator, or no UTF-8, is named and stays."""
    path = put(tales / "tinystories" / V2[0], content)
    with pytest.raises(DataError) as e:
        data.load("tinystories", tales, length=8)
    assert str(e.value).startswith(str(path)) and path.read_bytes() == content \
        and len(listing(tales)) == 2


def test_a_megabyte_without_a_separator_is_enough(tales, monkeypatch):
    """A large file of another kind is refused after its beginning, not after two gigabytes in
    memory."""
    monkeypatch.setattr(text, "LONGEST", 1000)
    monkeypatch.setattr(text, "BLOCK", 100)
    put(tales / "tinystories" / V2[0], b"a" * 5000 + as_file(STORIES))
    with pytest.raises(DataError, match="within 1,000 bytes"):
        data.load("tinystories", tales, length=8)


@pytest.mark.parametrize("name,options,flag", [
    ("text", {}, "--data_file"), ("text", dict(data_file=""), "--data_file"),
    ("text", dict(data_file="."), "--data_file"),
    ("text", dict(data_file="nowhere.txt"), "--data_file"),
    ("text", dict(data_file=3), "--data_file"),
    ("text", dict(length=1, data_file="nowhere.txt"), "--length"),
    ("tinystories", dict(length=0), "--length"),
    ("shakespeare", dict(length=-1), "--length"), ("pydoc", dict(length=1), "--length"),
    ("pydoc", dict(length=2.5), "--length"),
    ("pydoc", dict(data_file="a.txt"), "--data_file"),
    ("shakespeare", dict(symbols=3), "--symbols")])
def test_a_bad_option_is_named(tmp_path, name, options, flag):
    """The one line starts with the flag, before anything is read or fetched."""
    with pytest.raises(DataError) as e:
        data.load(name, tmp_path, **options)
    assert str(e.value).startswith(flag) and "\n" not in str(e.value) and listing(tmp_path) == []


def test_the_help_topics_need_no_file(tmp_path):
    """pydoc is embedded: BOS-separated topics, nothing read from or written to data_dir."""
    d = data.load("pydoc", tmp_path / "absent", length=64)
    x, y = d.batch(300, rng())
    assert x.shape == (300, 64) and (y == 255).any() and listing(tmp_path) == []
    with pytest.raises(DataError, match="pydoc.*--length"):
        data.load("pydoc", length=10 ** 7)


# --- downloads, from a server on this machine -----------------------------------------------------

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20


@pytest.fixture
def mirrors(monkeypatch):
    """mirrors(dataset, kinds..) points the dataset at a local server that answers well or in one
    bad way."""
    served = {"input.txt": PLAY, V2[0]: as_file(STORIES), V2[1]: as_file(STORIES[:20])}
    monkeypatch.setattr(text, "SHAKESPEARE",
                        ("input.txt", len(PLAY), hashlib.sha256(PLAY).hexdigest()))
    monkeypatch.setattr(files, "TIMEOUT", 5)
    monkeypatch.setenv("no_proxy", "*")

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind, name = self.path.strip("/").split("/")
            body = served[name]
            sent = dict(short=body[:-5], other=body[:-1] + b"!",
                        page=b"<html>log in, please</html>", binary=body + b"\xff\xfe")
            if kind == "gone":
                return self.send_error(404)
            self.send_response(200)
            if kind != "unsized":
                self.send_header("Content-Length",
                                 str(len(body if kind == "short" else sent.get(kind, body))))
            self.end_headers()
            self.wfile.write(sent.get(kind, body))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02),
                     daemon=True).start()
    yield lambda name, *kinds: monkeypatch.setitem(text.MIRRORS, name, tuple(
        "http://127.0.0.1:9/" if kind == "dead"
        else f"http://127.0.0.1:{server.server_port}/{kind}/" for kind in kinds))
    server.shutdown()
    server.server_close()


REASONS = dict(dead="refused", gone="404", short="instead of", other="wrong sha256",
               page="not TinyStories", binary="not UTF-8",
               unsized="how long")
FAILURES = [("shakespeare", kind) for kind in ("dead", "gone", "short", "other")] + \
           [("tinystories", kind)
            for kind in ("dead", "gone", "short", "unsized", "page", "binary")]


@pytest.mark.parametrize("name,kind", FAILURES)
def test_the_next_mirror_is_tried(tmp_path, mirrors, name, kind):
    """Whatever the first mirror sends, the second one's file is what is kept."""
    mirrors(name, kind, "good")
    data.load(name, tmp_path, length=8)
    wanted = {"shakespeare": ["shakespeare/input.txt"],
              "tinystories": [f"tinystories/{n}" for n in V2]}[name]
    assert [f for f in listing(tmp_path) if not f.endswith((".bytes", ".sha256"))] == sorted(wanted)
    mirrors(name, "dead")
    data.load(name, tmp_path, length=8)  # downloaded once


@pytest.mark.parametrize("name,kind", FAILURES)
def test_offline_is_one_line(tmp_path, mirrors, name, kind):
    """The file, its address, the reason and the place to put it; nothing bad stays behind."""
    mirrors(name, kind)
    with pytest.raises(DataError) as e:
        data.load(name, tmp_path, length=8)
    message, file = str(e.value), "input.txt" if name == "shakespeare" else V2[0]
    assert message.startswith(str(tmp_path / name / file)) and "\n" not in message
    assert text.MIRRORS[name][0] + file in message and REASONS[kind] in message \
        and "--data_dir" in message
    assert listing(tmp_path) == []


# --- the real files -------------------------------------------------------------------------------

REAL = os.environ.get("SMT_DATA_DIR", "")


def real(*names):
    missing = not REAL or not all(any(Path(REAL, n + z).is_file() for z in ("", ".gz"))
                                  for n in names)
    return pytest.mark.skipif(missing, reason=f"no {' and '.join(names)} in $SMT_DATA_DIR")


@real("shakespeare/input.txt")
def test_the_real_shakespeare():
    """A megabyte, of which 90 per cent train; the published digest."""
    _, parts, _ = text.load_bytes("shakespeare", REAL)
    assert {k: len(v) for k, v in parts.items()} == dict(train=1_003_854, val=55_770, test=55_770)
    content = b"".join(parts[k].tobytes() for k in ("train", "val", "test"))
    assert hashlib.sha256(content).hexdigest() == text.SHAKESPEARE[2]


@real("tinystories/train.txt", "tinystories/valid.txt")
def test_the_real_tinystories(tmp_path):
    """As many boundaries as separators in the file; read through links, so that nothing is written
    where it lies."""
    for name in ("train.txt", "valid.txt"):
        path = next(p for p in (Path(REAL, "tinystories", name + z) for z in (".gz", ""))
                    if p.is_file())
        (tmp_path / "tinystories").mkdir(exist_ok=True)
        (tmp_path / "tinystories" / path.name).symlink_to(path)
    d = data.load("tinystories", tmp_path)
    _, parts, _ = text.load_bytes("tinystories", tmp_path)
    if (tmp_path / "tinystories" / "valid.txt.gz").exists():
        raw = gzip.open(tmp_path / "tinystories" / "valid.txt.gz").read()
        assert (parts["test"] == 255).sum() == raw.count(SEP.encode())
    _, y = d.batch(64, rng())
    assert y.shape == (64, 256) and 0 < (y == 255).float().mean() < 0.01
    letters = ((y >= 97) & (y <= 122)).float().mean()
    assert 0.7 < letters < 0.9


# --- from the bytes to a story --------------------------------------------------------------------

def test_an_rnn_continues_a_prompt(tmp_path, command):
    """Two texts, each the prompt and as many bytes as asked for; the same seed writes the same,
    another seed does not."""
    code, _, err = command("smt.py --dataset pydoc --length 24 {SIZES} {RUN} --n_val 2 "
                           "--out_dir {out}", out=tmp_path)
    assert code == 0, err
    line = "sample.py --ckpt {out}/ckpt.pt --n 2 --chars 30 --seed {seed} --prompt 'The déjà vu'"
    written = [command(line, out=tmp_path, seed=seed)
               for seed in (0, 0, 1)]
    assert all(code == 0 for code, _, _ in written) and written[0] == written[1] != written[2]
    assert written[0][1].count("The déjà vu") == 2
    assert (tmp_path / "samples.txt").read_text().startswith("--- 1\n")
    code, out, _ = command("evaluate.py --ckpt {out}/ckpt.pt --n_test 3 --json", out=tmp_path)
    result = json.loads(out)
    assert code == 0 and result["units"] == "nats/char" and result["n"] == 3
    assert result["bits_per_char"] == pytest.approx(result["rollout"] / math.log(2))
    assert result["rollout"] > 5 and result["late"]["rollout"] > 5  # untrained: log 256 is 5.5


def test_a_prompt_wants_a_text(tiny_smt, command):
    """A checkpoint of another task refuses a prompt in one line."""
    code, out, err = command("sample.py --ckpt {ckpt} --prompt hello", ckpt=tiny_smt)
    assert code == 2 and out == "" and err.count("\n") == 1 and "--prompt" in err
