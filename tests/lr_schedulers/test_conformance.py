"""What every learning-rate scheduler of the catalogue must do, whatever it plans; without Lightning."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.callback_interruptions import assert_plain
from support.schedules import advance, sgd
from support.watching import assert_equal, random_states
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from lightning_sgd import OutsideIntendedUseWarning

STEPS = 30


def test_it_is_a_scheduler_of_torch(make):
    # Lightning steps other objects only if the module overrides lr_scheduler_step.
    assert isinstance(make(sgd(0.1)), LRScheduler)


def test_it_says_how_often_it_is_to_be_stepped(make):
    # LightningCLI would step once per epoch; ours asks the scheduler.
    assert make(sgd(0.1)).interval in ("step", "epoch")


def test_step_sizes_are_numbers_that_change(make):
    seen = torch.tensor(advance(make(sgd(0.1)), STEPS))
    assert bool((seen.isfinite() & (seen >= 0)).all())
    assert len(seen.unique()) > 1, (
        "settings of the catalogue under which nothing happens test nothing"
    )


def test_get_last_lr_is_what_the_optimizer_uses(make):
    optimizer = sgd(0.1, 0.05)
    scheduler = make(optimizer)
    for _ in range(STEPS):
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        advance(scheduler, 1)


def test_groups_keep_their_ratio_and_none_exceeds_the_plan(make):
    # A head that learns ten times as fast as the body must go on doing so; the theory limits the fastest.
    alone, together = make(sgd(0.1)), make(sgd(0.1, 0.01, 0.0))
    for (planned,), lrs in zip(advance(alone, STEPS), advance(together, STEPS), strict=True):
        assert lrs == pytest.approx([planned, planned / 10, 0.0], rel=1e-12)


def test_nothing_else_is_touched(make):
    # Other settings of the groups, weights, gradients, random states.
    optimizer = sgd(0.1, 0.05)
    for group in optimizer.param_groups:
        group["weight_decay"], group["name"] = 0.25, "a"
        group["params"][0].grad = torch.ones_like(group["params"][0])

    def everything():
        return {
            "settings": [
                {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
                for group in optimizer.param_groups
            ],
            "weights": [p.detach().clone() for g in optimizer.param_groups for p in g["params"]],
            "gradients": [p.grad.clone() for g in optimizer.param_groups for p in g["params"]],
            "state": len(optimizer.state),
            "random": random_states(),
        }

    before = everything()
    scheduler = make(optimizer)
    optimizer._opt_called = True  # a step would move the weights
    for _ in range(5):
        scheduler.step()
    assert_equal(everything(), before, "what is not the scheduler's")


@pytest.mark.compatible("learning rate as a tensor")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_tensor_is_changed_in_place_and_equals_a_float(make, dtype):
    # Compiled and graph-captured training keeps lr in a tensor and must not get another one.
    tensor = torch.tensor(0.1, dtype=dtype)
    floats, tensors = sgd(0.1), sgd(0.1)
    tensors.param_groups[0]["lr"] = tensor
    expected, seen = advance(make(floats), STEPS), advance(make(tensors), STEPS)
    assert tensors.param_groups[0]["lr"] is tensor
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=tolerance, atol=0)


def test_state_is_plain_and_loads_with_weights_only(make):
    scheduler = make(sgd(0.1))
    advance(scheduler, 3)
    assert_plain(scheduler.state_dict())
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    assert_equal(torch.load(file, weights_only=True), scheduler.state_dict(), "the state")


def test_a_state_that_was_taken_does_not_change_later(make):
    scheduler = make(sgd(0.1))
    advance(scheduler, 3)
    state = scheduler.state_dict()
    kept = copy.deepcopy(state)
    advance(scheduler, 3)
    assert_equal(state, kept, "the state")


def test_resume_is_bit_exact(make):
    # The second scheduler sits on an optimizer with other learning rates: everything must come from the file.
    optimizer = sgd(0.1, 0.05)
    scheduler = make(optimizer)
    advance(scheduler, 7)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": scheduler.state_dict()}, file)
    expected = advance(scheduler, STEPS)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = sgd(0.3, 0.2)
    resumed = make(other)
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["schedule"])
    assert resumed.get_last_lr() == expected[0]
    assert advance(resumed, STEPS) == expected


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_go_on_equally(make, way):
    # Tuners copy what they try out.
    scheduler = make(sgd(0.1))
    advance(scheduler, 3)
    twin = pickle.loads(pickle.dumps(scheduler)) if way == "pickle" else copy.deepcopy(scheduler)
    assert twin.optimizer is not scheduler.optimizer
    for group in scheduler.optimizer.param_groups:
        group["weight_decay"] = 0.5  # of the original alone
    for _ in range(5):
        scheduler.step()
        twin.step()
    assert twin.get_last_lr() == scheduler.get_last_lr()
    assert twin.optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    assert twin.optimizer.param_groups[0]["weight_decay"] == 0


@pytest.mark.compatible("SequentialLR and ChainedScheduler")
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_sequence(make, place):
    # A warm-up before it, or a constant tail after it.
    optimizer = sgd(0.1)
    alone = [lr for (lr,) in advance(make(sgd(0.1)), STEPS)]
    if place == "last":
        parts = [LinearLR(optimizer, 0.1, 1.0, total_iters=5), make(optimizer)]
        expected = [0.1 * (0.1 + 0.9 * step / 5) for step in range(5)] + alone[: STEPS - 4]
    else:
        parts = [make(optimizer), ConstantLR(optimizer, 0.5, total_iters=1000)]
        expected = alone[:5] + [0.05] * (STEPS - 4)
    seen = [lr for (lr,) in advance(SequentialLR(optimizer, parts, milestones=[5]), STEPS)]
    assert seen == pytest.approx(expected, rel=1e-12)


@pytest.mark.compatible("SequentialLR and ChainedScheduler")
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_chain(make, place):
    # A factor on the step size stays on it until whoever put it there takes it away; who was made first is no matter.
    optimizer = sgd(0.1)
    builders = [make, lambda optimizer: ConstantLR(optimizer, 0.5, total_iters=10)]
    parts = [build(optimizer) for build in (builders if place == "first" else builders[::-1])]
    seen = advance(ChainedScheduler(parts, optimizer), STEPS)

    by_hand = make(sgd(0.1))
    group = by_hand.optimizer.param_groups[0]
    group["lr"] *= 0.5
    expected = advance(by_hand, 9)
    assert expected[0][0] == pytest.approx(advance(make(sgd(0.1)), 0)[0][0] / 2)
    by_hand.optimizer.step()
    group["lr"] *= 2.0 if place == "last" else 1.0
    by_hand.step()
    group["lr"] *= 2.0 if place == "first" else 1.0
    expected += advance(by_hand, STEPS - 10)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-12, atol=0)


@pytest.mark.compatible("SequentialLR and ChainedScheduler")
def test_a_chain_resumes_exactly(make):
    def chain():
        optimizer = sgd(0.1)
        parts = [make(optimizer), ConstantLR(optimizer, 0.5, total_iters=10)]
        return optimizer, ChainedScheduler(parts, optimizer)

    optimizer, through = chain()
    advance(through, 7)
    saved = copy.deepcopy((optimizer.state_dict(), through.state_dict()))
    expected = advance(through, STEPS)
    other, resumed = chain()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert advance(resumed, STEPS) == expected


def test_a_jump_is_as_good_as_the_way_there(make):
    # Torch's step(epoch) is deprecated but still used by configs of others.
    there = make(sgd(0.1))
    lrs = advance(there, 12)
    jumping = make(sgd(0.1))
    jumping.optimizer.step()
    with pytest.warns(UserWarning, match="epoch parameter"):
        jumping.step(12)
    assert jumping.get_last_lr() == pytest.approx(lrs[-1], rel=1e-12)


@pytest.mark.parametrize("value", [0, -1])
def test_impossible_periods_are_refused(make, value):
    with pytest.raises(ValueError, match="Expected `num_steps_per_call` to be at least 1, got"):
        make(sgd(0.1), num_steps_per_call=value)


@pytest.mark.filterwarnings("ignore:.*was called once after:UserWarning")
def test_calls_that_are_missing_are_made_up_for(make):
    # A plain LightningCLI, or a user who forgets `interval`, calls once per epoch: t must still count optimizer steps.
    often, seldom = sgd(0.1), sgd(0.1)
    each, rare = make(often), make(seldom)
    for _ in range(3):
        for _ in range(5):
            often.step()
            each.step()
            seldom.step()
        rare.step()
        assert rare.last_epoch == each.last_epoch
    # What is planned by t alone is the same; what follows the steps that were used is followed from these.
    if not hasattr(each, "U"):
        assert rare.get_last_lr() == each.get_last_lr()


def test_a_wrong_interval_is_named_once_at_the_first_call(make):
    optimizer = sgd(0.1)
    scheduler = make(optimizer)
    for _ in range(5):
        optimizer.step()
    with pytest.warns(
        OutsideIntendedUseWarning, match="once after 5 optimizer steps .*interval: step"
    ):
        scheduler.step()
    for _ in range(5):
        optimizer.step()
    scheduler.step()  # not again, or the warning would be an error here


def test_the_count_since_the_last_call_is_no_part_of_the_state(make):
    optimizer = sgd(0.1)
    scheduler = make(optimizer)
    before = scheduler.state_dict()
    optimizer.step()
    assert scheduler.state_dict() == before


def test_groups_that_are_added_later_get_their_share(make):
    # BaseFinetuning adds layers that thaw as a group of their own.
    optimizer, alone = sgd(0.1), sgd(0.1)
    scheduler, reference = make(optimizer), make(alone)
    advance(scheduler, 2)
    advance(reference, 2)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.02})
    for lrs, (planned,) in zip(advance(scheduler, 5)[1:], advance(reference, 5)[1:], strict=True):
        assert lrs == pytest.approx([planned, planned / 5], rel=1e-12)
    resumed = make(sgd(0.1, 0.02))
    resumed.load_state_dict(scheduler.state_dict())
    resumed.optimizer.load_state_dict(optimizer.state_dict())
    assert advance(resumed, 2)[1:] == advance(scheduler, 2)[1:]
