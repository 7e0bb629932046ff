"""Measure runs on held-out sprites, and redraw the tables and strips of the two README files.

  python results/evidence.py measure results/sprites.json runs/resampling-forcing-0
  python results/evidence.py time results/sprites.json runs/{teacher,resampling}-forcing-0
  python results/evidence.py baselines results/sprites.json
  python results/evidence.py strip results/table-1.png runs/*-0
  python results/evidence.py pack results/resample.pt runs/resampling-forcing-0
  python results/evidence.py tables

measure    continue clips of the split "final" with each run's own sampler, and write the scores of
           every frame into a JSON file, by the run's name, NAME-SEED. A run whose weights were
           measured in the same way before is skipped: start a killed command again
time       add what a new frame costs, all runs in turn in one process
baselines  score the truth, and a copy of the last given frame
strip      draw the first clip of each measured run below one another
pack       reduce a run to its averaged weights in half precision, which load like a run: sample.py
           --checkpoint, train.py --init; --resume needs the moments, too, and refuses it
tables     rewrite what stands between <!-- KIND FILE: NAMES --> and <!-- end --> in README.md and
           results/README.md from results/FILE.json, of the seeds that all rows of a table have.
           KIND is one of TABLES. NAMES are the rows, all if left out

The JSON is {name: {seed: measured}}; see `measure_run`. B videos, T frames, K colours.
"""

import copy
import hashlib
import json
import re
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from torch.utils.data import default_collate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from data import SEEN, Parser, Sprites, fit_video, measure, number, replacing, run_main
from model import load_checkpoint, read_checkpoint
from results.rivals import ROLLOUTS, Told, plain_rollout
from sample import GIVEN, continue_held_out, default_sampler, held_out, run_folder, standard_error
from train import OF_THE_CALL

COLUMNS = {"Temporal": 1, "Visual": 0, "Text": 2}  # of data.measure's scores
AGAINST_TRUTH = {"still there": 3, "distance": 4}  # of `against_truth`, in % and in pixels
RESULTS = Path(__file__).resolve().parent
PAGES = (RESULTS.parent / "README.md", RESULTS / "README.md")
MARKED = re.compile(
    r"(?P<mark><!-- (?P<kind>\w+) (?P<file>[\w-]+)(: (?P<rows>[\w. -]+?))? -->)"
    r"\n.*?<!-- end -->",
    re.DOTALL,
)
ROUNDS = 5  # of timing


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


class WriteRecent:
    """A network that writes finished frames into the cache in a pass of its own.

    In this pass a frame sees the `window` frames before it; noisy frames see all of the cache.
    """

    def __init__(self, net, window):
        self.net, self.config, self.run, self.cache = net, net.config, net.run, net.cache
        self.writer = copy.copy(net)  # the same weights
        self.writer.config = replace(net.config, window=window)

    def __call__(self, x, t, c, history=None, cache=None, first=0):
        if history is not None:
            self.writer(x[:, :0], t[:, :0], c, history, cache, first)
        return self.net(x, t, c, None, cache, first)


def on_true_history(net, truth, c, frames, seed):
    """Predict each frame from the true ones before it; takes the place of `continue_clips`."""
    settings = default_sampler(net)
    made = [truth[:, :GIVEN]]
    for n in range(GIVEN, frames):
        clip = sample.continue_clips(net, truth, c, n + 1, n, **settings, seed=seed + n)
        made.append(clip[:, n:])
    return torch.cat(made, dim=1)


def against_truth(made, truth, captions, wall):
    """Compare continued clips with the true ones, which two frames determine.

    made, truth (B, T, 3, size, size), B captions -> (T, 2): the share in % of the true sprites in
    sight that are still there, by the rule of `data.measure`; and the median distance in pixels of
    these from the true ones, nan if there is none.
    """
    at, true = (fit_video(video, captions, wall)[0] for video in (made, truth))  # (B, T, K, 4)
    asked = true[..., 3] > SEEN
    there = asked & (at[..., 3] > SEEN)
    distance = (at - true)[..., :2].norm(dim=-1).masked_fill(~there, torch.nan)
    share = 100 * there.sum((0, 2)) / asked.sum((0, 2))
    return torch.stack([share, distance.transpose(0, 1).flatten(1).nanmedian(1).values], dim=1)


