"""How often all ranks agree whether to stop on SIGTERM."""

from __future__ import annotations

from itertools import count

from lightning.pytorch import Trainer

HOOK = "_broadcast_sigterm_tensor"


def listen_for_sigterm_every(num_batches: int, trainer: Trainer) -> None:
    """Let Lightning broadcast the flag before every so many batches; always on all ranks alike.

    Args:
        num_batches: 1 is Lightning's own behaviour; 0 for never.
        trainer: Only this one is changed.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.__dict__.pop(HOOK, None)
    check = getattr(loop, HOOK, None)
    if check is None or num_batches == 1:
        return
    batches = count(1)

    def seldom() -> None:
        if num_batches and next(batches) % num_batches == 0:
            check()

    setattr(loop, HOOK, seldom)
