"""The house rules as tests: what imports what, what is installed, what the examples need."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"trajrec": ROOT / "trajrec", "trajrec.replay": ROOT / "replay", "trajrec.cli": ROOT / "cli"}

ABOVE = ["trajrec.replay", "trajrec.cli"]
DATA = ["h5py", "hdf5plugin", "polars"]
VALUES = ["trajrec.task", "trajrec.capture", "trajrec.snapshot", "trajrec.rules", "trajrec.runfile", *ABOVE, *DATA]
OUTPUT = ["trajrec.replay.folder", "trajrec.replay.report", "trajrec.runfile", "trajrec.cli", *DATA]
PROOF = ["trajrec.replay.proof", "trajrec.replay.methods", "trajrec.replay.validation"]

# a module, or a folder (with a dot at its end) -> what must not be imported there at any level
FORBIDDEN = {
    **{f"trajrec.{name}": VALUES for name in ("errors", "records", "typed", "checksum", "inputs", "digest", "sink")},
    **{f"trajrec.{name}": ["torch"] for name in ("errors", "records", "typed", "checksum")},
    "trajrec.task.": ["trajrec.capture", "trajrec.snapshot", "trajrec.rules", "trajrec.runfile", *ABOVE, *DATA],
    "trajrec.capture.": ["trajrec.runfile", *ABOVE, *DATA],
    "trajrec.capture.attribution.": ["torch", "trajrec.task", "trajrec.snapshot", "trajrec.rules"],
    "trajrec.capture.observing.": ["trajrec.snapshot", "trajrec.rules"],
    "trajrec.snapshot.": ["trajrec.task", "trajrec.capture", "trajrec.rules", "trajrec.runfile", *ABOVE, *DATA],
    "trajrec.rules.": ["trajrec.task", "trajrec.capture", "trajrec.snapshot", "trajrec.runfile", *ABOVE, *DATA],
    "trajrec.runfile.": ["trajrec.task", "trajrec.capture", "trajrec.snapshot", "trajrec.rules", "polars", *ABOVE],
    "trajrec.runfile.format.": [f"trajrec.runfile.{process}" for process in ("trainer", "writer", "reader")],
    "trajrec.runfile.trainer.": ["trajrec.runfile.writer", "trajrec.runfile.reader", "h5py", "hdf5plugin"],
    "trajrec.runfile.writer.": ["trajrec.runfile.trainer"],
    "trajrec.runfile.reader.": ["trajrec.runfile.trainer", "trajrec.runfile.writer"],
    "trajrec.replay.machine.": ["trajrec.replay.losses", "trajrec.replay.step", *PROOF, *OUTPUT],
    "trajrec.replay.losses.": ["trajrec.replay.derivatives", *PROOF, *OUTPUT],
    "trajrec.replay.derivatives.": [*PROOF, *OUTPUT],
    "trajrec.replay.trajectory.": ["trajrec.replay.methods", "trajrec.replay.validation", *OUTPUT],
    "trajrec.replay.proof.": ["trajrec.replay.methods", "trajrec.replay.validation", *OUTPUT],
    "trajrec.replay.methods.": ["trajrec.replay.validation", *OUTPUT],
    "trajrec.replay.validation.": OUTPUT,
    **{f"trajrec.replay.{name}": OUTPUT for name in ("question", "step", "session")},
    "trajrec.replay.folder.": ["trajrec.replay.report", "trajrec.cli"],
    "trajrec.replay.report.": ["torch", "h5py", "trajrec.runfile", "trajrec.replay.methods", "trajrec.cli"],
    "trajrec.replay.report.sections.": ["trajrec.replay.report.render", "trajrec.replay.report.report"],
    "trajrec.replay.report.render.": ["trajrec.replay.report.scores", "trajrec.replay.report.sections"],
    "": ["torchvision"],
}


# what breaks a rule on purpose, and why
ALLOWED = {
    ("trajrec.replay.methods.contributions", "polars"): "`frame` is the door to Polars",
    ("trajrec.replay.methods.hypergradients", "trajrec.replay.folder.vectors"): "the file that hypergradients are in",
    ("trajrec.replay.methods.hypergradients", "trajrec.replay.folder.vectors.VectorFile"): "the same",
}


def modules():
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            if "mnist" in inner or (package == "trajrec" and inner[0] in ("replay", "cli")):
                continue
            yield ".".join([package, *inner]).removesuffix(".__init__"), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def holds(pattern, module):
    return module == pattern or pattern == "" or (pattern.endswith(".") and module.startswith(pattern))


def test_dependencies_run_one_way():
    broken = []
    for module, path in modules():
        forbidden = [name for pattern, names in FORBIDDEN.items() if holds(pattern, module) for name in names]
        if not module.startswith("trajrec.cli") and module != "trajrec.__main__":
            forbidden.append("trajrec.cli")
        found = [name for name in imports(path) if name.startswith(tuple(forbidden))]
        broken += [f"{module} imports {name}" for name in found if (module, name) not in ALLOWED]
    assert not broken


def test_every_folder_says_what_it_is_for_and_what_it_must_not_import():
    for module, path in modules():
        if path.name == "__init__.py" and module not in PACKAGES:
            assert re.match(r'"""[A-Z].*\. .*[Ii]mports? ', path.read_text()), module


def test_the_listed_packages_are_the_folders_that_hold_code():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join([package, *init.parent.relative_to(folder).parts])
        for package, folder in PACKAGES.items()
        for init in folder.rglob("__init__.py")
        if package != "trajrec" or init.parent.relative_to(folder).parts[:1] not in (("replay",), ("cli",))
    }
    assert listed == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_one_package_with_everything_in_it(wheel):
    names = [n for n in wheel.namelist() if ".dist-info/" not in n]
    assert {n.split("/")[0] for n in names} == {"trajrec"}
    for expected in (
        "trajrec/__init__.py",
        "trajrec/py.typed",
        "trajrec/replay/methods/adjoint.py",
        "trajrec/replay/report/render/terminal.py",
        "trajrec/cli/main.py",
        "trajrec/cli/mnist/train.py",
        "trajrec/runfile/writer/loop.py",
    ):
        assert expected in names
    assert len(names) == len(set(names))
    data = {p for p in (ROOT / "replay" / "report").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    for path in data:
        assert f"trajrec/{path.relative_to(ROOT)}" in names


def test_torchvision_imports_beside_a_cpu_build_of_torch():
    code = (
        "import torch; from trajrec.vision import import_torchvision; tv = import_torchvision();"
        "from torchvision import transforms, models, datasets; from torchvision.utils import make_grid;"
        "data = datasets.FakeData(2, (1, 8, 8), 3, transforms.ToTensor());"
        "assert make_grid([data[0][0], data[1][0]]).shape[0] == 3; print(len(data))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


def test_public_names_are_there():
    import trajrec
    import trajrec.replay

    for module in (trajrec, trajrec.replay):
        for name in module.__all__:
            assert getattr(module, name) is not None
            assert name in dir(module)
        with pytest.raises(AttributeError):
            module.no_such_name  # noqa: B018
    # The functions, not modules of the same name, whichever way round they are imported.
    from trajrec.replay import contributions, hypergradients

    assert callable(contributions)
    assert callable(hypergradients)
