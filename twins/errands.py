"""Errands: what the instruction may ask for, in a scene that allows more than one thing.

A task with errands lists them; each episode has one, with one of its instructions. Both are part of the episode's
configuration and neither has any influence on where things lie: only the instruction tells a policy what is asked.
The task finds the errand's number in its memory, under ERRAND, from the reset on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

Array = Any  # numpy.ndarray or torch.Tensor
ERRAND, INSTRUCTION = "errand", "instruction"  # keys of a configuration; ERRAND also of the memory


class Errand(NamedTuple):
    """One of the things that may be asked for."""

    name: str
    grasped: str  # the thing that is asked for
    goal: str  # the thing it is to be taken to
    instructions: tuple[str, ...]  # ways to say so, of which a reset draws one
    held_out: tuple[str, ...] = ()  # others, which no reset draws: they test what was understood


def errands_of(task: Any) -> tuple[Errand, ...]:
    """The errands of a task; () of one that always asks for the same."""
    return tuple(getattr(task, "errands", ()))


def offered(task: Any, names: Sequence[str] | None, instruction: str | None) -> tuple[Errand, ...]:
    """What resets of an environment draw from: the errands called `names`, or the one that `instruction` tells.

    All when both are absent; () for a task without errands. ValueError for what the task does not know.
    """
    errands = errands_of(task)
    if names is not None:
        known = {errand.name: errand for errand in errands}
        if not names or not set(names) <= set(known):
            raise ValueError(
                f"errands are {list(names)}, must be some of {task.name}'s: {', '.join(known) or 'it has none'}"
            )
        errands = tuple(known[name] for name in names)
    if instruction is None or not errands:
        return errands
    (name,) = (told_by(task, instruction),)
    fitting = [errand for errand in errands if errand.name == name]
    if not fitting:
        raise ValueError(f"{instruction!r} tells {name!r}, which is none of the errands {names}")
    return (fitting[0]._replace(instructions=(instruction,)),)


def told_by(task: Any, instruction: str) -> str:
    """The name of the errand that `instruction` tells, in words that the task knows."""
    texts = {
        text: errand.name
        for errand in errands_of(task)
        for text in (*errand.instructions, *errand.held_out)
    }
    if instruction not in texts:
        close = difflib.get_close_matches(instruction, texts, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{task.name} does not know the instruction {instruction!r}{hint}; "
            f"a configuration with words of its own names its {ERRAND!r} too"
        )
    return texts[instruction]


def draw_errand(rng: np.random.Generator, errands: Sequence[Errand]) -> dict[str, str]:
    """A configuration's part: {"errand": name, "instruction": text}; {} where there are no errands."""
    if not errands:
        return {}
    errand = errands[rng.integers(len(errands))]
    return {
        ERRAND: errand.name,
        INSTRUCTION: errand.instructions[rng.integers(len(errand.instructions))],
    }


def complete_errand(
    task: Any, drawn: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, str]:
    """The errand and instruction of a configuration that was `given` in part, the rest of it `drawn`.

    An instruction without an errand tells it; an errand without an instruction is told in its first words.
    """
    names = [errand.name for errand in errands_of(task)]
    if not names:
        return {}
    text = given.get(INSTRUCTION)
    name = given.get(ERRAND) or (drawn[ERRAND] if text is None else told_by(task, text))
    if name not in names:
        raise ValueError(f"errand is {name!r}, not one of {', '.join(names)}")
    if text is None:
        text = drawn[INSTRUCTION]
        if name != drawn[ERRAND]:
            text = errands_of(task)[names.index(name)].instructions[0]
    return {ERRAND: name, INSTRUCTION: text}


def errand_number(task: Any, configuration: Mapping[str, Any]) -> int:
    """Which of the task's errands a configuration asks for; 0 of a task that has none."""
    names = [errand.name for errand in errands_of(task)]
    return names.index(configuration[ERRAND]) if names else 0


def roles(task: Any, configuration: Mapping[str, Any]) -> tuple[str, str]:
    """The things that the hand takes and that it takes it to, in an episode of `configuration`."""
    errands = errands_of(task)
    if not errands:
        return task.grasped, task.goal
    errand = errands[errand_number(task, configuration)]
    return errand.grasped, errand.goal


def asked(
    errands: Sequence[Errand], numbers: Array, role: str, values: Mapping[str, Array]
) -> Array:
    """`values` {thing: (n, ...)} of the thing in `role` ("grasped" or "goal") of each row's errand, `numbers` (n,)."""
    names = [getattr(errand, role) for errand in errands]
    found = values[names[0]]
    xp = array_namespace(found)
    for i, name in enumerate(names[1:], start=1):
        mine = xp.reshape(numbers == i, (-1, *[1] * (found.ndim - 1)))
        found = xp.where(mine, values[name], found)
    return found
