"""The training tasks: next byte of English text, and scikit-learn's digits under noise, by a transformer or a small conv net.

A task makes its model and its training batches from seeds alone, and measures every method on the same evaluation set.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_ops.bench.model import ConvNet, LanguageModel, VisionTransformer


@dataclass(frozen=True)
class Preset:
    width: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    vocabulary: int = 256  # of which bytes use the first 256
    tied: bool = False  # the head is the token embedding


TEXT_PRESETS = {
    "tiny": Preset(width=32, layers=1, heads=2, context=32, batch=8, steps=20),
    "default": Preset(width=96, layers=3, heads=4, context=64, batch=24, steps=250),
    "wide": Preset(width=256, layers=2, heads=4, context=64, batch=24, steps=150),
    "gpu": Preset(width=512, layers=8, heads=8, context=512, batch=64, steps=1000),
    "gpu-large": Preset(width=1024, layers=12, heads=16, context=1024, batch=64, steps=2000),
    # 124 million parameters.
    "gpt2": Preset(width=768, layers=12, heads=12, context=1024, batch=32, steps=600, vocabulary=50257, tied=True),
}
DIGITS_PRESETS = {
    "tiny": Preset(width=32, layers=1, heads=2, context=16, batch=16, steps=20),
    "default": Preset(width=64, layers=4, heads=4, context=16, batch=64, steps=200),
}
EVALUATION_BATCHES = 12


def read_text(source: str | None) -> bytes:
    """The bytes of a file, of every text file below a folder in name order, or of the English text inside Python."""
    if source is None:
        from pydoc_data.topics import topics

        return "".join(topics[name] for name in sorted(topics)).encode()
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in {".txt", ".md", ".rst", ".py", ".html"})
        return b"".join(p.read_bytes() for p in files)
    if not path.is_file():
        raise FileNotFoundError(f"--data {source}: no such file or folder")
    return path.read_bytes()


class Text:
    """Loss: mean cross-entropy per byte in nats; validation is the last tenth of the text."""

    name = "text"

    def __init__(self, preset: str = "default", data: str | None = None, device: str = "cpu"):
        self.preset, self.device = TEXT_PRESETS[preset], device
        content = bytearray(read_text(data))
        cut = int(0.9 * len(content))
        if len(content) - cut <= self.preset.context + 1:
            raise ValueError(f"{len(content)} bytes of text are too few for a context of {self.preset.context}")
        text = torch.frombuffer(content, dtype=torch.uint8)
        self.training, self.validation = text[:cut], text[cut:]
        generator = torch.Generator().manual_seed(2)
        self.evaluation_set = [self._draw(self.validation, generator) for _ in range(EVALUATION_BATCHES)]

    def _draw(self, text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text) - self.preset.context - 1, (self.preset.batch, 1), generator=generator)
        windows = text[starts + torch.arange(self.preset.context + 1)].to(self.device).long()
        return windows[:, :-1], windows[:, 1:]

    def model(self) -> nn.Module:
        p = self.preset
        return LanguageModel(p.width, p.layers, p.heads, p.context, p.vocabulary, p.tied).to(self.device)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._draw(self.training, generator)


class Digits:
    """Loss: mean cross-entropy in nats on 8 × 8 digits under Gaussian noise of 0.3.

    What is measured is optimization, so the evaluation set is the training images under fixed noise.
    """

    name = "digits"

    def __init__(self, preset: str = "default", data: str | None = None, device: str = "cpu"):
        from sklearn.datasets import load_digits

        if data is not None:
            raise ValueError("the digits task has its own data: leave --data out")
        self.preset, self.device = DIGITS_PRESETS[preset], device
        images, labels = load_digits(return_X_y=True)
        keep = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1200]
        self.images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8)[keep]
        self.labels = torch.tensor(labels)[keep]
        generator = torch.Generator().manual_seed(2)
        noisy = self.images + 0.3 * torch.randn(self.images.shape, generator=generator)
        self.evaluation_set = [(noisy.to(device), self.labels.to(device))]

    def model(self) -> nn.Module:
        p = self.preset
        return VisionTransformer(p.width, p.layers, p.heads).to(self.device)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        i = torch.randint(len(self.images), (self.preset.batch,), generator=generator)
        noise = 0.3 * torch.randn((self.preset.batch, 8, 8), generator=generator)
        return (self.images[i] + noise).to(self.device), self.labels[i].to(self.device)


class DigitsConv(Digits):
    """The same images by a convolutional net."""

    name = "digits-conv"

    def model(self) -> nn.Module:
        return ConvNet(self.preset.width).to(self.device)


TASKS: dict[str, type[Text] | type[Digits]] = {task.name: task for task in (Text, Digits, DigitsConv)}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy; on a GPU products are in bf16, as they are where such models are trained."""
    x, y = batch
    with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
        logits = model(x)
    return F.cross_entropy(logits.float().flatten(0, -2), y.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, task: Text | Digits) -> float:
    return sum(loss(model, batch).item() for batch in task.evaluation_set) / len(task.evaluation_set)
