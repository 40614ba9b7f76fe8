"""Send scans to an inbox as people and scanners do: good, broken, slow, in parts."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
from cohorts import write_nnunet

from fullscale.runtime.files import file_sha256

ACCEPTED, QUARANTINED, WAITING = "accepted", "quarantined", "waiting"
IMAGE, LABEL = "imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"
KINDS = {
    "good": (ACCEPTED, 8),
    "slow": (ACCEPTED, 4),
    "late label": (ACCEPTED, 2),
    "again": (ACCEPTED, 1),
    "truncated": (QUARANTINED, 2),
    "no label map": (QUARANTINED, 1),
    "other shape": (QUARANTINED, 1),
    "twin": (QUARANTINED, 1),
    "changed": (QUARANTINED, 1),
    "bad name": (QUARANTINED, 1),
    "lonely": (WAITING, 1),
}
"""Kinds of deliveries: expected final place, and relative frequency."""
NUM_CHUNKS = 12
LONGEST_COPY_S = 60.0


@dataclass(frozen=True)
class Sent:
    """A file that was put into the inbox.

    Attributes:
        kind: key of `KINDS`.
        case: name of the case in the file name.
        path: path in the inbox.
        sha256: checksum of the complete file.
    """

    kind: str
    case: str
    path: str
    sha256: str

    @property
    def expected(self) -> str:
        """Expected final place."""
        return KINDS[self.kind][0]


class Sender:
    """Send pairs to an inbox.

    Args:
        folder: working folder in which pairs are made.
        inbox: target folder.
        chance: source of all random choices.
    """

    def __init__(self, folder: Path, inbox: Path, chance: random.Random) -> None:
        self.folder, self.inbox, self.chance = folder, inbox, chance
        self.sent: list[Sent] = []
        self._good: list[str] = []
        self._copies: list[threading.Thread] = []
        self._number = 0

    def send(self, kind: str | None = None) -> str:
        """Send a pair or a part of one, slow ones in a thread; return its kind and case.

        Without a kind, chance decides on it.
        """
        self._number += 1
        if kind is None:
            kind = self.chance.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
        settled = [case for case in self._good if self._has_left(case)]
        if kind in ("again", "twin", "changed") and not settled:
            kind = "good"
        case = f"{kind.replace(' ', '-')}-{self._number:03d}"
        made = write_nnunet(self.folder / case, 1, prefix="made", seed=1000 + self._number)
        image, label = (made / name.format("made_00") for name in (IMAGE, LABEL))
        if kind in ("again", "twin"):
            known = self.chance.choice(settled)
            case = known if kind == "again" else case
            image, label = (self.folder / known / name.format("made_00") for name in (IMAGE, LABEL))
        elif kind == "changed":
            case = self.chance.choice(settled)
        elif kind == "bad name":
            case = f"bad name {self._number:03d}"
        elif kind == "truncated":
            image.write_bytes(image.read_bytes()[: self.chance.randrange(1, 5000)])
        elif kind == "no label map":
            label.write_bytes(self.chance.randbytes(500))
        elif kind == "other shape":
            cropped = nib.load(label).slicer[:, :, 1:]
            nib.save(cropped, label)
        files = [(image, IMAGE.format(case))]
        if kind != "lonely":
            files.append((label, LABEL.format(case)))
        for source, path in files:
            self.sent.append(Sent(kind, case, path, file_sha256(source)))
        if kind in ("good", "slow", "late label"):
            self._good.append(case)
        if kind == "slow":
            self._later(self._copy_slowly, files, self.chance.uniform(5, LONGEST_COPY_S))
        elif kind == "late label":
            self._copy(files[:1])
            self._later(self._copy_later, files[1:], self.chance.uniform(5, LONGEST_COPY_S))
        else:
            self._copy(files)
        return f"{kind}: {case}"

    def wait(self) -> None:
        """Wait until all slow copies are complete."""
        for copy in self._copies:
            copy.join()

    def _has_left(self, case: str) -> bool:
        """Return True if a pair that was sent is not in the inbox any more."""
        return not any((self.inbox / name.format(case)).exists() for name in (IMAGE, LABEL))

    def _later(self, work, *arguments) -> None:
        copy = threading.Thread(target=work, args=arguments)
        copy.start()
        self._copies.append(copy)

    def _copy(self, files) -> None:
        """Copy like a tool that keeps times: the file appears at once, with an old time."""
        for source, path in files:
            target = self.inbox / path
            part = self.inbox / f".{target.name}"
            shutil.copyfile(source, part)
            os.utime(part, (time.time() - 120, time.time() - 120))
            target.parent.mkdir(exist_ok=True)
            part.rename(target)

    def _copy_slowly(self, files, duration_s: float) -> None:
        """Copy like a slow network: both files grow."""
        contents = [(self.inbox / path, source.read_bytes()) for source, path in files]
        for number in range(NUM_CHUNKS):
            for target, content in contents:
                step = -(-len(content) // NUM_CHUNKS)
                target.parent.mkdir(exist_ok=True)
                with target.open("ab") as stream:
                    stream.write(content[number * step : (number + 1) * step])
            time.sleep(duration_s / NUM_CHUNKS)

    def _copy_later(self, files, duration_s: float) -> None:
        time.sleep(duration_s)
        self._copy(files)
