"""`layer-surgery export`: a result in another form."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from layer_surgery.cli.common import CONTEXT, command_line, print_json, progress_ui


@click.command(context_settings=CONTEXT)
@click.argument("directory", metavar="DIR")
@click.option(
    "--dense",
    is_flag=True,
    help="Multiply the factors of low-rank layers out: a plain checkpoint of the base architecture, which every tool "
    "loads without code from the directory. It computes the same and is as large as before the surgery, but for "
    "layers that were removed whole.",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="OUT", help="Directory for the exported model.")
@click.option("--overwrite", is_flag=True, help="Replace the output directory if it holds a result already.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON on stdout.")
@click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own messages.")
def export(directory: str, dense: bool, output: Path | None, overwrite: bool, as_json: bool, debug: bool) -> None:
    """Write the result in DIR in another form; so far there is --dense."""
    from layer_surgery import api
    from layer_surgery.errors import OutputError, UserError

    if not dense:
        raise UserError("say what to export: --dense (factors multiplied out) is the one form that there is.")
    if output is None:
        raise OutputError("give --output (a directory for the exported model).")
    with progress_ui() as ui:
        record = api.export_dense(directory, output, overwrite=overwrite, ui=ui, command=command_line())
    if as_json:
        print_json(asdict(record))
    else:
        removed = f", {record.removed_linears} of them zero (removed)" if record.removed_linears else ""
        click.echo(f"{record.linears} low-rank linears multiplied out{removed}")
        click.echo(
            f"{record.parameters_before:,} -> {record.parameters:,} parameters, {record.size_bytes_before:,} -> "
            f"{record.size_bytes:,} bytes ({record.dtype})"
        )
        click.echo(
            f"saved to {record.output}: {record.model_type}, {record.layers} layers, loads without code of its own"
        )
