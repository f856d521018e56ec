"""Draws the ratios of training steps and prints all ratios as Markdown tables.

python -m benchmarks.plot benchmarks/results/*.jsonl --out benchmarks/results/steps.png
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(files: Iterable[Path]) -> list[Record]:
    """The newest record of each case and variant, in the order of the files."""
    newest: dict[tuple[str, str], Record] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            key = record["name"], record["variant"]
            if key not in newest or record["date"] >= newest[key]["date"]:
                newest[key] = record
    return list(newest.values())


def by_case(records: Iterable[Record], kind: str) -> dict[str, list[Record]]:
    """The records of the cases "kind/…"."""
    cases: dict[str, list[Record]] = {}
    for record in records:
        if record["name"].startswith(f"{kind}/"):
            cases.setdefault(record["name"], []).append(record)
    return cases


def table(cases: dict[str, list[Record]]) -> str:
    """Cases down, variants across: the ratio to the fastest plain variant, and that one's time."""
    variants = list(dict.fromkeys(r["variant"] for rows in cases.values() for r in rows))
    lines = ["| " + " | ".join(["case", "baseline", *variants]) + " |"]
    lines.append("|" + "---|" * (2 + len(variants)))
    for name, records in cases.items():
        cells = {r["variant"]: cell(r) for r in records}
        base = next((r for r in records if r["variant"] == r["baseline"]), None)
        time = f"{base['p50'] * 1e3:.3g} ms, {base['baseline']}" if base else ""
        row = [name, time, *(cells.get(v, "") for v in variants)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def cell(record: Record) -> str:
    if record["ratio"] is None:
        return "wrong" if record["reason"].startswith("wrong") else "–"
    return f"{record['ratio']:.2f}" if record["ratio"] < 10 else f"{record['ratio']:.0f}"


def draw(cases: dict[str, list[Record]], file: Path) -> None:
    """One row a case, one colour a variant; the axis is logarithmic, with a line at 1."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    records = [r for rows in cases.values() for r in rows]
    timed = [r for r in records if r["ratio"] is not None]
    variants = list(dict.fromkeys(r["variant"] for r in timed))
    rows = {name: i for i, name in enumerate(cases)}
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.7 * len(rows)), layout="constrained")
    axes.axvline(1.0, color="black", linewidth=1)
    markers = {"plain": "|", "ours": "o"}  # by what the name begins with; the peers have "x"
    for i, variant in enumerate(variants):
        points = [r for r in timed if r["variant"] == variant]
        axes.plot(
            [r["ratio"] for r in points],
            [rows[r["name"]] + 0.5 * (i / len(variants) - 0.5) for r in points],
            markers.get(variant.split(",")[0], "x"),
            label=variant,
        )
    axes.set_xscale("log")
    axes.set_yticks(list(rows.values()), [name.removeprefix("step/") for name in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step / fastest plain step, medians")
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    axes.set_title(f"{timed[0]['cpu']}, {timed[0]['threads']} threads", fontsize="medium")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, help="files of `bench --out`")
    parser.add_argument("--out", type=Path, metavar="PNG", help="the picture; none by default")
    args = parser.parse_args(argv)
    records = read(args.records)
    for kind in dict.fromkeys(r["name"].split("/")[0] for r in records):
        print(f"\n{table(by_case(records, kind))}")
    steps = by_case(records, "step")
    if args.out and not any(r["ratio"] is not None for rows in steps.values() for r in rows):
        print("no times of training steps in these records: no picture", file=sys.stderr)
        return 1
    if args.out:
        draw(steps, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
