"""An offline mirror, read back from its file, holds every row once, and nothing that stays at home."""

import json
import shutil
import struct
import zlib
from collections import Counter
from types import SimpleNamespace

import polars as pl
import pytest
from test_plots import metric_rows, predictions
from test_profile_plots import FOUR, weights
from typer.testing import CliRunner

from pluralprefs import cli, registry
from pluralprefs.cli import app
from pluralprefs.registry import wandb_mirror
from pluralprefs.registry.wandb_mirror import calibration_rows, config, group, history, metric_name
from pluralprefs.wandb_cli import after, chosen

BLOCK, HEADER = 32768, 7  # of LevelDB's log format, in which wandb writes
EXPERIMENT = {
    "call": "pluralprefs.experiment:Experiment", "prototypes": 4, "api_key": "S3CRET", "seeds": [0, 1],
    "save_users": False, "data": {"path": "/home/ana-of-tests/mine.jsonl"},
}  # fmt: skip


def wandb_records(file):
    """Read the records of a .wandb file by wandb's own message types; every checksum is checked."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block is padding
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + HEADER : position + HEADER + length]
        assert checksum == zlib.crc32(part, zlib.crc32(bytes([kind])))
        parts = [*parts, part] if kind in (3, 4) else [part]
        position += HEADER + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))


def read_back(run):
    """The logged steps, the configuration, the summary and the artefacts of the one offline mirror of a run."""
    [folder] = (run.path / "wandb").glob("offline-run-*")
    [file] = folder.glob("*.wandb")
    steps, settings, summary, artefacts = [], {}, {}, {}
    for record in wandb_records(file):
        log = record.request.log_artifact
        for artefact in (record.artifact, log.artifact):
            if artefact.name:
                artefacts[artefact.name] = [entry.path for entry in artefact.manifest.contents]
        items = [(item.key or "/".join(item.nested_key), json.loads(item.value_json)) for item in record.history.item]
        if items:
            steps.append(dict(items))
        settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        summary |= {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
        if record.HasField("run"):
            settings |= {"its group": record.run.run_group, "its host": record.run.host}
    return folder, steps, settings, summary, artefacts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a model `m` with a baseline, controls, communities, profiles and losses."""
    root = tmp_path_factory.mktemp("mirror") / "runs"
    with registry.create(root, ("m", "d"), EXPERIMENT, seeds=[0, 1], data_fingerprint="ab12") as made:
        rows = pl.concat([metric_rows(["m", "length only"], shots=(None, 0, 2)), metric_rows(["m"]).with_columns(
            community=pl.lit("nurses"), metric=pl.lit("worst_community_accuracy"))])  # fmt: skip
        made.append_metrics(rows)
        made.write_predictions(predictions(200))
        made.write_table("attribute_weights", weights(FOUR))
        made.write_table("training", pl.DataFrame({"seed": [0] * 3, "training": [1] * 3, "epoch": [1, 2, 3],
                                                   "loss": [0.7, 0.6, 0.5]}))  # fmt: skip
        made.summarise({"accuracy": 0.75})
        (made.path / "params").mkdir()
        (made.path / "params" / "shared").write_text("parameters")
        (made.path / "vocabulary.json").write_text('{"users": []}')
    registry.tag(made.path, ["paper"])
    return made


