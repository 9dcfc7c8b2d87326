"""Why the samples of a step cannot be told, in words that say what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from trajrec.capture.attribution.batches import Batch, Source

HINT = "Call trajrec.set_batch(ids) with the sample ids of the step before optimizer.step()."

ORDER = (
    'To number them in the order in which they arrive: trajrec record --ids order, or trajrec.record(ids="order"); '
    "with --inputs store a replay needs no stream."
)
NONE_SEEN = (
    "No batch of a DataLoader was seen that this optimizer step could have been made of: none was drawn, or another "
    f"step has used it. {HINT}"
)
NOT_ROWS = (
    "The batches of this training are cut out of a tensor, and what the model was called on in this step is not seen "
    f"to be rows of it: it was changed after it was cut out, or comes from elsewhere. {HINT}"
)
PICKED = (
    "The loss of this step is of some rows of the model's outputs, and it cannot be told of which: they were picked "
    f"more than once. {HINT}"
)
_ROWS = {
    "changed": "The tensor that the batches were cut out of was changed, or made anew in another order, since the "
    "first step: ids would be places in another order.",
    "twins": "The batch is cut out of a tensor in which some of its rows are there twice: which of them were used "
    "cannot be told.",
    "strange": "No batch of a DataLoader was seen that this optimizer step could have been made of, and what the model "
    "was called on is not rows of a tensor or an array that stays the same while the loop runs: it was changed after "
    "it was cut out of one, or comes from elsewhere.",
}
THREADS_CALL = f"More than one thread calls the model, and it cannot be told which of them makes a step. {HINT}"
THREAD_STEPS = (
    "The optimizer steps in another thread than the one that calls the model, so it cannot be told which batches made "
    f"the step. {HINT}"
)
UNPROVEN = (
    "The gradient is that of another model, too, as in adversarial training, and what the recorded model was called on "
    f"is no batch of a DataLoader, nor a copy of one: it cannot be told whether samples made this step. {HINT}"
)


def rows_unknown(whys: Sequence[str]) -> str:
    """No rows of a tensor were found, for one of these reasons."""
    return next((f"{words} {HINT}" for key, words in _ROWS.items() if key in whys), "")


def several(batches: Sequence[Batch]) -> str:
    """Several batches could be meant."""
    if len({batch.source.loader for batch in batches}) > 1:
        return (
            "Two loaders handed out a batch before this step, and it cannot be told which of them the model was called "
            f"on: its inputs are neither. {HINT}"
        )
    return (
        f"{len(batches)} batches were drawn before the model was called, and it cannot be told which of them it was "
        f"called on: its inputs are none of them. {HINT}"
    )


def no_ids(source: Source) -> str:
    """The samples of a loader have no ids."""
    if source.is_iterable:
        return f"{source.name} is an iterable data set: its samples have no ids. {ORDER} {HINT}"
    if not source.in_order:
        return f"The DataLoader over {source.name} has in_order=False: batches come in any order. {HINT}"
    return (
        f"The sampler of the DataLoader over {source.name} does not draw integer ids, or a batch before this one "
        f"failed: its ids cannot be told. {HINT}"
    )


def several_sets(names: Sequence[str]) -> str:
    """The step was made of batches of several data sets, of classes with these names."""
    return (
        f"This step was made of batches of {len(names)} data sets ({' and '.join(names)}), and a recording has the "
        "samples of one. Name its loader, trajrec.record(loader=...), if the other one is no training data, or train "
        f"on one data set that holds both (torch.utils.data.ConcatDataset). {HINT}"
    )


def another_set(name: str) -> str:
    """The step was made of a batch of another data set than those before, of a class with this name."""
    return (
        "This step was made of a batch of another data set than the steps before it (another object, a "
        f"{name}): ids of two data sets do not go together. Make the data set once, before the loop. {HINT}"
    )


def other_size(called_on: int, samples: int) -> str:
    """The model was called on another number of samples than the batch has."""
    return (
        f"The model was called on {called_on} samples in this step, and the batch that it seems to be has {samples}: "
        f"batches were joined, or cut. {HINT}"
    )
