"""Reports from replay folders to terminal and CSV, and every mistake a user can make on the way."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from tests.made import replay_folder
from trajrec.cli.report import report as command
from trajrec.errors import DamagedRunError, NonFiniteError, OutputExistsError, ReplayError, TrajrecError
from trajrec.replay.report import report
from trajrec.replay.report.render import tables, terminal

VALUES = np.array([[4e-5], [-3e-5], [2e-5], [0.0], [-1e-5]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return replay_folder.write(tmp_path / "lenet-replay", VALUES, labels=[7, 3, 7, 1, 0])


def drawn(result: report.Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    terminal.show(result, console)
    return console.file.getvalue()


def run(*args: object) -> tuple[int, str, BaseException | None]:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.output, result.exception


def test_report_has_ranks_labels_and_shares(folder: Path) -> None:
    result = report.build(folder)
    assert result["overall"].helpful.select("rank", "sample", "label", "contribution").rows() == [
        (1, 0, "7", 4e-5),
        (2, 2, "7", 2e-5),
    ]
    assert result["overall"].harmful["sample"].to_list() == [1, 4]
    assert result["overall"].helpful["share"].to_list() == pytest.approx([0.4, 0.2])
    assert (result.head.samples, result.head.targets) == (5, 1)
    assert result.head.mass == pytest.approx(1e-4)
    assert result.head.total == pytest.approx(2e-5)


def test_class_names_replace_class_numbers(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "r", VALUES, labels=[1, 0, 1, 2, 5], classes=["cat", "dog", "emu"])
    top = report.build(path)["overall"]
    labels = dict(pl.concat([top.helpful, top.harmful]).select("sample", "label").rows())
    assert labels == {0: "dog", 1: "cat", 2: "dog", 4: "5"}


def test_terminal_says_what_was_asked_sign_unit_and_certificate(folder: Path) -> None:
    text = " ".join(drawn(report.build(folder)).split())
    assert "How much did each of 5 training samples help or harm the mean test loss?" in text
    assert "positive = helpful: removing the sample would raise the loss" in text
    assert "63 of 63 steps were made again" in text
    assert "exact (with the Hessian), backwards through training (adjoint)" in text
    assert "63 steps of SGD in 1 epoch" in text
    assert "share of the sum of |contribution|" in text


def test_terminal_fits_80_columns_without_colour(folder: Path) -> None:
    text = drawn(report.build(folder))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "+4.000e-05" in text
    assert "40.00 %" in text


def test_numbers_are_whole_beside_long_names(tmp_path: Path) -> None:
    names = [f"train/{'long-' * 20}{i}.png" for i in range(5)]
    path = replay_folder.write(tmp_path / "r", VALUES, labels=["a label of many words"] * 5, names=names)
    text = drawn(report.build(path))
    assert "+4.000e-05" in text
    assert "40.00 %" in text
    assert max(map(len, text.splitlines())) <= 80


def test_markup_and_control_characters_are_drawn_as_text(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "r", VALUES, labels=["[red]x[/red]", "\x1b[31mred", "", "a\tb", "c"])
    text = drawn(report.build(path))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    assert "\\x1b[31mred" in text


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_encoding_of_a_pipe_is_respected(tmp_path: Path, encoding: str) -> None:
    path = replay_folder.write(tmp_path / "r", VALUES, labels=["Zürich"] * 5, names=["ü" * 90] * 5)
    imports = "from trajrec.replay.report.report import build; from trajrec.replay.report.render.terminal import show"
    code = f"{imports}; show(build({str(path)!r}))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert ("Zürich" if encoding == "utf-8" else "Z\\xfcrich") in done.stdout.decode(encoding)
    assert b"\x1b" not in done.stdout  # no colour in a pipe


def test_no_color_is_respected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    terminal.show(report.build(folder), console)
    assert "[3" not in console.file.getvalue()  # no colour; bold and dim may stay


def test_no_certificate_is_said(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "r", VALUES, certificate=None)
    assert "No proof. Nothing proves that this replay repeated the recorded run." in " ".join(
        drawn(report.build(path)).split()
    )


@pytest.mark.parametrize(
    ("verdict", "good"), [("bit-exact", True), ("within rounding", True), ("drifted", False), ("unchecked", None)]
)
def test_verdicts_of_certificates(tmp_path: Path, verdict: str, good: bool | None) -> None:
    path = replay_folder.write(tmp_path / "r", VALUES, certificate={"verdict": verdict, "sentence": "So it is."})
    result = report.build(path)
    assert result.head.certificate is not None
    assert result.head.certificate.good is good
    assert ("NOT PROVED. So it is." in drawn(result)) is (good is False)


def test_one_side_may_be_empty(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "r", np.abs(VALUES))
    assert "no sample has a negative contribution" in drawn(report.build(path))


def test_a_folder_with_contributions_only_is_enough(folder: Path) -> None:
    for name in ("samples.parquet", "replay.json"):
        (folder / name).unlink()
    result = report.build(folder)
    assert result.head.settings.exact is True  # from the metadata of the Parquet file
    assert result.head.certificate is not None
    assert result.head.certificate.steps_checked == 63
    assert result["overall"].helpful["label"][0] is None


def test_csv_has_the_columns_and_rows(folder: Path, tmp_path: Path) -> None:
    path = tables.write_csv(report.build(folder, top=1), tmp_path / "out" / "top.csv")
    assert path.read_text().splitlines()[0] == "rank,side,sample,label,target,contribution,share"
    got = pl.read_csv(path)
    assert got["sample"].to_list() == [0, 1]
    assert got["target"].to_list() == [-1, -1]
    assert got["contribution"].to_list() == [4e-5, -3e-5]
    assert sorted(p.name for p in path.parent.iterdir()) == ["top.csv", "top.csv.meta.json"]


def test_agreement_with_another_replay(folder: Path, tmp_path: Path) -> None:
    other = replay_folder.write(tmp_path / "free-replay", VALUES * 2, exact=False)
    result = report.build(folder, ask=report.Ask(compare=other))
    assert result["comparison"] is not None
    assert result["comparison"].agreement.spearman == pytest.approx(1)
    assert result["comparison"].agreement.slope == pytest.approx(2)
    assert result["comparison"].points[0] == (0, 4e-5, 8e-5)
    assert "Agreement of exact (lenet-replay) with Hessian-free (free-replay)" in drawn(result)


def test_nothing_in_common_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    other = replay_folder.write(tmp_path / "other", VALUES, samples=range(100, 105))
    with pytest.raises(ReplayError, match="no sample in common"):
        report.build(folder, ask=report.Ask(compare=other))


def test_not_a_number_is_refused_with_its_sample(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[2] = np.nan
    path = replay_folder.write(tmp_path / "r", values)
    with pytest.raises(NonFiniteError, match=r"1 of 5 samples .* first sample 2.*--dtype float64"):
        report.build(path)


def test_a_folder_that_is_no_replay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"is not a replay folder: it holds no contributions\.parquet"):
        report.build(tmp_path)
    with pytest.raises(ReplayError, match=r"There is no replay folder .*`trajrec replay RUN` makes one"):
        report.build(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_truncated_file_is_damaged(folder: Path, keep: float) -> None:
    path = folder / "contributions.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(DamagedRunError, match=r"contributions\.parquet cannot be read: .*replay again with --force"):
        report.build(folder)


def test_flipped_bytes_in_a_page_are_damage(folder: Path) -> None:
    path = folder / "contributions.parquet"
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(DamagedRunError, match=r"contributions\.parquet cannot be read"):
        report.build(folder)


def test_a_missing_column_is_damage(folder: Path) -> None:
    path = folder / "contributions.parquet"
    pl.read_parquet(path).drop("target").write_parquet(path)
    with pytest.raises(DamagedRunError, match=r"has no column target \(found sample, contribution\)"):
        report.build(folder)


def test_damaged_settings_are_named(folder: Path) -> None:
    (folder / "replay.json").write_text('{"run": ')
    with pytest.raises(DamagedRunError, match=r"replay\.json cannot be read"):
        report.build(folder)


def test_an_empty_replay_is_refused(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "r", np.zeros((0, 1)))
    with pytest.raises(ReplayError, match="has no rows"):
        report.build(path)


def test_command_maps_a_run_to_its_replay(folder: Path, tmp_path: Path) -> None:
    code, text, _ = run(tmp_path / "lenet.h5", "--top", 1, "--csv", tmp_path / "top.csv")
    assert code == 0
    assert "Most helpful for the mean test loss" in text
    assert f"Wrote {tmp_path / 'top.csv'}" in text.replace("\n", "")
    assert run(folder)[0] == 0


def test_command_takes_the_newest_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "There is no run under ./runs" in str(run()[2])
    (tmp_path / "runs" / "a.h5").touch()
    assert "runs/a.h5 has not been replayed yet" in str(run()[2])
    assert "`trajrec replay runs/a.h5`" in str(run()[2])
    folder.rename(tmp_path / "runs" / "a-replay")
    assert run()[0] == 0


def test_command_names_what_does_not_exist(tmp_path: Path) -> None:
    error = run(tmp_path / "nothing.h5")[2]
    assert isinstance(error, TrajrecError)
    assert "There is no run" in str(error)


def test_outputs_are_not_overwritten_without_force(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "top.csv"
    path.write_text("mine")
    _, text, error = run(folder, "--csv", path)
    assert isinstance(error, OutputExistsError)
    assert "top.csv exists already" in str(error)
    assert "Most helpful" not in text  # checked before any work
    assert path.read_text() == "mine"
    assert run(folder, "--csv", path, "--force")[0] == 0
    assert path.read_text().startswith("rank,")
    path.unlink()
    assert "top.csv.meta.json exists already" in str(run(folder, "--csv", path)[2])
    assert not path.exists()
