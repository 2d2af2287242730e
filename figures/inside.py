"""Figures 14, 19, 21, 22 and 23: what the RNN's own memories look like."""
import gzip
import math

import numpy as np
import torch

from figures import races, style
from figures.nets import opened, pca, tsne
from figures.runs import Lab, both, scores, table, train
from sources.files import find_file
from sources.images import MIRRORS

DIGITS = "race14-gru-dmt-0"  # the run that figures 19 to 23 look into


def digit_jobs() -> list:
    """DIGITS and what it starts from."""
    return [job for job in races.race_jobs("race14", (0,), ("gru",), extra=False)
            if job.script != "bptt"]


def digit_memories(lab: Lab, n: int):
    """(task, x (n, T), own memories (n, T, K d)) of test images, by DIGITS."""
    train(lab, digit_jobs())
    task, rnn = opened(lab, DIGITS, "rnn")
    x = task.held_out("test", n)["x"]
    with torch.no_grad():  # not above: with --quick the training happens in this process
        return task, x, rnn.memories(x).flatten(2)


def classes(lab: Lab, task, n: int) -> list[int]:
    """Digits of the first n test images of MNIST. Of toy pictures nobody knows them: 0, 1, 2 .."""
    if task.name != "mnist":
        return [i % 10 for i in range(n)]
    path = find_file(lab.data_dir, "mnist", "t10k-labels-idx1-ubyte.gz", MIRRORS)
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
        return list(f.read()[8:8 + n])  # behind the header: magic number and count


def fig14(lab: Lab) -> tuple[str, str]:
    """Memories of three numbers. They are normalised, so they lie on a sphere: a map of it is a
    picture in two dimensions that leaves nothing out; two numbers would leave a circle."""
    small = dict(mem_tokens=1, mem_dim=3, rnn="mlp")
    tasks = dict(retrieval=dict(dataset="retrieval", length=16, symbols=3) | small,
                 copy=dict(dataset="copy", length=9, symbols=2) | small)
    jobs = {k: both(f"small-{k}", f, (1.5, 1.0)) for k, f in tasks.items()}

    def measure():
        done = train(lab, sum(jobs.values(), []))
        for what, (_, dmt) in jobs.items():
            if dmt.name in done:
                yield from small_memories(lab, what, dmt.name)

    rows = table(lab, measure)
    fig, axes = style.panels(2, height=4.4)
    for ax, what in zip(axes, tasks):
        draw_states(ax, [row for row in rows if row["task"] == what])
        ax.set_title(f"{what}: what the RNN has read", y=0.97)
    style.save(fig, lab.out("fig14.png"))
    loss = {row["task"]: row["excess"] for row in rows}
    counts = {what: states(rows, what) for what in loss}
    good = all(v < 0.05 for v in loss.values()) and all(
        a < b for a, b in zip(counts["retrieval"], counts["copy"]))
    return "groups of memories that lie " + ", ".join(map(str, APART)) + " of the radius apart: " \
        + "; ".join(f"{k} {', '.join(map(str, counts[k]))} ({e:.3f} nats over the optimum)"
                    for k, e in loss.items()), "agrees" if good else "open"


def draw_states(ax, rows: list[dict]) -> None:
    """Memories as points, a colour for what was read, and an arrow wherever an update changed
    that: the automaton, or the tree, that the RNN has become."""
    places = sphere_map([(row["longitude"], row["latitude"]) for row in rows])
    of, steps = {}, set()
    for row, place in zip(rows, places):
        of.setdefault(row["read"], []).append(place)
    for a, b in zip(rows, rows[1:]):
        if b["t"] == a["t"] + 1 and a["read"] != b["read"]:
            steps.add((a["read"], b["read"]))
    middle = {read: np.mean(at, axis=0) for read, at in of.items()}
    first = sorted({read[0] for read in of if read not in NOTHING})
    colour = lambda read: "0.4" if read in NOTHING else style.COLOURS[first.index(read[0])]
    deep = lambda read: 0 if read in NOTHING else len(read)
    for a, b in sorted(steps):
        ax.annotate("", middle[b], middle[a], zorder=0, arrowprops=dict(
            arrowstyle="-|>", color=colour(b), lw=2.4 / deep(b), alpha=0.5, shrinkA=2, shrinkB=2))
    for read, at in of.items():
        ax.scatter(*zip(*at), s=36 / (1 + deep(read)), color=colour(read), alpha=0.6, lw=0)
        if deep(read) < 3:  # the others follow the arrows
            ax.annotate(read, middle[read], textcoords="offset points", xytext=(6, 5), fontsize=9,
                        bbox=dict(color="white", alpha=0.7, pad=0.5))
    ax.set_aspect("equal", adjustable="datalim")
    ax.axis("off")


