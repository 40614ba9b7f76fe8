"""The `fullscale` command: one subcommand for each unit of work.

Every command imports its modules when it runs, so that `fullscale --help` starts fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullscale.runtime.console import report_errors, track
from tasks.commands import doctor, gc, plan, status

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=(
        "Exit codes: 0 success; 1 an error, whose message says how to fix it; 2 wrong usage; "
        "3 some scans failed (predict); 75 a temporary failure, try again later."
    ),
)

# Groups of commands in the help.
SCANS, RESULTS, USE = "Scans", "Networks and results", "Use a model"


@app.callback()
def main() -> None:
    """From annotated CT scans to a registered organ-segmentation model."""


ModelName = Annotated[
    str | None,
    typer.Option(
        help="models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a trained network. "
        "Default: the champion of the model that params.yaml registers."
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(help="Layout of the folder, see docs/data.md. Default: detected."),
]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        "--accept",
        metavar="CODE",
        help="Turn refusals with this code of a check into warnings; may be repeated. Only for "
        "checks that judge by what scans usually look like.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: auto, cpu, cuda or mps. auto uses a CUDA GPU if there is one, "
        "otherwise the CPU."
    ),
]
PrecisionName = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Number format: auto, fp32 or bf16. auto is bf16 where GPU or processor compute in "
        "it natively, which is faster, otherwise fp32.",
    ),
]


@app.command(rich_help_panel=SCANS)
@report_errors
def sample(
    folder: Annotated[Path, typer.Argument(help="New folder to write the scans to.")],
    cases: Annotated[int, typer.Option(min=1, help="Number of scans.")] = 52,
    seed: Annotated[
        int, typer.Option(help="Random seed. The same seed writes the same files.")
    ] = 0,
    prefix: Annotated[
        str, typer.Option(help="Beginning of the names, to put samples of several seeds together.")
    ] = "phantom",
    full_size: Annotated[
        bool,
        typer.Option(
            "--full-size",
            help="Make scans of clinical size: 512 x 512 voxels in plane, about 300 slices.",
        ),
    ] = False,
) -> None:
    """Make synthetic annotated CT scans of the abdomen, in the nnU-Net raw layout."""
    from fullscale.phantom.sample import write_sample

    names = write_sample(
        folder,
        cases,
        seed,
        full_size=full_size,
        prefix=prefix,
        progress=lambda done, total: typer.echo(f"sample: {done}/{total}"),
    )
    typer.echo(f"sample: {len(names)} scans in {folder}")


@app.command(rich_help_panel=SCANS)
@report_errors
def validate(
    source: Annotated[
        Path, typer.Argument(help="Folder or zip of annotated scans. It is only read.")
    ],
    layout: Layout = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write an HTML page with a picture of each case.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse scans for what is otherwise a warning.")
    ] = False,
    accept: Accept = None,
) -> None:
    """Check annotated scans. Exit code 1 if `ingest` would refuse one of them."""
    import json

    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    from fullscale.formats.archives import open_source
    from fullscale.ingestion.html_report import render_html
    from fullscale.ingestion.validate import HEADERS
    from fullscale.ingestion.validate import validate as run
    from fullscale.runtime.files import write_atomically
    from fullscale.scans.checks import check_accepted

    with open_source(source) as folder:
        found = run(
            folder,
            layout=layout,
            with_thumbnails=report is not None,
            strict=strict,
            accepted=check_accepted(accept or ()),
            num_workers=0,
            progress=track,
        )
    if report is not None:
        write_atomically(report, render_html(found))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        # Names are broken, never shortened: they are what the messages below refer to.
        heads = [Column(heading, overflow="fold") for heading in HEADERS]
        table = Table(*heads, title=f"{source}, layout {found.layout}", box=SIMPLE)
        for row in found.rows:
            table.add_row(*row.to_cells())
        Console().print(table)
        for row in found.rows:
            for finding in row.findings:
                typer.echo(f"{finding.severity} {finding.case}: {finding}")
        for finding in found.findings:
            typer.echo(f"{finding.severity} {finding.case}: {finding}")
    if found.num_refused:
        raise typer.Exit(1)


@app.command(rich_help_panel=SCANS)
@report_errors
def ingest(
    source: Annotated[
        Path, typer.Argument(help="Folder or zip of annotated scans. It is only read.")
    ],
    data: Annotated[
        Path, typer.Option(help="Folder of the versioned cohort to add them to.")
    ] = Path("data"),
    layout: Layout = None,
    replace_changed: Annotated[
        bool,
        typer.Option("--replace-changed", help="Replace cases in data/ whose files have changed."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse scans for what is otherwise a warning; exit code 1 if one is refused.",
        ),
    ] = False,
    accept: Accept = None,
) -> None:
    """Check annotated scans and add the accepted ones to data/."""
    from fullscale.formats.archives import open_source
    from fullscale.ingestion.cohort_writer import IngestOptions
    from fullscale.ingestion.ingest import ingest as run
    from fullscale.scans.checks import check_accepted

    options = IngestOptions(
        layout, dry_run, replace_changed, strict=strict, accepted=check_accepted(accept or ())
    )
    with open_source(source) as folder:
        report = run(folder, data, options, num_workers=0, progress=track)
    for finding in (*report.refused, *report.warnings):
        typer.echo(f"{finding.severity} {finding.case}: {finding}", err=True)
    for name, (theirs, ours) in report.remapped.items():
        typer.echo(f"label {name}: id {theirs} there is id {ours} in {data}")
    typer.echo(
        f"ingest{' (dry run)' if dry_run else ''}: {len(report.accepted)} accepted, "
        f"{len(report.skipped)} already in, {report.num_refused} refused"
    )
    if not report.num_usable or (strict and report.num_refused):
        raise typer.Exit(1)


app.command("plan", rich_help_panel=SCANS)(plan.command)
app.command("doctor", rich_help_panel=RESULTS)(doctor.command)
app.command("status", rich_help_panel=RESULTS)(status.command)
app.command("gc", rich_help_panel=RESULTS)(gc.command)


@app.command(rich_help_panel=RESULTS)
@report_errors
def networks() -> None:
    """List the networks: parameters, cost of a 320 x 320 slice, and publication."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from model.networks import RESNET101_NOTE, list_networks

    table = Table(box=SIMPLE)
    for heading in ("name", "encoder"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parameters", "published (M)", "GMAC"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source")
    for row in list_networks():
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


