"""Mini-batch SGD on Gaussian least squares, exactly: the covariance of the iterates in dense algebra, in NumPy.

With u = w − w* and the gradient of a batch of b, the covariance Φ = E[uuᵀ] obeys

    Φ ← Φ − γ(HΦ + ΦH) + (γ²/b)·E[⟨x, Φx⟩xxᵀ] + γ²(b − 1)/b·HΦH + (γ²/b)·Σ,

where E[⟨x, Φx⟩xxᵀ] = 2HΦH + Tr(HΦ)·H for Gaussian x.
"""

from __future__ import annotations

import numpy as np


def fourth_moment(h, a):
    """E[⟨x, Ax⟩xxᵀ] for Gaussian x with the covariance H."""
    return 2 * h @ a @ h + np.trace(h @ a) * h


def step(phi, h, sigma, gamma, b):
    """One step of the covariance."""
    noise = fourth_moment(h, phi) + sigma + (b - 1) * h @ phi @ h
    return phi - gamma * (h @ phi + phi @ h) + gamma**2 / b * noise


def operator(h, gamma, b):
    """The linear part of a step as a matrix on vectorised covariances."""
    d = len(h)
    units = np.eye(d * d).reshape(d * d, d, d)
    return np.stack([step(unit, h, 0 * h, gamma, b).ravel() for unit in units], axis=1)


def divergence_step(h, b):
    """The step above which the covariance grows, by bisection on the spectral radius of its operator."""
    low, high = 0.0, 4.0 / np.linalg.eigvalsh(h).max()
    for _ in range(60):
        middle = (low + high) / 2
        stable = np.abs(np.linalg.eigvals(operator(h, middle, b))).max() < 1
        low, high = (middle, high) if stable else (low, middle)
    return low


def risks(h, sigma, phi, gamma, b, num_steps, start):
    """Excess risk ½Tr(HΦ) of the mean of the iterates after ``start``, of the last iterate, and its covariance."""
    q = np.eye(len(h)) - gamma * h
    tail, crossed = np.zeros_like(h), np.zeros_like(h)
    for t in range(1, num_steps + 1):
        phi = step(phi, h, sigma, gamma, b)
        crossed = q @ crossed  # Σ_{s<t} E[w_t w_sᵀ] over the tail
        if t > start:
            tail += phi + crossed + crossed.T
            crossed = crossed + phi
    num = num_steps - start
    return np.trace(h @ tail) / (2 * num**2), np.trace(h @ phi) / 2, phi


def diagonal_risks(h, sigma, phi, gamma, b, num_steps, start):
    """The same for diagonal matrices, given as vectors, by closed forms of the sums over the tail."""
    q, tail = 1 - gamma * h, np.zeros_like(h)
    for t in range(1, num_steps + 1):
        kept = (1 - 2 * gamma * h + gamma**2 * (b + 1) / b * h**2) * phi
        phi = kept + gamma**2 / b * (h * (h @ phi) + sigma)
        if t > start:
            tail += phi * (1 + 2 * q * (1 - q ** (num_steps - t)) / (gamma * h))
    return h @ tail / (2 * (num_steps - start) ** 2), h @ phi / 2, phi
