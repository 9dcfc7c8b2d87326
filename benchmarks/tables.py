"""Writes docs/measurements.md and its picture from the results beside this script: no figure is typed by hand.

python benchmarks/tables.py [--check]
"""

import argparse
import json
import sys
from pathlib import Path

from picture import grid

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "measurements.md"
PICTURE = PAGE.with_name("growth.svg")

NAMES = {
    "trajrec-raw": "trajrec, every step, uncompressed",
    "trajrec-zstd": "trajrec, every step (default)",
    "trajrec-keyframes": "trajrec, keyframes every 50 steps",
    "torch.save": "torch.save a step",
    "safetensors": "safetensors a step",
    "h5py": "h5py a step, one row",
    "dcp-async": "torch.distributed.checkpoint async_save a step",
}


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def percent(spread, sign=""):
    return f"{spread['median']:{sign}.1%} ({spread['min']:{sign}.1%} to {spread['max']:{sign}.1%})"


def overhead():
    result = json.loads((RESULTS / "record_overhead.json").read_text())
    parts = []
    for model, title in (("lenet", "LeNet-5"), ("cnn", "a CNN with BatchNorm and dropout")):
        if model not in result:
            continue
        rows = result[model]
        noise, p99 = percent(rows["none"]["thread"], "+"), percent(rows["none"]["p99"], "+")
        size = next(iter(rows.values()))["parameters"]
        head = ["what saves the weights", "training thread", "all turns", "inside the hooks"]
        head += ["other threads and processes", "p99 of a step's time", "bytes a step", "steps", "processes"]
        cells = [
            [
                name,
                percent(rows[key]["thread"], "+"),
                percent(rows[key]["whole"], "+") if "whole" in rows[key] else "",
                percent(rows[key]["hooks"]),
                percent(rows[key]["others"]),
                percent(rows[key]["p99"], "+"),
                f"{rows[key]['bytes_a_step']:,}",
                rows[key].get("steps", ""),
                rows[key].get("trials", ""),
            ]
            for key, name in NAMES.items()
            if key in rows
        ]
        parts.append(
            f"**{title}**, {size:,} parameters. CPU time of the thread (median over turns of 16 steps, and all turns "
            "together), of the hooks and of everything else, and the "
            "99th percentile of a step's wall time, over an unrecorded training that takes turns with the recorded one "
            "in the same process: median, and range over the processes. Two unrecorded trainings "
            f"differ by {noise} in CPU time and by {p99} in that percentile.\n\n" + table(head, cells)
        )
    return "\n\n".join(parts)


def reading():
    result = json.loads((RESULTS / "read_speed.json").read_text())
    rows = [
        [r["model"], r["compression"], f"{r['forwards_MB_s']:,.0f}", f"{r['backwards_MB_s']:,.0f}", f"{r['ratio']:.2f}"]
        for r in result["results"]
    ]
    head = ["run", "compression", "forwards, MB/s", "backwards, MB/s", "size ratio"]
    load = result["about"]["load_average"]
    return f"MB/s of rows from the page cache, checksums verified (load average {load} on two cores).\n\n" + table(
        head, rows
    )


def agreement():
    result = json.loads((RESULTS / "agreement.json").read_text())
    rows = [
        [
            r["epochs"],
            r["steps"],
            f"{r['spearman']:.3f}",
            f"{r['sign_error']:.1%}",
            r["wrong_labels_among_as_many_most_harmful"]["hessian_free"],
            r["wrong_labels_among_as_many_most_harmful"]["exact"],
            f"{r['time_over_training']['hessian_free']:.1f}",
            f"{r['time_over_training']['exact']:.1f}",
        ]
        for r in result["rows"]
    ]
    head = ["epochs", "steps", "Spearman", "sign error", "found, Hessian-free", "found, exact"]
    head += ["time, Hessian-free", "time, exact"]
    wrong = result["rows"][0]["wrong_labels"]
    return (
        f"{result['training']}, {wrong} wrong labels, contributions of all samples to the mean test loss. Found: how "
        f"many of the {wrong} wrong labels are among the {wrong} most harmful samples. Time: over that of the training "
        f"alone, {result['threads']} thread(s).\n\n" + table(head, rows)
    )


