"""From a result to what people read: Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .baselines import DENSE, OURS
from .measure import BOTH, FORWARD
from .parts import LIMIT

__all__ = ["amount", "duration", "markdown"]

Row = dict[str, Any]
LABELS = {LIMIT: "*limit: `torch.mm` alone*", OURS: f"**{OURS}**"}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def markdown(result: dict[str, Any], pictures: str = "") -> str:
    """Tables of one run; `pictures` is the folder of its SVGs as seen from the page."""
    blocks = []
    for name, loss in result["losses"].items():
        for n, d in dict.fromkeys((r["n"], r["d"]) for r in loss.get("speed", [])):
            blocks += [f"`{name}`, {BOTH}, N = {n}, D = {d}:", _main(loss, n, d, BOTH)]
        if loss.get("growth"):
            stem = f"{pictures}{result['name']}-{name}"
            blocks += [f"![time against batch]({stem}-time.svg) ![memory against batch]({stem}-memory.svg)"]
            blocks += [_growth(loss, result["settings"]["memory_limit"])]
        for n, d in dict.fromkeys((r["n"], r["d"]) for r in loss.get("speed", [])):
            blocks.append(_folded(f"{FORWARD} only, N = {n}, D = {d}", _main(loss, n, d, FORWARD)))
        if loss.get("small"):
            title = f"small batches, {BOTH}, D = {loss['small'][0]['d']}"
            blocks.append(_folded(title, _small(loss)))
        blocks += [f"Not measured: {who} ({why})." for who, why in {**loss["missing"], **loss["refused"]}.items()]
    return "\n\n".join([*blocks, _conditions(result)])


def _main(loss: dict[str, Any], n: int, d: int, mode: str) -> str:
    """Contestants by dtype: time, ratio to the limit and to ours, extra memory."""
    here = {"n": n, "d": d, "mode": mode}
    dtypes = list(dict.fromkeys(r["dtype"] for r in loss["speed"]))
    head = [""]
    for kind in dtypes:
        head += [SHORT.get(kind, kind), "× limit", f"× {OURS}", "extra memory"][: 4 if mode == BOTH else 3]
    lines = []
    for who in _contestants(loss["speed"]):
        line = [LABELS.get(who, who)]
        for kind in dtypes:
            time = next(_where(loss["speed"], contestant=who, dtype=kind, **here), None)
            ours = next(_where(loss["speed"], contestant=OURS, dtype=kind, **here), None)
            peak = next(_where(loss.get("memory", []), contestant=who, dtype=kind, **here), None)
            line += [duration(time["median"]), f"{time['over_limit']:.2f}"] if time else ["", ""]
            line.append(f"{time['median'] / ours['median']:.2f}" if time and ours else "")
            line += [_held(peak)] if mode == BOTH else []
        lines.append(line)
    return _table(head, lines)


def _small(loss: dict[str, Any]) -> str:
    """Contestants by batch, both dtypes."""
    rows = list(_where(loss["small"], mode=BOTH))
    columns = list(dict.fromkeys((r["dtype"], r["n"]) for r in rows))
    lines = []
    for who in _contestants(rows):
        cells = (next(_where(rows, contestant=who, dtype=kind, n=n), None) for kind, n in columns)
        lines.append([LABELS.get(who, who), *(duration(r["median"]) if r else "" for r in cells)])
    return _table(["", *(f"{SHORT.get(kind, kind)}, N = {n}" for kind, n in columns)], lines)


def _growth(loss: dict[str, Any], limit: int | None) -> str:
    """Exponents, and where dense ends, in sentences."""
    said = []
    d = loss["growth"][0]["d"]
    for fit in loss["fits"]:
        what = {"median": "time", "extra": "extra memory"}[fit["value"]]
        fitted = f"fitted over N = {fit['n'][0]} … {fit['n'][-1]}, D = {d}"
        said.append(f"{fit['contestant']}: {what} grows as N^{fit['exponent']:.2f} ({fitted}).")
    dead = [r for r in _where(loss["growth"], contestant=DENSE) if r["extra"] is None]
    if dead and limit:
        said.append(f"Allowed {amount(limit)} of memory, dense dies at N = {dead[0]['n']} ({dead[0]['died']}).")
    for fit in loss["fits"]:
        if fit["value"] == "extra" and fit["predicted"]:
            n, size = list(fit["predicted"].items())[-1]
            mine = next(_where(loss["growth"], contestant=OURS, n=int(n)), {})
            compared = f", where {OURS} was measured to use {amount(mine['extra'])}" if mine.get("extra") else ""
            said.append(f"At N = {n} {fit['contestant']} would need {amount(size)} (predicted from the fit){compared}.")
    return " ".join(said)


def _conditions(result: dict[str, Any]) -> str:
    hard, soft, settings = result["hardware"], result["versions"], result["settings"]
    cpu = f"{hard['cpu']}, {hard['cores']} cores, {hard['instruction_set'] or 'no C++ backend'}"
    device = hard.get("gpu", cpu)
    memory = hard.get("gpu_memory", hard["memory"])
    packages = ", ".join(f"{k} {v}" for k, v in soft.items() if v)
    return (
        f"Medians of {settings['repeats']} interleaved calls (small batches: 20 blocks of 10; the longest: one), "
        "all in one run of `python -m benchmarks`. The limit is 8·N²·D operations (forward alone: 2·N²·D) at the "
        "rate of `torch.mm` measured between them. Extra memory is the peak beyond inputs and gradients. With bf16 "
        f"features, dense and open_clip run under autocast. {device}, {amount(memory)}, "
        f"threads: {settings['threads']}; {packages}; {result['date']}."
    )


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def amount(size: float | None) -> str:
    """Bytes with a decimal unit."""
    if size is None:
        return "unknown memory"
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _held(peak: Row | None) -> str:
    if peak is None:
        return ""
    return amount(peak["extra"]) if peak["extra"] is not None else "died"


def _contestants(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["contestant"] for r in rows))


def _where(rows: Sequence[Row], **wanted: Any) -> Iterator[Row]:
    return (r for r in rows if all(r[k] == v for k, v in wanted.items()))


def _table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"
