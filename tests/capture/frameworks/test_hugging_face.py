"""Loops of other libraries, unchanged: the ids of every step are those of the batch that made it."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.capture.frameworks.common import Numbered, certified, numbers, same_and_right, weights_of
from trajrec.capture.recorder import Recorder
from trajrec.sink import MemorySink
from trajrec.task.task import Task
from trajrec.vision import import_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_torchvision()  # which transformers asks for
    import accelerate
    import transformers

pytestmark = pytest.mark.filterwarnings("ignore")


def ids_of(sink):
    return [sorted(record.ids.tolist()) for record in sink.records[1:]]


@pytest.mark.parametrize("prepared_first", [False, True])
@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_accelerate(every, normalises, prepared_first):
    """Its loader is one batch ahead of the loop, which makes inputs of its own from what it receives."""
    torch.manual_seed(0)
    x, y, sink, made = torch.randn(44, 4), torch.randint(0, 3, (44,)), MemorySink(), []
    model, used = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), []
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=every)

    def prepared():
        loader = DataLoader(TensorDataset(x, y, torch.arange(44)), 8, shuffle=True)
        return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loader)

    parts = prepared() if prepared_first else None
    with Recorder(sink) as recorder:
        network, optimizer, loader = parts or prepared()
        for _ in range(2):
            for a, b, ids in loader:
                with accelerator.accumulate(network):
                    accelerator.backward(cross_entropy(network((a - 0.1) / 2 if normalises else a), b))
                    used += ids.tolist()
                    if accelerator.sync_gradients:
                        made.append(sorted(used))
                        used.clear()
                    optimizer.step()
                    optimizer.zero_grad()
    assert recorder.problem is None
    assert ids_of(sink) == made
    assert len(made) == 2 * -(-6 // every)


@pytest.mark.parametrize("every", [1, 2])
def test_accelerate_with_clipping_is_replayed(every):
    def build():
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def train():
        torch.manual_seed(0)
        accelerator, made, used = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=every), [], []
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Numbered(), 8, shuffle=True))
        for x, y in _twice(loader):
            with accelerator.accumulate(model):
                used += numbers(x)
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    made.append(list(used))
                    used.clear()
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
        return weights_of(model), made

    certified(same_and_right(train), Task.supervised(build, Numbered(), Numbered()))


def _twice(loader):
    for _ in range(2):
        yield from loader


class Sentences(Dataset):
    tokens = torch.randint(1, 100, (50, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 2, (50,), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 50

    def __getitem__(self, i):
        return {
            "input_ids": self.tokens[i],
            "attention_mask": torch.ones(9, dtype=torch.long),
            "labels": self.labels[i],
        }


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("evaluates", [False, True])
def test_the_trainer_of_transformers(every, evaluates, tmp_path):
    """It calls the model by name, with dictionaries, while its loader is one batch ahead."""
    transformers.set_seed(0)
    made, sink, data = [], MemorySink(), Sentences()

    class Watched(transformers.Trainer):
        def training_step(self, model, inputs, *rest):
            made.append([int((data.tokens == row).all(1).nonzero()) for row in inputs["input_ids"]])
            return super().training_step(model, inputs, *rest)

    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=every,
        num_train_epochs=2,
        report_to=[],
        save_strategy="no",
        eval_strategy="epoch" if evaluates else "no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = transformers.BertForSequenceClassification(config)
    trainer = Watched(model, arguments, train_dataset=data, eval_dataset=data)
    with Recorder(sink) as recorder:
        trainer.train()
    assert recorder.problem is None
    assert len(sink.records) - 1 == trainer.state.global_step
    assert [i for step in sink.records[1:] for i in step.ids.tolist()] == [i for batch in made for i in batch]
