"""The watchdog: holds that end by themselves, latches that do not, on a clock that the test moves."""

import pytest

from robot_bridge.watchdog import ESTOP, HOLDING, MOVING, STOPPED, Patience, Watchdog


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def dog(clock):
    watchdog = Watchdog(Patience(), clock)
    watchdog.plan(clock.time + 1000.0)
    return watchdog


def test_silence_holds_and_a_sign_of_life_ends_it(dog, clock):
    """At 250 ms and not before; the reason says for how long."""
    clock.time += 0.249
    assert dog.ask().state == MOVING
    clock.time += 0.002
    ruling = dog.ask()
    assert ruling.state == HOLDING and "silent for 0.3 s" in ruling.reason
    dog.hear()
    assert dog.ask() == (MOVING, "", False) and dog.holds == 1


def test_a_plan_that_has_ended_holds_although_the_link_lives(dog, clock):
    """A policy server may die behind a gateway that lives."""
    dog.plan(clock.time)
    clock.time += 0.09
    dog.hear()
    assert dog.ask().may_move
    clock.time += 0.02
    dog.hear()
    assert dog.ask().state == HOLDING and "no chunk" in dog.ask().reason
    dog.plan(clock.time + 0.4)
    assert dog.ask().may_move


def test_two_seconds_of_hold_are_latched(dog, clock):
    """What comes back late does not move the arm: a person does."""
    clock.time += 0.3
    assert dog.ask().state == HOLDING
    clock.time += 1.9
    assert dog.ask().state == HOLDING
    clock.time += 0.2
    assert dog.ask().state == STOPPED
    dog.hear()
    dog.plan(clock.time + 10.0)
    assert dog.ask().state == STOPPED and "held for 2 s" in dog.ask().reason
    assert dog.rearm() and dog.ask().may_move and dog.stops == 1


def test_where_no_motion_is_due_nothing_is_latched(dog, clock):
    """Between episodes the run may be silent for an hour."""
    dog.plan(None)
    for _ in range(100):
        clock.time += 36.0
        assert dog.ask().state == HOLDING
    dog.hear()
    assert dog.ask().may_move


def test_a_persons_hold_is_never_latched(dog, clock):
    """A pause is a wish, not a failure; what is missing afterwards counts from then on."""
    dog.wish("the run is paused")
    for _ in range(10):
        clock.time += 60.0
        assert dog.ask() == (HOLDING, "the run is paused", True)
    dog.wish("")
    assert dog.ask().state == HOLDING  # silence
    dog.hear()
    assert dog.ask().may_move


def test_an_emergency_stop_is_a_latch_of_its_own(dog):
    """Rearming does not release it; released, the arm is still stopped."""
    dog.estop("asked for from the page")
    assert dog.ask().state == ESTOP and "from the page" in dog.ask().reason
    assert not dog.rearm() and dog.ask().state == ESTOP
    dog.release()
    assert dog.ask().state == STOPPED
    assert dog.rearm() and dog.ask().may_move


def test_the_first_reason_of_a_stop_stays(dog):
    """A second cause does not hide the first."""
    dog.stop("a reflex of the arm")
    dog.stop("the stop key")
    assert dog.ask().reason == "stopped: a reflex of the arm" and dog.stops == 1


def test_without_a_cluster_only_plans_count(clock):
    """`twinrl run` has no gateway."""
    alone = Watchdog(Patience(), clock, linked=False)
    alone.plan(clock.time + 100.0)
    clock.time += 50.0
    assert alone.ask().may_move


@pytest.mark.parametrize("name", Patience._fields)
def test_patience_must_be_above_zero(name):
    """Zero would never move, or never hold."""
    with pytest.raises(ValueError, match="above 0"):
        Watchdog(Patience(**{name: 0.0}))
