"""The scripts of this folder: the rivals' principles, the evidence, the figures, the speed."""

import copy
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
from data import COLOURS, SHAPES, Sprites, measure, paint
from model import LEAST_T, CausalDiT, Config, load_checkpoint
from results import bench, evidence, fig_8, health, memory, pendulum, plot, rivals
from rf import HISTORY, add_noise, flow_matching_loss
from routing import pick

HERE = Path(__file__).resolve().parent
TINY = "--size 8 --frames 6 --patch 4 --dim 48 --heads 2 --layers 2 --batch 2 --device cpu"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A warm-up of three steps, and a bidirectional teacher, whose one chunk is the clip."""
    folder = tmp_path_factory.mktemp("runs")
    flags = f"{TINY} --steps 3 --warmup 3 --history teacher --out {folder}"
    train.main(f"{flags}/warm-0".split())
    train.main(f"{flags}/bidirectional-0 --chunk 6".split())
    return folder


def tiny():
    """A small float64 network with random weights: at its own initialization it returns 0."""
    torch.manual_seed(0)
    net = CausalDiT(Config(2, 24, 48, 2, 2, 2, 1, 5, 16)).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    net.run = {}
    return net


def clip():
    """(clean frames, noise, t, c) for `tiny`."""
    torch.manual_seed(1)
    x, noise = torch.randn(2, 2, 6, 2, 4, 6, dtype=torch.float64)
    return x, noise, torch.rand(2, 6, dtype=torch.float64), torch.randn(2, 3, 5).double()


def close(a, b, tolerance=1e-10):
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


# ---- rivals.py ----


class Gauss:
    """The exact v of clips whose every value is N(mean, std^2)."""

    def __init__(self, mean, std=0.5):
        self.mean, self.std = mean, std

    def __call__(self, x_t, t):
        t = t[..., None, None, None]
        gain = (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        clean = self.mean + gain * (x_t - (1 - t) * self.mean)
        return (x_t - clean) / t


def dmd_gradient(student, real, fake):
    """The gradient of DMD's loss to clips of a Gaussian student, times their number; the clips."""
    torch.manual_seed(0)
    clips = (student.mean + student.std * torch.randn(256, 1, 3, 4, 4)).requires_grad_()
    t = 0.02 + 0.96 * torch.rand(256, 1)
    rivals.dmd_loss(clips, t, torch.randn_like(clips), real, fake).backward()
    return clips.grad * clips.numel(), clips.detach()


def test_dmd_moves_the_student_to_the_data():
    data, student, near = Gauss(1.0), Gauss(-0.5), Gauss(0.9)
    ahead, _ = dmd_gradient(student, data, student)
    assert ahead.mean() < -0.3, "descent raises -0.5 to 1"
    assert dmd_gradient(data, student, data)[0].mean() > 0.3
    assert abs(dmd_gradient(near, data, near)[0].mean()) < abs(ahead.mean()) / 3
    assert (dmd_gradient(data, data, data)[0] == 0).all()

    narrow = Gauss(1.0, 0.3)
    gradient, clips = dmd_gradient(narrow, Gauss(1.0, 0.8), narrow)
    assert (gradient * (clips - 1)).mean() < 0, "it spreads a student that is too narrow"


