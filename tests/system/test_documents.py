"""README and docs: what they show is published, what they name exists. Nothing is run."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import textwrap

import pytest
import typer
import yaml
from project import ROOT

from docs.make_reference import TARGET, list_variables, render
from fullscale.reporting.results import read_results
from fullscale.reporting.text_summary import score_rows, verdict_lines
from fullscale.workspace import open_workspace
from tasks.cli import app

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("benchmarks", "docs", "flows", "fullscale", "model", "tasks")
PROGRAMS = ("fullscale", "make", "python", "torchrun", "pytest", "dvc")
SHELL = {"&&", "||", ";", "|", ">", ">>", "&"}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.M))
COMMANDS = typer.main.get_command(app).commands
TABLE, METHOD = ROOT / "reports/paper/table.md", ROOT / "docs/method.md"
# Files that commands of the documents write.
WRITTEN = {
    "reports/report.html",
    "reports/fingerprint.html",
    "reports/fingerprint.json",
    "reports/btcv/table.md",
    "reports/paper/lits/table.md",
}


def test_readme_shows_the_published_scores_and_verdict(published):
    readme = (published / "README.md").read_text()
    workspace = open_workspace(published)
    results = read_results(workspace, workspace.load_params())
    for row in score_rows(results):
        assert any(all(cell in line for cell in row) for line in readme.splitlines()), row
    for line in verdict_lines(results.require_verdict()):
        assert line in readme


def test_papers_table_is_the_one_its_pipeline_wrote():
    lock = yaml.safe_load((ROOT / "paper/dvc.lock").read_text())["stages"]["paper_table-sample"]
    for out in lock["outs"]:
        content = (ROOT / out["path"]).read_bytes()
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == out["md5"], out["path"]
    for file, values in lock["params"].items():
        now = yaml.safe_load((ROOT / file).read_text())
        if {key: now[key] for key in values} != values:
            commit = re.search(r"Commit ([0-9a-f]{40})", TABLE.read_text())[1]
            assert f"older settings, those of commit {commit}" in METHOD.read_text()


def test_reference_is_what_the_code_says():
    assert TARGET.read_text() == render(), "run `python -m docs.make_reference`"


def test_reference_describes_every_parameter_and_variable():
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


def test_reference_lists_every_variable_that_the_code_names():
    sources = [
        *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py")),
        *(ROOT / name for name in ("Makefile", "prefect.yaml")),
    ]
    named = {
        name
        for path in sources
        if path != ROOT / "docs/make_reference.py"
        for name in re.findall(
            r'["$]((?:FULLSCALE|MLFLOW|PREFECT)_[A-Z_]*[A-Z])\b', path.read_text()
        )
    }
    assert named - list_variables() == set()
    own = {name for name in list_variables() if name.startswith("FULLSCALE_")}
    assert own - named == set()


def command_lines(text):
    """The commands of a document's code blocks and code spans, without comments and prompts."""
    blocks = re.findall(r"^```(?:bash|sh|)\n(.*?)^```$", text, flags=re.M | re.S)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    blocks += re.findall(r"(?:^ {4,}\S.*\n?)+", text, flags=re.M)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^ {4,}.*$", "", text, flags=re.M))
    for line in [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *spans]:
        try:
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        except ValueError:  # prose or output, with an apostrophe
            continue
        yield from split_commands(words)


def split_commands(words):
    """The commands of one line: separators and redirections end one, assignments precede one."""
    command = []
    for word in [*words, "&&"]:
        if word in SHELL:
            if command and command[0] in PROGRAMS:
                yield tuple(command)
            command = []
        elif command or not (re.match(r"[A-Z_]+=", word) or word in ("exec", "srun")):
            command.append("python" if word == ".venv/bin/python" else word)


def documented_commands():
    found = {
        (path.relative_to(ROOT).as_posix(), command)
        for path in DOCUMENTS
        for command in command_lines(path.read_text())
    }
    return [pytest.param(*each, id=f"{each[0]}: {' '.join(each[1])}") for each in sorted(found)]


def check_fullscale(words):
    name, *arguments = [word for word in words if word != "..."] or ["--help"]
    if name.startswith("-") or name == "COMMAND":
        return
    assert name in COMMANDS, f"no command fullscale {name}; there are {', '.join(COMMANDS)}"
    command = COMMANDS[name]
    options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    for word in arguments:
        option = word.partition("=")[0]
        assert not re.match(r"--?[a-z]", option) or option in options | {"--help"}, option


def check_make(words):
    for word in words:
        name, assigns, _ = word.partition("=")
        if assigns:
            assert re.search(rf"^(?:export )?{name} \?=", MAKEFILE, flags=re.M), name
        elif not word.isupper():
            assert word in TARGETS, f"no target {word}; there are {', '.join(sorted(TARGETS))}"


