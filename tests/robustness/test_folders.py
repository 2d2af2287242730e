"""
Lesson: a folder of pictures is a dataset. Whatever its colours and shapes, a picture becomes ink on
white; what cannot be read is skipped and counted; sketches of one photo never face each other
across a split.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import flags
from sources import files
from sources import images as pictures
from data import DataError


@pytest.fixture
def album(tmp_path):
    """A folder with 60 pictures of 16x16, in subfolders: number i is written in binary in the first
    row's blocks."""
    for i in range(60):
        bits = np.array([i >> k & 1 for k in range(8)], np.uint8)
        grey = np.full((16, 16), 255, np.uint8)
        grey[:2] = 255 * (1 - bits.repeat(2))
        path = tmp_path / "album" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(path)
    return tmp_path / "album"


def numbers(split):
    return [sum(int(b) << k for k, b in enumerate(picture[0])) for picture in split]


def ink(picture, size, tmp_path, suffix=".png", **options):
    path = tmp_path / f"one{suffix}"
    picture.save(path, **options)
    return torch.from_numpy(pictures.read_ink(path, size))


# --- one picture ----------------------------------------------------------------------------------

def test_a_quarter_of_black_is_ink(tmp_path):
    """Each pixel is the mean of its block; 16 black of 64 are enough, 15 are not, and neither is
    the same grey a bit paler."""
    grey = np.full((64, 64), 255, np.uint8)
    grey[:2, :8] = 0           # block (0, 0): 16 of 64
    grey[:2, 8:15] = 0         # block (0, 1): 14 of 64
    grey[8:16, :8] = 191       # block (1, 0): 64 of 255 everywhere, a little over a quarter
    grey[8:16, 8:16] = 192     # block (1, 1): 63 of 255, a little under
    got = ink(Image.fromarray(grey), 8, tmp_path)
    assert got.sum() == 2 and got[0, 0] == got[1, 0] == 1


def marked(mode):
    """White paper with a black square in its upper left quarter, in one of Pillow's modes."""
    picture = Image.new("L", (32, 32), 255)
    picture.paste(0, (0, 0, 16, 16))
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture, np.uint16) * 257)
    if mode in ("LA", "RGBA", "transparent palette"):  # the paper is black too, but transparent
        alpha = Image.fromarray(255 - np.asarray(picture))
        black = Image.merge("RGBA", [Image.new("L", (32, 32))] * 3 + [alpha])
        return black.quantize(4) if mode == "transparent palette" else black.convert(mode)
    return picture.convert(mode)


@pytest.mark.parametrize("mode,suffix", [
    ("1", ".png"), ("L", ".png"), ("P", ".png"), ("RGB", ".png"), ("LA", ".png"), ("RGBA", ".png"),
    ("I;16", ".png"),
    ("transparent palette", ".png"), ("RGB", ".jpg"), ("CMYK", ".jpeg"), ("P", ".gif"),
    ("RGB", ".bmp")])
def test_every_mode_is_the_same_drawing(tmp_path, mode, suffix):
    """Palettes, greys, 16 bits and transparency all say: black square, white paper."""
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[:4, :4] = 1
    assert torch.equal(ink(marked(mode), 8, tmp_path, suffix), expected)


def test_a_transparent_key_colour_is_white(tmp_path):
    """PNG can declare one colour of an RGB picture transparent."""
    picture = Image.new("RGB", (16, 16), (0, 0, 0))
    assert ink(picture, 8, tmp_path, transparency=(0, 0, 0)).sum() == 0
    assert ink(picture, 8, tmp_path).sum() == 64


@pytest.mark.parametrize("wide", [False, True])
def test_a_picture_that_is_not_square_gets_white_margins(tmp_path, wide):
    """Its longer side fills the square, the shorter one is centred; nothing is cut off or
    stretched."""
    got = ink(Image.new("L", (40, 20) if wide else (20, 40), 0), 16, tmp_path)
    expected = torch.zeros(16, 16, dtype=torch.uint8)
    expected[4:12] = 1
    assert torch.equal(got, expected if wide else expected.T)
    # a hair stays a line
    assert ink(Image.new("L", (400, 1) if wide else (1, 400), 0), 16, tmp_path).sum() == 16


def test_a_small_picture_is_enlarged(tmp_path):
    """Two by two pixels become four quarters."""
    got = ink(Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)), 8, tmp_path)
    assert got.sum() == 32 and got[:4, :4].all() and got[4:, 4:].all()


