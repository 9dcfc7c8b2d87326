"""Every module and loss of torch.nn, with what the derivative of a training that goes through it rests on."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.replay.session import Session
from trajrec.sink import MemorySink
from trajrec.task.task import Task

N, D = 6, 8
PROVED, DIFFERENCES = "proved", "by differences"


class Through(nn.Module):
    """Weights, the module, weights; the module sees values of a shape [B, *shape]."""

    def __init__(self, module, shape=(D,), take=lambda y: y):
        super().__init__()
        self.shape, self.take, self.module = shape, take, module
        self.before = nn.Linear(D, int(torch.Size(shape).numel()))
        with torch.no_grad():
            self.before.bias.normal_()
            width = self.inner(torch.randn(2, D, dtype=torch.get_default_dtype())).flatten(1).shape[1]
        self.after = nn.Linear(width, 3)

    def inner(self, x):
        return self.take(self.module(self.before(x).view(-1, *self.shape)))

    def forward(self, x):
        return self.after(self.inner(x).flatten(1))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def prove(build, loss=cross_entropy):
    """The second proof of a training of two steps, in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(1)
        data = TensorDataset(torch.randn(N, D), torch.randint(0, 3, (N,)))
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sink, loader = MemorySink(interval=2), DataLoader(data, 3)
        with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
            for batch in loader:
                optimizer.zero_grad()
                loss(model, batch).mean().backward()
                optimizer.step()
        session = Session(MemoryRun(sink), Task(build, data, data, loss=loss))
        session.prove_derivative(forwards=False)
    finally:
        torch.set_default_dtype(before)
    return session.derivative


ACTIVATIONS = {
    nn.CELU: PROVED,
    nn.ELU: PROVED,
    nn.GELU: PROVED,
    nn.GLU: PROVED,
    nn.Hardshrink: PROVED,
    nn.Hardsigmoid: PROVED,
    nn.Hardswish: PROVED,
    nn.Hardtanh: PROVED,
    nn.Identity: PROVED,
    nn.LeakyReLU: PROVED,
    nn.LogSigmoid: PROVED,
    nn.LogSoftmax: PROVED,
    nn.Mish: PROVED,
    nn.PReLU: PROVED,
    nn.RReLU: PROVED,
    nn.ReLU: PROVED,
    nn.ReLU6: PROVED,
    nn.SELU: PROVED,
    nn.SiLU: PROVED,
    nn.Sigmoid: PROVED,
    nn.Softmax: PROVED,
    nn.Softmin: PROVED,
    nn.Softplus: PROVED,
    nn.Softshrink: PROVED,
    nn.Softsign: PROVED,
    nn.Tanh: PROVED,
    nn.Tanhshrink: PROVED,
}


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_activations(kind):
    takes_dim = "dim" in inspect.signature(kind).parameters
    assert prove(lambda: Through(kind(dim=1) if takes_dim else kind())).verdict == ACTIVATIONS[kind]


