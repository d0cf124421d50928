"""Extra batches come as training gets them, and leave no trace: in the module, the loader, or the data set."""

from __future__ import annotations

import collections
import copy
import logging
import queue
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from support.training import trainer
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parameters_to_vector
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

from lightning_sgd import (
    CriticalBatchSizeMonitor,
    GradientErrorMonitor,
    TailIndexMonitor,
    TrajectoryRegularization,
)
from lightning_sgd.callbacks._monitoring.module_state import module_state_kept

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X[:, :4].argmax(dim=1))


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def watch(**settings):
    defaults = {"every_n_steps": 4, "max_overhead": None, "save_figure": False}
    return CriticalBatchSizeMonitor(**{**defaults, **settings})


def train(tmp_path, module, loader, *callbacks, **settings):
    torch.manual_seed(0)
    defaults = {"max_epochs": 2, "callbacks": list(callbacks)}
    run = trainer(tmp_path, **{**defaults, **settings})
    run.fit(module, loader)
    return run


# Where they come from


class Asked(Dataset):
    """Counts the rows that are read."""

    def __init__(self):
        self.rows = set()

    def __len__(self):
        return 64

    def __getitem__(self, row):
        assert get_worker_info() is None
        READ.add(row)
        return DATA[row]


READ = set()


class Backwards(DataLoader):
    """Leaves out the second half of the data by an iteration of its own."""

    def __iter__(self):
        for begin in range(0, 32, 8):
            yield self.collate_fn([self.dataset[row] for row in range(begin, begin + 8)])

    def __len__(self):
        return 4


def loaders():
    data = Asked()
    half = SubsetRandomSampler(range(32))
    return {
        "sampler": (DataLoader(data, 8, sampler=half), {}),
        "batch sampler": (DataLoader(data, batch_sampler=BatchSampler(half, 8, False)), {}),
        "batches as list": (
            DataLoader(data, batch_sampler=[list(range(k, k + 8)) for k in range(0, 32, 8)]),
            {},
        ),
        "own iteration": (Backwards(data, 8), {}),
        "overfitted batches": (DataLoader(data, 8), {"overfit_batches": 4}),
    }


@pytest.mark.parametrize("kind", loaders())
def test_rows_outside_the_sampler_are_never_read(tmp_path, kind):
    loader, settings = loaders()[kind]
    READ.clear()
    monitor = watch(num_batches=16)
    train(tmp_path, Classifier(), loader, monitor, max_epochs=1, **settings)
    assert {row for row in READ if row >= 32} == set()
    assert monitor.times == [0, 4]
    assert np.isfinite(monitor.values["noise_trace"]).all()


def open_in_worker(_):
    get_worker_info().dataset.content = DATA


class File(Dataset):
    """Can be read only where a worker has opened it."""

    content = None

    def __len__(self):
        return 64

    def __getitem__(self, row):
        return self.content[row]


def test_workers_prepare_the_data_as_in_training(tmp_path):
    loader = DataLoader(File(), 8, num_workers=1, worker_init_fn=open_in_worker)
    monitor = watch(num_batches=4, every_n_steps=8)
    train(tmp_path, Classifier(), loader, monitor, max_epochs=1)
    assert monitor.times == [0, 8]


def test_of_batches_of_different_sizes_the_most_common_are_compared(tmp_path):
    rows = [list(range(k)) for k in (3, 8, 5, 8, 7, 8, 8)]
    sizes = []

    class Sized(Classifier):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    monitor = watch(num_batches=7, num_coordinates=None)
    module = Sized()
    run = trainer(tmp_path, callbacks=[monitor], max_steps=1)
    run.fit(module, DataLoader(DATA, batch_sampler=rows))
    assert sizes[:7] == [3, 8, 5, 8, 7, 8, 8]
    # All four of the compared batches are the same eight rows: there is a gradient, and no noise.
    assert monitor.values["noise_trace"] == pytest.approx([0, 0], abs=1e-9)
    assert min(monitor.values["gradient_sq"]) > 0


