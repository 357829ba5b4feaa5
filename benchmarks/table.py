"""Put the speed table made of benchmarks/results/*.json between its markers in README.md.

python benchmarks/table.py          # --check: only say whether the README is up to date
"""

import argparse
import json
import sys

import measure

README = measure.RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- speed: begin, made by benchmarks/table.py -->", "<!-- speed: end -->"


def table() -> str:
    """Markdown: of each benchmark the newest result."""
    newest = {}
    for path in sorted(measure.RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if "benchmark" in result:
            newest[result["benchmark"]] = result
    lines = [
        "| command | row | seconds | images/s | against the released arithmetic |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for result in newest.values():
        where = f"{result['machine']['device']}, {result['machine']['cpu_threads']} threads, torch {result['machine']['torch']}"
        for name, row in result["rows"].items():
            first = (
                f"`{result['command']}` ({result['date']}, {where})" if name == "reference" else ""
            )
            lines.append(
                f"| {first} | {name} | {row['median_sec']:.3g} | {row['images_per_sec']:.3g} | {row['ratio']:.2f} |"
            )
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true")
    args = p.parse_args()
    text = README.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    fresh = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if args.check:
        return (
            0
            if fresh == text
            else "error: README.md's speed table is not what benchmarks/results says; run benchmarks/table.py"
        )
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
