"""Measure runs on held-out sprites, and redraw the tables and strips of the two README files.

  python results/evidence.py measure results/table-1.json runs/table-1/*
  python results/evidence.py time results/table-1.json runs/table-1/*
  python results/evidence.py baselines results/table-1.json
  python results/evidence.py strip results/table-1.png runs/table-1/*-0
  python results/evidence.py tables

measure    continue held-out clips with each run's own sampler, and write the scores of every frame
           into a JSON file, by the run's name, NAME-SEED. A run whose weights were measured before
           is skipped, so that a killed command goes on; other weights of that name replace it
time       add what a new frame costs, all runs in turn in one process
baselines  score the truth, a copy of the last given frame, and sprites that go straight on
strip      draw a clip of each measured run below one another
tables     rewrite what stands between <!-- KIND FILE: NAMES --> and <!-- end --> in README.md and
           results/README.md from results/FILE.json. KIND is one of TABLES. NAMES are the rows, all
           if left out; NAME=LABEL shows another name

The JSON is {name: {seed: measured}}; see `measure_run`. T frames.
"""

import hashlib
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Sprites, paint
from data import measure as measure_video
from results.rivals import GUIDANCE, ROLLOUTS, SAMPLE_SHIFT, STEPS, plain_rollout, window_of
from sample import (
    GIVEN,
    bounded_int,
    contact_sheet,
    evaluate,
    load_run,
    measure_sampler,
    new_parser,
    positive_int,
    run_main,
    samples_folder,
    standard_error,
    write_json,
    write_picture,
)
from train import read_entry

COLUMNS = {"Temporal": 1, "Visual": 0, "Text": 2}  # of data.measure's scores
COSTS = {"minutes": 1, "teacher_minutes": 1, "passes": 2, "milliseconds": 1}  # and digits shown
RESULTS = Path(__file__).resolve().parent
PAGES = (RESULTS.parent / "README.md", RESULTS / "README.md")
MARKED = re.compile(
    r"(?P<mark><!-- (?P<kind>\w+) (?P<file>[\w-]+)(: (?P<rows>[\w. =-]+?))? -->)"
    r"\n.*?<!-- end -->",
    re.DOTALL,
)
ROUNDS = 5  # of timing
KEPT = 4  # clips of a run, for the strip


# ---- measure ----


class Counted:
    """A network that counts its forward passes of one video, the two of guidance as two."""

    def __init__(self, net):
        self.net = net
        self.config = net.config
        self.run = net.run
        self.cache = net.cache
        self.passes = 0

    def __call__(self, x, *args, **options):
        self.passes += len(x)  # guidance runs both branches in one batch
        return self.net(x, *args, **options)


def load_sampled(run):
    """A run's network, and its sampler, roll_out(net, given, c, frames, seed).

    Raises ValueError for a run of longer chunks.
    """
    net = load_run(run)
    if net.config.chunk != 1:
        raise ValueError(f"{run}: wanted a run with --chunk 1")
    return net, ROLLOUTS.get(net.run.get("method"), plain_rollout)


def measure_run(run, net, roll_out, frames, videos, true_history):
    """Continue held-out clips of `load_sampled` by the run's own sampler, from GIVEN true frames.

    Returns a dictionary: weights, their fingerprint; videos; frames (T, 3), the scores of each
    frame, mean over the videos; errors (4, 3), the standard errors over the videos of the three
    thirds and of the whole; true_history (T, 3) or None, each frame predicted from true ones;
    minutes of this run's training, without those of a run it started from; teacher_minutes, those
    of the teacher of a distilled run. Keeps the first clips in the run's samples/ for `strip`.
    """
    flags = net.run

    def continue_clips(truth, c, seed):
        given = truth[:, :GIVEN]
        return torch.cat([given, *roll_out(net, given, c, frames, seed)], dim=1)

    truth, made, scores = measure_sampler(net, frames, videos, continue_clips)
    path = samples_folder(run) / "measured.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, truth=truth[:KEPT].half().numpy(), made=made[:KEPT].half().numpy())

    on_truth = None
    if true_history:
        sampler = (STEPS, SAMPLE_SHIFT, GUIDANCE, window_of(net))
        _, _, on_truth = evaluate(net, frames, videos, *sampler, true_history=True)

    return {
        "weights": fingerprint(net),
        "videos": videos,
        "frames": rounded(scores.nanmean(0)),
        "errors": rounded(standard_errors(scores)),
        "true_history": None if on_truth is None else rounded(on_truth.nanmean(0)),
        "minutes": minutes_of(run, flags),
        "teacher_minutes": minutes_of(flags["teacher"]) if flags.get("teacher") else 0,
    }


