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
           if left out; NAME=LABEL shows another name, with spaces for its underscores

The JSON is {name: {seed: measured}}; see `measure_run`. T frames.
"""

import hashlib
import json
import re
import sys
import time
from itertools import pairwise
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from torch.utils.data import default_collate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from data import Parser, Sprites, measure, number, paint, replacing, run_main
from model import load_checkpoint
from results.rivals import ROLLOUTS, plain_rollout
from sample import GIVEN, continue_held_out, held_out, run_folder, standard_error

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


def load_run(run):
    """A run's network. Raises ValueError for a run of longer chunks."""
    net = load_checkpoint(run)
    if net.config.chunk != 1:
        raise ValueError(f"{run}: wanted a run with --chunk 1")
    return net


def new_frames(net, given, c, frames, seed):
    """Continue given frames by the run's own sampler; yields each new frame (B, 1, C, ...)."""
    return ROLLOUTS.get(net.run.get("method"), plain_rollout)(net, given, c, frames, seed)


def on_true_history(net, truth, c, frames, seed):
    """Predict each frame from the true ones before it; takes the place of `continue_clips`."""
    settings = sample.default_sampler(net)
    made = [truth[:, :GIVEN]]
    for n in range(GIVEN, frames):
        clip = sample.continue_clips(net, truth, c, n + 1, n, **settings, seed=seed + n)
        made.append(clip[:, n:])
    return torch.cat(made, dim=1)


