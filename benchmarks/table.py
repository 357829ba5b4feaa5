"""Write the speed table of benchmarks/results/*.json between its markers in README.md.

python benchmarks/table.py          # --check: only say whether the README is up to date
"""

import argparse
import json
import sys

import measure

README = measure.RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- speed: begin, made by benchmarks/table.py -->", "<!-- speed: end -->"


def table() -> str:
    """The newest result of each benchmark, in Markdown."""
    newest = {}
    for path in sorted(measure.RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if "benchmark" in result:
            newest[result["benchmark"]] = result
    lines = [
        "| command | row | seconds | images/s | speed-up over the reference |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for result in newest.values():
        machine = result["machine"]
        hardware = f"{machine['device']}, {machine['cpu_threads']} threads"
        origin = f"{result['date']}, {hardware}, torch {machine['torch']}"
        for name, row in result["rows"].items():
            command = f"`{result['command']}` ({origin})" if name == "reference" else ""
            speed = f"{row['median_sec']:.3g} | {row['images_per_sec']:.3g} | {row['ratio']:.2f}"
            lines.append(f"| {command} | {name} | {speed} |")
    return "\n".join(lines)


def main() -> int | str:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true")
    args = p.parse_args()
    text = README.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    updated = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if not args.check:
        README.write_text(updated)
    elif updated != text:
        return "error: README.md's speed table is out of date; run benchmarks/table.py"
    return 0


if __name__ == "__main__":
    sys.exit(main())
