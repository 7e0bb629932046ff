"""Draw the curves of results/*.json, all or some.

  pip install matplotlib && python results/plot.py
  python results/plot.py long drift

  long.png     four histories over 1,000 frames, from long.json
  drift.png    the same over 100 frames, with the distance to the truth, from sprites.json
  rivals.png   the nine rows of Table 1, from sprites.json
  fig-6.png    scores against the timestep shift s of self-resampling, from sprites.json
  fig-7.png    scores with less and less history in sight, from hidden.json

Drawn are the seeds that all rows of a picture have: a solid line is their mean, a band their
standard deviation (rivals.png has none), and a dashed line the same models on true history: the
distance between the two is exposure bias.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, run_main
from results.evidence import (
    AGAINST_TRUTH,
    COLUMNS,
    RESULTS,
    label_of,
    means_and_errors,
    paired,
    read_rows,
    scores_of,
    true_history_of,
)

PANELS = {  # title: column of the scores
    "Temporal": COLUMNS["Temporal"],
    "Visual": COLUMNS["Visual"],
    "Text": COLUMNS["Text"],
    "sprites still there, %": AGAINST_TRUTH["still there"],
    "median distance to the truth, pixels": AGAINST_TRUTH["distance"],
}
HISTORIES = {  # row: colour, marker, line width
    "teacher-forcing": ("#d62728", "s", 1.4),
    "history-noise": ("#d68a00", "^", 1.4),
    "parallel-resampling": ("#3a76c4", "D", 1.4),
    "resampling-forcing": ("#157f3b", "o", 2.4),
}
RIVALS = {  # the rows of Table 1
    "teacher-forcing": ("#d62728", "s", 1.2),
    "history-noise": ("#d68a00", "^", 1.2),
    "diffusion-forcing": ("#8c564b", "v", 1.2),
    "pipelined-diffusion-forcing": ("#7f7f7f", "<", 1.2),
    "DMD-on-real-clips": ("#e377c2", ">", 1.2),
    "DMD-on-rollouts": ("#9467bd", "P", 1.2),
    "DMD-on-long-rollouts": ("#3a76c4", "D", 1.2),
    "routed-resampling": ("#111111", "X", 2.0),
    "resampling-forcing": ("#157f3b", "o", 2.4),
}
SHIFTS = {0.1: "s-0.1", 0.6: "resampling-forcing", 1: "s-1", 3: "s-3"}  # s of Fig. 6: row
MEMORY = {  # rows of hidden.json
    "dense": ("#157f3b", "o", 2.4),
    "top-5": ("#3a76c4", "D", 1.4),
    "window-5": ("#d68a00", "^", 1.4),
    "window-1": ("#d62728", "s", 1.4),
}


def smooth(curve, width):
    """Mean over `width` frames around each, fewer at the ends; nan is left out. curve (T,)."""
    seen = ~np.isnan(curve)
    box = np.ones(width)
    total = np.convolve(np.where(seen, curve, 0), box, "same")
    count = np.convolve(seen, box, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def draw_curves(plt, rows, path, styles, panels, smoothed=5, trained=10, bands=True):
    """Score against frame, a panel for each of `panels`, names of PANELS.

    styles: as HISTORIES. smoothed: frames in a running mean. trained: frames of a training clip,
    for the mark. bands: draw the spread of the seeds. Raises ValueError if a row is not measured.
    """
    rows = paired_rows(rows, styles, path)
    figure, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 3.3))
    for axis, panel in zip(axes, panels):
        column = PANELS[panel]
        for name, style in styles.items():
            draw_row(axis, rows[name], column, smoothed, name, style, bands)
            on_truth = true_history_of(rows[name])
            if on_truth and column in COLUMNS.values() and bands:
                curve = smooth(scores_of(on_truth).nanmean(0)[:, column].numpy(), smoothed)
                axis.plot(curve, color=style[0], linewidth=0.9, linestyle="--")

        axis.axvline(trained, color="#999999", linewidth=0.8)
        axis.set_title(panel, loc="left", fontsize=11)
        axis.set_xlabel("frame")
        axis.set_xlim(0, scores_of(rows[name]).shape[1])
        axis.set_ylim(0, None if panel.endswith("pixels") else 102)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].text(trained, 5, " training clips end", fontsize=8, color="#777777")
    lines, labels = axes[0].get_legend_handles_labels()
    columns = len(lines) if len(lines) < 6 else 5
    figure.legend(lines, labels, loc="lower center", bbox_to_anchor=(0.5, 0.98),
                  ncols=columns, columnspacing=1.2, frameon=False, fontsize=9)  # fmt: skip
    save(figure, path)


def paired_rows(rows, names, path):
    """The rows of `names`, of the seeds that all have. Raises ValueError if one is not measured."""
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(f"{path.name} needs the rows {', '.join(missing)}; run their script first")
    return paired({name: rows[name] for name in names})


def draw_row(axis, seeds, column, width, name, style, band):
    """Mean over the seeds, perhaps with its band."""
    colour, marker, thickness = style
    curves = [smooth(scores[:, column].numpy(), width) for scores in scores_of(seeds)]
    mean, spread = np.mean(curves, 0), np.std(curves, 0, ddof=min(1, len(curves) - 1))
    x = np.arange(len(mean))
    look = {"color": colour, "linewidth": thickness, "marker": marker, "markersize": 5}
    axis.plot(x, mean, label=label_of(name), markevery=len(x) // 5, **look)
    if band:
        axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def draw_shift(plt, rows, path):
    """Scores of the last third against s, with the standard errors of `means_and_errors`."""
    rows = paired_rows(rows, SHIFTS.values(), path)
    figure, axis = plt.subplots(figsize=(5, 3.2))
    means, errors = zip(*map(means_and_errors, rows.values()))
    for (metric, column), marker in zip(COLUMNS.items(), "os^"):
        mean, error = ([z[2, column] for z in parts] for parts in (means, errors))
        axis.errorbar(list(SHIFTS), mean, error, marker=marker, capsize=3, label=metric)
    axis.set_xscale("log")
    axis.set_xticks(list(SHIFTS), [f"{s:g}" for s in SHIFTS])
    axis.minorticks_off()
    axis.set_xlabel("s of Eq. (7) for t_s; larger: more of the history is redrawn")
    axis.set_ylabel("score, last third of 100 frames")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def pyplot():
    """Matplotlib, an extra. Raises ValueError where it is missing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("to draw this, `pip install matplotlib`") from None
    return plt


