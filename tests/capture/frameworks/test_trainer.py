"""Hugging Face's Trainer with what it is used with: the same bits, the ids of every step, certified replays."""

import os
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import trajrec
from tests.capture.frameworks.common import certified, same_and_right, weights_of
from trajrec.errors import DriftError
from trajrec.replay import contributions
from trajrec.vision import import_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_torchvision()  # which transformers asks for
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
G = torch.Generator().manual_seed(0)
N = 22
WORDS = [torch.cat([torch.tensor([i + 1]), torch.randint(1, 40, (3 + i % 5,), generator=G)]) for i in range(N)]
LABELS = torch.randint(0, 2, (N,), generator=G)
SENTENCES = [{"input_ids": words, "labels": label} for words, label in zip(WORDS, LABELS, strict=True)]
READ = {"inputs": ["input_ids", "attention_mask"], "labels": "labels"}


def collate(items):
    """Pads to the longest sentence of the batch, as the collators of transformers do."""
    ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.stack([i["labels"] for i in items])}


def classifier(dropout=0.0):
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(intermediate_size=16, max_position_embeddings=16, **sizes, **off)
    return transformers.BertForSequenceClassification(config)


def language_model(dropout=0.0):
    torch.manual_seed(1)
    off = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, **off)
    return transformers.GPT2LMHeadModel(config)


def next_words(items):
    batch = collate(items)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


class Watched(transformers.Trainer):
    """Notes which samples every step is made of: the first word of a sentence is its number."""

    def training_step(self, model, inputs, *rest):
        self.used = [*getattr(self, "used", []), *(inputs["input_ids"][:, 0] - 1).tolist()]
        return super().training_step(model, inputs, *rest)

    def _maybe_log_save_evaluate(self, *args, **named):
        self.made = [*getattr(self, "made", []), *([self.used] if self.used else [])]  # it is called after epochs too
        self.used = []
        return super()._maybe_log_save_evaluate(*args, **named)


def trainer_of(path, model, together=collate, **options):
    told = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    told |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3}
    arguments = transformers.TrainingArguments(str(path / "out"), **told | options)
    return Watched(model, arguments, data_collator=together, train_dataset=SENTENCES, eval_dataset=SENTENCES[:6])


def recorded(path, build, together=collate, **options):
    """Trains twice, plain and recorded, and returns the recording of the second."""

    def train():
        trainer = trainer_of(path, build(), together, **options)
        trainer.train()
        assert len(trainer.made) == trainer.state.global_step
        return weights_of(trainer.model), trainer.made

    return same_and_right(train)


def task_of(build, criterion=None, together=collate):
    return trajrec.Task.supervised(build, SENTENCES, SENTENCES[:6], criterion, collate=together, **READ)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.1},
        {"warmup_steps": 4, "lr_scheduler_type": "cosine"},
        {"eval_strategy": "steps", "eval_steps": 2},
        {"label_smoothing_factor": 0.2},
    ],
    ids=["plain", "accumulation", "clipping", "warm-up", "evaluation", "label-smoothing"],
)
def test_a_classifier(tmp_path, options):
    def build():
        return classifier(dropout=0.1)

    def smoothed(outputs, labels):
        return cross_entropy(outputs.logits, labels, reduction="none", label_smoothing=0.2)

    sink = recorded(tmp_path, build, **options)
    certified(sink, task_of(build, smoothed if "label_smoothing_factor" in options else None))


def test_sentences_grouped_by_length(tmp_path):
    new = "train_sampling_strategy" in transformers.TrainingArguments.__dataclass_fields__
    options = {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
    certified(recorded(tmp_path, classifier, **options), task_of(classifier))


def tokens_by_number(model, batch):
    """The Trainer divides by how many labels there are, of which the first predicts nothing: sum / count, [B]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return losses.sum(1) / labels_of(batch)


def labels_of(batch):
    return (batch["labels"] != -100).sum(1)


DRIFTS = pytest.mark.xfail(
    raises=DriftError, strict=True, reason="the replay stops at the epoch's last step, whose losses agree: unexplained"
)


@pytest.mark.parametrize(("every", "dropout"), [(1, 0.0), (1, 0.1), pytest.param(2, 0.0, marks=DRIFTS)])
def test_a_language_model(tmp_path, every, dropout):
    def build():
        return language_model(dropout)

    sink = recorded(tmp_path, build, next_words, gradient_accumulation_steps=every)
    data = {"train": SENTENCES, "test": SENTENCES[:6], "collate": next_words}
    certified(sink, trajrec.Task(build, loss=tokens_by_number, weight=labels_of, **data))
    with pytest.raises(trajrec.TrajrecError, match="loss differs"):  # which divides by the labels that are predicted
        certified(sink, task_of(build, trajrec.next_tokens, next_words))


def test_resumed_from_its_own_checkpoint(tmp_path):
    """Cut off after step 5, taken up at the checkpoint of step 4: the recording is that of the whole training."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_grad_norm": 0.1}

    class Off(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = trainer_of(tmp_path / "whole", classifier(0.1), **options)
    whole.train()
    first = trainer_of(tmp_path, classifier(0.1), **options)
    first.add_callback(Off())
    with pytest.raises(KeyboardInterrupt), trajrec.record(tmp_path / "run.h5"):
        first.train()
    again = trainer_of(tmp_path, classifier(0.1), **options)
    with trajrec.record(tmp_path / "run.h5", resume=True):
        again.train(resume_from_checkpoint=os.path.join(tmp_path, "out", "checkpoint-4"))
    assert all(map(torch.equal, weights_of(whole.model), weights_of(again.model)))
    with trajrec.open(tmp_path / "run.h5") as run:
        assert [sorted(run.sample_ids(t).tolist()) for t in range(1, run.steps + 1)] == list(map(sorted, whole.made))
        found = contributions(run, task_of(lambda: classifier(0.1)), targets="mean")
    assert found.exact, found.certificate.sentence


def test_contributions_are_those_of_training_again(tmp_path):
    """Central differences: the sample's loss counts a little more, in the Trainer's loop, in float64."""
    chosen, eps = [0, 7, 13], 1e-5
    steps = {"max_steps": 5, "max_grad_norm": 0.5, "warmup_steps": 2, "weight_decay": 0.1}
    found = contributions_of(recorded(tmp_path, classifier, **steps), chosen)

    class Weighed(Watched):
        sample, more = 0, 0.0

        def compute_loss(self, model, inputs, *args, **named):
            numbers, labels = inputs["input_ids"][:, 0] - 1, inputs["labels"]
            losses = cross_entropy(
                model(inputs["input_ids"], inputs["attention_mask"]).logits, labels, reduction="none"
            )
            return (losses * (1 + self.more * (numbers == self.sample))).mean()

    def target(sample, more):
        trainer = trainer_of(tmp_path, classifier().double(), **steps)
        trainer.__class__ = Weighed
        trainer.sample, trainer.more = sample, more
        trainer.train()
        batch = collate(SENTENCES[:6])
        with torch.no_grad():
            logits = trainer.model.eval()(batch["input_ids"], batch["attention_mask"]).logits
        return cross_entropy(logits, batch["labels"]).item()

    for sample, value in zip(chosen, found, strict=True):
        slope = (target(sample, eps) - target(sample, -eps)) / (2 * eps)
        assert value == pytest.approx(-slope, rel=1e-2, abs=1e-6)


def contributions_of(sink, chosen):
    found = certified(sink, task_of(classifier))
    return np.asarray(found.values).reshape(-1)[chosen]
