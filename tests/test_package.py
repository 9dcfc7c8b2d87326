"""The house rules as tests: what imports what, what is installed, what the examples need."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"trajrec": ROOT / "trajrec", "trajrec.replay": ROOT / "replay", "trajrec.cli": ROOT / "cli"}

MATHEMATICS = ("trajectory", "linearize", "adjoint", "tangent", "certificate", "model", "samples", "session", "targets")

# module (or prefix ending in a dot) -> what it must not import at any level
FORBIDDEN = {
    "trajrec.errors": ["trajrec.", "torch", "h5py", "polars"],
    "trajrec.typed": ["trajrec.", "torch", "h5py", "polars"],
    "trajrec.records": ["trajrec.runfile", "trajrec.replay", "trajrec.task.task", "torch", "h5py", "polars"],
    "trajrec.capture.hooks": ["trajrec.runfile", "trajrec.replay", "trajrec.cli", "h5py", "polars"],
    "trajrec.capture.attribution.": ["torch", "trajrec.task", "trajrec.snapshot", "trajrec.runfile", "trajrec.replay"],
    "trajrec.capture.observing.": ["trajrec.runfile", "trajrec.replay", "trajrec.cli", "h5py", "polars"],
    "trajrec.snapshot.snapshot": ["trajrec.runfile", "trajrec.replay", "trajrec.cli", "h5py", "polars"],
    "trajrec.capture.recorder": ["trajrec.replay", "trajrec.cli", "h5py", "polars"],
    "trajrec.rules.": ["trajrec.runfile", "trajrec.replay", "trajrec.cli", "h5py", "polars"],
    "trajrec.runfile.": ["trajrec.rules", "trajrec.replay", "trajrec.cli", "polars"],
    **{f"trajrec.replay.{name}": ["trajrec.runfile", "trajrec.cli", "h5py", "polars"] for name in MATHEMATICS},
    "trajrec.replay.scores": ["torch", "h5py", "trajrec.cli", "trajrec.runfile"],
    "trajrec.replay.report": ["torch", "h5py", "trajrec.cli", "trajrec.runfile"],
    "trajrec.replay.render.": ["torch", "h5py", "trajrec.cli", "trajrec.runfile", "trajrec.replay.scores"],
    "": ["torchvision"],
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


def test_dependencies_run_one_way():
    broken = []
    for module, path in modules():
        for pattern, forbidden in FORBIDDEN.items():
            if module == pattern or pattern == "" or (pattern.endswith(".") and module.startswith(pattern)):
                broken += [f"{module} imports {n}" for n in imports(path) if n.startswith(tuple(forbidden))]
        if not module.startswith("trajrec.cli") and module != "trajrec.__main__":
            broken += [f"{module} imports {name}" for name in imports(path) if name.startswith("trajrec.cli")]
    assert not broken


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
        "trajrec/replay/adjoint.py",
        "trajrec/replay/render/terminal.py",
        "trajrec/cli/main.py",
        "trajrec/cli/mnist/train.py",
        "trajrec/runfile/writer/loop.py",
    ):
        assert expected in names
    assert len(names) == len(set(names))
    data = {p for p in (ROOT / "replay" / "render").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    for path in data:
        assert f"trajrec/{path.relative_to(ROOT)}" in names


def test_torchvision_imports_beside_a_cpu_build_of_torch():
    code = (
        "import torch; from trajrec.task.vision import import_torchvision; tv = import_torchvision();"
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
        with pytest.raises(AttributeError):
            module.no_such_name  # noqa: B018
    # The functions, not modules of the same name, whichever way round they are imported.
    from trajrec.replay import contributions, hypergradients

    assert callable(contributions)
    assert callable(hypergradients)