def measure_run(run, net, args):
    """Continue held-out clips by the run's own sampler, from --given true frames.

    Returns a dictionary: weights, their fingerprint; videos, their number; frames (T, 3), the
    scores of each frame, mean over the videos; errors (4, 3), the standard errors over the videos
    of the three thirds and of the whole; true_history (T, 3) or None, each frame predicted from
    true ones; minutes of this run's training, without those of a run it started from;
    teacher_minutes, those of the teacher of a distilled run. Keeps the first clips in the run's
    samples/ for `strip`.
    """

    def roll_out(net, truth, c, frames, seed):
        given = truth[:, : args.given]
        return torch.cat([given, *new_frames(net, given, c, frames, seed)], dim=1)

    truth, made = continue_held_out(net, args.frames, args.samples, roll_out=roll_out)
    scores = sample.measure_held_out(net, made)
    path = run_folder(run) / "samples" / "measured.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, truth=truth[:KEPT].half().numpy(), made=made[:KEPT].half().numpy())

    on_truth = None
    if args.true_history:
        _, made = continue_held_out(net, args.frames, args.samples, roll_out=on_true_history)
        on_truth = rounded(sample.measure_held_out(net, made).nanmean(0))

    teacher = net.run.get("teacher")
    return {
        "weights": fingerprint(net),
        "videos": args.samples,
        "frames": rounded(scores.nanmean(0)),
        "errors": rounded(standard_errors(scores)),
        "true_history": on_truth,
        "minutes": minutes_of(run, net.run),
        "teacher_minutes": minutes_of(teacher) if teacher else 0,
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
    edges = [round(i * T / 3) for i in range(4)]
    return [*pairwise(edges), (0, T)]


def minutes_of(run, flags=()):
    """Minutes of training of a run; of a rival that began with another rival, of both.

    None for weights of pack.py, which have no log.
    """
    if "method" in flags:
        before = load_checkpoint(flags["init"]).run
        earlier = minutes_of(flags["init"], before) if "method" in before else 0
        return round(flags["minutes"] + earlier, 6)
    log = Path(run) / "log.jsonl"
    if not log.is_file():
        return None
    entries = map(json.loads, log.read_text().splitlines())
    return round(sum(entry.get("seconds", 0) for entry in entries) / 60, 6)


def measure_runs(args):
    check_length(args)
    for run in args.runs:
        name, seed = split_name(run)
        net = load_run(run)
        if args.true_history and "method" in net.run:
            raise ValueError(f"{run}: --true-history goes with runs of train.py")
        known = read_rows(args.file).get(name, {}).get(seed, {})
        same = known.get("weights") == fingerprint(net) and known["videos"] == args.samples
        if same and (known["true_history"] or not args.true_history):
            continue
        measured = measure_run(run, net, args)
        rows = read_rows(args.file)  # another process may have added a run
        rows.setdefault(name, {})[seed] = measured
        write_json(args.file, {name: dict(sorted(rows[name].items())) for name in sorted(rows)})
    print(thirds_table(read_rows(args.file)))


def time_runs(args, frames=32):
    """Time a new frame of one video with each run in turn, ROUNDS times; keep the shortest.

    Writes passes, forward passes of a new frame (guidance counts as two), and milliseconds.
    """
    nets = {run: load_run(run) for run in args.runs}
    costs = {run: [] for run in args.runs}
    batches = []  # of each pass; guidance runs both branches in one
    for net in nets.values():
        net.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    for _ in tqdm(range(ROUNDS), "rounds"):
        for run, net in nets.items():
            truth, c = default_collate([held_out(net.run, GIVEN)[0]])
            batches.clear()
            began = time.perf_counter()
            new = len(list(new_frames(net, truth, c, frames, seed=0)))
            costs[run].append(((time.perf_counter() - began) / new, sum(batches) / new))

    rows = read_rows(args.file)
    for run in args.runs:
        name, seed = split_name(run)
        if seed not in rows.get(name, {}):
            raise ValueError(f"{args.file} has no {run}; evidence.py measure writes it")
        seconds, passes = min(costs[run])
        rows[name][seed] |= {"passes": round(passes, 2), "milliseconds": round(1000 * seconds, 1)}
    write_json(args.file, rows)
    print(costs_table({name: rows[name] for name, _ in map(split_name, args.runs)}))


def baselines(args):
    """Score the truth, the last given frame repeated, and the given motion without bounces."""
    check_length(args)
    test, frame = Sprites(32, args.frames, 0, "test"), torch.arange(args.frames)
    videos = {"truth": [], "copy": [], "straight": []}
    for i in range(args.samples):
        colour, shape, at = test.scene(i)
        straight = at[:1] + frame[:, None, None] * (at[1] - at[0])
        videos["truth"].append(test[i][0])
        videos["copy"].append(test[i][0][frame.clamp(max=GIVEN - 1)])
        videos["straight"].append(paint(straight, shape, colour, test.size))

    rows = read_rows(args.file)
    for name, made in videos.items():
        scores = measure(torch.stack(made), [test.caption(i) for i in range(args.samples)])
        frames, errors = rounded(scores.nanmean(0)), rounded(standard_errors(scores))
        rows[name] = {"0": {"videos": args.samples, "frames": frames, "errors": errors}}
    write_json(args.file, rows)
    print(thirds_table(rows))


def split_name(run):
    """NAME and SEED of a run's folder NAME-SEED; without a seed, or for weights NAME.pt, "0"."""
    whole = run.name.removesuffix(".pt")
    name, _, seed = whole.rpartition("-")
    return (name, seed) if seed.isdecimal() else (whole, "0")


def read_rows(path):
    """The runs measured so far, {name: {seed: measured}}."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def check_length(args):
    """Raise ValueError if the file holds runs of another length than --frames."""
    rows = read_rows(args.file)
    lengths = {len(measured["frames"]) for seeds in rows.values() for measured in seeds.values()}
    if lengths - {args.frames}:
        raise ValueError(
            f"{args.file} holds runs of {max(lengths)} frames; --frames {args.frames} needs "
            "another file"
        )


def write_json(path, content):
    """Write a JSON file as a whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


# ---- tables ----


def scores_of(seeds):
    """The scores (seeds, T, 3) of {seed: measured}."""
    return torch.stack([unrounded(measured["frames"]) for measured in seeds.values()])


def unrounded(rows):
    """A tensor of what `rounded` made: None is nan."""
    return torch.tensor([[np.nan if z is None else z for z in row] for row in rows])


def true_history_of(seeds):
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


def markdown(head, rows):
    """A table from the names of its columns and {name: cells}."""
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def slashed(scores):
    """Temporal / Visual / Text of scores (3,)."""
    return " / ".join(f"{scores[i]:.0f}" for i in COLUMNS.values())


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
        line = f"{name:{width}}"
        for i in COLUMNS.values():
            for part in range(3):
                line += f"{means[part, i]:6.1f} ±{errors[part, i]:4.1f}"
        lines.append(line)
    return "```\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def overall_table(rows):
    """Temporal, Visual and Text over all frames, and the last third."""
    table = {}
    for name, seeds in rows.items():
        means, errors = means_and_errors(seeds)
        cells = [f"{means[3, i]:.1f} ± {errors[3, i]:.1f}" for i in COLUMNS.values()]
        table[name] = [*cells, slashed(means[2])]
    return markdown([*(f"*{name}*" for name in COLUMNS), "last third"], table)


def costs_table(rows):
    """What each row costs in training and in sampling; "-" is nothing, or not measured.

    *seeds* counts those whose milliseconds were measured.
    """
    table = {}
    for name, seeds in rows.items():
        cells = [str(sum("milliseconds" in measured for measured in seeds.values()))]
        for column, digits in COSTS.items():
            costs = [measured[column] for measured in seeds.values() if measured.get(column)]
            cells.append(f"{np.mean(costs):.{digits}f}" if costs else "-")
        table[name] = cells
    return markdown(["seeds", "minutes", "its teacher's", "passes a frame", "ms a frame"], table)


def bias_table(rows):
    """The first and the last third on true and on own history, and the difference of the last."""
    table = {}
    for name, seeds in rows.items():
        true, own = means_and_errors(true_history_of(seeds))[0], means_and_errors(seeds)[0]
        table[name] = map(slashed, [true[0], own[0], true[2], own[2], true[2] - own[2]])
    head = ["first third, true history", "own", "last third, true history", "own", "lost"]
    return markdown(head, table)


def lead_table(rows):
    """The last third of the last row minus that of each other row, seed by seed: mean ± error.

    Runs of one seed share their warm-up, clips and noise, so that much of the spread over the seeds
    cancels.
    """
    last = {}
    for name, seeds in rows.items():
        thirds = {seed: means_and_errors({seed: z})[0] for seed, z in seeds.items()}
        last[name] = {seed: means[2] for seed, means in thirds.items()}

    *others, leader = rows
    table = {}
    for name in others:
        seeds = sorted(last[name].keys() & last[leader].keys())
        lead = torch.stack([last[leader][seed] - last[name][seed] for seed in seeds])
        mean, error = lead.mean(0), standard_error(lead)
        table[name] = [f"{mean[i]:+.1f} ± {error[i]:.1f}" for i in COLUMNS.values()]
    return markdown([f"*{name}*" for name in COLUMNS], table)


TABLES = {
    "thirds": thirds_table,
    "overall": overall_table,
    "costs": costs_table,
    "bias": bias_table,
    "lead": lead_table,
}


def redraw(text):
    """The text of a page with its tables drawn anew from results/*.json."""

    def draw(match):
        rows = read_rows(RESULTS / f"{match['file']}.json")
        chosen = {}
        for word in (match["rows"] or " ".join(rows)).split():
            name, _, label = word.partition("=")
            if name not in rows:
                raise ValueError(f"results/{match['file']}.json has no row {name}")
            chosen[label.replace("_", " ") or name] = rows[name]
        return f"{match['mark']}\n{TABLES[match['kind']](chosen)}\n<!-- end -->"

    return MARKED.sub(draw, text)


def tables(args):
    for page in PAGES:
        page.write_text(redraw(page.read_text("utf-8")), "utf-8")


# ---- strip ----


def strip(args):
    """Draw clip number --clip of each run, the truth above them."""
    rows = {}
    for run in args.runs:
        path = run_folder(run) / "samples" / "measured.npz"
        if not path.exists():
            raise ValueError(f"no {path}; evidence.py measure writes it")
        clips = np.load(path)
        if args.clip >= len(clips["made"]):
            raise ValueError(f"--clip {args.clip}: {path} holds {len(clips['made'])} clips")
        rows.setdefault("truth", clips["truth"][args.clip])
        rows[split_name(run)[0]] = clips["made"][args.clip]
    labels = ["truth", *args.labels] if args.labels else list(rows)
    if len(labels) != len(rows):
        raise ValueError(f"{len(labels) - 1} --labels for {len(rows) - 1} runs")
    videos = torch.from_numpy(np.stack(list(rows.values()))).float()
    iio.imwrite(args.file, sample.contact_sheet(videos, labels, columns=12))


COMMANDS = {"measure": measure_runs, "time": time_runs, "baselines": baselines}
COMMANDS |= {"strip": strip, "tables": tables}


def parse(argv):
    parser = Parser(__doc__, "%(prog)s COMMAND [FILE] [RUN ...] [flags]")
    add = parser.add_argument
    # fmt: off
    add("command", choices=COMMANDS)
    add("file", type=Path, nargs="?", help="results/NAME.json; of strip a .png")
    add("runs", type=Path, nargs="*", help="folders of runs, NAME-SEED, or weights NAME.pt")
    add("--frames", type=number(int, GIVEN + 1), default=100,
        help="length of a clip, given frames included (default: %(default)s)")
    add("--samples", type=number(int, 1), default=64, help="clips (default: %(default)s)")
    add("--given", type=number(int, 0), default=GIVEN,
        help="measure: true frames to continue; 0: from nothing (default: %(default)s)")
    add("--true-history", action="store_true",
        help="measure: also predict each frame from true ones")
    add("--clip", type=number(int, 0), default=0, help="strip: which clip (default: %(default)s)")
    add("--labels", nargs="+", help="strip: names of the rows (default: the runs')")
    # fmt: on
    args = parser.parse_intermixed_args(argv)
    if args.command != "tables" and args.file is None:
        raise ValueError(f"{args.command} needs a file; -h shows examples")
    if args.command in ("time", "strip") and not args.runs:
        raise ValueError(f"{args.command} needs runs; -h shows examples")
    return args


def main(argv):
    args = parse(argv)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_main(main)
