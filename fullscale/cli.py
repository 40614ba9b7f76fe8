"""The `fullscale` command: thin entry points; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tasks.console import report_errors, track

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From annotated CT scans to a registered organ-segmentation model.",
)


@app.callback()
def main() -> None:
    """From annotated CT scans to a registered organ-segmentation model."""


@app.command()
@report_errors
def sample(
    folder: Annotated[Path, typer.Argument(help="New folder for the scans.")],
    cases: Annotated[int, typer.Option(min=1, help="Number of scans.")] = 26,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    full_size: Annotated[
        bool, typer.Option("--full-size", help="512 x 512 voxels in plane, about 300 slices.")
    ] = False,
) -> None:
    """Make synthetic annotated abdominal CT in the nnU-Net raw layout."""
    from scans.phantom import write_sample

    names = write_sample(
        folder,
        cases,
        seed,
        full_size=full_size,
        progress=lambda done, total: typer.echo(f"sample: {done}/{total}"),
    )
    typer.echo(f"sample: {len(names)} scans in {folder}")


@app.command()
@report_errors
def ingest(
    source: Annotated[Path, typer.Argument(help="Folder of annotated scans; never changed.")],
    data: Annotated[Path, typer.Option(help="The versioned cohort they join.")] = Path("data"),
    layout: Annotated[
        str | None, typer.Option(help="Layout of the folder; detected if not named.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if any scan was refused.")
    ] = False,
) -> None:
    """Check annotated scans and bring the good ones into data/."""
    from scans.ingest import ingest as run

    report = run(source, data, layout=layout, dry_run=dry_run, progress=track)
    for refusal in report.refused:
        typer.echo(f"refused {refusal.case}: {refusal}", err=True)
    for name, (theirs, ours) in report.remapped.items():
        typer.echo(f"label {name}: id {theirs} there is id {ours} in {data}")
    typer.echo(
        f"ingest: {len(report.accepted)} accepted, {len(report.skipped)} already in, "
        f"{len(report.refused)} refused"
    )
    if not report.accepted + report.skipped or (strict and report.refused):
        raise typer.Exit(1)


@app.command()
@report_errors
def verdict() -> None:
    """Show the scores, the gate's verdict and the registered model of the last run."""
    from rich.console import Console

    from tasks.params import load_params
    from tasks.summary import make_table, read_report, registry_line, verdict_lines
    from tasks.tracking import default_store

    root = Path()
    params = load_params(root / "params.yaml")
    content = read_report(root / "reports" / "gate.json")
    console = Console(highlight=False, soft_wrap=True)
    console.print(make_table(params, root))
    for line in verdict_lines(content):
        console.print(line)
    console.print(registry_line(params, content, default_store(root)))
    console.print("MLflow UI: `make services`, then http://127.0.0.1:5000/#/models")


if __name__ == "__main__":
    app()