NOTHING = "no needle", "nothing"
# How many states there are depends on what counts as two: several distances, not the best one.
APART = 0.05, 0.1, 0.2, 0.3


def states(rows: list[dict], what: str) -> list[int]:
    """Groups of memories for each of APART; of retrieval where every needle has been read."""
    mine = [r for r in rows if r["task"] == what]
    late = max(r["t"] for r in mine) // 2 + 1 if what == "retrieval" else 0
    a, b = torch.tensor([(r["longitude"], r["latitude"]) for r in mine if r["t"] >= late]).T
    places = torch.stack([b.cos() * a.cos(), b.cos() * a.sin(), b.sin()], dim=1)
    return [clusters(places, apart) for apart in APART]


def sphere_map(places: list[tuple[float, float]]) -> np.ndarray:
    """Points of a sphere (longitude, latitude) on a flat map (n, 2) that keeps areas: Lambert's,
    centred on their mean. Only what lies opposite to it is torn apart."""
    a, b = np.array(places).T
    v = np.stack([np.cos(b) * np.cos(a), np.cos(b) * np.sin(a), np.sin(b)], axis=1)
    turn = np.linalg.qr(np.c_[v.mean(0), np.eye(3)[:, :2]])[0]  # the mean becomes the first axis
    v = v @ (turn * np.sign(v.mean(0) @ turn[:, 0]))
    return v[:, 1:] * np.sqrt(2 / np.maximum(1 + v[:, :1], 1e-9))


@torch.no_grad()
def small_memories(lab: Lab, what: str, name: str):
    """CSV rows: where the memories lie on the sphere, and what has been read."""
    task, rnn = opened(lab, name, "rnn")
    x, excess = task.held_out("test", 60)["x"], scores(lab, [name])[name]["excess"]
    m = rnn.memories(x)[:, :, 0] / math.sqrt(3)                                 # (n, T, 3)
    half = task.T // 2
    for i in range(len(x)):
        for t in range(1, task.T - 1) if what == "retrieval" else range(half + 1):
            if what == "retrieval":
                marker = (x[i, :t] == task.bos - 1).nonzero()
                read = "abcdefgh"[x[i, marker[0, 0] + 1]] if len(marker) else "no needle"
            else:
                read = "".join("abcdefgh"[v] for v in x[i, 1:t + 1]) or NOTHING[1]
            a, b, c = m[i, t].tolist()
            yield dict(task=what, t=t, read=read, longitude=math.atan2(b, a),
                       latitude=math.asin(max(-1.0, min(1.0, c))), excess=excess)


def clusters(m: torch.Tensor, apart: float) -> int:
    """How many groups the points m (..., 3) form if points closer than `apart` are one group."""
    left, count = m.reshape(-1, m.shape[-1]).double(), 0
    while len(left):
        inside = torch.zeros(len(left), dtype=torch.bool)
        inside[0], before = True, 0
        while int(inside.sum()) > before:
            before = int(inside.sum())
            inside |= (torch.cdist(left, left[inside]) < apart).any(1)
        left, count = left[~inside], count + 1
    return count


def fig19(lab: Lab) -> tuple[str, str]:
    """The memory after every pixel as a colour: three principal components are red, green and
    blue."""
    n = 2 if lab.quick else 8

    def measure():
        task, x, m = digit_memories(lab, 40 if not lab.quick else 4)
        parts, shares = pca(m.flatten(0, 1), 3)
        rgb = (0.5 + parts.clamp(-2, 2) / 4).view(*m.shape[:2], 3)
        y = task.held_out("test", n)["y"]
        for i in range(n):
            for t in range(task.T):
                yield dict(image=i, t=t, ink=int(y[i, t]), share=sum(shares)) | \
                    dict(zip("rgb", rgb[i, t].tolist()))

    rows = table(lab, measure)
    side, n = math.isqrt(1 + rows[-1]["t"]), 1 + rows[-1]["image"]
    fig, axes = style.panels(n, rows=2, height=1.2)
    for i in range(n):
        mine = [row for row in rows if row["image"] == i]
        colours = np.array([[row[k] for k in "rgb"] for row in mine]).reshape(side, side, 3)
        ink = np.array([row["ink"] for row in mine]).reshape(side, side)
        axes[0][i].imshow(ink, cmap="gray_r")
        axes[1][i].imshow(colours)
        for ax in axes[:, i]:
            ax.axis("off")
    fig.suptitle("test images, and the RNN's memory after each of their pixels: three principal "
                 "components are red, green and blue", fontsize=9)
    style.save(fig, lab.out("fig19.png"))
    return f"three components hold {rows[0]['share']:.0%} of the variance of the memories", "open"