# --- folders --------------------------------------------------------------------------------------

def test_every_picture_is_in_one_split(album):
    """All 60 pictures arrive once, from all subfolders, as black and white sequences."""
    got = pictures.folder_images("images", album, 8)
    assert sorted(sum((numbers(v) for v in got.values()), [])) == list(range(60))
    d = data.load("images", album, image_size=8)
    x, y = d.batch(32, torch.Generator().manual_seed(0))
    assert (d.T, d.vocab, d.n_out, d.image, d.units) == (64, 3, 2, (8, 8), "nats/image")
    assert x.shape == (32, 64) and (x[:, 0] == d.bos).all() and set(y.unique().tolist()) == {0, 1}
    assert data.load("images", album).T == 32 * 32


def test_another_picture_moves_none(album):
    """The split hangs on the names alone: adding pictures leaves the others where they were."""
    before = {k: numbers(v) for k, v in pictures.folder_images("images", album, 8).items()}
    for i in (60, 61, 62):
        Image.new("L", (16, 16), 255).save(album / f"{i}.png")
    after = {k: numbers(v) for k, v in pictures.folder_images("images", album, 8).items()}
    assert all(set(before[k]) <= set(after[k]) for k in before)
    assert sum(map(len, after.values())) == 63


def test_the_shares_are_about_right(album, monkeypatch):
    """Of 2,000 names 5 per cent validate and 10 test."""
    monkeypatch.setattr(pictures, "read_ink", lambda path, size: np.zeros((size, size), np.uint8))
    _, split = pictures.pack_pictures(album, [album / f"{i}.png" for i in range(2000)], 8,
                                      by_photo=False)
    assert abs((split == 1).mean() - 0.05) < 0.02 and abs((split == 2).mean() - 0.10) < 0.03


def test_sketches_of_one_photo_stay_together(tmp_path):
    """class/photo-n.png: whatever n, the photo is on one side; another class's photo of that name
    is another photo."""
    folder, n = tmp_path / "sketchy", 0
    for name in ("hot-air_balloon", "bee"):
        (folder / name).mkdir(parents=True)
        for photo in range(40):
            code = 40 * (name == "bee") + photo
            bits = np.array([code >> k & 1 for k in range(8)], np.uint8)
            for sketch in range(3):
                Image.fromarray(np.tile(255 * (1 - bits),
                                        (8, 1))).save(folder / name / f"n0{photo}_1-{sketch}.png")
    got = {k: numbers(v) for k, v in pictures.folder_images("sketchy", tmp_path, 8).items()}
    assert all(split.count(code) == 3 for split in got.values() for code in set(split))
    assert sum(map(len, got.values())) == 240
    side = {code % 40: k for k, split in got.items() for code in split if code < 40}
    assert any(side[code % 40] != k for k, split in got.items() for code in split if code >= 40)


@pytest.mark.parametrize("place", pictures.SKETCHY)
def test_the_archive_is_found_as_it_unpacks(tmp_path, place):
    """In any of its usual places; other files around it do not matter."""
    for i in range(60):
        path = tmp_path / place / "bee" / f"n{i}-1.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 0).save(path)
    (tmp_path / "sketchy").mkdir(exist_ok=True)
    (tmp_path / "sketchy" / "README.txt").write_text("")
    assert sum(map(len, pictures.folder_images("sketchy", tmp_path, 8).values())) == 60


# --- broken things --------------------------------------------------------------------------------

def test_what_is_no_picture_is_skipped_and_counted(album, capsys, monkeypatch):
    """Text, nothing, a cut file, a folder, a giant: one line names three and counts all; the rest
    is learnt."""
    (album / "0text.png").write_text("not a picture")
    (album / "1empty.jpg").write_bytes(b"")
    Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 20),
                                                      dtype=np.uint8)).save(album / "2cut.png")
    (album / "2cut.png").write_bytes((album / "2cut.png").read_bytes()[:250])  # of about 470 bytes
    (album / "3folder.png").mkdir()
    monkeypatch.setattr(pictures, "LARGEST", 1000)
    Image.new("1", (40, 40)).save(album / "4giant.png")
    (album / "5link.png").symlink_to(album / "nowhere")
    (album / "6notes.txt").write_text("not even called a picture")
    got = pictures.folder_images("images", album, 8)
    assert sum(map(len, got.values())) == 60
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "skipped 4 of 64" in err  # a folder, a dead link: no files
    assert all(name in err
               for name in ("0text.png", "1empty.jpg", "2cut.png")) and "4giant" not in err


