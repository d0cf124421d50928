"""The base of the optimizers: the loop over groups, checks of settings, the choice of a kernel, and loading."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lightning_sgd._validation import (
    expect,
    is_finite_at_least,
    plain_number,
    warn_at_user_line,
    warn_no_effect,
)
from lightning_sgd.optimizers._tensors import TensorType, refuse_complex, refuse_sparse

ParamGroup: TypeAlias = dict[str, Any]
Step: TypeAlias = Callable[..., None]


class Kernels(NamedTuple):
    """One update rule in three implementations, and the probe of the fused one.

    Attributes:
        for_loop: Tensor by tensor.
        foreach: By multi-tensor operations.
        fused: By a private kernel of torch.
        works: Whether that kernel makes the right step for a device type and a dtype.
    """

    for_loop: Step
    foreach: Step
    fused: Step
    works: Callable[[str, torch.dtype], bool]


class GroupwiseOptimizer(Optimizer):
    """An optimizer whose step goes through its groups, and whose groups may set every argument of the constructor.

    A subclass makes the step of one group (:meth:`step_group`) and checks the settings of one (:meth:`check_group`).
    """

    state_names: ClassVar[tuple[str, ...]]
    """Keys of the states of the parameters' shapes."""
    suggested_lr: ClassVar[str]
    """What to try, for the error about ``lr``."""
    # Of the class: torch pickles no attributes of an optimizer but its groups and states.
    _warned: frozenset[str] = frozenset()

    def __init__(self, params: ParamsT, defaults: ParamGroup) -> None:
        # YAML reads 1e-3 as text, and NumPy scalars would keep a checkpoint from loading with `weights_only=True`.
        super().__init__(params, {name: plain_number(value) for name, value in defaults.items()})

    @abstractmethod
    def step_group(self, group: ParamGroup) -> None:
        """Make the step of one parameter group."""

    def check_group(self, group: ParamGroup) -> None:
        """Raise where a setting that all optimizers have is out of range."""
        lr, decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor):
            one = lr.numel() == 1
            expect(one, "lr", "a tensor of one element", lr.shape, "Use one lr per group.")
        else:
            expect(is_finite_at_least(lr, 0), "lr", "a number ≥ 0", lr, self.suggested_lr)
        no_decay = "Use 0 for none."
        expect(is_finite_at_least(decay, 0), "weight_decay", "a number ≥ 0", decay, no_decay)
        expect(
            not (group["foreach"] and group["fused"]),
            "foreach",
            "None or False beside `fused=True`",
            True,
            "Choose one implementation, or leave both to the default.",
        )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, which may set any of the constructor's arguments for itself."""
        # Checked before torch appends the group: an error leaves the optimizer as it was.
        group = self.complete_group({k: plain_number(v) for k, v in param_group.items()})
        self.check_group({**self.defaults, **group})
        super().add_param_group(group)
        try:
            # Parameters may come as a generator, which only torch may read; so they are checked after, and taken out
            # again.
            self.check_params(self.param_groups[-1]["params"])
        except ValueError:
            del self.param_groups[-1]
            raise

    def complete_group(self, group: ParamGroup) -> ParamGroup:
        """Replace settings that stand for others, before a new group is checked."""
        return group

    def check_params(self, params: list[Tensor]) -> None:
        """Raise where the update rule is not defined for a parameter."""
        refuse_complex(params, type(self).__name__)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: Re-evaluates the model and returns the loss; called once, before gradients are read.
        """
        loss = None
        if closure is not None:
            # As in torch's optimizers: the caller may have switched gradients off around the step.
            with torch.enable_grad():
                loss = closure()
        # All groups are asked before any is changed: who catches the error has the parameters of before.
        for group in self.param_groups:
            refuse_sparse(group["params"], type(self).__name__)
        for group in self.param_groups:
            # Decided by group, because `differentiable` is a setting of a group like any other.
            with torch.set_grad_enabled(group.get("differentiable", False)):
                self.step_group(group)
        return loss

    def select_kernel(
        self, kernels: Kernels, group: ParamGroup, kind: TensorType, obstacle: str | None = None
    ) -> Step:
        """Return the fastest implementation that is allowed and works; warn where that is not the one asked for.

        Args:
            kernels: The implementations.
            group: Says which are allowed.
            kind: What the tensors have in common.
            obstacle: Why these settings rule the fused kernel out.
        """
        foreach, fused = group["foreach"], group["fused"]
        # The rule of torch's optimizers, too: a differentiable step goes tensor by tensor.
        if group.get("differentiable") or (foreach is False and not fused):
            return kernels.for_loop
        if foreach or fused is False:
            return kernels.foreach
        if obstacle is None and not kind.aligned:
            # A fused kernel would not fail here: it would silently combine elements of different places.
            obstacle = "made for gradients of other strides"
        device_type = kind.device.type
        # A tensor without content cannot be compared with a known result.
        if obstacle is None and device_type != "meta" and kernels.works(device_type, kind.dtype):
            return kernels.fused
        if fused:
            self._warn_once(
                f"`fused=True` has no effect for some {kind.dtype} tensors on {device_type}: torch's kernel is not "
                f"{obstacle or 'available'}, multi-tensor operations are used instead."
            )
        return kernels.foreach

    def _warn_once(self, message: str) -> None:
        """Warn once per optimizer: a second model of the same process is told, too."""
        if message not in self._warned:
            self._warned |= {message}
            warn_no_effect(message)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a saved state, which is neither kept nor changed.

        Settings that the state lacks, because another optimizer or an older version wrote it, keep the values of the
        constructor.

        Args:
            state_dict: What ``state_dict`` of an optimizer gave.

        Raises:
            ValueError: If a state does not have the shape of its parameter, or a setting is out of range.
        """
        self._check_loadable(state_dict)
        # torch replaces the list of groups and leaves the old ones, which still hold the constructor's values.
        own = self.param_groups
        super().load_state_dict(state_dict)
        lacking: set[str] = set()
        for group, before in zip(self.param_groups, own, strict=True):
            lacking |= before.keys() - group.keys()
            for name in before.keys() - group.keys():
                group[name] = before[name]
        for state in self.state.values():
            for name, value in list(state.items()):
                if isinstance(value, Tensor):
                    # torch hands over the tensors themselves, and a step would change what the caller holds.
                    state[name] = value.clone(memory_format=torch.preserve_format)
                elif value is None and name in self.state_names:
                    del state[name]  # torch.optim.SGD writes this for no momentum
        if lacking:
            warn_at_user_line(
                f"The loaded state of {type(self).__name__} has no {', '.join(sorted(lacking))}: the values of the "
                "constructor stay. Another optimizer or an older version wrote it."
            )

    def _check_loadable(self, state_dict: StateDict) -> None:
        """Raise before anything is changed where a state does not fit its parameter."""
        name = type(self).__name__
        saved_groups = state_dict["param_groups"]
        # Different numbers of groups or parameters are left to torch, which has its own error for them.
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):
            # A state that lacks nothing was checked when it was written; another optimizer's may hold what is refused
            # here.
            if group.keys() - saved.keys():
                with warnings.catch_warnings():
                    # The same settings have warned when the optimizer was built.
                    warnings.simplefilter("ignore")
                    self.check_group({**group, **saved})
            for param, key in zip(group["params"], saved["params"], strict=False):
                for state_name in self.state_names:
                    value = state_dict["state"].get(key, {}).get(state_name)
                    if isinstance(value, Tensor) and value.shape != param.shape:
                        raise ValueError(
                            f"Expected `{state_name}` in the loaded state of {name} to be of the parameter's shape "
                            f"{tuple(param.shape)}, got {tuple(value.shape)} in group {index}. Give the parameters in "
                            "the order in which they were saved."
                        )


def lr_on(device: torch.device, lr: float | Tensor) -> float | Tensor:
    """Return the step size on a device, a tensor as one without dimensions: kernels take no other."""
    return lr.to(device).reshape(()) if isinstance(lr, Tensor) else lr


def check_betas(betas: Any, remedy: str) -> None:
    """Raise unless these are two decay rates."""
    fits = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    expect(fits, "betas", "two numbers in [0, 1)", betas, remedy)