class Noise:
    """`rand` and `randn` of one seed, whatever the default generator does."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def rand(self, *shape, device=None):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def randn(self, *shape, device=None, dtype=None):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


@pytest.mark.parametrize("last_step", [0, 3])
@pytest.mark.parametrize("window, sink", [(9, 0), (3, 1)])
def test_a_students_gradient_comes_from_its_last_pass_alone(last_step, window, sink):
    """The same frames as without a gradient, and the same gradient if another network, of equal
    weights, makes all the passes before."""
    net, (x, noise, _, c) = tiny(), clip()
    twin = copy.deepcopy(net)
    times = rivals.solver_times(5.0)
    graded, written = [], []

    def frames(model):
        cache = rivals.FrozenCache(2, 2, 99, window, sink)
        given, new = x[:, :2], noise[:, 2:]
        made = rivals.student_frames(model, times, new, c, given, cache, 2, last_step, Noise())
        return torch.cat(list(made), 1)

    def split(x, t, c, history, cache, first):
        if not torch.is_grad_enabled():
            written.extend([] if history is None else [history])
            return twin(x, t, c, history, cache, first)
        graded.append((first, t[0, 0].item()))
        return net(x, t, c, history, cache, first)

    with torch.no_grad():
        wanted = frames(net)
    gradients = []
    for model in (net, split):
        made = frames(model)
        assert close(made, wanted)
        net.zero_grad()
        made.square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert graded == [(n, times[last_step].item()) for n in range(2, 6)], "one pass a frame"
    assert all(close(a, b, 1e-9) and a.abs().max() > 0 for a, b in zip(*gradients))
    assert all(p.grad is None for p in twin.parameters())
    assert torch.equal(torch.cat(written, 1), torch.cat([x[:, :2], made[:, :-1]], 1))


def test_levels_of_diffusion_forcing_never_fall_along_time():
    torch.manual_seed(0)
    levels = rivals.non_decreasing_levels(4000, 5, torch)
    assert (levels.diff(dim=1) >= 0).all() and levels.min() >= 0 and levels.max() <= 1
    assert (levels.min(0).values < 0.05).all() and (levels.max(0).values > 0.95).all()
    assert (levels < LEAST_T).float().mean() < 0.02, "there a network has nothing to learn"
    assert levels.std(1).min() < 0.1 < levels.std(1).max()


def test_the_pipeline_is_trained_on_the_levels_of_its_rollout():
    S = rivals.STEPS
    torch.manual_seed(0)
    levels = rivals.pipeline_levels(4000, 10, torch)
    assert (levels.diff(dim=1) >= 0).all() and (levels[:, 0] == 0).all()
    inside = (levels[:, 1:] < 1) & (levels[:, :-1] > 0)
    assert (levels.diff(dim=1)[inside] - 1 / S).abs().max() < 1e-5, "as steep as the rollout"
    assert ((levels[:, :2] == 0).all(1) & (levels[:, 2] == 1)).any(), "a rollout's first pass"

    noisy = (levels > 0).sum(1)
    first = levels.gather(1, 10 - noisy[:, None])[:, 0]  # the level of the first noisy frame
    assert 0.3 < (first > 1 / S).float().mean() < 0.45, "four in ten have just begun"
    assert (noisy[first < 1 / S] >= S).all(), "a steady pipeline is in the clip as a whole"


def test_diffusion_forcing_learns_what_a_rollout_shows():
    """Not a frame behind pure noise, nor one below LEAST_T; on clean frames it is Eq. (4)."""
    net, (x, _, t, c) = tiny(), clip()
    t[:] = torch.tensor([0, 0.03, 0.5, 1, 1, 1])
    loss = rivals.diffusion_forcing_loss(net, x, c, t, Noise())
    eps = Noise().randn(*x.shape)
    x_t = add_noise(x, eps, t)
    error = net(x_t, t, c, x_t[:, :-1], history_t=t[:, :-1]) - (eps - x)
    assert close(loss, error[:, 2:4].square().mean())

    t[:, :-1] = 0
    loss = rivals.diffusion_forcing_loss(net, x, c, t, Noise())
    error = net(add_noise(x, eps, t), t, c, x[:, :-1]) - (eps - x)
    assert close(loss, error[:, -1].square().mean())


class Alone:
    """A model whose v depends on a frame alone; keeps its calls."""

    config = Config()
    run = {"data": "sprites", "words": [], "frames": 10, "time_shift": 3.0}

    def __init__(self):
        self.calls = []

    def cache(self, batch, frames, window=None, sink=0):
        return None

    def __call__(self, x, t, c, history=None, cache=None, first=0, history_t=None):
        self.calls.append((x, t, history, first, history_t))
        return x.tanh() * t[..., None, None, None]


def test_the_pipeline_finishes_a_frame_a_pass():
    """Four frames are in flight, each one solver step ahead of the next; no frame sees more of
    the past than in training. Where history does not matter, the frames are any rollout's."""
    net = Alone()
    given, c = torch.zeros(2, 2, 3, 4, 4), torch.zeros(2, 1, 5)
    made = torch.cat(list(rivals.pipelined_rollout(net, given, c, frames=16, seed=0)), 1)
    assert made.shape[1] == 14 and len(net.calls) == 14 + rivals.STEPS - 1
    times = rivals.solver_times(3.0)
    x, t, history, first, history_t = net.calls[8]
    assert x.shape[1] == rivals.STEPS and torch.equal(t[0], times[:-1].flip(0))
    assert history.shape[1] == first + rivals.STEPS - 1 == 9
    assert torch.equal(history[:2, first:], x[:2, :-1])
    assert torch.equal(history_t[0, first:], t[0, :-1]) and (history_t[:, :first] == 0).all()

    noise = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(2, 1, 3, 4, 4, generator=noise) for _ in range(14)], 1)
    for now, after in itertools.pairwise(times):
        x = x + (after - now) * x.tanh() * now
    assert close(made, x, 1e-6)


def test_both_branches_of_guidance_see_one_noisy_history():
    """SkyReels-V2's, at the level that the network is told; its noise is not a new frame's."""
    net = Alone()
    list(
        rivals.diffusion_forcing_rollout(
            net, torch.zeros(2, 2, 3, 4, 4), torch.ones(2, 1, 5), 6, seed=0
        )
    )
    seen = [call for call in net.calls if call[2] is not None]
    assert len(seen) == 4, "each frame's history is read once"
    for _, _, history, _, level in seen:
        assert torch.equal(history[:2], history[2:]) and (level == 0.02).all()
    x, _, history, *_ = seen[0]
    assert abs(history.std() - 0.02) < 0.005
    assert not close(history[0, 0] / 0.02, x[0, 0], 0.1)


def test_told_resampling_gives_the_history_the_level_it_was_redrawn_from():
    """In the rollout and in the loss; a told level of 0 is the network as it is."""
    net, (x, _, _, c) = Alone(), clip()
    run = rivals.Namespace(shift=0.6, time_shift=3.0)
    rivals.METHODS["told"](run).loss(net, x, c, 0, Noise())
    *rollout, (_, _, history, _, level) = net.calls
    _, t_s = rivals.noise_to_t_s(x[:, :-1], 0.6, Noise())
    assert [z[4] is None for z in rollout] == [True] + [False] * 4 and level.shape == (2, 5)
    assert all(torch.equal(z[4], t_s[:, None]) for z in rollout[1:])
    assert torch.equal(level, t_s[:, None].expand(2, 5)) and not close(history, x[:, :-1], 0.1)

    net, (x, x_t, t, c) = tiny(), clip()
    told, wanted = rivals.Told(net, 0.0), net(x_t, t, c, x[:, :-1])
    assert close(told(x_t, t, c, x[:, :-1]), wanted)
    assert not close(rivals.Told(net, 0.3)(x_t, t, c, x[:, :-1]), wanted, 1e-3)