def check_module(name, arguments):
    if name.partition(".")[0] not in PACKAGES or name.rpartition(".")[2].isupper():
        return  # another project's, or a placeholder
    path = ROOT / name.replace(".", "/")
    check_script(path / "__main__.py" if path.is_dir() else path.with_suffix(".py"), arguments)


def check_script(path, arguments):
    assert path.is_file(), f"{path.relative_to(ROOT)} does not exist"
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("--") and option != "--help":
            assert f'"{option}"' in path.read_text(), f"{path.name} has no option {option}"


def check_python(words):
    words = [word for word in words if word != "--standalone"]
    for index, word in enumerate(words):
        if word == "-c":
            compile(words[index + 1], "command", "exec")
            return
        if word == "-m":
            check_module(words[index + 1], words[index + 2 :])
            return
        if word.endswith(".py"):
            check_script(ROOT / word, words[index + 1 :])
            return


def check_pytest(words):
    for word in words:
        if "/" in word:
            assert (ROOT / word).exists(), word


def check_dvc(words):
    """Stages that are named exist; DVC's own options are not checked."""
    pipeline = {
        "dvc.yaml": list_stages("dvc.yaml"),
        "paper/dvc.yaml": list_stages("paper/dvc.yaml"),
    }
    for word in words:
        file, colon, stage = word.rpartition(":")
        if (colon and file in pipeline) or re.fullmatch(r"[a-z_]+@[\w-]+", word):
            stages = pipeline[file or "dvc.yaml"]
            if not stage.isupper():
                assert stage.partition("@")[0].partition("$")[0] in stages or any(
                    re.fullmatch(name, stage) for name in stages
                ), f"{word}: the stages are {sorted(stages)}"


def list_stages(file):
    return set(yaml.safe_load((ROOT / file).read_text())["stages"])


CHECKS = {
    "fullscale": check_fullscale,
    "make": check_make,
    "python": check_python,
    "torchrun": check_python,
    "pytest": check_pytest,
    "dvc": check_dvc,
}


@pytest.mark.parametrize(("document", "command"), documented_commands())
def test_documented_command_exists_with_its_options(document, command):
    program, *words = command
    CHECKS[program](words)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fullscale predic IN OUT", "no command fullscale predic"),
        ("fullscale predict IN OUT --modle x", "--modle"),
        ("make tset", "no target tset"),
        ("make paper PROFIL=paper", "PROFIL"),
        ("python -m tasks.tarin unet", "tasks/tarin.py does not exist"),
        ("python -m benchmarks.gate --trails 5", "no option --trails"),
        ("python docs/nothing.py", "docs/nothing.py does not exist"),
        ("dvc repro paper/dvc.yaml:tabel", "tabel"),
        ("dvc repro tarin@unet", "tarin@unet"),
        ("pytest tests/nothing.py", "tests/nothing.py"),
    ],
)
def test_wrong_command_is_found(command, message):
    ((program, *words),) = command_lines(f"    {command}  # a comment\n")
    with pytest.raises(AssertionError, match=re.escape(message)):
        CHECKS[program](words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
            assert heading in slugs, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path):
    folders = "|".join((*PACKAGES, "tests", "paper", "btcv", "reports"))
    named = set(
        re.findall(
            rf"(?<![\w/.~-])(?:{folders})/[\w/.-]*\w\.(?:py|md|yaml|csv|png|json|html)\b",
            path.read_text(),
        )
    )
    missing = {name for name in named - WRITTEN if not (ROOT / name).exists()}
    assert missing == set()


def test_design_lists_every_module_of_every_room():
    design = (ROOT / "docs/design.md").read_text()
    table = design.partition("<!-- rooms -->\n")[2].partition("<!-- end of rooms -->")[0]
    rows = re.findall(r"^\| ([a-z/]+) \| .* \| (.*) \|$", table, flags=re.M)[1:]
    shown = {room: set(modules.split(", ")) for room, modules in rows}
    tops = [ROOT / name for name in ("flows", "tasks", "model", "fullscale")]
    rooms = [path.parent for top in tops for path in top.rglob("__init__.py")]
    there = {
        room.relative_to(ROOT).as_posix(): {
            path.stem for path in room.glob("*.py") if path.stem != "__init__"
        }
        for room in rooms
    }
    assert shown == there


def test_unit_of_systemd_is_one(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    text = (ROOT / "docs/operations.md").read_text()
    (block,) = re.findall(r"^    \[Unit\]\n(?:    .*\n|\n)+", text, flags=re.M)
    unit = tmp_path / "fullscale.service"
    program = tmp_path / ".venv/bin/python"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    unit.write_text(textwrap.dedent(block).replace("/srv/fullscale", str(tmp_path)))
    command = ["systemd-analyze", "verify", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_git_ignores_what_programs_leave_in_the_project():
    folders = ("data", "inbox", "mlruns", "mlartifacts", ".prefect", "artifacts", ".cache")
    left = [f"{folder}/file" for folder in folders]
    command = ["git", "-C", str(ROOT), "check-ignore", *left]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == left
