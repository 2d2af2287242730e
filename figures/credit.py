"""Figures 10 and 11: how credit travels back in time, without and with backpropagation."""
import torch
import torch.nn.functional as F

import data
from figures import style
from figures.nets import opened
from figures.runs import Job, Lab, scores, table, train
from losses import cross_entropy, futures
from model import RNN, UPDATERS, Decoder, Encoder, ModelConfig

# ----------------------------------------------------------------------------------------- Fig. 10

T, STEPS, LOOKS = 16, 4000, (25, 50, 100, 150, 200, 300, 400, 800)
# The paper's objective: transitions from the encoder's memories alone, futures alone. Networks and
# optimiser are ours (causal encoder, timestamps, Muon, averaged weights). Small: 20 ms a step.
PLAIN = dict(dataset="retrieval", length=T, symbols=4, rnn="mlp", rnn_layers=1, d_model=32,
             mem_tokens=2, batch_size=32, heads=0, first=0.0, horizon=1, decode_own=False,
             rnn_batch=0, rnn_from=0.0, futures=512, lambda_fut=1.0, lambda_dyn=1.0, n_val=500,
             eval_every=0)
KINDS = dict(joint="dmt", detached="bptt")  # -> whose colour


def credit_job(kind: str, Tf: int, steps: int, seed: int) -> Job:
    """SMT, nothing after it. At a rate that stays a run of 400 steps is the beginning of one of
    800: a look at it on its way. That costs as much again, and needs no code that looks into a
    run."""
    return Job(f"credit-{kind}-{Tf}-{steps}-{seed}", "smt", 0, PLAIN | dict(
        detach_rnn=kind == "detached", fut_len=Tf, steps=steps, seed=seed,
        decay=0.05 if steps == STEPS else 1.0))


def fig10(lab: Lab) -> tuple[str, str]:
    """SMT alone on retrieval, joint and detached, over Tf: nats of the rollout; and how far back
    from the question the encoder's memory holds the needle while SMT with Tf = 1 learns."""
    seeds = lab.seeds or ((0,) if lab.quick else (0, 1))
    jobs = [credit_job(kind, Tf, STEPS, seed) for seed in seeds for kind in KINDS
            for Tf in lab.few((1, 4, T), 2)]
    jobs += [credit_job(kind, 1, n, seeds[0]) for kind in KINDS for n in lab.few(LOOKS, 2)]

    rows = table(lab, lambda: credit_rows(lab, jobs))
    fig, (left, *maps) = style.panels(3, height=3.4)
    end = {}  # (kind, Tf) -> nats of each seed
    for r in rows:
        if r["steps"] == STEPS:
            end.setdefault((r["kind"], r["Tf"]), []).append(r["rollout"])
    for ax, (kind, method) in zip(maps, KINDS.items()):
        at = [(Tf, max(v, 1e-9)) for (k, Tf), of in end.items() if k == kind for v in of]
        left.plot(*zip(*at), ls="", **style.of(method) | dict(label=kind))  # of every seed
        image = held_map(ax, kind, [r for r in rows if r["kind"] == kind and r["steps"] < STEPS])
    left.set(xscale="log", yscale="log", xlabel="Tf", ylabel="nats (0 is at 1e-9)",
             title=f"the RNN alone, {STEPS:,} steps", xticks=[1, 4, T])
    left.set_xticklabels(["1", "4", str(T)])
    left.minorticks_off()
    left.legend()
    maps[0].set_ylabel("steps of SMT")
    fig.colorbar(image, ax=maps, label="needle read off the encoder's m_t")
    style.save(fig, lab.out("fig10.png"))
    solved = {k: max(v) < 0.1 for k, v in end.items()}
    good = ("detached", 1) in solved and all(v == (kind == "joint" or Tf == T)
                                             for (kind, Tf), v in solved.items())
    return "rollout after SMT, nats: " + ", ".join(
        f"{kind} Tf = {Tf} " + " and ".join(f"{v:.2g}" for v in of)
        for (kind, Tf), of in end.items()), \
        "agrees" if good else "disagrees" if not solved["joint", 1] else "open"


