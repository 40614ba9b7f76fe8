"""The `fullscale` command: thin entry points; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullscale.runtime.console import report_errors, track

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
    from fullscale.phantom.sample import write_sample

    names = write_sample(
        folder,
        cases,
        seed,
        full_size=full_size,
        progress=lambda done, total: typer.echo(f"sample: {done}/{total}"),
    )
    typer.echo(f"sample: {len(names)} scans in {folder}")


ModelName = Annotated[
    str | None,
    typer.Option(
        help="models:/NAME@ALIAS, models:/NAME/VERSION or the folder of a trained network; "
        "the champion if not named."
    ),
]

Layout = Annotated[
    str | None, typer.Option(help="Layout of the folder, see docs/data.md; detected if not named.")
]


@app.command()
@report_errors
def validate(
    source: Annotated[Path, typer.Argument(help="Folder of annotated scans; never changed.")],
    layout: Layout = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write an HTML page with a picture of every case.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Run every check on annotated scans; exit with 1 if any would be refused."""
    import json

    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from fullscale.ingestion.html_report import render_html
    from fullscale.ingestion.validate import HEADERS
    from fullscale.ingestion.validate import validate as run
    from fullscale.runtime.files import write_atomically

    found = run(
        source, layout=layout, with_thumbnails=report is not None, num_workers=0, progress=track
    )
    if report is not None:
        write_atomically(report, render_html(found))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        table = Table(*HEADERS, title=f"{source}, layout {found.layout}", box=SIMPLE)
        for row in found.rows:
            table.add_row(*row.to_cells())
        Console().print(table)
        for row in found.rows:
            for finding in row.findings:
                typer.echo(f"{finding.severity} {finding.case}: {finding}")
    if found.num_refused:
        raise typer.Exit(1)


@app.command()
@report_errors
def ingest(
    source: Annotated[Path, typer.Argument(help="Folder of annotated scans; never changed.")],
    data: Annotated[Path, typer.Option(help="The versioned cohort they join.")] = Path("data"),
    layout: Layout = None,
    replace_changed: Annotated[
        bool, typer.Option("--replace-changed", help="Let changed cases replace those in data/.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if any scan is refused.")
    ] = False,
) -> None:
    """Check annotated scans and bring the good ones into data/."""
    from fullscale.ingestion.ingest import ingest as run

    report = run(
        source,
        data,
        layout=layout,
        dry_run=dry_run,
        replace_changed=replace_changed,
        num_workers=0,
        progress=track,
    )
    for finding in (*report.refused, *report.warnings):
        typer.echo(f"{finding.severity} {finding.case}: {finding}", err=True)
    for name, (theirs, ours) in report.remapped.items():
        typer.echo(f"label {name}: id {theirs} there is id {ours} in {data}")
    typer.echo(
        f"ingest{' (dry run)' if dry_run else ''}: {len(report.accepted)} accepted, "
        f"{len(report.skipped)} already in, {len(report.refused)} refused"
    )
    if not report.num_usable or (strict and report.refused):
        raise typer.Exit(1)


@app.command()
@report_errors
def networks() -> None:
    """List the networks: parameters, cost of a 320 x 320 slice, and where they were published."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from model.networks import RESNET101_NOTE, describe

    table = Table(box=SIMPLE)
    for heading in ("name", "encoder"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parameters", "published (M)", "GMAC"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source")
    for row in describe():
        published = row.published_parameters_m
        table.add_row(
            row.name,
            row.encoder,
            f"{row.parameters:,}",
            "" if published is None else f"{published:.2f}",
            f"{row.gmac:.1f}",
            f"{row.title}; {row.source}",
        )
    console = Console()
    console.print(table)
    console.print(RESNET101_NOTE)


@app.command()
@report_errors
def verdict() -> None:
    """Show the scores, the gate's verdict and the registered model of the last run."""
    from rich.console import Console

    from fullscale.params import load_params
    from fullscale.reporting.text_summary import (
        make_table,
        read_report,
        registry_line,
        verdict_lines,
    )
    from fullscale.tracking.store import default_store

    root = Path()
    params = load_params(root / "params.yaml")
    content = read_report(root / "reports" / "gate.json")
    console = Console(highlight=False, soft_wrap=True)
    console.print(make_table(params, root))
    for line in verdict_lines(content):
        console.print(line)
    console.print(registry_line(params, content, default_store(root)))
    console.print("MLflow UI: `make services`, then http://127.0.0.1:5000/#/models")