def measure_run(run, net, settings, true_history):
    """Continue held-out clips by the run's own sampler, from some true frames.

    settings: see `settings_of`. Returns a dictionary: weights, their fingerprint; settings; flags,
    those of the training; frames (T, 3), the scores of each frame, mean over the videos; truth
    (T, 2), see `against_truth`; true_history (T, 3) or None, the scores if each frame is predicted
    from true ones; minutes of this run's training, without those of a run it started from;
    teacher_minutes, those of the teacher of a distilled run. Keeps the first clip.
    """
    T, split = settings["frames"], settings["split"]

    def roll_out(net, truth, c, frames, seed):
        if settings["history_level"]:
            net = Told(net, settings["history_level"])
        if settings["write_window"]:
            net = WriteRecent(net, settings["write_window"])
        given = truth[:, : settings["given"]]
        return torch.cat([given, *new_frames(net, given, c, frames, seed)], dim=1)

    def score(roll_out):
        clips = continue_held_out(net, T, settings["samples"], split=split, roll_out=roll_out)
        return *clips, rounded(sample.measure_held_out(net, clips[1], split).nanmean(0))

    truth, made, scores = score(roll_out)
    path = clips_path(run, T)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, truth=truth[:1].half().numpy(), made=made[:1].half().numpy())

    clips = held_out(net.run, T, split)
    captions = [clips.caption(i) for i in range(len(made))]
    teacher = net.run.get("teacher")
    return {
        "weights": fingerprint(net),
        "settings": settings,
        "flags": {name: str(z) for name, z in net.run.items() if name not in OF_THE_CALL},
        "frames": scores,
        "truth": rounded(against_truth(made, truth, captions, clips.wall)),
        "true_history": score(on_true_history)[2] if true_history else None,
        "minutes": minutes_of(run, net.run),
        "teacher_minutes": minutes_of(teacher) if teacher else 0,
    }


def clips_path(run, frames):
    """Where `measure` keeps the first clip of a run, of so many frames, for `strip`."""
    return run_folder(run) / "samples" / f"measured-{frames}.npz"


def settings_of(net, args):
    """How a run is measured: the clips, the run's own sampler, and what changes it."""
    names = ("frames", "samples", "split", "given", "history_level", "write_window")
    return {name: getattr(args, name) for name in names} | default_sampler(net)


def fingerprint(net):
    """Hash of a network's weights in half precision, as `pack` writes them, twelve digits."""
    weights = (weight.half().numpy().tobytes() for weight in net.state_dict().values())
    return hashlib.sha256(b"".join(weights)).hexdigest()[:12]


def rounded(scores):
    """Scores as lists with one decimal; what was not measured is None."""
    return [[None if z != z else round(z, 1) for z in row] for row in scores.tolist()]


def third_edges(T):
    """First and last + 1 frame of the three thirds of T frames, and of the whole."""
    edges = [round(i * T / 3) for i in range(4)]
    return [*pairwise(edges), (0, T)]


def minutes_of(run, flags=()):
    """Minutes of training of a run; of a rival that began with another rival, of both.

    None for weights of `pack`, which have no log.
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
    check_clips(args)
    changed = args.true_history or args.history_level or args.write_window
    for run in args.runs:
        name, seed = split_name(run)
        net = load_run(run)
        if net.run.get("method") in ROLLOUTS and changed:
            raise ValueError(f"{run} has its own sampler; leave out flags that change it")
        settings = settings_of(net, args)
        known = read_rows(args.file).get(name, {}).get(seed, {})
        same = (known.get("weights"), known.get("settings")) == (fingerprint(net), settings)
        if same and (known["true_history"] or not args.true_history):
            continue
        measured = measure_run(run, net, settings, args.true_history)
        rows = read_rows(args.file)  # another process may have added a run
        rows.setdefault(name, {})[seed] = measured
        write_json(args.file, {name: dict(sorted(rows[name].items())) for name in sorted(rows)})
    print(scores_table(read_rows(args.file)))


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
    """Score the truth, and the last given frame repeated."""
    check_clips(args)
    clips, frame = Sprites(32, args.frames, 0, args.split), torch.arange(args.frames)
    captions = [clips.caption(i) for i in range(args.samples)]
    truth = torch.stack([clips[i][0] for i in range(args.samples)])
    rows = read_rows(args.file)
    for name, made in {"truth": truth, "frozen-copy": truth[:, frame.clamp(max=GIVEN - 1)]}.items():
        scores = measure(made, captions).nanmean(0)
        distances = against_truth(made, truth, captions, wall=False)
        measured = {"frames": rounded(scores), "truth": rounded(distances)}
        rows[name] = {"0": {"settings": clips_of(vars(args))} | measured}
    write_json(args.file, rows)
    print(scores_table(rows))


def split_name(run):
    """NAME and SEED of a run's folder NAME-SEED; without a seed, or for weights NAME.pt, "0"."""
    whole = run.name.removesuffix(".pt")
    name, _, seed = whole.rpartition("-")
    return (name, seed) if seed.isdecimal() else (whole, "0")


