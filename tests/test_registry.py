"""Run folders survive kills, strange names and broken files; listing and loading read them back."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time

import numpy as np
import polars as pl
import pytest

from pluralprefs import registry
from pluralprefs.registry import environment, files


def run_json(run):
    return json.loads((run.path / "run.json").read_text())


def child(code, *arguments):
    """Start a Python process that runs `code` with `registry` imported."""
    text = "import sys, os, time, signal\nfrom pluralprefs import registry\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", text, *map(str, arguments)], stderr=subprocess.DEVNULL)


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_a_finished_run_holds_what_is_needed_to_repeat_it(tmp_path):
    described = {"call": "pluralprefs.models.ideal_point:IdealPoint.init", "prototypes": 4}
    run = registry.create(
        tmp_path, ("ideal_point", "ukp"), described, seeds=(0, 1), devices=["cpu:0"], data_fingerprint="ab12"
    )
    assert run.status == "running"
    with run:
        run.summarise({"accuracy": 0.75})
    content = run_json(run)
    assert content["status"] == "done"
    assert content["experiment"] == described
    assert (content["seeds"], content["devices"], content["data_fingerprint"]) == ([0, 1], ["cpu:0"], "ab12")
    assert content["packages"]["polars"] == pl.__version__
    assert content["wall_seconds"] >= 0
    assert content["peak_memory_bytes"] > 10_000_000
    assert content["summary"] == {"accuracy": 0.75}
    stamp, _, rest = run.name.partition("-ideal_point-ukp-")
    assert len(stamp) == len("2026-11-21T10-32-05")
    assert len(rest) == 4


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "ключ", "x" * 500, "a\nb", "CON:|*?"])
def test_strange_names_never_become_paths(tmp_path, name):
    root = tmp_path / "runs"
    run = registry.create(root, (name, name), {})
    assert run.path.parent == root
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]
    assert set(run.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
    assert len(run.name) < 120
    assert registry.list_runs(root)["model"].to_list() == [name]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "Weights", "x.parquet", "a b", "é"])
def test_table_names_are_plain_words(tmp_path, name):
    run = registry.create(tmp_path, "m", {})
    with pytest.raises(registry.RegistryError, match="table name"):
        run.write_table(name, pl.DataFrame({"a": [1]}))
    with pytest.raises(registry.RegistryError, match="table name"):
        registry.load_table(tmp_path, name)


def test_runs_made_in_the_same_second_have_folders_of_their_own(tmp_path):
    assert len({registry.create(tmp_path, "m", {}).path for _ in range(30)}) == 30


def test_an_exception_marks_the_run_failed_with_one_line(tmp_path):
    run = registry.create(tmp_path, "m", {})
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError("no\nusers, token hf_abcdefghijklmnop")
    assert run.status == "failed"
    assert run_json(run)["error"] == "ZeroDivisionError: no users, token [redacted]"


def test_ctrl_c_marks_the_run_interrupted(tmp_path):
    run = registry.create(tmp_path, "m", {})
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    assert run.status == "interrupted"


def test_sigterm_marks_the_run_interrupted_and_keeps_its_rows(tmp_path):
    process = child(
        """
        with registry.create(sys.argv[1], "m", {}) as run:
            run.append_metrics([{"metric": "accuracy", "value": 0.5}])
            open(os.path.join(sys.argv[1], "ready"), "w").close()
            time.sleep(60)
        """,
        tmp_path,
    )
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    listed = registry.list_runs(tmp_path)
    assert listed.select("status", "error").rows() == [("interrupted", "SIGTERM")]
    assert registry.load_table(tmp_path, "metrics")["value"].to_list() == [0.5]


def test_a_run_killed_outright_is_listed_as_interrupted_and_can_be_resumed(tmp_path):
    process = child(
        """
        with registry.create(sys.argv[1], "m", {}) as run:
            run.append_metrics([{"metric": "accuracy", "value": 0.5}])
            open(os.path.join(sys.argv[1], "ready"), "w").close()
            time.sleep(60)
        """,
        tmp_path,
    )
    wait_for(tmp_path / "ready")
    assert registry.list_runs(tmp_path)["status"].to_list() == ["running"]
    run = registry.open_run(registry.list_runs(tmp_path)["path"].item())
    with pytest.raises(registry.RegistryError, match="still writing"), run:
        pass
    process.kill()
    process.wait()
    assert registry.list_runs(tmp_path).select("status", "error").rows() == [
        ("interrupted", "the process ended without a word")
    ]
    with run:
        assert run.status == "running"
        run.append_metrics([{"metric": "accuracy", "value": 0.6}])
    assert run.status == "done"
    assert run.table("metrics")["value"].to_list() == [0.5, 0.6]


def test_a_process_number_used_again_does_not_keep_a_run_alive():
    me = environment.this_process()
    assert not environment.process_is_gone(me)
    assert not environment.process_is_gone({**me, "host": "elsewhere", "pid": 2**22 + 1})
    if me["started"] is not None:
        assert environment.process_is_gone({**me, "started": "another boot/1"})


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_append(tmp_path):
    run = registry.create(tmp_path, "m", {})
    run.append_metrics([{"value": 1.0}, {"value": 2.0}])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"value": 3.0, "me')
    assert run.table("metrics")["value"].to_list() == [1.0, 2.0]
    run.append_metrics(pl.DataFrame({"value": [4.0]}))
    assert run.table("metrics")["value"].to_list() == [1.0, 2.0, 4.0]


def test_a_torn_first_line_and_a_long_file_are_handled(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"value": 1')
    files.append_lines(path, [{"text": "x" * 200_000}])
    with path.open("ab") as file:
        file.write(b"y" * 100_000)
    files.append_lines(path, [{"text": "é"}])
    assert [row["text"][:1] for row in files.read_lines(path)] == ["x", "é"]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    run = registry.create(tmp_path, "m", {})
    (run.path / "metrics.jsonl").write_text('{"value": 1}\nnonsense\n{"value": 2}\n')
    with pytest.raises(registry.RegistryError, match=r"metrics\.jsonl, line 2: not JSON"):
        run.table("metrics")


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    run = registry.create(tmp_path, "m", {"rate": np.float32(0.5), "size": np.int64(3)})
    run.append_metrics([{"value": float("nan"), "array": np.arange(2)}])
    assert run_json(run)["experiment"] == {"rate": 0.5, "size": 3}
    assert json.loads((run.path / "metrics.jsonl").read_text()) == {"value": None, "array": [0, 1]}


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    run = registry.create(tmp_path, "m", {})
    run.write_table("weights", pl.DataFrame({"a": [1]}))
    before = (run.path / "run.json").read_bytes()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        run.update(note="x")
    with pytest.raises(OSError, match="disk full"):
        run.write_table("weights", pl.DataFrame({"a": [2]}))
    monkeypatch.undo()
    assert (run.path / "run.json").read_bytes() == before
    assert run.table("weights")["a"].to_list() == [1]
    assert sorted(entry.name for entry in run.path.iterdir()) == ["run.json", "weights.parquet"]


def test_a_kill_during_a_write_never_leaves_half_a_file(tmp_path):
    run = registry.create(tmp_path, "m", {})
    for delay in (0.02, 0.05, 0.09):
        process = child(
            """
            run = registry.open_run(sys.argv[1])
            open(os.path.join(os.path.dirname(sys.argv[1]), "ready" + sys.argv[2]), "w").close()
            while True:
                run.update(note="x" * 300_000)
            """,
            run.path,
            delay,
        )
        wait_for(tmp_path / f"ready{delay}")
        time.sleep(delay)
        process.kill()
        process.wait()
        assert run.read()["model"] == "m"
    assert registry.list_runs(tmp_path)["model"].to_list() == ["m"]


def test_secrets_are_redacted_everywhere(tmp_path):
    argv = ["train", "x.py", "--api-key", "S1", "WANDB_API_KEY=S2", "--password=S3", "--set", "model.max_tokens=5"]
    described = {"teacher": {"apiKey": "S4", "url": "https://me:S5@host/v1"}, "note": "Bearer S6"}
    run = registry.create(tmp_path, "m", described, argv=argv, tags={"auth_token": "S7"})
    text = (run.path / "run.json").read_text()
    for number in range(1, 8):
        assert f"S{number}" not in text
    assert "model.max_tokens=5" in text


def test_a_root_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(registry.RegistryError, match="choose another --root"):
        registry.create(tmp_path / "file", "m", {})
    if os.geteuid() != 0:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(registry.RegistryError, match="choose another --root"):
            registry.create(tmp_path / "runs", "m", {})
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\xff",
        '{"status": 3}',
        '{"status": "done", "git": "x", "seeds": "a", "summary": [1]}',
    ],
)
def test_a_broken_run_json_is_listed_and_never_a_crash(tmp_path, content):
    good = registry.create(tmp_path, "m", {})
    bad = registry.create(tmp_path, "m", {})
    (bad.path / "run.json").write_text(content)
    (tmp_path / "stray").mkdir()
    listed = registry.list_runs(tmp_path)
    found = dict(zip(listed["run"], listed["status"], strict=True))
    assert found[good.name] == "running"
    assert found[bad.name] == ("done" if "done" in content else "unreadable")
    assert len(found) == 2


def test_open_run_wants_a_run_folder(tmp_path):
    with pytest.raises(registry.RegistryError, match="not a run folder"):
        registry.open_run(tmp_path)


def test_tables_of_all_runs_come_as_one_frame(tmp_path):
    for number, table in enumerate([{"mean": [0.1, 0.2]}, {"mean": [1], "note": ["x"]}, None]):
        with registry.create(tmp_path, (f"m{number}", "d"), {}) as run:
            if table:
                run.write_table("attribute_weights", pl.DataFrame(table))
            run.append_metrics([{"metric": "nll", "value": 0.5, "shots": number or None}])
    weights = registry.load_table(tmp_path, "attribute_weights")
    assert weights.columns == ["run", "mean", "note"]
    assert weights["mean"].to_list() == [0.1, 0.2, 1.0]
    assert registry.load_table(tmp_path, "metrics")["shots"].to_list() == [None, 1, 2]
    assert registry.load_table(tmp_path, "attribute_weights", where="model=m1")["note"].to_list() == ["x"]
    with pytest.raises(registry.RegistryError, match="no run has a table 'profiles'"):
        registry.load_table(tmp_path, "profiles")
    assert run.tables() == ["metrics"]
    with pytest.raises(registry.RegistryError, match="it has metrics"):
        run.table("attribute_weights")


def test_a_broken_table_is_an_error_that_names_the_file(tmp_path):
    run = registry.create(tmp_path, "m", {})
    (run.path / "predictions.parquet").write_text("torn")
    with pytest.raises(registry.RegistryError, match=r"predictions\.parquet: unreadable"):
        registry.load_table(tmp_path, "predictions")


def test_a_copied_root_gives_the_same_answers(tmp_path):
    with registry.create(tmp_path / "here", ("m", "d"), {}) as run:
        run.append_metrics([{"metric": "nll", "value": 0.5}])
    (tmp_path / "here").rename(tmp_path / "there")
    assert registry.list_runs(tmp_path / "there")["run"].to_list() == [run.name]
    assert registry.load_table(tmp_path / "there", "metrics")["value"].to_list() == [0.5]


def test_user_states_are_written_whole_with_their_metadata(tmp_path):
    run = registry.create(tmp_path, "m", {})
    arrays = {"mean": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    run.write_users(arrays, {"users": '["a", "б"]'})
    read, metadata = run.read_users()
    assert np.array_equal(read["mean"], arrays["mean"])
    assert metadata == {"users": '["a", "б"]'}
    (run.path / "users.safetensors").write_bytes(b"torn")
    with pytest.raises(registry.RegistryError, match="not a readable safetensors file"):
        run.read_users()
    with pytest.raises(registry.RegistryError, match="no such file"):
        registry.load_arrays(tmp_path / "none.safetensors")


@pytest.fixture
def runs():
    return pl.DataFrame(
        {
            "run": ["a", "b", "c"],
            "model": ["ideal_point", "low rank", None],
            "status": ["done", "failed", "done"],
            "accuracy": [0.8, 0.6, None],
            "git_dirty": [True, False, None],
            "seeds": [[0, 1], [2], None],
        }
    )


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("model=ideal_point and status=done and accuracy>0.7", ["a"]),
        ("model = 'low rank'", ["b"]),
        ("model!=ideal_point", ["b", "c"]),
        ("model~ideal", ["a"]),
        ("accuracy<=8e-1 AND run>=b", ["b"]),
        ("git_dirty=false", ["b"]),
        ("seeds=1", ["a"]),
        ("seeds!=1", ["b", "c"]),
        ("status==done", ["a", "c"]),
        ("run=__import__('os')", []),
    ],
)
def test_where_chooses_runs(runs, where, expected):
    if "__import__" in where:
        with pytest.raises(registry.RegistryError):
            registry.parse_where(where, runs.schema)
        return
    assert runs.filter(registry.parse_where(where, runs.schema))["run"].to_list() == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("modle=x", "did you mean model"),
        ("accuracy>high", "accuracy is a number"),
        ("git_dirty=yes", "true or false"),
        ("seeds>1", "is a list"),
        ("model=a or model=b", "joined by `and`"),
        ("model", "expected COLUMN OPERATOR VALUE"),
        ("", "expected COLUMN OPERATOR VALUE"),
        ("model=a and ", "expected COLUMN OPERATOR VALUE"),
    ],
)
def test_a_where_that_makes_no_sense_is_explained(runs, where, message):
    with pytest.raises(registry.RegistryError, match=message):
        registry.parse_where(where, runs.schema)


def test_listing_filters_on_the_summary(tmp_path):
    for accuracy in (0.6, 0.8):
        with registry.create(tmp_path, ("m", "d"), {}) as run:
            run.summarise({"accuracy": accuracy, "note": None})
    assert registry.list_runs(tmp_path, "accuracy>0.7 and status=done")["run"].to_list() == [run.name]
    assert registry.list_runs(tmp_path / "none").is_empty()


def test_a_thousand_runs_list_within_a_second_of_computing(tmp_path):
    text = (registry.create(tmp_path, ("m", "d"), {"sizes": list(range(300))}).path / "run.json").read_text()
    text = text.replace('"running"', '"done"')
    for number in range(1000):
        (tmp_path / f"run-{number:04d}").mkdir()
        (tmp_path / f"run-{number:04d}" / "run.json").write_text(text)
    started = time.process_time()
    assert len(registry.list_runs(tmp_path, "status=done")) == 1000
    assert time.process_time() - started < 1.0


def test_the_registry_does_not_import_jax():
    code = "import sys, pluralprefs.registry; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
