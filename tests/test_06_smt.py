"""Lesson: Eq. 2-5, term by term, and what an SMT checkpoint owes to whoever runs the RNN alone."""
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import B, D, K, T, networks, recipe, sequences

import smt
from model import build, cross_entropy, load_checkpoint


def losses(x, y, times, **changes):
    return smt.objective(*networks(), x, y, times, recipe(smt, **changes),
                         torch.Generator().manual_seed(0))


def test_objective_against_a_loop():
    """L_dec and L_dyn equal the paper's equations written as loops over sequences and times."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    times = torch.tensor([[0, 1, 2], [7, 8, 9]])
    got = losses(x, y, times, chain=0.0, decode_own=0.0)
    nats, targets, square, count = 0.0, 0, 0.0, 0
    for run in times.tolist():
        for t in run:
            m = encoder(x[:, :t + 1], torch.tensor([t]))[:, 0]
            logits = decoder(m, x[:, t + 1:t + 4], torch.full((B,), t))
            future = y[:, t:t + 4]
            nats += F.cross_entropy(logits[:, :future.shape[1]].flatten(0, 1), future.flatten(),
                                    reduction="sum")
            targets += future.numel()
            if t > run[0]:
                guess = rnn.update(before, x[:, t], torch.full((B,), t))
                square += (guess - m).square().sum()
                count += m.numel()
            before = m
    assert torch.allclose(got["dec"], nats / targets, atol=1e-5)
    assert torch.allclose(got["dyn"], square / count, atol=1e-5)
    c = recipe(smt)
    total = c.lambda_dec * got["dec"] + c.lambda_dyn * got["dyn"] + c.lambda_unif * got["unif"]
    assert torch.allclose(got["loss"], total)


def test_chain_follows_the_rnn():
    """With chain = 1 every transition after a run's first starts from the RNN's own memory, without
    its graph."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    got = losses(x, y, torch.tensor([[2, 3, 4, 5]]), chain=1.0)
    m, errors = encoder(x, torch.tensor([2]))[:, 0], []
    for t in (3, 4, 5):
        m = rnn.update(m, x[:, t], torch.full((B,), t))
        errors.append((m - encoder(x, torch.tensor([t]))[:, 0]).square().mean())
    assert torch.allclose(got["dyn"], torch.stack(errors).mean(), atol=1e-5)


def test_chained_pairs_do_not_pull_at_the_encoder():
    """Only the first pair of a chained run has a gradient to the encoder: the labels m_4, m_5 are
    fixed targets."""
    x, y = sequences()
    grads = []
    for times in ([[2, 3, 4, 5]], [[2, 3]]):
        encoder, decoder, rnn = networks()
        cfg = recipe(smt, chain=1.0, lambda_dec=0.0, lambda_unif=0.0)
        smt.objective(encoder, decoder, rnn, x, y, torch.tensor(times), cfg,
                      torch.Generator())["dyn"].backward()
        grads.append(encoder.registers.grad * (len(times[0]) - 1))
    assert torch.allclose(*grads, atol=1e-5) and grads[0].abs().sum() > 0


