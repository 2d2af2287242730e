"""Lesson: Eq. 2-5, term by term; what we add to them; and what an SMT checkpoint owes to whoever
runs the RNN alone."""
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import B, D, K, M, T, gen, networks, recipe, sequences

import data
import smt
from checkpoints import build, load_checkpoint
from losses import cross_entropy

# and no heads, horizon 1
PAPER = dict(first=0.0, futures=1000, lambda_fut=1.0, decode_own=False, rnn_batch=0)
TIMES = torch.arange(3, 9)


def losses(nets, times=TIMES, horizon=1, heads=None, xy=None, **changes):
    x, y = xy or sequences()
    return smt.objective(*nets, heads, x, y, times, horizon, recipe(smt, **PAPER | changes), gen())


# ------------------------------------------------------------------------------------ the equations

@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_objective_against_a_loop(kind):
    """L_dec and L_dyn equal the paper's equations written as loops over times; Eq. 5 is their
    weighted sum."""
    nets = encoder, decoder, rnn = networks(encoder=kind)
    x, y = sequences()
    got = losses(nets, lambda_dec=0.7, lambda_dyn=1.3, lambda_unif=0.4)
    nats, targets, square, count = 0.0, 0, 0.0, 0
    for t in TIMES.tolist():
        m = encoder(x[:, :t + 1], torch.tensor([t]))[:, 0]
        logits = decoder(m, x[:, t + 1:t + 4], torch.full((B,), t))
        future = y[:, t:t + 4]
        nats += F.cross_entropy(logits[:, :future.shape[1]].flatten(0, 1), future.flatten(),
                                reduction="sum")
        targets += future.numel()
        if t > TIMES[0]:
            guess = rnn.update(before, x[:, t], torch.full((B,), t))
            square += (guess - m).square().sum()
            count += m.numel()
        before = m
    assert torch.allclose(got["dec"], nats / targets, atol=1e-5)
    assert torch.allclose(got["dyn"], square / count, atol=1e-5)
    unif = smt.uniformity(encoder(x, TIMES), gen())
    assert torch.allclose(got["unif"], unif, atol=1e-5)
    total = 0.7 * nats / targets + 1.3 * square / count + 0.4 * unif
    assert torch.allclose(got["loss"], total, atol=1e-5)


def test_uniformity():
    """Eq. 4 is 0 for a collapsed memory, lower when spread; equal to the definition on all pairs;
    never above 0."""
    g = gen()
    assert smt.uniformity(torch.ones(6, K, D), g).abs() < 1e-5
    m = torch.randn(200, K, D, generator=gen(1))
    value = smt.uniformity(m, g, most=100_000)
    unit = F.normalize(m.flatten(0, 1), dim=-1)
    pairs = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert abs(value - pairs) < 0.05 and value < -2
    shrunk = torch.ones(D) + 0.01 * m
    assert value < smt.uniformity(shrunk, g) < 1e-5


def test_times_cover_both_ends():
    """They are consecutive, inside the sequence, and reach t = 0 and t = T - 1 as often as the
    middle; 0 means all."""
    g = gen()
    times = torch.stack([smt.sample_times(T, 3, g) for _ in range(8000)])
    assert (times[:, 1:] - times[:, :-1] == 1).all() and times.min() == 0 and times.max() == T - 1
    share = torch.bincount(times.flatten(), minlength=T) / times.numel()
    assert share.min() > 0.5 / T
    for n in (0, T, T + 5):
        assert smt.sample_times(T, n, g).tolist() == list(range(T))


# -------------------------------------------------------------------------- ours: from where it is

def rollout_by_hand(nets, x):
    """What the RNN makes at TIMES[1:], alone from the encoder's first memory, and the labels."""
    encoder, _, rnn = nets
    label = encoder(x, TIMES)
    m, made = label[:, 0].detach(), []
    for t in TIMES.tolist()[1:]:
        m = rnn.update(m, x[:, t], torch.full((len(x),), t)).detach()
        made.append(m)
    return torch.stack(made, 1), label


