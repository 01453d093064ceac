"""Draw docs/figures/*.svg: `python tools/draw_figures.py`. A test holds the files against what this writes."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"

# A panel of its own keeps the text readable on any page; readers' dark scheme turns the colours.
STYLE = """
.panel{fill:#f7f8fa;stroke:#d5d9df} .box{fill:#ffffff;stroke:#5b6673} .teacher{fill:#e3efff;stroke:#2f6db3}
.student{fill:#e5f5e6;stroke:#2f8a3c} .loss{fill:#fdeeda;stroke:#b9701a} .store{fill:#efe6fb;stroke:#7a4fb5}
.off{fill:#e9ebee;stroke:#9aa3ad} text{font:13px sans-serif;fill:#1c2229} .small{font-size:11px;fill:#47515c}
.title{font-weight:bold} .line{stroke:#47515c;fill:none;stroke-width:1.4} .back{stroke:#b9701a;stroke-dasharray:5 3}
.head{fill:#47515c;stroke:none} .backhead{fill:#b9701a;stroke:none}
@media (prefers-color-scheme:dark){
.panel{fill:#1b1f24;stroke:#3a424c} .box{fill:#262c33;stroke:#98a3af} .teacher{fill:#1d324d;stroke:#6fa8e8}
.student{fill:#1d3a22;stroke:#69c077} .loss{fill:#46331a;stroke:#e0a050} .store{fill:#33254a;stroke:#b08ae6}
.off{fill:#30363d;stroke:#6b7580} text{fill:#e8ebee} .small{fill:#b4bdc6} .line{stroke:#b4bdc6} .back{stroke:#e0a050}
.head{fill:#b4bdc6} .backhead{fill:#e0a050}}
""".strip()


class Figure:
    """An SVG of one size, filled piece by piece; all lengths are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._pieces = [f'<rect class="panel" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>']

    def text(self, x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> None:
        """A line of text with its baseline at y."""
        name = f' class="{kind}"' if kind else ""
        self._pieces.append(f'<text{name} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
        """A box with centred lines, the first of them in full size."""
        shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"'
        self._pieces.append(f'<rect class="{kind}" {shape}/>')
        start = y + height / 2 + 5 - 8 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + width / 2, start + 16 * number, line, kind="small" if number else "", anchor="middle")

    def arrow(self, *points: tuple[float, float], kind: str = "") -> None:
        """A line through the points with a head at the last, reached straight along one axis."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._pieces.append(f'<polyline class="line {kind}" points="{path}"/>')
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        corners = [(x, y), (x - 8 * dx + 4 * dy, y - 8 * dy + 4 * dx), (x - 8 * dx - 4 * dy, y - 8 * dy - 4 * dx)]
        head = " ".join(f"{a:g},{b:g}" for a, b in corners)
        self._pieces.append(f'<polygon class="{kind}head" points="{head}"/>')

    def render(self) -> str:
        """The whole file."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        body = "\n".join(self._pieces)
        title = f"<title>{escape(self.title)}</title>"
        style = f"<style>\n{STYLE}\n</style>"
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{title}\n{style}\n{body}\n</svg>\n'


def draw_step() -> Figure:
    """One step: two pipelines over the same ranks, one loss, one backward pass."""
    figure = Figure(820, 300, "A training step: teacher and student pipelines over the same ranks meet in the loss")
    figure.box(20, 110, 110, 62, "box", "microbatches", "tokens [b, s]")
    for row, kind, name in ((40, "teacher", "teacher"), (180, "student", "student")):
        figure.box(180, row, 130, 62, kind, f"{name}, stage 0", "embedding, layers")
        figure.box(370, row, 130, 62, kind, f"{name}, stage 1", "layers, final norm")
        figure.arrow((310, row + 31), (370, row + 31))
    figure.arrow((130, 130), (155, 130), (155, 71), (180, 71))
    figure.arrow((130, 150), (155, 150), (155, 211), (180, 211))
    figure.text(508, 64, "hidden [s, b, h_t]", kind="small")
    figure.text(508, 204, "hidden [s, b, h]", kind="small")
    figure.box(620, 95, 170, 92, "loss", "loss, on stage 1", "both heads, chunk by chunk", "never all logits at once")
    figure.arrow((500, 71), (640, 71), (640, 95))
    figure.arrow((500, 211), (640, 211), (640, 187))
    figure.arrow((760, 187), (760, 262), (435, 262), (435, 242), kind="back")
    figure.arrow((435, 262), (245, 262), (245, 242), kind="back")
    figure.text(560, 280, "gradients, divided once by the number of tokens that count", kind="small", anchor="middle")
    figure.text(180, 24, "first the teacher for all microbatches of a step, then the student, forward and backward",
                kind="small")  # fmt: skip
    return figure


def draw_heads() -> Figure:
    """The loss on two tensor ranks: each works on its rows of both heads."""
    figure = Figure(820, 330, "The loss on two tensor ranks: seven figures per row travel, logits do not")
    for rank, top in ((0, 40), (1, 190)):
        figure.text(20, top - 12, f"tensor rank {rank}", kind="title")
        figure.box(20, top, 130, 46, "student", "student hidden", "[c, h], the same")
        figure.box(20, top + 56, 130, 46, "teacher", "teacher hidden", "[c, h_t], the same")
        figure.box(180, top, 130, 46, "student", "rows of its head", "[v/2, h]")
        figure.box(180, top + 56, 130, 46, "teacher", "rows of its head", "[v/2, h_t]")
        figure.text(165, top + 28, "x", anchor="middle")
        figure.text(165, top + 84, "x", anchor="middle")
        figure.box(350, top, 110, 46, "box", "z [c, v/2]", "a reused buffer")
        figure.box(350, top + 56, 110, 46, "box", "u [c, v/2]", "a reused buffer")
        figure.arrow((310, top + 23), (350, top + 23))
        figure.arrow((310, top + 79), (350, top + 79))
        figure.arrow((460, top + 51), (500, top + 51))
        figure.box(660, top, 140, 102, "student", "gradient in z", "d hidden [c, h]", "d head [v/2, h], fp32")
        figure.arrow((610, top + 51), (660, top + 51))
    lines = (
        "7 numbers per row",
        "and rank:",
        "label's logit,",
        "references,",
        "sums",
        "",
        "merged alike",
        "on every rank",
    )
    figure.box(500, 40, 110, 252, "loss", "all-gather", *lines)
    figure.text(410, 318, "then the next chunk of c rows in the same buffers", kind="small", anchor="middle")
    return figure


def draw_ranks() -> Figure:
    """Eight ranks as TP 2 x PP 2 x DP 2."""
    figure = Figure(820, 330, "Eight ranks as TP 2 x PP 2 x DP 2")
    for replica in range(2):
        left = 30 + 395 * replica
        figure.text(left, 30, f"replica {replica} (data parallel): microbatches of its own", kind="title")
        for stage in range(2):
            top = 60 + 125 * stage
            what = ("embeddings, first layers", "last layers, both heads")[stage]
            figure.text(left, top - 8, f"pipeline stage {stage}", kind="small")
            for tensor in range(2):
                rank = (stage * 2 + replica) * 2 + tensor
                x = left + 185 * tensor
                figure.box(x, top, 170, 84, "box", f"rank {rank}")
                figure.box(x + 8, top + 8, 154, 22, "teacher", "teacher: half of each")
                figure.box(x + 8, top + 54, 154, 22, "student", "student: half of each")
            figure.text(left + 178, top + 98, what, kind="small", anchor="middle")
    figure.text(410, 316, "tensor ranks share every matrix, stages the layers, replicas the batch",
                kind="small", anchor="middle")  # fmt: skip
    return figure


def draw_cache() -> Figure:
    """A cache is written once and read by any number of students."""
    figure = Figure(820, 250, "A teacher cache: written once, read by any number of students")
    figure.box(20, 40, 130, 60, "box", "samples", "id names content")
    figure.box(200, 40, 150, 60, "teacher", "teacher alone", "launch.sh cache")
    figure.box(410, 30, 170, 80, "store", "teacher cache", "draws or top k of each", "token: 20 to 100 bytes")
    figure.arrow((150, 70), (200, 70))
    figure.arrow((350, 70), (410, 70))
    for number, y in enumerate((130, 190)):
        figure.box(410, y, 170, 44, "student", f"student {number}", "teacher.source: cache")
        figure.box(640, y, 150, 44, "loss", "forward KL", "from the ids kept")
        figure.arrow((580, y + 22), (640, y + 22))
    figure.arrow((580, 60), (805, 60), (805, 212), (790, 212))
    figure.arrow((580, 80), (715, 80), (715, 130))
    figure.arrow((85, 100), (85, 152), (410, 152))
    figure.arrow((85, 152), (85, 212), (410, 212))
    figure.text(200, 144, "any order, seed, batch size, layout", kind="small")
    figure.text(200, 226, "the same ids, lengths and cuts", kind="small")
    return figure


def draw_samples() -> Figure:
    """How text and examples become samples."""
    figure = Figure(820, 250, "Text is cut every sequence_length tokens; examples are packed")
    figure.text(20, 30, "text: documents are one stream, cut every sequence_length tokens; a sample's id is its place",
                kind="title")  # fmt: skip
    lengths, x = (150, 240, 90, 200, 100), 20
    for number, length in enumerate(lengths):
        figure.box(x, 45, length, 26, ("teacher", "store")[number % 2], f"document {number}")
        x += length
    for sample in range(4):
        figure.box(20 + 195 * sample, 80, 195, 26, "student", f"sample {sample}")
    figure.text(20, 145, "examples, packed: several to a sample, each attending to itself alone, padded at the end",
                kind="title")  # fmt: skip
    rows = (((105, "example 2"), (60, "5")), ((85, "example 0"), (50, "4"), (36, "7")))
    for row, entries in enumerate(rows):
        x = 20
        for number, (length, name) in enumerate(entries):
            figure.box(x + 390 * row, 160, length, 26, ("teacher", "store")[number % 2], name)
            x += length
        if x < 215:
            figure.box(x + 390 * row, 160, 215 - x, 26, "off", "pad" if 215 - x > 30 else "")
        figure.box(20 + 390 * row, 195, 195, 26, "student", f"sample {row}")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "step.svg": draw_step,
    "heads.svg": draw_heads,
    "ranks.svg": draw_ranks,
    "cache.svg": draw_cache,
    "samples.svg": draw_samples,
}


def main() -> None:
    """Write all figures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw().render(), encoding="utf-8")


if __name__ == "__main__":
    main()
