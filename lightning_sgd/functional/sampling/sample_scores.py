r"""How much a sample moves the model: norms of :math:`\partial\ell_i/\partial z_i` in closed form.

The norm of the gradient with respect to the outputs :math:`z_i` of the network bounds the norm of the gradient with
respect to all parameters up to a factor that all samples share (Katharopoulos and Fleuret, 2018). Where positions are
masked or a sample has several, the norm is taken over all that count. All scores are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import grad


def cross_entropy_score(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""‖softmax(z)·Σa − a‖ with the target masses a: one-hot, smoothed or given, times class weights.

    Args:
        logits: Of shape (b, C, …).
        target: Classes of shape (b, …), or probabilities of shape (b, C, …).
        weight: Of each class.
        ignore_index: Class of positions that do not count.
        label_smoothing: As of ``torch.nn.functional.cross_entropy``.

    Example:
        >>> cross_entropy_score(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.7071])
    """
    return _row_norms(
        _pull(logits.float().softmax(dim=1), target, weight, ignore_index, label_smoothing)
    )


def nll_score(
    log_probabilities: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Compute the score of ``nll_loss``, whose input is taken for a log-softmax."""
    return _row_norms(_pull(log_probabilities.float().exp(), target, weight, ignore_index, 0.0))


def binary_cross_entropy_score(
    probabilities: Tensor, target: Tensor, weight: Tensor | None = None
) -> Tensor:
    """‖p − y‖: with respect to logits, for ``binary_cross_entropy``, whose input is taken for their sigmoid."""
    return _row_norms(_times(probabilities.float() - target, weight))


def binary_cross_entropy_with_logits_score(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """‖σ(z) − y‖, or with a weight c of positive answers ‖σ(z)(1 + (c − 1)y) − c·y‖."""
    sigma = logits.float().sigmoid()
    if pos_weight is None:
        return _row_norms(_times(sigma - target, weight))
    pulls = sigma * (1 + (pos_weight - 1) * target) - pos_weight * target
    return _row_norms(_times(pulls, weight))


def mse_score(outputs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """(2/d)·‖ŷ − y‖ over the d numbers of a sample."""
    num = max(1, outputs[0].numel())
    return _row_norms(_times(outputs.float() - target, weight)) * (2 / num)


def output_gradient_score(losses: Tensor, outputs: Tensor) -> Tensor:
    """‖∂ℓ_i/∂z_i‖ by automatic differentiation, for any loss in which sample i's depends on row i alone.

    Args:
        losses: Of shape (b,), made from ``outputs`` with a graph; the graph is kept.
        outputs: Of shape (b, …).
    """
    (rows,) = grad(losses.sum(), outputs, retain_graph=True)
    return _row_norms(rows.float())


def last_layer_score(output_score: Tensor, inputs: Tensor, has_bias: bool) -> Tensor:
    """Multiply the score of outputs by √(‖h‖² + 1), or ‖h‖ without bias: the gradient norm of a last linear layer.

    Args:
        output_score: ‖∂ℓ_i/∂z_i‖, of shape (b,).
        inputs: What the layer got [h], of shape (b, d).
        has_bias: Whether it has one.
    """
    squares = inputs.float().square().sum(dim=1)
    return output_score * (squares + has_bias).sqrt()


def parameter_gradient_score(losses: Tensor, params: list[Tensor]) -> Tensor:
    """‖∂ℓ_i/∂θ‖ exactly, by one backward pass per sample: to check the others, not to train with.

    Args:
        losses: Of shape (b,), with a graph, which is kept.
        params: The parameters.
    """
    norms = []
    for loss in losses:
        parts = grad(loss, params, retain_graph=True, allow_unused=True)
        squares = [part.float().square().sum() for part in parts if part is not None]
        norms.append(torch.stack(squares).sum().sqrt())
    return torch.stack(norms)


def _pull(
    probabilities: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """p·Σa − a, in place of the probabilities."""
    if target.is_floating_point():
        masses = target.float()
        if label_smoothing:
            masses = masses * (1 - label_smoothing) + label_smoothing / target.shape[1]
        masses = masses if weight is None else masses * _of_classes(weight, masses)
        return probabilities * masses.sum(dim=1, keepdim=True) - masses
    index = target.unsqueeze(1)
    if weight is None and not label_smoothing and _has_no_holes(target, ignore_index):
        minus = torch.full((1, 1), -1.0, dtype=probabilities.dtype)
        return probabilities.scatter_add_(1, index, minus.expand(index.shape))
    counts = (target != ignore_index).unsqueeze(1)
    index = index.where(counts, 0)
    if weight is None and not label_smoothing:
        ones = torch.ones((), dtype=probabilities.dtype, device=probabilities.device)
        return probabilities.scatter_add_(1, index, -ones.expand(index.shape)).mul_(counts)
    masses = torch.full_like(probabilities, label_smoothing / probabilities.shape[1])
    masses.scatter_add_(1, index, torch.full_like(masses[:, :1], 1 - label_smoothing))
    masses = masses if weight is None else masses * _of_classes(weight, masses)
    return (probabilities * masses.sum(dim=1, keepdim=True) - masses) * counts


def _has_no_holes(target: Tensor, ignore_index: int) -> bool:
    """Return whether that is known at once, without a wait for a GPU."""
    is_simple = target.ndim == 1 and ignore_index < 0 and target.device.type == "cpu"
    return is_simple and int(target.numpy().min()) >= 0


def _of_classes(weight: Tensor, like: Tensor) -> Tensor:
    return weight.float().reshape(1, -1, *[1] * (like.ndim - 2))


def _times(rows: Tensor, weight: Tensor | None) -> Tensor:
    return rows if weight is None else rows * weight


def _row_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(
        rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1), dim=1
    )
    return norms
