"""What each codec costs and gives on the twins' own camera frames, and which is best over which link.

    python -m benchmarks.codecs [--quick] [--json FILE]

Frames of both cameras, rendered once: as an arm sees them (every control step) and as a twin keeps them (every
eighth, at chunk boundaries); as they are, and with the noise of a small camera. Codecs take turns, round by round.
Over a link, a stream of segments moves at min(link x ratio, encode, decode). Rows are drawn one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from twinrl.core.codec import CODECS, encode

NOISE = {"clean": 0.0, "mild": 2.0}  # standard deviation in levels of 0..255
EVERY = {"step": 1, "chunk": 8}  # control steps between frames
SIZES = (128, 64)
STEPS, WORLDS = 48, 3
ROWS = 64  # drawn one by one in each round
COPY_BYTES = 64 << 20  # larger than any cache
LINKS = {"loopback": 0.0, "1GbE": 118.0, "wifi": 6.0}  # MB/s; a loopback is as fast as memory

Scene = list[np.ndarray]  # the image columns (F, H, W, 3) uint8 of some segments
Row = dict[str, Any]


def render(size: int) -> Scene:
    """One column (STEPS + 1, size, size, 3) for each camera of each world."""
    from twinrl.env import image_key
    from twins import make_env

    env = make_env(num_envs=WORLDS, seed=3, image_size=size)
    seen = [env.reset()[0], *(env.step(env.expert(noise=0.05))[0] for _ in range(STEPS))]
    keys = [image_key(camera) for camera in env.cameras]
    return [np.stack([each[key][n] for each in seen]) for key in keys for n in range(WORLDS)]


def scenes(columns: Scene) -> dict[tuple[str, str], Scene]:
    """The rendered columns in every form, by (step or chunk, clean or mild)."""
    generator = np.random.default_rng(0)
    found = {}
    for noise, spread in NOISE.items():
        noisy = [
            (column + generator.normal(0, spread, column.shape)).round().clip(0, 255).astype("u1")
            if spread
            else column
            for column in columns
        ]
        for interval, every in EVERY.items():
            found[interval, noise] = [np.ascontiguousarray(column[::every]) for column in noisy]
    return found


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long `work` takes, and what it gives."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(scene: Scene, name: str, seed: int) -> Row:
    """One codec once: every rate in MB of pixels a second."""
    nbytes = sum(column.nbytes for column in scene)
    encoding, encoded = seconds(lambda: [encode(column, name) for column in scene])
    targets = [np.zeros_like(column) for column in scene]
    decoding, _ = seconds(lambda: [e.decode(t) for e, t in zip(encoded, targets, strict=True)])
    generator = np.random.default_rng(seed)
    drawn = [
        (encoded[k], int(generator.integers(len(encoded[k]))))
        for k in generator.integers(len(encoded), size=ROWS)
    ]
    one = np.zeros((1, *scene[0].shape[1:]), np.uint8)
    drawing, _ = seconds(lambda: [column.rows([row], one) for column, row in drawn])
    row = {
        "ratio": nbytes / sum(each.nbytes for each in encoded),
        "encode_MB_per_s": nbytes / encoding / 1e6,
        "decode_MB_per_s": nbytes / decoding / 1e6,
        "row_MB_per_s": ROWS * one.nbytes / drawing / 1e6,
    }
    error = np.mean(
        [np.mean((a.astype("f4") - b) ** 2) for a, b in zip(scene, targets, strict=True)]
    )
    if CODECS[name].lossless:
        assert error == 0, name
    else:
        row["psnr_dB"] = float(10 * np.log10(255**2 / error))
    return row


def memcpy_rate() -> float:
    """MB/s between two large arrays that are in memory already."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    return COPY_BYTES / min(seconds(lambda: np.copyto(target, source))[0] for _ in range(5)) / 1e6


def rounds(scene: Scene, count: int) -> dict[str, Row]:
    """{codec: medians of `count` rounds}."""
    found = [{name: measure(scene, name, seed=n) for name in CODECS} for n in range(count)]
    return {
        name: {key: statistics.median(row[name][key] for row in found) for key in found[0][name]}
        for name in CODECS
    }


def effective(row: Row, link: float) -> float:
    """MB of pixels a second from a writer through `link` MB/s to a reader that takes segments whole."""
    return min(link * row["ratio"], row["encode_MB_per_s"], row["decode_MB_per_s"])


def best(rows: dict[str, Row], link: float, lossless: bool) -> str:
    """The codec that moves most over `link`."""
    allowed = [name for name in rows if CODECS[name].lossless or not lossless]
    return max(allowed, key=lambda name: effective(rows[name], link))


def report(columns: dict[int, Scene], count: int) -> dict[str, Any]:
    """Figures, rows and winners of all scenes."""
    links = dict(LINKS, loopback=memcpy_rate())
    figures: dict[str, float] = {"memcpy_MB_per_s": links["loopback"]}
    rows, winners = [], []
    for size, rendered in columns.items():
        for (interval, noise), scene in scenes(rendered).items():
            found = rounds(scene, count)
            where = {"size": size, "frames": interval, "noise": noise}
            show(where, found, links)
            for name, row in found.items():
                rates = {f"{link}_MB_per_s": effective(row, rate) for link, rate in links.items()}
                rows.append({**where, "codec": name, **row, **rates})
                for key, value in {**row, **rates}.items():
                    figures[f"{name}_{key}_{size}_{interval}_{noise}"] = value
            winners += [
                {
                    **where,
                    "link": link,
                    "lossless": best(found, rate, True),
                    "any": best(found, rate, False),
                }
                for link, rate in links.items()
            ]
    return {"figures": figures, "rows": rows, "best": winners}


def show(where: Row, rows: dict[str, Row], links: dict[str, float]) -> None:
    """Print one scene's table."""
    title = f"{where['size']} px, a frame each {where['frames']}, {where['noise']}"
    print(f"\n{title:32}{'ratio':>7}{'encode':>8}{'decode':>8}{'row':>7}{'dB':>6}", end="")
    print("".join(f"{link:>10}" for link in links))
    for name, row in rows.items():
        print(
            f"  {name:30}{row['ratio']:7.2f}{row['encode_MB_per_s']:8.0f}{row['decode_MB_per_s']:8.0f}"
            f"{row['row_MB_per_s']:7.0f}{row.get('psnr_dB', float('inf')):6.1f}"
            + "".join(f"{effective(row, rate):10.0f}" for rate in links.values()),
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print tables, write the JSON file."""
    parser = argparse.ArgumentParser(prog="benchmarks.codecs", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    machine = {
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }
    found = report({size: render(size) for size in SIZES}, 3 if options.quick else 9)
    machine["load_after"] = round(os.getloadavg()[0], 2)
    if options.json:
        command = ["python", "-m", "benchmarks.codecs", *(["--quick"] if options.quick else [])]
        text = json.dumps({"machine": machine, "command": shlex.join(command), **found}, indent=1)
        Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
