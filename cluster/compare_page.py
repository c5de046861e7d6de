"""The page of a comparison: one HTML file without requests, for somebody who has not read this code."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from .compare_chart import chart, colours
from .compare_results import NDCG, shown_qualities, table
from .formatting import readable_bytes

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 82rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg { width: 100%; max-width: 58rem; height: auto; } p, dl { max-width: 58rem; }
svg text { font: 12px system-ui, sans-serif; fill: #444; }
svg text.axis { font-size: 13px; fill: #222; } svg text.name { font-weight: 600; }
.plot { fill: #fff; stroke: #bbb; } .grid { stroke: #eee; } .full { stroke: #111; stroke-dasharray: 5 4; }
.lead { opacity: .35; } .scroll { overflow-x: auto; }
@media (max-width: 40rem) { svg text, svg text.axis { font-size: 17px; } }
table { border-collapse: collapse; font-size: .78rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .4rem; text-align: right; border-bottom: 1px solid #ddd; } th { border-bottom: 2px solid #999; }
th:first-child, td:first-child { text-align: left; font-weight: 600; position: sticky; left: 0; background: #fff; }
p.lead-in { color: #444; margin-top: 0; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; } code { background: #f3f3f3; padding: 0 .2rem; }
"""

_METHODS = {
    "full": "one row of numbers per id; nothing is compressed.",
    "hash": "a small table; a hash says which row an id reads, and ids that share one are not told apart.",
    "double_hash": "two hashes, two rows, which become one vector; few ids share both.",
    "qr": "small tables, read by the remainder and the quotient of the id; no two ids share all their rows, which are "
    "multiplied, added or joined.",
    "qr_path": "a row of one small table, changed by a function that the remainder of the id chooses.",
    "memcom": "ids share the rows of a small table, and each scales its row by a number of its own.",
    "mlet": "trained as a wide table times a matrix, exported as their product, a narrower table.",
    "narrow": "a short row per id, and one matrix for all that makes vectors of them.",
    "mem_rec": "one table for all features; hashes say which few rows an id reads and which weights scale them.",
}


def page(results: Mapping[str, Any]) -> str:
    """results: as `compare_results.summarise` returns them."""
    rows = results["rows"]
    seeds = results["comparison"]["seeds"]
    full = rows[0]
    data, model = escape(str(results["data"]["path"])), escape(results["model"]["name"])
    parts = [
        "<h1>How small can the embedding tables be?</h1>",
        f'<p class="lead-in">Trained on <code>{data}</code> with model <code>{model}</code>; '
        f"{results['test_samples']:,} {_tested(results)}. {_repeated(seeds)}</p>",
        "<p>A recommendation model keeps a vector of numbers for every user, item and other thing it knows. With "
        "millions of them these tables are nearly all of the model. Each method below makes them smaller in its own "
        f"way; <b>full</b> is the model with uncompressed tables, {readable_bytes(full['embedding_bytes'])} here.</p>",
        _listed({name: _METHODS[name] for name in colours(rows)}),
    ]
    for one in shown_qualities(results):
        label = f"{one.name} on {_tested(results)}"
        drawn = chart(rows, one.key, label)
        if drawn:
            parts += [f"<h2>{escape(label)} against size</h2>", f"<p>{one.reading} {_bars(seeds)}</p>", drawn]
    parts += [
        "<h2>All numbers</h2>",
        _table(results),
        *_unreachable(rows),
        "<h2>How it was measured</h2>",
        _method(results),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Embedding methods compared</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _bars(seeds: int) -> str:
    bars = " Bars are one standard deviation over the seeds." if seeds > 1 else ""
    return f"Further left is smaller. The dashed line is <b>full</b>.{bars}"


def _table(results: Mapping[str, Any]) -> str:
    records = table(results)
    columns = list(records[0])
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    palette = colours(results["rows"])
    lines = []
    for record in records:
        cells = "".join(f"<td>{escape(str(record.get(name, '')))}</td>" for name in columns)
        colour = palette[str(record["method"])]
        lines.append(cells.replace("<td>", f'<td style="color: {colour}">', 1))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _listed(entries: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in entries.items())}</dl>"


def _unreachable(rows: Any) -> list[str]:
    return [
        f"<p><b>{escape(row['method'])} at {row['ratio']:g}x</b> was not run: {escape(row['unreachable'])}</p>"
        for row in rows
        if "unreachable" in row
    ]


def _method(results: Mapping[str, Any]) -> str:
    comparison, seeds = results["comparison"], results["comparison"]["seeds"]
    widths, rates = (", ".join(f"{one:g}" for one in comparison[name]) for name in ("widths", "rates"))
    spread = "; in brackets the standard deviation over the seeds" if seeds > 1 else ""
    names = ", ".join(one.name for one in shown_qualities(results))
    entries = {
        "ratio": "how many times smaller than full the exported embeddings were asked to be. Sizes come in steps: "
        "what was reached is in the column of bytes.",
        "embeddings": "bytes of the embeddings in the exported model, float32.",
        "in training": "bytes of the embeddings while training, without the optimizer's state. MLET trains more "
        "than it exports.",
        "width": "numbers per vector (mlet: of the trained factor), as chosen.",
        names: f"means over {_count(seeds, 'seed')} on the {_tested(results)}{spread}.",
        "- full": "the mean difference to full, seed by seed (the same seed draws the same order of rows), "
        + ("its 95 % interval over the seeds (Student's t; other test rows would move it too), " if seeds > 1 else "")
        + "and as a share of full's mean."
        + (" Where the interval holds 0, these seeds show no difference." if seeds > 1 else ""),
        "train s": "median seconds of a training run on one thread. Runs share the machine, so small differences "
        "mean little.",
        "lookup us": "median microseconds in which one thread turns the ids of 64 rows, drawn evenly, into vectors. "
        "Measured while other runs used the machine.",
    }
    evaluation = escape(str(results["data"]["eval_path"]))
    budget = (
        f"Every method at every ratio had the same budget, {_count(results['trials_per_method'], 'trial')}: widths "
        f"{widths}, learning rates of the tables times {rates}. Each chose, with the first seed, by the "
        f"{shown_qualities(results)[0].name} of the validation rows (every second row of the evaluation data, "
        f"<code>{evaluation}</code>). The numbers above are "
        f"of the other rows, which nothing was chosen by. Full chose first, and the ratios are taken against its bytes."
    )
    return f"<p>{budget}</p>{_listed(entries)}"


def _repeated(seeds: int) -> str:
    if seeds == 1:
        return "Every method was trained once."
    return f"Every method was trained {seeds} times, with other random numbers each time ({seeds} seeds)."


def _tested(results: Mapping[str, Any]) -> str:
    return "test people" if NDCG in shown_qualities(results) else "test rows"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
