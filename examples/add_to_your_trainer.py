"""MaSS in a LightningModule and a Trainer of your own: one import and one line."""
# ruff: noqa: D102 - the methods are Lightning's

from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_sgd import DigitsDataModule, MaSS


class YourModule(LightningModule):
    """Any module; only its last method knows of MaSS."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        correct = self.net(images).argmax(dim=1) == labels
        self.log("val/accuracy", correct.float().mean())

    def configure_optimizers(self) -> MaSS:
        return MaSS(self.parameters(), lr=0.2)


seed_everything(0)
model, data = YourModule(), DigitsDataModule(batch_size=16)
trainer = Trainer(max_epochs=15, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, data)
trainer.validate(model, data)
