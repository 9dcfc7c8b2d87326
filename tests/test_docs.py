"""README and docs do what they say: every block runs, links hold, the site builds, the reference is up to date.

A fenced block is one of
    sh       commands, one a line, run in this process from a user's folder
    python   run in the page's own namespace; if it begins with `# NAME.py` it is written to that file instead
    text     output or a layout, to be read
and nothing else, so that no block slips past.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trajrec.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NOT_RUN = {
    "make demo": "tests/cli/test_commands.py runs `trajrec demo`",
    "make test": "that is this",
    "pip install '.[report]'": "the test environment has it installed",
    "trajrec demo": "tests/cli/test_commands.py runs it",
}
# What a page takes for granted: commands run before it.
BEFORE = {
    "docs/commands.md": [
        "trajrec record --out runs/first.h5 train.py --epochs 1",
        *(f"trajrec replay runs/first.h5 --targets each --shard {i}/3 --out piece-{i}" for i in (1, 2, 3)),
    ],
    "docs/format.md": ["trajrec record --out run.h5 train.py --epochs 1"],
}


def blocks(page):
    """(language, text) of every fenced block."""
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


def commands(text):
    """The command lines of a sh block, without comments, each as its words."""
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def files(page):
    """The files that a page tells to write, by name."""
    found = {}
    for language, text in blocks(page):
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", text)):
            found[name[1]] = text
    return found


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder in which a user works, with the files of the tutorial; what is imported from it is forgotten after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRAJREC_KEEP", raising=False)
    for name, text in files("docs/tutorial.md").items():
        (tmp_path / name).write_text(text)
    np.save(tmp_path / "idx.npy", np.arange(5))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def run(words):
    """Runs one command as a shell in the folder would."""
    line = shlex.join(words)
    if line in {shlex.join(shlex.split(known)) for known in NOT_RUN}:
        return
    if words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True, timeout=60)
        return
    assert words[0] == "trajrec", f"the test does not know how to run {line}"
    with pytest.raises(SystemExit) as stopped:
        app(words[1:])
    assert not stopped.value.code, f"{line} ended with exit code {stopped.value.code}"


def run_page(page, names):
    for words in (shlex.split(line) for line in BEFORE.get(page, ())):
        run(words)
    for language, text in blocks(page):
        if language == "sh":
            for words in commands(text):
                run(words)
        elif name := re.match(r"# (\w+\.py)\n", text):
            Path(name[1]).write_text(text)
        elif name := re.match(r"# lines for (\w+\.py)\n", text):
            script = (
                Path("train.py")
                .read_text()
                .replace("def main(epochs, seed):\n", f"{text}\n\ndef main(epochs, seed):\n")
            )
            Path(name[1]).write_text(script)
        elif language == "python":
            exec(compile(text, f"{page}: {text[:40]!r}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("README.md", "docs/reading.md")])
def test_every_block_of_the_docs_runs(page, project):
    run_page(page, {"__name__": page})


def test_every_block_of_the_readme_runs(project):
    """Its second Python block is about the inside of a script: model, optimizer, loader and loop are the reader's."""
    names = {"__name__": "README"}
    exec(
        """
import torch, trajrec
from train import Net, train_set, test_set
from task import task

torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(train_set, batch_size=50)

def train():
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

def my_loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
""",
        names,
    )
    run_page("README.md", names)
    assert names["c"].values.shape == (1000, 1)
    assert list(Path("runs").glob("train-*-clean/keep.npy"))
    assert Path("report.html").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_kind(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert {language for language, _ in blocks(page)} <= {"sh", "python", "text"}
    assert text.count("```") == 2 * len(blocks(page))
    prose = FENCE.sub("", text)
    assert not re.search(r"\n\n {4}\S", prose), "an indented block: give it a fence"


def test_what_is_not_run_is_still_there():
    lines = {
        shlex.join(words) for page in PAGES for kind, text in blocks(page) if kind == "sh" for words in commands(text)
    }
    assert {shlex.join(shlex.split(line)) for line in NOT_RUN} <= lines


def test_the_test_of_a_contribution_comes_out(project, capsys):
    """The blocks of docs/reading.md hold predictions against trainings: there they must agree."""
    run_page("docs/reading.md", {"__name__": "reading"})
    said = capsys.readouterr().out
    found = re.findall(r"predicted ([+-]\S+), happened ([+-]\S+)", said)
    assert len(found) == 5, said
    for predicted, happened in found:
        assert float(predicted) * float(happened) > 0
        assert abs(float(predicted) - float(happened)) < 0.5 * abs(float(happened)), said


def test_the_command_reference_is_up_to_date(capsys, monkeypatch):
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    reference = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    assert page == reference["page"](), "run python docs/make_reference.py"
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert api == reference["api"](), "run python docs/make_reference.py"
    monkeypatch.setenv("COLUMNS", "200")
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    for command, section in sections.items():
        with pytest.raises(SystemExit):
            app([command, "--help"])
        options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
        assert options == set(re.findall(r"--[a-z][a-z-]+", section)), command


def test_the_site_builds_without_a_warning_and_asks_no_other_site(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "build" / "docs"
    for page in PAGES[1:]:
        name = Path(page).stem
        html = (site / "index.html" if name == "index" else site / name / "index.html").read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://", html)
    assert not list(site.rglob("*.py"))


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_the_page_of_measurements_is_what_the_results_say():
    script = ROOT / "benchmarks" / "tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"], timeout=60).returncode == 0


def test_every_test_that_a_page_names_exists():
    """`tests/NAME.py::test_name[case]`: the case as it stands in the file."""
    pattern = r"`(tests/[\w/]+\.py(?:::[^`]+)?)`"
    named = {name for page in PAGES for name in re.findall(pattern, (ROOT / page).read_text())}
    assert len(named) > 30
    for name in named:
        path, _, test = name.partition("::")
        function, _, case = test.partition("[")
        text = (ROOT / path).read_text()
        assert not function or f"def {function}(" in text, name
        assert not case or f'"{case.removesuffix("]")}"' in text, name
