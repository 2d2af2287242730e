"""
Lesson: what the model is asked. x starts with BOS and lags y by one step, so nothing can be read
off its own target; held-out sequences never change and never train; where a task knows its Bayes
optimum, that is exact; and a broken file or option is refused in one line, with nothing
half-written left behind.
"""
import gzip
import hashlib
import http.server
import itertools
import os
import struct
import sys
import threading
from collections import defaultdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
from sources import files  # noqa: E402
from sources import images as pictures  # noqa: E402  (many tests hold some `images`)
from data import DataError  # noqa: E402

TRAIN, TEST = pictures.MNIST_FILES
SMALL = dict(train=20, test=7)  # images in the fake MNIST files, besides the validation split


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def idx_bytes(images, magic=0x803, dims=None):
    dims = dims or images.shape
    return struct.pack(">I", magic) + struct.pack(f">{len(dims)}I",
                                                  *dims) + images.numpy().tobytes()


@pytest.fixture
def fake_mnist(tmp_path, monkeypatch):
    """A folder with two small MNIST files; the number of image i is written in its first two
    pixels."""
    monkeypatch.setattr(pictures, "MNIST_VAL", 5)
    monkeypatch.setattr(pictures, "MIRRORS", ())
    for name, n in ((TRAIN, SMALL["train"] + 5), (TEST, SMALL["test"])):
        images = torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=rng(n))
        images[:, 0, 0] = torch.arange(n)
        images[:, 0, 1] = 1 if name == TEST else 0
        (tmp_path / name.removesuffix(".gz")).write_bytes(idx_bytes(images))
    return tmp_path


# --- the index convention -------------------------------------------------------------------------

def test_six_pixels_written_out():
    """A 2x3 image becomes x = (BOS, s_0..s_4) and y = (s_0..s_5): the last pixel is never an
    input."""
    picture = torch.tensor([[[0, 1, 1], [0, 0, 1]]], dtype=torch.uint8)
    d = pictures.image_data("toy", dict(train=picture, val=picture, test=picture), levels=2)
    h = d.held_out("test")
    assert h["x"].tolist() == [[2, 0, 1, 1, 0, 0]] and h["y"].tolist() == [[0, 1, 1, 0, 0, 1]]
    assert (d.T, d.vocab, d.n_out, d.bos, d.image) == (6, 3, 2, 2, (2, 3))
    assert torch.equal(data.sequences_to_images(d, h["y"]), picture.float())