def fig21(lab: Lab) -> tuple[str, str]:
    """Trajectories of the memory of a few digits, after every row of pixels, on two principal
    components."""
    n = 2 if lab.quick else 6

    def measure():
        task, x, m = digit_memories(lab, 40 if not lab.quick else 4)
        parts, shares = pca(m.flatten(0, 1), 2)
        digits = classes(lab, task, n)
        for i in range(n):
            for t, (a, b) in enumerate(parts.view(*m.shape[:2], 2)[i].tolist()):
                yield dict(image=i, digit=digits[i], t=t, first=a, second=b, share=sum(shares))

    rows = table(lab, measure)
    fig, axes = style.panels(1, "first principal component", "second", height=4.2)
    side = math.isqrt(1 + rows[-1]["t"])
    for i in range(1 + rows[-1]["image"]):
        mine = [row for row in rows if row["image"] == i]
        # from pixel to pixel they run to and fro, as all do in a row; from row to row they part
        at = [(row["first"], row["second"]) for row in mine if (row["t"] + 1) % side == 0]
        axes[0].plot(*zip(*at), ".-", lw=1.2, color=style.COLOURS[i])
        axes[0].plot(*at[0], "o", color="k")
        axes[0].text(*at[-1], mine[0]["digit"], fontsize=13, weight="bold",
                     color=style.COLOURS[i], ha="center", va="center",
                     bbox=dict(color="white", alpha=0.8, pad=1))
    axes[0].set_title("the memory after each row of a picture, from ● to the digit that it was",
                      fontsize=10)
    style.save(fig, lab.out("fig21.png"))
    return f"two components hold {rows[0]['share']:.0%} of the variance", "open"


def by_class(lab: Lab, axis: str, way) -> tuple[str, str]:
    """Final memories in two dimensions, every one drawn as the digit that it has read; is the
    nearest neighbour of the same class? way (N, D) -> (N, 2)."""
    def measure():
        n = 20 if lab.quick else 1000
        task, x, m = digit_memories(lab, n)
        digits = torch.tensor(classes(lab, task, n))
        flat = way(m[:, -1])
        for digit, (a, b), right in zip(digits.tolist(), flat.tolist(),
                                        same_class(flat, digits)):
            yield dict(digit=digit, first=a, second=b, right=int(right))

    rows = table(lab, measure)
    fig, axes = style.panels(1, f"{axis} 1", f"{axis} 2", height=4.6)
    for digit in range(10):
        at = [(row["first"], row["second"]) for row in rows if row["digit"] == digit]
        if at:
            axes[0].scatter(*zip(*at), s=26, lw=0, marker=f"${digit}$",
                            color="#B8A000" if digit == 7 else style.COLOURS[digit])
    axes[0].set(xticks=[], yticks=[])
    style.save(fig, lab.out(f"{lab.name}.png"))
    share = sum(row["right"] for row in rows) / len(rows)
    return f"{share:.0%} of the points have a nearest neighbour of their class (chance 10 %)", \
        "agrees" if share > 0.5 else "disagrees"


def same_class(m: torch.Tensor, digits: torch.Tensor) -> list[bool]:
    """Is the nearest other memory of m (N, D) one of the same class?"""
    apart = torch.cdist(m, m).fill_diagonal_(torch.inf)
    return (digits[apart.argmin(1)] == digits).tolist()


def fig22(lab: Lab) -> tuple[str, str]:
    return by_class(lab, "principal component", lambda m: pca(m, 2)[0])


def fig23(lab: Lab) -> tuple[str, str]:
    return by_class(lab, "t-SNE", lambda m: tsne(m, steps=20 if lab.quick else 500))
