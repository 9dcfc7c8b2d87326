"""A rule at a point: where a model is, with the optimizer's state there and made-up gradients."""

import numpy as np
import torch

from trajrec.records import Keyframe
from trajrec.rules import FlatLayout, rule_for
from trajrec.snapshot.model import Snapshot


def keyframe_of(snapshot, step=0):
    """The keyframe of now, with arrays of its own."""
    return Keyframe(step, {path: np.array(array) for path, array in snapshot.keyframe(False).items()})


def rule_of(optimizer, model, gradients):
    """The rule, weights [P'], state, gradient [P'] and hyperparameters [G, H], as `self_test` takes them."""
    for p, value in zip(model.parameters(), gradients, strict=True):
        p.grad = value.to(p.dtype)
    snapshot = Snapshot(model, optimizer)
    spec = snapshot.spec({"samples": 1})
    layout = FlatLayout(spec)
    rule, hyper = rule_for(spec, layout), snapshot.hyper()
    dtype, device = getattr(torch, spec.dtype), torch.device("cpu")
    state = rule.initial_state(keyframe_of(snapshot), hyper, dtype, device)
    w = layout.join({k: p.detach() for k, p in model.named_parameters()})
    return rule, w, state, layout.join({k: p.grad for k, p in model.named_parameters()}), hyper
