"""A Task by its name: "FILE.py:ATTR" or "package.module:ATTR"."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import FunctionType, ModuleType

from trajrec.errors import TaskError
from trajrec.task.task import Task


def load_task(reference: str) -> Task:
    """The Task named "FILE.py:ATTR" or "package.module:ATTR" (":ATTR" left out means ":task").

    The file's folder is put on sys.path while it is imported, as Python does for a script. What the name stands for is
    taken as it is and never called: a reference may come from a file.

    Raises:
        TaskError: if there is no such file, module or attribute, if importing it fails, or if it is no Task.
    """
    source, _, attribute = reference.rpartition(":") if ":" in reference else (reference, "", "task")
    module = _import(source)
    if not hasattr(module, attribute):
        found = sorted(name for name, value in vars(module).items() if isinstance(value, Task))
        hint = f"It has these tasks: {', '.join(found)}." if found else "It has no Task at all."
        raise TaskError(f"{source} has no attribute {attribute!r}. {hint} Pass --task {source}:NAME.")
    task = getattr(module, attribute)
    if not isinstance(task, Task):
        made = isinstance(task, FunctionType)
        hint = f" It is not called: write `task = {attribute}()` in the file, and name that." if made else ""
        raise TaskError(f"{reference} must be a trajrec.Task, but is {type(task).__name__}.{hint}")
    return task


def _import(source: str) -> ModuleType:
    path = Path(source)
    if source.endswith(".py") and not path.is_file():
        raise TaskError(f"There is no task file {source}. Pass --task FILE.py:ATTR.")
    try:
        return _import_file(path) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:
        raise TaskError(f"Importing the task from {source} failed: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    name = f"_trajrec_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before execution: dataclasses and pickling inside the file look their module up by name.
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def task_file(reference: str) -> Path | None:
    """The file that a reference names, or None for a module."""
    source = reference.rpartition(":")[0] if ":" in reference else reference
    return Path(source) if source.endswith(".py") else None


def absolute(reference: str) -> str:
    """The reference with the file that it names as seen from anywhere."""
    source, colon, attribute = reference.rpartition(":") if ":" in reference else (reference, "", "")
    return f"{os.path.abspath(source)}{colon}{attribute}" if source.endswith(".py") else reference


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
