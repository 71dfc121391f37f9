"""A timeline, schedulers one above the other on one axis: how many rollouts each engine runs, and what the rest of a step does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megatron_rl.simulation.cluster import Phase
from megatron_rl.simulation.results import Result

WIDTH, MARGIN, ROWS, ROW, GAP = 1400, 90, 64, 3, 64  # pixels, but ROWS: bands of engines
PAPER, INK, IDLE, FULL = (255, 255, 255), (40, 40, 40), (226, 226, 226), (23, 78, 166)
TRAIN, SYNC = (244, 196, 120), (140, 190, 140)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Strip:
    result: Result
    phases: Sequence[Phase]  # sampled


def draw(strips: Sequence[Strip], sample_every_s: float, file: Path) -> None:
    span = 1.25 * max(strip.result.step_s for strip in strips)
    full = max(max(batch) for strip in strips for phase in strip.phases for _, batch in phase.running)
    height = ROWS * ROW
    image = Image.new("RGB", (WIDTH, GAP // 2 + len(strips) * (height + GAP)), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    scale = (WIDTH - 2 * MARGIN) / span
    for number, strip in enumerate(strips):
        top = GAP // 2 + number * (height + GAP)
        _strip(pen, strip, top, scale, span, sample_every_s, max(1, full))
        result = strip.result
        text = f"{result.scheduler}: step {result.step_s:,.0f} s, of it rollout {result.rollout_s:,.0f} s; "
        text += f"{result.tokens_per_s:,.0f} trained tokens/s"
        pen.text((MARGIN, top - 20), text, fill=INK, font=font)
        pen.text((10, top + height // 2 - 20), "engines", fill=INK, font=font)
        for part in range(5):
            at = MARGIN + part * span / 4 * scale
            pen.line((at, top + height, at, top + height + 4), fill=INK)
            pen.text((at - 12, top + height + 5), f"{part * span / 4:,.0f} s", fill=INK, font=font)
    _legend(pen, font, full)
    image.save(file)


def _strip(pen: ImageDraw.ImageDraw, strip: Strip, top: int, scale: float, span: float, sample_every_s: float, full: int) -> None:
    height, now = ROWS * ROW, 0.0

    def box(start: float, end: float, above: float, below: float, colour: Colour) -> None:
        if start < span:
            pen.rectangle((MARGIN + start * scale, above, MARGIN + min(end, span) * scale, below - 1), fill=colour)

    for phase in strip.phases:
        for at, batches in phase.running:
            end = min(at + sample_every_s, phase.rollout_s)
            for row in range(ROWS):
                share = batches[row * len(batches) // ROWS : max(row * len(batches) // ROWS + 1, (row + 1) * len(batches) // ROWS)]
                box(now + at, now + end, top + row * ROW, top + (row + 1) * ROW, _shade(sum(share) / len(share) / full))
        now += phase.rollout_s
        for seconds, colour in ((strip.result.train_s, TRAIN), (strip.result.sync_s, SYNC)):
            box(now, now + seconds, top, top + height, colour)
            now += seconds
        if now < span:
            pen.line((MARGIN + now * scale, top - 3, MARGIN + now * scale, top + height + 3), fill=INK, width=2)


def _shade(share: float) -> Colour:
    if not share:
        return IDLE
    share = 0.15 + 0.85 * share
    red, green, blue = (round(paper + (ink - paper) * share) for paper, ink in zip(PAPER, FULL, strict=True))
    return red, green, blue


def _legend(pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, full: int) -> None:
    at = WIDTH - 520
    for colour, name in (
        (IDLE, "idle"),
        (_shade(0.5), f"{full // 2} run"),
        (FULL, f"{full} run"),
        (TRAIN, "training"),
        (SYNC, "sync"),
    ):
        pen.rectangle((at, 14, at + 12, 26), fill=colour)
        pen.text((at + 17, 11), name, fill=INK, font=font)
        at += 92
