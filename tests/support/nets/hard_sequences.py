"""Hard networks with recurrent layers, tied and computed weights, and less common operators."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from support.nets.hard_register import Images, Tokens, conv, hard


@hard(3)
class TwoLSTMs(Tokens):
    """Two layers, both directions."""

    head_channels = 14

    def build(self) -> None:
        self.lstm = nn.LSTM(12, 7, 2, batch_first=True, bidirectional=True)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


@hard(2)
class TwoGRUs(Tokens):
    """Two layers, both directions, and the state at the end."""

    head_channels = 14

    def build(self) -> None:
        self.gru = nn.GRU(12, 7, 2, batch_first=True, bidirectional=True)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y, state = self.gru(x)
        return y + torch.cat([state[-2], state[-1]], -1)[:, None]


@hard(2)
class PlainRNN(Tokens):
    """The simplest recurrence, with an initial state that is learnt."""

    head_channels = 7

    def build(self) -> None:
        self.rnn = nn.RNN(12, 7, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 7))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x, self.start.expand(-1, x.shape[0], -1).contiguous())[0]


@hard(3)
class CRNN(nn.Module):
    """A convolution's columns as the steps of a GRU."""

    input_shape = (1, 8, 12)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = conv(1, 6), nn.BatchNorm2d(6), conv(6, 8)
        self.gru = nn.GRU(8 * 4, 9, batch_first=True, bidirectional=True)
        self.head = nn.Linear(18, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(torch.relu(self.second(torch.relu(self.norm(self.first(x))))), (2, 1))
        x = x.permute(0, 3, 1, 2).flatten(2)
        return self.head(self.gru(x)[0][:, -1])


@hard(2)
class Activations(Images):
    """Mish, SiLU, GELU in both forms, softplus, ELU, a slope per channel, hard and soft."""

    def build(self) -> None:
        self.second, self.slope = conv(8, 8), nn.PReLU(8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.mish(x) + functional.silu(x) - functional.gelu(x) * functional.gelu(x, approximate="tanh")
        x = self.slope(self.second(x))
        x = functional.softplus(x) + functional.elu(x) + functional.hardtanh(x) + functional.softsign(x)
        return x + x.erf() + x.sin() * x.cos() + x.floor() * 0.1 + x.sign() + torch.where(x > 0.3, x, x * x)


@hard(1)
class TiedWeights(Tokens):
    """One matrix used twice, as it is and transposed."""

    def build(self) -> None:
        self.coder = nn.Linear(12, 9, bias=False)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.coder(x)) @ self.coder.weight + x


@hard(2)
class BilinearPair(Tokens):
    """A product of two layers and a third-order tensor."""

    head_channels = 7

    def build(self) -> None:
        self.a, self.b, self.both = nn.Linear(12, 8), nn.Linear(12, 6), nn.Bilinear(8, 6, 7)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(torch.relu(self.a(x)), torch.relu(self.b(x)))


@hard(2)
class LowRank(Images):
    """A weight that is the product of two others, and scaled."""

    def build(self) -> None:
        self.left, self.right = nn.Parameter(torch.randn(8, 5) * 0.5), nn.Parameter(torch.randn(5, 8) * 0.5)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.left @ self.right * 0.5)[:, :, None, None]
        return torch.relu(functional.conv2d(x, weight))


@hard(2)
class SecondMoments(Images):
    """Products of channels with channels, flattened: one of the two axes stays."""

    head_channels = 24

    def build(self) -> None:
        self.a, self.b = conv(8, 6), conv(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        products = self.a(x).flatten(2) @ self.b(x).flatten(2).transpose(1, 2)
        return self.head(products.flatten(1) / 64)


@hard(2)
class Distances(Tokens):
    """Squared distances to learnt prototypes: sums over channels."""

    def build(self) -> None:
        self.coder = nn.Linear(12, 8)
        self.prototypes = nn.Parameter(torch.randn(7, 8))

    head_channels = 7

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        apart = torch.relu(self.coder(x))[:, :, None, :] - self.prototypes
        return torch.exp(-apart.square().sum(-1) * 0.1)


@hard(1)
class MaskedTokens(Tokens):
    """Comparisons and choices that depend on the data."""

    def build(self) -> None:
        self.second = nn.Linear(12, 12)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(x))
        return torch.where((y > x) & ~(x < 0), y, torch.minimum(x, y * 2).clamp(-1, 1))
