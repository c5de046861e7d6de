"""`embershard compare`."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Debug, Json, print_json
from .cli_train import read_configuration
from .errors import ConfigError
from .formatting import aligned


def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [key=value ...]", help="A configuration, and settings."),
    ] = None,
    methods: Annotated[str, typer.Option(help="Such as hash,qr,memcom; full is always there.")] = ...,  # type: ignore[assignment]
    ratios: Annotated[str, typer.Option(help="How many times smaller than full, such as 4,16.")] = ...,  # type: ignore[assignment]
    output: Annotated[Path, typer.Option(help="Folder for the results; one that was begun is gone on with.")] = ...,  # type: ignore[assignment]
    seeds: Annotated[int, typer.Option(min=1, help="Runs of what each method chose.")] = 3,
    widths: Annotated[str | None, typer.Option(help="Widths to choose from; default: embedding.dim.")] = None,
    rates: Annotated[
        str, typer.Option(help="Multiples of optimizer.sparse.learning_rate to choose from, such as 1,3.")
    ] = "1",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods at equal bytes over several seeds; writes results.json and a page with charts.

    \b
    Examples:
      embershard compare --methods hash,memcom --ratios 4,16 --output compared
      embershard compare data.yaml --methods qr,mlet --ratios 4 --seeds 5 --widths 16,32 --rates 1,3 --output compared

    Every method may choose among the same widths and rates, by half of the evaluation rows; the other half is reported.
    Without data: a generated log. Runs are Ray tasks of one CPU each.
    """
    config = read_configuration(arguments or [], resume=False)
    wanted = _comparison(config, methods, ratios, seeds, widths, rates)
    results = _run(config, wanted, output)
    from .compare_results import table

    records = table(results)
    print(*aligned(records, list(records[0])), sep="\n")
    for row in results["rows"]:
        if "unreachable" in row:
            print(f"{row['method']} at {row['ratio']:g}x was not run: {row['unreachable']}")
    print(f"\npage: {output / 'index.html'}")
    if json:
        print_json(results)


def _comparison(config: Any, methods: str, ratios: str, seeds: int, widths: str | None, rates: str) -> Any:
    from pydantic import ValidationError

    from .compare import Comparison

    try:
        return Comparison(
            methods=tuple(name.strip() for name in methods.split(",")),
            ratios=_numbers("--ratios", ratios),
            seeds=seeds,
            widths=tuple(map(int, _numbers("--widths", widths))) if widths else (config.embedding.dim,),
            rates=_numbers("--rates", rates),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from None


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a list of numbers such as 4,16") from None


def _run(config: Any, wanted: Any, output: Path) -> dict[str, Any]:
    from .builtin import with_generated_data
    from .compare import PAGE, RESULTS, compare, load_data, open_output
    from .compare_page import page
    from .compare_tasks import in_tasks
    from .progress import ProgressReporter
    from .ray_session import ray_session

    open_output(output)
    with ProgressReporter() as progress:
        if config.data.path is None:
            config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(output / "generated")})})
            config = with_generated_data(config, progress)
        load_data(config)  # what is wrong with it is said before Ray starts
        progress.note("starting Ray")
        with ray_session(config.cluster.address, "embershard-compare", config.cluster.start_timeout):
            results = compare(config, wanted, output, lambda cells: in_tasks(cells, config.store.blocks), progress)
    (output / RESULTS).write_text(jsonlib.dumps(results, indent=1))
    (output / PAGE).write_text(page(results))
    return results