def sensitivity():
    result = json.loads((RESULTS / "sensitivity.json").read_text())
    rows = [
        [
            f"{r['activation']}, lr {r['rate']:g}",
            *(f"{r['hessian'][key]:g}" for key in ("growth", "ratio", "rate", "spearman")),
            *(f"{r['ggn'][key]:g}" for key in ("ratio", "spearman")),
        ]
        for r in result["rows"]
    ]
    head = ["training", "growth of the adjoint", "ratio", "rate", "Spearman", "ratio, Gauss-Newton", "Spearman, G.-N."]
    return (
        f"{result['samples']} samples, each removed on the recorded schedule. Ratio: what happened over what its "
        "contribution says, median, ideal 1. Rate: order of what is missing, ideal 2. Spearman: predicted against what "
        "happened.\n\n" + table(head, rows)
    )


def second_proof():
    result = json.loads((RESULTS / "second_proof.json").read_text())
    costs = ", ".join(f"{name} {100 * r['share_of_500_steps']:.1f} %" for name, r in result["cost"].items())
    rows = [[f"{name}", f"{r['autograd_of_autograd']:.1e}", f"{r['seen_through']:.1e}"] for name, r in _tried(result)]
    parts = ", ".join(f"{name} {100 * part:.0f} %" for name, part in result["statistics"].items())
    return (
        f"CPU time of the proof over that of an exact replay of 500 steps, one thread: {costs}. How far a central "
        "difference in float64 is off the derivative, the largest of three steps:\n\n"
        + table(["training", "off autograd of autograd", "off what the replay takes"], rows)
        + f"\n\nExact contributions with running statistics taken for constants are off by: {parts}."
    )


def _tried(result):
    return [*result["hidden"].items(), *((f"clean: {name}", r) for name, r in result["clean"].items())]


def coupled():
    result = json.loads((RESULTS / "coupled.json").read_text())
    rows = [
        [r["training"], *(f"{r[how][key]:g}" for how in ("term", "sample") for key in ("slope", "spearman"))]
        for r in result["rows"]
    ]
    head = ["training", "loss term out: slope", "Spearman", "sample out of its batches: slope", "Spearman"]
    return (
        f"Exact contributions of {result['samples']} samples to the mean test loss, batches of {result['batch']}, "
        f"{result['epochs']} epochs. What happened when the training was made again without the sample's loss term, "
        "and with the sample out of its batches, against the contribution: slope through zero (ideal 1), and rank "
        "correlation.\n\n" + table(head, rows)
    )


def validation():
    result = json.loads((RESULTS / "validation.json").read_text())
    rows = [
        [
            r["training"],
            f"{r['growth']:g}",
            ", ".join(r["kinks"]) or "none",
            f"{r['correlation']:.2f} ({r['interval'][0]:.2f} to {r['interval'][1]:.2f})",
            r["verdict"],
            *(f"{r[key]:.2f}" for key in ("lds_1", "lds_10", "leave_one_out")),
        ]
        for r in result["rows"]
    ]
    head = ["training", "growth of the adjoint", "kinks", "correlation", "verdict"]
    head += ["LDS, 1 %", "LDS, 10 %", "leave-one-out, Spearman"]
    costs = [r["again_over_plain"] for r in result["rows"]]
    return (
        "Correlation and verdict: of 5 random sets of 1 %, as `trajrec validate` gives them. LDS: Spearman's "
        f"correlation of predicted and real changes over {result['sets']} other sets, mean over {result['targets']} "
        f"test samples. A training again takes {min(costs):.1f} to {max(costs):.1f} times the CPU time of the plain "
        "one, whose steps are of a millisecond or two here.\n\n" + table(head, rows)
    )


MODELS = {"lenet": "LeNet-5", "densenet": "DenseNet-40", "mobilenet": "MobileNetV2", "transformer": "transformer"}


ROOFS = {"training": "training", "exact": "exact", "free": "Hessian-free", "target": "exact, a target of a block"}


