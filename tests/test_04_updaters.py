"""Lesson: one RNN, three updaters. Whatever is inside, memory and an event go in, memory of the
same shape comes out."""
import pytest
import torch
from tiny import B, K, M, T, V, networks, sequences

from model import UPDATERS

KINDS = sorted(UPDATERS)


def moment(n=B):
    gen = torch.Generator().manual_seed(3)
    m = torch.nn.functional.rms_norm(torch.randn(n, K, M, generator=gen), (M,))
    return m, torch.randint(V, (n,), generator=gen), torch.randint(1, T, (n,), generator=gen)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_in_memory_out(kind):
    """update keeps the shape (N, K, d), and every memory token of the result has root-mean-square
    1."""
    _, _, rnn = networks(rnn=kind)
    m = rnn.update(*moment())
    assert m.shape == (B, K, M)
    assert torch.allclose(m.square().mean(-1), torch.ones(B, K), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_update_depends_on(kind):
    """Each sequence's new memory depends on its own memory, symbol and time, and on no other
    sequence's."""
    _, _, rnn = networks(rnn=kind)
    m, x, t = moment()
    base = rnn.update(m, x, t)
    for changed in ((m.roll(1, 1), x, t), (m, (x + 1) % V, t), (m, x, t % (T - 1) + 1)):
        assert (rnn.update(*changed) - base).abs().amax((1, 2)).min() > 1e-4
    assert torch.allclose(rnn.update(m.flip(0), x.flip(0), t.flip(0)), base.flip(0), atol=1e-6)
    assert torch.allclose(rnn.update(m[:1], x[:1], t[:1]), base[:1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_many_times_at_once_equal_one_after_the_other(kind):
    """Memories may have any leading dimensions; times may lack the first of them."""
    _, _, rnn = networks(rnn=kind)
    gen = torch.Generator().manual_seed(3)
    m, x = torch.randn(B, 4, K, M, generator=gen), torch.randint(V, (B, 4), generator=gen)
    t = torch.tensor([3, 4, 5, 6])
    made = rnn.update(m, x, t)
    assert made.shape == m.shape and rnn.logits(made).shape == (B, 4, V)
    for i in range(4):
        alone = rnn.update(m[:, i], x[:, i], t[i].repeat(B))
        assert torch.allclose(made[:, i], alone, atol=1e-5)
    one = rnn.update(m[:, 0], x[:, 0], t[0])  # one time for all
    assert torch.allclose(one, made[:, 0], atol=1e-5)


@pytest.mark.parametrize("who", ["encoder", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_timestamps_an_update_ignores_the_time(kind, who):
    """Then the RNN can go on for longer than it was trained."""
    _, _, rnn = networks(rnn=kind, timestamps=who)
    m, x, t = moment()
    assert torch.equal(rnn.update(m, x, t), rnn.update(m, x, t + 1000))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_add_up(kind):
    """More layers, more parameters; a GRU is one cell."""
    sizes = [sum(p.numel() for p in networks(rnn=kind, rnn_layers=n)[2].updater.parameters())
             for n in (1, 2)]
    assert sizes[0] == sizes[1] if kind == "gru" else sizes[0] < sizes[1]


def test_mlp_starts_as_a_small_step():
    """A residual MLP changes the memory little at first, so that a long rollout begins near the
    identity."""
    _, _, rnn = networks(rnn="mlp")
    m, x, t = moment(50)
    assert (rnn.update(m, x, t) - m).square().mean() < 0.7 * m.square().mean()


@pytest.mark.parametrize("kind", ["mlp", "gru"])
def test_every_script_knows_every_backbone(kind, command, tmp_path):
    """smt, dmt, bptt, evaluate and sample run with it; the checkpoint says which one it is."""
    for line in ("smt.py {TINY} --rnn {kind} --out_dir {out}/smt",
                 "dmt.py --ckpt {out}/smt/ckpt.pt {RUN} --out_dir {out}/dmt",
                 "bptt.py --init {out}/dmt/ckpt.pt {RUN} --out_dir {out}/post",
                 "bptt.py {TINY} --rnn {kind} --out_dir {out}/bptt",
                 "evaluate.py --ckpt {out}/post/ckpt.pt --n_test 5",
                 "sample.py --ckpt {out}/bptt/ckpt.pt --n 2"):
        code, _, err = command(line, kind=kind, out=tmp_path)
        assert code == 0, err
    x, _ = sequences(n=2, length=8)
    import checkpoints
    rnn = checkpoints.load(str(tmp_path / "post" / "ckpt.pt"))
    assert type(rnn.updater) is UPDATERS[kind] and rnn.memories(x.clamp(max=3)).shape[:2] == (2, 8)