def test_a_giant_is_refused_before_it_is_unpacked(tmp_path, recwarn):
    """A header that promises 100 million pixels costs no memory and no warning."""
    path = tmp_path / "giant.bmp"
    Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[18:26] = (10_000).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match="too large"):
        pictures.read_ink(path, 8)
    assert not recwarn.list


@pytest.mark.parametrize("name,prepare,message", [
    ("images", lambda f: None, "no picture in it"),
    ("images", lambda f: f.rmdir(), "no such folder"),
    ("images", lambda f: (f / "a.png").write_text("text"), "none of the 1 pictures"),
    ("images", lambda f: Image.new("L", (8, 8)).save(f / "a.png"), "too few"),
    ("sketchy", lambda f: Image.new("L", (8, 8)).save(f / "a.png"), "sketchy.eye.gatech.edu")])
def test_a_folder_without_enough_pictures_is_one_line(tmp_path, name, prepare, message):
    """Nothing there, nothing readable, or too little for three splits."""
    folder = tmp_path / "folder"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(DataError, match=message) as e:
        data.load(name, folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


@pytest.mark.parametrize("name", ["images", "sketchy"])
@pytest.mark.parametrize("size", [7, 129, -32, 8.5])
def test_a_bad_size_is_named_first(tmp_path, name, size):
    """Before the folder is looked at."""
    with pytest.raises(DataError) as e:
        data.load(name, tmp_path / "absent", image_size=size)
    assert str(e.value).startswith("--image_size")


# --- the packed copy ------------------------------------------------------------------------------

def test_pictures_are_read_once(album, monkeypatch):
    """The second load opens no picture; another size, a new picture or a changed one is read
    anew."""
    read = []
    real = pictures.read_ink
    keep = lambda path, size: read.append(path) or real(path, size)
    monkeypatch.setattr(pictures, "read_ink", keep)
    load = lambda size=8: pictures.folder_images("images", album, size)
    first, second = load(), load()
    assert len(read) == 60 and all(torch.equal(first[k], second[k]) for k in first)
    load(9)
    assert len(read) == 120
    Image.new("L", (16, 16), 0).save(album / "new.png")
    assert sum(v.flatten(1).all(1).sum() for v in load().values()) == 1 and len(read) == 181
    os.utime(album / "new.png", (2e9, 2e9))
    load()
    assert len(read) == 242


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-100], lambda b: b"rubbish" + b[7:],
                                    lambda b: b[:400] + bytes(40) + b[440:]])
def test_a_damaged_copy_is_made_again(album, damage):
    """Cut, overwritten or emptied: the pictures are read again and the copy is whole."""
    first = pictures.folder_images("images", album, 8)
    for pattern in ("*.npz", "*.npz.sha256"):
        [path] = album.glob(pattern)
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        again = pictures.folder_images("images", album, 8)
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert path.read_bytes() == whole and len(list(album.glob("*.part"))) == 0


def test_a_copy_never_runs_code(album):
    """An npz with pickled objects is damaged goods: it is made again, or, signed by a forger,
    refused."""
    first = pictures.folder_images("images", album, 8)
    [path] = album.glob("*.npz")
    forge = lambda: np.savez(path, bits=np.array([print], object), split=np.zeros(1, np.uint8))
    forge()
    again = pictures.folder_images("images", album, 8)
    assert all(torch.equal(first[k], again[k]) for k in first)
    forge()
    Path(f"{path}.sha256").write_text(files.fingerprint(path))
    with pytest.raises(ValueError, match="allow_pickle"):
        pictures.folder_images("images", album, 8)