LAYERS = {
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), (2, 5), PROVED),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (2, 5, 5), PROVED),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), (1, 3, 3, 3), PROVED),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(2), (2, 5), PROVED),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), (2, 5, 5), PROVED),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(2), (1, 3, 3, 3), PROVED),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.3), (D,), PROVED),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), (2, 4), PROVED),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), (2, 4, 4), PROVED),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), (1, 4, 4, 4), PROVED),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(D), (D,), PROVED),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), (2, 3, 3), PROVED),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), (2, 2, 2, 2), PROVED),
    "Bilinear": (lambda: Pair(nn.Bilinear(4, 4, 3)), (2, 4), PROVED),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), (4, 3, 3), PROVED),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 2), (2, 4), PROVED),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 2, groups=1, dilation=2), (2, 4, 4), PROVED),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3), PROVED),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 2), (2, 4), PROVED),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 3, 3), PROVED),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2), PROVED),
    "CosineSimilarity": (lambda: Pair(nn.CosineSimilarity(dim=1)), (2, 4), PROVED),
    "Dropout": (lambda: nn.Dropout(0.3), (D,), PROVED),
    "Dropout1d": (lambda: nn.Dropout1d(0.3), (2, 4), PROVED),
    "Dropout2d": (lambda: nn.Dropout2d(0.3), (2, 3, 3), PROVED),
    "Dropout3d": (lambda: nn.Dropout3d(0.3), (2, 2, 2, 2), PROVED),
    "Embedding": (lambda: Words(nn.Embedding(9, 4)), (D,), PROVED),
    "EmbeddingBag": (lambda: Words(nn.EmbeddingBag(9, 4)), (D,), DIFFERENCES),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.3), (2, 4), PROVED),
    "Flatten": (nn.Flatten, (2, 4), PROVED),
    "Fold": (lambda: nn.Fold((3, 3), 2), (4, 4), PROVED),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=2), (1, 5, 5), PROVED),
    "FractionalMaxPool3d": (lambda: nn.FractionalMaxPool3d(2, output_size=2), (1, 4, 4, 4), PROVED),
    "GRU": (lambda: Sequence(nn.GRU(4, 3, batch_first=True)), (2, 4), PROVED),
    "GRUCell": (lambda: nn.GRUCell(D, 3), (D,), PROVED),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3), PROVED),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(2, affine=True), (2, 5), PROVED),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2, track_running_stats=True), (2, 3, 3), PROVED),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2), (2, 2, 2, 2), PROVED),
    "LPPool1d": (lambda: nn.LPPool1d(2, 2), (2, 4), PROVED),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), (1, 4, 4), PROVED),
    "LPPool3d": (lambda: nn.LPPool3d(2, 2), (1, 4, 4, 4), PROVED),
    "LSTM": (lambda: Sequence(nn.LSTM(4, 3, batch_first=True)), (2, 4), PROVED),
    "LSTMCell": (lambda: Sequence(nn.LSTMCell(D, 3)), (D,), PROVED),
    "LayerNorm": (lambda: nn.LayerNorm(D), (D,), PROVED),
    "Linear": (lambda: nn.Linear(D, 4), (D,), PROVED),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), (4, 3), PROVED),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), (2, 4), PROVED),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (2, 4, 4), PROVED),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), (1, 4, 4, 4), PROVED),
    "MaxUnpool2d": (lambda: Unpooled(), (1, 4, 4), PROVED),
    "MultiheadAttention": (lambda: Attending(), (3, 4), PROVED),
    "PairwiseDistance": (lambda: Pair(nn.PairwiseDistance()), (2, 4), PROVED),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (4, 2, 2), PROVED),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (1, 4, 4), PROVED),
    "RMSNorm": (lambda: nn.RMSNorm(D), (D,), PROVED),
    "RNN": (lambda: Sequence(nn.RNN(4, 3, batch_first=True)), (2, 4), PROVED),
    "RNNCell": (lambda: nn.RNNCell(D, 3), (D,), PROVED),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), (1, 3, 3), PROVED),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d(1), (1, 3, 3), PROVED),
    "CircularPad2d": (lambda: nn.CircularPad2d(1), (1, 3, 3), PROVED),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), (1, 3, 3), PROVED),
    "Softmax2d": (nn.Softmax2d, (2, 3, 3), PROVED),
    "Threshold": (lambda: nn.Threshold(0.1, 0.2), (D,), PROVED),
    "TransformerDecoderLayer": (lambda: Decoding(), (3, 4), PROVED),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 4), PROVED),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 4)), (D,), PROVED),
    "Unfold": (lambda: nn.Unfold(2), (1, 3, 3), PROVED),
    "Upsample nearest": (lambda: nn.Upsample(scale_factor=2), (1, 3, 3), PROVED),
    "Upsample bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (1, 3, 3), PROVED),
    "Upsample bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (1, 3, 3), PROVED),
    "cdist": (lambda: Nearest(), (2, 4), DIFFERENCES),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, 4)), (D,), PROVED),
    "weight_norm (old)": (lambda: nn.utils.weight_norm(nn.Linear(D, 4)), (D,), PROVED),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(D, 4)), (D,), PROVED),
    "grid_sample": (lambda: Sampled(), (1, 4, 4), PROVED),
}


class Pair(nn.Module):
    """A module of two inputs."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        y = self.module(x[:, 0], x[:, 1])
        return torch.stack([y, y], 1) if y.dim() == 1 else y


class Words(nn.Module):
    """A module of tokens, and of the values beside it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        tokens = (torch.arange(2 * len(x)) % 9).view(-1, 2)
        return torch.cat([x, self.module(tokens).flatten(1)], 1)


