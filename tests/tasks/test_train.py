import copy
import json
import threading

import mlflow
import pandas as pd
import pytest
import torch

from fullscale.params import Params
from fullscale.prediction.network_files import WEIGHTS_NAME, TrainedOn, load_trained
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.tracking.run_record import RunDescription
from fullscale.tracking.runs import training_run
from fullscale.training import validation
from fullscale.training.history import read_history, write_history
from model.unet import UNet
from tasks.train import TrainingSession, flatten, identify, train_network

pytestmark = pytest.mark.slow

SPLIT = pd.DataFrame(
    {
        "case": [f"case_{number:02d}" for number in range(8)],
        "patient": [f"patient_{number:02d}" for number in range(8)],
        "fold": ["train"] * 4 + ["test"] * 2 + ["val"] * 2,
    }
)


def train(name, params, store, folder, mlflow_store, split=SPLIT, seed=0):
    tracking = folder.parent / f"{folder.name}-tracking"
    description = RunDescription(
        mlflow_store.uri, mlflow_store.artifact_location, name, {}, {}, "0" * 32
    )
    with training_run(description, tracking) as run:
        train_network(name, seed, params, store, split, folder, TrainingSession(run))
    return run.run_id


@pytest.mark.parametrize("name", ["unet", "unet3plus"])
def test_training_leaves_network_history_and_run(
    name, tiny_params, tiny_store, tmp_path, mlflow_store
):
    slicing = tiny_params.slice.model_copy(update={"neighbour_mm": "auto"})
    params = tiny_params.model_copy(update={"slice": slicing})
    run_id = train(name, params, tiny_store, tmp_path / name, mlflow_store)
    trained = load_trained(tmp_path / name)
    history = read_history(tmp_path / name / "history.csv")
    assert [row["epoch"] for row in history] == [1, 2]
    best = max(history, key=lambda row: row["val/dice"])
    assert trained.description.epoch == best["epoch"]
    assert trained.description.val_dice == pytest.approx(best["val/dice"], abs=1e-5)
    assert trained.description.trained_on == TrainedOn(
        slice_spacing_mm=(8.0, 8.0),
        pixel_spacing_mm=(7.0, 7.0),
        height_mm=(128.0, 128.0),
        trunk_depth_mm=(196.0, 196.0),
        trunk_width_mm=(266.0, 266.0),
    )
    assert trained.description.neighbour_mm == 8.0  # the spacing of the training cases
    client = mlflow.MlflowClient(mlflow_store.uri)
    logged = client.get_metric_history(run_id, "train/total")
    assert [metric.step for metric in logged] == [1, 2]
    assert logged[1].value == pytest.approx(history[1]["train/total"], rel=1e-5)
    assert client.get_run(run_id).info.status == "FINISHED"
    pictures = [item.path for item in client.list_artifacts(run_id, "validation")]
    assert f"validation/epoch-{int(best['epoch']):04d}.png" in pictures
    assert {"augmented.png", "curves.png"} <= {item.path for item in client.list_artifacts(run_id)}


def test_same_seed_gives_same_weights(tiny_params, tiny_store, tmp_path, mlflow_store):
    digests = []
    for folder in ("first", "second"):
        train("unet3plus", tiny_params, tiny_store, tmp_path / folder, mlflow_store)
        digests.append(file_sha256(tmp_path / folder / WEIGHTS_NAME))
    train("unet3plus", tiny_params, tiny_store, tmp_path / "other", mlflow_store, seed=1)
    assert digests[0] == digests[1] != file_sha256(tmp_path / "other" / WEIGHTS_NAME)


def test_training_lowers_the_loss(tiny_params, tiny_store, tmp_path, mlflow_store):
    longer = tiny_params.model_copy(
        update={"train": tiny_params.train.model_copy(update={"num_epochs": 5})}
    )
    train("unet", longer, tiny_store, tmp_path, mlflow_store)
    losses = [row["train/total"] for row in read_history(tmp_path / "history.csv")]
    assert losses[-1] < 0.9 * losses[0]


def changed_train(params, **values):
    train = params.train.model_copy(update=values)
    return params.model_copy(update={"train": train})


def test_epoch_is_reported_in_full(tiny_params, tiny_store, tmp_path, mlflow_store):
    run_id = train("unet3plus", tiny_params, tiny_store, tmp_path, mlflow_store)
    logged = mlflow.MlflowClient(mlflow_store.uri).get_run(run_id).data.metrics
    for organ in ("liver", "spleen"):
        for rate in ("accuracy", "sensitivity", "specificity"):
            assert 0 <= logged[f"val/classifier_{rate}/{organ}"] <= 1
        assert f"val/dice/{organ}" in logged
    for term in ("focal", "ms_ssim", "iou"):
        assert logged[f"train/side5/{term}"] > 0
    assert logged["train/time/training_slices_per_s"] > 0
    assert 0 <= logged["train/time/waiting_share"] < logged["train/time/outside_share"] < 1
    assert "system/cpu_utilization_percentage" in logged


