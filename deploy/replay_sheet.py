"""An episode as pictures: a contact sheet of all its cameras, or the frames of a video."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deploy.replay_columns import Track

INK, MUTED, FAINT, LINE, SOFT = "#151a21", "#626d7c", "#98a2b0", "#e4e7ec", "#f4f5f7"
GOOD, BAD, TAKEOVER, POLICY = "#0b9a80", "#d13438", "#cf7f0c", "#2f6fe0"
WIDTH, MARGIN, GAP = 1600, 24, 6  # pixels
TILE, LARGEST = 128, 256  # a frame is shown at least and at most so large
SCREEN = 360  # a video's frames are about so high
END_SECONDS = 1.0  # the last frame of a video stays


class Shown(NamedTuple):
    """A frame of the sheet, and what happened until the next one that is shown."""

    place: int  # in the track's frames
    step: int  # before which it was seen
    reward: float
    intervention: bool


def choose(track: Track, limit: int) -> list[Shown]:
    """At most `limit` frames, every one or every 2nd, 3rd ..., and always the last."""
    count = len(track.frame)
    stride = -(-(count - 1) // max(limit - 1, 1)) if count > 1 else 1
    places = [*range(0, count - 1, stride), count - 1] if count else []
    steps = [int(track.frame[place]) for place in places]
    shown = []
    for place, low, high in zip(places, steps, [*steps, math.inf][1:], strict=True):
        covered = (track.step >= low) & (track.step < high)
        reward, taken = track.reward[covered].sum(), track.intervention[covered].any()
        shown.append(Shown(place, low, float(reward), bool(taken)))
    return shown


def outcome(track: Track) -> tuple[str, str]:
    """How the episode ended, and the colour of that."""
    if track.success:
        return "success", GOOD
    if not track.ended:
        return "goes on", MUTED
    return ("failed" if track.ended == "terminated" else "failed (truncated)"), BAD


def sheet(track: Track, title: str, facts: list[str], limit: int = 48) -> Image.Image:
    """A contact sheet: heading, bands of frames (a row for each camera), and the course of the episode.

    Above a frame stands the step before which it was seen, and the reward until the next one; an orange frame is
    one from which a person acted.
    """
    shown = choose(track, limit)
    side = _tile_side(track)
    labels = 64 if track.images else 0
    columns = max((WIDTH - 2 * MARGIN - labels + GAP) // (side + GAP), 1)
    bands = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    head, band_height = 84, 24 + len(track.images) * (side + GAP) + 8
    height = head + len(bands) * band_height + 150 + 22 * len(facts) + MARGIN
    canvas = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(canvas)
    _heading(draw, track, title, len(shown))
    top = head
    for number, band in enumerate(bands):
        for row, (camera, frames) in enumerate(track.images.items()):
            y = top + 24 + row * (side + GAP)
            _text(draw, (MARGIN, y + side // 2), camera, MUTED, 14, "lm")
            for column, each in enumerate(band):
                x = MARGIN + labels + column * (side + GAP)
                canvas.paste(_scaled(frames[each.place], side), (x, y))
                is_last = number == len(bands) - 1 and column == len(band) - 1
                _frame(draw, (x, y, side), each, outcome(track)[1] if is_last else "")
        for column, each in enumerate(band):
            x = MARGIN + labels + column * (side + GAP)
            colour = TAKEOVER if each.intervention else INK
            _text(draw, (x + 1, top + 18), str(each.step), colour, 13, "ls")
            if abs(each.reward) >= 0.005:
                colour = GOOD if each.reward > 0 else BAD
                _text(draw, (x + side - 1, top + 18), f"{each.reward:+.2f}", colour, 12, "rs")
        top += band_height
    _course(draw, track, top + 6, 96)
    for row, fact in enumerate(facts):
        _text(draw, (MARGIN, top + 138 + 22 * row), fact, MUTED, 13, "ls")
    return canvas


def _heading(draw: Any, track: Track, title: str, shown: int) -> None:
    word, colour = outcome(track)
    _text(draw, (MARGIN, 42), title, INK, 24, "ls")
    x = MARGIN
    taken = int(track.intervention.sum())
    thinned = f"{shown} of {len(track.frame)} frames" if shown < len(track.frame) else ""
    parts = [
        (word, colour),
        (f"{len(track.step)} steps", INK),
        (f"return {track.reward.sum():.2f}", INK),
        (f"{taken} steps by a person" if taken else "", TAKEOVER),
        (thinned, MUTED),
    ]
    for text, tint in parts:
        if text:
            _text(draw, (x, 68), text, tint, 15, "ls")
            x += int(draw.textlength(text, font=_font(15))) + 22


def _frame(draw: Any, place: tuple[int, int, int], shown: Shown, end: str) -> None:
    x, y, side = place
    colour = TAKEOVER if shown.intervention else end
    if colour:
        draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=colour, width=3)


def _course(draw: Any, track: Track, top: int, height: int) -> None:
    """Rewards over the steps, whole width; steps by a person shaded, changes of the policy named."""
    left, right = MARGIN, WIDTH - MARGIN
    first, last = int(track.step[0]), int(track.step[-1]) + 1
    base = top + height - 20

    def at(step: float) -> float:
        return left + (right - left) * (step - first) / (last - first)

    draw.rectangle((left, top, right, base), fill=SOFT)
    for step in track.step[track.intervention]:
        draw.rectangle((at(step), top, at(step + 1), base), fill="#f8e3c4")
    low, high = min(float(track.reward.min()), 0.0), max(float(track.reward.max()), 0.0)
    zero = base - (base - top - 22) * (0.0 - low) / ((high - low) or 1.0)
    for step, reward in zip(track.step, track.reward, strict=True):
        y = zero - (base - top - 22) * float(reward) / ((high - low) or 1.0)
        if abs(y - zero) >= 0.5:
            bar = (at(step) + 0.5, min(y, zero), max(at(step + 1) - 1, at(step) + 1), max(y, zero))
            draw.rectangle(bar, fill=GOOD if reward > 0 else BAD)
    draw.line((left, zero, right, zero), fill=FAINT)
    _text(draw, (right - 4, top + 14), f"reward {low:.2g} .. {high:.2g}", MUTED, 12, "rs")
    changes = np.flatnonzero(np.diff(track.version, prepend=track.version[0] - 1))
    free = 0.0  # names that would lie on each other are left out; the marks stay
    for change in changes:
        x, version = at(int(track.step[change])), int(track.version[change])
        draw.line((x, top, x, base), fill=POLICY)
        name = f"policy {version}" if version >= 0 else "no policy"
        if x >= free:
            _text(draw, (x + 4, top + 14), name, POLICY, 12, "ls")
            free = x + draw.textlength(name, font=_font(12)) + 10
    for step in _ticks(first, last):
        draw.line((at(step), base, at(step), base + 4), fill=FAINT)
        _text(draw, (at(step), base + 17), str(step), MUTED, 12, "ms")


def _ticks(first: int, last: int) -> range:
    """About ten round numbers."""
    raw = max((last - first) / 10, 1)
    power = 10 ** math.floor(math.log10(raw))
    distance = int(next(m * power for m in (1, 2, 5, 10) if m * power >= raw))
    return range(-(-first // distance) * distance, last + 1, distance)


def video(track: Track, title: str) -> Iterator[np.ndarray]:
    """Frames for a video, one for each step (the newest image held) and the end for a while; (H, W, 3) uint8."""
    side = _screen_side(track)
    wide = max(side * len(track.images) + GAP * (len(track.images) - 1), 320)
    wide, high = wide + wide % 2, side + 64
    place = np.searchsorted(track.frame, track.step, side="right") - 1
    gain = np.cumsum(track.reward)
    ends = max(round(END_SECONDS * frame_rate(track)), 1)
    for number in range(len(track.step) + ends):
        i = min(number, len(track.step) - 1)
        over = number >= len(track.step)
        canvas = Image.new("RGB", (wide, high + high % 2), "white")
        draw = ImageDraw.Draw(canvas)
        for column, frames in enumerate(track.images.values()):
            image = frames[-1 if over else max(int(place[i]), 0)]
            canvas.paste(_scaled(image, side), (column * (side + GAP), 0))
        colour = TAKEOVER if track.intervention[i] else INK
        word = f"step {track.step[i]}"
        if over:
            word, colour = outcome(track)
        elif track.intervention[i]:
            word += "  a person acts"
        if over or track.intervention[i]:
            draw.rectangle((0, 0, wide - 1, side - 1), outline=colour, width=4)
        _text(draw, (8, side + 24), word, colour, 17, "ls")
        policy = f"policy {track.version[i]}" if track.version[i] >= 0 else "no policy"
        right = f"{track.timestamp[i]:.1f} s   return {gain[i]:.2f}   {policy}"
        _text(draw, (wide - 8, side + 24), right, MUTED, 14, "rs")
        _text(draw, (8, side + 44), title, FAINT, 12, "ls")
        _progress(draw, track, (number + 1) / len(track.step), side + 54, wide)
        yield np.asarray(canvas)


def _progress(draw: Any, track: Track, share: float, top: int, wide: int) -> None:
    draw.rectangle((0, top, wide, top + 5), fill=LINE)
    draw.rectangle((0, top, wide * min(share, 1.0), top + 5), fill=POLICY)
    for i in np.flatnonzero(track.intervention):
        if (i + 1) / len(track.step) <= share:
            low, high = wide * i / len(track.step), wide * (i + 1) / len(track.step)
            draw.rectangle((low, top, high, top + 5), fill=TAKEOVER)


def frame_rate(track: Track) -> float:
    """Steps a second by the environment's own clock; 10 where it does not tell."""
    gaps = np.diff(track.timestamp)
    middle = float(np.median(gaps)) if len(gaps) else 0.0
    return min(max(1.0 / middle, 1.0), 60.0) if middle > 0 else 10.0


def _tile_side(track: Track) -> int:
    size = _image_size(track)
    if size >= LARGEST:
        return LARGEST
    return size * -(-TILE // size)  # a whole multiple: every stored pixel is seen as it is


def _screen_side(track: Track) -> int:
    size = _image_size(track)
    side = size * max(round(SCREEN / size), 1)
    return side + side % 2


def _image_size(track: Track) -> int:
    return next((images.shape[1] for images in track.images.values()), 64)


def _scaled(image: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image))
    if picture.size == (side, side):
        return picture
    grows = side >= picture.width
    return picture.resize((side, side), Image.Resampling.NEAREST if grows else Image.Resampling.BOX)


_fonts: dict[int, Any] = {}


def _font(size: int) -> Any:
    if size not in _fonts:
        _fonts[size] = ImageFont.load_default(size)
    return _fonts[size]


def _text(
    draw: Any, place: tuple[float, float], text: str, colour: str, size: int, anchor: str
) -> None:
    draw.text(place, text, fill=colour, font=_font(size), anchor=anchor)
