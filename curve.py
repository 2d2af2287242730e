"""curve.png: what a run learnt, against minutes."""


def draw_curve(history: list[dict], file) -> None:
    """Training losses, and the validation numbers that share a unit, against minutes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    no_loss = "step", "seconds", "tokens", "layers", "lr", "grad"
    # Columns come in the order in which they were first logged; not all rows have all of them.
    losses = [k for k in dict.fromkeys(k for row in history for k in row)
              if k not in no_loss and not k.startswith("val_")]
    panels = {"training": losses,
              "validation loss": ["val_teacher", "val_one_step", "val_rollout"],
              "validation drift (1 - R²) and KL": ["val_drift", "val_one_step_drift", "val_kl"]}
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for ax, (title, names) in zip(axes, panels.items()):
        for name in names:
            points = [(r["seconds"] / 60, r[name]) for r in history if name in r]
            if points:
                ax.plot(*zip(*points), ".-", label=name.removeprefix("val_"))
        ax.set(title=title, xlabel="minutes")
        if ax.lines:
            ax.legend()
    fig.tight_layout()
    fig.savefig(file, dpi=90, format="png")
    plt.close(fig)
