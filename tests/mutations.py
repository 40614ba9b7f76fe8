"""Deliberate faults in the code, and the tests that have to catch them.

    python tests/mutations.py               # all, each in the same temporary copy of the tree
    python tests/mutations.py --only 3,7    # some of them, by number

A fault that no test catches is a promise that no test keeps. Run it after a change that makes tests
faster or fewer. Each fault is one text replaced in one file; where the text is gone, the list here
has to follow the code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One deliberate fault.

    Attributes:
        fault: what is wrong with the changed code.
        file: path below the root.
        old: text that occurs in it once.
        new: what it is replaced by.
        tests: arguments of pytest that select what should catch it.
    """

    fault: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "the promotion gate's comparison is reversed",
        "fullscale/evaluation/criteria.py",
        "gain.low > params.min_dice_gain",
        "gain.low < params.min_dice_gain",
        "tests/evaluation/test_promotion_gate.py",
    ),
    Mutation(
        "several scans of a patient count as several patients",
        "fullscale/evaluation/paired.py",
        '.groupby(pairs["patient"]).mean()',
        '.groupby(pairs["case"]).mean()',
        "tests/evaluation/test_paired.py",
    ),
    Mutation(
        "the champion is scored with the threshold of today's params",
        "tasks/register.py",
        '"threshold": float(model_settings(folder).get("threshold", DEFAULT_THRESHOLD)),',
        "",
        "tests/tasks/test_register.py",
    ),
    Mutation(
        "a patient's other scans are trained on though one is in the test set",
        "fullscale/patient_split.py",
        'is_tested = cases["patient"].isin(test_patients).to_numpy()',
        'is_tested = (cases["patient"].isin(test_patients) & ~cases["patient"].duplicated())'
        ".to_numpy()",
        "tests/fullscale/test_patient_split.py",
    ),
    Mutation(
        "the test set depends on which other patients there are",
        "fullscale/patient_split.py",
        "test_patients = {patient for patient in testable if is_test_patient(patient, params)}",
        "test_patients = set(sorted(set(testable))[:: max(1, round(1 / params.test_fraction))])",
        "tests/fullscale/test_patient_split.py",
    ),
    Mutation(
        "test cases are validated on",
        "tasks/train.py",
        "SliceDataset(store, cases_of(split, fold), neighbour_mm)",
        'SliceDataset(store, cases_of(split, {"val": "test"}.get(fold, fold)), neighbour_mm)',
        "tests/tasks/test_train.py",
    ),
    Mutation(
        "a mask file is written without the scan's axes",
        "fullscale/scans/nifti_writer.py",
        '    header.set_sform(geometry.own_affine, code="scanner")\n'
        '    header.set_qform(geometry.own_affine, code="scanner", strip_shears=True)\n',
        "",
        "tests/scans/test_nifti_writer.py",
    ),
    Mutation(
        "a served model does not follow its alias",
        "fullscale/serving/alias_follower.py",
        "if number != self.current.model.version:",
        "if number is None:",
        "tests/serving tests/system/test_serving.py::"
        "test_server_follows_the_champion_and_outlives_what_is_malformed",
    ),
    Mutation(
        "a file may be empty after a power cut",
        "fullscale/runtime/files.py",
        "            os.fsync(stream.fileno())",
        "            stream.fileno()",
        "tests/runtime/test_files.py",
    ),
    Mutation(
        "an interrupted write leaves half a file",
        "fullscale/runtime/files.py",
        'temporary = path.with_name(path.name + ".part")',
        "temporary = path",
        "tests/runtime/test_files.py",
    ),
    Mutation(
        "a damaged checkpoint is used",
        "fullscale/runtime/checkpoints.py",
        "if match is None or not file_sha256(path).startswith(match[2]):",
        "if match is None:",
        "tests/runtime/test_checkpoints.py",
    ),
    Mutation(
        "a checkpoint may run code when it is loaded",
        "fullscale/runtime/checkpoints.py",
        "weights_only=True",
        "weights_only=False",
        "tests/runtime/test_checkpoints.py",
    ),
    Mutation(
        "a checkpoint of other settings is continued",
        "fullscale/runtime/checkpoints.py",
        'if differences := _differences(content["identity"], self._identity):',
        "if differences := []:",
        "tests/runtime/test_checkpoints.py",
    ),
    Mutation(
        "quarantine deletes",
        "fullscale/inbox/moves.py",
        'inbox.move(file.path, move["target"])',
        "inbox.fs.rm_file(inbox._full(file.path))",
        "tests/inbox/test_inbox.py tests/tasks/test_receive.py",
    ),
    Mutation(
        "the files of a registered version are not verified",
        "fullscale/serving/model_lookup.py",
        "if digest != known:",
        "if not digest:",
        "tests/serving/test_model_lookup.py",
    ),
    Mutation(
        "the loss reads masks of organs that nobody drew",
        "model/losses.py",
        "kept = annotated_BK.to(torch.bool)",
        "kept = torch.ones_like(annotated_BK, dtype=torch.bool)",
        "tests/model/test_losses.py",
    ),
    Mutation(
        "the window's ends are swapped",
        "model/preprocessing.py",
        "low, high = window_hu",
        "high, low = window_hu",
        "tests/training tests/model tests/prediction",
    ),
    Mutation(
        "a scan of more slices has more weight in an epoch",
        "fullscale/training/epoch_order.py",
        'group_S = case_S if sampling == "case" else',
        'group_S = case_S if sampling == "slice" else',
        "tests/training/test_epoch_order.py",
    ),
    Mutation(
        "a resumed training begins its epochs anew",
        "fullscale/training/epoch_order.py",
        "self._generator(0, epoch).permutation(np.concatenate(chosen))",
        "np.random.default_rng().permutation(np.concatenate(chosen))",
        "tests/training/test_epoch_order.py",
    ),
    Mutation(
        "names of files are not made safe",
        "fullscale/ingestion/names.py",
        'return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-")[:64]',
        "return text",
        "tests/scans/test_cohort.py tests/ingestion",
    ),
    Mutation(
        "only the first of an organ's label ids counts",
        "fullscale/scans/slicing.py",
        "        for label_id in label_ids:\n",
        "        for label_id in label_ids[:1]:\n",
        "tests/scans/test_slicing.py tests/tasks/test_slice.py",
    ),
    Mutation(
        "the false-positive rate is of all slices, not of those without the organ",
        "fullscale/evaluation/metrics.py",
        "share(self.num_false_positive_slices, self.num_free_slices)",
        "share(self.num_false_positive_slices, self.num_free_slices + self.num_organ_slices)",
        "tests/evaluation/test_metrics.py",
    ),
    Mutation(
        "averaged weights are never used",
        "fullscale/training/loop.py",
        "        if self._average is None:\n            return self._network\n",
        "        if self.progress is not None:\n            return self._network\n",
        "tests/tasks/test_train.py",
    ),
    Mutation(
        "an ONNX file lacks the slice classifier",
        "fullscale/serving/onnx_graph.py",
        "join_probabilities([probabilities(output, self.gating) for output in outputs])",
        "join_probabilities([torch.sigmoid(output.logits[0]) for output in outputs])",
        "tests/tasks/test_export.py",
    ),
    Mutation(
        "an ensemble is its first member",
        "model/ensemble.py",
        "torch.stack(tuple(members)).mean(dim=0)",
        "members[0]",
        "tests/model/test_ensemble.py",
    ),
    Mutation(
        "floors are judged on trainings, not on what is registered",
        "fullscale/evaluation/promotion_gate.py",
        "rows = of_organ(registered, organ)",
        "rows = of_organ(candidate, organ)",
        "tests/evaluation/test_promotion_gate.py",
    ),
    Mutation(
        "two runs work in one checkout at a time",
        "fullscale/versioning/worktree.py",
        "with acquire_lock(_lock(folder)):",
        "if True:",
        "tests/versioning/test_worktree.py",
    ),
    Mutation(
        "worktrees hold copies of the scans",
        "fullscale/versioning/worktree.py",
        'LINK_TYPES = "hardlink,copy"',
        'LINK_TYPES = "copy"',
        "tests/versioning/test_data_version.py",
    ),
)


