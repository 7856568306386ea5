"""From a result to what people read: the page of one run in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import swept
from .baselines import DENSE, OURS
from .costs import costs, sized
from .measure import BOTH, FORWARD
from .parts import CLIP
from .size import Size
from .tables import SHORT, amount, duration, folded, held, labelled, table, where
from .work import work

__all__ = ["markdown"]

Row = dict[str, Any]


def markdown(result: dict[str, Any], pictures: str = "") -> str:
    """Tables of one run; `pictures` is the folder of its SVGs as seen from the page."""
    # clip_loss stands open and comes first; of the others, a line of the first table does
    losses = dict(sorted(result["losses"].items(), key=lambda item: item[0] != CLIP))
    first = {name: size for name, loss in losses.items() for size in list(_headline(result, loss))[:1]}
    blocks = [costs(losses, first)] if len(first) > 1 else []
    for name, loss in losses.items():
        page = "\n\n".join(_page(result, name, loss, pictures))
        blocks.append(page if name == CLIP or len(losses) == 1 else folded(f"`{name}` beside its baselines", page))
    return "\n\n".join([*blocks, _conditions(result)])


def _page(result: dict[str, Any], name: str, loss: dict[str, Any], pictures: str) -> Iterator[str]:
    """All of one loss."""
    sizes = list(_headline(result, loss))
    for size in sizes:
        yield f"`{name}`, {BOTH}, {size.said()}:"
        yield _main(loss, size, BOTH)
    if loss.get("growth"):
        stem = f"{pictures}{result['name']}-{name}"
        yield f"![time against batch]({stem}-time.svg) ![memory against batch]({stem}-memory.svg)"
        yield _growth(loss, result["settings"]["memory_limit"])
    for size in sizes if any(where(loss.get("speed", []), mode=FORWARD)) else ():
        yield folded(f"{FORWARD} only, {size.said()}", _main(loss, size, FORWARD))
    if loss.get("small"):
        yield folded(f"small batches, {BOTH}, D = {loss['small'][0]['d']}", _small(loss))
    yield from _swept(result, name, loss)
    yield from (f"Not measured: {who} ({why})." for who, why in {**loss["missing"], **loss["refused"]}.items())


def _headline(result: dict[str, Any], loss: dict[str, Any]) -> Iterator[Size]:
    """The sizes that have tables: all of them, or those of the headline."""
    headline = result["settings"].get("headline")
    for size in dict.fromkeys(Size.of(r) for r in loss.get("speed", [])):
        if headline is None or size in [Size(*each) for each in headline]:
            yield size


def _swept(result: dict[str, Any], name: str, loss: dict[str, Any]) -> Iterator[str]:
    headline = result["settings"].get("headline")
    if headline is not None:
        for kind in dict.fromkeys(r["dtype"] for r in loss["speed"]):
            yield folded(f"`{name}`, {BOTH}, every size, {SHORT[kind]}", swept.every_size(loss, kind))
        yield from swept.notes(loss, [Size(*size) for size in headline])


def _main(loss: dict[str, Any], size: Size, mode: str) -> str:
    """Contestants by dtype: time, ratio to the limit and to ours, extra memory."""
    rows = list(where(sized(loss["speed"], size), mode=mode))
    peaks = sized(loss.get("memory", []), size) if mode == BOTH else []
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    head = [""]
    for kind in dtypes:
        head += [SHORT.get(kind, kind), "× limit", f"× {OURS}", "extra memory"][: 4 if mode == BOTH else 3]
    lines = []
    for who in _contestants([*rows, *(r for r in peaks if r["extra"] is None)]):
        line = [labelled(who)]
        for kind in dtypes:
            time = next(where(rows, contestant=who, dtype=kind), None)
            ours = next(where(rows, contestant=OURS, dtype=kind), None)
            peak = next(where(peaks, contestant=who, dtype=kind), None)
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
    counts = {r["repeats"] for loss in result["losses"].values() for r in loss.get("speed", [])}
    repeats = " or ".join(str(n) for n in sorted(counts, reverse=True)) or settings["repeats"]
    slow = "".join(f" Not measured in {SHORT[kind]}: {why}." for kind, why in settings.get("slow", {}).items())
    return (
        f"Medians of {repeats} interleaved calls (small batches: 20 blocks of 10; the longest: one), "
        f"all in one run of `python -m benchmarks`. The limit is {_limit(result)} at the "
        "rate of `torch.mm` measured between them. Extra memory is the peak beyond inputs and gradients. With bf16 "
        f"features, dense and open_clip run under autocast. {cpu}, {amount(hard['memory'])}, "
        f"threads: {settings['threads']}; {packages}; {result['date']}.{slow}"
    )


def _limit(result: dict[str, Any]) -> str:
    """The operations of most losses, and of the others by name."""
    usual = work(CLIP).said()
    others: dict[str, list[str]] = {}
    for name in result["losses"]:
        others.setdefault(work(name).said(), []).append(f"`{name}`")
    by_name = (f"for {' and '.join(names)} {said}" for said, names in others.items() if said != usual)
    return "; ".join([usual, *by_name])


def _contestants(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["contestant"] for r in rows))
