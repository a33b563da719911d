"""A report is one file that loads nothing, escapes what the data say, and shows the numbers of the tables."""

import base64
import re
from html.parser import HTMLParser

import polars as pl
import pytest
from test_plots import metric_rows, predictions
from test_profile_plots import FOUR, weights
from typer.testing import CliRunner

from pluralprefs import registry, report
from pluralprefs.cli import app

EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Tags with their attributes, and the text of every table field."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fields, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "td"
        if self.inside:
            self.fields.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.fields[-1] += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page about two runs with one name, and about one that failed."""
    root = tmp_path_factory.mktemp("report") / "runs"
    for tag in ("one", EVIL):
        with registry.create(root, ("m", EVIL), {}, seeds=[0]) as run:
            run.append_metrics(metric_rows(["m", "length only"], shots=(None, 0, 2)))
            if tag == EVIL:
                run.write_predictions(predictions(150))
                communities = {EVIL if name == "a" else name: values for name, values in FOUR.items()}
                run.write_table("attribute_weights", weights(communities))
            run.summarise({"accuracy": 0.7543, "nll": float("nan")})
        registry.tag(run.path, [tag])
    broken = registry.create(root, ("n", "d"), {})
    with pytest.raises(ZeroDivisionError), broken:
        raise ZeroDivisionError("no users")
    out = root.parent / "out.html"
    names = registry.list_runs(root)["run"].to_list()
    done = CliRunner().invoke(app, ["report", *names, "--root", str(root), "--html", str(out), "--title", "A & <b>"])
    assert done.exit_code == 0, done.output
    return out.read_text("utf8"), [registry.open_run(root / name) for name in names]


def test_the_page_loads_nothing_and_runs_one_script_of_its_own(page):
    text, _ = page
    parsed = Page(text)
    assert {attrs["src"].partition(",")[0] for attrs in parsed.of("img")} == {"data:image/svg+xml;base64"}
    assert not [attrs for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert all(attrs["href"].startswith("#section-") for attrs in parsed.of("a"))
    assert parsed.of("script") == [{}]
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in parsed.tags}
    [policy] = [attrs["content"] for attrs in parsed.of("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"@import|url\(", text)


def test_what_the_data_say_is_text(page):
    text, _ = page
    assert EVIL not in text
    assert "<h1>A &amp; &lt;b&gt;</h1>" in text
    assert EVIL in Page(text).fields
    pictures = [base64.b64decode(attrs["src"].partition(",")[2]) for attrs in Page(text).of("img")]
    assert len(pictures) == 4, "shots, calibration, heat map, dots"
    assert all(picture.startswith(b"<?xml") and b"<script" not in picture for picture in pictures)


def test_tables_hold_the_numbers_and_can_be_sorted(page):
    text, folders = page
    parsed = Page(text)
    assert "60.0 [58.0, 62.0]" in parsed.fields
    assert "75.4" in parsed.fields
    assert f"m {folders[0].name[-4:]}" in parsed.fields
    assert "failed: ZeroDivisionError: no users" in parsed.fields
    values = [float(attrs["data-value"]) for attrs in parsed.of("td") if "data-value" in attrs]
    assert 60.0 in values
    assert 75.43 in [round(value, 6) for value in values]
    heads = parsed.of("th")
    assert len(parsed.of("button")) == len(heads)
    assert all(attrs["scope"] == "col" for attrs in heads)
    [profile] = [folder.table("attribute_weights") for folder in folders if "attribute_weights" in folder.tables()]
    assert sum(field in ("warmth", "detail", "wit", "order") for field in parsed.fields) == profile.height


def test_the_page_can_be_read_without_a_mouse_or_a_picture(page):
    parsed = Page(page[0])
    assert all(len(attrs["alt"]) > 10 for attrs in parsed.of("img"))
    regions = [attrs for attrs in parsed.of("div") if attrs.get("class") == "wide"]
    assert regions
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in regions)
    targets = {attrs["id"] for _, attrs in parsed.tags if "id" in attrs}
    assert {attrs["href"][1:] for attrs in parsed.of("a")} == targets
    assert any(attrs.get("name") == "viewport" for attrs in parsed.of("meta"))


def test_runs_on_different_data_stand_apart_with_their_own_baselines(tmp_path):
    runs = []
    for data, fingerprint, scale in (("tea", "aaaa1111", 1.0), ("tea", "bbbb2222", 1.1), ("tea", "aaaa1111", 1.2)):
        with registry.create(tmp_path / "runs", ("m", data), {}, data_fingerprint=fingerprint) as run:
            rows = metric_rows(["m", "length only"]).with_columns(pl.col("value", "ci_low", "ci_high") * scale)
            run.append_metrics(rows)
        runs.append(run)
    names = report.labels(runs)
    section = report._results(runs, names)
    assert [table.title for table in section.tables] == [
        "Every model in every cell, on tea aaaa1111", "Every model in every cell, on tea bbbb2222"
    ]  # fmt: skip
    first, second = ([(row[0].text, row[2].text[:4]) for row in table.rows] for table in section.tables)
    assert sorted(first) == sorted([(names[0], "60.0"), (names[2], "72.0"), ("length only", "62.0")])
    assert sorted(second) == sorted([(names[1], "66.0"), ("length only", "68.2")])
    assert "on different data (tea aaaa1111, tea bbbb2222)" in section.notes[0]
    assert report.data_labels(runs[::2]) == ["", ""]
    runs[1].update(data="coffee")
    runs[2].update(data="tea of another file")
    assert report.data_labels(runs) == ["tea", "coffee", "tea"]


def test_what_cannot_be_drawn_is_said(tmp_path):
    with registry.create(tmp_path, ("m", "d"), {}) as run:
        run.append_metrics(metric_rows(["m"]))
        run.write_table("attribute_weights", weights({"a": (0, 1, 2, 3)}))
        run.write_table("training", pl.DataFrame({"loss": [1.0]}))
    report.write_report([run], tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text("utf8")
    assert "Not drawn: preference: each community minus the population" in text
    assert "Not drawn: m: loss by epoch" in text
    with pytest.raises(registry.RegistryError, match="at least one run"):
        report.write_report([], tmp_path / "out.html")