def copy_tree(folder: Path) -> None:
    """Copy the working tree, without what git ignores, into a new repository."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/shared")]
    from project import clone_project

    clone_project(folder)


def is_caught(mutation: Mutation, tree: Path) -> bool:
    """Apply a fault in a copy of the tree, run its tests, and undo it.

    Raises:
        SystemExit: the text to replace does not occur exactly once.
    """
    path = tree / mutation.file
    before = path.read_text(encoding="utf-8")
    if before.count(mutation.old) != 1:
        sys.exit(f"error: {mutation.file} has {before.count(mutation.old)} times: {mutation.old}")
    path.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *mutation.tests.split()],
            cwd=tree,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        path.write_text(before, encoding="utf-8")
    if done.returncode not in (0, 1):  # neither passed nor failed
        sys.exit(f"error: pytest ended with code {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print("   ", failed[0].partition(" - ")[0] if failed else "no test failed", flush=True)
    return done.returncode == 1


def main() -> None:
    """Try faults, and end with code 1 if one was not caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="numbers of faults, separated by commas")
    args = parser.parse_args()
    wanted = {int(number) for number in args.only.split(",") if number}
    missed = []
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        copy_tree(tree)
        for number, mutation in enumerate(MUTATIONS, start=1):
            if wanted and number not in wanted:
                continue
            caught = is_caught(mutation, tree)
            print(f"{number:2d} {'caught' if caught else 'NOT CAUGHT'}: {mutation.fault}")
            if not caught:
                missed.append(number)
    sys.exit(f"not caught: {missed}" if missed else 0)


if __name__ == "__main__":
    main()