@app.command(rich_help_panel=RESULTS)
@report_errors
def verdict(
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also compare weights and scores with those committed in git."
        ),
    ] = False,
) -> None:
    """Show the last run: scores, slice classifier, promotion gate's verdict, registered model."""
    from rich.console import Console

    from fullscale.evaluation.published_result import compare_with_published
    from fullscale.reporting.numbers import seed_lines
    from fullscale.reporting.results import doubts_about_verdict, read_results
    from fullscale.reporting.text_summary import (
        classifier_lines,
        make_table,
        out_of_fold_lines,
        registry_line,
        verdict_lines,
    )
    from fullscale.tracking.store import default_store
    from fullscale.workspace import open_workspace

    root = Path()
    workspace = open_workspace(root)
    params = workspace.load_params()
    results = read_results(workspace, params)
    content = results.require_verdict()
    console = Console(highlight=False, soft_wrap=True)
    console.print(make_table(results))
    lines = seed_lines(results.summaries, results.organs)
    doubts = [f"warning: {doubt}" for doubt in doubts_about_verdict(results)]
    for line in (
        *lines,
        *classifier_lines(results),
        *out_of_fold_lines(results),
        *doubts,
        *verdict_lines(content),
    ):
        console.print(line)
    console.print(registry_line(params, content, default_store(root)))
    if compare:
        for line in compare_with_published(workspace, params.networks):
            console.print(line)
    console.print("MLflow UI: `make services`, then http://127.0.0.1:5000/#/models")


@app.command(rich_help_panel=RESULTS)
@report_errors
def report(
    output: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write.", show_default="report.html in the folder of the reports"
        ),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Of another pipeline, such as paper/sample.")
    ] = None,
    overlays: Annotated[
        bool,
        typer.Option(
            help="Segment three test cases and draw them. Needs the scans and the trained networks."
        ),
    ] = True,
    track_it: Annotated[
        bool,
        typer.Option("--mlflow/--no-mlflow", help="Add the page to the candidate's MLflow run."),
    ] = True,
) -> None:
    """Write the last run as an HTML page: verdict, scores, pictures, provenance."""
    from fullscale.reporting.page import PAGE
    from fullscale.reporting.results import read_results
    from fullscale.tracking.store import default_store
    from fullscale.workspace import open_workspace
    from tasks.report import track_report, write_report

    workspace = open_workspace(Path(), profile)
    params = workspace.load_params()
    results = read_results(workspace, params)
    output = output or workspace.reports / PAGE
    written = write_report(results, params, output, with_overlays=overlays)
    for note in written.notes:
        typer.echo(f"report: {note}")
    typer.echo(f"report: {output}")
    if track_it:
        run_id = track_report(written, params, workspace, default_store(workspace.root))
        typer.echo(
            f"report: page and pictures are in MLflow run {run_id}"
            if run_id
            else f"report: MLflow has no run that trained {params.register_.candidate}"
        )


