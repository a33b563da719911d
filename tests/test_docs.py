"""The guides are true: their Python runs, their commands and links exist; the notebooks are executed and tidy."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

import pluralprefs
from pluralprefs.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES if page.parent.name == "docs" and "```python\n" in page.read_text(encoding="utf-8")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST = 300_000  # bytes of a notebook
PROGRAM = typer.main.get_command(app)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page, `language` alone behind the ticks."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.M | re.S)
    return [re.sub(f"^{indent}", "", code, flags=re.M) for indent, code in found]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_python_of_a_guide_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


def commands(page: Path) -> list[str]:
    """The commands on lines of their own, and those named within a sentence."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^ *(?:\.venv/bin/)?(pluralprefs [a-z].*?)(?: {2,}.*| +# .*)?$", text, re.M)
    return lines + re.findall(r"`(?:\.venv/bin/)?(pluralprefs [a-z][^`|]*)`", text)


def unknown_in(command: str) -> str | None:
    """What the command line does not know of a command, or None."""
    here = PROGRAM
    words = shlex.split(command)[1:]
    while words and hasattr(here, "commands") and not words[0].startswith("--"):
        if words[0] not in here.commands:
            return words[0]
        here = here.commands[words.pop(0)]
    known = {option for parameter in here.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return next((word for word in words if word.startswith("--") and word.partition("=")[0] not in known), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_option_on_a_page_exists(page):
    assert {command: unknown_in(command) for command in commands(page) if unknown_in(command)} == {}


def test_the_check_of_commands_finds_what_it_is_for():
    assert unknown_in("pluralprefs fit my.jsonl --model low_rank --set 'users.levels=[\"user\"]'") is None
    assert unknown_in("pluralprefs runs --sort=-accuracy") is None
    assert unknown_in("pluralprefs fit my.jsonl --modle low_rank") == "--modle"
    assert unknown_in("pluralprefs runs prnue") == "prnue"
    assert unknown_in("pluralprefs attributes tain") == "tain"
    assert sum(len(commands(page)) for page in PAGES) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere_and_names_of_the_library_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    for code in [*blocks(page, "python"), *blocks(page, "python no-run")]:
        used = {
            node.attr
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pp"
        }
        assert used <= set(pluralprefs.__all__)


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_executed_tidy_and_small(notebook):
    assert notebook.stat().st_size < MOST
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert len(code) < 20
    assert cells(notebook)[0]["source"][0].startswith(f"# {notebook.stem[:2]} ")
    assert "".join(cells(notebook)[0]["source"]).splitlines()[0].endswith("?"), "a notebook asks one question"
    shown = [cell for cell in code if cell["outputs"]]
    assert len(shown) > len(code) / 2, "executed with its outputs: make notebooks KEEP=1"
    for cell in code:
        assert cell["execution_count"] is None, "make notebooks KEEP=1 takes counts out"
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data"), f"{notebook.name}: {output['output_type']}"
            said = json.dumps({**output, "data": {k: v for k, v in output.get("data", {}).items() if "image" not in k}})
            assert not re.search(r"(?<![\w.])/(?:home|root|tmp|Users|work|usr|var|opt)/", said), "an absolute path"


def test_the_eight_notebooks_are_there_and_most_show_a_figure():
    assert [notebook.stem[:3] for notebook in NOTEBOOKS] == [f"{number:02d}_" for number in range(1, 9)]
    outputs = [[output for cell in cells(notebook) for output in cell.get("outputs", ())] for notebook in NOTEBOOKS]
    drawn = [any("image/png" in output.get("data", {}) for output in found) for found in outputs]
    assert sum(drawn) >= 5