def bounded(name, row):
    """A row of the table of roofs for every kind of step; none where the result is from before there were any."""
    roofs, base = row["limit"].get("roofs", {}), row["training_ms"]
    best = min((b["exact"] for b in row["blocks"]), default=float("nan"))
    taken = {"training": base, "exact": row["exact"] * base, "free": row["free"] * base, "target": best * base}
    return [
        [
            name,
            row["threads"],
            ROOFS[kind],
            *(f"{roof[key]:.3g}" for key in ("gflop", "MB", "arithmetic_ms", "memory_ms")),
            roof["bound"],
            f"{taken[kind]:.3g}",
            f"{taken[kind] / roof['bound_ms']:.1f}",
        ]
        for kind, roof in roofs.items()
    ]


def roofs_in_words(rows):
    if not rows:
        return ""
    head = ["model", "threads", "step", "GFLOP", "MB", "arithmetic, ms", "memory, ms", "limit", "taken, ms"]
    return (
        "\n\nWhat a step must do at least (`benchmarks/machine.py`), how long that takes at the rates of a matrix "
        "product and of a triad in the same run, and how many times longer the step took.\n\n"
        + table([*head, "over the limit"], rows)
    )


def streaming(row):
    found = row["streamed"]
    return (
        f" Writing {found['samples']} hypergradients ({found['bytes'] / 1e6:,.0f} MB) to disk adds {found['over']:.1%} "
        f"to computing them over {row['steps']} steps, Hessian-free ({row['threads']} thread(s))."
    )


def replaying():
    result = json.loads((RESULTS / "replay_cost.json").read_text())
    head = ["model", "threads", "exact", "certified by a sample", "Hessian-free"]
    head += ["limit exact / Hessian-free", "not derivatives, exact / Hessian-free", "load"]
    rows, blocks, bounds = [], [], []
    for r in result["rows"]:
        name, limit, rest = MODELS[r["model"]], r["limit"], r["not_derivatives"]
        rows.append([name, r["threads"]])
        rows[-1] += [f"{r[key]:.2f}" for key in ("exact", "exact_sampled", "free")]
        rows[-1] += [f"{limit['exact']:.2f} / {limit['free']:.2f}", f"{rest['exact']:.0%} / {rest['free']:.0%}"]
        rows[-1].append(r["load_average"])
        bounds += bounded(name, r)
        for b in r["blocks"]:
            forms = f"{b['exact_form']} / {b['free_form']}"
            blocks.append([name, r["threads"], b["targets"], f"{b['exact']:.2f}", f"{b['free']:.3f}", forms])
    many = [r for r in result["rows"] if "many" in r]
    products = ", ".join(f"{r['many']['over_product']:.1f} ({r['threads']} thread(s))" for r in many)
    return (
        "Time of a replay for all contributions to one target over that of the same steps of plain training; the limit "
        "is the same ratio in floating-point operations. Load: of the two cores, other work included.\n\n"
        + table(head, rows)
        + roofs_in_words(bounds)
        + "\n\nBlocks of targets: training steps a target and step, and the form that was chosen.\n\n"
        + table(["model", "threads", "targets", "exact", "Hessian-free", "form"], blocks)
        + f"\n\nLeNet-5, 1,000 targets, Hessian-free: {products} times what the matrix product alone takes."
        + "".join(streaming(r) for r in many if "streamed" in r)
    )


def compiling():
    result = json.loads((RESULTS / "compiled.json").read_text())
    rows = [
        [
            MODELS[r["model"]],
            *(f"{r[key]:.3g}" for key in ("form_ms", "plain_ms", "compiled_ms", "compiling_s")),
            f"{r['compiled_ms'] / r['form_ms']:.2f}",
            f"{r['relative_difference']:.1e}",
        ]
        for r in result["rows"]
    ]
    head = ["model", "as a replay does it, ms", "torch.func, ms", "torch.func compiled, ms", "compiling, s"]
    loads = " and ".join(str(r["load_average"]) for r in result["rows"])
    return (
        "Losses, inner products, gradient and Hessian-vector product of a step for one target: least CPU time of a "
        f"dozen trials, one thread (load average {loads}). Difference: of the Hessian-vector products of torch.func "
        "from the replay's, in the 2-norm. There is no `--compile`: what the compiler can trace is slower than what a "
        "replay does, or wrong, as torch's own gradient of LayerNorm's tangent is.\n\n"
        + table([*head, "compiled over the replay's", "difference"], rows)
    )