@app.command(rich_help_panel=RESULTS)
@report_errors
def adopt(
    branch: Annotated[str, typer.Argument(help="Branch of a retraining, retrain/DATE-DATA.")],
) -> None:
    """Merge the branch of a retraining, and bring scans and networks up to it."""
    from tasks.commands.adopt import adopt as run

    for line in run(Path(), branch):
        typer.echo(f"adopt: {line}")
    typer.echo("adopt: `dvc install` lets every later `git checkout` and merge do the second half")


@app.command(rich_help_panel=RESULTS)
@report_errors
def score(
    cohort: Annotated[
        Path,
        typer.Option(help="Annotated scans: another project's data/, or what `ingest` would take."),
    ],
    model: ModelName = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write to.", show_default="artifacts/score/COHORT/MODEL"),
    ] = None,
    device: Device = "auto",
) -> None:
    """Score a model on other patients than those in data/: CSV, HTML, and the version's page."""
    from fullscale.ingestion.names import safe_name
    from fullscale.prediction.predictor import pick_device
    from fullscale.runtime.cpu_kernels import fix_cpu_kernels
    from fullscale.serving.model_lookup import default_model, find_model
    from fullscale.tracking.store import default_store
    from fullscale.workspace import open_workspace
    from tasks.commands.score import PAGE, open_cohort, publish, write_scores
    from tasks.commands.score import score as run

    root = Path()
    workspace = open_workspace(root)
    params = workspace.load_params()
    fix_cpu_kernels(params.train.cpu_kernels, params.train.num_threads)
    found = find_model(model or default_model(root), root)
    settings = params.evaluate
    predictor = found.make_predictor(settings.batch_size, pick_device(device), settings.precision)
    with open_cohort(cohort) as opened:
        scored = run(predictor, opened, params, workspace)
    name = f"{found.name}-{found.version or found.weights_sha256[:8]}"
    folder = output or workspace.artifacts / "score" / scored.cohort / safe_name(name)
    write_scores(scored, found, folder)
    for organ in scored.scores["organ"].unique():
        dice, cases = (scored.summary[f"test/{key}/{organ}"] for key in ("dice", "num_cases"))
        typer.echo(f"score: {organ}: Dice {dice:.4f}, {cases} cases")
    typer.echo(f"score: {folder / PAGE}")
    if found.version:
        publish(scored, found, folder, default_store(root))
        typer.echo(f"score: on the page of {found.name} version {found.version}")


@app.command(rich_help_panel=USE)
@report_errors
def predict(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="NIfTI, NRRD or MetaImage file, folder of one DICOM series, or folder or zip "
            "of scans.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Label map to write, .nii or .nii.gz; a folder if IN is a folder of scans.",
        ),
    ],
    model: ModelName = None,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="Also write a probability map for each organ, next to the label map.",
        ),
    ] = False,
    preview: Annotated[
        Path | None, typer.Option(help="PNG to write: slices with the organs' outlines.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="JSON file to write: organ volumes, warnings, model version."),
    ] = None,
    dicom_seg: Annotated[
        Path | None,
        typer.Option(help="DICOM segmentation to write, *.dcm, if IN is a DICOM series."),
    ] = None,
    rtstruct: Annotated[
        Path | None,
        typer.Option(help="DICOM structure set to write, *.dcm, if IN is a DICOM series."),
    ] = None,
    largest_component: Annotated[
        bool,
        typer.Option(
            "--largest-component",
            help="Keep the largest connected part of each organ, whatever the model's own refine.",
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Refuse scans that differ from the training scans, instead of warning."
        ),
    ] = False,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    batch_size: Annotated[
        str, typer.Option(help="Slices computed at a time; auto fits the memory.")
    ] = "auto",
) -> None:
    """Segment scans with a registered model. Exit code 3 if some of several scans failed."""
    from dataclasses import replace

    from fullscale.formats.archives import open_source
    from fullscale.prediction.predictor import pick_device
    from fullscale.prediction.segmentation import read_batch_size
    from fullscale.serving.model_lookup import default_model, find_model
    from fullscale.serving.prediction_jobs import plan_jobs
    from tasks.predict import predict as run

    root = Path()
    with open_source(source) as opened:
        jobs = plan_jobs(
            opened,
            target,
            probabilities=probabilities,
            preview=preview,
            statistics=statistics,
            dicom_seg=dicom_seg,
            rtstruct=rtstruct,
        )
        where = pick_device(device)
        found = find_model(model or default_model(root), root)
        num_slices = read_batch_size(batch_size, found.trained.description, where)
        if largest_component:
            found = replace(found, refine="largest_component")
        predictor = found.make_predictor(num_slices, where, precision)
        typer.echo(f"predict: computing in {predictor.precision} on {where}", err=True)
        outcomes = run(jobs, predictor, found, strict=strict)
    for outcome in outcomes:
        if outcome.organs is not None:
            volumes = [f"{name} {each.volume_ml:.1f} ml" for name, each in outcome.organs.items()]
            typer.echo(f"predict: {outcome.job.source.name}: {', '.join(volumes)}")
    num_failed = sum(outcome.error is not None for outcome in outcomes)
    if num_failed:
        typer.echo(f"predict: {num_failed} of {len(outcomes)} scans failed", err=True)
        raise typer.Exit(1 if num_failed == len(outcomes) else 3)