def test_interrupted_reading_leaves_nothing(album, monkeypatch):
    """Ctrl-C while the pictures are read."""
    def interrupt(path, size):
        raise KeyboardInterrupt
    monkeypatch.setattr(pictures, "read_ink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pictures.folder_images("images", album, 8)
    assert all(p.suffix == ".png" for p in album.rglob("*") if p.is_file())


def test_a_folder_that_is_not_for_writing_is_left_alone(album, cache, capsys):
    """Without a w bit the copy goes to the cache folder, and one line says so."""
    album.chmod(0o555)
    try:
        pictures.folder_images("images", album, 8)
        pictures.folder_images("images", album, 8)
    finally:
        album.chmod(0o755)
    assert not list(album.glob("*.npz")) and len(list(cache.glob("*.npz"))) == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- many drawings in one file --------------------------------------------------------------------

def packed(path, n=120, side=16, **changes):
    """sketchy_*.npz with n random drawings, three of each photo."""
    ink = (np.random.default_rng(0).random((n, side, side)) < 0.1).astype(np.uint8)
    bits = np.packbits(ink.reshape(n, -1), axis=1)
    arrays = dict(images_packed=bits, shape=np.array([side, side]),
                  filenames=np.array([f"bee/n{i // 3}-{i % 3}.png" for i in range(n)])) | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return ink


def test_packed_drawings_are_those_of_the_pictures(tmp_path):
    """The same drawings as pictures of a folder come to the same sequences and splits."""
    (tmp_path / "one").mkdir()
    ink = packed(tmp_path / "one" / "sketchy_some.npz")
    for i, drawing in enumerate(ink):
        path = tmp_path / "many" / "sketchy" / "bee" / f"n{i // 3}-{i % 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 * (1 - drawing)).save(path)
    one, many = (pictures.folder_images("sketchy", tmp_path / k, 8) for k in ("one", "many"))
    for split in one:
        assert sorted(numbers(one[split])) == sorted(numbers(many[split])), split


def test_the_largest_packed_file_counts(tmp_path):
    """Also beside pictures, and however often it is asked."""
    for n in (90, 120):
        packed(tmp_path / f"sketchy_{n}.npz", n)
    (tmp_path / "bee").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "bee" / "n1-1.png")
    for _ in range(2):
        got = pictures.folder_images("sketchy", tmp_path, 8)
        assert sum(map(len, got.values())) == 120


def test_a_copy_is_not_taken_for_drawings(tmp_path):
    """The packed copy of a folder called sketchy_256 lies in it, and has a name that begins so."""
    for i in range(90):
        path = tmp_path / "sketchy_256" / "bee" / f"n{i // 3}-{i % 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 255 * (i % 2)).save(path)
    for _ in range(2):
        got = pictures.folder_images("sketchy", tmp_path / "sketchy_256", 8)
        assert sum(map(len, got.values())) == 90
    assert list((tmp_path / "sketchy_256").glob("sketchy_256.*.npz"))


@pytest.mark.parametrize("changes", [
    dict(filenames=None), dict(shape=None), dict(shape=np.array([16, 17])),
    dict(shape=np.array([4])),
    dict(images_packed=np.zeros((3, 5), np.uint8)), dict(images_packed=np.zeros((120, 32))),
    dict(filenames=np.array([object()] * 120)), "text", "cut"])
def test_a_broken_packed_file_is_one_line(tmp_path, changes):
    path = tmp_path / "sketchy_some.npz"
    packed(path, **changes if isinstance(changes, dict) else {})
    if isinstance(changes, str):
        path.write_bytes(b"text" if changes == "text" else path.read_bytes()[:300])
    with pytest.raises(DataError, match="no drawings") as e:
        data.load("sketchy", tmp_path, image_size=8)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


# --- the real sketches ----------------------------------------------------------------------------

REAL = Path(os.environ.get("SMT_DATA_DIR") or "absent")


@pytest.mark.skipif(not list(REAL.glob("sketch/png/*/*.png")),
                    reason="no sketch/png/<class>/*.png in $SMT_DATA_DIR")
def test_the_real_sketches(monkeypatch, cache):
    """Strokes survive at 64x64: about 6 per cent ink and no empty picture; nothing is written where
    they lie."""
    before = set(REAL.iterdir()), set((REAL / "sketch/png").iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == cache)
    got = pictures.folder_images("sketchy", REAL / "sketch/png", 64)
    everything = torch.cat(list(got.values())).float()
    assert len(everything) == len(list(REAL.glob("sketch/png/*/*.png")))
    assert 0.03 < everything.mean() < 0.1 and (everything.sum((1, 2)) > 20).all()
    path = next(REAL.glob("sketch/png/*/*.png"))
    grey = torch.from_numpy(np.asarray(Image.open(path).convert("L"), np.float32))
    if grey.shape == (256, 256):
        blocks = (255 - grey).view(64, 4, 64, 4).mean((1, 3)) / 255
        assert torch.equal(torch.from_numpy(pictures.read_ink(path, 64)),
                           (blocks >= 0.25).to(torch.uint8))
    assert before == (set(REAL.iterdir()), set((REAL / "sketch/png").iterdir()))