def credit_rows(lab: Lab, jobs: list[Job]):
    """CSV rows: nats of a run, and what its encoder's memory holds at every time."""
    got = scores(lab, train(lab, jobs), 1000)
    for job in jobs:
        if s := got.get(job.name):
            _, kind, Tf, steps, seed = job.name.split("-")
            held = dict(enumerate(needle_held(lab, job.name)))
            yield dict(kind=kind, Tf=int(Tf), steps=int(steps), seed=int(seed)) | \
                {k: s[k] for k in ("teacher", "one_step", "rollout", "drift")} | \
                {f"held_{t}": v for t, v in held.items()}


def held_map(ax, kind: str, rows: list[dict]):
    """How far back the memory holds the needle, a row for each length of SMT. Returns the image."""
    rows = sorted(rows, key=lambda r: r["steps"])
    held = [[r[k] for k in r if k.startswith("held_")] for r in rows]
    times = T // 2 + 0.5, T - 0.5, len(rows) - 0.5, -0.5    # held_0 is that of t = T / 2 + 1
    image = ax.imshow(held, aspect="auto", cmap=style.MAP, vmin=0.25, vmax=1, extent=times)
    ax.set(title=f"{kind}, Tf = 1", xlabel="t", yticks=range(len(rows)))
    ax.set_yticklabels([r["steps"] for r in rows])
    ax.grid(False)
    return image