def test_epoch_has_its_length_and_its_share_of_organ_free_slices(
    tiny_params, tiny_store, tmp_path, mlflow_store
):
    few = changed_train(
        tiny_params, organ_free_share=0.4, slices_per_epoch=20, batch_size=4, num_epochs=1
    )
    train("unet", few, tiny_store, tmp_path, mlflow_store)
    (row,) = read_history(tmp_path / "history.csv")
    assert (row["slices/organ"], row["slices/organ_free"]) == (12, 8)


def test_slice_classifier_that_cannot_learn_is_a_warning(
    tiny_params, tiny_store, tmp_path, mlflow_store, capsys, monkeypatch
):
    few = changed_train(tiny_params, num_epochs=1)
    monkeypatch.setattr(validation, "MIN_SHARE_WITHOUT_ORGAN", 1.1)
    monkeypatch.setattr(validation, "MIN_SPECIFICITY", 1.1)
    train("unet3plus", few, tiny_store, tmp_path / "unet3plus", mlflow_store)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert "slices of an epoch are without liver (" in lines[0]
    assert "of the validation slices without liver (" in lines[1]
    assert [line.partition(": t")[0] for line in lines] == ["warning: unet3plus-0"] * 2
    train("unet", few, tiny_store, tmp_path / "unet", mlflow_store)
    assert "warning:" not in capsys.readouterr().err


def test_averaged_weights_are_what_is_saved(tiny_params, tiny_store, tmp_path, mlflow_store):
    saved = set()
    for decay in (0.0, 0.9):
        params = changed_train(tiny_params, ema_decay=decay, num_epochs=1)
        train("unet", params, tiny_store, tmp_path / str(decay), mlflow_store)
        saved.add(file_sha256(tmp_path / str(decay) / "weights.safetensors"))
    assert len(saved) == 2


class StateRecorder:
    """In place of checkpoints on disk: keeps network and average after every step."""

    def __init__(self):
        self.states = []

    def save(self, state):
        self.states.append(copy.deepcopy((state["network"], state["average"])))


def test_average_is_of_weights_and_of_batch_norm_statistics(tiny_params, tiny_store, tmp_path):
    params = changed_train(tiny_params, ema_decay=0.75, num_epochs=1)
    compute = params.compute.model_copy(update={"checkpoint_interval_s": 0})
    recorder = StateRecorder()
    train_network(
        "unet",
        0,
        params.model_copy(update={"compute": compute}),
        tiny_store,
        SPLIT,
        tmp_path,
        TrainingSession(checkpoints=recorder),
    )
    states = recorder.states
    assert len(states) > 2
    names = [name for name, value in states[0][0].items() if value.is_floating_point()]
    assert any(name.endswith("running_mean") for name in names)
    assert any(name.endswith("running_var") for name in names)
    for name in names:
        average = states[0][0][name]
        for network, averaged in states:
            average = torch.lerp(average, network[name], 0.25)
            torch.testing.assert_close(averaged[f"module.{name}"], average)
    saved = load_trained(tmp_path).network.state_dict()
    for name in names:
        torch.testing.assert_close(saved[name], states[-1][1][f"module.{name}"])


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": "sgd", "schedule": "poly", "learning_rate": 0.05, "num_accumulated": 4},
        {"schedule": "constant", "ema_decay": 0.5, "side_weights": "halving"},
        {"precision": "bf16", "deterministic": True, "batch_size": "auto"},
    ],
    ids=lambda values: "-".join(values),
)
def test_every_setting_trains(tiny_params, tiny_store, tmp_path, mlflow_store, values):
    train("unet3plus", changed_train(tiny_params, **values), tiny_store, tmp_path, mlflow_store)
    rows = read_history(tmp_path / "history.csv")
    assert rows[-1]["train/total"] < rows[0]["train/total"]
    torch.use_deterministic_algorithms(mode=False)


