"""Errors and warnings as a user reads them: words without quotes, warnings at the user's own line."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from lightning_sgd import MaSS, NoEffectWarning, NovoGrad
from lightning_sgd._validation import Words, expect

HEAD = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
import lightning_sgd as sgd
from lightning_sgd.functional.spectra import weight_matrices

weight = torch.nn.Parameter(torch.ones(3, 2))
data = TensorDataset(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class PastTheStrategy(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        self.layer(batch[0]).sum().backward()
        self.optimizers().optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(module=None, **settings):
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, log_every_n_steps=1, enable_model_summary=False, **settings,
    )
    trainer.fit(module or Module(), DataLoader(data, batch_size=4))  # HERE in fit


def run():
    weight.grad = torch.ones(2, 3).T
"""

CASES = {
    "mass": "sgd.MaSS([weight], decoupled_weight_decay=True)  # HERE",
    "mass-group": "sgd.MaSS([{'params': [weight], 'kappa_tilde': 50}])  # HERE",
    "mass-step": "optimizer = sgd.MaSS([weight], fused=True)\n    optimizer.step()  # HERE",
    "novograd": "sgd.NovoGrad([weight], decoupled_weight_decay=True)  # HERE",
    "trsgd": "sgd.TRSGD([weight], inner_steps=1, lambda_w=0.1)  # HERE",
    "scheduler": "sgd.DiminishingLR(torch.optim.SGD([weight], lr=1, momentum=0.9), mu=0.1, L=1.0)  # HERE",
    "callback": "sgd.PrioritySampling(alpha=0.0, save_figure=False)  # HERE",
    "rule": "sgd.SpectralFilter(num_byzantine=1, sigma0=1.0)  # HERE",
    "function": "weight_matrices.find_weight_matrices(torch.nn.Linear(3, 2), include=['no*'])  # HERE",
    "monitor": "sgd.TailIndexMonitor(source='microbatches', batch_size=2)  # HERE",
    "monitor-in-fit": "fit(callbacks=[sgd.RankMonitor(min_side=1, include=['layer*', 'no*'])])",
    "strategy-in-fit": "fit(strategy=sgd.LocalSGDStrategy(), module=PastTheStrategy())",
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_warning_names_the_line_of_the_user(case, tmp_path):
    # A warning that names a file of ours, or of Lightning, does not say which of the user's objects it is about.
    file = tmp_path / "the_users_script.py"
    file.write_text(f"{HEAD}    {CASES[case]}\n", encoding="utf-8")
    marker = "# HERE in fit" if case.endswith("in-fit") else "# HERE"
    lines = file.read_text(encoding="utf-8").splitlines()
    expected = [number for number, line in enumerate(lines, 1) if line.endswith(marker)]
    spec = importlib.util.spec_from_file_location("the_users_script", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.run()
    ours = [w for w in caught if w.category.__module__ == "lightning_sgd._validation"]
    assert ours
    assert {(w.filename, w.lineno) for w in ours} == {(str(file), expected[0])}


def test_once_per_line_is_once_per_line_of_the_user():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            MaSS([torch.nn.Parameter(torch.ones(2))], decoupled_weight_decay=True)
        NovoGrad([torch.nn.Parameter(torch.ones(2))], decoupled_weight_decay=True)
    assert [w.category for w in caught] == [NoEffectWarning] * 2


def test_a_description_stands_without_quotes_and_a_value_with_them():
    with pytest.raises(
        ValueError, match=r"^Expected `x` to be dense, got a sparse one\. Fill it\.$"
    ):
        expect(False, "x", "dense", Words("a sparse one"), "Fill it.")
    with pytest.raises(ValueError, match="got 'sparse'"):
        expect(False, "x", "dense", "sparse", "Fill it.")
