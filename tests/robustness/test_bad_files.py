"""
Lesson: a file is a stranger. Whatever stands where a checkpoint should be, every script that reads
one answers with one line that names the path, exit code 2, and runs none of the code that a pickle
may carry.
"""
import io
import pickle

import pytest
import torch

import checkpoints


class Marker:
    """A pickle of this creates a folder when it is loaded carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        import os
        return os.mkdir, (self.path,)


def packed(obj):
    f = io.BytesIO()
    torch.save(obj, f)
    return f.getvalue()


GONE = object()


def changed(good, **parts):
    """The good checkpoint with parts replaced or gone."""
    ckpt = torch.load(io.BytesIO(good), weights_only=True) | parts
    return packed({k: v for k, v in ckpt.items() if v is not GONE})


def config_of(good):
    return torch.load(io.BytesIO(good), weights_only=True)["config"]


BAD = {  # (bytes of a good checkpoint, path of the marker) -> bytes of a bad one
    "empty": lambda good, mark: b"",
    "text": lambda good, mark: b"not a checkpoint, though it has\nlines\n",
    "truncated": lambda good, mark: good[:len(good) // 2],
    "cut at the end": lambda good, mark: good[:-30],
    "overwritten inside": lambda good, mark: good[:300] + bytes(300) + good[600:],
    "malicious pickle": lambda good, mark: pickle.dumps(Marker(mark)),
    "malicious torch file": lambda good, mark: changed(good, config=Marker(mark)),
    "a list": lambda good, mark: packed([1, 2, 3]),
    "another project's": lambda good, mark: packed(dict(model=dict(w=torch.zeros(3)), step=3)),
    "an older format": lambda good, mark: changed(good, format=1),
    "a newer format": lambda good, mark: changed(good, format=checkpoints.FORMAT + 1),
    "no config": lambda good, mark: changed(good, config=GONE),
    "config of another type": lambda good, mark: changed(good, config=[1]),
    "empty config": lambda good, mark: changed(good, config={}),
    "no sizes": lambda good, mark: changed(good, model=GONE),
    "unknown size": lambda good, mark: changed(good, model=dict(vocab=8, n_out=3, T=8, wings=2)),
    "missing size": lambda good, mark: changed(good, model=dict(vocab=8)),
    "size of another type": lambda good, mark: changed(good, model=dict(vocab="8", n_out=3, T=8)),
    "wrong shapes": lambda good, mark: changed(good, model=dict(vocab=8, n_out=3, T=8, d_model=32)),
    "unknown rnn": lambda good, mark:
        changed(good, model=dict(vocab=8, n_out=3, T=8, rnn="hopfield")),
    "unknown dataset": lambda good, mark:
        changed(good, config=config_of(good) | dict(dataset="cifar")),
    "unknown preset": lambda good, mark:
        changed(good, config=config_of(good) | dict(preset="huge")),
    "dataset of another type": lambda good, mark:
        changed(good, config=config_of(good) | dict(dataset=[1])),
    "longer sequences": lambda good, mark: changed(good, config=config_of(good) | dict(length=20)),
    "no networks": lambda good, mark: changed(good, encoder=GONE, decoder=GONE, rnn=GONE),
    "empty networks": lambda good, mark: changed(good, encoder={}, decoder={}, rnn={}),
    "networks of another type": lambda good, mark: changed(good, encoder=1, decoder=1, rnn=1),
}
READERS = {
    "evaluate": "evaluate.py --device cpu --n_test 4 --ckpt {path}",
    "sample": "sample.py --device cpu --n 4 --ckpt {path}",
    "dmt": "dmt.py {RUN} --out_dir {tmp}/new --ckpt {path}",
    "bptt": "bptt.py {RUN} --out_dir {tmp}/new --init {path}",
    "resume": "smt.py --resume --out_dir {tmp}/run",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_one_line(what, reader, command, tiny_smt, tmp_path, recwarn):
    """Every reader refuses every bad checkpoint by its path, executes nothing and writes
    nothing."""
    path = tmp_path / "run" / "ckpt.pt"
    path.parent.mkdir()
    path.write_bytes(BAD[what](tiny_smt.read_bytes(), tmp_path / "mark"))
    code, out, err = command(READERS[reader], path=path, tmp=tmp_path)
    assert code == 2, out
    assert err.count("\n") == 1 and str(path) in err and not recwarn.list, err
    assert not (tmp_path / "mark").exists() and not (tmp_path / "new").exists()


def test_the_malicious_pickle_is_malicious(tmp_path):
    """Plain unpickling does run the code, so that the test above has something to find."""
    pickle.loads(pickle.dumps(Marker(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("part",
                         ["optimizers", "rng", "torch_rng", "newest", "encoder", "elapsed"])
def test_a_checkpoint_without_what_resuming_needs(part, command, tiny_smt, tmp_path):
    """A checkpoint made for sampling, or damaged, is refused by --resume with one line instead of
    half-loaded."""
    (tmp_path / "ckpt.pt").write_bytes(changed(tiny_smt.read_bytes(), **{part: GONE}))
    code, _, err = command(f"smt.py --resume --steps 9 --out_dir {tmp_path}")
    assert code == 2 and err.count("\n") == 1 and f"{tmp_path}/ckpt.pt" in err and part in err, err


@pytest.mark.parametrize("flag", ["decode_own", "heads", "ema", "dataset"])
def test_a_run_of_an_older_version_is_not_resumed_with_new_defaults(flag, command, tiny_smt,
                                                                    tmp_path):
    """A config that does not say what a flag was is refused: the objective would change
    silently."""
    config = {k: v for k, v in config_of(tiny_smt.read_bytes()).items() if k != flag}
    (tmp_path / "ckpt.pt").write_bytes(changed(tiny_smt.read_bytes(), config=config))
    code, _, err = command(f"smt.py --resume --steps 9 --out_dir {tmp_path}")
    assert code == 2 and err.count("\n") == 1 and f"{tmp_path}/ckpt.pt" in err, err


def test_an_older_format_says_so(command, tiny_smt, tmp_path):
    """Not that it is no checkpoint, but that it is one of a version whose networks were others."""
    (tmp_path / "old.pt").write_bytes(changed(tiny_smt.read_bytes(), format=1, kept=GONE))
    code, _, err = command(f"evaluate.py --ckpt {tmp_path}/old.pt")
    assert code == 2 and err.count("\n") == 1, err
    assert "format 1" in err and f"format {checkpoints.FORMAT}" in err and "train again" in err


def test_a_good_checkpoint_loads_from_anywhere(tiny_smt, tmp_path, monkeypatch):
    """The RNN of a good checkpoint loads with nothing but its path and steps through symbols."""
    monkeypatch.chdir(tmp_path)
    rnn = checkpoints.load(str(tiny_smt))
    m = rnn.update(rnn.start(2), torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert rnn.logits(m).shape == (2, 3) and rnn.logits(m).isfinite().all()


def test_load_raises_one_clear_error(tmp_path):
    """In Python a bad file is a CheckpointError, with the path in it."""
    (tmp_path / "x.pt").write_bytes(b"junk")
    with pytest.raises(checkpoints.CheckpointError, match="x.pt"):
        checkpoints.load(str(tmp_path / "x.pt"))
    with pytest.raises(checkpoints.CheckpointError, match="missing.pt"):
        checkpoints.load(str(tmp_path / "missing.pt"))