@pytest.mark.parametrize("window", (99, 1))
def test_a_frame_is_written_from_the_recent_past(window):
    """A frame far back changes what is seen, and not how later frames are written."""
    net, (x, noise, _, c) = tiny(), clip()
    changed = x.clone()
    changed[:, 0] += 1
    one = torch.ones(2, 1).double()
    written, made = [], []
    for history in (x, changed):
        model, cache = evidence.WriteRecent(net, window), net.cache(2, 6)
        made.append(model(noise[:, :1], one, c, history[:, :5], cache, first=5))
        written.append(cache.kv[:, 1, :, :, 2:5].clone())
    plain = net(noise[:, :1], one, c, x[:, :5], net.cache(2, 6), first=5)
    assert close(made[0], plain) == (window == 99) and not close(*made, 1e-3)
    assert close(*written) == (window == 1) and net.config.window is None


class Watched:
    """A network, and the noise levels of its calls."""

    def __init__(self, net):
        self.net, self.config, self.run, self.cache = net, net.config, net.run, net.cache
        self.levels = set()

    def __call__(self, x, t, *args, **options):
        self.levels.update(t.flatten().tolist())
        return self.net(x, t, *args, **options)


def method_of(name, runs):
    """A distilled method, the network that it starts from, and clips."""
    flags = f"{name} --init x --out x --teacher {runs}/bidirectional-0 --lr 1e-3"
    run = rivals.parse(flags.split())
    run.frames, run.time_shift = 6, 3.0
    net = load_checkpoint(runs / "warm-0").requires_grad_(True)
    net.run |= {"method": name}
    x, c = (torch.stack(z) for z in zip(*(Sprites(8, 6)[i] for i in range(2))))
    return rivals.METHODS[name](run), net, x, c


@pytest.mark.parametrize("name", rivals.DISTILLED)
def test_a_student_is_sampled_at_the_levels_of_its_training(name, runs):
    method, net, x, c = method_of(name, runs)
    sampled, trained = Watched(net), Watched(net)
    with torch.no_grad():
        list(rivals.ROLLOUTS[name](sampled, x[:, :2], c, 8, seed=0))
    time_shift = {"DMD-on-real-clips": 1.0}.get(name, 10.0)
    assert sampled.levels == set(rivals.solver_times(time_shift)[:-1].tolist())
    for seed in range(12):
        method.student_clips(trained, x, c, train.ClipNoise(seed, [0, 1], "cpu"))
    assert trained.levels - {0.0} == sampled.levels


def test_the_fake_model_learns_at_every_step_and_the_student_at_every_fifth(runs):
    method, net, x, c = method_of("DMD-on-rollouts", runs)
    real = copy.deepcopy(method.real.state_dict())
    for step in range(6):
        before = copy.deepcopy(method.fake.state_dict())
        loss = method.loss(net, x, c, step, train.ClipNoise(0, [2 * step, 2 * step + 1], "cpu"))
        assert (loss is not None) == (step in (0, 5))
        after = method.fake.state_dict()
        assert any(not torch.equal(after[name], z) for name, z in before.items())
    assert all(torch.equal(real[name], z) for name, z in method.real.state_dict().items())


@pytest.mark.parametrize("method", rivals.METHODS)
def test_a_rival_is_trained_measured_timed_and_drawn(method, runs):
    command = f"{method} --init {runs}/warm-0 --out {runs}/{method}-0 --steps 6 --lr 1e-3"
    distilled = method in rivals.DISTILLED
    rivals.main(
        f"{command} --teacher {runs}/bidirectional-0".split() if distilled else command.split()
    )
    paths = (runs / name / "ckpt.pt" for name in ("warm-0", f"{method}-0"))
    before, after = (torch.load(path, weights_only=True) for path in paths)
    assert all(not torch.equal(z, before["ema"][name]) for name, z in after["model"].items())

    path = runs / f"{method}.json"
    evidence.main(f"measure {path} {runs}/{method}-0 --frames 8 --samples 2".split())
    written = path.stat().st_mtime_ns
    evidence.main(f"measure {path} {runs}/{method}-0 --frames 8 --samples 2".split())
    assert path.stat().st_mtime_ns == written, "a killed one goes on"

    if method in rivals.ROLLOUTS:
        with pytest.raises(ValueError, match="has its own sampler"):
            evidence.main(
                f"measure {path} {runs}/{method}-0 --frames 8 --samples 2 --write-window 3".split()
            )
    args = evidence.parse(f"time {path} {runs}/{method}-0".split())
    evidence.time_runs(args, frames=8)
    row = evidence.read_rows(path)[method]["0"]
    assert np.array(row["frames"]).shape == (8, 3) and np.array(row["truth"]).shape == (8, 2)
    assert row["flags"]["method"] == method and row["settings"]["split"] == "final"
    assert (row["teacher_minutes"] > 0) == distilled and row["milliseconds"] > 0
    assert row["passes"] == {"pipelined-diffusion-forcing": 3}.get(method, 4 if distilled else 8), (
        "guidance doubles"
    )

    strip = f"strip {runs}/strip.png {runs}/{method}-0 --frames 8"
    evidence.main(strip.split())
    assert iio.imread(runs / "strip.png").ndim == 3


