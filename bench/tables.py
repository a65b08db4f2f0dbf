"""Writes the tables of README.md and docs/benchmarks.md from bench/results: what stands between
`<!-- table NAME -->` and `<!-- end -->` is made from bench/results/NAME.json.

python -m bench.tables
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "docs/benchmarks.md")


def timings(data: dict) -> list[str]:
    """One line per variant of a harness file; times relative to the first variant of the job."""
    lines = ["| job | variant | median | relative time | of ceiling | peak MiB |", "|---|---|---:|---:|---:|---:|"]
    for row in data["rows"]:
        ceiling = f"{row['fraction_of_ceiling']:.0%}" if (row["fraction_of_ceiling"] or 0) >= 0.005 else ""
        time, relative, peak = row["median_s"] * 1e3, 1 / row["speedup"], row["peak_bytes"] / 2**20
        lines.append(f"| {row['name']} | {row['variant']} | {time:.3f} ms | {relative:.2f} | {ceiling} | {peak:.1f} |")
    return lines


def blocks(data: dict) -> list[str]:
    """One line per variant of bench.block: bytes kept, in units of d, beside the time."""
    lines = ["| job | variant | kept, d | relative time | peak MiB | tokens/s |", "|---|---|---:|---:|---:|---:|"]
    for row in data["rows"]:
        kept = "" if row["saved_d"] is None else f"{row['saved_d']:.2f}"
        relative, peak = 1 / row["speedup"], row["peak_bytes"] / 2**20
        lines.append(
            f"| {row['name']} | {row['variant']} | {kept} | {relative:.2f} | {peak:.0f} | {row['tokens_per_s']:,.0f} |"
        )
    return lines


def fidelity(data: dict) -> list[str]:
    """One line per setting of bench.fidelity: bytes kept, and the error of every layer's gradient."""
    places = list(data["rows"][0]["errors"])
    lines = [f"| keeps | MiB | {' | '.join(places)} |", "|---|---:|" + "---:|" * len(places)]
    for row in data["rows"]:
        errors = " | ".join(f"{100 * error:.1f} %" for error in row["errors"].values())
        lines.append(f"| {row['what']} | {row['kept_bytes'] / 2**20:.1f} | {errors} |")
    return lines


def progress(data: dict) -> list[str]:
    """One line per run of bench.sst2 --head-first: held-out loss and accuracy, before and after."""
    lines = ["| recipe | steps | loss before | after | accuracy before | after |", "|---|---:|---:|---:|---:|---:|"]
    for row in data["rows"]:
        loss, accuracy = ([row[when][f"eval_{name}"] for when in ("before", "after")] for name in ("loss", "accuracy"))
        numbers = [f"{value:.4f}" for value in loss] + [f"{100 * value:.2f} %" for value in accuracy]
        lines.append(f"| `{row['recipe']}` | {row['steps']} | {' | '.join(numbers)} |")
    return lines


def accuracies(data: dict) -> list[str]:
    lines = ["| recipe | written with | dev accuracy, mean | of each seed | training, s |", "|---|---|---:|---:|---:|"]
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in data["rows"]:
        groups.setdefault((row["recipe"], row["who"]), []).append(row)
    for (recipe, who), rows in groups.items():
        each = [100 * row["accuracy"] for row in rows]
        timed = [row["seconds"] for row in rows if row["seconds"] is not None]  # None: the machine had other work
        seconds = f"{sum(timed) / len(timed):.0f}" if timed else ""
        mean = sum(each) / len(each)
        lines.append(f"| `{recipe}` | {who} | {mean:.2f} % | {', '.join(f'{e:.2f}' for e in each)} | {seconds} |")
    return lines


def table(name: str) -> str:
    path = ROOT / "bench" / "results" / f"{name}.json"
    if not path.exists():
        return "*Not measured yet.*"
    data = json.loads(path.read_text())
    environment = data["environment"]
    first = data["rows"][0]
    forms = {"accuracy": accuracies, "saved_d": blocks, "errors": fidelity}
    form = progress if data.get("head_first") else next((f for key, f in forms.items() if key in first), timings)
    lines = form(data)
    made = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
    commit = (environment["commit"] or "unknown")[:10]
    return "\n".join([*lines, "", f"{made}, {environment['date'][:10]}, commit {commit}."])


def main() -> None:
    for file in FILES:
        path = ROOT / file
        text = re.sub(
            r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)",
            lambda match: f"{match[1]}{table(match[2])}\n{match[3]}",
            path.read_text(),
            flags=re.DOTALL,
        )
        path.write_text(text)


if __name__ == "__main__":
    main()