def read_rows(path):
    """The runs measured so far, {name: {seed: measured}}."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def clips_of(settings):
    """What a file's rows must have in common, of `args` or of measured settings."""
    return {name: settings[name] for name in ("frames", "samples", "split")}


def check_clips(args):
    """Raise ValueError if the file holds rows of other clips."""
    wanted = clips_of(vars(args))
    for name, seeds in read_rows(args.file).items():
        for measured in seeds.values():
            if clips_of(measured["settings"]) != wanted:
                raise ValueError(
                    f"{args.file}: {name} was measured with {clips_of(measured['settings'])}, not "
                    f"{wanted}; another file would work"
                )


def write_json(path, content):
    """Write a JSON file as a whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


# ---- tables ----


def scores_of(seeds):
    """The scores (seeds, T, 5) of {seed: measured}, see COLUMNS and AGAINST_TRUTH."""
    values = []
    for measured in seeds.values():
        frames = measured["frames"]
        truth = measured.get("truth") or [[None, None]] * len(frames)  # not on true history
        values.append([[np.nan if z is None else z for z in a + b] for a, b in zip(frames, truth)])
    return torch.tensor(values)


def true_history_of(seeds):
    """{seed: measured} with the scores on true history as its frames; others are left out."""
    return {
        seed: {"frames": measured["true_history"]}
        for seed, measured in seeds.items()
        if measured.get("true_history")
    }


def means_and_errors(seeds):
    """Means and standard errors over the seeds (4, 5) of the thirds and the whole."""
    scores = scores_of(seeds)
    parts = [scores[:, start:end].nanmean(1) for start, end in third_edges(scores.shape[1])]
    return (
        torch.stack([part.mean(0) for part in parts]),
        torch.stack([standard_error(part) for part in parts]),
    )


def markdown(head, rows):
    """A table from the names of its columns and {name: cells}."""
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines).replace(" ± nan", "").replace("nan px", "-")


def slashed(scores):
    """Temporal / Visual / Text of scores (3,)."""
    return " / ".join(f"{scores[i]:.0f}" for i in COLUMNS.values())


def scores_table(rows):
    """The scores of the last third, and its clips compared with the true ones: mean ± error."""
    table = {}
    for name, seeds in rows.items():
        means, errors = means_and_errors(seeds)
        shown = [f"{z:.1f} ± {e:.1f}" for z, e in zip(means[2], errors[2])]
        table[name] = [shown[i] for i in COLUMNS.values()] + [f"{shown[3]} %", f"{shown[4]} px"]
    return markdown([*(f"*{name}*" for name in COLUMNS), *AGAINST_TRUTH], table)


def costs_table(rows):
    """What the rows that `time` has timed cost: a mean over their timed seeds."""
    table = {}
    for name, seeds in rows.items():
        costs = [
            ((z["minutes"] or np.nan) + z["teacher_minutes"], z["passes"], z["milliseconds"])
            for z in seeds.values()
            if "milliseconds" in z
        ]
        if costs:
            minutes, passes, milliseconds = np.mean(costs, 0)
            table[name] = [f"{minutes:.0f}", f"{passes:.2g}", f"{milliseconds:.1f}"]
    return markdown(["minutes of training", "passes a frame", "ms a frame"], table)


def bias_table(rows):
    """The first and the last third on true and on own history, and the difference of the last."""
    table = {}
    for name, seeds in rows.items():
        true, own = means_and_errors(true_history_of(seeds))[0], means_and_errors(seeds)[0]
        table[name] = map(slashed, [true[0], own[0], true[2], own[2], true[2] - own[2]])
    head = ["first third, true history", "own", "last third, true history", "own", "lost"]
    return markdown(head, table)


def pairs_table(rows):
    """What comes out behind the wall, in % of the clips of memory.py, mean ± error over the seeds.

    *own of two*: of the clips with one of the two colours, those with their own. Chance is 50 %.
    """
    table = {}
    for name, seeds in rows.items():
        counts = [z["pairs"] for z in seeds.values() if "pairs" in z]
        shares = [[100 * n / sum(z.values()) for n in z.values()] for z in counts]
        of_two = [100 * z["own"] / max(1, z["own"] + z["other"]) for z in counts]
        values = torch.cat([torch.tensor(shares), torch.tensor(of_two)[:, None]], dim=1)
        cells = zip(values.mean(0), standard_error(values))
        table[name] = [f"{mean:.0f} ± {error:.0f}" for mean, error in cells]
    return markdown(["its own colour", "the other clip's", "a third", "none", "own of two"], table)


def paired(rows):
    """Rows with those seeds alone that all runs among them have; baselines stay as they are."""
    runs = {name: seeds for name, seeds in rows.items() if "weights" in next(iter(seeds.values()))}
    shared = set.intersection(*map(set, runs.values())) if runs else ()
    return rows | {
        name: {seed: z for seed, z in seeds.items() if seed in shared}
        for name, seeds in runs.items()
    }


def label_of(name):
    """A row's name as it is shown."""
    return name.replace("-", " ")