@pytest.mark.parametrize(
    "method, own", [("told", {}), ("DMD-on-rollouts", {"lr": 2e-4, "ema": 0.99})]
)
def test_a_rival_keeps_the_rates_of_the_run_that_it_begins_with(method, own, runs, tmp_path):
    teacher = f"--teacher {runs}/bidirectional-0" if own else ""
    rivals.main(f"{method} --init {runs}/warm-0 --out {tmp_path}/a --steps 1 {teacher}".split())
    names = ("lr", "muon_lr", "ema", "decay", "lr_warmup", "batch", "frames")
    before, after = (load_checkpoint(path).run for path in (runs / "warm-0", tmp_path / "a"))
    assert {name: after[name] for name in names} == {name: before[name] for name in names} | own


def test_bad_input_ends_in_one_line(runs, tmp_path):
    init = f"--init {runs}/warm-0 --out {tmp_path}/x"
    two_chunks = f"--history teacher --warmup 1 --steps 1 --chunk 6 --out {tmp_path}/two"
    train.main([*TINY.replace("--frames 6", "--frames 12").split(), *two_chunks.split()])
    for main, command, message in [
        (rivals.main, f"DMD-on-real-clips {init}", "--teacher goes with"),
        (rivals.main, f"diffusion-forcing {init} --teacher {runs}/bidirectional-0", "only them"),
        (rivals.main, f"DMD-on-real-clips {init} --teacher {runs}/warm-0", "one chunk"),
        (rivals.main, f"DMD-on-real-clips {init} --teacher {tmp_path}/two", "--frames 12"),
        (rivals.main, f"diffusion-forcing --init {runs}/none --out {tmp_path}/x", "none"),
        (
            evidence.main,
            f"measure {tmp_path}/new.json {runs}/bidirectional-0",
            "wanted a run with --chunk 1",
        ),
        (
            evidence.main,
            f"strip {tmp_path}/a.png {runs}/bidirectional-0",
            "evidence.py measure writes it",
        ),
        (evidence.main, "measure", "needs a file"),
        (evidence.main, "measure x --history-level 0.1 --write-window 2", "one at a time"),
        (evidence.main, f"pack {tmp_path}/a.pt {runs}/warm-0 {runs}/warm-0", "takes one run"),
        (bench.main, "step --foo", "unrecognized arguments: --foo"),
        (bench.main, "stop", "invalid choice: 'stop'"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            main(command.split())
        assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()


# ---- evidence.py, health.py, plot.py and the pages ----


def measured_rows():
    """Two rows of 12 frames, one of them with two seeds."""
    frames = [[float(T), 50.0, 100.0] for T in range(12)]
    higher = [[z + 2 for z in row] for row in frames]
    cost = {"minutes": 5.0, "teacher_minutes": 0, "passes": 8.0, "milliseconds": 20.0}
    one = {"frames": frames, "truth": [[80.0, None if T < 9 else 2.0] for T in range(12)]} | cost
    return {"a": {"0": one, "1": one | {"frames": higher, "minutes": 7.0}}, "b": {"0": one}}


def test_the_tables_are_means_and_errors_over_the_seeds(tmp_path, monkeypatch):
    rows = measured_rows()
    means, errors = evidence.means_and_errors(rows["a"])
    assert torch.allclose(means[:, 0], torch.tensor([2.5, 6.5, 10.5, 6.5]))
    assert torch.allclose(errors[:, :3], torch.ones(4, 3)), "of 2 seeds that differ by 2"

    lines = evidence.scores_table(rows).splitlines()
    assert lines[0] == "| | *Temporal* | *Visual* | *Text* | still there | distance |"
    last = "51.0 ± 1.0 | 10.5 ± 1.0 | 101.0 ± 1.0 | 80.0 ± 0.0 % | 2.0 ± 0.0 px |"
    assert lines[2] == f"| a | {last}", "of the last third"
    assert lines[3] == "| b | 50.0 | 9.5 | 100.0 | 80.0 % | 2.0 px |", "one seed"
    rows["a"]["1"]["teacher_minutes"] = 4.0
    costs = evidence.costs_table(rows).splitlines()
    assert costs[2:] == ["| a | 8 | 8 | 20.0 |", "| b | 5 | 8 | 20.0 |"]

    one = rows["b"]["0"]
    one["true_history"] = [[2.0 * z for z in row] for row in one["frames"]]
    wanted = "| b | 100 / 3 / 200 | 50 / 2 / 100 | 100 / 19 / 200 | 50 / 10 / 100 | 50 / 10 / 100 |"
    assert evidence.bias_table({"b": rows["b"]}).endswith(wanted)
    rows["a"]["0"]["pairs"] = {"own": 9, "other": 1, "third": 0, "none": 10}
    rows["a"]["1"]["pairs"] = {"own": 7, "other": 3, "third": 0, "none": 10}
    pairs = evidence.pairs_table({"a": rows["a"]})
    assert pairs.endswith("| a | 40 ± 5 | 10 ± 5 | 0 ± 0 | 50 ± 0 | 80 ± 10 |")

    rows = measured_rows()
    (tmp_path / "x.json").write_text(json.dumps({"a": rows["a"], "b-1": rows["b"]}))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    page = evidence.redraw("<!-- scores x: b-1 a -->\nold\n<!-- end -->\nrest")
    assert re.findall(r"^\| ([a-z1 ]+) \|", page, re.M) == ["b 1", "a"]
    assert page.endswith("<!-- end -->\nrest") and "old" not in page
    with pytest.raises(ValueError, match="has no row c"):
        evidence.redraw("<!-- scores x: c -->\n<!-- end -->")
    for seeds in rows.values():
        for measured in seeds.values():
            measured["weights"] = "0"
    rows["copy"] = measured_rows()["b"]
    kept = {name: list(seeds) for name, seeds in evidence.paired(rows | {"c": rows["a"]}).items()}
    assert kept == {"a": ["0"], "b": ["0"], "c": ["0"], "copy": ["0"]}, "seeds that all have"
    assert list(evidence.paired({"a": rows["a"], "copy": rows["copy"]})["a"]) == ["0", "1"]


def test_clips_are_compared_with_the_true_ones():
    """A sprite that is 3 pixels off, one that is gone, and one that the wall hides."""
    world = Sprites(32, 12, 0, "final", 2)
    colour, shape, at = world.scene(1)
    truth, captions = world[1][0], [world.caption(1)]
    moved = paint((at + torch.tensor([3.0, 0])).clamp(5, 27), shape, colour, 32)
    moved[5] = paint(at[5, :1], shape[:1], colour[:1], 32)
    made = evidence.against_truth(moved[None], truth[None], captions, False)
    assert made[5].tolist() == [50, 0] or made[5, 1] < 0.1
    other = torch.arange(12) != 5
    assert (made[other, 0] == 100).all() and ((made[other, 1] - 3).abs() < 0.2).float().mean() > 0.5
    assert evidence.against_truth(truth[None], truth[None], captions, False)[:, 1].max() == 0

    world = Sprites(32, 40, 0, "final", 1, wall=True)
    truth = world[0][0][None]
    there, _ = evidence.against_truth(truth, truth, [world.caption(0)], True).T
    assert there.isnan().any() and (there[~there.isnan()] == 100).all(), "nothing is asked"


def test_the_tables_of_the_pages_are_drawn_from_the_numbers():
    """`python results/evidence.py tables` would change nothing."""
    for page in evidence.PAGES:
        text = page.read_text("utf-8")
        assert evidence.redraw(text) == text, f"{page} is not what results/*.json says"


def test_the_first_page_says_what_the_numbers_say():
    """The first screen's sentence, and the links to Figs. 6 and 7."""
    moves, stays = evidence.COLUMNS["Temporal"], evidence.AGAINST_TRUTH["still there"]

    def last_third(file, name, column):
        """Of each seed."""
        seeds = evidence.read_rows(HERE / f"{file}.json")[name].items()
        return [evidence.means_and_errors({seed: z})[0][2, column].item() for seed, z in seeds]

    others = [name for name in plot.HISTORIES if name != "resampling-forcing"]
    ours = last_third("long", "resampling-forcing", stays)
    theirs = [last_third("long", name, stays) for name in others]
    motion = np.mean(last_third("long", "resampling-forcing", moves))
    motions = [np.mean(last_third("long", name, moves)) for name in others]
    one, two = (
        np.mean(last_third("sprites", name, stays)) for name in ("resampling-forcing", "two-steps")
    )
    pairs = evidence.read_rows(HERE / "hidden.json")
    routed, window = (
        evidence.pairs_table({name: pairs[name]}).splitlines()[-1].split()[3]
        for name in ("top-5", "window-5")
    )
    means = [np.mean(z) for z in theirs]
    page = evidence.PAGES[0].read_text("utf-8")
    for sentence in (
        f"still shows {np.mean(ours):.0f} % of the sprites",
        f"and the others {min(means):.0f} to {max(means):.0f} %",
        f"its *Temporal* is {motion:.0f}, theirs {min(motions):.0f} to {max(motions):.0f}.",
        f"{ours[0]:.0f}, {ours[1]:.0f} and {ours[2]:.0f} % against {np.min(theirs):.0f} to "
        f"{np.max(theirs):.0f}.",
        f"{two:.0f} % of the sprites stay with two Euler steps, {one:.0f} % with one",
        f"{routed} % with 5 routed frames, {window} % with the last 5",
    ):
        assert sentence in page, sentence


def test_a_run_is_measured_again_if_its_weights_are_others(runs, tmp_path):
    run, file = tmp_path / "a-0", tmp_path / "x.json"
    shutil.copytree(runs / "warm-0", run)
    measure = f"measure {file} {run} --frames 4 --samples 2".split()

    kept, clips = run / "samples/measured-4.npz", []

    def measured(*flags):
        shutil.rmtree(run / "samples")
        evidence.main([*measure, *flags])
        clips.extend([np.load(kept)["made"]] if kept.exists() else [])
        return evidence.read_rows(file)["a"]["0"], (run / "samples").exists()

    first, anew = measured()
    assert anew and first["true_history"] is None and first["minutes"] > 0
    (run / "samples").mkdir(exist_ok=True)
    assert measured() == (first, False)
    (run / "samples").mkdir()
    more, anew = measured("--true-history")
    assert anew and more["true_history"] and np.array_equal(*clips)
    told, anew = measured("--history-level", "0.3")
    assert anew and told["settings"] == first["settings"] | {"history_level": 0.3}
    recent, anew = measured("--write-window", "1")
    assert anew and all((clips[i] != clips[j]).any() for i, j in ((1, 2), (2, 3), (1, 3)))

    state = torch.load(run / "ckpt.pt", weights_only=True)
    state["ema"] = {name: 1.1 * weight for name, weight in state["ema"].items()}
    torch.save(state, run / "ckpt.pt")
    second, anew = measured()
    assert anew and first["weights"] != second["weights"]
    for other in ("--frames 5", "--samples 3", "--split test"):
        with pytest.raises(ValueError, match="a was measured with .*; another file would work"):
            evidence.main([*measure, *other.split()])


def test_on_true_history_each_frame_follows_true_ones(runs):
    net = load_checkpoint(runs / "warm-0")  # its window is 5
    truth, c = (z[None] for z in Sprites(8, 10)[0])
    made = evidence.on_true_history(net, truth, c, 10, seed=0)
    changed = truth.clone()
    changed[:, 3] = 0
    moved = (evidence.on_true_history(net, changed, c, 10, seed=0) != made).flatten(2).any(2)[0]
    assert moved.tolist() == [False] * 4 + [True] * 5 + [False]


def test_from_nothing_no_true_frame_is_given(runs, tmp_path):
    shutil.copytree(runs / "warm-0", tmp_path / "a-0")
    flags = f"measure {tmp_path}/x.json {tmp_path}/a-0 --frames 4 --samples 2 --given"
    for given in (0, 1):
        (tmp_path / "x.json").unlink(missing_ok=True)
        evidence.main([*flags.split(), str(given)])
        clips = np.load(tmp_path / "a-0/samples/measured-4.npz")
        assert np.array_equal(clips["made"][:, 0], clips["truth"][:, 0]) == given


def test_baselines_are_scored(tmp_path):
    evidence.main(f"baselines {tmp_path}/x.json --samples 3 --frames 30".split())
    rows = evidence.read_rows(tmp_path / "x.json")
    last = {name: evidence.means_and_errors(seeds)[0][2] for name, seeds in rows.items()}
    assert last["truth"][:4].min() > 97 and last["frozen-copy"][[0, 2, 3]].min() > 90
    assert last["truth"][4] == 0 and last["frozen-copy"][4] > 5
    assert evidence.scores_of(rows["frozen-copy"])[0, 2, 1] < 90, "it stands from frame 2 on"
    assert last["frozen-copy"][1] < 25


def test_the_weights_of_the_box_are_those_that_were_measured(runs, tmp_path):
    rows = evidence.read_rows(HERE / "sprites.json")
    for name, row in {"teacher": "teacher-forcing", "resample": "resampling-forcing"}.items():
        net = load_checkpoint(HERE / f"{name}.pt")
        assert evidence.fingerprint(net) == rows[row]["0"]["weights"]

    evidence.main(f"pack {tmp_path}/a.pt {runs}/warm-0".split())
    net, packed = load_checkpoint(runs / "warm-0"), load_checkpoint(tmp_path / "a.pt")
    for name, weight in net.state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight.half().float())
    assert packed.config == net.config


def test_the_loss_by_noise_level_is_equation_4_at_that_level(runs, capsys, monkeypatch):
    x = torch.randn(2, 3, 3, 4, 4)
    losses = health.losses_by_level(lambda x_t, t, *_: x_t / t[..., None, None, None], x, 0, 0)
    wanted = [(x / t).square().mean().item() for t in health.LEVELS]  # v - (eps - x) = x / t
    assert losses == pytest.approx(wanted, rel=1e-4)
    health.main([str(runs / "warm-0"), "--samples", "2"])
    printed = capsys.readouterr().out
    assert re.search(r"true( +\S+){6}\n +resampled( +\S+){6}\n", printed)
    assert re.search(r"redrawn: [\d.]+\nVisual, its own: [\d.]+\n$", printed)

    net = load_checkpoint(runs / "warm-0")
    net.run |= {"shift": 2.0, "resample_steps": 3}
    asked = []
    monkeypatch.setattr(health, "load_checkpoint", lambda run: net)
    monkeypatch.setattr(
        health, "self_resample", lambda net, x, c, s, steps: asked.append((s, steps)) or x
    )
    health.main([str(runs / "warm-0"), "--samples", "2"])
    printed = capsys.readouterr().out
    redrawn, own = map(float, re.findall(r"Visual, [a-z ]+: ([\d.]+)", printed))
    frames = net.run["frames"]
    clips = torch.stack([health.held_out(net.run, frames)[i][0][:-1] for i in range(2)])
    true = health.measure_held_out(net, clips)[..., 0].nanmean().item()
    assert asked == [(2.0, 3)] and redrawn == pytest.approx(true, abs=0.06) and own < true - 1


def test_pairs_ask_for_what_only_memory_can_tell(tmp_path, monkeypatch):
    """The last frames given are equal; then each clip's own colour comes out."""
    world = Sprites(32, 12, 0, "final", 1, wall=True, withheld=1.0)
    script = (HERE / "fig-7.sh").read_text()
    window = max(int(n) for n in re.findall(r"--window (\d+)", script))
    assert memory.HIDDEN >= window, "a window sees no frame in which the clips differ"
    for clips, given, (own, other), shape in itertools.islice(memory.questions(world), 4):
        same = (clips[0] == clips[1]).flatten(1).all(1)
        assert same[given - window : given].all() and not same[given:].any()
        assert not same[:given].all() and own != other
        wanted = [f"{list(COLOURS)[z]} {list(SHAPES)[shape]}" for z in (own, other)]
        assert measure(clips[:, -1:], wanted, True)[..., 2].min() == 100

    flags = f"{TINY} --data hidden --objects 1 --steps 1 --warmup 1 --history teacher"
    train.main(f"{flags} --size 32 --patch 16 --out {tmp_path}/a-3".split())
    held = []

    def swapped(net, clip, c, T, given, seed, **settings):
        assert given < T == clip.shape[1] and not c.any() and settings["window"] == 5
        held.append((clip, seed))
        return held[-2 if len(held) == 6 else -1][0]  # the last is its twin, the others are true

    monkeypatch.setattr(memory, "continue_clips", swapped)
    rows = {"a": {"3": {"frames": [[0, 0, 0]]}}}
    evidence.write_json(tmp_path / "x.json", rows)
    command = f"{tmp_path}/x.json {tmp_path}/a-3 --samples 3"
    for _ in range(2):
        memory.main(command.split())
    assert [seed for _, seed in held] == [0, 0, 1, 1, 2, 2], "the same noise; measured once"
    pairs = evidence.read_rows(tmp_path / "x.json")["a"]["3"]["pairs"]
    assert pairs == {"own": 5, "other": 1, "third": 0, "none": 0}
    held.clear()
    memory.main([f"{tmp_path}/x.png", f"{tmp_path}/a-3"])
    picture = iio.imread(tmp_path / "x.png").astype(int)
    truth, made = picture[16:82, 96:], picture[82:, 96:]
    assert np.array_equal(truth, made) and [seed for _, seed in held] == [0, 0]
    with pytest.raises(ValueError, match="evidence.py measure writes it"):
        memory.main([command.split()[0], str(tmp_path / "b-3")])


def test_the_rod_of_a_pendulum_is_followed():
    angle = torch.arange(0, 400, 20).deg2rad()[:, None, None]
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    rod = ((along > 0) & (along < 0.8) & (across.abs() < 0.1)).float()[None, :, None]
    video = torch.cat([torch.ones_like(rod), 1 - 2 * rod, 1 - 2 * rod], dim=2)
    speed, red = pendulum.motion(video)
    assert speed[0, 0] == 0 and ((speed[0, 1:] - 20).abs() < 2).all()
    assert torch.allclose(red, rod.sum((2, 3, 4)) * 2)


@pytest.mark.extras
def test_the_curves_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    seeds = measured_rows()["a"]
    for measured in seeds.values():
        measured["true_history"] = measured["frames"]
    names = [*plot.HISTORIES, *plot.RIVALS, *plot.MEMORY, *plot.SHIFTS.values()]
    for file in ("sprites", "long", "hidden"):
        evidence.write_json(tmp_path / f"{file}.json", dict.fromkeys(names, seeds))
    plot.main(["--out", str(tmp_path)])
    for name in plot.PICTURES:
        assert iio.imread(tmp_path / f"{name}.png").std() > 10, name
    (tmp_path / "long.png").unlink()
    plot.main(["drift", "--out", str(tmp_path)])
    assert not (tmp_path / "long.png").exists()
    for draw, more in ((plot.draw_curves, (plot.HISTORIES, ["Text"])), (plot.draw_shift, ())):
        with pytest.raises(ValueError, match="a.png needs the rows .*; run their script first"):
            draw(None, {}, tmp_path / "a.png", *more)


def test_every_picture_is_shown_and_there():
    shown = set()
    for page in evidence.PAGES:
        for path in re.findall(r'(?:\]\(|src=")([\w/-]+\.(?:png|jpg|gif))', page.read_text()):
            shown.add(page.parent / path)
    assert shown == {path for path in HERE.iterdir() if path.suffix in (".png", ".jpg", ".gif")}


PARSERS = {
    "train.py": train.parse,
    "sample.py": sample.parse,
    "results/rivals.py": rivals.parse,
    "results/evidence.py": evidence.parse,
}
FAKE_PYTHON = """#!/bin/sh
printf '%s\\037' "$@" >> "$COMMANDS"
echo >> "$COMMANDS"
while [ $# -gt 0 ]; do
    if [ "$1" = --out ]; then mkdir -p "$2/samples" && touch "$2/ckpt.pt" $MADE; fi
    shift
done
"""


def commands_of(script, folder, *arguments, made='"$2/samples/final.gif"'):
    """Run results/SCRIPT.sh with a python that only makes what `made` says in --out.

    Returns [[word, ...], ...], and the exit status.
    """
    for name in (script, "common"):
        (folder / "results").mkdir(exist_ok=True)
        shutil.copy(HERE / f"{name}.sh", folder / "results")
    (folder / "python").write_text(FAKE_PYTHON.replace("$MADE", made))
    (folder / "python").chmod(0o755)
    (folder / "commands").write_text("")
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "COMMANDS": str(folder / "commands")}
    command = ["bash", str(folder / f"results/{script}.sh"), *arguments]
    status = subprocess.run(command, env=os.environ | paths, cwd=folder).returncode
    lines = (folder / "commands").read_text().splitlines()
    return [line.split("\037")[:-1] for line in lines], status