def test_accumulated_step_equals_the_whole_one(tiny_params, tiny_store, tmp_path, mlflow_store):
    """Up to batch norm, whose statistics are of the part: so the first losses differ a little."""
    losses = []
    for parts in (1, 2):
        split_up = changed_train(tiny_params, num_accumulated=parts, num_epochs=1)
        train("unet", split_up, tiny_store, tmp_path / str(parts), mlflow_store)
        (row,) = read_history(tmp_path / str(parts) / "history.csv")
        losses.append(row["train/total"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_loss_that_is_not_finite_names_step_and_cases(
    tiny_params, tiny_store, tmp_path, mlflow_store
):
    wild = changed_train(tiny_params, learning_rate=1e30, optimizer="sgd", weight_decay=0)
    with pytest.raises(
        StageError, match=r"in epoch 1, step \d+, with slices of case_0\d"
    ) as caught:
        train("unet", wild, tiny_store, tmp_path, mlflow_store)
    assert "nothing was learned from it: lower train.learning_rate" in str(caught.value)


def test_uneven_parts_are_refused(tiny_params, tiny_store, tmp_path, mlflow_store):
    with pytest.raises(StageError, match=r"batch_size 8 cannot be divided .* a multiple of 3"):
        train(
            "unet",
            changed_train(tiny_params, num_accumulated=3),
            tiny_store,
            tmp_path,
            mlflow_store,
        )


def test_identity_holds_what_decides_the_weights(tiny_params, tiny_store):
    code = {"model/a.py": "123"}
    before = identify("unet", 0, tiny_params, tiny_store, SPLIT, code)
    assert before["code model/a.py"] == "123"
    assert before["train.learning_rate"] == "0.003"
    assert before["recipe.architecture"] == "unet"
    assert "slices of train case case_00" in before
    assert not [key for key in before if "case_04" in key]
    shared = changed_train(tiny_params, devices=2, strategy="ddp", num_picture_slices=9)
    assert identify("unet", 0, shared, tiny_store, SPLIT, code) == before
    warmer = changed_train(tiny_params, learning_rate=0.1)
    assert identify("unet", 0, warmer, tiny_store, SPLIT, code) != before


def test_test_cases_are_never_read(tiny_params, tiny_store, tmp_path, mlflow_store, monkeypatch):
    loaded = []
    load = type(tiny_store).load
    monkeypatch.setattr(
        type(tiny_store), "load", lambda self, case: (loaded.append(case), load(self, case))[1]
    )
    train("unet", tiny_params, tiny_store, tmp_path, mlflow_store)
    assert set(loaded) == set(SPLIT.loc[SPLIT["fold"] != "test", "case"])


def test_no_thread_takes_turns_with_those_that_compute(
    tiny_params, tiny_store, tmp_path, mlflow_store, monkeypatch
):
    """With one that augments, each operator of a step waits for its turn on a CPU."""
    before = set(threading.enumerate())
    names = set()
    forward = UNet.forward

    def watched(*arguments, **more):
        names.update(thread.name for thread in threading.enumerate() if thread not in before)
        return forward(*arguments, **more)

    monkeypatch.setattr(UNet, "forward", watched)
    train("unet", tiny_params, tiny_store, tmp_path, mlflow_store)
    assert names == {"mlflow-sync", "system-metrics"}


@pytest.mark.parametrize("fold", ["train", "val"])
def test_empty_fold_is_refused(tiny_params, tiny_store, tmp_path, mlflow_store, fold):
    split = SPLIT[SPLIT["fold"] != fold]
    with pytest.raises(StageError, match=f"the split holds no {fold} cases"):
        train("unet", tiny_params, tiny_store, tmp_path, mlflow_store, split)


def test_batch_larger_than_the_data_is_refused(tiny_params, tiny_store, tmp_path, mlflow_store):
    large = tiny_params.model_copy(
        update={"train": tiny_params.train.model_copy(update={"batch_size": 1000})}
    )
    with pytest.raises(StageError, match=r"do not fill one batch of 1000; lower train\.batch_size"):
        train("unet", large, tiny_store, tmp_path, mlflow_store)


def test_run_of_failed_training_is_marked(tiny_params, tiny_store, tmp_path, mlflow_store):
    with pytest.raises(StageError):
        train("unet", tiny_params, tiny_store, tmp_path, mlflow_store, SPLIT[:0])
    client = mlflow.MlflowClient(mlflow_store.uri)
    experiment = client.get_experiment_by_name("fullscale")
    newest = client.search_runs([experiment.experiment_id], max_results=1)[0]
    assert newest.info.status == "FAILED"


def test_history_comes_back_as_written(tmp_path):
    rows = [{"epoch": 1, "val/dice": 0.123456789}, {"epoch": 2, "val/dice": float("nan")}]
    write_history(tmp_path / "history.csv", rows)
    back = read_history(tmp_path / "history.csv")
    assert back[0] == {"epoch": 1, "val/dice": 0.123457}
    assert back[1]["val/dice"] != back[1]["val/dice"]


def test_flatten_joins_keys():
    nested = {"a": {"b": 1, "c": {"d": [2]}}, "e": None}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_params_are_json_for_dvc_and_mlflow(tiny_params):
    assert isinstance(tiny_params, Params)
    assert json.loads(tiny_params.model_dump_json(by_alias=True))["train"]["width"] == 4
