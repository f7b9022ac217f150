"""The drawings of the documentation, as SVG: ``python docs/draw.py`` writes docs/drawings/*.svg.

A drawing has a ground of its own and two sets of colours, of which the reader's scheme picks one, so that it can be
read on a light page and on a dark one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "drawings"
# Okabe and Ito's blue and vermilion, lightened for the dark scheme.
COLOURS = {
    "ground": ("#ffffff", "#15191e"),
    "ink": ("#1b1f24", "#e6edf3"),
    "quiet": ("#57606a", "#a5afba"),
    "blue": ("#005f96", "#7cc4ff"),
    "red": ("#b04a00", "#ffb27a"),
    "blue-ground": ("#e6f2fa", "#1b3044"),
    "red-ground": ("#fdeee3", "#402a1b"),
    "grey-ground": ("#f0f2f4", "#262c33"),
}
ARROW = 7  # pixels


class Drawing:
    """Shapes on a ground; coordinates in pixels, from the upper left corner."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self.width, self.height, self.title, self.description = width, height, title, description
        self.shapes: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "ink", *, anchor: str = "middle", size: int = 15) -> None:
        """A line of text whose middle is at height y; what stands between _ and a space is set lower."""
        parts = []
        for i, part in enumerate(text.split("_")):
            low, rest = (part[:1], part[1:]) if i else ("", part)
            if low:
                parts.append(f'<tspan dy="4" font-size="{size - 4}">{escape(low)}</tspan>')
                rest = f'<tspan dy="-4">{escape(rest)}</tspan>' if rest else ""
            else:
                rest = escape(rest)
            parts.append(rest)
        self.shapes.append(
            f'<text class="{kind}" x="{x:g}" y="{y + size * 0.35:g}" text-anchor="{anchor}" '
            f'font-size="{size}">{"".join(parts)}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, text: str = "", kind: str = "blue", size: int = 15) -> None:
        """A rectangle, by its upper left corner, with a line of text in it."""
        self.shapes.append(
            f'<rect class="{kind}-box" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" stroke-width="1.5"/>'
        )
        if text:
            self.text(x + w / 2, y + h / 2, text, size=size)

    def circle(self, x: float, y: float, text: str, kind: str = "red") -> None:
        self.shapes.append(f'<circle class="{kind}-box" cx="{x:g}" cy="{y:g}" r="11" stroke-width="1.5"/>')
        self.text(x, y, text, size=17)

    def line(self, *points: tuple[float, float], kind: str = "quiet", arrow: bool = True, dashed: bool = False) -> None:
        """A line through the points, with a head at the last one."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.shapes.append(f'<path class="{kind}-line" d="{path}" fill="none" stroke-width="1.5"{dash}/>')
        if arrow:
            (x0, y0), (x1, y1) = points[-2:]
            length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
            dx, dy = ARROW * (x1 - x0) / length, ARROW * (y1 - y0) / length
            corners = (x1, y1), (x1 - dx - dy / 2, y1 - dy + dx / 2), (x1 - dx + dy / 2, y1 - dy - dx / 2)
            self.shapes.append(f'<path class="{kind}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in corners)} Z"/>')

    def svg(self) -> str:
        def rules(scheme: int) -> str:
            found = [f".ground{{fill:{COLOURS['ground'][scheme]}}}"]
            for name in ("ink", "quiet", "blue", "red"):
                found.append(f".{name}{{fill:{COLOURS[name][scheme]}}}.{name}-line{{stroke:{COLOURS[name][scheme]}}}")
            for name, edge in (("blue", "blue"), ("red", "red"), ("grey", "quiet")):
                ground, line = COLOURS[f"{name}-ground"][scheme], COLOURS[edge][scheme]
                found.append(f".{name}-box{{fill:{ground};stroke:{line}}}")
            return "".join(found)

        style = f"{rules(0)}@media (prefers-color-scheme: dark){{{rules(1)}}}"
        family = "system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" font-family="{family}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<desc>{escape(self.description)}</desc>",
                f"<style>{style}</style>",
                f'<rect class="ground" width="{self.width}" height="{self.height}" rx="8"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def coupling() -> Drawing:
    d = Drawing(
        760,
        270,
        "A coupling, forward and backward",
        "Forward adds the branch of the source stream to the target stream. Backward computes the same branch from the "
        "same source and subtracts it, which gives back the target as it was, in the same memory.",
    )
    for x, title, sign, before, after in (
        (20, "Forward", "+", "x_t", "y_t"),
        (400, "Backward", "−", "y_t", "x_t"),
    ):
        d.text(x, 28, title, size=17, anchor="start")
        d.box(x, 58, 70, 38, "x_k")
        d.line((x + 70, 77), (x + 270, 77), kind="blue")
        d.box(x + 270, 58, 70, 38, "x_k")
        d.line((x + 170, 77), (x + 170, 112), kind="blue")
        d.box(x + 120, 112, 100, 38, "branch F", "red")
        d.line((x + 170, 150), (x + 170, 189), kind="red")
        d.box(x, 181, 70, 38, before)
        d.line((x + 70, 200), (x + 158, 200), kind="blue")
        d.circle(x + 170, 200, sign)
        d.line((x + 182, 200), (x + 270, 200), kind="blue")
        d.box(x + 270, 181, 70, 38, after)
    d.text(190, 247, "y_t = x_t + F(x_k) , in place; x_k stays", "quiet", size=14)
    d.text(570, 247, "x_t = y_t − F(x_k) , in place; F runs again", "quiet", size=14)
    return d


def silo() -> Drawing:
    d = Drawing(
        760,
        340,
        "A RevSilo of three streams that creates a fourth",
        "First every stream gets the sum of branches of all streams of higher resolution, the new stream starting from "
        "zero; then every stream gets the sum of branches of all streams of lower resolution.",
    )
    rows, names = (70, 130, 190, 250), ("stride 4", "stride 8", "stride 16", "stride 32")
    d.text(270, 28, "1. downward sums", "red", size=16)
    d.text(500, 28, "2. upward sums", "red", size=16)
    down, up = (190, 250, 310, 370), (580, 530, 480, 430)
    for j, (y, name) in enumerate(zip(rows, names, strict=True)):
        height = 36 - 4 * j
        d.text(16, y, name, "quiet", anchor="start", size=14)
        if j < 3:
            d.box(95, y - height / 2, 52, height, f"x_{j}")
        else:
            d.text(121, y, "0", size=15)
        d.line((147 if j < 3 else 131, y), (690, y), kind="blue")
        d.box(690, y - height / 2, 52, height, f"z_{j}")
    for j in range(1, 4):
        for i in range(j):
            x = down[j] - 13 * (j - 1 - i)
            d.line((x, rows[i]), (x, rows[j] - 11), kind="red")
        d.circle(down[j] - 6.5 * (j - 1), rows[j], "+")
    for j in range(3):
        for i in range(j + 1, 4):
            x = up[j] + 13 * (i - j - 1)
            d.line((x, rows[i]), (x, rows[j] + 11), kind="red")
        d.circle(up[j] + 6.5 * (2 - j), rows[j], "+")
    d.text(20, 292, "y_j = x_j + sum over i < j of F(x_i),  strided", "quiet", anchor="start", size=14)
    d.text(20, 317, "z_j = y_j + sum over i > j of G(y_i),  upsampled", "quiet", anchor="start", size=14)
    d.text(742, 305, "every arrow is a branch (MBConv)", "red", anchor="end", size=14)
    return d


def tape() -> Drawing:
    d = Drawing(
        760,
        350,
        "What is kept between forward and backward",
        "Ordinary training stores the activations of every layer until backward has used them. A reversible pass has "
        "one state, the streams and a position, which forward advances and backward retreats.",
    )
    d.text(20, 28, "Stored activations: memory grows with depth", anchor="start", size=16)
    for i in range(5):
        x = 20 + 150 * i
        d.box(x, 48, 100, 34, f"layer {i + 1}", "grey")
        d.box(x + 8, 92, 84, 40, "activations", "red", size=13)
        if i < 4:
            d.line((x + 100, 65), (x + 150, 65))
    d.text(20, 172, "Reversible: one state, whatever the depth", anchor="start", size=16)
    for i in range(5):
        x = 20 + 150 * i
        d.box(x, 192, 100, 34, f"coupling {i + 1}", "grey")
        if i < 4:
            d.line((x + 100, 203), (x + 150, 203), kind="blue")
            d.line((x + 150, 216), (x + 100, 216), kind="red")
    d.box(170, 262, 400, 40, "streams y,  gradients dy,  position")
    d.text(160, 282, "State", anchor="end", size=16)
    d.line((220, 252), (520, 252), kind="blue")
    d.text(530, 250, "advance: run the branch, add", "blue", anchor="start", size=14)
    d.line((520, 314), (220, 314), kind="red")
    d.text(370, 334, "retreat: run the branch again, subtract, pull the gradient through", "red", size=14)
    return d


def exact() -> Drawing:
    d = Drawing(
        760,
        300,
        "Floats lose digits in an addition, a grid loses none",
        "With floats the sum of x and t is rounded, so that subtracting t gives a neighbour of x. On a grid t is "
        "rounded first to a whole number of steps, the sum is exact, and subtracting the same steps gives x back.",
    )
    d.text(20, 28, "Floats: the sum is rounded", anchor="start", size=16)
    d.line((40, 90), (720, 90), kind="ink", arrow=False)
    for x in (60, 180, 300, 420, 480, 540, 600, 660, 700):
        d.line((x, 84), (x, 96), kind="ink", arrow=False)
    d.text(560, 116, "floats are denser near 0", "quiet", size=13)
    d.line((480, 76), (480, 56), (200, 56), (200, 88), kind="blue")
    d.text(495, 62, "x", "blue", anchor="start", size=15)
    d.text(340, 46, "+ t", "blue", size=14)
    d.line((200, 104), (180, 104), kind="red")
    d.text(212, 110, "rounded", "red", anchor="start", size=13)
    d.line((180, 112), (180, 132), (460, 132), (460, 98), kind="red")
    d.text(330, 145, "− t  misses x", "red", size=14)

    d.text(20, 186, "Grid of steps 2⁻ᵍ: the branch is rounded, the sum is exact", anchor="start", size=16)
    d.line((40, 238), (720, 238), kind="ink", arrow=False)
    for i in range(18):
        d.line((60 + 38 * i, 232), (60 + 38 * i, 244), kind="ink", arrow=False)
    d.line((478, 230), (478, 222), (212, 222), (212, 231), kind="blue")
    d.text(345, 211, "+ rint(t / step) steps", "blue", size=14)
    d.text(493, 218, "x", "blue", anchor="start", size=15)
    d.line((212, 250), (212, 270), (478, 270), (478, 248), kind="red")
    d.text(345, 284, "− the same steps: x, bit for bit", "red", size=14)
    return d


def architecture() -> Drawing:
    d = Drawing(
        760,
        290,
        "RevBiFPN",
        "The stem turns the image into a stream of stride 4 without weights. Layers of RevBlocks and a RevSilo create "
        "the streams of stride 8, 16 and 32 one after another. The neck widens each stream, and the head merges them.",
    )
    rows, names = (44, 98, 152, 206), ("stride 4", "stride 8", "stride 16", "stride 32")
    d.box(16, 24, 64, 40, "image", "grey")
    d.line((80, 44), (98, 44))
    d.box(98, 24, 56, 40, "stem")
    starts = (154, 234, 324, 414)
    for j, (y, x) in enumerate(zip(rows, starts, strict=True)):
        d.line((x, y), (604, y), kind="blue")
        d.text(590, y - 12, names[j], "quiet", anchor="end", size=13)
    for layer in range(4):
        x = 176 + 90 * layer
        for j in range(min(layer + 1, 4)):
            d.box(x - 14, rows[j] - 11, 28, 22, "B", "grey", size=13)
        last = min(layer + 1, 3)
        d.box(x + 28, 24, 30, rows[last] - 4, "S", "red", size=14)
    for y in rows:
        d.box(604, y - 14, 54, 28, "neck", "blue", size=14)
        d.line((658, y), (686, y), kind="blue")
    d.box(686, 26, 58, 198, "head", "blue")
    for y, line in (
        (248, "B: RevBlock on each stream. S: RevSilo, which fuses all streams and creates one, until there are four."),
        (271, "All between stem and neck is reversible: backward recomputes it from its outputs."),
    ):
        d.text(16, y, line, "quiet", anchor="start", size=14)
    return d


def dual_residual() -> Drawing:
    d = Drawing(
        760,
        330,
        "A dual-residual network",
        "Two streams in two slots of memory. Blocks take turns in reading one and updating the other in place: what "
        "was there times beta, plus the block's result, plus alpha minus one times what the block read.",
    )
    upper, lower = 60, 190
    d.box(20, upper - 19, 56, 38, "x_0")
    d.text(48, lower, "0")
    d.line((76, upper), (740, upper), kind="blue")
    d.line((62, lower), (740, lower), kind="blue")
    for i, (source, target) in enumerate(((upper, lower), (lower, upper), (upper, lower)), 1):
        x, sign = 210 * i - 40, 1 if target > source else -1
        d.line((x, source), (x, 125 - sign * 21), kind="red")
        d.box(x - 52, 104, 104, 42, f"B_{i} ,  α − 1", "red")
        d.line((x, 125 + sign * 21), (x, target - sign * 11), kind="red")
        d.circle(x, target, "+")
        d.text(x - 46, target - 14, "× β", "blue", size=14)  # noqa: RUF001
        d.box(x + 40, target - 19, 56, 38, f"x_{i}")
    for y, kind, line in (
        (240, "quiet", "Forward:   new = β · old + B(other) + (α − 1) · other,   in the memory of old"),
        (266, "quiet", "Backward:   old = (new − B(other) − (α − 1) · other) / β;   B runs again"),
        (300, "ink", "α = 1, β = 0 is the pretrained network; α + β = 1 stays close to it, and has an inverse."),
    ):
        d.text(20, y, line, kind, anchor="start", size=14)
    return d


DRAWINGS: Sequence[Callable[[], Drawing]] = (architecture, coupling, silo, tape, exact, dual_residual)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER)
    folder = parser.parse_args().output
    folder.mkdir(exist_ok=True, parents=True)
    for draw in DRAWINGS:
        (folder / f"{draw.__name__}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
