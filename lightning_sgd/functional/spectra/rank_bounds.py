r"""Bounds on the rank of a weight matrix from batch size, step size and weight decay.

A sample moves a weight matrix along at most P outer products, where P is how often the sample uses the matrix: once in
a linear layer on vectors, once per output position in a convolution, once per token on sequences. So the gradient of B
samples has rank at most B·P, and after n steps the weights differ from a shrunken copy of the old ones by a matrix of
rank at most n·B·P:

.. math::
    \begin{pmatrix} W \\ V \end{pmatrix} \leftarrow M_t \begin{pmatrix} W \\ V \end{pmatrix} + (\text{rank} \le BP),
    \qquad
    \sigma_{nBP+1}(W_T) \le |a|\,\|W_{T-n}\| + |b|\,\|V_{T-n}\|,

with V the momentum buffer, :math:`M_t` a 2×2 matrix made of step size, decay and momentum, and (a, b) the first row of
the product of the last n of them. The inequality always holds; it says something only once n·B·P is smaller than the
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_sgd._validation import expect


def gradient_rank_bound(
    shape: tuple[int, int], batch_size: int, num_uses: int = 1, batch_norm_follows: bool = False
) -> int:
    """Compute the largest rank that the gradient of one step can have.

    Args:
        shape: Rows and columns of the weight matrix.
        batch_size: Samples behind one step, over all ranks and accumulated batches [B].
        num_uses: How often one sample uses the matrix [P].
        batch_norm_follows: Whether batch normalisation in training mode follows at once. It makes the gradients at its
            input sum to zero, which costs one more.

    Example:
        >>> gradient_rank_bound((64, 27), batch_size=2, num_uses=4)
        8
    """
    return min(*shape, batch_size * num_uses - batch_norm_follows)


def stationarity_gap(
    weight: Tensor, grad: Tensor, weight_decay: float, kind: Literal["fro", "spectral"] = "spectral"
) -> Tensor:
    r"""Bound the distance of the normalised weights from a matrix of the rank of one batch's gradient.

    With G the batch's gradient of the loss without decay, whatever the batch,

    .. math:: \min_{\operatorname{rank} R \le BP} \Big\| \frac{W}{\|W\|_F} - R \Big\|
        \le \frac{\|G + \lambda W\|}{\lambda\, \|W\|_F} .

    Args:
        weight: Weight matrix of shape (m, n) [W].
        grad: Gradient of the same shape [G].
        weight_decay: Decay as torch's optimizers take it [λ], positive.
        kind: The norm, on both sides.

    Raises:
        ValueError: If ``weight_decay`` is not positive.

    Example:
        >>> weight = torch.eye(2)
        >>> float(stationarity_gap(weight, grad=-0.1 * weight, weight_decay=0.1))
        0.0
    """
    expect(
        weight_decay > 0, "weight_decay", "positive", weight_decay, "Without it nothing follows."
    )
    # W = (residual − G)/λ with torch's decay, twice the λ of the paper. The authors' code divides by twice torch's
    # decay, which is the bound for a problem with twice the decay of the one that was trained.
    residual = grad + weight_decay * weight
    norm: Tensor = torch.linalg.matrix_norm(residual, ord="fro" if kind == "fro" else 2)
    return norm.div(weight_decay * torch.linalg.matrix_norm(weight))


class Transfer(NamedTuple):
    """The 2×2 matrix by which steps act on (weights, momentum buffer), without the terms of the gradients.

    Attributes:
        ww: Factor from weights to weights.
        wv: Factor from buffer to weights.
        vw: Factor from weights to buffer.
        vv: Factor from buffer to buffer.
    """

    ww: float = 1.0
    wv: float = 0.0
    vw: float = 0.0
    vv: float = 1.0

    def after(self, earlier: Transfer) -> Transfer:
        """Compose: the steps of ``earlier``, then these."""
        return Transfer(
            self.ww * earlier.ww + self.wv * earlier.vw,
            self.ww * earlier.wv + self.wv * earlier.vv,
            self.vw * earlier.ww + self.vv * earlier.vw,
            self.vw * earlier.wv + self.vv * earlier.vv,
        )


def sgd_transfer(
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    decoupled: bool = False,
) -> Transfer:
    """Compute the matrix of one step of ``torch.optim.SGD``, or of SGD with decoupled decay.

    Args:
        lr: Step size [μ].
        weight_decay: Decay [λ]; torch adds ``weight_decay * weight`` to the gradient.
        momentum: Factor of the buffer [β].
        dampening: One minus the factor of the gradient in the buffer.
        nesterov: Step along gradient plus buffer instead of along the buffer.
        decoupled: Shrink the weights by ``lr * weight_decay`` instead.

    Example:
        >>> sgd_transfer(lr=0.1, weight_decay=0.5).ww
        0.95
    """
    # torch adds coupled decay to the gradient, so it enters the momentum buffer; decoupled decay does not.
    shrink, coupled = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    vw, vv = (1 - dampening) * coupled * shrink, momentum
    if nesterov:
        ww, wv = shrink * (1 - lr * coupled) - lr * momentum * vw, -lr * momentum * vv
    elif momentum:
        ww, wv = shrink - lr * vw, -lr * vv
    else:
        ww, wv = shrink * (1 - lr * coupled), 0.0
    return Transfer(ww, wv, vw, vv)


@dataclass(frozen=True, slots=True)
class Window:
    """The steps between two looks at a layer.

    Attributes:
        num_samples: Samples of all its steps together [n·B].
        transfer: What its steps do to weights and buffer.
        weight_norm: Norm of the weights at its beginning [‖W‖].
        buffer_norm: Norm of the momentum buffer at its beginning [‖V‖].
    """

    num_samples: int
    transfer: Transfer
    weight_norm: float
    buffer_norm: float = 0.0


def trajectory_tails(
    windows: Sequence[Window], weight_norm: float, num_uses: int = 1
) -> list[tuple[int, float]]:
    r"""Bound the spectrum by the steps so far: pairs (k, t) with :math:`\sigma_{k+1}(W)/\|W\|_F \le t`.

    Args:
        windows: Consecutive windows, oldest first, that end now.
        weight_norm: Frobenius norm of the weights now.
        num_uses: How often one sample uses the matrix [P].

    Returns:
        One pair for each beginning of a window, the latest first; norms of any kind that bounds σ₁ may be given.

    Example:
        >>> window = Window(num_samples=3, transfer=Transfer(ww=0.5), weight_norm=2.0)
        >>> trajectory_tails([window], weight_norm=4.0)
        [(3, 0.25)]
    """
    tails = []
    num_samples, total = 0, Transfer()
    for window in reversed(windows):
        num_samples += window.num_samples
        total = total.after(window.transfer)
        tail = abs(total.ww) * window.weight_norm + abs(total.wv) * window.buffer_norm
        # A zero matrix has rank zero, whatever the steps were.
        tails.append((num_samples * num_uses, tail / weight_norm if weight_norm else 0.0))
    return tails


def trajectory_rank_bound(tails: Sequence[tuple[int, float]], eps: float) -> int | None:
    """Find the smallest bound on the number of singular values above ``eps``·‖W‖_F, if the steps imply one.

    Args:
        tails: From :func:`trajectory_tails`.
        eps: Relative threshold [ε].

    Example:
        >>> trajectory_rank_bound([(3, 0.25), (9, 0.01)], eps=0.1)
        9
        >>> trajectory_rank_bound([(3, 0.25), (9, 0.01)], eps=0.001) is None
        True
    """
    return min((k for k, tail in tails if tail <= eps), default=None)


def asymptotic_rank_bound(
    batch_size: int, lr: float, weight_decay: float, eps: float, num_uses: int = 1
) -> float:
    r"""Compute the paper's bound for long training at constant settings, :math:`P B \log(2/\epsilon) / (\mu \lambda)`.

    It supposes that the norm of the weights no longer changes, and can be violated while the norm falls. It shows a
    trend and is far above any rank: B = 16, μ = 0.1, λ = 5e-4 and ε = 1e-3 give 2.4 million.

    Args:
        batch_size: Samples behind one step [B].
        lr: Step size [μ].
        weight_decay: Decay as torch's optimizers take it [λ, twice the factor of the squared norm in the loss].
        eps: Relative threshold [ε].
        num_uses: How often one sample uses the matrix [P].

    Raises:
        ValueError: If ``lr * weight_decay`` is not positive.

    Example:
        >>> round(asymptotic_rank_bound(16, lr=0.1, weight_decay=5e-4, eps=1e-3) / 1e6, 1)
        2.4
    """
    shrink = lr * weight_decay
    expect(shrink > 0, "lr * weight_decay", "positive", shrink, "Without decay nothing follows.")
    # The paper has 2μλ in the denominator, with λ for half of torch's decay.
    return num_uses * batch_size * math.log(2 / eps) / shrink
