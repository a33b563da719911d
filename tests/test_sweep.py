"""A sweep runs every combination once, goes on where it stopped, and does not take other data or settings for done."""

from functools import partial

import pytest
from tables import write
from test_plots import metric_rows

from pluralprefs import encoders, launch, registry, sweep
from pluralprefs.data import comparisons
from pluralprefs.describe import DescriptionError, describe
from pluralprefs.experiment import Experiment, fingerprint, prepare
from pluralprefs.models.low_rank import LowRank


@pytest.fixture
def experiment(tmp_path):
    data = write(tmp_path / "data.jsonl", users=4, per_user=6)
    return Experiment(
        data=partial(comparisons.read, str(data)), encoder=partial(encoders.load, "attributes"),
        model=partial(LowRank.init, rank=2), name="m", seeds=(0, 1), split={"seed": 3},
    )  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """What is launched, with folders and results but without the fitting."""
    calls = []

    def finish(folder, experiment, how):
        calls.append((how, experiment.model.keywords["rank"]))
        with folder:
            if experiment.model.keywords["rank"] == 13:
                raise FloatingPointError("the loss is nan")
            folder.append_metrics(metric_rows(["m"]))
        return type("Run", (), {"folder": folder})

    def run(experiment, *, root, table, **_):
        whole = prepare(experiment, table, progress=False).table
        folder = registry.create(root, ("m", "d"), describe(experiment), data_fingerprint=fingerprint(whole))
        return finish(folder, experiment, "run")

    def resume(path, **_):
        folder = registry.open_run(path)
        rank = folder.read()["experiment"]["model"]["rank"]
        return finish(folder, Experiment(data=lambda: None, model=partial(LowRank.init, rank=rank)), "resume")

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "resume", resume)
    monkeypatch.setattr("pluralprefs.registry.environment.git_state", lambda: None)
    return calls


def test_a_sweep_runs_what_is_missing_and_only_that(experiment, launched, tmp_path):
    root, told, ended = tmp_path / "runs", [], []
    note = lambda folder: ended.append((len(launched), folder.path))  # noqa: E731
    first = partial(sweep.sweep, experiment, root=root, tell=told.append, progress=False, ended=note)
    done, failed = first(["model.rank=1,13,2"])
    assert list(done) == ["model.rank=1", "model.rank=2"]
    assert "loss is nan" in failed["model.rank=13"]
    assert launched == [("run", 1), ("run", 13), ("run", 2)]
    assert ended == [(1, done["model.rank=1"].path), (3, done["model.rank=2"].path)], "each before the next begins"
    launched.clear()
    again, _ = first(["model.rank=2,13,4"])
    assert launched == [("resume", 13), ("run", 4)]
    assert ended[2:] == [(2, again["model.rank=4"].path)]
    assert again["model.rank=2"].path == done["model.rank=2"].path
    assert any("done before" in line for line in told)
    text = sweep.sweep_table(again)
    assert "model.rank=4" in text
    assert "60.0 [58.0, 62.0]" in text


@pytest.mark.parametrize("host", ["elsewhere", None])
def test_a_run_that_may_be_running_is_left_alone(host, experiment, launched, tmp_path):
    root, told = tmp_path / "runs", []
    go = partial(sweep.sweep, experiment, ["model.rank=13,2"], root=root, tell=told.append, progress=False)
    go()
    [stopped] = registry.list_runs(root, "status=failed")["path"]
    process = registry.open_run(stopped).read()["process"]
    registry.open_run(stopped).update(status="running", process=process | ({"host": host} if host else {}))
    launched.clear()
    told.clear()
    done, failed = go()
    assert (launched, list(done), failed) == ([], ["model.rank=2"], {})
    [said] = [line for line in told if line.startswith("left alone")]
    assert f"running on {host or process['host']}; if it is dead, `pluralprefs train {stopped} --resume`" in said
    assert registry.open_run(stopped).status == "running"
    with registry.create(root, "m", {}) as newer:  # another that was stopped does not hide it
        newer.update(**{key: registry.open_run(stopped).read()[key] for key in ("experiment", "data_fingerprint")})
    newer.update(status="failed")
    assert (go()[1], launched) == ({}, [])


def test_other_data_or_seeds_are_other_runs(experiment, launched, tmp_path):
    go = partial(sweep.sweep, over=["model.rank=1"], root=tmp_path / "runs", tell=str, progress=False)
    go(experiment)
    write(tmp_path / "data.jsonl", users=4, per_user=6, seed=1)
    go(experiment)
    go(sweep.override(experiment, "seeds=[5]"))
    assert launched == [("run", 1)] * 3


def test_a_wrong_setting_is_refused_before_anything_runs(experiment, launched, tmp_path):
    for over, error, message in (
        (["model.rnk=1,2"], DescriptionError, "rank"),
        (["model.rank"], ValueError, "PATH=VALUE,VALUE"),
        (["model.rank=1,1"], ValueError, "different values"),
        (["model.rank=1,"], ValueError, "PATH=VALUE,VALUE"),
        (["model.rank=1", "model.rank=2"], ValueError, "given twice"),
    ):
        with pytest.raises(error, match=message):
            sweep.sweep(experiment, over, root=tmp_path / "runs", tell=str)
    assert not launched


def test_grids_are_products():
    found = sweep.combinations(["a=1,2", 'b=["x","y"],null'])
    assert found == [("a=1", 'b=["x", "y"]'), ("a=1", "b=null"), ("a=2", 'b=["x", "y"]'), ("a=2", "b=null")]
    assert sweep.combinations([]) == [()]
    texts = ["1,auto", '[1, 2],none,"a,b",null', "x", "1e-3, 2x,{}"]
    expected = [[1, "auto"], [[1, 2], "none", "a,b", None], ["x"], [0.001, "2x", {}]]
    assert [sweep._values(text) for text in texts] == expected