def full_size():
    result = json.loads((RESULTS / "full_mnist.json").read_text())
    clocks = " and ".join(sorted({row.get("clock", "wall") for row in result["rows"]}))
    head = ["epochs", "steps", "test accuracy", "training, s", "Hessian-free", "exact", "Spearman", "Pearson"]
    head += ["sign error", "relative error", "growth of the exact adjoint"]
    rows = [
        [
            r["epochs"],
            f"{r['steps']:,}",
            f"{r['test_accuracy']:.2%}",
            f"{r['seconds']['training']:,.0f}",
            f"{r['over_training']['hessian_free']:.2f}",
            f"{r['over_training']['exact']:.2f}",
            f"{r['spearman']:.3f}",
            f"{r['pearson']:.3f}",
            f"{r['sign_error']:.1%}",
            f"{r['relative_error']:.3g}",
            f"{r['adjoint_growth']['exact']:.3g}",
        ]
        for r in result["rows"]
    ]
    return (
        "The paper's MNIST training (50,000 images, LeNet-5), contributions of all training images to the mean test "
        f"loss after so many epochs; {clocks} times over that of training, set-up included, beside other work on the "
        "machine. "
        "Relative error: of the Hessian-free contributions, in the 2-norm.\n\n" + table(head, rows)
    )


def growing():
    result = json.loads((RESULTS / "growth.json").read_text())
    rows = [
        [
            r["series"],
            MODELS.get(r["point"], "LeNet-5"),
            f"{r['x']:,}",
            r["steps"],
            f"{r['seconds']:.1f}",
            f"{r['steps_seconds']:.3g}",
            f"{r['steps_seconds'] / r['steps'] / r['training_step_seconds']:.3g}",
            f"{r['peak_MB']:,.0f}",
        ]
        for r in result["rows"]
    ]
    slopes = "; ".join(
        f"{name}: time {found['time']:.2f}, memory {found['memory']:.2f}" for name, found in result["slopes"].items()
    )
    head = ["grows", "model", "size", "steps", "CPU seconds", "of the steps alone", "over training", "peak, MB"]
    return (
        "Exact contributions to one target; tracked samples: forwards, Hessian-free. Over training: time of the steps "
        "alone over that of the same steps of training. Slopes in log-log (1 is linear, 0 is constant), time of the "
        f"steps alone: {slopes}.\n\n![Time and memory of a replay in log-log](growth.svg)\n\n" + table(head, rows)
    )


def growth_picture():
    """The paper's supplementary figure 1, redone: time above, memory below."""
    result = json.loads((RESULTS / "growth.json").read_text())
    rows = []
    for key, label, slope in (("steps_seconds", "CPU seconds", "time"), ("peak_MB", "peak, MB", "memory")):
        rows.append([])
        for series, found in result["slopes"].items():
            points = [(r["x"], max(r[key], 1e-3)) for r in result["rows"] if r["series"] == series]
            rows[-1].append((f"{slope}, slope {found[slope]:.2f}", series, label, points))
    return grid(rows)


SECTIONS = (
    ("What recording costs", overhead, "record_overhead"),
    ("How fast a run is read", reading, "read_speed"),
    ("What a replay costs", replaying, "replay_cost"),
    ("Whether torch.compile pays", compiling, "compiled"),
    ("How a replay grows", growing, "growth"),
    ("Hessian-free against exact", agreement, "agreement"),
    ("The paper's MNIST run at full size", full_size, "full_mnist"),
    ("When first-order numbers come true", sensitivity, "sensitivity"),
    ("Where samples touch each other", coupled, "coupled"),
    ("What trajrec validate says", validation, "validation"),
    ("What the second proof costs and finds", second_proof, "second_proof"),
)


def page():
    text = (
        "# Measurements\n\nEvery table is written by `benchmarks/tables.py` from a result that the named script left.\n"
    )
    for title, section, name in SECTIONS:
        if (RESULTS / f"{name}.json").is_file():
            text += f"\n## {title}\n\n`python benchmarks/{name}.py`. {section()}\n"
    return text


def files():
    """The text of every file that follows from the results."""
    pictures = {PICTURE: growth_picture()} if (RESULTS / "growth.json").is_file() else {}
    return {PAGE: page()} | pictures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    if parser.parse_args().check:
        sys.exit(any(not path.is_file() or path.read_text() != text for path, text in files().items()))
    for path, text in files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
