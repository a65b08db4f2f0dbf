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


def named(row: dict) -> str:
    """The variant, and the commit of a row that is kept from another run than the others."""
    return row["variant"] + (f" (at {row['commit'][:10]})" if "commit" in row else "")


def timings(data: dict) -> list[str]:
    """One line per variant of a harness file; times relative to the first variant of the job. "Host" is the time until
    the calls returned; on a CPU that is the median, and files made before it was taken lack it."""
    lines = [
        "| job | variant | median | host | relative time | of ceiling | peak MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['name']} | {row['variant']} | {row['skipped']} |  |  |  |  |")
            continue
        ceiling = f"{row['fraction_of_ceiling']:.0%}" if (row["fraction_of_ceiling"] or 0) >= 0.005 else ""
        relative = "" if row["speedup"] is None else f"{1 / row['speedup']:.2f}"
        time, host, peak = row["median_s"] * 1e3, row.get("host_s"), row["peak_bytes"] / 2**20
        called = "" if host is None or row["device"] == "cpu" else f"{host * 1e3:.3f} ms"
        lines.append(
            f"| {row['name']} | {named(row)} | {time:.3f} ms | {called} | {relative} | {ceiling} | {peak:.1f} |"
        )
    if not any(row.get("host_s") and row["device"] != "cpu" for row in data["rows"]):
        lines = [without_column(line, 4) for line in lines]
    return lines


def without_column(line: str, at: int) -> str:
    cells = line.split("|")
    return "|".join(cells[:at] + cells[at + 1 :])


def blocks(data: dict) -> list[str]:
    """One line per variant of bench.block: bytes kept, in units of d, beside the time."""
    lines = ["| job | variant | kept, d | relative time | peak MiB | tokens/s |", "|---|---|---:|---:|---:|---:|"]
    for row in data["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['name']} | {row['variant']} | {row['skipped']} |  |  |  |")
            continue
        kept = "" if row["saved_d"] is None else f"{row['saved_d']:.2f}"
        relative, peak = f"{1 / row['speedup']:.2f}" if row["speedup"] else "", row["peak_bytes"] / 2**20
        lines.append(
            f"| {row['name']} | {row['variant']} | {kept} | {relative} | {peak:.0f} | {row['tokens_per_s']:,.0f} |"
        )
    return lines


def models(data: dict) -> list[str]:
    """One line per recipe of bench.llama: a training step's time, and all that it holds at once."""
    lines = ["| model | recipe | step | host | tokens/s | peak GiB |", "|---|---|---:|---:|---:|---:|"]
    for row in data["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['name']} | {row['variant']} | {row['skipped']} |  |  |  |")
            continue
        time, host, peak = row["median_s"] * 1e3, row["host_s"] * 1e3, row["peak_bytes"] / 2**30
        numbers = f"{time:.0f} ms | {host:.0f} ms | {row['tokens_per_s']:,.0f} | {peak:.2f}"
        lines.append(f"| {row['name']} | {named(row)} | {numbers} |")
    return lines


def host_times(data: dict) -> list[str]:
    """One line per variant of bench.host_time: microseconds a layer."""
    lines = ["| variant | forward | backward | relative time |", "|---|---:|---:|---:|"]
    for row in data["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['variant']} | {row['skipped']} |  |  |")
            continue
        relative = "" if row["relative"] is None else f"{row['relative']:.2f}"
        times = f"{row['forward_s'] * 1e6:.0f} µs | {row['backward_s'] * 1e6:.0f} µs"
        lines.append(f"| `{row['variant']}` | {times} | {relative} |")
    return lines


def ceilings(data: dict) -> list[str]:
    lines = ["| what | measured |", "|---|---:|"]
    for row in data["rows"]:
        lines.append(f"| {row['name']} | {row.get('skipped') or '{ceiling:,.1f} {unit}'.format(**row)} |")
    return lines


def findings(data: dict) -> list[str]:
    """What the tests marked gpu or a tool found: the counts, then what failed."""
    lines = ["| what | found |", "|---|---|"]
    for row in data["rows"]:
        counts = [
            f"{row[key]} {key.replace('_', ' ')}" for key in ("passed", "failed", "errors", "left_out") if key in row
        ]
        counts += [f"{row['found']} errors"] if "found" in row else []
        said = [text for text in (row.get("message"), row.get("skipped")) if text]
        what = row["name"] if row["variant"].startswith("all") else row["variant"]
        lines.append(f"| {what} | {'; '.join([*counts, *said]).replace('|', '/')} |")
    return lines


def launches(data: dict) -> list[str]:
    """One line per kernel under ncu: its time, and its shares of the memory's and the multiprocessors' speed."""
    lines = ["| kernel | time | memory | multiprocessors |", "|---|---:|---:|---:|"]
    for row in data["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['variant']} | {row['skipped']} |  |  |")
            continue
        shares = [f"{row[key]:.0%}" if key in row else "" for key in ("memory", "compute")]
        lines.append(f"| `{row['variant'][:60]}` | {row.get('duration', 0.0) * 1e6:.1f} µs | {' | '.join(shares)} |")
    return lines


FORMS = {"block": blocks, "llama": models, "host_time": host_times, "ceilings": ceilings, "launches-ncu": launches}
FORMS |= {"tests": findings, "launches-memcheck": findings, "launches-racecheck": findings}


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
        if "lr" in rows[0]:
            recipe += f"` at `{rows[0]['lr']:g}"
        lines.append(f"| `{recipe}` | {who} | {mean:.2f} % | {', '.join(f'{e:.2f}' for e in each)} | {seconds} |")
    return lines


def table(name: str) -> str:
    path = ROOT / "bench" / "results" / f"{name}.json"
    if not path.exists():
        return "*Not measured yet.*"
    data = json.loads(path.read_text())
    environment = data["environment"]
    first = data["rows"][0]
    forms = {"accuracy": accuracies, "errors": fidelity}
    form = progress if data.get("head_first") else next((f for key, f in forms.items() if key in first), timings)
    form = next((f for beginning, f in FORMS.items() if name.startswith(beginning)), form)
    lines = form(data)
    made = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
    commit = (environment["commit"] or "unknown")[:10]
    return "\n".join([*lines, "", f"{made}, {environment['date'][:10]}, commit {commit}."])


def filled(text: str) -> str:
    return re.sub(
        r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{table(match[2])}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    for file in FILES:
        path = ROOT / file
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
