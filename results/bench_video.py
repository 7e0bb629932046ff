"""Compare data.py's video reading with plain PyAV on the same files.

    python results/bench_video.py

Makes its files in a temporary folder: small clips, and one ten-second clip of 1080p. Prints times,
their ratios and the number of frames decoded. One decoding thread everywhere.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from sample import new_parser, positive_int, run_main


def make_video(path, frames, height, width, gop):
    """Write a moving pattern with B-frames and a keyframe every `gop` frames."""
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = gop
        stream.options = {"preset": "veryfast", "bf": "3"}
        for t in range(frames):
            picture = np.stack([x + 3 * t, y + 2 * t, x + y + t], axis=-1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = t
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def decode_plainly(path, start, frames, to_rgb=False):
    """Decode frames start .. start + frames of a file, from the keyframe before them."""
    pictures = []
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        first = int(start / stream.average_rate / stream.time_base)
        last = int((start + frames - 1) / stream.average_rate / stream.time_base)
        container.seek(first, stream=stream)
        for frame in container.decode(stream):
            if to_rgb and frame.pts >= first:
                picture = reformatter.reformat(frame, format="rgb24", threads=1)
                pictures.append(picture.to_ndarray())
            if frame.pts >= last:
                break
    return pictures


def count_decoded(path, header, start, frames):
    """Frames that data.py decodes for a clip; it looks one frame ahead."""
    with data.open_video(path) as container:
        decoded = 0
        for number, _ in data.numbered_frames(container, 0.0, start, header):
            decoded += 1
            if number == start + frames:
                break
    return decoded


def seconds(function, repeats):
    """Median seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(name, function, plain, repeats):
    ours, theirs = seconds(function, repeats), seconds(plain, repeats)
    print(f"{name:46} {1e3 * ours:8.1f} ms, plain PyAV {1e3 * theirs:8.1f} ms: {ours / theirs:.2f}")


def main(argv):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--files", type=positive_int, default=60, help="small clips of 64 frames")
    add("--side", type=positive_int, default=256, help="their height and width")
    add("--size", type=positive_int, default=64, help="read at this size")
    add("--batch", type=positive_int, default=8, help="clips in a batch")
    add("--frames", type=positive_int, default=16, help="frames in a clip")
    add("--gop", type=positive_int, default=30, help="frames in a group of pictures")
    add("--repeats", type=positive_int, default=5, help="report the median of so many runs")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        small.mkdir()
        large.mkdir()
        for i in range(args.files):
            make_video(small / f"{i:03}.mp4", 64, args.side, args.side, args.gop)
        make_video(large / "a.mp4", 300, 1080, 1920, args.gop)

        opening = seconds(
            lambda: data.Videos(small, args.size, args.frames, workers=1), args.repeats
        )
        per_file = 1e3 * opening / args.files
        print(f"opening {args.files} small files, one worker: {per_file:.1f} ms a file")

        # memory 0: every item is decoded; as it is: frames are kept from round to round
        never = data.Videos(small, args.size, args.frames, memory=0)
        kept = data.Videos(small, args.size, args.frames)
        rng = np.random.default_rng(0)
        files = rng.integers(args.files, size=args.batch).tolist()
        starts = rng.integers(64 - args.frames + 1, size=args.batch).tolist()

        def read(videos):
            return [videos.load(number, start) for number, start in zip(files, starts)]

        def plain(to_rgb=False):
            for number, start in zip(files, starts):
                decode_plainly(never.files[number], start, args.frames, to_rgb)

        name = f"{args.batch} clips of {args.frames} small frames"
        compare(f"{name}, decoding alone", lambda: read(never), plain, 20)
        compare(f"{name}, to RGB", lambda: read(never), lambda: plain(True), 20)
        read(kept)
        compare("the same from memory", lambda: read(kept), plain, 20)

        video = data.Videos(large, args.size, args.frames, memory=0)
        start = 150 + args.gop // 2
        compare(
            f"{args.frames} frames of ten seconds of 1080p",
            lambda: video.load(0, start),
            lambda: decode_plainly(large / "a.mp4", start, args.frames),
            args.repeats,
        )
        starts = range(150, 150 + args.gop, max(1, args.gop // 6))
        worst = max(
            count_decoded(video.files[0], video.headers[0], start, args.frames) for start in starts
        )
        print(
            f"frames decoded for {args.frames} of 1080p: at most {worst}, "
            f"with a group of pictures of {args.gop}"
        )


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