@torch.no_grad()
def needle_held(lab: Lab, name: str, n: int = 1500) -> list[float]:
    """For each t of the second half, where every needle has been read: the share of test sequences
    whose needle a linear map reads off the encoder's m_t. The map is fitted by least squares on
    validation sequences."""
    task, encoder = opened(lab, name, "encoder")
    n = 40 if lab.quick else n
    (x, y), (x_test, y_test) = ((h["x"], h["y"][:, -1]) for h in
                                (task.held_out("val", n), task.held_out("test", n)))
    m, m_test = encoder(x).flatten(2), encoder(x_test).flatten(2)
    one_hot, out = F.one_hot(y, task.n_out).double(), []
    for t in range(task.T // 2 + 1, task.T):
        a, b = (torch.cat([v[:, t], torch.ones(len(v), 1)], 1).double() for v in (m, m_test))
        ridge = 1e-2 * len(a) * torch.eye(a.shape[1]).double()
        fitted = torch.linalg.solve(a.T @ a + ridge, a.T @ one_hot)
        out.append(float(((b @ fitted).argmax(1) == y_test).double().mean()))
    return out


# ----------------------------------------------------------------------------------------- Fig. 11

B, SCALES = 16, (0.5, 1.0, 2.0, 4.0)


def lengths(grads: list[torch.Tensor]) -> list[float]:
    """Mean over sequences of the gradient's norm, one number a time; undoes the mean over the
    batch."""
    return [float(g.flatten(1).norm(dim=1).mean()) * B for g in grads]


def bptt_gradients(rnn: RNN, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """|dL/dm_t| for t = 1 .. T - 1; L is the loss of the answer at the last step."""
    m, own = rnn.start(B), []
    for t in range(1, x.shape[1]):
        m = rnn.update(m, x[:, t], torch.full_like(x[:, t], t))
        own.append(m)
    return lengths(torch.autograd.grad(cross_entropy(rnn.logits(m), y[:, -1]), own))


def smt_gradients(encoder: Encoder, decoder: Decoder, rnn: RNN, x: torch.Tensor, y: torch.Tensor,
                  lambda_dyn: float = 0.3) -> list[float]:
    """|dL/dm_t| for t = 1 .. T - 1; L is Eq. 5 with a term for each t, so m_t is one network away
    from it."""
    memories = [v.detach().requires_grad_() for v in encoder(x).unbind(1)]
    loss, b = 0.0, torch.arange(B)
    for t in range(1, x.shape[1]):
        when = torch.full((B,), t)
        x_fut, y_fut = futures(x, y, b, when, x.shape[1])
        made = rnn.update(memories[t - 1], x[:, t], when)
        loss = loss + cross_entropy(decoder(memories[t], x_fut, when), y_fut) + \
            lambda_dyn * F.mse_loss(made, memories[t])
    return lengths(torch.autograd.grad(loss, memories[1:]))


def scaled_networks(task: data.Data, rnn: str, scale: float) -> tuple:
    """(encoder, decoder, rnn) as they are initialised, the updater's matrices times `scale`. Output
    layers are drawn: at zero, as training starts, they would pass no gradient at all."""
    torch.manual_seed(0)
    c = ModelConfig(task.vocab, task.n_out, task.T, ctx_len=task.T, fut_len=task.T, rnn=rnn)
    encoder, decoder, net = Encoder(c), Decoder(c), RNN(c)
    with torch.no_grad():
        for part in (decoder, net.readout):
            part.head.weight.normal_(std=c.d_model ** -0.5)
        for p in net.updater.parameters():
            if p.ndim == 2:
                p *= scale
    return encoder, decoder, net


def fig11(lab: Lab) -> tuple[str, str]:
    """|dL/dm_t| against t on retrieval, at initialisation, of BPTT and of SMT."""
    if lab.plan:
        return "", ""
    task = data.load("retrieval", length=12 if lab.quick else 64)
    x, y = task.batch(B, torch.Generator().manual_seed(0))

    def measure():
        for name in UPDATERS:
            for scale in SCALES:
                encoder, decoder, rnn = scaled_networks(task, name, scale)
                got = dict(bptt=bptt_gradients(rnn, x, y),
                           smt=smt_gradients(encoder, decoder, rnn, x, y))
                for method, g in got.items():
                    for t, v in enumerate(g, 1):
                        yield dict(rnn=name, method=method, scale=scale, t=t, gradient=v)

    ratio = draw_gradients(table(lab, measure), lab.out("fig11.png"))
    span = {m: [v for (_, k, _), v in ratio.items() if k == m] for m in ("bptt", "smt")}
    wild = {rnn for (rnn, m, _), v in ratio.items() if m == "bptt" and not 1 / 30 < v < 30}
    flat = max(span["smt"]) < 30 and min(span["smt"]) > 1 / 30
    return "gradient at m_1 over that at m_T: " + ", ".join(
        f"{m.upper()} {min(v):.2g} to {max(v):.2g}" for m, v in span.items()) + \
        f"; BPTT's vanishes or explodes with {len(wild)} of {len(UPDATERS)} updaters", \
        "agrees" if flat and len(wild) == len(UPDATERS) else "open"


def draw_gradients(rows: list[dict], path: str) -> dict:
    """A panel for each updater -> (updater, method, scale) -> gradient at m_1 over that at m_T."""
    fig, axes = style.panels(3, "t", "|∂L/∂m_t|", sharey=True)
    ratio = {}
    for ax, name in zip(axes, UPDATERS):
        for method, dash in (("bptt", "-"), ("smt", "--")):
            for scale, colour in zip(SCALES, style.COLOURS):
                g = [r["gradient"] for r in rows
                     if (r["rnn"], r["method"], r["scale"]) == (name, method, scale)]
                ratio[name, method, scale] = g[0] / max(g[-1], 1e-30)
                ax.semilogy(range(1, len(g) + 1), g, dash, color=colour)
        ax.set(title=name, ylim=(1e-6, None))
    lines = [axes[0].plot([], [], color=c, label=f"weights × {s:g}")[0]
             for s, c in zip(SCALES, style.COLOURS)] + \
        [axes[0].plot([], [], dash, color="0.4", label=name)[0]
         for name, dash in (("BPTT", "-"), ("SMT", "--"))]
    fig.legend(handles=lines, loc="outside lower center", ncols=6)
    style.save(fig, path)
    return ratio
