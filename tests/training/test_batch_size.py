import subprocess
import sys

import pytest
import torch

from fullscale.prediction.network_files import build, describe_network
from fullscale.runtime.errors import StageError
from fullscale.training.batch_size import find_batch_size, largest_part, out_of_memory_explained

MIB = 2**20


@pytest.mark.parametrize(
    ("bytes_each", "usable", "largest", "wanted"),
    [(10, 1000, 1000, 64), (10, 1000, 20, 16), (10, 10, 1000, 1), (10, 20, 1000, 2), (1, 7, 3, 2)],
)
def test_sizes_double_while_twice_the_memory_fits(bytes_each, usable, largest, wanted):
    tried = []

    def try_part(size):
        tried.append(size)
        return bytes_each * size

    assert largest_part(try_part, usable, largest) == wanted
    assert tried == [2**power for power in range(len(tried))]
    assert max(tried) * bytes_each <= max(usable, bytes_each)


def test_size_that_runs_out_is_halved():
    def try_part(size):
        if size == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0

    assert largest_part(try_part, 1000, 1000) == 4


def test_no_room_for_one_slice_is_an_error():
    def try_part(size):
        raise MemoryError

    with pytest.raises(StageError, match=r"a single slice; lower train\.width or slice\.size_px"):
        largest_part(try_part, 1000, 1000)


def test_other_failures_are_not_taken_for_memory():
    def try_part(size):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        largest_part(try_part, 1000, 1000)


@pytest.mark.parametrize("error", [MemoryError("x"), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_names_the_settings_to_change(error):
    with (
        pytest.raises(
            StageError,
            match=r"train\.batch_size 48 and slice\.size_px 320 .*train\.num_accumulated",
        ),
        out_of_memory_explained(48, 320),
    ):
        raise error


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="something else"), out_of_memory_explained(1, 32):
        raise RuntimeError("something else")


def test_auto_is_a_power_of_two_that_leaves_eight_steps(tiny_params, capsys):
    network = build(describe_network("unet3plus", tiny_params))
    found = find_batch_size(network, tiny_params, ("focal", "iou"), 100, torch.device("cpu"), 1)
    assert found == 8
    assert "train.batch_size auto: 8 slices a step, 8 at once on cpu" in capsys.readouterr().err


def test_auto_is_dealt_out_to_processes_and_parts(tiny_params):
    train = tiny_params.train.model_copy(update={"num_accumulated": 2})
    params = tiny_params.model_copy(update={"train": train})
    network = build(describe_network("unet", params))
    found = find_batch_size(network, params, ("focal",), 200, torch.device("cpu"), 3)
    assert found == 4 * 2 * 3


HUNGRY = """
import resource, torch
from fullscale.training.batch_size import out_of_memory_explained
from fullscale.runtime.console import report_errors
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
@report_errors
def main():
    with out_of_memory_explained(4096, 512):
        torch.zeros(4096, 3, 512, 512).exp()
main()
"""


@pytest.mark.slow  # another program loads torch
def test_real_lack_of_memory_is_explained():
    done = subprocess.run(
        [sys.executable, "-c", HUNGRY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: memory ran out with train.batch_size 4096 and slice.size")
    assert "Traceback" not in done.stderr
