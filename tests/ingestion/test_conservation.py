"""Random sources: each input file is in data/, refused with a reason, or named as not read."""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bodies import make_body, save_nifti
from cohorts import write_dataset_json, write_seg, write_series
from PIL import Image

from fullscale.ingestion.ingest import ingest
from fullscale.ingestion.layouts import read_source
from fullscale.runtime.files import file_sha256
from fullscale.scans.cohort import read_cohort
from fullscale.scans.volume import read_image, read_labels

ROOT = Path(__file__).parents[2]
SHAPE_ZYX, SPACING_MM = (10, 24, 28), (10.0, 9.0, 9.0)
NAMES = (
    *("case_1", "case 1", "case.1", "Case_1", "病人1", "患者1", "Müller", "Möller", "-x", "x"),
    *("1.2.840." + "1" * 60, "1.2.840." + "1" * 61, "s0001", "a b", "a_b"),
)


class Tree:
    """A random source, and HU and labels of each scan by its file or folder."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.rng = np.random.default_rng(seed)
        self.seed = 1000 * seed
        self.made: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
        self.layout = list(LAYOUTS)[seed % len(LAYOUTS)]
        LAYOUTS[self.layout](self, self.some_names(3, 6))

    def some_names(self, low: int, high: int) -> list[str]:
        return self.rng.permutation(NAMES)[: self.rng.integers(low, high)].tolist()

    def body(self, place: Path, organs=(1, 2)):
        """Return a new body with some of the organs drawn, whose scan will be at `place`."""
        self.seed += 1
        hu, labels = make_body(SHAPE_ZYX, SPACING_MM, seed=self.seed)
        self.made[place] = hu, np.where(np.isin(labels, organs), labels, 0)
        return self.made[place]

    def pair(self, image: Path, label: Path) -> None:
        hu, labels = self.body(image)
        save_nifti(image, hu, SPACING_MM)
        save_nifti(label, labels, SPACING_MM)

    def nnunet(self, names):
        for name in names:
            image = self.root / f"imagesTr/{name}_0000.nii.gz"
            self.pair(image, self.root / f"labelsTr/{name}.nii.gz")
        write_dataset_json(self.root)

    def msd(self, names):
        training = []
        for name in names:
            self.pair(self.root / name / "ct.nii.gz", self.root / name / "label.nii.gz")
            training.append({"image": f"{name}/ct.nii.gz", "label": f"{name}/label.nii.gz"})
        write_dataset_json(self.root, training=training)

    def lits(self, names):
        for number, name in enumerate(names):
            folder = self.root / name
            self.pair(folder / f"volume-{number}.nii", folder / f"segmentation-{number}.nii")

    def totalsegmentator(self, names):
        for name in names:
            hu, labels = self.body(self.root / name / "ct.nii.gz")
            save_nifti(self.root / name / "ct.nii.gz", hu, SPACING_MM)
            for organ in (1, 2):
                path = self.root / name / f"segmentations/organ_{organ}.nii.gz"
                save_nifti(path, (labels == organ).astype(np.uint8), SPACING_MM)

    def ircadb(self, names):
        for name in names:
            hu, labels = self.body(self.root / name / "PATIENT_DICOM", (1,))
            write_series(self.root / name / "PATIENT_DICOM", hu, SPACING_MM, name="image_{}")
            drawn = np.where(labels == 1, 255, 0) - 1024
            folder = self.root / name / "MASKS_DICOM/liver"
            write_series(folder, drawn, SPACING_MM, name="image_{}", RescaleIntercept="0")

    def chaos(self, names):
        for name in names:
            hu, labels = self.body(self.root / name / "DICOM_anon", (1,))
            write_series(self.root / name / "DICOM_anon", hu, SPACING_MM)
            (self.root / name / "Ground").mkdir(exist_ok=True)
            for number, plane in enumerate(labels[::-1]):
                picture = Image.fromarray(((plane == 1) * 255).astype(np.uint8))
                picture.save(self.root / name / f"Ground/liver_{number:03d}.png")

    def dicom_seg(self, names):
        for name in names:
            folder = self.root / name / "ct"
            hu, labels = self.body(folder, (1,))
            write_series(folder, hu, SPACING_MM)
            masks = (labels == 1).astype(np.uint8)[..., None]
            write_seg(self.root / name / "seg.dcm", folder, masks, names=["Liver"])

    def join_another(self) -> None:
        """Put a second source, of any layout, among the files of the first, or into a folder."""
        add = list(LAYOUTS.values())[self.rng.integers(len(LAYOUTS))]
        top, place = self.root, self.rng.choice([".", "second", "imagesTr"])
        self.root = top / place
        self.root.mkdir(exist_ok=True)
        add(self, self.some_names(1, 3))
        self.root = top

    def disturb(self) -> None:
        """Do something to a few files and folders that archives, copies and disks do."""
        folders = sorted(path for path in self.root.rglob("*") if path.is_dir())
        for path in self.rng.permutation(np.array(folders, dtype=object))[: self.rng.integers(3)]:
            FOLDER_DISTURBANCES[self.rng.integers(len(FOLDER_DISTURBANCES))](path)
        files = sorted(path for path in self.root.rglob("*") if path.name != "dataset.json")
        files = [path for path in files if path.is_file()]
        for path in self.rng.permutation(np.array(files, dtype=object))[:6]:
            DISTURBANCES[self.rng.integers(len(DISTURBANCES))](path)


def upper(path):
    stem, dot, ending = path.name.partition(".")
    path.rename(path.with_name(stem + dot + ending.upper()))


def twin(path):
    """Add the file with or without compression, under the name that goes with it."""
    if path.suffix == ".gz":
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    else:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), 1))


def link(path):
    top = next(parent for parent in path.parents if parent.name == "in").parent
    store = top / f"store-{os.urandom(4).hex()}"
    path.rename(store)
    path.symlink_to(store)


DISTURBANCES = (
    upper,
    twin,
    link,
    lambda path: path.with_name("._" + path.name).write_bytes(b"\0\5\x16\7"),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(b""),
    lambda path: path.unlink(),
    lambda path: path.with_name("more.nrrd").write_bytes(b"NRRD0004"),
    lambda path: shutil.copy(path, path.with_name("copy of " + path.name)),
)
FOLDER_DISTURBANCES = (
    link,
    lambda path: shutil.copytree(path, path.with_name(path.name + " copy"), symlinks=True),
    lambda path: path.with_name(path.name + " again").symlink_to(path),
    lambda path: path.with_name(path.name + " gone").symlink_to(path.with_name("nowhere")),
)
LAYOUTS = {
    "nnunet": Tree.nnunet,
    "msd": Tree.msd,
    "lits": Tree.lits,
    "totalsegmentator": Tree.totalsegmentator,
    "ircadb": Tree.ircadb,
    "chaos": Tree.chaos,
    "dicom-seg": Tree.dicom_seg,
}


def check_conserved(tree: Tree, data: Path, report) -> None:
    """Check that each file has one outcome, and that each case has the voxels of its own scan."""
    source = read_source(tree.root)
    cohort = read_cohort(data).cases if (data / "cases.csv").exists() else ()
    inside = {case.name: case for case in cohort}
    refused = {finding.case for finding in report.refused}
    assert set(report.accepted) | set(report.skipped) == set(inside)
    assert not refused & set(inside)
    assert len(report.accepted) + len(report.skipped) + report.num_refused == report.num_found
    outcomes: dict[Path, list[str]] = {}
    for case in source.cases:
        for path in case.files:
            outcomes.setdefault(path, []).append("in" if case.name in inside else "refused")
        if case.name not in inside:
            assert case.name in refused
            continue
        written = inside[case.name]
        assert file_sha256(written.image) == written.image_sha256
        assert file_sha256(written.label) == written.label_sha256
        for place, (hu, labels) in tree.made.items():
            if case.files[0] in (place, *place.glob("*")):
                np.testing.assert_array_equal(read_image(written.image).values_ZYX, hu)
                check_labels(labels, read_labels(written.label).values_ZYX, written.annotated)
    for path in source.refused_files:
        outcomes.setdefault(path, []).append("refused")
    for name in report.unread:
        outcomes.setdefault(tree.root / name, []).append("named")
    for path in all_files(tree.root):
        told = [each for place in (path, *path.parents) for each in outcomes.get(place, [])]
        assert len(told) == (path != tree.root / "dataset.json"), (path, told)


def check_labels(made, written, annotated) -> None:
    """Check that each organ that the case annotates is whole, under one id, and no other is."""
    assert not written[made == 0].any()
    ids = [np.unique(written[made == label_id]).tolist() for label_id in np.unique(made[made > 0])]
    assert all(len(each) == 1 for each in ids)
    kept = [label_id for (label_id,) in ids if label_id]
    # A mask that was copied or linked is a further label of the same voxels.
    drawn = [name for name in annotated if "copy" not in name and "again" not in name]
    assert len(kept) == len(set(kept)) == len(drawn)


def all_files(root: Path) -> list[Path]:
    """Return every file below a folder, through links too, and every link that leads nowhere."""
    walked = os.walk(root, followlinks=True)
    return [Path(place, name) for place, _, names in walked for name in names]


@pytest.mark.parametrize("seed", range(14))
def test_ingest_conserves_every_file(tmp_path, seed):
    tree = Tree(tmp_path / "a/in", seed)
    if seed >= len(LAYOUTS):
        tree.join_another()
        tree.disturb()
    first = ingest(tree.root, tmp_path / "data", num_workers=1 + seed % 2)
    check_conserved(tree, tmp_path / "data", first)
    again = ingest(tree.root, tmp_path / "data")
    assert again.accepted == []
    assert again.skipped == first.accepted
    check_conserved(tree, tmp_path / "data", again)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 103))
def test_ingest_killed_at_a_random_moment_conserves_every_file(tmp_path, seed):
    tree = Tree(tmp_path / "a/in", seed)
    tree.join_another()
    tree.disturb()
    command = (
        "import sys; from pathlib import Path; from fullscale.ingestion.ingest import ingest;"
        "ingest(Path(sys.argv[1]), Path(sys.argv[2]), num_workers=int(sys.argv[3]))"
    )
    data = tmp_path / "data"
    for _ in range(3):
        num_workers = str(tree.rng.integers(1, 5))
        process = subprocess.Popen(
            [sys.executable, "-c", command, str(tree.root), str(data), num_workers],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        deadline = time.monotonic() + tree.rng.uniform(1, 5)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    report = ingest(tree.root, data, num_workers=int(tree.rng.integers(1, 5)))
    check_conserved(tree, data, report)
    assert {path.name for path in data.glob("*")} <= {
        *("imagesTr", "labelsTr", "cases.csv", "dataset.json", "patients.json")
    }
