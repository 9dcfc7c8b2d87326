"""A user's project in a folder: a training script of their own and a task file, as the README tells to write them."""

TRAIN = """
import sys
import torch
from net import data, Net

torch.manual_seed(0)
train_set, test_set = data()
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
loader = torch.utils.data.DataLoader(train_set, batch_size=8, shuffle=True)
for epoch in range(int(sys.argv[sys.argv.index("--epochs") + 1]) if "--epochs" in sys.argv else 2):
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in torch.utils.data.DataLoader(test_set, 10))
    model.train()
    print("accuracy", right / len(test_set), __name__)
torch.save(model.state_dict(), "final.pt")
"""

NET = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, hidden=6):
        super().__init__(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3))

def data(n=30, flip=0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n + 12, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    y[:flip] = (y[:flip] + 1) % 3
    cut = torch.utils.data.TensorDataset
    return cut(x[:n], y[:n]), cut(x[n:], y[n:])
"""

TASK = """
import torch
import trajrec
from net import data, Net

train_set, test_set = data()
task = trajrec.Task.supervised(Net, train_set, test_set)
"""

# The same, with the losses of samples as those of a token each.
AS_TOKENS = TASK.replace(
    "test_set)",
    "test_set, tokens=lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1], reduction='none')[:, None])",
)

# Tasks that do not describe the training, each in its own way.
WRONG = {
    "not_a_task": "task = 3",
    "broken": "import no_such_module_anywhere",
    "other_shapes": TASK.replace("supervised(Net,", "supervised(lambda: Net(7),"),
    "other_names": TASK.replace("supervised(Net,", "supervised(lambda: torch.nn.Linear(4, 3),"),
    "short_data": TASK.replace("data()", "data(20)"),
    "changed_labels": TASK.replace("data()", "data(flip=30)"),
    "summed_loss": TASK.replace(
        "test_set)", "test_set, lambda o, y: 8 * torch.nn.CrossEntropyLoss(reduction='none')(o, y))"
    ),
    "mean_loss": TASK.replace("test_set)", "test_set, torch.nn.functional.cross_entropy)"),
    "no_test": TASK.replace(", test_set)\n", ")\n"),
    "no_data_set": TASK.replace("supervised(Net, train_set", "supervised(Net, 5"),
    "no_model": TASK.replace("supervised(Net,", "supervised(lambda: 5,"),
}


def write(folder):
    """Writes the project into a folder."""
    for name, text in {"train": TRAIN, "net": NET, "task": TASK, "as_tokens": AS_TOKENS, **WRONG}.items():
        (folder / f"{name}.py").write_text(text)