def fingerprint(net):
    """Hash of a network's weights, twelve digits."""
    content = b"".join(weight.numpy().tobytes() for weight in net.state_dict().values())
    return hashlib.sha256(content).hexdigest()[:12]


def rounded(scores):
    """Scores as lists with two decimals; what was not measured is None."""
    return [[None if z != z else round(z, 2) for z in row] for row in scores.tolist()]


def standard_errors(scores):
    """Standard errors over the videos (4, 3) of scores (B, T, 3): three thirds and the whole."""
    edges = third_edges(scores.shape[1])
    parts = [scores[:, start:end].nanmean(1) for start, end in edges]
    return torch.stack([standard_error(part) for part in parts])


def third_edges(T):
    """First and last + 1 frame of the three thirds of T frames, and of the whole."""
    a, b = round(T / 3), round(2 * T / 3)
    return [(0, a), (a, b), (b, T), (0, T)]


def minutes_of(run, flags=()):
    """Minutes of training of a run; of a rival that began with another rival, of both.

    None for weights of pack.py, which have no log.
    """
    if "method" in flags:
        before = load_run(flags["init"]).run
        earlier = minutes_of(flags["init"], before) if "method" in before else 0
        return round(flags["minutes"] + earlier, 6)
    log = Path(run) / "log.jsonl"
    if not log.is_file():
        return None
    entries = filter(None, map(read_entry, log.read_text().splitlines()))
    seconds = sum(e.get("seconds", 0) + e.get("data_seconds", 0) for e in entries)
    return round(seconds / 60, 6)


def measure(args):
    read_rows_of_length(args.file, args.frames)
    for run in args.runs:
        name, seed = split_name(run)
        net, roll_out = load_sampled(run)
        if args.true_history and "method" in net.run:
            raise ValueError(f"{run}: --true-history goes with runs of train.py")
        known = read_rows(args.file).get(name, {}).get(seed, {})
        if not args.again and is_measured(known, fingerprint(net), args):
            continue
        measured = measure_run(run, net, roll_out, args.frames, args.videos, args.true_history)
        rows = read_rows(args.file)  # another process may have added a run
        rows.setdefault(name, {})[seed] = measured
        write_json(args.file, {name: dict(sorted(rows[name].items())) for name in sorted(rows)})
    print(thirds_table(read_rows(args.file)))


def is_measured(known, weights, args):
    """Whether `known`, a run in the file or {}, is what these weights and flags would give."""
    return (
        known.get("weights") == weights
        and known["videos"] == args.videos
        and (known["true_history"] is not None or not args.true_history)
    )


