"""The pull step of all deployments: a run works in the project folder of its worker."""

from __future__ import annotations

import os

VARIABLE = "FULLSCALE_ROOT"


class ProjectFolderError(Exception):
    """The worker has no project folder."""


def enter_project() -> dict[str, str]:
    """Make the folder that FULLSCALE_ROOT names the working directory; the worker sets it.

    Returns:
        The folder, as Prefect expects of a step.

    Raises:
        ProjectFolderError: the variable is not set, or the folder cannot be entered.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise ProjectFolderError(
            f"the worker has no {VARIABLE}; start it with `make services`, or set {VARIABLE} to "
            "its project folder"
        )
    try:
        os.chdir(folder)
    except OSError as error:
        raise ProjectFolderError(
            f"the worker's project folder {folder} cannot be entered ({error.strerror}); if it was "
            "moved, start `make services` again where it is now"
        ) from None
    return {"directory": folder}
