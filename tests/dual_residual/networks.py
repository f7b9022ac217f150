"""Small blocks and stacks, and steps with them."""

import torch
from torch import nn

from revbifpn.dual_residual import DualResidualSequence

F64, F32 = torch.float64, torch.float32


class Attention(nn.Module):
    """A pre-norm transformer block; ``mask`` and ``scale`` are arguments besides x, ``drop`` is random."""

    def __init__(self, width=16, drop=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(drop)

    def forward(self, x, mask=None, *, scale=1.0):
        h = self.norm1(x)
        x = x + self.drop(self.attention(h, h, h, need_weights=False, attn_mask=mask)[0]) * scale
        return x + self.drop(self.mlp(self.norm2(x)))


class Residual(nn.Module):
    """A convolutional block with BatchNorm."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def attention_blocks(depth=4, dtype=F32, width=16, drop=0.0):
    torch.manual_seed(0)
    return [Attention(width, drop).to(dtype) for _ in range(depth)]


def convolutional_blocks(depth=4, dtype=F32):
    torch.manual_seed(0)
    return [Residual().to(dtype) for _ in range(depth)]


BLOCKS = {"attention": attention_blocks, "convolution": convolutional_blocks}
SHAPES = {"attention": (2, 5, 16), "convolution": (2, 6, 5, 7)}


def tokens(dtype=F32, shape=(2, 5, 16), seed=1):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stack(alpha=0.5, beta=0.5, depth=4, dtype=F32, blocks=attention_blocks, drop=None, **options):
    more = {} if drop is None else {"drop": drop}
    return DualResidualSequence(*blocks(depth, dtype, **more), alpha=alpha, beta=beta, **options)


class Encoder(nn.Module):
    """A model that calls its blocks one by one, as most do."""

    def __init__(self, depth=4, drop=0.0, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(Attention(width, drop) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x, mask=None):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, mask=mask, scale=0.5)
        return self.head(self.norm(x))


def loss_of(y):
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return (y * weight).sum() + y.float().square().sum()


def step(model, x, *args, seed=3, **kwargs):
    """Result and gradients of the input and of every parameter."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x, *args, **kwargs)
    loss_of(y).backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
