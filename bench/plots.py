"""Line plots as SVG, for the documents: a few lines over a few points, nothing else."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, HEIGHT = 640, 360
STYLE = 'font-family="sans-serif" font-size="12" fill="#777"'
LEFT, RIGHT, TOP, BOTTOM = 64, 170, 40, 48
#: Colours that are told apart on light and dark grounds, and by those who don't see all colours.
COLOURS = ("#0072b2", "#d55e00", "#7f7f7f")


def _ticks(highest: float) -> list[float]:
    """Round values from 0 to beyond the highest."""
    step = 1.0
    while highest / step > 6:
        step *= 2.5 if str(step)[0] == "2" else 2
    return [number * step for number in range(int(highest / step) + 2)]


def write(
    path: Path, *, title: str, across: str, upwards: str, points: Sequence[int], lines: Mapping[str, Sequence[float]]
) -> None:
    """Write a plot; the points stand at equal distances, since they are picked and not a scale."""
    ticks = _ticks(max(max(values) for values in lines.values()))
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(index: int) -> float:
        return LEFT + inner_width * (index / (len(points) - 1))

    def y(value: float) -> float:
        return TOP + inner_height * (1 - value / ticks[-1])

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {STYLE}>',
        f'<text x="{LEFT}" y="22" font-size="14">{html.escape(title)}</text>',
        f'<text x="{LEFT + inner_width / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{html.escape(across)}</text>',
        f'<text transform="translate(16 {TOP + inner_height / 2:.0f}) rotate(-90)" text-anchor="middle">{html.escape(upwards)}</text>',
    ]
    for tick in ticks:
        out.append(
            f'<line x1="{LEFT}" y1="{y(tick):.1f}" x2="{LEFT + inner_width}" y2="{y(tick):.1f}" stroke="#999" opacity="0.3"/>'
        )
        out.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for index, point in enumerate(points):
        out.append(f'<text x="{x(index):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{point}</text>')
    for (name, values), colour in zip(lines.items(), COLOURS, strict=False):
        places = [(x(index), y(value)) for index, value in enumerate(values)]
        joined = " ".join(f"{across_:.1f},{up:.1f}" for across_, up in places)
        out.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.extend(f'<circle cx="{across_:.1f}" cy="{up:.1f}" r="3" fill="{colour}"/>' for across_, up in places)
        number = list(lines).index(name)
        out.append(
            f'<line x1="{WIDTH - RIGHT + 16}" y1="{TOP + 14 + 20 * number}" x2="{WIDTH - RIGHT + 36}"'
            f' y2="{TOP + 14 + 20 * number}" stroke="{colour}" stroke-width="2"/>'
        )
        out.append(f'<text x="{WIDTH - RIGHT + 42}" y="{TOP + 18 + 20 * number}">{html.escape(name)}</text>')
    path.write_text("\n".join([*out, "</svg>"]) + "\n")
