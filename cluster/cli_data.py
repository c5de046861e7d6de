"""`embershard convert`, `generate` and `inspect`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer

from .cli_options import Debug, Json, print_json
from .errors import ConfigError, RunFailed
from .formatting import aligned, readable_bytes


class Source(StrEnum):
    """Formats that `convert` reads."""

    CRITEO = "criteo"
    AVAZU = "avazu"
    MOVIELENS = "movielens"
    INTERACTIONS = "interactions"


class OnBadRows(StrEnum):
    """What a row that cannot be read does to a conversion."""

    FAIL = "fail"
    SKIP = "skip"


def convert(
    source: Annotated[Source, typer.Argument(metavar="SOURCE", help="criteo, avazu, movielens or interactions.")],
    paths: Annotated[
        list[str], typer.Argument(metavar="INPUT... OUTPUT", help="Files or folders to read; folder to write.")
    ],
    on_bad_rows: Annotated[
        OnBadRows, typer.Option(help="Stop at a row that cannot be read, or count and skip it.")
    ] = OnBadRows.FAIL,
    negatives: Annotated[
        int | None, typer.Option(min=0, help="interactions, movielens: sampled rows of label 0 per row of label 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="interactions, movielens: of the sampled rows.")] = None,
    positive_from: Annotated[
        float | None, typer.Option(help="interactions, movielens: ratings from this on have label 1 (4).")
    ] = None,
    histories: Annotated[
        bool,
        typer.Option("--histories", help="interactions, movielens: a row per person, what they liked in two lists."),
    ] = False,
    found_by: Annotated[
        int | None, typer.Option(min=1, help="--histories: items to be found are liked by so many people (1).")
    ] = None,
    deals: Annotated[
        int | None, typer.Option(min=1, help="--histories: rows per person to train on, each split anew (1).")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a public dataset's files into Parquet that `train` reads.

    criteo: the Kaggle and Terabyte click logs, and the variant with a header and decimal ids; avazu: its train files;
    movielens: ratings.dat or its folder; interactions: lines of user, item and perhaps rating. Inputs plain or .gz,
    inputs and output local or URLs such as s3://. A conversion that was killed goes on when started again. --histories
    writes OUTPUT/train and OUTPUT/eval for the models pointwise and ranknet, from lists held in memory.

    \b
    Examples:
      embershard convert interactions clicks.csv clicks/ --negatives 4
      embershard convert movielens ml-1m/ histories/ --histories
      embershard convert criteo train.txt criteo/
      embershard convert criteo day_0.gz day_1.gz terabyte/ --on-bad-rows skip
    """
    if len(paths) < 2:
        raise ConfigError("convert: give at least one INPUT and the OUTPUT folder, in this order")
    from .progress import ProgressReporter

    *inputs, output = paths
    sampling = {
        "negatives": negatives,
        "seed": seed,
        "positive_from": positive_from,
        "found_by": found_by,
        "deals": deals,
    }
    options = {name: value for name, value in sampling.items() if value is not None}
    convert_source = _converter(source)
    if options and source not in (Source.MOVIELENS, Source.INTERACTIONS):
        flag = "--" + next(iter(options)).replace("_", "-")
        raise ConfigError(f"convert: {flag} is for movielens and interactions, not for {source.value}")
    if histories:
        convert_source = _histories(source, options)
    elif wrong := {"found_by", "deals"} & options.keys():
        raise ConfigError(f"convert: --{min(wrong).replace('_', '-')} is for --histories")
    with ProgressReporter() as progress:
        summary = convert_source(
            inputs, output, on_bad_rows=on_bad_rows.value, progress=progress.counter("byte"), **options
        )
    _print_record(summary)
    if json:
        print_json(summary)


def _converter(source: Source) -> Callable[..., dict[str, Any]]:
    if source is Source.CRITEO:
        from ..datasets.criteo import convert_criteo as chosen
    elif source is Source.AVAZU:
        from ..datasets.avazu import convert_avazu as chosen
    elif source is Source.MOVIELENS:
        from ..datasets.interactions import convert_movielens as chosen
    else:
        from ..datasets.interactions import convert_interactions as chosen
    return chosen


