"""What bench_ops.py writes: a Markdown table, the numbers as JSON, and a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

Row = dict[str, Any]
WRONG = 0.1  # a relative error beyond this is no rounding; the tests hold ours to far less
LIMITS = {"h": 1e-3, "u": 1e-3}  # float32 states after a few steps: beyond this they did not advance

LEGEND = """
Medians, in brackets the 10th to 90th percentile. All contenders of a case take turns in one process, and the L2 is emptied before
every call. Short prompts and decode steps are timed with the GPU waiting for the launches; a decode time is that of one of
several layers, each with its own states. ×: the authors' time over this one, by a CUDA graph where this is one. TFLOP/s of a GKA
row count the products of our ops (custom_ops/flops.py), also for the authors; GB/s count every input and output once. Floor: the
longer of those operations at the measured rate of a matrix product and those bytes at that of a copy. Peak: memory that a call
allocates, over its inputs and o. Peers' autotuners choose among {peer_configs} configurations each.

The last timed call runs in memory full of NaN (a CUDA graph's: its outputs) and is the one that is checked; a decode step is
checked after its timing, in three steps from the first states. Errors are relative, to the definition in float64, on the last
sequence and its last heads (for Gated DeltaNet, MesaNet and SDPA on the first 256 tokens of o); of the gradients, or a decode
step's states, the largest is shown; a single op's error is its difference to what it returned within the whole. WRONG: above
{wrong} (states: 0.001), or anything not finite anywhere.
"""


def environment(device: str) -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("triton", "gka-compile", "fla-core", "einops")
    versions = {"Python": platform.python_version(), "torch": torch.__version__} | {p: version(p) for p in packages}
    name, driver = "CPU (plumbing only: these times say nothing)", None
    if device == "cuda":
        name = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
    return {"device": name, "driver": driver, "versions": versions, "date": datetime.date.today().isoformat()}


def slug(result: Row) -> str:
    return re.sub(r"[^a-z0-9]+", "-", result["device"].split(" (")[0].lower()).strip("-")


def rates_text(result: Row) -> str:
    rates = result["rates"]
    return f"matrix product {rates['matmul'] / 1e12:.3g} TFLOP/s, copy {rates['copy'] / 1e9:.4g} GB/s"


def spread(times: list[float]) -> tuple[float, float, float]:
    """(median, 10th percentile, 90th percentile)."""
    low, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return median(times), low, high


def values(errors: dict[str, float | None]) -> dict[str, float]:
    """What is not finite is None in the JSON."""
    return {name: float("inf") if e is None else e for name, e in errors.items()}


def status(row: Row) -> str:
    if row["failure"]:
        return str(row["failure"])
    right = row["errors"] and all(e <= LIMITS.get(name, WRONG) for name, e in values(row["errors"]).items())
    return "ok" if right else "**WRONG**"


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    yield from ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def case_cells(row: Row, times: dict[str, list[float]]) -> list[str]:
    """One row under HEAD; ``times`` of all contenders."""
    if row["failure"] or not row["times"]:
        return [row["name"], *[""] * 8, status(row)]
    ms, low, high = spread(row["times"])
    graph = ", CUDA graph" if row["name"].endswith(("CUDA graph", "reduce-overhead")) else ""
    authors = times.get("authors" + graph) or times.get("authors") or times.get("authors, vLLM prefill")
    error, *rest = ((e, name) for name, e in values(row["errors"]).items())
    other = max(rest, default=None)
    return [
        row["name"] + (f" ({row['note']})" if row["note"] else ""),
        f"{ms:.4g} ({low:.4g}–{high:.4g})",
        f"{median(authors) / ms:.2f}" if authors else "",
        f"{row['flops'] / ms / 1e9:.3g}" if row["flops"] else "",
        f"{row['nbytes'] / ms / 1e6:.4g}",
        f"{row['floor'] / ms:.0%}" if row["floor"] else "",
        f"{row['peak'] / 2**20:.0f}" if row["peak"] is not None else "",
        f"{error[0]:.1e}",
        f"{other[0]:.1e} ({other[1]})" if other else "",
        status(row),
    ]


HEAD = ["contender", "ms", "×", "TFLOP/s", "GB/s", "of the floor", "peak MiB", "error of o", "of the rest", "check"]


def case_lines(case: Row) -> Iterator[str]:
    times = {row["name"]: row["times"] for row in case["rows"] if row["times"]}
    floor = next((row["floor"] for row in case["rows"] if row.get("floor") and row["name"].startswith("ours")), None)
    yield f"\n### {case['name']}" + (f"\n\nFloor {floor:.4g} ms." if floor else "") + "\n"
    yield from table(HEAD, [case_cells(row, times) for row in case["rows"]])


def error_lines(rows: list[Row]) -> Iterator[str]:
    names = list(dict.fromkeys(n for row in rows for n in row if n not in ("side", "failure")))
    cells = [[row["side"], *(f"{row[n]:.2e}" if n in row else "" for n in names), row["failure"]] for row in rows]
    yield "\n### Error of everything\n\nRelative, to the exact solve in float64 and autograd through it.\n"
    yield from table(["side", *names, ""], cells)


def cpu_lines(rows: list[Row]) -> Iterator[str]:
    yield "\n### CPU cost of one eager call\n\nB1 T128 and one decode step: µs until the call returns, in batches of 20.\n"
    cells = [[row["call"], row["failure"] or "{:.1f} ({:.1f}–{:.1f})".format(*spread(row["us"]))] for row in rows]
    yield from table(["call", "µs"], cells)


def cold_lines(rows: list[Row]) -> Iterator[str]:
    yield "\n### Cold start\n\nFresh process, empty caches; from the end of its imports to the end of a first forward+backward.\n"
    cells = [[row["side"], row["failure"] or f"{row['seconds']:.1f}"] for row in rows]
    yield from table(["side", "s"], cells)


SECTIONS = {"errors": error_lines, "cpu": cpu_lines, "cold": cold_lines}


def lines(result: Row, section: str | None) -> list[str]:
    """For the terminal: a section, or (None) the last case."""
    if section in SECTIONS and result[section]:
        return [line for line in SECTIONS[section](result[section]) if line.startswith("| ")]
    return [line for line in case_lines(result["cases"][-1]) if line.startswith("| ")] if result["cases"] else []


def markdown(result: Row) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    driver = f", driver {result['driver']}" if result["driver"] else ""
    out = [f"# {result['device']}, {result['date']}\n", f"{versions}{driver}; {rates_text(result)}; seed {result['seed']}.", LEGEND]
    out[2] = LEGEND.format(wrong=WRONG, peer_configs=result["peer_configs"])
    if not result["driver"]:
        out.append("On the CPU, as here, times are the wall clock's, no cache is emptied and no memory filled with NaN.")
    for case in result["cases"]:
        out += case_lines(case)
    for name, section in SECTIONS.items():
        out += section(result[name]) if result[name] else []
    return "\n".join(out) + "\n"


COLORS = {"ours": "tab:blue", "authors": "tab:orange", "others": "tab:gray"}


def plot(result: Row, path: Path) -> None:
    """One panel a case: median, 10th to 90th percentile, and the floor as a line."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found]
    except ImportError:
        return print(f"no plot: matplotlib is not installed; where it is: bench_ops.py --plot-from {path.with_suffix('.json')}")
    cases = [(c["name"], [r for r in c["rows"] if r["times"]]) for c in result["cases"]]
    cases = [(name, rows) for name, rows in cases if rows]
    if not cases:
        return None
    columns = min(3, len(cases))
    depth = -(-len(cases) // columns)
    tallest = max(len(rows) for _, rows in cases)
    figure = Figure(figsize=(5.2 * columns, (0.9 + 0.26 * tallest) * depth), layout="constrained")
    axes = figure.subplots(depth, columns, squeeze=False).flatten()
    for ax, (name, rows) in zip(axes, cases, strict=False):
        rows = rows[::-1]
        stats = [spread(row["times"]) for row in rows]
        errors = [[m - low for m, low, _ in stats], [high - m for m, _, high in stats]]
        colors = [COLORS.get(row["name"].split(",")[0], COLORS["ours" if name.startswith("ops") else "others"]) for row in rows]
        names = [row["name"] + ("" if status(row) == "ok" else " (WRONG)") for row in rows]
        ax.barh(names, [m for m, _, _ in stats], xerr=errors, color=colors, error_kw={"elinewidth": 0.8})
        for floor in {r["floor"] for r in rows if r["floor"] and r["name"].startswith("ours")}:
            ax.axvline(floor, color="tab:red", linewidth=1)
        ax.set_title(name, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.set_xlim(left=0)
        ax.set_ylim(len(rows) - tallest - 0.6, len(rows) - 0.4)  # bars of one height in all panels
    for ax in axes[len(cases) :]:
        ax.set_axis_off()
    figure.supxlabel("ms (bars to the 90th percentile; red: floor)", fontsize=8)
    figure.suptitle(f"{result['device']}, {result['date']}", fontsize=10)
    figure.savefig(path, dpi=130)


def write(result: Row, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / slug(result)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