# --- the same pictures, the same text, wherever a checkpoint is used ------------------------------

def test_own_pictures_stay_those_trained_on(command, tmp_path, monkeypatch):
    """dmt, evaluate and sample --prefix of a run on own pictures look where it was trained, not
    where other data lies."""
    monkeypatch.setattr(pictures, "SHARE", dict(val=30, test=30))
    mine, other = tmp_path / "pictures", tmp_path / "other"
    for folder, n in ((mine, 30), (other, 60)):
        folder.mkdir()
        for i in range(n):
            Image.new("L", (8, 8), 255 * (i % 2)).save(folder / f"{i}.png")
    monkeypatch.setattr(flags.Config, "data_dir", str(other))
    monkeypatch.chdir(tmp_path)
    code, _, err = command("smt.py --dataset images --image_size 8 --data_dir pictures {SIZES} "
                           "{RUN} --n_val 2 --out_dir run/smt")
    assert code == 0, err
    monkeypatch.chdir(tmp_path / "run")
    assert command("dmt.py --ckpt smt/ckpt.pt {RUN} --n_val 2 --out_dir dmt")[0] == 0
    used = torch.load("dmt/ckpt.pt", weights_only=True)["config"]["data_dir"]
    assert used == str(mine)
    seen = []
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a, **k: seen.append(k["data_dir"]) or load(*a, **k))
    assert command("evaluate.py --ckpt dmt/ckpt.pt --n_test 2")[0] == 0
    assert command("sample.py --ckpt dmt/ckpt.pt --prefix --n 1")[0] == 0
    assert command(f"evaluate.py --ckpt dmt/ckpt.pt --n_test 2 --data_dir {other}")[0] == 0
    assert seen == [str(mine), str(mine), str(other)]


def test_another_python_has_other_help(command, tmp_path, monkeypatch):
    """pydoc's text comes with Python: the advice names no file."""
    from pydoc_data.topics import topics
    run = f"smt.py --dataset pydoc --length 8 {{SIZES}} {{RUN}} --n_val 2 --out_dir {tmp_path}/run"
    assert command(run)[0] == 0
    monkeypatch.setitem(topics, "assert", topics["assert"] + "!")
    code, _, err = command(f"evaluate.py --ckpt {tmp_path}/run/ckpt.pt --n_test 2")
    assert code == 2 and "use the Python it was" in err and err.count("\n") == 1, err


def test_own_text_stays_the_one_trained_on(command, tmp_path, monkeypatch):
    """A run on a text of one's own is evaluated from any folder, and finds the text again when it
    has moved."""
    (tmp_path / "tale.txt").write_text("once upon a time " * 200)
    monkeypatch.chdir(tmp_path)
    assert command("smt.py --dataset text --data_file tale.txt --length 8 {SIZES} {RUN} --n_val 2 "
                   "--out_dir run")[0] == 0
    monkeypatch.chdir("run")
    assert command("evaluate.py --ckpt ckpt.pt --n_test 2")[0] == 0
    whole = (tmp_path / "tale.txt").read_text()
    (tmp_path / "tale.txt").write_text(whole[:-900])  # where the test part was there is training
    for line in ("evaluate.py --ckpt ckpt.pt --n_test 2",
                 "bptt.py --init ckpt.pt {RUN} --n_val 2 --out_dir bptt",
                 "dmt.py --ckpt ckpt.pt {RUN} --n_val 2 --out_dir dmt"):
        code, _, err = command(line)
        assert code == 2 and "another text" in err and err.count("\n") == 1, err
    (tmp_path / "tale.txt").write_text(whole)
    (tmp_path / "tale.txt").rename(tmp_path / "moved.txt")
    code, _, err = command("evaluate.py --ckpt ckpt.pt --n_test 2")
    assert code == 2 and "--data_file" in err
    for line in ("evaluate.py --ckpt ckpt.pt --n_test 2",
                 "bptt.py --init ckpt.pt {RUN} --n_val 2 --out_dir bptt"):
        code, _, err = command(line + " --data_file ../moved.txt")
        assert code == 0, err
