"""Render checks.jsonl as gpu.md: measurements next to their targets."""

import json
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from scripts.common.markdown import markdown_table

Line = dict[str, Any]

# check/figure (with wildcards) → (comparison, bound). The first match applies.
AIMS: dict[str, tuple[str, Any]] = {
    "exactness/logits, CPU ↔ device": ("≤", 2e-5),
    "exactness/gradients, CPU ↔ device": ("≤", 2e-5),
    "exactness/final weights, *": ("≤", 1e-5),
    "exactness/gradients, live chunks *": ("≤", 1e-6),
    "precision/*: skipped steps": ("≤", 3),
    "precision/*: largest loss difference to fp32": ("≤", 2e-2),
    "precision/*, full_determinism: same bits after resume": ("=", True),
    "memory/*: planned ÷ allocated": ("between", (0.85, 1.15)),
    "small_cards/*: reserved + context ÷ card": ("≤", 1.0),
    "small_cards/*: out of memory": ("=", 0),
    "small_cards/8 GB, forced out of memory: loss difference": ("≤", 1e-2),
    "length/memory, most chunks ÷ fewest": ("≤", 1.10),
    "length/time of a chunk, most chunks ÷ second most": ("between", (0.9, 1.1)),
    "speed/*: step ÷ bare encoder": ("≤", 1.10),
    "speed/films, ours: share of the matmul peak": ("≥", 0.30),
    "speed/mix, documents/s: ours ÷ padded as shipped": ("≥", 15),
    "speed/mix, documents/s: ours ÷ padded, our precision and dropout": ("≥", 4),
    "speed/mix, memory: ours* ÷ padded without checkpointing": ("≤", 0.2),
    "compile/films: share of the matmul peak, compiled": ("≥", 0.40),
    "compile/*: graphs": ("≤", 12),
    "ranks/two processes: largest weight difference": ("≤", 1e-5),
    "predict/scores, *": ("≤", 1e-5),
    "predict/torchrun: device": ("starts with", "DEVICE"),
    "predict/contributions, CPU ↔ device": ("≤", 1e-4),
    "predict/word and sentence scores, CPU ↔ device": ("≤", 1e-3),
    "demo/*: within fp32's interval": ("=", True),
}


def read_lines(path: Path) -> list[Line]:
    """Lines of checks.jsonl; empty if the file does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def aim_of(check: str, figure: str) -> tuple[str, Any] | None:
    name = f"{check}/{figure}"
    return next((aim for pattern, aim in AIMS.items() if fnmatchcase(name, pattern)), None)


def is_met(value: Any, aim: tuple[str, Any], device: str) -> bool:
    """Whether a figure meets its aim. False for text where a number is expected."""
    comparison, bound = aim
    if comparison == "starts with":
        return str(value).startswith(device)
    if comparison == "=":
        return value == bound
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if comparison == "between":
        return bound[0] <= value <= bound[1]
    return value <= bound if comparison == "≤" else value >= bound


def aim_text(aim: tuple[str, Any], device: str) -> str:
    comparison, bound = aim
    if comparison == "starts with":
        return device
    if comparison == "between":
        return f"{bound[0]:g} to {bound[1]:g}"
    return format_value(bound) if comparison == "=" else f"{comparison} {bound:g}"


def format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value != 0 and (abs(value) < 1e-2 or abs(value) >= 1e6):
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("\n", " ")


def markdown(lines: Sequence[Line], names: Iterable[str] = ()) -> str:
    """The environment, an overview, and a section per check. Checks of `names` without a line were not selected."""
    by_name = {line["check"]: line for line in lines}
    environment = by_name.get("environment", {}).get("figures", {})
    device = str(environment.get("device type", "cuda"))
    parts = ["# GPU benchmark", _environment(environment), _overview(lines, device)]
    if device != "cuda":
        parts.insert(1, "**Not run on a GPU: these figures only show that the checks work.**")
    if missed := list(_missed(lines, device)):
        parts.append("Aims not met:\n\n" + "\n".join(f"- {text}" for text in missed))
    parts += [_topic(line, device) for line in lines if line["figures"] or line.get("failed")]
    if absent := [name for name in names if name not in by_name]:
        parts.append(f"Not selected: {', '.join(absent)}.")
    return "\n\n".join(parts) + "\n"


def _environment(figures: dict[str, Any]) -> str:
    first = ("device", "device type", "torch", "CUDA", "cuDNN", "driver")
    known = [f"{name} {format_value(figures[name])}" for name in first if name in figures]
    return ", ".join(known) + "." if known else "Environment unknown."


def _overview(lines: Sequence[Line], device: str) -> str:
    rows = []
    for line in lines:
        met = [is_met(value, aim, device) for _, value, aim in _with_aims(line)]
        result = "ok" if line["ok"] else line.get("error") or f"{len(line.get('failed', {}))} parts failed"
        aims = f"{sum(met)} of {len(met)}" if met else ""
        rows.append([line["check"], format_value(result), f"{line['seconds']:.0f}", aims])
    return markdown_table(["check", "result", "seconds", "aims met"], rows)


def _with_aims(line: Line) -> Iterator[tuple[str, Any, tuple[str, Any]]]:
    """Figures that have an aim, with the aim."""
    for name, value in line["figures"].items():
        if (aim := aim_of(line["check"], name)) and not is_skipped(value):
            yield name, value, aim


def _missed(lines: Sequence[Line], device: str) -> Iterator[str]:
    for line in lines:
        for name, value, aim in _with_aims(line):
            if not is_met(value, aim, device):
                yield f"{line['check']}, {name}: {format_value(value)}, aim {aim_text(aim, device)}"


def is_skipped(value: Any) -> bool:
    """Whether a figure states that it was not measured."""
    return isinstance(value, str) and value.startswith(("cuda only", "not run", "does not fit"))


def _cell(check: str, name: str, value: Any, device: str) -> str:
    aim = aim_of(check, name)
    if aim is None or is_skipped(value):
        return format_value(value)
    return f"{format_value(value)} (aim {aim_text(aim, device)}: {'met' if is_met(value, aim, device) else 'NOT met'})"


def _topic(line: Line, device: str) -> str:
    """A table of single figures with their aims, and tables of figures named `row: column`."""
    check, figures = line["check"], line["figures"]
    single = {name: value for name, value in figures.items() if ": " not in name}
    parts = [f"## {check}"]
    if single:
        rows = []
        for name, value in single.items():
            aim = None if is_skipped(value) else aim_of(check, name)
            last = (aim_text(aim, device), "yes" if is_met(value, aim, device) else "NO") if aim else ("", "")
            rows.append([name, format_value(value), *last])
        parts.append(markdown_table(["figure", "measured", "aim", "met"], rows))
    parts += _matrices(check, {name: value for name, value in figures.items() if ": " in name}, device)
    parts += [f"**{name}** failed: {format_value(message)}" for name, message in line.get("failed", {}).items()]
    return "\n\n".join(parts)


def _matrices(check: str, figures: dict[str, Any], device: str) -> list[str]:
    """One table per set of rows with the same columns."""
    rows: dict[str, dict[str, str]] = {}
    for name, value in figures.items():
        row, _, column = name.partition(": ")
        rows.setdefault(row, {})[column] = _cell(check, name, value, device)
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row, cells in rows.items():
        tables.setdefault(tuple(cells), []).append([row, *cells.values()])
    return [markdown_table(["", *columns], body) for columns, body in tables.items()]
