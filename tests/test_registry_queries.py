"""Listing by the index, comparing, tagging and deleting runs: the folders are the truth and nothing else is touched."""

import json
import os
import shutil
import time

import numpy as np
import polars as pl
import pytest
from test_plots import predictions
from typer.testing import CliRunner

from pluralprefs import registry
from pluralprefs.cli import app
from pluralprefs.metrics import row_nats
from pluralprefs.registry import index
from pluralprefs.registry.index import FILE


def call(*arguments, **options):
    return CliRunner().invoke(app, ["runs", *map(str, arguments)], **options)


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """Asking git takes most of the time of making a run."""
    monkeypatch.setattr("pluralprefs.registry.environment.git_state", lambda: None)


def many(root, count=3):
    """Finished runs that are old enough to be kept in the index."""
    runs = []
    for number in range(count):
        with registry.create(root, (f"m{number}", "d"), {}, seeds=[number]) as run:
            run.summarise({"accuracy": 0.5 + number / 10, f"own_{number}": 1.0})
        runs.append(run)
    return runs


@pytest.fixture
def settled(monkeypatch):
    """Files of any age are kept in the index."""
    monkeypatch.setattr(index, "SETTLED", -(10**15))


def listed_afresh(root):
    (root / FILE).unlink(missing_ok=True)
    return registry.list_runs(root)


def test_an_index_that_is_stale_broken_or_gone_gives_the_same_answer(tmp_path, settled):
    first, second, third = many(tmp_path)
    expected = registry.list_runs(tmp_path)
    assert (tmp_path / FILE).exists()
    assert registry.list_runs(tmp_path).equals(expected)
    assert listed_afresh(tmp_path).equals(expected)
    (tmp_path / FILE).write_bytes(b"PAR1 torn")
    assert registry.list_runs(tmp_path).equals(expected)
    pl.DataFrame({"run": ["x"]}).write_parquet(tmp_path / FILE)  # of another version
    assert registry.list_runs(tmp_path).equals(expected)

    first.summarise({"accuracy": 0.99})  # changed, deleted, labelled, broken and new runs
    shutil.rmtree(second.path)
    registry.tag(third.path, ["paper"])
    many(tmp_path, 1)
    stale = registry.list_runs(tmp_path)
    assert stale.filter(run=first.name)["accuracy"].item() == 0.99
    assert second.name not in stale["run"]
    assert stale.filter(run=third.name)["tags"].to_list() == [["paper"]]
    assert stale.equals(listed_afresh(tmp_path))
    assert registry.list_runs(tmp_path, "tags=paper")["run"].to_list() == [third.name]
    (third.path / "run.json").write_text("{")
    assert registry.list_runs(tmp_path).filter(run=third.name)["status"].item() == "unreadable"


def test_runs_are_listed_from_the_index_and_not_read_again(tmp_path, settled, monkeypatch):
    many(tmp_path)
    expected = registry.list_runs(tmp_path)
    monkeypatch.setattr(index, "read_run", None)  # whoever reads a run.json now fails
    assert registry.list_runs(tmp_path).equals(expected)