def _histories(source: Source, options: Mapping[str, Any]) -> Callable[..., dict[str, Any]]:
    if source not in (Source.MOVIELENS, Source.INTERACTIONS) or "negatives" in options:
        wrong = "--negatives" if "negatives" in options else source.value
        raise ConfigError(f"convert: --histories is for movielens and interactions without --negatives, not {wrong}")
    from ..datasets.histories import convert_histories

    return partial(convert_histories, name=source.value)


def generate(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows to draw.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the rows; the same seed gives the same rows.")] = 0,
    model_seed: Annotated[
        int, typer.Option(min=0, help="Of the planted model: the same for train and evaluation data.")
    ] = 0,
    cardinalities: Annotated[
        str | None,
        typer.Option(help="Ids per categorical column, such as 1000,200,30, or those of Criteo: kaggle or terabyte."),
    ] = None,
    multi_hot: Annotated[
        str, typer.Option(help="Most ids per row: one number, or one per categorical column, such as 1,20,3.")
    ] = "1",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a click log drawn from a known model, so that the best possible AUC is known.

    \b
    Examples:
      embershard generate data/train --rows 1000000
      embershard generate data/eval --rows 100000 --seed 1
      embershard generate data/large --rows 1000000 --cardinalities terabyte
      embershard generate data/bags --rows 100000 --cardinalities 1000,200 --multi-hot 20,1
    """
    from ..datasets import synthetic
    from .progress import ProgressReporter

    sizes: Sequence[int] = synthetic.CARDINALITIES
    if cardinalities is not None:
        sizes = synthetic.NAMED.get(cardinalities) or _numbers("--cardinalities", cardinalities, "kaggle, terabyte or ")
    with ProgressReporter() as progress:
        summary = synthetic.generate(
            output,
            rows=rows,
            seed=seed,
            model_seed=model_seed,
            progress=progress.counter("row"),
            cardinalities=sizes,
            multi_hot=_numbers("--multi-hot", multi_hot),
        )
    _print_record(summary)
    if json:
        print_json(summary)


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A dataset, a run or a checkpoint.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and check every digest.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a dataset, a run or a checkpoint holds. Exit 1 if --verify finds damage.

    \b
    Examples:
      embershard inspect criteo/
      embershard inspect runs/20260101-120000-train
      embershard inspect runs/a/checkpoints/step-000001000 --verify
    """
    from .inspection import inspect_path

    kind, result = inspect_path(path, verify=verify)
    print(f"{kind} {path}")
    _print_record(result)
    if json:
        print_json({"kind": kind, "path": path, **result})
    if problems := result.get("problems"):
        raise RunFailed(f"{path}: {len(problems)} problems, the first: {problems[0]}")


def _numbers(flag: str, text: str, names: str = "") -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not {names}a list of numbers such as 1000,200,30") from None


def _print_record(record: Mapping[str, Any]) -> None:
    """Plain values as lines, lists of records as tables."""
    tables = {
        name: value
        for name, value in record.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    for name, value in record.items():
        if name == "mapping":
            print(*(f"{key}={_setting(chosen)}" for key, chosen in value.items()), sep="\n")
        elif name not in tables:
            shown = readable_bytes(value) if name.endswith("bytes") and isinstance(value, int) else value
            print(f"{name:<22} {shown:,}" if isinstance(shown, int) else f"{name:<22} {shown}")
    for name, rows in tables.items():
        print(f"\n{name}")
        print(*aligned(rows, list(rows[0]), plain=name == "examples"), sep="\n")


def _setting(value: Any) -> str:
    """As it can be given on the command line."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {name}" for key, name in value.items()) + "}"
    return "[" + ",".join(value) + "]" if isinstance(value, list) else str(value)
