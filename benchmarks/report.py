"""From a result to what people read: the page of one run in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import swept
from .baselines import DENSE, OURS
from .measure import BOTH, FORWARD
from .tables import SHORT, amount, duration, folded, held, labelled, table, where
from .work import work

__all__ = ["markdown"]

Row = dict[str, Any]


def markdown(result: dict[str, Any], pictures: str = "") -> str:
    """Tables of one run; `pictures` is the folder of its SVGs as seen from the page."""
    blocks = []
    for name, loss in result["losses"].items():
        sizes = list(_open(result, loss))
        for n, d in sizes:
            blocks += [f"`{name}`, {BOTH}, N = {n}, D = {d}:", _main(loss, n, d, BOTH)]
        if loss.get("growth"):
            stem = f"{pictures}{result['name']}-{name}"
            blocks += [f"![time against batch]({stem}-time.svg) ![memory against batch]({stem}-memory.svg)"]
            blocks += [_growth(loss, result["settings"]["memory_limit"])]
        for n, d in sizes:
            blocks.append(folded(f"{FORWARD} only, N = {n}, D = {d}", _main(loss, n, d, FORWARD)))
        if loss.get("small"):
            title = f"small batches, {BOTH}, D = {loss['small'][0]['d']}"
            blocks.append(folded(title, _small(loss)))
        blocks += _swept(result, name, loss)
        blocks += [f"Not measured: {who} ({why})." for who, why in {**loss["missing"], **loss["refused"]}.items()]
    return "\n\n".join([*blocks, _conditions(result)])


def _open(result: dict[str, Any], loss: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """The sizes whose tables stand open: all of them, or those of the headline."""
    headline = result["settings"].get("headline")
    for n, d in dict.fromkeys((r["n"], r["d"]) for r in loss.get("speed", [])):
        if headline is None or [n, d] in [list(size) for size in headline]:
            yield n, d


def _swept(result: dict[str, Any], name: str, loss: dict[str, Any]) -> Iterator[str]:
    headline = result["settings"].get("headline")
    if headline is not None:
        for kind in dict.fromkeys(r["dtype"] for r in loss["speed"]):
            yield folded(f"`{name}`, {BOTH}, every size, {SHORT[kind]}", swept.every_size(loss, kind))
        yield from swept.notes(loss, headline)


def _main(loss: dict[str, Any], n: int, d: int, mode: str) -> str:
    """Contestants by dtype: time, ratio to the limit and to ours, extra memory."""
    here = {"n": n, "d": d, "mode": mode}
    rows = list(where(loss["speed"], **here))
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    head = [""]
    for kind in dtypes:
        head += [SHORT.get(kind, kind), "× limit", f"× {OURS}", "extra memory"][: 4 if mode == BOTH else 3]
    lines = []
    dead = [r for r in where(loss.get("memory", []), n=n, d=d) if r["extra"] is None] if mode == BOTH else []
    for who in _contestants([*rows, *dead]):
        line = [labelled(who)]
        for kind in dtypes:
            time = next(where(rows, contestant=who, dtype=kind), None)
            ours = next(where(rows, contestant=OURS, dtype=kind), None)
            peak = next(where(loss.get("memory", []), contestant=who, dtype=kind, **here), None)
            line += [duration(time["median"]), f"{time['over_limit']:.2f}"] if time else ["", ""]
            line.append(f"{time['median'] / ours['median']:.2f}" if time and ours else "")
            line += [held(peak)] if mode == BOTH else []
        lines.append(line)
    return table(head, lines)


def _small(loss: dict[str, Any]) -> str:
    """Contestants by batch, both dtypes."""
    rows = list(where(loss["small"], mode=BOTH))
    columns = list(dict.fromkeys((r["dtype"], r["n"]) for r in rows))
    lines = []
    for who in _contestants(rows):
        cells = (next(where(rows, contestant=who, dtype=kind, n=n), None) for kind, n in columns)
        lines.append([labelled(who), *(duration(r["median"]) if r else "" for r in cells)])
    return table(["", *(f"{SHORT.get(kind, kind)}, N = {n}" for kind, n in columns)], lines)


def _growth(loss: dict[str, Any], limit: int | None) -> str:
    """Exponents, and where dense ends, in sentences."""
    said = []
    d = loss["growth"][0]["d"]
    for fit in loss["fits"]:
        what = {"median": "time", "extra": "extra memory"}[fit["value"]]
        fitted = f"fitted over N = {fit['n'][0]} … {fit['n'][-1]}, D = {d}"
        said.append(f"{fit['contestant']}: {what} grows as N^{fit['exponent']:.2f} ({fitted}).")
    dead = [r for r in where(loss["growth"], contestant=DENSE) if r["extra"] is None]
    if dead and limit:
        said.append(f"Allowed {amount(limit)} of memory, dense dies at N = {dead[0]['n']} ({dead[0]['died']}).")
    for fit in loss["fits"]:
        if fit["value"] == "extra" and fit["predicted"]:
            n, size = list(fit["predicted"].items())[-1]
            mine = next(where(loss["growth"], contestant=OURS, n=int(n)), {})
            compared = f", where {OURS} was measured to use {amount(mine['extra'])}" if mine.get("extra") else ""
            said.append(f"At N = {n} {fit['contestant']} would need {amount(size)} (predicted from the fit){compared}.")
    return " ".join(said)


def _conditions(result: dict[str, Any]) -> str:
    if "headline" in result["settings"]:
        return swept.conditions(result, _limit(result))
    hard, soft, settings = result["hardware"], result["versions"], result["settings"]
    cpu = f"{hard['cpu']}, {hard['cores']} cores, {hard['instruction_set'] or 'no C++ backend'}"
    packages = ", ".join(f"{k} {v}" for k, v in soft.items() if v)
    return (
        f"Medians of {settings['repeats']} interleaved calls (small batches: 20 blocks of 10; the longest: one), "
        f"all in one run of `python -m benchmarks`. The limit is {_limit(result)} at the "
        "rate of `torch.mm` measured between them. Extra memory is the peak beyond inputs and gradients. With bf16 "
        f"features, dense and open_clip run under autocast. {cpu}, {amount(hard['memory'])}, "
        f"threads: {settings['threads']}; {packages}; {result['date']}."
    )


def _limit(result: dict[str, Any]) -> str:
    """The operations of the first loss, and of the others where they differ."""
    said = {name: work(name).said() for name in result["losses"]} or {"": work("").said()}
    first = next(iter(said.values()))
    others = (f"for `{name}` {each}" for name, each in said.items() if each != first)
    return "; ".join([first, *others])


def _contestants(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["contestant"] for r in rows))
