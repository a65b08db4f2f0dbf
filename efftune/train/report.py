"""loss.png, memory.png and report.html, one page with the pictures inside it."""

from __future__ import annotations

import base64
import io
from functools import partial
from html import escape
from typing import Any

from efftune.train.rundir import RunDir, write_atomically

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top; }}
tr {{ border-bottom: 1px solid #ddd; }} img {{ max-width: 100%; }}
pre {{ background: #f5f5f5; padding: 1rem; white-space: pre-wrap; }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def write(run: RunDir, settings: dict[str, Any], summary: str) -> None:
    """Draws what metrics.jsonl holds, and writes the pictures and the page."""
    records = run.records()
    steps = [r for r in records if "loss" in r]
    pictures = [
        ("loss.png", _draw(partial(_loss, objective=settings["objective"]), records, steps)),
        ("memory.png", _draw(partial(_memory, recipe=settings["recipe"]), records, steps)),
    ]
    for name, png in pictures:
        (run.path / name).write_bytes(png)
    before, after = ([r for r in records if r.get("when") == when][-1:] for when in ("before", "after"))
    parts = [_comparison(before[0] if before else {}, after[0] if after else {})]
    if steps:
        tokens = sum(r["tokens"] for r in steps)
        rate = tokens / max(1e-9, steps[-1]["seconds"])
        parts.append(
            f"<p>{steps[-1]['step']} steps, {tokens:,} tokens read in {steps[-1]['seconds']:.0f} s "
            f"({rate:,.0f} per second); peak memory {max(r['memory_peak'] for r in steps) / 2**20:,.0f} MiB.</p>"
        )
    for name, png in pictures:
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    parts.append(f"<h2>What trains</h2><pre>{escape(summary)}</pre>")
    parts.append("<h2>Settings</h2>" + _table([(k, v) for k, v in settings.items() if v is not None]))
    write_atomically(
        run.path / "report.html", PAGE.format(title=escape(f"efftune: {run.path.name}"), body="\n".join(parts))
    )


def _comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    rows = [("", "before", "after")]
    rows += [
        (name.replace("eval_", "held-out ", 1), _number(before.get(name)), _number(after.get(name)))
        for name in {**before, **after}
        if name.startswith("eval_")
    ]
    text = "<h2>Before and after</h2>" + _table(rows)
    for title, record in (("before", before), ("after", after)):
        if record.get("sample"):
            text += f"<h3>A sample {title}</h3><pre>{escape(record['sample'])}</pre>"
    return text


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "–"


def _table(rows: list[tuple]) -> str:
    lines = ("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table>" + "".join(lines) + "</table>"


def comparison(rows: list[dict[str, Any]], objective: str) -> bytes:
    """Loss curves of several runs as a PNG; rows as `efftune compare` makes them."""

    def draw(axes: Any, rows: list[dict[str, Any]], _: Any) -> None:
        for number, row in enumerate(rows):
            steps = [r for r in row["records"] if "loss" in r]
            axes.plot([r["step"] for r in steps], _smooth(steps), color=f"C{number}", label=row["recipe"])
            name, held = _held_out(row["records"], objective)
            axes.plot(*held, "o", color=f"C{number}")
            axes.set_ylabel(f"{name} (line: training, smoothed; dots: held out)")

    return _draw(draw, rows, [])


def _draw(draw: Any, records: list[dict[str, Any]], steps: list[dict[str, Any]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    draw(axes, records, steps)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _smooth(steps: list[dict[str, Any]]) -> list[float]:
    smooth: list[float] = []
    for r in steps:
        smooth.append(r["loss"] if not smooth else 0.9 * smooth[-1] + 0.1 * r["loss"])
    return smooth


def _held_out(records: list[dict[str, Any]], objective: str) -> tuple[str, tuple[list[int], list[float]]]:
    """Returns the name of what training minimises, and its held-out values by step."""
    name = objective.rpartition(":")[2]
    sign, label = (1, name) if name == "loss" else (-1, f"-{name}")
    held = [(r["step"], sign * r[f"eval_{name}"]) for r in records if f"eval_{name}" in r]
    return label, ([step for step, _ in held], [value for _, value in held])


def _loss(axes: Any, records: list[dict[str, Any]], steps: list[dict[str, Any]], objective: str) -> None:
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="C0", alpha=0.35, label="training")
    axes.plot([r["step"] for r in steps], _smooth(steps), color="C0", label="training, smoothed")
    name, held = _held_out(records, objective)
    if held[0]:
        axes.plot(*held, "o-", color="C1", label="held out")
    axes.set_ylabel(name)


HELD = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "saved": "kept for backward (one micro-batch)",
}


def _memory(axes: Any, records: list[dict[str, Any]], _: Any, recipe: str) -> None:
    """Draws what the run's first step held, beside the same of plain full fine-tuning."""
    found = {r["when"]: r for r in records if r.get("when") in ("memory", "plain")}
    titles = {"memory": recipe.replace(" + ", " +\n"), "plain": "plain model:\nall weights, AdamW"}
    if "unknown" in found.get("plain", {}):
        axes.set_title(f"plain model: not known ({found.pop('plain')['unknown'][:80]})", fontsize="small")
    bars = [when for when in titles if when in found]
    ends = [0.0] * len(bars)
    for name, label in HELD.items():
        widths = [found[when][name] / 2**20 for when in bars]
        axes.barh([titles[when] for when in bars], widths, left=ends, label=label)
        ends = [end + width for end, width in zip(ends, widths)]
    for place, end in enumerate(ends):
        axes.text(end, place, f" {end:,.1f} MiB", va="center")
    axes.set_xlim(0, 1.2 * max(ends, default=1.0))
    axes.set_xlabel("MiB that the first step holds")
