"""Trackers, with stand-ins for their packages: which calls they get, and what is said when one is absent."""

import importlib
import json
import sys
from types import ModuleType
from unittest.mock import Mock, call

import pytest

from confu.training.track import open_tracker

REPORT = {"step": 10, "loss": 2.5, "kl": [1.0, 2.0], "accuracy": [0.5, 0.25], "tokens_per_second": 300.0}
EVALUATION = {"step": 10, "tau": 2.0, "chain_tau": None, "acceptance": [0.6, None]}
SPREAD = {"loss": 2.5, "kl/1": 1.0, "kl/2": 2.0, "accuracy/1": 0.5, "accuracy/2": 0.25, "tokens_per_second": 300.0}


def stand_in(monkeypatch, name: str, **members: Mock) -> ModuleType:
    module = ModuleType(name)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_hosted_trackers_get_flat_rows(monkeypatch, tmp_path, capsys, name):
    calls = Mock()
    calls.init.side_effect = lambda **_: sys.stdout.write("run created\n")
    calls.finish.side_effect = lambda: sys.stdout.write("run finished\n")
    stand_in(monkeypatch, name, init=calls.init, log=calls.log, finish=calls.finish)
    tracker = open_tracker(name, tmp_path / "my-run", {"lr": 1e-3})
    tracker.log(10, REPORT)
    tracker.log(10, EVALUATION)
    tracker.close()
    assert calls.mock_calls == [
        call.init(project="confu", name="my-run", config={"lr": 1e-3}),
        call.log(SPREAD, step=10),
        call.log({"tau": 2.0, "acceptance/1": 0.6}, step=10),
        call.finish(),
    ]
    assert capsys.readouterr() == ("", "run created\nrun finished\n")


def test_tensorboard_writes_into_the_run_folder(monkeypatch, tmp_path):
    writer = Mock()
    stand_in(monkeypatch, "tensorboard")
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=writer)
    tracker = open_tracker("tensorboard", tmp_path / "my-run", {"lr": 1e-3})
    tracker.log(10, REPORT)
    tracker.close()
    writer.assert_called_once_with(str(tmp_path / "my-run" / "tensorboard"))
    (config, *scalars, closing) = writer.return_value.mock_calls
    assert config.args[0] == "config"
    assert json.loads(config.args[1].strip("`\n").removeprefix("json")) == {"lr": 1e-3}
    assert scalars == [call.add_scalar(key, value, 10) for key, value in SPREAD.items()]
    assert closing == call.close()


def test_without_a_tracker_nothing_is_imported(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib, "import_module", Mock(side_effect=AssertionError))
    tracker = open_tracker(None, tmp_path, {})
    tracker.log(10, REPORT)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_absent_package_is_named_with_its_remedy(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)  # import fails as if it were not installed
    with pytest.raises(ValueError, match=f"^Tracking with {name} needs its package; run `pip install {name}`.$"):
        open_tracker(name, tmp_path, {})


def test_a_broken_package_is_not_called_absent(monkeypatch, tmp_path):
    error = ModuleNotFoundError("No module named 'protobuf'", name="protobuf")
    monkeypatch.setattr(importlib, "import_module", Mock(side_effect=error))
    with pytest.raises(ModuleNotFoundError, match="protobuf"):
        open_tracker("wandb", tmp_path, {})


def test_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="track is 'mlflow'; give trackio, wandb or tensorboard."):
        open_tracker("mlflow", tmp_path, {})