@app.command(rich_help_panel=USE)
@report_errors
def serve(
    model: ModelName = None,
    host: Annotated[str, typer.Option(help="Address to listen on. The server has no password.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any free port.")
    ] = 5001,
    scan_root: Annotated[
        Path | None,
        typer.Option(
            envvar="FULLSCALE_SCAN_ROOT",
            file_okay=False,
            exists=True,
            help="Folder of scans that requests may name by path.",
        ),
    ] = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    max_request_mb: Annotated[
        int, typer.Option(min=1, help="Largest size of a request, in MB.")
    ] = 256,
    every_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two checks of the alias.")
    ] = 5.0,
) -> None:
    """Serve a model over HTTP and follow its alias to new versions. Ctrl-C stops."""
    from dataclasses import replace

    from fullscale.serving.alias_follower import AliasFollower
    from fullscale.serving.http_app import RequestLimits
    from fullscale.serving.model_lookup import default_model
    from fullscale.serving.upload import ScanLimits
    from tasks.serve import serve as run

    root = Path()
    limits = replace(ScanLimits.from_environment(), scan_root=scan_root)
    follower = AliasFollower(model or default_model(root), root, limits, device, precision)
    run(follower, RequestLimits(max_request_mb << 20), host, port, every_s)


@app.command(rich_help_panel=USE)
@report_errors
def export(
    onnx: Annotated[Path, typer.Option(help="ONNX file to write, *.onnx.")],
    model: ModelName = None,
) -> None:
    """Write a model as ONNX, if ONNX Runtime gives the same results as `predict`."""
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


@app.command(rich_help_panel=USE)
@report_errors
def import_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="FILE", help="Checkpoint of the UNet 3+ authors' program.")
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="New folder for the network, named after it.")
    ],
    architecture: Annotated[
        str,
        typer.Option(
            help="unet, unetplusplus, unet3plus, unet3plus_ds (deep supervision) or "
            "unet3plus_ds_cgm (with slice classifier)."
        ),
    ],
    organ: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=ID",
            help="Organ and its label id in label maps. Repeat it for every output channel, in "
            "order.",
        ),
    ],
    size_px: Annotated[
        int, typer.Option(min=32, max=1024, help="Width and height of the slices trained on.")
    ],
    window_hu: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOW HIGH", help="HU that were scaled to 0 and 1 in training."),
    ],
    pixel_mm: Annotated[
        float, typer.Option(min=0.1, max=20, help="Distance of the slices' pixels in mm.")
    ],
    neighbour_mm: Annotated[
        float, typer.Option(min=0.1, help="Distance of neighbouring slices in mm.")
    ],
    body_threshold_hu: Annotated[
        float, typer.Option(help="Voxels above this may be body; slices are centred on the trunk.")
    ] = -300,
) -> None:
    """Convert a checkpoint of the UNet 3+ authors' program for `--model`."""
    from pydantic import ValidationError

    from fullscale.params import SliceParams
    from fullscale.runtime.errors import StageError, shorten
    from tasks.commands.import_checkpoint import import_checkpoint as run

    try:
        slicing = SliceParams(
            size_px=size_px,
            pixel_mm=pixel_mm,
            neighbour_mm=neighbour_mm,
            window_hu=window_hu,
            body_threshold_hu=body_threshold_hu,
        )
    except ValidationError as error:
        raise StageError(shorten(error)) from None
    written = run(checkpoint, folder, architecture, organ, slicing)
    typer.echo(
        f"import-checkpoint: {folder}: {architecture}, width {written.width}, "
        f"{', '.join(written.organs)}; use it with --model {folder}"
    )


if __name__ == "__main__":
    app()