def test_a_change_of_the_same_size_and_time_is_seen(tmp_path, settled):
    [run] = many(tmp_path, 1)
    assert registry.list_runs(tmp_path)["model"].item() == "m0"
    file = run.path / "run.json"
    before = file.stat()
    file.write_text(file.read_text().replace('"m0"', '"m9"'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert registry.list_runs(tmp_path)["model"].item() == "m9"


def test_a_young_file_is_not_kept_and_a_running_run_is_asked_anew(tmp_path, monkeypatch):
    run = registry.create(tmp_path, "m", {})
    assert registry.list_runs(tmp_path)["status"].item() == "running"
    assert not (tmp_path / FILE).exists()
    monkeypatch.setattr(index, "SETTLED", -(10**15))
    registry.list_runs(tmp_path)
    assert len(pl.read_parquet(tmp_path / FILE)) == 1
    monkeypatch.setattr("pluralprefs.registry.folder.process_is_gone", lambda process: process["pid"] == os.getpid())
    assert registry.list_runs(tmp_path)["status"].item() == "interrupted"
    assert "run.json" in {path.name for path in run.path.iterdir()}


def test_a_folder_that_may_not_be_looked_into_hides_no_other(tmp_path, settled, monkeypatch):
    one, shut = many(tmp_path, 2)
    look, read = os.stat, index.read_run

    def stat(file, **options):
        if str(file).startswith(f"{shut.path}{os.sep}"):
            raise PermissionError(13, "Permission denied", str(file))
        return look(file, **options)

    def read_run(path):
        if str(path) == str(shut.path):
            raise registry.RegistryError(f"{path}: unreadable (PermissionError)")
        return read(path)

    monkeypatch.setattr(index.os, "stat", stat)
    monkeypatch.setattr(index, "read_run", read_run)
    for _ in range(2):
        found = dict(registry.list_runs(tmp_path).select("run", "status").iter_rows())
        assert found == {one.name: "done", shut.name: "unreadable"}


def test_a_root_that_is_copied_or_cannot_be_written_is_listed(tmp_path, settled, monkeypatch):
    many(tmp_path / "here")
    expected = registry.list_runs(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    path = pl.exclude("path")
    assert registry.list_runs(tmp_path / "there").select(path).equals(expected.select(path))

    def refuse(*_):
        raise PermissionError("read-only")

    (tmp_path / "there" / FILE).unlink()
    monkeypatch.setattr(index, "write_parquet", refuse)
    assert registry.list_runs(tmp_path / "there").select(path).equals(expected.select(path))


def test_reindex_counts_the_runs(tmp_path, settled):
    many(tmp_path)
    assert call("reindex", "--root", tmp_path).output == "3 runs\n"
    assert len(pl.read_parquet(tmp_path / FILE)) == 3


# Labels ---------------------------------------------------------------------------------------------------------------


def test_labels_are_kept_beside_run_json_and_redacted(tmp_path):
    [run] = many(tmp_path, 1)
    before = (run.path / "run.json").read_bytes()
    assert call("tag", run.name, "--root", tmp_path, "--add", "b", "--add", "a").output == "a, b\n"
    assert call("tag", run.name[-4:], "--root", tmp_path, "--remove", "b", "--remove", "c").output == "a\n"
    assert call("note", run.path, "key is hf_abcdefghijklmnop", "--root", tmp_path).exit_code == 0
    assert registry.read_labels(run.path) == {"tags": ["a"], "note": "key is [redacted]"}
    assert (run.path / "run.json").read_bytes() == before
    assert "a" in call("--root", tmp_path).output
    registry.note(run.path, "")
    assert registry.read_labels(run.path)["note"] is None


@pytest.mark.parametrize("name", ["", "a,b", "a\nb", "x" * 61])
def test_a_tag_is_a_short_text(tmp_path, name):
    [run] = many(tmp_path, 1)
    with pytest.raises(registry.RegistryError, match="1 to 60 characters"):
        registry.tag(run.path, [name])


@pytest.mark.parametrize("content", ["{", "[]", '{"tags": "paper", "note": null}', '{"tags": [], "note": 3}'])
def test_broken_labels_are_an_error_that_names_the_file(tmp_path, content):
    [run] = many(tmp_path, 1)
    (run.path / "labels.json").write_text(content)
    with pytest.raises(registry.RegistryError, match=r"labels\.json.*delete it"):
        registry.read_labels(run.path)
    assert "labels.json" in registry.list_runs(tmp_path)["error"].item()


# Comparing ------------------------------------------------------------------------------------------------------------


def run_with(root, model, rows):
    with registry.create(root, (model, "d"), {}) as run:
        run.write_predictions(rows.with_columns(model=pl.lit(model)))
    return run


def test_two_runs_are_compared_on_the_rows_they_share(tmp_path):
    rows = predictions(400).with_columns(seed=pl.lit(0, pl.Int64))
    worse = rows.with_columns(log_odds=0.3 * pl.col("log_odds") - 0.2)
    a = run_with(tmp_path, "good", pl.concat([rows, rows.head(9).with_columns(control=pl.lit("wrong_user"))])[5:])
    b = run_with(tmp_path, "flat", worse.head(390))
    found = registry.compare_runs(a, b)
    assert found["metric"].to_list() == ["accuracy", "nll"]
    shared, nll = slice(5, 390), found.row(1, named=True)
    nats = [row_nats(part["log_odds"].to_numpy()[shared], part["target"].to_numpy()[shared]) for part in (rows, worse)]
    assert nll["difference"] == pytest.approx((nats[0] - nats[1]).mean())
    assert (nll["a"], nll["b"]) == (pytest.approx(nats[0].mean()), pytest.approx(nats[1].mean()))
    assert (nll["judgements"], nll["only_a"], nll["only_b"], nll["users"]) == (385, 10, 5, 20)
    by_user = pl.DataFrame({"u": rows["user_id"][shared], "d": nats[0] - nats[1]}).group_by("u").agg(pl.mean("d"))
    error = by_user["d"].std() / np.sqrt(20)  # users judged alike often: the textbook interval is near
    assert (nll["ci_high"] - nll["ci_low"]) / 2 == pytest.approx(1.96 * error, rel=0.2)
    swapped = registry.compare_runs(b, a).row(1, named=True)
    assert swapped["difference"] == pytest.approx(-nll["difference"])
    text = call("compare", a.name, b.path, "--root", tmp_path).output
    assert "NLL, nats" in text
    assert "only one of the two" in text


def test_runs_that_share_nothing_or_disagree_are_refused(tmp_path):
    rows = predictions(40)
    a = run_with(tmp_path, "a", rows)
    other = run_with(tmp_path, "b", rows.with_columns(example_id=pl.col("example_id") + "!"))
    with pytest.raises(registry.RegistryError, match="no judgement is predicted by both"):
        registry.compare_runs(a, other)
    with pytest.raises(ValueError, match="disagree about its target"):
        registry.compare_runs(a, run_with(tmp_path, "c", rows.with_columns(target=1 - pl.col("target"))))
    with pytest.raises(registry.RegistryError, match="none of model 'd'"):
        registry.compare_runs(a, run_with(tmp_path, "d", rows.head(0)))


# Deleting -------------------------------------------------------------------------------------------------------------


def test_prune_asks_and_deletes_what_has_ended(tmp_path):
    root = tmp_path / "runs"
    first, second, _ = many(root)
    running = registry.create(root, "m", {})
    assert "nothing deleted" in call("prune", first.name, "--root", root, input="n\n").output
    assert first.path.exists()
    done = call("prune", "--where", "accuracy<0.65", "--root", root, "--yes")
    assert done.output.endswith("2 deleted\n"), done.output
    assert not first.path.exists()
    assert not second.path.exists()
    broken = registry.create(root, "m", {})
    (broken.path / "run.json").write_text("{")
    said = call("prune", "--where", "run!=x", "--root", root, input="n\n").stderr
    assert "1 running, left alone" in said
    assert "1 unreadable, left alone" in said
    assert call("prune", "--where", "run!=x", "--root", root, "--yes").exit_code == 0
    assert {path.name for path in root.iterdir() if not path.name.startswith(".")} == {running.name, broken.name}


def test_prune_never_leaves_the_root_nor_a_half(tmp_path):
    root = tmp_path / "runs"
    kept, *_ = many(tmp_path / "elsewhere", 1)
    mine, *_ = many(root, 1)
    running = registry.create(root, "m", {})
    (root / "link").symlink_to(kept.path)
    (root / "folder").mkdir()
    for name in (f"../elsewhere/{kept.name}", str(kept.path), "..", ".", "", "link", "folder", running.name, "none"):
        with pytest.raises(registry.RegistryError):
            registry.prune(root, [mine.name, name])
    assert kept.path.exists()
    assert mine.path.exists()
    assert running.path.exists()
    assert call("prune", "../elsewhere", "--root", root, "--yes").exit_code == 2
    assert call("prune", "--root", root).exit_code == 2


# Listing on the command line ------------------------------------------------------------------------------------------


def test_listing_sorts_and_chooses_columns(tmp_path):
    runs = many(tmp_path)
    registry.create(tmp_path, ("late", "d"), {})
    done = call("--root", tmp_path, "--sort=-accuracy", "--columns", "run,accuracy,seeds", "--json")
    rows = [json.loads(line) for line in done.output.splitlines()]
    assert [row["accuracy"] for row in rows] == [0.7, 0.6, 0.5, None]
    assert list(rows[0]) == ["run", "accuracy", "seeds"]
    assert rows[0]["run"] == runs[2].name
    assert "did you mean accuracy" in call("--root", tmp_path, "--sort", "acuracy").stderr
    assert "git_commit" in call("--root", tmp_path, "--columns", "all").output
    assert "behind the command" in call("--root", tmp_path, "show", runs[0].name).stderr


def test_show_says_how_a_run_ended(tmp_path):
    run = registry.create(tmp_path, ("m", "d"), {"rank": 3}, seeds=[4], data_fingerprint="ab12")
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError("no users")
    text = call("show", run.name, "--root", tmp_path).output
    for part in ("failed", "ZeroDivisionError: no users", "ab12", "peak memory", "MiB", "polars"):
        assert part in text
    assert json.loads(call("show", run.path, "--json").output)["experiment"] == {"rank": 3}


def test_a_run_is_found_by_a_part_of_its_name(tmp_path, monkeypatch):
    one, *_ = many(tmp_path, 2)
    assert registry.find_run("-m0-", tmp_path).path == one.path
    monkeypatch.chdir(one.path)
    assert registry.find_run(".").name == one.name
    for text, message in (("-d-", "2 runs"), ("nothing", "no run in"), ("../x", "no run in")):
        with pytest.raises(registry.RegistryError, match=message):
            registry.find_run(text, tmp_path)


def test_listing_many_runs_by_the_index_reads_no_run(tmp_path, settled):
    text = (registry.create(tmp_path, ("m", "d"), {"sizes": list(range(200))}).path / "run.json").read_text()
    for number in range(300):
        (tmp_path / f"run-{number:03d}").mkdir()
        (tmp_path / f"run-{number:03d}" / "run.json").write_text(text.replace('"running"', '"done"'))

    def seconds():
        started = time.process_time()
        assert len(registry.list_runs(tmp_path)) == 301
        return time.process_time() - started

    cold = seconds()
    assert min(seconds() for _ in range(3)) < cold