SCRIPTS = [path.stem for path in sorted(HERE.glob("*.sh")) if path.stem != "common"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_give_flags_that_exist_and_their_seed(script, tmp_path):
    before = {
        f"runs/{name}-5"
        for name in ("warm", "teacher-forcing", "history-noise", "resampling-forcing")
    }
    made = set() if script in ("table-2", "fig-7") else before
    for run in made:
        (tmp_path / run).mkdir(parents=True)
    commands, status = commands_of(script, tmp_path, "5")
    assert status == 0 and len(commands) > 3
    for program, *words in commands:
        args = PARSERS[program](words) if program in PARSERS else None
        if program in ("train.py", "results/rivals.py"):
            assert args.seed == 5 and str(args.out).endswith("-5")
            assert args.init is None or str(args.init) in made
            made.add(str(args.out))
        if program == "results/evidence.py" and script != "box":
            assert {str(run) for run in args.runs} <= made, "measures what it made"

    again, _ = commands_of(script, tmp_path, "5")
    assert not any(program in ("train.py", "results/rivals.py") for program, *_ in again)


def test_the_scripts_can_add_to_the_numbers_that_are_there():
    """Rows of another kind would be refused at the end, after hours of training."""
    scripts = "".join((HERE / f"{script}.sh").read_text() for script in SCRIPTS)
    files = set(
        re.findall(r"measure (results/\S+\.json)( --frames \d+)?( --samples \d+)?", scripts)
    )
    assert {file for file, *_ in files} == {
        f"results/{z}.json" for z in ("sprites", "long", "hidden")
    }
    for words in files:
        args = evidence.parse(["measure", *" ".join(words).split(), "runs/a-0"])
        args.file = HERE.parent / args.file
        evidence.check_clips(args)


def test_a_stopped_run_stops_the_script_and_goes_on(tmp_path):
    """train.py exits with 0 after Ctrl-C: the rows must not begin with half a warm-up."""
    first, status = commands_of("table-2", tmp_path, "0", made="")
    assert len(first) == 1 and status == 1
    second, status = commands_of("table-2", tmp_path, "0", made="")
    assert second == [["train.py", "--resume", "--out", "runs/warm-0"]] and status == 1


def test_the_commands_of_the_page_parse():
    page = evidence.PAGES[1].read_text("utf-8")
    commands = re.findall(r"^(?:torchrun .*?|python )(\S+\.py .*)$", page, re.M)
    commands += re.findall(r"`python (\S+\.py .*?)`", page)
    assert len(commands) > 10
    for command in commands:
        program, *words = command.split("  #")[0].replace('"', "").split()
        assert (HERE.parent / program).is_file(), command
        if program in PARSERS and not {"RUN", "--resume"} & set(words):
            PARSERS[program](words)


# ---- fig_8.py and bench.py ----


def test_recorded_routing_is_what_attention_picks(runs, tmp_path, monkeypatch):
    state = torch.load(runs / "warm-0/ckpt.pt", weights_only=True)
    state["config"]["top_k"] = 2
    torch.save(state, tmp_path / "ckpt.pt")
    net, calls = load_checkpoint(tmp_path), []
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)

    def spy(*args):
        calls.append(pick(*args))
        return calls[-1]

    monkeypatch.setattr("routing.pick", spy)
    shares = [[], []]
    fig_8.record_picks(net, shares, 1)
    given, c = torch.rand(1, 1, 3, 8, 8), 9 * torch.ones(1, 5, 20)
    list(sample.generate(net, [(0, c)], given, 7, 1, guidance=2.0, window=4, sink=1))
    assert len(calls) == 6 * 2, "six frames, two layers"
    for i, (picked, valid) in enumerate(calls):
        share = shares[i % 2][i // 2]
        last = picked[:1, :, -1][valid[:1, :, -1]]  # of the conditional branch
        for column in range(len(share)):
            assert share[column] == (last == column).sum() / picked[0, :, -1, :, 0].numel()
    assert not calls[0][1].all(), "the first has but one frame to pick"
    assert any(not torch.equal(*picked[:, :, -1].chunk(2)) for picked, _ in calls), (
        "the branches differ"
    )

    share = fig_8.picks_of(load_checkpoint(tmp_path), 4, 2)
    assert share.shape == (3, 3) and torch.allclose(share[2], share[:2].mean(0))
    assert torch.allclose(share.sum(1), torch.full((3,), 2.0)), "each token picks two of three"


@pytest.mark.extras
def test_the_picks_are_drawn(runs, tmp_path):
    pytest.importorskip("matplotlib")
    state = torch.load(runs / "warm-0/ckpt.pt", weights_only=True)
    state["config"]["top_k"] = 2
    torch.save(state, tmp_path / "ckpt.pt")
    fig_8.main(f"{tmp_path}/a.png {tmp_path} {tmp_path} --frames 4 --samples 2".split())
    assert iio.imread(tmp_path / "a.png").std() > 10


@pytest.mark.parametrize("chunk, steps, window", [(1, 1, None), (3, 2, None), (1, 3, 2)])
def test_bench_counts_the_flops_that_run(chunk, steps, window):
    config = Config(4, 48, 100, 2, 3, 2, chunk, 10, window=window)
    net, x, c = CausalDiT(config), torch.randn(2, 4, 4 * chunk, 4, 6), torch.randn(2, 7, 10)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        flow_matching_loss(net, x, c, x[:, :-1])
    assert forward.get_total_flops() == 2 * bench.flops(config, 4, 3, 6 * chunk, 7)
    with FlopCounterMode(display=False) as rollout, sdpa_kernel(SDPBackend.MATH):
        HISTORY["resample"](net, x[:, :-1], c, 0.6, steps, 0.3)
    assert rollout.get_total_flops() == 2 * bench.rollout_flops(config, 3, 6 * chunk, 7, steps)
    routed = Config(top_k=window)  # as many frames, chosen otherwise
    assert bench.attended_frames(routed, 7) == bench.attended_frames(config, 7)


def test_bench_prints_ratios(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command, pattern in [
        (f"step {TINY} --accumulate 2 --repeats 1", r"resample: \d+ ms .* x a teacher-forcing"),
        ("attention --frames 4 --tokens 8 --repeats 1 --top-k 1", r"top-1: .* x the pairs"),
        (
            f"sample --checkpoint {runs}/warm-0 --frames 9",
            r"frames 5 to 5: .*\n(.*\n){3}.* a second",
        ),
        ("sample --preset toy --size 8x8 --frames 4 --steps 1", "a second"),
    ]:
        bench.main(command.split())
        assert re.search(pattern, capsys.readouterr().out), command