def time_runs(args, frames=32):
    """Time a new frame of one video with each run in turn, ROUNDS times; keep the shortest.

    Writes passes, forward passes of a new frame (guidance counts as two), and milliseconds.
    """
    samplers = {run: load_sampled(run) for run in args.runs}
    shortest = dict.fromkeys(args.runs, float("inf"))
    passes = {}
    for _ in tqdm(range(ROUNDS), "rounds", dynamic_ncols=True):
        for run, (net, roll_out) in samplers.items():
            counted = Counted(net)
            clip = Sprites(net.run["size"], GIVEN, 0, "test", net.run["objects"])
            truth, c = default_collate([clip[0]])
            began = time.perf_counter()
            new = len(list(roll_out(counted, truth, c, frames, seed=0)))
            milliseconds = 1000 * (time.perf_counter() - began) / new
            shortest[run] = min(shortest[run], milliseconds)
            passes[run] = counted.passes / new

    rows = read_rows(args.file)
    for run in args.runs:
        name, seed = split_name(run)
        if seed not in rows.get(name, {}):
            raise ValueError(f"{args.file} has no {run}; evidence.py measure writes it")
        cost = {"passes": round(passes[run], 2), "milliseconds": round(shortest[run], 1)}
        rows[name][seed] |= cost
    write_json(args.file, rows)
    print(costs_table({name: rows[name] for name, _ in map(split_name, args.runs)}))


def baseline_videos(test, count):
    """{name: videos (count, T, 3, size, size)} of what needs no model."""
    frame = torch.arange(test.frames)
    videos = {"truth": [], "copy": [], "straight": []}
    for i in range(count):
        colour, shape, at = test.scene(i)
        truth, _ = test[i]
        straight = at[:1] + frame[:, None, None] * (at[1] - at[0])
        videos["truth"].append(truth)
        videos["copy"].append(truth[frame.clamp(max=GIVEN - 1)])
        videos["straight"] += paint(
            straight[None], shape[None, None], colour[None, None], test.size
        )
    return {name: torch.stack(clips) for name, clips in videos.items()}


def baselines(args):
    """Score the truth, the last given frame repeated, and the given motion without bounces."""
    test = Sprites(args.size, args.frames, 0, "test")
    captions = [test.caption(i) for i in range(args.videos)]
    rows = read_rows_of_length(args.file, args.frames)
    for name, made in baseline_videos(test, args.videos).items():
        scores = measure_video(made, captions)
        rows[name] = {
            "0": {
                "videos": args.videos,
                "frames": rounded(scores.nanmean(0)),
                "errors": rounded(standard_errors(scores)),
            }
        }
    write_json(args.file, rows)
    print(thirds_table(rows))


def split_name(run):
    """A run's folder NAME-SEED as (NAME, SEED), weights NAME.pt as (NAME, 0). Raises ValueError."""
    if Path(run).suffix == ".pt":
        return Path(run).stem, "0"
    match = re.fullmatch(r"(.+)-(\d+)", Path(run).name)
    if not match:
        raise ValueError(f"{run}: wanted a folder whose name ends with its seed, as in ours-0")
    return match.groups()


