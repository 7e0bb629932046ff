"""Draw the curves of results/*.json: pip install matplotlib && python results/plot.py

  drift.png    score against frame for the four histories of Table 2, from table-1.json
  rivals.png   the same for the nine rows of Table 1
  long.png     the same over 1,000 frames for the two models in results/, from long.json
  fig-6.png    score against the timestep shift s of self-resampling, from fig-6.json
  fig-7.png    score against frame with less and less history in sight, from fig-7.json

A solid line is the mean over the seeds, a band their standard deviation (rivals.png has none), and
a dashed line the same models on true history: the distance between the two is exposure bias.
Scores are averaged over SMOOTH frames.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, run_main
from results.evidence import (
    COLUMNS,
    RESULTS,
    means_and_errors,
    read_rows,
    scores_of,
    true_history_of,
)

TRAINED = 10  # frames of a training clip; 12 in fig-7.json
SMOOTH = 5
HISTORIES = {  # row of table-1.json: label, colour, marker, line width
    "nova": ("teacher forcing", "#d62728", "s", 1.4),
    "pyramid-flow": ("history noise", "#d68a00", "^", 1.4),
    "parallel": ("parallel resampling", "#3a76c4", "D", 1.4),
    "ours": ("resampling forcing", "#157f3b", "o", 2.4),
}
RIVALS = {  # the rows of Table 1
    "nova": ("teacher forcing", "#d62728", "s", 1.2),
    "pyramid-flow": ("history noise", "#d68a00", "^", 1.2),
    "skyreels": ("diffusion forcing", "#8c564b", "v", 1.2),
    "magi": ("pipelined diffusion forcing", "#7f7f7f", "<", 1.2),
    "causvid": ("DMD on real clips", "#e377c2", ">", 1.2),
    "self-forcing": ("DMD on rollouts", "#9467bd", "P", 1.2),
    "longlive": ("DMD on long rollouts", "#3a76c4", "D", 1.2),
    "ours-routed": ("resampling, routed", "#111111", "X", 2.0),
    "ours": ("resampling", "#157f3b", "o", 2.4),
}
MODELS = {  # row of long.json
    "teacher": HISTORIES["nova"],
    "resample": HISTORIES["ours"],
}
MEMORY = {  # row of fig-7.json
    "dense": ("all frames", "#157f3b", "o", 2.4),
    "top-5": ("routing, k = 5", "#3a76c4", "D", 1.4),
    "window-5": ("window of 5", "#d68a00", "^", 1.4),
    "top-1": ("routing, k = 1", "#9467bd", "P", 1.4),
    "window-1": ("window of 1", "#d62728", "s", 1.4),
}
BASELINES = {  # no model: the last given frame, copied; sprites that fly on through the walls
    "copy": ("frozen", ":"),
    "straight": ("straight on", (0, (1, 3))),
}


def smooth(curve, width):
    """Mean over `width` frames around each, fewer at the ends; nan is left out. curve (T,)."""
    seen = ~np.isnan(curve)
    box = np.ones(width)
    total = np.convolve(np.where(seen, curve, 0), box, "same")
    count = np.convolve(seen, box, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def draw_curves(
    plt, rows, styles, path, width=SMOOTH, alone=False, bands=True, trained=TRAINED, lowest=0
):
    """One panel for each metric: score against frame, smoothed over `width` frames.

    styles: as HISTORIES. alone: draw neither BASELINES nor the curves on true history. bands: draw
    the spread of the seeds. trained: frames of a training clip, for the mark. lowest: score at the
    bottom. Raises ValueError if a row is not measured.
    """
    baselines = {} if alone else BASELINES
    missing = [name for name in (*styles, *baselines) if name not in rows]
    if missing:
        raise ValueError(f"{path.name} needs the rows {', '.join(missing)}; run their script first")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), sharey=True)
    for axis, (metric, column) in zip(axes, COLUMNS.items()):
        for name, style in styles.items():
            draw_row(axis, rows[name], column, width, style, bands)
            on_truth = true_history_of(rows[name])
            if on_truth and not alone:
                curve = smooth(scores_of(on_truth).nanmean(0)[:, column].numpy(), width)
                axis.plot(curve, color=style[1], linewidth=0.9, linestyle="--")
        for name, (label, dashes) in baselines.items():
            curve = smooth(scores_of(rows[name])[0, :, column].numpy(), width)
            axis.plot(curve, color="#555555", linewidth=1, linestyle=dashes, label=label)

        axis.axvline(trained, color="#999999", linewidth=0.8)
        axis.set_title(metric, loc="left", fontsize=11)
        axis.set_xlabel("frame")
        axis.set_xlim(0, scores_of(rows[name]).shape[1] - 1)
        axis.set_ylim(lowest, 102)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelleft=True)
    axes[0].set_ylabel("score, 100 is perfect")
    if not alone and any(true_history_of(rows[name]) for name in styles):
        axes[0].plot([], [], color="#555555", linewidth=0.9, linestyle="--", label="true history")
    axes[0].text(trained, lowest + 7, " training clips end", fontsize=8, color="#777777")
    lines, labels = axes[0].get_legend_handles_labels()
    columns = len(lines) if len(lines) < 8 else 5
    figure.legend(lines, labels, loc="lower center", bbox_to_anchor=(0.5, 0.98),
                  ncols=columns, columnspacing=1.2, frameon=False, fontsize=9)  # fmt: skip
    save(figure, path)


def draw_row(axis, seeds, column, width, style, band):
    """Mean over the seeds, perhaps with its band."""
    label, colour, marker, thickness = style
    curves = [smooth(scores[:, column].numpy(), width) for scores in scores_of(seeds)]
    mean, spread = np.mean(curves, 0), np.std(curves, 0, ddof=min(1, len(curves) - 1))
    x = np.arange(len(mean))
    look = {"color": colour, "linewidth": thickness, "marker": marker, "markersize": 5}
    axis.plot(x, mean, label=label, markevery=len(x) // 5, **look)
    if band:
        low, high = mean - spread, mean + spread
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_shift(plt, rows, path):
    """Scores of the last third against s, with the standard errors of `means_and_errors`."""
    figure, axis = plt.subplots(figsize=(5, 3.2))
    names = sorted((name for name in rows if name.startswith("s-")), key=lambda s: float(s[2:]))
    shifts = [float(name[2:]) for name in names]
    means, errors = zip(*(means_and_errors(rows[name]) for name in names))
    for (metric, column), marker in zip(COLUMNS.items(), "os^"):
        mean, error = ([z[2, column] for z in parts] for parts in (means, errors))
        axis.errorbar(shifts, mean, error, marker=marker, capsize=3, label=metric)
    axis.set_xscale("log")
    axis.set_xticks(shifts, [f"{s:g}" for s in shifts])
    axis.minorticks_off()
    axis.set_xlabel("s of Eq. (7) for t_s; larger: more of the history is redrawn")
    axis.set_ylabel("score, last third of 100 frames")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def save(figure, path):
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
    print(path)


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: results/)")
    out = parser.parse_args(argv).out
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("plot.py needs `pip install matplotlib`") from None

    rows = {name: read_rows(RESULTS / f"{name}.json") for name in ("table-1", "long", "fig-7")}
    draw_curves(plt, rows["table-1"], HISTORIES, out / "drift.png")
    path = out / "rivals.png"
    draw_curves(plt, rows["table-1"], RIVALS, path, alone=True, bands=False, lowest=40)
    draw_curves(plt, rows["long"], MODELS, out / "long.png", 9 * SMOOTH)
    draw_shift(plt, read_rows(RESULTS / "fig-6.json"), out / "fig-6.png")
    draw_curves(plt, rows["fig-7"], MEMORY, out / "fig-7.png", alone=True, trained=12)


if __name__ == "__main__":
    run_main(main)
