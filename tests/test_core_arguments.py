"""Arguments of requests: what fits is given back, everything else is a WireError that names it."""

import math

import pytest

from twinrl.core import arguments
from twinrl.core.errors import WireError

WEIRD = (None, True, "1", b"1", [1], {}, math.nan, math.inf, -math.inf, 1.5, -1, 1 << 63, 10**400)


def test_what_fits_is_given_back():
    args = {"n": 7, "x": 0.5, "s": "name", "l": [1, 2], "m": {"a": 1}}
    assert arguments.integer(args, "n") == 7
    assert arguments.integer(args, "other", 3) == 3
    assert arguments.number(args, "x", low=0) == 0.5
    assert arguments.number(args, "n") == 7.0
    assert arguments.text(args, "s") == "name"
    assert arguments.integers(args, "l", 2) == [1, 2]
    assert arguments.mapping(args, "m") == {"a": 1}


@pytest.mark.parametrize("value", WEIRD, ids=lambda value: repr(value)[:20])
def test_what_does_not_fit_is_refused(value):
    args = {"value": value}
    kinds = {
        "integer": lambda: arguments.integer(args, "value"),
        "integers": lambda: arguments.integers({"value": [value]}, "value", 5),
        "text": lambda: arguments.text(args, "value"),
        "number": lambda: arguments.number(args, "value", low=0, high=1),
        "mapping": lambda: arguments.mapping(args, "value"),
    }
    fits = {"1": "text"}.get(value) if isinstance(value, str) else None
    fits = "mapping" if value == {} else fits
    for kind, check in kinds.items():
        if kind == fits:
            check()
        else:
            with pytest.raises(WireError, match="'value' is"):
                check()


def test_times_are_cut_and_never_undefined():
    for value, expected in ((5, 5.0), (math.inf, 10.0), (10**400, 10.0), (-3.0, 0.0), (0.5, 0.5)):
        assert arguments.seconds({"wait": value}, "wait", 1.0, 10.0) == expected
    assert arguments.seconds({}, "wait", 1.0, 10.0) == 1.0
    for value in (math.nan, "1", None, True, []):
        with pytest.raises(WireError, match="seconds"):
            arguments.seconds({"wait": value}, "wait", 1.0, 10.0)


def test_missing_and_endless_ones_are_named_briefly():
    with pytest.raises(WireError, match="lacks 'name'"):
        arguments.text({}, "name")
    with pytest.raises(WireError) as caught:
        arguments.text({"name": "x" * 100_000}, "name")
    assert len(str(caught.value)) < 300
    with pytest.raises(WireError, match="at most 3"):
        arguments.integers({"ids": [1] * 4}, "ids", 3)