class Sequence(nn.Module):
    """The first of several results."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


class Attending(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self):
        super().__init__()
        self.module = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.module(x, x, x, need_weights=False)[0]


class Decoding(nn.Module):
    """A decoder that looks at what it decodes."""

    def __init__(self):
        super().__init__()
        self.module = nn.TransformerDecoderLayer(4, 2, 8, dropout=0.2, batch_first=True)

    def forward(self, x):
        return self.module(x, x * 0.5)


class Unpooled(nn.Module):
    """Max-pooling and back."""

    def forward(self, x):
        y, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, places, 2)


class Nearest(nn.Module):
    """Distances to points."""

    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return torch.cdist(x, self.points)


class Sampled(nn.Module):
    """Pictures looked at between their pixels."""

    def forward(self, x):
        grid = torch.linspace(-0.7, 0.7, 8).view(1, 2, 2, 2).expand(len(x), 2, 2, 2)
        return F.grid_sample(x, grid + 0.01 * x.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1), align_corners=False)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    build, shape, verdict = LAYERS[name]
    assert prove(lambda: Through(build(), shape)).verdict == verdict


def loss(function):
    return lambda model, batch: function(model(batch[0]), batch[1])


def like(z, y):
    return F.one_hot(y, 3).to(z.dtype) + 0.1


def sure(z, y):
    return F.one_hot(y, 3).to(z.dtype)


def signs(z, y):
    return 2.0 * F.one_hot(y, 3).to(z.dtype) - 1


def mean_of(function):
    return lambda z, y: function(z, y).reshape(len(z), -1).mean(1)


def ctc(z, y):
    logs = z.view(-1, 1, 3).expand(-1, 4, 3).transpose(0, 1).log_softmax(-1)
    lengths = torch.full((len(z),), 4), torch.full((len(z),), 1)
    return F.ctc_loss(logs, 1 + y[:, None] % 2, *lengths, reduction="none")


def triplet(function):
    return lambda z, y: function(z, z.roll(1, 1) + 0.1, z.roll(2, 1) * 0.7)


LOSSES = {
    "BCELoss": (mean_of(lambda z, y: F.binary_cross_entropy(z.sigmoid(), sure(z, y), reduction="none")), PROVED),
    "BCEWithLogitsLoss": (
        mean_of(lambda z, y: F.binary_cross_entropy_with_logits(z, sure(z, y), reduction="none")),
        PROVED,
    ),
    "CTCLoss": (ctc, DIFFERENCES),
    "CosineEmbeddingLoss": (
        lambda z, y: F.cosine_embedding_loss(z, z.roll(1, 1), 2 * (y > 0).long() - 1, reduction="none"),
        PROVED,
    ),
    "CrossEntropyLoss": (lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1), PROVED),
    "GaussianNLLLoss": (
        mean_of(lambda z, y: F.gaussian_nll_loss(z, like(z, y), z.roll(1, 1).exp(), reduction="none")),
        PROVED,
    ),
    "HingeEmbeddingLoss": (mean_of(lambda z, y: F.hinge_embedding_loss(z, signs(z, y), reduction="none")), PROVED),
    "HuberLoss": (mean_of(lambda z, y: F.huber_loss(z, like(z, y), reduction="none")), PROVED),
    "KLDivLoss": (mean_of(lambda z, y: F.kl_div(z.log_softmax(1), like(z, y), reduction="none")), PROVED),
    "L1Loss": (mean_of(lambda z, y: F.l1_loss(z, like(z, y), reduction="none")), PROVED),
    "MSELoss": (mean_of(lambda z, y: F.mse_loss(z, like(z, y), reduction="none")), PROVED),
    "MarginRankingLoss": (
        lambda z, y: F.margin_ranking_loss(z[:, 0], z[:, 1], 2.0 * (y > 0) - 1, reduction="none"),
        PROVED,
    ),
    "MultiLabelMarginLoss": (
        lambda z, y: F.multilabel_margin_loss(z, F.pad(y[:, None], (0, 2), value=-1), reduction="none"),
        DIFFERENCES,
    ),
    "MultiLabelSoftMarginLoss": (
        lambda z, y: F.multilabel_soft_margin_loss(z, sure(z, y), reduction="none"),
        PROVED,
    ),
    "MultiMarginLoss": (lambda z, y: F.multi_margin_loss(z, y, reduction="none"), DIFFERENCES),
    "NLLLoss": (lambda z, y: F.nll_loss(z.log_softmax(1), y, reduction="none"), PROVED),
    "PoissonNLLLoss": (mean_of(lambda z, y: F.poisson_nll_loss(z, like(z, y), reduction="none")), PROVED),
    "SmoothL1Loss": (mean_of(lambda z, y: F.smooth_l1_loss(z, like(z, y), reduction="none")), PROVED),
    "SoftMarginLoss": (mean_of(lambda z, y: F.soft_margin_loss(z, signs(z, y), reduction="none")), PROVED),
    "TripletMarginLoss": (triplet(lambda *v: F.triplet_margin_loss(*v, reduction="none")), PROVED),
    "TripletMarginWithDistanceLoss": (
        triplet(lambda *v: F.triplet_margin_with_distance_loss(*v, reduction="none")),
        PROVED,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    function, verdict = LOSSES[name]
    assert prove(lambda: Through(nn.Tanh()), loss(function)).verdict == verdict


LEFT_OUT = {
    # containers, lazy and parametrised twins of what is above, 1d and 3d twins of paddings and upsampling
    "Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential", "Buffer",
    "Parameter", "UninitializedBuffer", "UninitializedParameter", "DataParallel", "SyncBatchNorm", "RNNBase",
    "RNNCellBase", "Transformer", "TransformerDecoder", "TransformerEncoder", "NLLLoss2d", "CrossMapLRN2d",
    "AdaptiveLogSoftmaxWithLoss", "MaxUnpool1d", "MaxUnpool3d", "UpsamplingBilinear2d", "UpsamplingNearest2d",
    "LinearCrossEntropyLoss",
}  # fmt: skip


def test_every_module_of_torch_has_its_verdict():
    known = {kind.__name__ for kind in ACTIVATIONS} | set(LAYERS) | set(LOSSES) | LEFT_OUT
    kinds = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    missing = {n for n in kinds - known if not n.startswith("Lazy") and "Pad" not in n and n != "Upsample"}
    assert not missing
