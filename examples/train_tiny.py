"""Train a small language model on Python's own manual: `python examples/train_tiny.py [--device cpu] [--out DIR]`.

The model is trained three times, from one seed and on the same batches. Nothing differs but the attention: attngen's in
bf16, torch's in f32, and torch's in bf16, which tells how far curves drift apart because numbers are rounded. Losses go
to train_tiny.csv in DIR and, where matplotlib is installed, to train_tiny.png. On the CPU attngen is its simulator,
and the model is smaller still.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import attngen

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From q, k and v, each (batch, length, heads, head_dim) in f32, to what every head read, of the same shape."""


def with_attngen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in bf16. It is differentiated like any function of torch; the rest of the model stays f32."""
    return attngen.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), "causal").float()


def with_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as a textbook has it: all scores in memory, in f32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def with_torch_in_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's FlashAttention in bf16, which rounds what attngen rounds."""
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).float()


ATTENTIONS: dict[str, Attention] = {
    "attngen bf16": with_attngen,
    "torch f32": with_torch,
    "torch bf16": with_torch_in_bf16,
}


@dataclass(frozen=True)
class Sizes:
    """What is trained, and for how long.

    Attributes:
        length: characters of a text, of which `batch` make a step.
        rate: of learning, at the first step; it falls to 0 by the last.
    """

    steps: int = 200
    batch: int = 16
    length: int = 256
    heads: int = 4
    head_dim: int = 64
    layers: int = 2
    rate: float = 2e-3

    @property
    def width(self) -> int:
        """Numbers that stand for a character inside the model."""
        return self.heads * self.head_dim


ON = {"cuda": Sizes(), "cpu": Sizes(steps=40, batch=4, length=48, heads=2, head_dim=32, rate=3e-3)}
"""By device: the CPU's are of a size for the simulator."""


class Layer(nn.Module):
    """Attention and then a perceptron, each added to its input."""

    def __init__(self, sizes: Sizes, attention: Attention) -> None:
        super().__init__()
        width = sizes.width
        self.heads, self.attention = sizes.heads, attention
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.make_qkv, self.merge = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, length, width) to the same."""
        qkv = self.make_qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        x = x + self.merge(self.attention(*qkv.unbind(2)).flatten(2))
        return x + self.perceptron(self.before_perceptron(x))


class Model(nn.Module):
    """A transformer that guesses the next character of a text."""

    def __init__(self, characters: int, sizes: Sizes, attention: Attention) -> None:
        super().__init__()
        self.of_character = nn.Embedding(characters, sizes.width)
        self.of_place = nn.Embedding(sizes.length, sizes.width)
        self.layers = nn.Sequential(*(Layer(sizes, attention) for _ in range(sizes.layers)))
        self.guess = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, characters))

    def forward(self, text: Tensor) -> Tensor:
        """Scores of each character to come next, (batch, length, characters), of a text (batch, length)."""
        places = torch.arange(text.shape[1], device=text.device)
        guesses: Tensor = self.guess(self.layers(self.of_character(text) + self.of_place(places)))
        return guesses


def manual() -> tuple[Tensor, int]:
    """The manual that `help()` prints from, as numbers of characters, and how many characters there are."""
    text = "\n".join(topics[name] for name in sorted(topics))
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


def train(attention: Attention, sizes: Sizes, device: str, seed: int = 0) -> list[float]:
    """The loss of every step, in nats a character; a seed fixes the first weights and all batches."""
    text, characters = manual()
    torch.manual_seed(seed)
    model = Model(characters, sizes, attention).to(device)
    batches = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), sizes.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, sizes.steps)
    losses = []
    for _ in range(sizes.steps):
        starts = torch.randint(len(text) - sizes.length, (sizes.batch, 1), generator=batches)
        drawn = text[starts + torch.arange(sizes.length + 1)].to(device)
        loss = cross_entropy(model(drawn[:, :-1]).flatten(0, 1), drawn[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def smooth(losses: list[float], over: int = 10) -> Tensor:
    """Means of so many steps in a row: what a step's own batch adds is mostly gone."""
    return torch.tensor(losses, dtype=torch.float64).unfold(0, over, 1).mean(-1)


def distance(losses: list[float], others: list[float]) -> float:
    """How far two smoothed curves lie apart, as the root of the mean square, in nats."""
    return float((smooth(losses) - smooth(others)).square().mean().sqrt())


def write(curves: dict[str, list[float]], folder: Path) -> list[Path]:
    """Write the losses as a table and, where matplotlib is installed, as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "train_tiny.csv", folder / "train_tiny.png"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([tuple(curves), *zip(*curves.values(), strict=True)])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed, so there is a table and no picture")
        return [table]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, losses) in enumerate(curves.items()):
        axes.plot(smooth(losses), ("-", "--", ":")[i], label=name)  # they lie upon each other
    axes.set(xlabel="step", ylabel="loss, nats a character, mean of ten steps")
    axes.legend()
    figure.savefig(picture, dpi=150)
    return [table, picture]


def main() -> None:
    """Train with each attention, and say how far apart the curves lie."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=ON, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build"))
    given = parser.parse_args()
    curves = {}
    for name, attention in ATTENTIONS.items():
        curves[name] = train(attention, ON[given.device], given.device)
        print(f"{name}: from {curves[name][0]:.3f} to {smooth(curves[name])[-1]:.3f} nats a character")
    for name in ("attngen bf16", "torch bf16"):
        print(f"{name} and torch f32 lie {distance(curves[name], curves['torch f32']):.1e} nats apart")
    print("written:", *write(curves, given.out))


if __name__ == "__main__":
    main()
