"""The tests marked gpu, in several processes, and what they found as a file of results.

python -m bench.gpu_tests [--device cuda] [--dry] [--processes 12] [--limit SECONDS] [PATH ...]

Triton compiles some 900 kernels in these tests, each of them once (TRITON_CACHE_DIR), and in one process that takes
longer than a machine is lent for. A run that is cut off by --limit has the tests that were finished. Writes
tests-<device>.json (a row with the counts, and one for each test that failed, with its message), logs/tests.xml and
logs/tests.txt. Failures are results: the exit status is 0 if the tests ran.
"""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from bench.harness import ROOT, Job, kind, measure, parsed, parser

LINE = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (\S.*?)\s*$")
PLAIN = re.compile(r"^([^\s\[]\S*::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def outcomes(text: str) -> dict[str, str]:
    """Test -> outcome, from the lines that `pytest -v` prints as it goes: they are there also if the end is not."""
    found = {}
    for line in text.splitlines():
        if match := LINE.match(line):
            found[match[2]] = match[1]
        elif match := PLAIN.match(line):
            found[match[1]] = match[2]
    return found


def messages(junit: Path) -> dict[str, str]:
    """Name of a failed test -> the first line of its message."""
    if not junit.exists():
        return {}
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        for trouble in (*case.iter("failure"), *case.iter("error")):
            found[case.get("name", "")] = (trouble.get("message") or "").strip().split("\n")[0][:300]
    return found


def command(args, junit: Path) -> list[str]:
    made = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--tb", "short"]
    made += ["--junitxml", str(junit), "-o", "junit_family=xunit2", *args.paths]
    if importlib.util.find_spec("xdist"):
        made += ["-n", str(args.processes), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        made += ["--timeout", "200"]
    return [*made, "--collect-only"] if args.dry else made


def rows_for(args) -> list[dict]:
    logs = args.results / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    junit, log, began = logs / "tests.xml", logs / "tests.txt", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command(args, junit), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait(args.limit)
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGINT)  # pytest then writes the junit file of what it has
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
    text = log.read_text(errors="replace")
    found, why = outcomes(text), messages(junit)
    row = {"name": f"tests, {kind(args.device)}", "device": args.device}
    words = {"passed": "PASSED", "failed": "FAILED", "errors": "ERROR", "left_out": "SKIPPED"}
    counts = {name: list(found.values()).count(word) for name, word in words.items()}
    total = row | {"variant": "all", "exit": status, "seconds": time.monotonic() - began} | counts
    if args.dry:
        collected = re.search(r"(\d+)(?:/\d+)? tests? collected", text)
        total |= {"collected": int(collected[1]) if collected else 0}
        total["skipped"] = "skipped: a dry run" if collected and status == 0 else "failed: no tests were collected"
    elif status is None:
        total["skipped"] = f"failed: cut off after {args.limit:.0f} s, with the counts so far"
    elif not found:
        last = (text.strip().splitlines() or [""])[-1]
        total["skipped"] = f"failed: pytest ended with {status} before the first test: {last}"
    bad = sorted(test for test, outcome in found.items() if outcome in ("FAILED", "ERROR"))
    return [total, *(row | {"variant": test, "message": why.get(test.rpartition("::")[2], "")} for test in bad)]


def show(rows: list[dict]) -> None:
    for row in rows:
        print(f"{row['variant']}:", *(f"{key} {row[key]}" for key in row if key not in ("name", "variant", "device")))


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--processes", type=int, default=12)
    options.add_argument("--limit", type=float, default=3600.0)
    options.add_argument("paths", nargs="*", default=["tests"])
    args = parsed(options, argv)
    measure(args, "tests", [Job(" ".join(args.paths), partial(rows_for, args))], show)


if __name__ == "__main__":
    main()