def test_another_batch_size_of_a_loader_with_batches_of_its_own_is_told(tmp_path, caplog):
    rows = [list(range(k, k + 8)) for k in range(0, 32, 8)]
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        train(tmp_path, Classifier(), DataLoader(DATA, batch_sampler=rows), watch(batch_size=4))
    reason = "the data loader makes batches of its own, so that `batch_size` cannot be 4"
    assert f"nothing can be measured, because {reason}" in caplog.text


# What training notices of them: nothing


class Noise(Classifier):
    """A diffusion model's own generator."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch, batch_idx):
        noise = torch.randn(batch[0].shape, generator=self.generator)
        return cross_entropy(self.net(batch[0] + noise), batch[1])


class Teacher(Classifier):
    """A second network that follows the first, as in BYOL and DINO."""

    def __init__(self):
        super().__init__()
        self.teacher = self.hide(copy.deepcopy(self.net).requires_grad_(False))

    def hide(self, module):
        return module

    def training_step(self, batch, batch_idx):
        teacher = self.teacher[0] if isinstance(self.teacher, list) else self.teacher
        for slow, fast in zip(teacher.parameters(), self.net.parameters(), strict=True):
            slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
        target = mse_loss(self.net(batch[0]), teacher(batch[0]))
        return target + super().training_step(batch, batch_idx)


class HiddenTeacher(Teacher):
    """One that `parameters()` does not find."""

    def hide(self, module):
        return [module]


class Renormalized(Classifier):
    """Projects trained weights in the forward pass."""

    def training_step(self, batch, batch_idx):
        self.net[0].weight.data = self.net[0].weight.data.clamp(-0.2, 0.2)
        return super().training_step(batch, batch_idx)


class Memory(Classifier):
    """A queue of negatives, a counter in an object, and Python's and NumPy's generators inside containers."""

    def __init__(self):
        super().__init__()
        self.negatives, self.waiting = collections.deque(maxlen=5), queue.Queue()
        self.random = {"python": random.Random(1), "numpy": [np.random.default_rng(1)]}
        self.helper = Counter()

    def training_step(self, batch, batch_idx):
        self.helper.count += 1
        self.helper.seen.add(self.helper.count)
        self.helper.array[0] += 1
        self.negatives.append(self.helper.count)
        self.waiting.put(self.helper.count)
        shift = self.random["python"].random() + self.random["numpy"][0].random()
        shift += sum(self.negatives) + len(self.helper.seen) + self.waiting.qsize()
        return super().training_step(batch, batch_idx) * (shift + float(self.helper.array[0])) / 100


class Counter:
    def __init__(self):
        self.count, self.seen, self.array = 0, set(), np.zeros(1)


class Buffers(Classifier):
    """A sparse buffer of each layout beside a quantised one, which no comparison knows alike."""

    def __init__(self):
        super().__init__()
        eye = torch.eye(8)
        self.register_buffer("coo", eye.to_sparse())
        self.register_buffer("csr", eye.to_sparse_csr())
        self.register_buffer("few", torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8))

    def training_step(self, batch, batch_idx):
        self.coo.mul_(0.99)
        x = torch.sparse.mm(self.coo, batch[0].T).T
        x = torch.sparse.mm(self.csr, x.T).T + self.few.dequantize().sum() * 0
        return cross_entropy(self.net(x), batch[1])


class Augmented(Dataset):
    """Draws from generators of its own, and counts."""

    def __init__(self):
        self.generator, self.count = np.random.default_rng(4), 0

    def __len__(self):
        return 64

    def __getitem__(self, row):
        self.count += 1
        x, y = DATA[row]
        return x * float(self.generator.normal()) + self.count / 1000, y


def plain():
    return DataLoader(DATA, 8, shuffle=True, generator=torch.Generator().manual_seed(5))


def augmented():
    return DataLoader(Augmented(), 8, shuffle=True)


class Shuffled:
    """A sampler that shuffles a list in place by a generator of its own."""

    def __init__(self):
        self.rows, self.random = list(range(64)), random.Random(2)

    def __iter__(self):
        self.random.shuffle(self.rows)
        return iter(self.rows)

    def __len__(self):
        return 64


def own_sampler():
    return DataLoader(DATA, 8, sampler=Shuffled())


@pytest.mark.parametrize(
    ("module", "loader"),
    [
        *[(each, plain) for each in (Noise, Teacher, HiddenTeacher, Renormalized, Memory, Buffers)],
        (Classifier, augmented),
        (Classifier, own_sampler),
    ],
)
def test_training_is_the_same_with_extra_batches(tmp_path, module, loader):
    def run(*callbacks):
        torch.manual_seed(0)
        made = module()
        assert train(tmp_path, made, loader(), *callbacks).state.finished
        return parameters_to_vector(made.parameters())

    monitor = watch(num_batches=4)
    assert torch.equal(run(monitor), run())
    assert len(monitor.times) == 5


@pytest.mark.parametrize("module", [Noise, Teacher, Memory])
def test_state_is_restored_after_an_exception(module):
    torch.manual_seed(0)
    made = module()
    with pytest.raises(ZeroDivisionError), module_state_kept(made):
        made.training_step(DATA[:8], 0)
        raise ZeroDivisionError
    torch.manual_seed(0)
    fresh = module()
    for _ in range(2):  # the second step shows what the first one has left behind
        assert torch.equal(made.training_step(DATA[:8], 0), fresh.training_step(DATA[:8], 0))


def test_a_module_with_an_iterator_is_not_measured(tmp_path, caplog):
    class Streams(Classifier):
        def __init__(self):
            super().__init__()
            self.stream = (k for k in range(100))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1 + next(self.stream))

    module = Streams()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        train(tmp_path, module, plain(), watch(), max_epochs=1)
    reason = "the module holds a generator, which an extra pass would advance for good"
    assert f"nothing can be measured, because {reason}" in caplog.text
    assert next(module.stream) == 8


# Parameters that are not plain tensors of real numbers


class Filter(Classifier):
    """Multiplies the spectrum by a complex parameter, or by a real one of twice the size."""

    def __init__(self, is_complex):
        torch.manual_seed(0)
        super().__init__()
        start = torch.randn(5, 2)
        self.spectrum = nn.Parameter(torch.view_as_complex(start) if is_complex else start)

    def training_step(self, batch, batch_idx):
        spectrum = self.spectrum
        if not spectrum.is_complex():
            spectrum = torch.view_as_complex(spectrum)
        x = torch.fft.irfft(torch.fft.rfft(batch[0]) * spectrum, n=8)
        return super().training_step((x, batch[1]), batch_idx)


@pytest.mark.parametrize(
    "monitor",
    [
        lambda: watch(num_batches=4, log_layers=True),
        lambda: watch(source="microbatches", log_layers=True),
        lambda: TailIndexMonitor(
            num_batches=32, every_n_steps=4, max_overhead=None, save_figure=False
        ),
        lambda: GradientErrorMonitor("int8", every_n_steps=1, max_overhead=None),
        lambda: GradientErrorMonitor("topk", 0.3, every_n_steps=1, max_overhead=None),
    ],
)
def test_a_complex_parameter_is_measured_as_its_real_and_imaginary_parts(tmp_path, monitor):
    def run(is_complex):
        module = Filter(is_complex)
        run = train(tmp_path, module, plain(), monitor(), accumulate_grad_batches=2)
        return {key: value.item() for key, value in run.callback_metrics.items()}

    found, expected = run(True), run(False)
    assert len(found) >= 4
    assert found == pytest.approx(expected, rel=1e-3, nan_ok=True)


class Lazy(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        (watch, "lazy modules have no weights before the first batch; looks begin after it"),
        (GradientErrorMonitor, "4 tensors, some without a shape before the first batch"),
        (TrajectoryRegularization, "as many bytes as the parameters will have for the anchors"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:.*UninitializedParameter")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
def test_lazy_modules_are_measured_after_their_first_batch(tmp_path, caplog, callback, sentence):
    made = callback()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert train(tmp_path, Lazy(), plain(), made).state.finished
    assert sentence in caplog.text
    if callback is watch:
        assert made.times == [4, 8, 12, 16]