def test_decoder_reads_what_the_rnn_made():
    """With decode_own = 1 the decoder predicts from the updater's outputs, except at a run's first
    time."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    got = losses(x, y, torch.tensor([[2, 3, 4, 5]]), chain=1.0, decode_own=1.0)
    m, nats = encoder(x, torch.tensor([2]))[:, 0], 0.0
    for t in (2, 3, 4, 5):
        if t > 2:
            m = rnn.update(m, x[:, t], torch.full((B,), t))
        nats += cross_entropy(decoder(m, x[:, t + 1:t + 4], torch.full((B,), t)), y[:, t:t + 4])
    assert torch.allclose(got["dec"], nats / 4, atol=1e-5)


@pytest.mark.parametrize("target, reaches", [(3, True), (5, False)])
def test_the_decoders_gradient_crosses_one_update_at_most(target, reaches):
    """L_dec at t teaches the updater that made m_t, and the encoder's memory before it if that was
    its input; no more."""
    encoder, decoder, rnn = networks(fut_len=1)
    x, y = sequences()
    y = y.masked_fill(torch.arange(T) != target, -1)
    cfg = recipe(smt, chain=1.0, decode_own=1.0, lambda_dyn=0.0, lambda_unif=0.0)
    smt.objective(encoder, decoder, rnn, x, y, torch.tensor([[2, 3, 4, 5]]), cfg,
                  torch.Generator())["loss"].backward()
    assert rnn.updater.blocks[0].w_qkv.weight.grad.abs().sum() > 0
    assert (encoder.registers.grad.abs().sum() > 0) == reaches


def test_uniformity():
    """Eq. 4 is 0 for a collapsed memory, lower when spread; equal to the definition on all pairs;
    never above 0."""
    gen = torch.Generator().manual_seed(0)
    assert smt.uniformity(torch.ones(6, K, D), gen).abs() < 1e-5
    m = torch.randn(200, K, D)
    value = smt.uniformity(m, gen, most=100_000)
    unit = F.normalize(m.flatten(0, 1), dim=-1)
    pairs = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert abs(value - pairs) < 0.05 and value < -2
    shrunk = torch.ones(D) + 0.01 * m
    assert value < smt.uniformity(shrunk, gen) < 1e-5


def test_times_cover_both_ends():
    """Runs are consecutive, inside the sequence, and reach t = 0 and t = T - 1 as often as the
    middle."""
    gen = torch.Generator().manual_seed(0)
    times = torch.cat([smt.sample_times(T, 4, 3, gen) for _ in range(2000)])
    assert (times[:, 1:] - times[:, :-1] == 1).all() and times.min() == 0 and times.max() == T - 1
    share = torch.bincount(times.flatten(), minlength=T) / times.numel()
    assert share.min() > 0.5 / T
    assert smt.sample_times(2, 3, 5, gen).shape == (3, 2)  # a sequence shorter than a run


def test_masked_targets_and_tiny_batches_are_finite():
    """No target at all, one sequence, one run: every loss and every gradient stays finite."""
    x, y = sequences(n=1)
    nets = networks()
    got = smt.objective(*nets, x, torch.full_like(y, -1), torch.tensor([[0, 1]]), recipe(smt),
                        torch.Generator())
    got["loss"].backward()
    assert got["dec"] == 0 and all(torch.isfinite(v) for v in got.values())
    assert all(torch.isfinite(p.grad).all() for net in nets for p in net.parameters()
               if p.grad is not None)
    assert cross_entropy(torch.randn(2, 3, 5), torch.full((2, 3), -1)) == 0


def test_first_loss_is_uniform():
    """Untrained, the decoder predicts every symbol with equal probability."""
    from model import Decoder, Encoder, RNN
    from tiny import V, config
    x, y = sequences()
    c = config()
    got = smt.objective(Encoder(c), Decoder(c), RNN(c), x, y, torch.tensor([[1, 2]]), recipe(smt),
                        torch.Generator())
    assert abs(got["dec"] - math.log(V)) < 1e-5


@pytest.mark.parametrize("encoder", ["causal", "bidirectional"])
def test_checkpoint_holds_an_rnn_that_starts_alone(tmp_path, encoder):
    """At every checkpoint the RNN's m_0 is encode([BOS]) and its readout is the decoder."""
    smt.main(["--dataset", "retrieval", "--length", "6", "--d_model", "8", "--n_heads", "1",
              "--mem_tokens", "2", "--steps", "3",
              "--encoder", encoder, "--ckpt_every", "2", "--eval_every", "0", "--threads", "1",
              "--out_dir", str(tmp_path)])
    for name in ("ckpt.pt", "best.pt"):
        ckpt = load_checkpoint(str(tmp_path / name))
        teacher, decoder, rnn = build(ckpt, "encoder", "decoder", "rnn")
        bos = torch.tensor([[teacher.c.vocab - 1]])
        assert torch.equal(rnn.m0, teacher(bos, torch.tensor([0]))[0, 0])
        assert all(torch.equal(a, b) for a,
                   b in zip(rnn.readout.state_dict().values(), decoder.state_dict().values()))