@app.command()
@report_errors
def report(
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path(
        "reports/report.html"
    ),
    overlays: Annotated[
        bool,
        typer.Option(help="Segment and draw three test cases; needs scans and trained networks."),
    ] = True,
    track_it: Annotated[
        bool, typer.Option("--mlflow/--no-mlflow", help="Add it to the candidate's run in MLflow.")
    ] = True,
) -> None:
    """Write the last run's result as one HTML page: verdict, scores, pictures, provenance."""
    from fullscale.params import load_params
    from fullscale.tracking.store import default_store
    from tasks.report import track_report, write_report

    root = Path()
    written = write_report(root, output, with_overlays=overlays)
    for note in written.notes:
        typer.echo(f"report: {note}")
    typer.echo(f"report: {output}")
    if track_it:
        params = load_params(root / "params.yaml")
        run_id = track_report(written, params, root, default_store(root))
        typer.echo(
            f"report: page and pictures are in MLflow run {run_id}"
            if run_id
            else f"report: MLflow has no run that trained {params.register_.candidate}"
        )


@app.command()
@report_errors
def predict(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="NIfTI file, DICOM series, or folder of either.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Label map; for a folder of scans a folder.")
    ],
    model: ModelName = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="One file for each organ beside the label map.")
    ] = False,
    preview: Annotated[Path | None, typer.Option(help="PNG with outlines.")] = None,
    statistics: Annotated[Path | None, typer.Option(help="JSON with volumes and warnings.")] = None,
    dicom_seg: Annotated[
        Path | None, typer.Option(help="DICOM segmentation of a DICOM series.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse scans unlike those trained on.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="Slices at a time, or auto.")] = "auto",
) -> None:
    """Segment scans with a registered model; exit with 3 if some of several failed."""
    from fullscale.prediction.predictor import Predictor, pick_device
    from fullscale.prediction.segmentation import read_batch_size
    from fullscale.serving.model_lookup import default_model, find_model
    from tasks.predict import plan_jobs, run_jobs

    root = Path()
    jobs = plan_jobs(
        source,
        target,
        probabilities=probabilities,
        preview=preview,
        statistics=statistics,
        dicom_seg=dicom_seg,
    )
    where = pick_device(device)
    found = find_model(model or default_model(root), root)
    num_slices = read_batch_size(batch_size, found.trained.description, where)
    predictor = Predictor(found.trained, found.threshold, num_slices, where)
    outcomes = run_jobs(jobs, predictor, found, strict=strict)
    for outcome in outcomes:
        if outcome.organs is not None:
            volumes = [f"{name} {each.volume_ml:.1f} ml" for name, each in outcome.organs.items()]
            typer.echo(f"predict: {outcome.job.source.name}: {', '.join(volumes)}")
    num_failed = sum(outcome.error is not None for outcome in outcomes)
    if num_failed:
        typer.echo(f"predict: {num_failed} of {len(outcomes)} scans failed", err=True)
        raise typer.Exit(1 if num_failed == len(outcomes) else 3)


@app.command()
@report_errors
def serve(
    model: ModelName = None,
    host: Annotated[str, typer.Option(help="Address to listen on; it asks no password.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 5001,
    scan_root: Annotated[
        Path | None,
        typer.Option(
            envvar="FULLSCALE_SCAN_ROOT",
            file_okay=False,
            exists=True,
            help="Folder that requests may name scans in.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    max_request_mb: Annotated[int, typer.Option(min=1, help="Of one request.")] = 256,
    every_s: Annotated[float, typer.Option(min=0.1, help="How often to look at the alias.")] = 5.0,
) -> None:
    """Answer requests with the champion, whichever version its alias moves to, until Ctrl-C."""
    from dataclasses import replace

    from fullscale.serving.alias_follower import Served
    from fullscale.serving.http_app import Bounds
    from fullscale.serving.model_lookup import default_model
    from fullscale.serving.upload import Limits
    from tasks.serve import serve as run

    root = Path()
    limits = replace(Limits.from_environment(), scan_root=scan_root)
    served = Served(model or default_model(root), root, limits, device)
    run(served, Bounds(max_request_mb << 20), host, port, every_s)


@app.command()
@report_errors
def export(
    onnx: Annotated[Path, typer.Option(help="The file to write, *.onnx.")],
    model: ModelName = None,
) -> None:
    """Write a registered model as ONNX, if ONNX Runtime computes with it what predict does."""
    from fullscale.serving.model_lookup import default_model, find_model
    from tasks.export import check_request
    from tasks.export import export as run

    root = Path()
    check_request(onnx)
    found = find_model(model or default_model(root), root)
    written = run(onnx, found)
    version = f" version {found.version}" if found.version else ""
    typer.echo(
        f"export: {onnx}: {found.name}{version}, {written.num_bytes / 1e6:.1f} MB, "
        f"opset {written.opset}"
    )
    typer.echo(
        f"export: ONNX Runtime and predict differ by at most {written.parity.difference:.1g} in "
        f"probability and in {written.parity.num_different} of {written.parity.num_pixels} "
        "mask pixels"
    )


if __name__ == "__main__":
    app()