def read_rows(path):
    """The runs measured so far, {name: {seed: measured}}. Raises ValueError for another file."""
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text("utf-8"))
        for seeds in rows.values():
            for measured in seeds.values():
                measured["frames"], measured["errors"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of measured runs ({error!r})") from None
    return rows


def read_rows_of_length(path, frames):
    """`read_rows`, of which each must have `frames` frames. Raises ValueError."""
    rows = read_rows(path)
    lengths = {len(measured["frames"]) for seeds in rows.values() for measured in seeds.values()}
    if lengths - {frames}:
        raise ValueError(
            f"{path} holds runs of {max(lengths)} frames; --frames {frames} needs another file"
        )
    return rows


# ---- tables ----


def scores_of(seeds):
    """The scores (seeds, T, 3) of {seed: measured}."""
    return torch.stack([unrounded(measured["frames"]) for measured in seeds.values()])


def unrounded(rows):
    """A tensor of what `rounded` made: None is nan."""
    return torch.tensor([[np.nan if z is None else z for z in row] for row in rows])


def on_true_history(seeds):
    """{seed: measured} with the scores on true history as its frames; others are left out."""
    return {
        seed: measured | {"frames": measured["true_history"]}
        for seed, measured in seeds.items()
        if measured.get("true_history")
    }


def means_and_errors(seeds):
    """Means and standard errors (4, 3) of the thirds and the whole.

    The errors are those over the seeds, or over the videos of a single seed.
    """
    scores = scores_of(seeds)
    parts = [scores[:, start:end].nanmean(1) for start, end in third_edges(scores.shape[1])]
    means = torch.stack([part.mean(0) for part in parts])
    if len(seeds) == 1:
        return means, unrounded(next(iter(seeds.values()))["errors"])
    return means, torch.stack([standard_error(part) for part in parts])


def thirds_table(rows):
    """Temporal, Visual and Text of the three thirds of each row, ± standard error."""
    T = scores_of(next(iter(rows.values()))).shape[1]
    edges = [f"{start}-{end - 1}" for start, end in third_edges(T)[:3]]
    width = max(map(len, rows)) + 2
    lines = [
        " " * width + "".join(f"{name:^36}" for name in COLUMNS),
        f"{'frames':{width}}" + "".join(f"{edge:>12}" for edge in edges) * len(COLUMNS),
    ]
    for name, seeds in rows.items():
        means, errors = means_and_errors(seeds)
        cells = [
            f"{means[part, i]:6.1f} ±{errors[part, i]:4.1f}"
            for i in COLUMNS.values()
            for part in range(3)
        ]
        lines.append(f"{name:{width}}" + "".join(cells))
    return "```\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def overall_table(rows):
    """Temporal, Visual and Text over all frames, and the last third."""
    lines = [
        "| | *Temporal* | *Visual* | *Text* | last third |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in rows.items():
        means, errors = means_and_errors(seeds)
        cells = [f"{means[3, i]:.1f} ± {errors[3, i]:.1f}" for i in COLUMNS.values()]
        last = " / ".join(f"{means[2, i]:.0f}" for i in COLUMNS.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


def costs_table(rows):
    """What each row costs in training and in sampling; "-" is nothing, or not measured.

    *seeds* counts those whose milliseconds were measured.
    """
    lines = [
        "| | seeds | minutes | its teacher's | passes a frame | ms a frame |",
        "|---|---|---|---|---|---|",
    ]
    for name, seeds in rows.items():
        cells = []
        for column, digits in COSTS.items():
            costs = [measured[column] for measured in seeds.values() if measured.get(column)]
            cells.append(f"{np.mean(costs):.{digits}f}" if costs else "-")
        timed = sum("milliseconds" in measured for measured in seeds.values())
        lines.append(f"| {name} | {timed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bias_table(rows):
    """The first and the last third on true and on own history, and the difference of the last."""
    lines = [
        "| | first third, true history | own | last third, true history | own | lost |",
        "|---|---|---|---|---|---|",
    ]
    order = list(COLUMNS.values())
    for name, seeds in rows.items():
        true = means_and_errors(on_true_history(seeds))[0][:, order]
        own = means_and_errors(seeds)[0][:, order]
        columns = [true[0], own[0], true[2], own[2], true[2] - own[2]]
        cells = [" / ".join(f"{z:.0f}" for z in column) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lead_table(rows):
    """The last third of the last row minus that of each other row, seed by seed: mean ± error.

    Runs of one seed share their warm-up, clips and noise, so that much of the spread over the seeds
    cancels.
    """
    lines = ["| | *Temporal* | *Visual* | *Text* |", "|---|---|---|---|"]
    *others, leader = rows
    last = {
        name: {seed: means_and_errors({seed: measured})[0][2] for seed, measured in seeds.items()}
        for name, seeds in rows.items()
    }
    for name in others:
        seeds = sorted(last[name].keys() & last[leader].keys())
        lead = torch.stack([last[leader][seed] - last[name][seed] for seed in seeds])
        mean, error = lead.mean(0), standard_error(lead)
        cells = [f"{mean[i]:+.1f} ± {error[i]:.1f}" for i in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def hundreds_table(rows):
    """Temporal / Visual / Text of every hundred frames."""
    lines = [f"| frames | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    scores = [scores_of(seeds).nanmean(0) for seeds in rows.values()]
    for start in range(0, len(scores[0]), 100):
        parts = [z[start : start + 100].nanmean(0)[list(COLUMNS.values())] for z in scores]
        cells = [" / ".join(f"{z:.1f}" for z in part) for part in parts]
        lines.append(f"| {start}-{start + 99} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "thirds": thirds_table,
    "overall": overall_table,
    "costs": costs_table,
    "bias": bias_table,
    "lead": lead_table,
    "hundreds": hundreds_table,
}


def redraw(text):
    """The text of a page with its tables drawn anew from results/*.json."""

    def draw(match):
        rows = read_rows(RESULTS / f"{match['file']}.json")
        chosen = match["rows"].split() if match["rows"] else list(rows)
        pairs = (word.partition("=") for word in chosen)
        labels = {name: label or name for name, _, label in pairs}
        missing = [name for name in labels if name not in rows]
        if missing or not chosen:
            raise ValueError(f"results/{match['file']}.json has no row {' '.join(missing)}")
        table = TABLES[match["kind"]]({label: rows[name] for name, label in labels.items()})
        return f"{match['mark']}\n{table}\n<!-- end -->"

    return MARKED.sub(draw, text)


def tables(args):
    for page in PAGES:
        page.write_text(redraw(page.read_text("utf-8")), "utf-8")


# ---- strip ----


def strip(args):
    rows = {}
    for run in args.runs:
        path = samples_folder(run) / "measured.npz"
        if not path.exists():
            raise ValueError(f"no {path}; evidence.py measure writes it")
        clips = np.load(path)
        if args.clip >= len(clips["made"]):
            raise ValueError(
                f"--clip {args.clip}: {path} holds clips 0 to {len(clips['made']) - 1}"
            )
        rows.setdefault("truth", clips["truth"][args.clip])
        rows[split_name(run)[0]] = clips["made"][args.clip]
    videos = [torch.from_numpy(video).float() for video in rows.values()]
    labels = ["truth", *args.labels] if args.labels else list(rows)
    if len(labels) != len(videos):
        raise ValueError(f"{len(labels) - 1} --labels for {len(videos) - 1} runs")
    write_picture(args.picture, contact_sheet(videos, args.columns, labels))


# fmt: off
def parse(argv):
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("measure", help="measure runs").add_argument
    add("file", type=Path, help="results/NAME.json")
    add("runs", type=Path, nargs="+", help="folders of runs, NAME-SEED")
    add("--frames", type=bounded_int(GIVEN + 1, 10**6), default=100, help="default: %(default)s")
    add("--videos", type=positive_int, default=64, help="default: %(default)s")
    add("--true-history", action="store_true", help="predict each frame from true ones, too")
    add("--again", action="store_true",
        help="measure what is in the file again, as after a change to a sampler")

    add = commands.add_parser("time", help="time a new frame of measured runs").add_argument
    add("file", type=Path, help="results/NAME.json")
    add("runs", type=Path, nargs="+", help="measured runs")

    add = commands.add_parser("baselines", help="score what needs no model").add_argument
    add("file", type=Path, help="results/NAME.json")
    add("--frames", type=bounded_int(GIVEN + 1, 10**6), default=100, help="default: %(default)s")
    add("--videos", type=positive_int, default=64, help="default: %(default)s")
    add("--size", type=positive_int, default=32, help="pixels (default: %(default)s)")

    add = commands.add_parser("strip", help="draw a clip of each run").add_argument
    add("picture", type=Path, help="a .png")
    add("runs", type=Path, nargs="+", help="measured runs")
    add("--clip", type=bounded_int(0, KEPT - 1), default=0, help="default: %(default)s")
    add("--columns", type=positive_int, default=12, help="frames drawn (default: %(default)s)")
    add("--labels", nargs="+", help="names of the rows (default: the runs')")

    commands.add_parser("tables", help="rewrite the tables of the two README files")
    return parser.parse_args(argv)
# fmt: on


def main(argv):
    args = parse(argv)
    commands = {
        "measure": measure,
        "time": time_runs,
        "baselines": baselines,
        "strip": strip,
        "tables": tables,
    }
    commands[args.command](args)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
