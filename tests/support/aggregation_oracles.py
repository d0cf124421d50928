"""Every rule once more, slowly: NumPy in double precision on whole vectors, no Gram matrix, no network.

Written from the definitions of the papers; shares nothing with the package.
"""

from __future__ import annotations

import itertools

import numpy as np


def mean(x, f):
    return x.mean(axis=0)


def median(x, f):
    return np.median(x, axis=0)


def trmean(x, f):
    return np.sort(x, axis=0)[f : len(x) - f].mean(axis=0)


def near(x, centre, count):
    nearest = np.argsort(np.abs(x - centre), axis=0)[:count]
    return np.take_along_axis(x, nearest, axis=0).mean(axis=0)


def meamed(x, f):
    return near(x, np.median(x, axis=0), len(x) - f)


def phocas(x, f):
    return near(x, trmean(x, f), len(x) - f)


def squares(x):
    return np.square(x[:, None] - x[None]).sum(axis=-1)


def scores(x, f):
    others = [np.sort(np.delete(row, i)) for i, row in enumerate(squares(x))]
    count = max(1, len(x) - f - 2)
    return np.array([row[:count].sum() for row in others])


def krum(x, f):
    return x[np.argmin(scores(x, f))]


def multikrum(x, f):
    return x[np.argsort(scores(x, f))[: len(x) - f]].mean(axis=0)


def bulyan(x, f):
    left, selected = x.copy(), []
    while len(selected) < len(x) - 2 * f:
        best = np.argmin(scores(left, f))
        selected.append(left[best])
        left = np.delete(left, best, axis=0)
    selected = np.array(selected)
    return near(selected, np.median(selected, axis=0), len(selected) - 2 * f)


def subsets(x, f):
    return (x[list(s)] for s in itertools.combinations(range(len(x)), len(x) - f))


def mda(x, f):
    return min(subsets(x, f), key=lambda s: squares(s).max()).mean(axis=0)


def smea(x, f):
    return min(subsets(x, f), key=lambda s: np.linalg.norm(s - s.mean(axis=0), 2)).mean(axis=0)


def geomed(x, f):
    z = x.mean(axis=0)
    for _ in range(3000):
        pull = 1 / np.maximum(np.linalg.norm(x - z, axis=1), 1e-12)
        z = pull @ x / pull.sum()
    return min([z, *x], key=lambda point: np.linalg.norm(x - point, axis=1).sum())


def rfa(x, f):
    z = np.zeros(x.shape[1])
    for _ in range(3):
        pull = 1 / np.maximum(np.linalg.norm(x - z, axis=1), 0.1)
        z = pull @ x / pull.sum()
    return z


def cclip(x, f):
    z = np.zeros(x.shape[1])
    for _ in range(3):
        away = np.maximum(np.linalg.norm(x - z, axis=1), 1e-300)
        z = z + ((x - z) * np.minimum(1, np.median(away) / away)[:, None]).mean(axis=0)
    return z


def faba(x, f):
    for _ in range(f):
        x = np.delete(x, np.argmax(np.linalg.norm(x - x.mean(axis=0), axis=1)), axis=0)
    return x.mean(axis=0)


def monna(x, f):
    return x[np.argsort(np.linalg.norm(x - x[0], axis=1))[: len(x) - f]].mean(axis=0)


def cge(x, f):
    return x[np.argsort(np.linalg.norm(x, axis=1))[: len(x) - f]].mean(axis=0)


def top(x, p):
    """Top eigenvalue and direction of the explicit d × d covariance."""
    y = x - p @ x
    values, vectors = np.linalg.eigh(y.T @ (p[:, None] * y))
    return values[-1], y @ vectors[:, -1]


def dnc(x, f):
    _, reach = top(x, np.full(len(x), 1 / len(x)))
    return x[np.argsort(reach**2)[: len(x) - f]].mean(axis=0)


def spectral(x, f, floor=None):
    c, best = np.ones(len(x)), (np.inf, None)
    while c.sum() >= (len(x) - 2 * f) * (1 - 1e-12):
        p = c / c.sum()
        value, reach = top(x, p)
        if value < best[0]:
            best = value, p
        if floor is not None and value <= floor:
            break
        tau = np.where(p > 0, reach**2, 0)
        c = c * (1 - tau / tau.max())
    return best[1] @ x


def filter_(x, f):
    pairs = np.sort(squares(x)[np.triu_indices(len(x), 1)])
    honest = (len(x) - f) * (len(x) - f - 1) // 2
    middle = np.median(pairs[:honest])
    return spectral(x, f, 3 * middle / (2 * len(x)))


def nnm(x, f):
    nearest = np.argsort(squares(x), axis=1)[:, : len(x) - f]
    return x[nearest].mean(axis=1)


def arc(x, f):
    n, norms = len(x), np.linalg.norm(x, axis=1)
    count = int(np.floor(2 * (f / n) * (n - f)))
    return x * np.minimum(1, np.sort(norms)[n - count - 1] / norms)[:, None]


RULES = {
    "mean": mean,
    "median": median,
    "trmean": trmean,
    "meamed": meamed,
    "phocas": phocas,
    "krum": krum,
    "multikrum": multikrum,
    "bulyan": bulyan,
    "mda": mda,
    "smea": smea,
    "geomed": geomed,
    "rfa": rfa,
    "cclip": cclip,
    "faba": faba,
    "monna": monna,
    "cge": cge,
    "filter": filter_,
    "caf": spectral,
    "dnc": dnc,
    "nnm+trmean": lambda x, f: trmean(nnm(x, f), f),
    "nnm+krum": lambda x, f: krum(nnm(x, f), f),
    "arc+bulyan": lambda x, f: bulyan(arc(x, f), f),
    "arc+nnm+caf": lambda x, f: spectral(nnm(arc(x, f), f), f),
    "nnm+cge": lambda x, f: cge(nnm(x, f), f),
    "nnm+cclip": lambda x, f: cclip(nnm(x, f), f),
}
