"""Whether torch.compile pays for the derivatives of an exact step on this machine.

    python benchmarks/compiled.py [--models lenet transformer] [--out benchmarks/results/compiled.json]

The forms of a replay work through operators that torch's compiler does not trace (`replay/derivatives/dual_rules.py`),
so what is compiled is the same step written in torch.func: losses and tangents by jvp, then one gradient of their sum
by weights and direction. It is held against itself without the compiler, and against the form that a replay uses: least
CPU time of a dozen steps with one thread, and the wall time of the first call, which compiles the whole as one graph.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch._inductor.config
from machine import seconds
from replay_cost import ROOT, setting, train
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset

import trajrec
from trajrec.replay.derivatives.choice import FORMS
from trajrec.replay.session import Session

TIMES = 12
torch._inductor.config.force_disable_caches = True


def exact(loss, build, layout):
    """(weights, direction, batch) -> inner products, Hessian-vector product, gradient."""
    model = build()

    def losses(weights, *batch):
        named = layout.split(weights)
        with sdpa_kernel(SDPBackend.MATH):
            return loss(lambda x: functional_call(model, named, (x,)), batch)

    def step(weights, direction, *batch):
        def slope(w, v):
            _, inner = jvp(lambda p: losses(p, *batch), (w,), (v,))
            return inner.mean(), inner

        (product, gradient), inner = grad(slope, argnums=(0, 1), has_aux=True)(weights, direction)
        return inner, product, gradient

    return step


def least(work):
    """Milliseconds."""
    return round(1e3 * seconds(work, TIMES), 2)


def measure(name, root, folder):
    build, loss, data, batch = setting(name, root)
    train(build, loss, data, batch, folder / "run.h5")
    with trajrec.open(folder / "run.h5") as run:
        session = Session(run, trajrec.Task(build, data, Subset(data, range(8)), loss=loss))
        step = next(iter(session.trajectory.backwards()))
        direction = torch.randn(1, session.layout.size)

        def form():
            point = FORMS["forward"](session.function, session.train, step, 0)
            return point.along(direction.clone(), hessian=True, gradient=True)

        plain = exact(loss, build, session.layout)
        given = (step.before, direction[0], *session.train.part(step, step.parts[0]))
        compiled, began = torch.compile(plain, fullgraph=True), time.perf_counter()
        difference = float((compiled(*given)[1] - form().hvp[0]).norm() / form().hvp.norm())
        first = time.perf_counter() - began
        return {
            "model": name,
            "form_ms": least(form),
            "plain_ms": least(lambda: plain(*given)),
            "compiled_ms": least(lambda: compiled(*given)),
            "compiling_s": round(first, 1),
            "relative_difference": difference,
            "load_average": round(os.getloadavg()[0], 1),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=ROOT.parent / "shared" / "data" / "mnist")
    parser.add_argument("--models", nargs="+", default=["lenet", "transformer"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compiled.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, options.data_root, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
        options.out.write_text(json.dumps({"about": {"torch": str(torch.__version__)}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