def save(figure, path):
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
    print(path)


def main(argv):
    parser = Parser(__doc__, "%(prog)s [NAME ...] [flags]")
    names = [*PICTURES, []]  # argparse looks for the empty list, too, where none is given
    parser.add_argument("names", nargs="*", choices=names, metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: results/)")
    args = parser.parse_args(argv)
    plt = pyplot()
    for name in args.names or PICTURES:
        draw, source, options = PICTURES[name]
        draw(plt, read_rows(RESULTS / f"{source}.json"), args.out / f"{name}.png", **options)


METRICS, (THERE, DISTANCE) = list(COLUMNS), list(PANELS)[3:]
PICTURES = {  # how to draw it, from which JSON
    "long": (draw_curves, "long",
             {"styles": HISTORIES, "panels": [THERE, "Temporal"], "smoothed": 45}),
    "drift": (draw_curves, "sprites",
              {"styles": HISTORIES, "panels": [*METRICS, THERE, DISTANCE]}),
    "rivals": (draw_curves, "sprites",
               {"styles": RIVALS, "panels": ["Temporal", "Text", THERE], "bands": False}),
    "fig-6": (draw_shift, "sprites", {}),
    "fig-7": (draw_curves, "hidden",
              {"styles": MEMORY, "panels": ["Temporal", "Text"], "trained": 12}),
}  # fmt: skip


if __name__ == "__main__":
    run_main(main)
