"""Lesson: where gradients go. In SMT none crosses more than one update of the RNN, in DMT one span,
in BPTT as many as allowed. The span of the whole sequence is BPTT: they are one family."""
import pytest
import tiny
import torch
from tiny import B, T, gen, networks, recipe, sequences

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


def bptt_loss(rnn, m, x, y, t, n, heads=None, **changes):
    """bptt.py's loss of the times t .. t + n - 1, and the last memory."""
    cfg = recipe(bptt, **changes)
    own = bptt.unroll(rnn, m, x[:, t:t + n], t, cfg.recompute)
    return bptt.objective(rnn, heads, own, x, y, t, cfg, gen())["loss"], own[:, -1]


def test_bptt_crosses_steps_and_truncation_cuts_them():
    """d loss_t / d m_s is not zero for full BPTT, and zero across a truncation point."""
    _, _, rnn = networks()
    x, y = sequences()
    m = bptt.unroll(rnn, None, x[:, :4], 0)[:, -1]
    loss, _ = bptt_loss(rnn, m, x, y, 4, T - 4)
    assert torch.autograd.grad(loss, rnn.m0, retain_graph=True)[0].abs().sum() > 0
    loss, _ = bptt_loss(rnn, m.detach(), x, y, 4, T - 4)
    assert torch.autograd.grad(loss, rnn.m0, allow_unused=True)[0] is None


def test_truncation_in_pieces_has_the_loss_of_the_whole():
    """The pieces' losses, weighted by their targets, add up to the loss of one full pass."""
    _, _, rnn = networks()
    x, y = sequences()
    y[0, :7] = -1
    whole, _ = bptt_loss(rnn, None, x, y, 0, T)
    m, total = None, 0.0
    for t in range(0, T, 4):
        loss, m = bptt_loss(rnn, m, x, y, t, 4)
        total = total + loss * (y[:, t:t + 4] >= 0).sum() / (y >= 0).sum()
    assert torch.allclose(whole, total, atol=1e-5)


@pytest.mark.parametrize("last", [1, 5])
def test_bptt_reads_out_what_is_asked(last):
    """Where only the last times have a target no other memory is decoded: BPTT does not pay for
    what SMT and DMT leave out. Each target counts once, so the loss is their mean."""
    _, _, rnn = networks()
    x, y = sequences()
    y[:, :-last] = -1
    own, seen = bptt.unroll(rnn, None, x, 0), []
    whole = bptt.objective(rnn, None, own, x, y, 0, recipe(bptt), gen())["loss"]
    rnn.readout.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    for seed in range(5):
        few = bptt.objective(rnn, None, own, x, y, 0, recipe(bptt), gen(seed), last / T)["loss"]
        assert torch.allclose(few, whole, atol=1e-5)
    assert seen == 5 * [B * last]


def test_bptt_may_decode_a_part_and_guess_the_rest():
    """With --first and --lambda_heads BPTT asks what SMT and DMT ask: its loss is the heads' plus,
    in the mean over draws, the loss of all outputs, whose gradient still crosses all updates."""
    _, _, rnn = networks()
    x, y = sequences()
    heads, cfg = tiny.heads(past=0), recipe(bptt, first=0.25, lambda_heads=0.5)
    own = bptt.unroll(rnn, None, x, 0)
    whole, g = bptt_loss(rnn, None, x, y, 0, T)[0], gen(1)
    parts = [bptt.objective(rnn, heads, own, x, y, 0, cfg, g) for _ in range(400)]
    first = torch.stack([p["first"] for p in parts]).mean()
    assert torch.allclose(first, whole, rtol=0.05)
    assert torch.allclose(parts[0]["loss"], parts[0]["first"] + 0.5 * parts[0]["heads"])
    assert torch.autograd.grad(parts[0]["loss"], rnn.m0)[0].abs().sum() > 0