def test_texts_draw_times_whose_future_is_in_the_window():
    """Of T times the first T - Tf + 1, and of a causal encoder those before Tc."""
    task = data.load("pydoc", length=24)
    for Tc, Tf, encoder, most in ((24, 10, "causal", 15), (12, 10, "causal", 12),
                                  (12, 10, "bidirectional", 15), (24, 1, "causal", 24)):
        c = tiny.config(T=24, ctx_len=Tc, fut_len=Tf, encoder=encoder, timestamps="none")
        assert smt.times_to_draw(recipe(smt, times=4), c, task, []) == most


def test_on_policy_transitions_start_from_the_rnns_memory():
    """With a horizon, half of L_dyn is the error one update after the RNN's own memory."""
    nets = networks()
    x, _ = sequences()
    made, label = rollout_by_hand(nets, x)
    on_policy = (made - label[:, 1:]).square().mean()
    expected = (losses(nets)["dyn"] + on_policy) / 2
    assert torch.allclose(losses(nets, horizon=len(TIMES))["dyn"], expected, atol=1e-5)


def test_on_policy_transitions_do_not_pull_at_the_encoder():
    """Their labels are fixed targets and their inputs have no graph: what reaches the encoder is
    half of what Eq. 3 alone sends; the updater learns from both."""
    grads = []
    for horizon in (1, len(TIMES)):
        nets = networks()
        losses(nets, horizon=horizon)["dyn"].backward()
        grads.append([[p.grad for p in net.parameters()] for net in (nets[0], nets[2].updater)])
    for one, both in zip(grads[0][0], grads[1][0]):
        assert torch.allclose(one / 2, both, atol=1e-6)
    assert any(g.abs().sum() > 0 for g in grads[0][0])
    assert not all(torch.allclose(one / 2, both, atol=1e-4) for one, both in zip(grads[0][1],
                                                                                grads[1][1]))


