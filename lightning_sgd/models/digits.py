"""A small classifier for the handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_sgd._validation import expect, expect_one_of

Batch: TypeAlias = Sequence[Tensor] | dict[str, Tensor]
NUM_CLASSES = 10
IMAGE_SIZE = 8

Architecture: TypeAlias = Literal["mlp", "cnn"]


class DigitsClassifier(LightningModule):
    """A small network for 8×8 digits: an MLP, or a CNN that comes to more than 97 % on the test set.

    It takes batches ``(images, labels)`` or ``{"image": images, "label": labels}`` with images of 64 values each and
    minimises the cross-entropy. It logs ``train/loss`` at every step and ``val/loss``, ``val/accuracy``,
    ``test/loss``, ``test/accuracy`` over all samples of all ranks. ``predict_step`` returns class probabilities.

    It has no ``configure_optimizers``: LightningCLI's ``optimizer`` decides. Without the CLI, derive from it.

    Args:
        architecture: ``"mlp"`` for linear layers, ``"cnn"`` for 3×3 convolutions, each followed by 2×2 max pooling,
            before one linear layer.
        hidden_sizes: Width of each hidden layer, or channels of each convolution; by default one layer of 128, or
            convolutions with 16 and 32 channels.
        batch_norm: Normalise before every ReLU over the batch.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> class Trained(DigitsClassifier):
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> model = Trained(architecture="cnn", hidden_sizes=[4])
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        architecture: Architecture = "mlp",
        hidden_sizes: list[int] | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        _validate(architecture, hidden_sizes)
        build = {"mlp": _mlp, "cnn": _cnn}[architecture]
        self.net = build(hidden_sizes, batch_norm)
        # The share of correct answers; torchmetrics' default would average over the classes.
        self.val_accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of shape (n, 10) for images of shape (n, 1, 8, 8), (n, 8, 8) or (n, 64)."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Compute the cross-entropy of the batch."""
        images, labels = _unpack(batch)
        loss = cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Log loss and accuracy over the validation set."""
        self._evaluate("val", self.val_accuracy, batch)

    def test_step(self, batch: Batch) -> None:
        """Log loss and accuracy over the test set."""
        self._evaluate("test", self.test_accuracy, batch)

    def predict_step(self, batch: Batch | Tensor) -> Tensor:
        """Compute class probabilities of shape (n, 10); labels are not needed."""
        images = batch if isinstance(batch, Tensor) else _unpack(batch)[0]
        return self(images).softmax(dim=-1)  # type: ignore[no-any-return]  # Module.__call__

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: Batch) -> None:
        images, labels = _unpack(batch)
        logits = self(images)
        # The batch size is the weight of this batch in the mean: the last one is shorter.
        loss = cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=True)
        accuracy.update(logits, labels)
        self.log(f"{stage}/accuracy", accuracy, batch_size=len(labels), prog_bar=True)


def _mlp(hidden_sizes: list[int] | None, batch_norm: bool) -> nn.Sequential:
    sizes = [IMAGE_SIZE**2, *([128] if hidden_sizes is None else hidden_sizes)]
    layers: list[nn.Module] = [nn.Flatten()]
    for num_in, num_out in pairwise(sizes):
        layers.append(nn.Linear(num_in, num_out))
        layers += [nn.BatchNorm1d(num_out)] if batch_norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(sizes[-1], NUM_CLASSES))


def _cnn(hidden_sizes: list[int] | None, batch_norm: bool) -> nn.Sequential:
    sizes = [1, *([16, 32] if hidden_sizes is None else hidden_sizes)]
    layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (1, IMAGE_SIZE, IMAGE_SIZE))]
    for num_in, num_out in pairwise(sizes):
        layers.append(nn.Conv2d(num_in, num_out, kernel_size=3, padding=1))
        layers += [nn.BatchNorm2d(num_out)] if batch_norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    side = max(1, IMAGE_SIZE >> (len(sizes) - 1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * side**2, NUM_CLASSES))


def _unpack(batch: Batch) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        return batch["image"], batch["label"]
    images, labels = batch
    return images, labels


def _validate(architecture: str, hidden_sizes: list[int] | None) -> None:
    expect_one_of(architecture, Architecture, "architecture")
    expect(
        hidden_sizes is None or all(size >= 1 for size in hidden_sizes),
        "hidden_sizes",
        "positive numbers",
        hidden_sizes,
        "Give one width for each hidden layer.",
    )
