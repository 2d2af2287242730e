"""How all figures look: one set of colours that the colour-blind can tell apart, readable at 800
pixels.

    fig, axes = style.panels(3, "T", "nats")
    axes[0].plot(.., **style.of("dmt"))
    style.save(fig, path)
"""
import matplotlib
matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt  # noqa: E402
import matplotlib.ticker as ticker  # noqa: E402
import numpy as np  # noqa: E402

from sources.files import written_whole  # noqa: E402

# Okabe and Ito's colours; every method has a marker of its own as well.
METHODS = {
    "bptt": ("BPTT", "#D55E00", "s"),
    "bptt-heads": ("BPTT + heads", "#AA4499", ">"),
    "teacher": ("teacher", "#999999", "^"),
    "smt": ("SMT", "#56B4E9", "o"),
    "dmt": ("SMT → DMT", "#0072B2", "D"),
    "dmt-span1": ("SMT → DMT, span 1", "#009E73", "v"),
    "dmt-papers": ("SMT → DMT, the paper's", "#009E73", "v"),
    "dmt-mse0": ("SMT → DMT, no Eq. 6", "#CC79A7", "P"),
    "walk": ("DMT alone, no Eq. 6", "#661100", "d"),
    "dmt-past0": ("SMT → DMT, no past", "#882255", "<"),
    "truncated": ("BPTT, truncated", "#E69F00", "X"),
    "smt+truncated": ("SMT → BPTT, truncated", "#44AA99", "h"),
    "smt+bptt": ("SMT → BPTT", "#000000", "*"),
    "smt+dmt+bptt": ("SMT → DMT → BPTT", "#332288", "p"),
    "walk+bptt": ("DMT alone, no Eq. 6 → BPTT", "#661100", "d"),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442",
           "#999999", "#882255")
MAP = "cividis"
plt.rcParams.update({
    "figure.dpi": 110, "savefig.dpi": 110, "font.size": 10, "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "legend.fontsize": 8.5, "legend.frameon": False, "lines.linewidth": 1.8,
    "lines.markersize": 5.5, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)})


def of(method: str) -> dict:
    """Label, colour and marker of a method, for plot()."""
    label, colour, marker = METHODS[method]
    return dict(label=label, color=colour, marker=marker)


def panels(columns: int, x: str = "", y: str = "", rows: int = 1, height: float = 3.2, **how):
    """A figure of about 8 inches and its axes, (columns,) or (rows, columns), with labels."""
    fig, axes = plt.subplots(rows, columns, figsize=(8.2, height * rows), squeeze=False,
                             layout="constrained", **how)
    for ax in axes.flat:
        ax.set(xlabel=x)
    for row in axes:
        row[0].set(ylabel=y)
    return fig, axes[0] if rows == 1 else axes


def pictures(ax, images: np.ndarray, columns: int, title: str = "") -> None:
    """images (n, H, W) in 0..1, 1 = ink, on a page of `columns` a row."""
    n, H, W = images.shape
    rows = -(-n // columns)
    page = np.full((rows * (H + 2), columns * (W + 2)), 0.12)
    for i, image in enumerate(images):
        top, left = i // columns * (H + 2) + 1, i % columns * (W + 2) + 1
        page[top:top + H, left:left + W] = image
    ax.imshow(page, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def plain_log(ax) -> None:
    """Plain numbers on a logarithmic y axis, which may span less than a power of ten: 1, 2, 5, 10
    .., more of them where it is short, fewer where it is long; none between the powers on x."""
    low, high = ax.get_ylim()
    subs = (1, 2, 3, 4, 5, 6, 8) if high < 5 * low else (1, 2, 5) if high < 2000 * low else (1,)
    ax.yaxis.set_major_locator(ticker.LogLocator(10, subs=subs))
    ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(ticker.NullFormatter())


def save(fig, path: str) -> None:
    """Raises UserError where it cannot be written."""
    with written_whole(path) as f:
        fig.savefig(f, format="png")
    plt.close(fig)
