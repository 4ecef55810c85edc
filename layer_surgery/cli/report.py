"""The command that makes pages from results that are there already."""

from __future__ import annotations

from pathlib import Path

import click

from layer_surgery.cli.common import CONTEXT


@click.command(context_settings=CONTEXT)
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of the page; needed for several results.  [default: report.html in DIR]",
)
@click.option("--base-model", metavar="OWNER/NAME", help="Name of the original on the hub, for the model card.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists, or a model card that was edited.")
@click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own messages.")
def report(
    results: tuple[Path, ...], output: Path | None, base_model: str | None, overwrite: bool, debug: bool
) -> None:
    """Make the page of a result or a sweep again, or one page that compares several.

    With one result, report.html and the model card README.md in it are made again from its surgery.json; a card that
    was edited stays. Of a sweep, every point is compared.
    """
    from layer_surgery import api

    page, notes = api.report(*results, output=output, base_model=base_model, overwrite=overwrite)
    for note in notes:
        click.echo(note, err=True)
    click.echo(f"page: {page}")
