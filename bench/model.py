"""The benchmark models: a small pre-norm transformer, causal or not, and a small convolutional net."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Tokens in, next-token logits out: `(batch, context)` int64 to `(batch, context, vocabulary)`."""

    def __init__(self, width: int, layers: int, heads: int, context: int, vocabulary: int = 256, tied: bool = False):
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token_embedding.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token_embedding(x) + self.position_embedding(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class VisionTransformer(nn.Module):
    """Images of 8 × 8 in 16 patches of 2 × 2, class logits out: `(batch, 8, 8)` to `(batch, classes)`."""

    def __init__(self, width: int, layers: int, heads: int, classes: int = 10):
        super().__init__()
        self.patch_embedding = nn.Linear(4, width)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        h = self.patch_embedding(patches) + self.position_embedding
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


class ConvNet(nn.Module):
    """Images of 8 × 8 through five convolutions to 2 × 2, class logits out: `(batch, 8, 8)` to `(batch, classes)`. Every layer
    has a bias, and there is no normalization."""

    def __init__(self, width: int, classes: int = 10):
        super().__init__()
        channels, strides = (1, width // 4, width // 4, width // 2, width // 2, width), (1, 1, 2, 1, 2)
        pairs = zip(channels[:-1], channels[1:], strides, strict=True)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride, padding=1) for a, b, stride in pairs)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1)
        for convolution in self.convolutions:
            h = F.gelu(convolution(h))
        return self.head(h.flatten(1))
