import json

import mlflow
import pandas as pd
import pytest
import torch

from scans.files import file_sha256
from tasks.console import StageError
from tasks.dataset import SliceDataset, load_batches
from tasks.history import read_history, write_history
from tasks.learner import OrganLearner
from tasks.params import Params
from tasks.tracking import training_run
from tasks.train import flatten, train_network
from tasks.trained import WEIGHTS_NAME, build, describe, load_trained

SPLIT = pd.DataFrame(
    {
        "case": [f"case_{number:02d}" for number in range(8)],
        "patient": [f"patient_{number:02d}" for number in range(8)],
        "fold": ["train"] * 4 + ["test"] * 2 + ["val"] * 2,
    }
)


def train(name, params, store, folder, mlflow_store, split=SPLIT):
    tracking = folder.parent / f"{folder.name}-tracking"
    with training_run(mlflow_store, name, {}, {}, "0" * 32, tracking) as run:
        train_network(name, params, store, split, folder, run)
    return run.run_id


@pytest.mark.parametrize("name", ["unet", "unet3plus"])
def test_training_leaves_network_history_and_run(
    name, tiny_params, tiny_store, tmp_path, mlflow_store
):
    run_id = train(name, tiny_params, tiny_store, tmp_path / name, mlflow_store)
    trained = load_trained(tmp_path / name)
    history = read_history(tmp_path / name / "history.csv")
    assert [row["epoch"] for row in history] == [1, 2]
    best = max(history, key=lambda row: row["val/dice"])
    assert trained.description.epoch == best["epoch"]
    assert trained.description.val_dice == pytest.approx(best["val/dice"], abs=1e-5)
    client = mlflow.MlflowClient(mlflow_store.uri)
    logged = client.get_metric_history(run_id, "train/total")
    assert [metric.step for metric in logged] == [1, 2]
    assert logged[1].value == pytest.approx(history[1]["train/total"], rel=1e-5)
    assert client.get_run(run_id).info.status == "FINISHED"
    pictures = [item.path for item in client.list_artifacts(run_id, "validation")]
    assert pictures == ["validation/epoch-0001.png", "validation/epoch-0002.png"]


def test_same_seed_gives_same_weights(tiny_params, tiny_store, tmp_path, mlflow_store):
    digests = []
    for folder in ("first", "second"):
        train("unet3plus", tiny_params, tiny_store, tmp_path / folder, mlflow_store)
        digests.append(file_sha256(tmp_path / folder / WEIGHTS_NAME))
    assert digests[0] == digests[1]


def test_training_lowers_the_loss(tiny_params, tiny_store, tmp_path, mlflow_store):
    longer = tiny_params.model_copy(
        update={"train": tiny_params.train.model_copy(update={"num_epochs": 5})}
    )
    train("unet", longer, tiny_store, tmp_path, mlflow_store)
    losses = [row["train/total"] for row in read_history(tmp_path / "history.csv")]
    assert losses[-1] < 0.9 * losses[0]


def test_test_cases_are_never_read(tiny_params, tiny_store, tmp_path, mlflow_store, monkeypatch):
    loaded = []
    load = type(tiny_store).load
    monkeypatch.setattr(
        type(tiny_store), "load", lambda self, case: (loaded.append(case), load(self, case))[1]
    )
    train("unet", tiny_params, tiny_store, tmp_path, mlflow_store)
    assert set(loaded) == set(SPLIT.loc[SPLIT["fold"] != "test", "case"])


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


@pytest.fixture
def learner(tiny_params):
    params = tiny_params
    return OrganLearner(
        build(describe("unet3plus", params)),
        tuple(params.organs),
        params.slice.window_hu,
        params.recipes["unet3plus"].loss_terms,
        params.train,
        steps_per_epoch=10,
        num_val_cases=2,
        min_false_positive_px=2,
        threshold=0.5,
        on_epoch=lambda metrics: None,
    )


def test_loss_that_is_not_finite_stops_training(learner, tiny_store):
    batch = next(iter(load_batches(SliceDataset(tiny_store, ["case_00"]), 4, shuffle=False)))
    with torch.no_grad():
        learner.network.heads[0].bias.fill_(float("nan"))
    with pytest.raises(StageError, match="the loss is nan in epoch 1, step 3; lower train"):
        learner.training_step(batch, 2)


def test_unannotated_organ_gives_no_gradient(learner, tiny_store):
    batch = next(iter(load_batches(SliceDataset(tiny_store, ["case_06"]), 4, shuffle=False)))
    assert batch.annotated_BK.tolist() == [[True, False]] * 4
    learner.training_step(batch, 0).backward()
    for head in learner.network.heads:
        assert head.weight.grad[0].abs().sum() > 0
        assert head.weight.grad[1].abs().sum() == 0


def test_cosine_schedule_ends_at_zero(learner):
    configured = learner.configure_optimizers()
    scheduler = configured["lr_scheduler"]["scheduler"]
    factor = scheduler.lr_lambdas[0]
    assert factor(0) == 1
    assert factor(10) == pytest.approx(0.5)
    assert factor(20) == pytest.approx(0)
    assert factor(25) == pytest.approx(0)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimizer_is_the_one_named(learner, name, kind):
    learner.params = learner.params.model_copy(update={"optimizer": name, "learning_rate": 0.25})
    optimizer = learner.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, kind)
    assert optimizer.defaults["lr"] == 0.25


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