TABLES = {"scores": scores_table, "costs": costs_table, "bias": bias_table, "pairs": pairs_table}


def redraw(text):
    """The text of a page with its tables drawn anew from results/*.json."""

    def draw(match):
        rows = read_rows(RESULTS / f"{match['file']}.json")
        chosen = {}
        for name in (match["rows"] or " ".join(rows)).split():
            if name not in rows:
                raise ValueError(f"results/{match['file']}.json has no row {name}")
            chosen[label_of(name)] = rows[name]
        return f"{match['mark']}\n{TABLES[match['kind']](paired(chosen))}\n<!-- end -->"

    return MARKED.sub(draw, text)


def tables(args):
    for page in PAGES:
        page.write_text(redraw(page.read_text("utf-8")), "utf-8")


# ---- strip and pack ----


def strip(args):
    """Draw the first clip of each run, the truth above them."""
    rows = {}
    for run in args.runs:
        path = clips_path(run, args.frames)
        if not path.exists():
            raise ValueError(f"no {path}; evidence.py measure writes it")
        clips = np.load(path)
        rows.setdefault("truth", clips["truth"][0])
        rows[label_of(split_name(run)[0])] = clips["made"][0]
    videos = torch.from_numpy(np.stack(list(rows.values()))).float()
    iio.imwrite(args.file, sample.contact_sheet(videos, list(rows), columns=12))


def pack(args):
    """Write a run's averaged weights in half precision, and what loading them needs."""
    state = read_checkpoint(args.runs[0])
    packed = {
        "config": asdict(state["config"]),
        "model": {},
        "ema": {name: z.half() for name, z in state["ema"].items()},
        "step": state["step"],
        "args": {name: z for name, z in state["args"].items() if name not in OF_THE_CALL},
    }
    with replacing(args.file) as part:
        torch.save(packed, part)


COMMANDS = {"measure": measure_runs, "time": time_runs, "baselines": baselines}
COMMANDS |= {"strip": strip, "tables": tables, "pack": pack}


def parse(argv):
    parser = Parser(__doc__, "%(prog)s COMMAND [FILE] [RUN ...] [flags]")
    add = parser.add_argument
    # fmt: off
    add("command", choices=COMMANDS)
    add("file", type=Path, nargs="?", help="results/NAME.json; of strip a .png, of pack a .pt")
    add("runs", type=Path, nargs="*", help="folders of runs, NAME-SEED, or weights NAME.pt")
    add("--frames", type=number(int, GIVEN + 1), default=100,
        help="length of a clip, given frames included (default: %(default)s)")
    add("--samples", type=number(int, 1), default=64, help="clips (default: %(default)s)")
    add("--split", choices=("test", "final"), default="final",
        help="which held-out clips (default: %(default)s)")
    add("--given", type=number(int, 0), default=GIVEN,
        help="measure: true frames to continue; 0: from nothing (default: %(default)s)")
    add("--true-history", action="store_true",
        help="measure: also predict each frame from true ones")
    add("--history-level", type=number(float, 0, 1), default=0,
        help="measure: tell the network that finished frames have this noise level (default: 0)")
    add("--write-window", type=number(int, 1),
        help="measure: write a frame into the cache in a pass that sees only so many before it")
    # fmt: on
    args = parser.parse_intermixed_args(argv)
    if args.command != "tables" and args.file is None:
        raise ValueError(f"{args.command} needs a file; -h shows examples")
    if args.command in ("time", "strip", "pack") and not args.runs:
        raise ValueError(f"{args.command} needs runs; -h shows examples")
    if args.command == "pack" and len(args.runs) > 1:
        raise ValueError("pack takes one run")
    if args.history_level and args.write_window:
        raise ValueError("--history-level and --write-window: one at a time")
    return args


def main(argv):
    args = parse(argv)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_main(main)