def test_half_of_a_batch_is_mirrored():
    """Left to right, in training alone, and only where it was asked for."""
    picture = torch.tensor([[[1, 0, 0], [1, 1, 0]]], dtype=torch.uint8)
    images = dict(train=picture, val=picture, test=picture)
    for mirror in (True, False):
        d = pictures.image_data("toy", images, levels=2, mirror=mirror)
        x, y = d.batch(400, torch.Generator().manual_seed(0))
        turned = (y == torch.tensor([0, 0, 1, 0, 1, 1])).all(1)
        assert (turned | (y == torch.tensor([1, 0, 0, 1, 1, 0])).all(1)).all()
        assert 150 < turned.sum() < 250 if mirror else not turned.any()
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert d.held_out("test")["y"].tolist() == [[1, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize("name", ["glyphs", "retrieval"])
def test_every_sequence_starts_with_bos_and_stays_in_its_alphabet(name):
    """x_0 = BOS and only x_0; every other input and every target lies inside its vocabulary."""
    d = data.load(name)
    for x, y in (d.batch(32, rng()), (d.held_out("val", 32)["x"], d.held_out("val", 32)["y"])):
        assert x.shape == y.shape == (32, d.T) and x.dtype == y.dtype == torch.int64
        assert (x[:, 0] == d.bos).all() and (x[:, 1:] < d.bos).all() and (x >= 0).all()
        assert (y >= -1).all() and (y < d.n_out).all() and (y >= 0).any(1).all()
        if d.image:
            assert torch.equal(x[:, 1:], y[:, :-1])
            pictures = data.sequences_to_images(d, y)
            assert pictures.shape == (32, *d.image) and pictures.min() == 0 and pictures.max() == 1


# --- randomness -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["glyphs", "retrieval"])
def test_the_generator_is_the_only_source_of_chance(name):
    """Equal generators give equal batches whatever the global one does, and loading leaves that
    untouched."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    pictures.glyph_images.cache_clear()
    d = data.load(name, seed=5)
    a, b = d.batch(16, rng(3)), d.batch(16, rng(4))
    d.held_out("val", 5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = d.batch(16, rng(3))
    assert torch.equal(a[0], again[0]) and torch.equal(a[1], again[1])
    assert not torch.equal(a[0], b[0])


@pytest.mark.parametrize("name,options",
                         [("glyphs", {}), ("retrieval", dict(noise=0.3, length=20))])
def test_held_out_sets_never_change(name, options):
    """The first 10 of 100 are the 10, in every process, for every seed; validation is not test."""
    d = data.load(name, seed=0, **options)
    pictures.glyph_images.cache_clear()
    other = data.load(name, seed=1, **options)
    few, many = d.held_out("val", 10), other.held_out("val", 100)
    for key, value in few.items():
        assert (value is None and many[key] is None) or torch.equal(value, many[key][:10])
    assert not torch.equal(few["x"], d.held_out("test", 10)["x"])


def test_retrieval_prefix_holds_across_chunks():
    """The sequences are made in chunks of 1,000 but the first n do not depend on how many are asked
    for."""
    d = data.load("retrieval", length=8)
    assert len(d.held_out("test")["x"]) == 1000
    assert torch.equal(d.held_out("test", 2500)["x"][:1001], d.held_out("test", 1001)["x"])
    x = d.held_out("test", 2000)["x"]
    assert not torch.equal(x[:1000], x[1000:])


# --- glyphs ---------------------------------------------------------------------------------------

def test_glyphs_are_many_shapes_of_few_characters():
    """Jitter makes most pictures new ones; without it a font and a character make one picture."""
    jittered = data.load("glyphs").held_out("test")["y"]
    assert len(jittered) == pictures.GLYPH_COUNT["test"]
    assert len(jittered.unique(dim=0)) > 0.8 * len(jittered)
    assert 0.1 < jittered.float().mean() < 0.35 and (jittered.sum(1) > 5).all()
    plain = data.load("glyphs", jitter=0, glyphs="17").held_out("test")["y"]
    assert 2 < len(plain.unique(dim=0)) <= 2 * len(pictures.FONTS)


def test_glyph_size_and_characters_are_options():
    """Another size, another alphabet, another task."""
    d = data.load("glyphs", image_size=8, glyphs="AB")
    assert d.T == 64 and d.image == (8, 8)
    assert not torch.equal(d.held_out("val", 9)["y"],
                           data.load("glyphs", image_size=8).held_out("val", 9)["y"])


# --- mnist ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["", "mnist"])
def test_mnist_is_found_where_the_user_put_it(fake_mnist, zipped, folder):
    """Plain or gzipped, in data_dir or in data_dir/mnist, with no download."""
    (fake_mnist / folder).mkdir(exist_ok=True)
    for name in (TRAIN, TEST):
        plain = fake_mnist / name.removesuffix(".gz")
        raw = plain.read_bytes()
        plain.unlink()
        path = fake_mnist / folder / (name if zipped else plain.name)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    d = data.load("mnist", fake_mnist, levels=256)
    assert (d.T, d.vocab, d.n_out) == (784, 257, 256)
    assert d.held_out("test")["y"][:, 0].tolist() == list(range(SMALL["test"]))


def test_mnist_splits_share_no_image(fake_mnist):
    """Batches show every training image but the last 5 (of the real file 5,000), which validate."""
    d = data.load("mnist", fake_mnist, levels=256)
    _, y = d.batch(1000, rng())
    assert set(y[:, 0].tolist()) == set(range(SMALL["train"])) and (y[:, 1] == 0).all()
    assert d.held_out("val")["y"][:, 0].tolist() == list(range(SMALL["train"], SMALL["train"] + 5))
    assert (d.held_out("test")["y"][:, 1] == 1).all() and len(d.held_out("test", 3)["y"]) == 3


def test_static_binarisation_is_one_fixed_draw_from_the_intensities(fake_mnist):
    """The same picture in every load and for every seed, and ink appears with the grey value's
    probability."""
    a, b = (data.load("mnist", fake_mnist, seed=s).held_out("test")["y"] for s in (0, 1))
    assert torch.equal(a, b) and set(a.unique().tolist()) == {0, 1}
    n = pictures.MNIST_VAL + 4_000
    steps = torch.linspace(0, 255, 28).round().to(torch.uint8).expand(n, 28, 28).contiguous()
    (fake_mnist / TRAIN.removesuffix(".gz")).write_bytes(idx_bytes(steps))
    images = pictures.mnist_images(fake_mnist, 28, 2, "static")
    seen, wanted = images["train"].float().mean((0, 1)), steps[0, 0] / 255
    assert (seen - wanted).abs().max() < 0.006  # 112,000 draws each: four standard errors
    assert seen[0] == 0 and seen[-1] == 1
    assert not torch.equal(images["train"][:5], images["val"])


def test_14x14_is_the_mean_of_2x2_and_the_threshold_is_half(fake_mnist):
    """Four pixels become their mean; at least half of full scale is ink; the defaults differ by
    size."""
    images = torch.zeros(30, 28, 28, dtype=torch.uint8)
    images[:, :2, 0:2] = torch.tensor([[255, 255], [0, 0]])  # mean 127.5: exactly half, ink
    images[:, :2, 2:4] = torch.tensor([[255, 254], [0, 0]])  # a little less: paper
    for name in (TRAIN, TEST):
        (fake_mnist / name.removesuffix(".gz")).write_bytes(idx_bytes(images))
    y = data.load("mnist", fake_mnist, image_size=14).held_out("test")["y"]
    assert y.shape == (30, 196) and y[0, :3].tolist() == [1, 0, 0]
    grey = data.load("mnist", fake_mnist, image_size=14, levels=256).held_out("test")["y"]
    assert grey[0, :2].tolist() == [128, 127]
    by_default = data.load("mnist", fake_mnist).held_out("test")["y"]
    assert torch.equal(by_default,
                       data.load("mnist", fake_mnist, binarize="static").held_out("test")["y"])
    assert torch.equal(y, data.load("mnist", fake_mnist, image_size=14,
                                    binarize="threshold").held_out("test")["y"])


PICTURES = torch.zeros(9, 28, 28, dtype=torch.uint8)
BROKEN = {
    "empty": b"",
    "cut header": idx_bytes(PICTURES)[:10],
    "labels instead of images": idx_bytes(PICTURES, magic=0x801),
    "floats": idx_bytes(PICTURES, magic=0xD03),
    "a web page": b"<html>sorry, the server is down for maintenance</html>",
    "wrong size of image": idx_bytes(PICTURES, dims=(9, 14, 56)),
    "no image": idx_bytes(PICTURES, dims=(0, 28, 28)),
    "a billion images": idx_bytes(PICTURES, dims=(1 << 30, 28, 28)),
    "truncated": idx_bytes(PICTURES)[:-1],
    "too long": idx_bytes(PICTURES) + b"x",
    "truncated gzip": gzip.compress(idx_bytes(PICTURES))[:-20],
    "damaged gzip": gzip.compress(os.urandom(3000))[:200] + bytes(3000),
    "too few for a validation split": idx_bytes(PICTURES[:5]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_by_name(fake_mnist, what):
    """Whatever is wrong with a file, the answer is one line that starts with its path; the file
    stays."""
    path = fake_mnist / TRAIN.removesuffix(".gz")
    path.write_bytes(BROKEN[what])
    with pytest.raises(DataError) as e:
        data.load("mnist", fake_mnist)
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)
    assert path.read_bytes() == BROKEN[what]


def real_mnist():
    for folder in (os.environ.get("SMT_DATA_DIR"), Path(data.__file__).parent / "data"):
        for sub in ("", "mnist"):
            for suffix in ("", ".gz"):
                if folder and all(Path(folder, sub, n.removesuffix(".gz") + suffix).is_file()
                                  for n in (TRAIN, TEST)):
                    return folder
    return None


@pytest.mark.skipif(real_mnist() is None, reason="no MNIST files in data/ or $SMT_DATA_DIR")
def test_the_real_mnist():
    """55,000 + 5,000 + 10,000 images with the published mean grey."""
    images = pictures.mnist_images(real_mnist(), 28, 256, None)
    assert {k: tuple(v.shape) for k, v in images.items()} == \
        dict(train=(55_000, 28, 28), val=(5_000, 28, 28), test=(10_000, 28, 28))
    assert abs(torch.cat([images["train"], images["val"]]).float().mean().item() - 33.318) < 1e-2
    assert abs(images["test"].float().mean().item() - 33.791) < 1e-2
    d = data.load("mnist", real_mnist())
    x, y = d.batch(64, rng())
    assert x.shape == (64, 784) and 0.1 < y.float().mean() < 0.16


# --- downloads, from a server on this machine -----------------------------------------------------

@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """Paths on a local server: /good/ serves the files, /short/ cuts them, /other/ serves other
    bytes of the same length, /long/ more of them; anything else is 404. pictures.MIRRORS is for the
    test to set."""
    served = {}
    for name, n in ((TRAIN, 12), (TEST, 3)):
        served[name] = gzip.compress(idx_bytes(PICTURES[:1].repeat(n, 1, 1)), mtime=0)
    monkeypatch.setattr(pictures, "MNIST_FILES",
                        {k: (len(v), hashlib.sha256(v).hexdigest()) for k, v in served.items()})
    monkeypatch.setattr(pictures, "MNIST_VAL", 5)
    monkeypatch.setattr(files, "TIMEOUT", 5)
    monkeypatch.setenv("no_proxy", "*")
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            kind, name = self.path.strip("/").split("/")
            body = served[name]
            promised = len(body)
            if kind == "short":
                body = body[:-5]
            elif kind == "other":
                body = body[:-1] + bytes([body[-1] ^ 1])
            elif kind == "long":
                body, promised = body + bytes(100), promised + 100
            elif kind != "good":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02),
                     daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    yield lambda *kinds: monkeypatch.setattr(pictures, "MIRRORS", tuple(
        "http://127.0.0.1:9/" if kind == "dead" else f"{base}{kind}/" for kind in kinds)) or asked
    server.shutdown()
    server.server_close()


def leftovers(folder):
    return [p for p in Path(folder).rglob("*") if p.is_file()]


@pytest.mark.parametrize("first", ["dead", "gone", "short", "other", "long"])
def test_the_second_mirror_is_tried(tmp_path, mirrors, first):
    """A mirror that is dead, lacks the file or sends something else costs nothing but time."""
    mirrors(first, "good")
    d = data.load("mnist", tmp_path)
    assert len(d.held_out("test")["x"]) == 3
    assert sorted(p.relative_to(tmp_path).as_posix()
                  for p in leftovers(tmp_path)) == [f"mnist/{TEST}", f"mnist/{TRAIN}"]


def test_a_file_is_downloaded_once(tmp_path, mirrors):
    """The second load asks nobody, and a file of the user's own is not held to the published
    hash."""
    asked = mirrors("good")
    own = tmp_path / TEST.removesuffix(".gz")
    own.write_bytes(idx_bytes(PICTURES))
    data.load("mnist", tmp_path)
    assert asked == [f"/good/{TRAIN}"]
    assert len(data.load("mnist", tmp_path).held_out("test")["x"]) == 9 and len(asked) == 1


@pytest.mark.parametrize("kinds", [("dead",), ("gone",), ("short",), ("other",), ("long",),
                                   ("dead", "short", "other")])
def test_when_every_mirror_fails_nothing_is_left(tmp_path, mirrors, kinds):
    """One line names the file, each address with its reason and the place to put it; no file
    remains."""
    mirrors(*kinds)
    with pytest.raises(DataError) as e:
        data.load("mnist", tmp_path)
    message = str(e.value)
    assert "\n" not in message and str(tmp_path / "mnist" / TRAIN) in message
    assert all(mirror + TRAIN in message for mirror in pictures.MIRRORS)
    reasons = dict(dead="refused", gone="404", short="instead of", other="wrong sha256",
                   long="instead of")
    assert all(reasons[kind] in message for kind in kinds)
    assert leftovers(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(tmp_path, mirrors, monkeypatch):
    """Ctrl-C in the middle of a file removes the part that came."""
    mirrors("good")

    class Bar:
        def __init__(self, *args, **kwargs): pass
        def __enter__(self): return self
        def __exit__(self, *args): pass
        def update(self, n):
            assert leftovers(tmp_path)  # the temporary file
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist", tmp_path)
    assert leftovers(tmp_path) == []


def test_a_data_dir_that_cannot_be_written_is_one_line(tmp_path, mirrors):
    """Where the folder should be there is a file."""
    mirrors("good")
    (tmp_path / "blocked").write_text("")
    with pytest.raises(DataError, match="blocked"):
        data.load("mnist", tmp_path / "blocked")


# --- retrieval, our variant -----------------------------------------------------------------------

def test_retrieval_asks_for_the_one_marked_symbol():
    """One needle within needle_range, QUERY at the end and nowhere else, one target: the needle's
    symbol."""
    d = data.load("retrieval", variant="ours", length=16, symbols=5, needle_range=6)
    assert (d.T, d.vocab, d.n_out, d.bos, d.units) == (16, 12, 5, 11, "nats/target")
    x, y = d.batch(4000, rng())
    marked = (x >= 5) & (x < 10)
    assert (marked.sum(1) == 1).all()
    where = marked.int().argmax(1)
    assert set(where.tolist()) == set(range(1, 7))
    assert (x[:, -1] == 10).all() and ((x == 10).sum(1) == 1).all()
    assert (y[:, :-1] == -1).all() and torch.equal(y[:, -1], x[marked] - 5)
    for counts in (where.bincount()[1:] / 4000 * 6, y[:, -1].bincount() / 4000 * 5,
                   x[x < 5].bincount() / (x < 5).sum() * 5):
        assert (counts - 1).abs().max() < 0.2  # all of it uniform
    x, _ = data.load("retrieval", variant="ours", length=16).batch(500, rng())
    assert ((x >= 8) & (x < 16)).int().argmax(1).max() == 4  # the first quarter


def every_retrieval_sequence(T, S, R, noise):
    """The generative process written out as loops: yields (probability, x, y_last)."""
    for where in range(1, R + 1):
        free = [t for t in range(1, T - 1) if t != where]
        for needle in range(S):
            for others in itertools.product(range(S), repeat=len(free)):
                x = [2 * S + 1] + [None] * (T - 2) + [2 * S]
                x[where] = S + needle
                for t, symbol in zip(free, others):
                    x[t] = symbol
                p = 1 / R / S / S ** len(free)
                yield p * (1 - noise), tuple(x), needle
                for redrawn in range(S):
                    yield p * noise / S, tuple(x), redrawn


@pytest.mark.parametrize("T,S,R,noise",
                         [(4, 2, 2, 0.3), (5, 3, 1, 0.7), (5, 2, 3, 1.0), (3, 3, 1, 0.0)])
def test_the_posterior_is_the_conditional_probability(T, S, R, noise):
    """Enumerating every (x, y) of the process gives p(y | x), and the task's posterior equals
    it."""
    joint = defaultdict(lambda: [0.0] * S)
    for p, x, y in every_retrieval_sequence(T, S, R, noise):
        joint[x][y] += p
    assert sum(map(sum, joint.values())) == pytest.approx(1)
    d = data.load("retrieval", variant="ours", length=T, symbols=S, noise=noise, needle_range=R)
    h = d.held_out("val", 400)
    # it draws every sequence, and no other
    assert {tuple(x) for x in h["x"].tolist()} == set(joint)
    truth = torch.tensor([[p / sum(joint[tuple(x)]) for p in joint[tuple(x)]]
                          for x in h["x"].tolist()])
    assert torch.allclose(h["posterior"][:, -1], truth, atol=1e-6)
    assert (h["posterior"][:, :-1] == 0).all() and (h["clean"][:, :-1] == -1).all()


def test_noise_redraws_the_target_and_only_the_target():
    """A share noise * (1 - 1/S) of the targets differs from the needle; `clean` never does."""
    S, noise, n = 4, 0.4, 20_000
    d = data.load("retrieval", variant="ours", length=6, symbols=S, noise=noise)
    h = d.held_out("test", n)
    needle = h["x"][(h["x"] >= S) & (h["x"] < 2 * S)] - S
    assert torch.equal(h["clean"][:, -1], needle)
    share = (h["y"][:, -1] != needle).float().mean().item()
    assert abs(share - noise * (1 - 1 / S)) < 0.013  # four standard errors
    likelihood = h["posterior"][:, -1].gather(1, h["y"][:, -1:]).log().mean()
    entropy = torch.distributions.Categorical(h["posterior"][0, -1]).entropy()
    # the best predictor's loss on these targets is its own entropy
    assert abs(likelihood + entropy) < 0.03


# --- options --------------------------------------------------------------------------------------

BAD = [
    ("cifar", {}, "--dataset"), ("", {}, "--dataset"),
    ("glyphs", dict(image_size=7), "--image_size"), ("glyphs", dict(image_size=65), "--image_size"),
    ("glyphs", dict(image_size=12.5), "--image_size"),
    ("glyphs", dict(image_size=True), "--image_size"),
    ("glyphs", dict(jitter=-0.1), "--jitter"), ("glyphs", dict(jitter=float("nan")), "--jitter"),
    ("glyphs", dict(jitter="much"), "--jitter"), ("glyphs", dict(glyphs=""), "--glyphs"),
    ("glyphs", dict(glyphs="1 2"), "--glyphs"), ("glyphs", dict(glyphs="1\n"), "--glyphs"),
    ("glyphs", dict(glyphs="\U0010fffd"), "--glyphs"), ("glyphs", dict(glyphs=12), "--glyphs"),
    ("glyphs", dict(length=64), "--length"), ("glyphs", dict(levels=2), "--levels"),
    ("mnist", dict(image_size=12), "--image_size"), ("mnist", dict(levels=3), "--levels"),
    ("mnist", dict(binarize="dynamic"), "--binarize"),
    ("mnist", dict(levels=256, binarize="static"), "--binarize"),
    ("mnist", dict(noise=0.1), "--noise"),
    ("retrieval", dict(length=2), "--length"), ("retrieval", dict(length=-5), "--length"),
    ("retrieval", dict(symbols=1), "--symbols"), ("retrieval", dict(symbols="abc"), "--symbols"),
    ("retrieval", dict(noise=1.01), "--noise"), ("retrieval", dict(noise=-1), "--noise"),
    ("retrieval", dict(length=10, needle_range=9), "--needle_range"),
    ("retrieval", dict(variant="theirs"), "--variant"), ("retrieval", dict(variant=1), "--variant"),
    ("parity", dict(variant="ours"), "--variant"),
    ("retrieval", dict(needle_range=-1), "--needle_range"),
    ("retrieval", dict(image_size=28), "--image_size"),
    ("retrieval", dict(shortest=2), "--shortest"), ("copy", dict(shortest=40), "--shortest"),
    ("retrieval", dict(shortest=3, length=12), "--shortest"),
    ("recall", dict(shortest=1), "--shortest"), ("recall", dict(gap=9, shortest=10), "--shortest"),
]


@pytest.mark.parametrize("name,options,flag", BAD)
def test_a_bad_option_is_named(tmp_path, name, options, flag):
    """The one line starts with the flag that is wrong, before any file is read or fetched."""
    with pytest.raises(DataError) as e:
        data.load(name, tmp_path, **options)
    assert str(e.value).startswith(flag) and "\n" not in str(e.value)
    assert leftovers(tmp_path) == []


def test_none_means_not_given():
    """A command line can pass every flag of every dataset and leave None where the user said
    nothing."""
    d = data.load("retrieval", length=9, noise=None, image_size=None)
    assert d.T == 9 and torch.equal(d.held_out("val", 4)["x"],
                                    data.load("retrieval", length=9).held_out("val", 4)["x"])


# --- python data.py DATASET -----------------------------------------------------------------------

@pytest.mark.parametrize("name", [*data.SYNTHETIC, "pydoc"])
def test_look_before_you_train(name, command):
    """What the task is, its sizes, its floor and as many examples as asked for."""
    code, out, err = command(f"data.py {name} --n 3")
    lines = out.rstrip("\n").split("\n")
    assert code == 0 and err == "" and len(lines) == 6 and lines[0].startswith(f"{name}: ")
    assert f"T = {data.load(name).T}, " in lines[1]
    assert ("nobody knows" in lines[2]) == (name == "pydoc")


@pytest.mark.parametrize("name", [n for n, o in data.OPTIONS.items() if "variant" in o])
def test_look_at_both_variants(name, command):
    """Each variant says what it is and shows its own sequences; the paper's is the default."""
    by_default, *looks = (command(f"data.py {name} --n 3{given}") for given in
                          ("", " --variant paper", " --variant ours"))
    assert all(code == 0 and err == "" for code, _, err in looks) and by_default == looks[0]
    paper, ours = (out.rstrip("\n").split("\n") for _, out, _ in looks)
    assert len(paper) == len(ours) == 6 and paper[0] != ours[0]
    assert not set(paper[3:]) & set(ours[3:])
    assert f"T = {data.load(name, variant='ours').T}, " in ours[1]


def test_look_at_pictures(command, tmp_path):
    """A picture dataset goes to a file."""
    code, out, _ = command(f"data.py glyphs --glyphs AB --n 5 --out {tmp_path}/seen.png")
    assert code == 0 and "5 training examples" in out \
        and (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


def test_the_list_names_every_dataset(command):
    """One line each, in the order of the options."""
    code, out, _ = command("data.py")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(data.OPTIONS)


@pytest.mark.parametrize("line, word", [("data.py cifar", "cifar"),
                                        ("data.py stack --keys 3", "--keys"),
                                        ("data.py stack --depth 0", "--depth"),
                                        ("data.py stack --n -1", "--n"),
                                        ("data.py text", "--data_file"),
                                        ("data.py text --data_file nowhere.txt", "nowhere.txt"),
                                        ("data.py glyphs --out nowhere/seen.png",
                                         "nowhere/seen.png")])
def test_a_look_at_nothing_is_one_line(command, line, word):
    """Mistakes are one line that names the flag or file, exit code 2."""
    code, out, err = command(line)
    assert code == 2 and err.count("\n") == 1 and word in err and "Traceback" not in err