@pytest.mark.parametrize("recompute", [1, 3, T])
def test_recomputing_changes_nothing_but_memory(recompute):
    """Activations that are computed again in the backward pass give the loss and the gradients of
    those that were kept."""
    results = []
    for every in (0, recompute):
        _, _, rnn = networks()
        loss, m = bptt_loss(rnn, None, *sequences(), 0, T, recompute=every)
        loss.backward()
        results.append([loss, m,
                        *(p.grad for p in rnn.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def dmt_losses(nets, own, b, t, heads=None, y=None, **changes):
    encoder, _, rnn = nets
    x, given = sequences()
    cfg = recipe(dmt, **dict(first=1.0) | changes)
    starts = torch.arange(T).expand(B, T)  # span i of a sequence begins at i
    walk = dmt.Walk(x, given if y is None else y, encoder(x).detach(), starts, b, t, own[b, t - 1])
    return dmt.objective(rnn, heads, walk, torch.ones(()), cfg, gen())[0]


@pytest.mark.parametrize("span", [1, 3, T - 1])
def test_dmt_crosses_exactly_one_span(span):
    """What is predicted after the last update of a span reaches the memory that the span started
    from, and no other, even if somebody hands the objective memories with a graph."""
    nets = networks()
    own = nets[2].memories(sequences()[0]).detach().requires_grad_()
    b, t = torch.arange(B), torch.tensor([1, 3, 6]).clamp(max=T - span)
    y = torch.full((B, T), -1)
    y[b, t + span - 1] = 2
    dmt_losses(nets, own, b, t, y=y, span=span, lambda_mse=0.0)["loss"].backward()
    reached = own.grad.abs().sum((2, 3)) > 0
    expected = torch.zeros(B, T, dtype=torch.bool)
    expected[b, t - 1] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("span", [1, 3])
def test_a_span_is_so_many_updates(span, monkeypatch):
    """All spans at once: the updater is called once for each update of a span."""
    nets = networks()
    calls, update = [], nets[2].next_memory
    monkeypatch.setattr(nets[2], "next_memory", lambda m, *a: calls.append(len(m)) or update(m, *a))
    own = torch.randn(B, T, tiny.K, tiny.M)
    dmt_losses(nets, own, torch.arange(B), torch.tensor([1, 3, 6]), span=span)
    assert calls == [B] * span


def test_the_longest_span_is_bptt():
    """A span of T - 1 updates from m_0 that has to predict and nothing else has the loss and the
    gradients of BPTT, for updater and readout alike."""
    grads = []
    for method in ("dmt", "bptt"):
        nets = _, _, rnn = networks()
        x, y = sequences()
        y[:, 0] = -1  # what m_0 predicts is no matter of updates
        if method == "dmt":
            own = rnn.memories(x).detach()
            start = torch.ones(B, dtype=torch.int64)
            losses = dmt_losses(nets, own, torch.arange(B), start, y=y, span=T - 1, lambda_mse=0.0,
                                lambda_dec=1.0)
        else:
            losses = dict(loss=bptt_loss(rnn, None, x, y, 0, T)[0])
        losses["loss"].backward()
        parameters = [*rnn.updater.parameters(), *rnn.readout.parameters()]
        grads.append([losses["loss"], *(p.grad for p in parameters if p.grad is not None)])
    assert len(grads[0]) > 10
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_dmt_leaves_the_teacher_alone():
    """Frozen networks have grad None: labels and own memories are made without a graph."""
    nets = encoder, decoder, rnn = networks()
    for p in (*encoder.parameters(), *decoder.parameters(), rnn.m0):
        p.requires_grad_(False)
    cfg = recipe(dmt, span=3)
    walk = dmt.begin(sequences(), encoder, rnn, 4, cfg, gen())
    dmt.objective(rnn, tiny.heads(), walk, torch.ones(()), cfg, gen())[0]["loss"].backward()
    assert all(p.grad is None for p in (*encoder.parameters(), *decoder.parameters(), rnn.m0))
    assert all(p.grad is not None for p in rnn.updater.parameters())


@pytest.mark.parametrize("weights, updater, readout, heads", [
    (dict(lambda_mse=1.0, lambda_dec=0.0), True, False, False),
    (dict(lambda_mse=0.0, lambda_dec=1.0), True, True, True),
    (dict(lambda_mse=0.0, detach_dec=True), False, True, True)])
def test_what_each_loss_of_dmt_teaches(weights, updater, readout, heads):
    """The MSE teaches the updater alone; predictions teach those who make them too, or those
    alone."""
    nets, guess = networks(), tiny.heads()
    own = nets[0](sequences()[0]).detach()
    losses = dmt_losses(nets, own, torch.arange(B), torch.tensor([3, 5, 8]), guess, span=2,
                        **weights)
    losses["loss"].backward()
    moved = lambda net: sum(float(p.grad.abs().sum()) for p in net.parameters()
                            if p.grad is not None) > 0
    assert [moved(net) for net in (nets[2].updater, nets[2].readout, guess)] \
        == [updater, readout, heads]


def smt_grads(seed=0, heads=None, horizon=4, **changes):
    """What one step of SMT sends to encoder and updater; the RNN's weights come from `seed`."""
    encoder, decoder, _ = networks()
    rnn = networks(seed)[2]
    cfg = recipe(smt, **dict(first=1.0, futures=1000, rnn_batch=0) | changes)
    smt.objective(encoder, decoder, rnn, heads, *sequences(), torch.arange(T), horizon, cfg,
                  gen())["loss"].backward()
    # SMT copies these, it does not train them
    assert rnn.readout.head.weight.grad is None and rnn.m0.grad is None
    return [[p.grad for p in net.parameters()] for net in (encoder, rnn.updater)]


def same(a, b):
    return all(torch.allclose(g, h, atol=1e-6) for g, h in zip(a, b, strict=True))


@pytest.mark.parametrize("changes", [dict(lambda_dec=0.0), dict(lambda_dyn=0.0)])
def test_joint_smt_shapes_the_encoder(changes):
    """What reaches the encoder depends on the RNN, through L_dyn and through the predictions from
    what the RNN made."""
    assert not same(smt_grads(0, **changes)[0], smt_grads(1, **changes)[0])


def test_detached_smt_does_not():
    """With --detach_rnn neither does: the encoder's gradient is the same whatever RNN there is,
    L_dyn alone sends none; the updater learns as before."""
    mine, other = (smt_grads(seed, detach_rnn=True, lambda_dyn=5.0) for seed in (0, 1))
    assert same(mine[0], other[0]) and not same(mine[1], other[1])
    alone, updater = smt_grads(detach_rnn=True, lambda_dec=0.0, lambda_unif=0.0)
    assert all(g is None or (g == 0).all() for g in alone)
    assert sum(g.abs().sum() for g in updater) > 0


def test_detached_smt_is_the_decoders_loss_alone():
    """With nothing that the RNN made to read, the encoder of detached SMT learns as if there were
    no RNN."""
    paper = dict(decode_own=False, lambda_unif=0.0, horizon=1)
    detached = smt_grads(detach_rnn=True, lambda_dyn=5.0, **paper)[0]
    assert same(detached, smt_grads(detach_rnn=False, lambda_dyn=0.0, **paper)[0])


def test_recalling_the_past_needs_no_long_gradient():
    """Random symbols, a gradient that crosses one update: who shall say what it has read last, and
    could before, learns to keep it for four updates (guessing: log 5 = 1.6)."""
    _, _, rnn = networks(rnn="gru", heads=0)
    heads = tiny.heads(heads=0)
    adam = torch.optim.Adam([*rnn.updater.parameters(), *heads.parameters()], lr=0.02)
    cfg, starts = recipe(dmt, span=1, lambda_mse=0.0, first=0.0), torch.arange(T).expand(64, T)
    b, t = torch.arange(64).repeat_interleave(T - 1), torch.arange(1, T).repeat(64)
    for step in range(300):
        x, y = sequences(step, 64)
        own = rnn.memories(x).detach()
        walk = dmt.Walk(x, y, own, starts, b, t, own[b, t - 1])
        losses, _ = dmt.objective(rnn, heads, walk, torch.ones(()), cfg, gen())
        losses["loss"].backward()
        adam.step()
        adam.zero_grad()
    own = rnn.memories(sequences(999, 64)[0])[:, tiny.P:]  # alone, on sequences never seen
    oldest = heads.recall(own.flatten(0, 1))[:, -1]
    said = sequences(999, 64)[0][:, 1:T - tiny.P + 1]
    assert torch.nn.functional.cross_entropy(oldest, said.flatten()) < 0.4
