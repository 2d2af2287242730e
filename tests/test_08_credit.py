"""Lesson: where gradients go. In SMT and DMT none crosses more than one update of the RNN; in BPTT
as many as allowed."""
import math

import pytest
import torch
from tiny import B, T, networks, recipe, sequences

import bptt
import dmt
import smt


def test_rollout_is_repeated_update():
    """The rollout's first step is one update from m_0, its k-th the k-th."""
    _, _, rnn = networks()
    x, _ = sequences()
    own, m = rnn.memories(x), rnn.start(B)
    assert torch.equal(own[:, 0], m)
    for t in range(1, T):
        m = rnn.update(m, x[:, t], torch.full((B,), t))
        assert torch.allclose(own[:, t], m, atol=1e-5)


def test_bptt_crosses_steps_and_truncation_cuts_them():
    """d loss_t / d m_s is not zero for full BPTT, and zero across a truncation point."""
    _, _, rnn = networks()
    x, y = sequences()
    _, m = bptt.objective(rnn, None, x[:, :4], y[:, :4], 0)
    losses, _ = bptt.objective(rnn, m, x[:, 4:], y[:, 4:], 4)
    assert torch.autograd.grad(losses["loss"], rnn.m0)[0].abs().sum() > 0
    _, m = bptt.objective(rnn, None, x[:, :4], y[:, :4], 0)
    losses, _ = bptt.objective(rnn, m.detach(), x[:, 4:], y[:, 4:], 4)
    assert torch.autograd.grad(losses["loss"], rnn.m0, allow_unused=True)[0] is None


def test_truncation_in_pieces_has_the_loss_of_the_whole():
    """The pieces' losses, weighted by their targets, add up to the loss of one full pass."""
    _, _, rnn = networks()
    x, y = sequences()
    y[0, :7] = -1
    whole = bptt.objective(rnn, None, x, y, 0)[0]["loss"]
    m, total = None, 0.0
    for t in range(0, T, 4):
        losses, m = bptt.objective(rnn, m, x[:, t:t + 4], y[:, t:t + 4], t)
        total = total + losses["loss"] * (y[:, t:t + 4] >= 0).sum() / (y >= 0).sum()
    assert torch.allclose(whole, total, atol=1e-5)


@pytest.mark.parametrize("recompute", [1, 3, T])
def test_recomputing_changes_nothing_but_memory(recompute):
    """Activations that are computed again in the backward pass give the loss and the gradients of
    those that were kept."""
    results = []
    for every in (0, recompute):
        _, _, rnn = networks()
        losses, m = bptt.objective(rnn, None, *sequences(), 0, every)
        losses["loss"].backward()
        results.append([losses["loss"], m,
                        *(p.grad for p in rnn.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def dmt_losses(rnn, encoder, decoder, x, y, own):
    labels = encoder(x, torch.arange(T))
    t = torch.tensor([3, 5, 8])
    b = torch.arange(B)
    x_fut, y_fut = x[:, 4:7], y[:, 3:7]
    return dmt.objective(decoder, rnn, own[b, t - 1], x[b, t], t, labels[b, t], x_fut, y_fut,
                         torch.ones(()), recipe(dmt))


def test_dmt_does_not_cross_a_step():
    """Even if somebody hands the objective memories with a graph, no gradient reaches an earlier
    step."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    own = rnn.memories(x)
    own.retain_grad()
    losses = dmt_losses(rnn, encoder, decoder, x, y, own)
    losses["loss"].backward()
    assert own.grad is None and rnn.m0.grad is None
    assert all(p.grad is not None for p in rnn.updater.blocks.parameters())


def test_dmt_leaves_the_teacher_alone():
    """Frozen networks have grad None, although the prediction-space loss goes through the frozen
    decoder."""
    encoder, decoder, rnn = networks()
    for p in (*encoder.parameters(), *decoder.parameters()):
        p.requires_grad_(False)
    x, y = sequences()
    own = dmt.own_memories(rnn, encoder(x, torch.arange(T)), x, 4, 1, "sequential", math.inf)
    dmt_losses(rnn, encoder, decoder, x, y, own)["loss"].backward()
    assert all(p.grad is None for p in (*encoder.parameters(), *decoder.parameters()))


@pytest.mark.parametrize("weights, updater, readout", [
    (dict(lambda_mse=1.0, lambda_dec=0.0), True, False),
    (dict(lambda_mse=0.0, lambda_dec=1.0), True, True),
    (dict(lambda_mse=0.0, detach_dec=True), False, True),
    (dict(lambda_mse=0.0, lambda_dec=0.0, lambda_kl=1.0), True, False)])
def test_what_each_loss_of_dmt_teaches(weights, updater, readout):
    """MSE and KL teach the updater alone; the future as the readout sees it teaches both, or the
    readout alone."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    labels = encoder(x, torch.arange(T)).detach()
    t, b = torch.tensor([3, 5, 8]), torch.arange(B)
    losses = dmt.objective(decoder, rnn, labels[b, t - 1], x[b, t], t, labels[b, t], x[:, 4:7],
                           y[:, 3:7], torch.ones(()),
                           recipe(dmt, **weights))
    losses["loss"].backward()
    moved = lambda net: sum(float(p.grad.abs().sum()) for p in net.parameters()
                            if p.grad is not None) > 0
    assert moved(rnn.updater) == updater and moved(rnn.readout) == readout


@pytest.mark.parametrize("detach", [False, True])
def test_joint_smt_shapes_the_encoder_and_detached_does_not(detach):
    """With the decoder's and the uniformity loss off, the encoder learns from L_dyn exactly when it
    is joint."""
    encoder, decoder, rnn = networks()
    x, y = sequences()
    cfg = recipe(smt, lambda_dec=0.0, lambda_unif=0.0, detach_rnn=detach)
    losses = smt.objective(encoder, decoder, rnn, x, y, torch.tensor([[0, 1, 2], [6, 7, 8]]), cfg,
                           torch.Generator())
    losses["loss"].backward()
    moved = encoder.registers.grad.abs().sum() > 0
    assert moved != detach
    assert rnn.updater.blocks[0].w_qkv.weight.grad.abs().sum() > 0
    # SMT copies these, it does not train them
    assert rnn.readout.head.weight.grad is None and rnn.m0.grad is None


def test_detached_smt_is_the_decoders_loss_alone():
    """What shapes the encoder of detached SMT is L_dec on its own memories, whatever the RNN
    does."""
    grads = []
    for changes in (dict(detach_rnn=True, decode_own=0.9, lambda_dyn=5.0),
                    dict(detach_rnn=False, decode_own=0.0, lambda_dyn=0.0)):
        encoder, decoder, rnn = networks()
        cfg = recipe(smt, lambda_unif=0.0, **changes)
        times = torch.tensor([[0, 1, 2], [6, 7, 8]])
        smt.objective(encoder, decoder, rnn, *sequences(), times, cfg,
                      torch.Generator())["loss"].backward()
        grads.append([p.grad for p in encoder.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))