@pytest.mark.parametrize("horizon", [1, len(TIMES)])
def test_decoder_reads_what_the_rnn_made(horizon):
    """With decode_own every memory that the RNN made, of its first --rnn_batch sequences, predicts
    what those sequences go on with, behind the encoder's first memory."""
    nets = encoder, decoder, rnn = networks()
    x, y = sequences(n=7)
    got = losses(nets, horizon=horizon, xy=(x, y), decode_own=True, rnn_batch=2, first=1.0)
    label = encoder(x, TIMES)
    one_step = torch.stack([rnn.update(label[:2, i], x[:2, t], torch.full((2,), t))
                            for i, t in enumerate(TIMES.tolist()[1:])], dim=1)
    rows = [(b, label[b]) for b in range(7)]
    kinds = [one_step] if horizon == 1 else [one_step, rollout_by_hand(nets, x[:2])[0]]
    rows += [(b, torch.cat([label[b, :1], made[b]])) for made in kinds for b in range(2)]
    first, nats, targets = [], 0.0, 0
    for b, m in rows:
        for i, t in enumerate(TIMES.tolist()):
            first.append(cross_entropy(decoder(m[i:i + 1])[:, 0], y[b, t:t + 1]))
            logits = decoder(m[i:i + 1], x[b:b + 1, t + 1:t + 4], torch.tensor([t]))[0]
            future = y[b, t:t + 4]
            nats += F.cross_entropy(logits[:len(future)], future, reduction="sum")
            targets += len(future)
    assert torch.allclose(got["first"], torch.stack(first).mean(), atol=1e-5)
    assert torch.allclose(got["futures"], nats / targets, atol=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_the_decoders_gradient_crosses_one_update_at_most(detach):
    """L_dec at t = 6 teaches the memory m_6 and, through the one update that made it, m_5; no
    memory before, and with --detach_rnn m_6 alone."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    y = y.masked_fill(torch.arange(T) != 6, -1)
    m = encoder(x, TIMES).detach().requires_grad_()
    losses((lambda *_: m, decoder, rnn), xy=(x, y), horizon=len(TIMES), decode_own=True, first=1.0,
           futures=0, lambda_dyn=0.0, lambda_unif=0.0, detach_rnn=detach)["loss"].backward()
    moved = [int(t) for t, g in zip(TIMES, m.grad.abs().sum((0, 2, 3))) if g > 0]
    assert moved == ([6] if detach else [5, 6])
    assert rnn.updater.blocks[0].w_qkv.weight.grad.abs().sum() > 0


def test_the_rnn_learns_on_its_part_of_the_batch():
    """Sequences behind --rnn_batch change nothing about L_dyn, those before do."""
    nets = networks()
    x, y = sequences(n=5)
    before = losses(nets, xy=(x, y), rnn_batch=2, horizon=len(TIMES))["dyn"]
    for b, same in ((0, False), (1, False), (2, True), (4, True)):
        other = x.clone()
        other[b, 1:] = (x[b, 1:] + 1) % 5
        after = losses(nets, xy=(other, y), rnn_batch=2, horizon=len(TIMES))["dyn"]
        assert torch.allclose(before, after, atol=1e-6) == same


def test_curriculum_of_the_horizon():
    """It never shrinks, starts short, and is the whole at 80 % of the run; never longer than
    that."""
    h = [smt.horizon_at(p / 100, 144) for p in range(101)]
    assert h[0] == 4 and h == sorted(h) and h[80] == h[100] == 144
    assert [smt.horizon_at(p, n) for n in (1, 3) for p in (0.0, 0.5, 1.0)] == [1] * 3 + [3] * 3


def test_the_teacher_alone_is_the_objective_without_the_rnn():
    """Before --rnn_from the loss is Eq. 5 without Eq. 3, and the RNN has no gradient."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    cfg = recipe(smt, **PAPER | dict(lambda_dyn=0.0, lambda_unif=0.4, first=0.5))
    alone = smt.teacher_alone(encoder, decoder, tiny.heads(), x, y, TIMES, cfg, gen())
    whole = losses((encoder, decoder, rnn), heads=tiny.heads(), lambda_dyn=0.0, lambda_unif=0.4,
                   first=0.5)
    assert all(torch.equal(alone[k], whole[k]) for k in alone)
    alone["loss"].backward()
    assert all(p.grad is not None for p in (*encoder.parameters(), *decoder.parameters()))
    assert all(p.grad is None for p in rnn.parameters())


# --------------------------------------------------------------------------------------- everything

@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
@pytest.mark.parametrize("rnn", ["transformer", "mlp", "gru"])
@pytest.mark.parametrize("sizes", [dict(mem_dim=M), dict(mem_dim=D), dict(mem_tokens=1)])
def test_everything_trains(kind, rnn, sizes):
    """A memory as wide as the streams or not, one token or two: every weight of encoder, decoder,
    updater and heads has a gradient."""
    nets = networks(encoder=kind, rnn=rnn, **sizes)
    heads = tiny.heads(**sizes)
    losses(nets, torch.arange(T), horizon=4, heads=heads, decode_own=True,
           first=1.0)["loss"].backward()
    for net in (nets[0], nets[1], nets[2].updater, heads):
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_masked_targets_and_tiny_batches_are_finite():
    """No target at all, one sequence, two times: every loss and every gradient stays finite."""
    x, y = sequences(n=1)
    nets, heads = networks(), tiny.heads(past=0)
    got = losses(nets, torch.tensor([0, 1]), 2, heads, (x, torch.full_like(y, -1)), first=0.5,
                 decode_own=True)
    got["loss"].backward()
    assert got["dec"] == 0 and all(torch.isfinite(v) for v in got.values())
    assert all(torch.isfinite(p.grad).all() for net in (*nets, heads) for p in net.parameters()
               if p.grad is not None)


@pytest.mark.parametrize("encoder", ["causal", "bidirectional"])
def test_checkpoint_holds_an_rnn_that_starts_alone(tmp_path, encoder):
    """At every checkpoint the RNN's m_0 is encode([BOS]) and its readout is the decoder."""
    smt.main(["--dataset", "retrieval", "--length", "6", "--d_model", "8", "--n_heads", "1",
              "--mem_tokens", "2", "--mem_dim", "6", "--steps", "3",
              "--encoder", encoder, "--ckpt_every", "2", "--eval_every", "0", "--threads", "1",
              "--out_dir", str(tmp_path)])
    for name in ("ckpt.pt", "best.pt"):
        ckpt = load_checkpoint(str(tmp_path / name))
        teacher, decoder, rnn = build(ckpt, "encoder", "decoder", "rnn")
        bos = torch.tensor([[teacher.c.vocab - 1]])
        assert torch.equal(rnn.m0, teacher(bos)[0, 0])
        assert all(torch.equal(a, b) for a,
                   b in zip(rnn.readout.state_dict().values(), decoder.state_dict().values()))