def test_an_offline_mirror_holds_every_row_once(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("socket.gethostname", lambda: "h0st-of-tests")
    for variable in wandb_mirror.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for _ in range(2):  # a second push takes the place of the first
        done = CliRunner().invoke(app, ["wandb", "push", run.name, "--root", str(run.path.parent), "--mode", "offline"])
        assert done.exit_code == 0, done.output
    assert not list(tmp_path.iterdir()), "nothing in the home directory"
    folder, steps, settings, summary, artefacts = read_back(run)
    expected = Counter()
    for row in run.table("metrics").iter_rows(named=True):
        expected[metric_name(row, "m"), row["shots"], row["value"], row["ci_low"], row["users"]] += 1
    names = {name for name, *_ in expected}
    found = Counter(
        (name, step.get("shots"), step[name], step[f"{name}/ci_low"], step[f"{name}/users"])
        for step in steps
        for name in names & step.keys()
    )
    assert found == expected
    assert set(expected.values()) == {1}
    assert [(step["epoch"], step["training/seed-0/01"]) for step in steps if "epoch" in step] == [
        (1, 0.7), (2, 0.6), (3, 0.5)
    ]  # fmt: skip
    assert [step["_step"] for step in steps] == list(range(1, len(steps) + 1))
    assert summary["accuracy"] == 0.75
    assert summary["status"] == "done"
    assert artefacts[f"params-{run.name}"] == ["params/shared"]

    assert settings["experiment"]["prototypes"] == 4
    assert settings["data_fingerprint"] == "ab12"
    assert settings["its group"] == group(run.read())
    assert settings["its host"] == "hidden"
    assert settings["experiment"]["data"] == {"path": "mine.jsonl"}
    for name in ("metrics", "attribute"):
        [path] = [path for path in folder.rglob("*.table.json") if path.name.startswith(name)]
        table = run.table("metrics" if name == "metrics" else "attribute_weights")
        assert len(json.loads(path.read_text())["data"]) == len(table)
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for secret in (b"S3CRET", b"h0st-of-tests", b"ana-of-tests"):
        assert secret not in everything
    assert b'"u1"' not in everything, "no user ids"
    assert b"example_id" not in everything


@pytest.mark.parametrize("reinit", ["default", "create_new"])
def test_a_run_that_the_caller_has_open_goes_on(reinit, run, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    own = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(reinit=reinit, console="off"))
    active = wandb.run
    wandb_mirror.mirror(run, "offline")
    assert wandb.run is active
    own.log({"loss of the caller": 1.0})
    own.finish()
    wandb.teardown()
    names = [name for step in read_back(run)[1] for name in step]
    assert "training/seed-0/01" in names
    assert "loss of the caller" not in names
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    kept = [item.key or item.nested_key[0] for record in wandb_records(file) for item in record.history.item]
    assert "loss of the caller" in kept
    assert not {"training/seed-0/01", "tables/metrics"} & set(kept)


def test_a_replay_goes_on_after_what_the_server_has(run, monkeypatch):
    """With a fake server: steps before the one that a resumed run stands at are not sent again."""
    import wandb

    logged, asked, server = [], {}, {}

    def init(**options):
        asked.update(options)
        nothing = lambda *_, **__: None  # noqa: E731
        return SimpleNamespace(
            step=server["step"], dir="x/files", url="https://page", summary={}, define_metric=nothing, finish=nothing,
            log_artifact=nothing, log=lambda values, step: logged.append((step, values)),
        )  # fmt: skip

    monkeypatch.setattr(wandb, "init", init)
    whole = len(list(history(run, "m"))) + 1
    for start, expected in ((0, whole), (4, whole - 3), (whole, 1), (whole + 1, 0)):
        logged.clear()
        server["step"] = start
        assert wandb_mirror.mirror(run, "online") == "https://page"
        assert [step for step, _ in logged] == list(range(whole + 1 - expected, whole + 1))
    assert (asked["id"], asked["resume"], asked["tags"]) == (run.name, "allow", ["paper"])


@pytest.mark.parametrize(
    ("held", "file", "text"),
    [
        (False, None, ""),
        (True, "support-0.safetensors", ""),
        (True, "vocabulary.json", '{"users": ["u1"]}'),
        (True, "vocabulary.json", "{}"),
        (True, "vocabulary.json", None),
        (True, "run.json", '"save_users": true'),
        (True, "run.json", '"saved": false'),
    ],
)
def test_parameters_that_may_hold_users_stay_unless_asked_for(held, file, text, run, tmp_path):
    shutil.copytree(run.path, tmp_path / run.name, ignore=shutil.ignore_patterns("wandb"))
    copy, sent = registry.open_run(tmp_path / run.name), []
    if file == "run.json":
        text = (copy.path / file).read_text("utf8").replace('"save_users": false', text)
    if text is None:
        (copy.path / file).unlink()
    elif file:
        (copy.path / file).write_text(text)
    fake = SimpleNamespace(log_artifact=sent.append)
    wandb_mirror._send_parameters(fake, copy, {}, with_users=False)
    assert len(sent) == (not held)
    wandb_mirror._send_parameters(fake, copy, {}, with_users=True)
    assert [list(artefact.manifest.entries) for artefact in sent] == [["params/shared"]] * (2 - held)


def test_runs_that_differ_in_seeds_share_a_group_and_secrets_stay():
    content = {"model": "m", "data": "d", "experiment": EXPERIMENT, "argv": ["--x"], "process": {"host": "h"}}
    other_seeds = content | {"experiment": EXPERIMENT | {"seeds": [7]}}
    other_model = content | {"experiment": EXPERIMENT | {"prototypes": 8}}
    assert group(content) == group(other_seeds) != group(other_model)
    assert config(content)["experiment"]["api_key"] == "[redacted]"
    assert not {"argv", "process", "host"} & config(content).keys()


def test_calibration_adds_up_to_the_predictions():
    rows = predictions(300)
    found = calibration_rows(pl.concat([rows, rows.with_columns(model=pl.lit("other"))]), "m")
    assert found["rows"].sum() == 300
    won = (rows["target"].to_numpy() == (rows["log_odds"].to_numpy() > 0)).mean()
    assert (found["won"] * found["rows"]).sum() / 300 == pytest.approx(won)
    assert found["sure"].is_between(0.5, 1).all()


def test_a_running_run_and_a_wrong_mode_are_refused(tmp_path, run):
    with pytest.raises(registry.RegistryError, match="when it has ended"):
        wandb_mirror.mirror(registry.create(tmp_path, "m", {}))
    with pytest.raises(registry.RegistryError, match="online or offline"):
        wandb_mirror.mirror(run, "on")
    with pytest.raises(ZeroDivisionError), registry.create(tmp_path, "m", {}) as failed:
        raise ZeroDivisionError
    with pytest.raises(registry.RegistryError, match="is failed, and what is sent cannot be taken back"):
        wandb_mirror.mirror(failed, "online")


def test_the_mode_is_asked_for_or_offline_and_online_needs_a_login(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PLURALPREFS_WANDB")
    assert chosen(None) == "offline"
    monkeypatch.setenv("PLURALPREFS_WANDB", "off")
    assert (chosen(None), chosen("online")) == ("off", "online")
    monkeypatch.setenv("PLURALPREFS_WANDB", "online")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (chosen(None), chosen("offline")) == ("off", "offline")
    with pytest.raises(ValueError, match="--wandb 'on': one of online, offline, off"):
        chosen("on")
    for variable in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_mirror.logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_mirror.logged_in()


def test_results_are_printed_before_the_mirror_and_the_folder_last(run, monkeypatch, capsys):
    monkeypatch.setattr(cli, "after", lambda folder, mode: print(f"mirrored {mode}"))
    cli._finish(run, "offline")
    *table, mirrored, last = capsys.readouterr().out.splitlines()
    assert any("length only" in line for line in table)
    assert (mirrored, last) == ("mirrored offline", str(run.path))


def test_a_mirror_that_fails_is_a_warning_and_off_does_nothing(run, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no\nserver")

    monkeypatch.setattr(wandb_mirror, "mirror", fail)
    after(run, "off")
    assert not capsys.readouterr().err
    after(run, "offline")
    assert f"not mirrored (no server); the run is whole, `pluralprefs wandb push {run.name}`" in capsys.readouterr().err
