"""Put the block that the instruction names onto the pad that it names.

Two blocks and two pads lie on the table, and where they lie says nothing about what is asked: a policy that does
not read gets one in four. Whatever block is put onto a pad that was not asked for ends the episode, so trying one
after the other is no way. The expert is a function of the present state only; a wrong block that is in the hand it
puts down again, beside the pads.
"""

from __future__ import annotations

import itertools
import math

from array_api_compat import array_namespace

from twins import rotation
from twins.errands import ERRAND, Errand, asked
from twins.shapes import Shape, Thing
from twins.tasks.task import GRIPPER, Array, Box, Finish, Grasp, Memory, Snapshot, down

HALF, HEIGHT, MASS = 0.022, 0.03, 0.1  # m, half a block's side and height; kg
PAD, PAD_HEIGHT = 0.06, 0.001  # m, a pad's radius; it is paint, which nothing touches
BLOCK_X, BLOCK_Y = (0.37, 0.5), (0.02, 0.25)  # m, where it starts; y on either side
YAW = 0.4  # rad, either way
PAD_X, PAD_Y = (0.58, 0.67), (-0.22, 0.22)  # m
# Least distances at a reset, m: the open hand, 12 cm wide with its fingers, needs room beside what it takes.
BLOCKS_APART, PADS_APART, APART = 0.11, 0.16, 0.12

WELL_ON = 0.04  # m, of a block's middle from the pad's: all of the block is on the pad
LYING = HEIGHT + 0.006  # m, height of a block that lies on the table, and on nothing else
HELD_WIDTH, HELD_REACH = (0.038, 0.05), 0.03  # m, between the fingertips, and from tcp to block
HOVER, TRANSPORT, LOW = 0.09, 0.13, 0.004  # m: LOW over the table a block is let go
ASIDE_X = 0.47  # m, up to where a wrong block is put down

COLOURS = {"red": (0.85, 0.1, 0.1), "blue": (0.1, 0.25, 0.85)}
PAD_COLOURS = {"green": (0.12, 0.55, 0.2), "yellow": (0.95, 0.85, 0.2)}
TEMPLATES = (
    "put the {block} block on the {pad} pad",
    "place the {block} block onto the {pad} pad",
    "move the {block} block to the {pad} pad",
    "take the {block} cube and put it on the {pad} pad",
    "the {block} block goes on the {pad} pad",
    "on the {pad} pad, place the {block} cube",
    "bring the {block} cube over to the {pad} mat",
    "pick up the {block} block and lay it on the {pad} mat",
)
HELD_OUT_TEMPLATES = (
    "set the {block} block down on the {pad} pad",
    "please carry the {block} cube to the {pad} pad",
    "the {pad} mat is where the {block} cube belongs",
    "i would like to see the {block} block on the {pad} mat",
)


def _block(colour: str) -> Thing:
    name = f"{colour}_block"
    shape = Shape(name, "box", (HALF, HALF, HEIGHT), mass=MASS, rgb=COLOURS[colour])
    return Thing(name, (shape,), free=True, height=HEIGHT, colour_range=0.06)


def _pad(colour: str) -> Thing:
    name = f"{colour}_pad"
    shape = Shape(name, "cylinder", (PAD, PAD_HEIGHT / 2), rgb=PAD_COLOURS[colour], solid=False)
    return Thing(name, (shape,), free=False, height=PAD_HEIGHT / 2, colour_range=0.06)


def _errand(block: str, pad: str) -> Errand:
    def said(templates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(template.format(block=block, pad=pad) for template in templates)

    names = f"{block}_block", f"{pad}_pad"
    return Errand(f"{block}-{pad}", *names, said(TEMPLATES), said(HELD_OUT_TEMPLATES))


def _fourfold(turn: Array) -> Array:
    """(n, 2) sine and cosine of four times a block's yaw."""
    xp = array_namespace(turn)
    yaw = 4.0 * rotation.yaw(turn)
    return xp.stack([xp.sin(yaw), xp.cos(yaw)], axis=1)


class FollowInstruction:
    """Reward 1 when the block that is named lies on the pad that is named and the gripper has let go of it."""

    name = "follow-instruction"
    instructions = ("put the block that is named onto the pad that is named",)
    errands = tuple(itertools.starmap(_errand, itertools.product(COLOURS, PAD_COLOURS)))
    max_steps = 64
    things = (*map(_block, COLOURS), *map(_pad, PAD_COLOURS))
    grasped, goal = errands[0].grasped, errands[0].goal
    grasp = Grasp(width=2 * HALF, turns=4)
    finish = Finish(position=(0.0, 0.0, HEIGHT - PAD_HEIGHT / 2), spread=(0.015, 0.015))
    contacts = tuple((f"{colour}_block", GRIPPER) for colour in COLOURS)
    memory = {ERRAND: Memory((), "int32")}  # noqa: RUF012
    randomisation: dict[str, float] = {}  # noqa: RUF012
    term_names = ("reach", "grasp", "carry")
    regions = {  # noqa: RUF012
        name: {
            **{f"{colour}_block": Box(BLOCK_X, side, (-YAW, YAW)) for colour in COLOURS},
            **{f"{colour}_pad": Box(PAD_X, PAD_Y) for colour in PAD_COLOURS},
        }
        for name, side in (("id", (-BLOCK_Y[1], -BLOCK_Y[0])), ("ood", BLOCK_Y))
    }
    # By role first: a label tells what the instruction means in this scene. Then by colour, which tells nothing of it.
    privileged_names = (
        *("block_x", "block_y", "block_z", "block_sin_4yaw", "block_cos_4yaw"),
        *("pad_x", "pad_y", "held"),
        *("block_vx", "block_vy", "block_vz"),
        *("block_from_tcp_x", "block_from_tcp_y", "block_from_tcp_z"),
        *(
            f"{colour}_block_{name}"
            for colour in COLOURS
            for name in ("x", "y", "z", "sin_4yaw", "cos_4yaw")
        ),
        *(f"{colour}_pad_{name}" for colour in PAD_COLOURS for name in ("x", "y")),
    )

    def fits(self, placement: dict[str, list[float]]) -> bool:
        """Everything stands apart, so that the hand can take each block and each pad is free."""
        blocks = [placement[f"{colour}_block"][:2] for colour in COLOURS]
        pads = [placement[f"{colour}_pad"][:2] for colour in PAD_COLOURS]
        crossed = min(math.dist(*pair) for pair in itertools.product(blocks, pads))
        apart = math.dist(*blocks) > BLOCKS_APART and math.dist(*pads) > PADS_APART
        return apart and crossed > APART

    def remember(self, now: Snapshot) -> dict[str, Array]:
        """Nothing but the errand, which a reset has told."""
        return {}

    def hidden(self, memory: dict[str, Array]) -> dict[str, Array]:
        """Nothing ever disappears."""
        return {}

    def _of(self, now: Snapshot, role: str, values: dict[str, Array]) -> Array:
        return asked(self.errands, now.memory[ERRAND], role, values)

    def _other(self, now: Snapshot, role: str, values: dict[str, Array]) -> Array:
        # The last errand asks for neither thing of the first, and so on: read backwards, they tell the others.
        return asked(self.errands[::-1], now.memory[ERRAND], role, values)

    def _touched(self, now: Snapshot) -> dict[str, Array]:
        return {block: touched for (block, _), touched in now.contact.items()}

    def _settled(self, now: Snapshot, block: Array, velocity: Array, touched: Array) -> Array:
        """(n,) bool: a block lies still on the table, let go."""
        slow = (rotation.norm(velocity[:, :3]) < 0.03) & (rotation.norm(velocity[:, 3:]) < 0.7)
        return (block[:, 2] < LYING) & slow & ~touched

    def success(self, now: Snapshot, gripper: Array) -> Array:
        """The named block lies still on the named pad, the gripper is open and does not touch it."""
        block, pad = (self._of(now, role, now.position) for role in ("grasped", "goal"))
        velocity = self._of(now, "grasped", now.velocity)
        settled = self._settled(now, block, velocity, self._of(now, "grasped", self._touched(now)))
        free = (gripper > 0.5) & (now.width > HELD_WIDTH[1])
        return settled & free & (rotation.norm((block - pad)[:, :2]) < WELL_ON) & ~self.lost(now)

    def lost(self, now: Snapshot) -> Array:
        """A block lies where it should not: on a pad that was not asked for it, or off the table's reachable part."""
        xp = array_namespace(now.tcp)
        pad, other_pad = self._of(now, "goal", now.position), self._other(now, "goal", now.position)
        away = xp.zeros_like(now.width, dtype=xp.bool)
        for choose, wrong in ((self._of, (other_pad,)), (self._other, (pad, other_pad))):
            block = choose(now, "grasped", now.position)
            settled = self._settled(
                now,
                block,
                choose(now, "grasped", now.velocity),
                choose(now, "grasped", self._touched(now)),
            )
            for place in wrong:
                away = away | (settled & (rotation.norm((block - place)[:, :2]) < PAD))
            x, y = block[:, 0], block[:, 1]
            away = away | (x < 0.2) | (x > 0.85) | (xp.abs(y) > 0.5)
        return away

    def terms(self, now: Snapshot, gripper: Array) -> dict[str, Array]:
        """How near the hand is to the named block, whether it is held, and how near that is to the named pad."""
        xp = array_namespace(now.tcp)
        block, pad = (self._of(now, role, now.position) for role in ("grasped", "goal"))
        held = xp.astype(self.held(now), now.tcp.dtype)
        return {
            "reach": 1.0 - xp.tanh(5.0 * rotation.norm(block - now.tcp)),
            "grasp": held,
            "carry": held * (1.0 - xp.tanh(5.0 * rotation.norm((block - pad)[:, :2]))),
        }

    def held(self, now: Snapshot) -> Array:
        """(n,) bool: the named block is between fingers that cannot close further."""
        return self._between(now, self._of(now, "grasped", now.position))

    def _between(self, now: Snapshot, block: Array) -> Array:
        low, high = HELD_WIDTH
        near = rotation.norm(block - now.tcp) < HELD_REACH
        return near & (now.width > low) & (now.width < high)

    def privileged(self, now: Snapshot) -> Array:
        """(n, P) as `privileged_names` say; the angle is fourfold, as a quarter of a turn grasps the same."""
        xp = array_namespace(now.tcp)
        block, pad = (self._of(now, role, now.position) for role in ("grasped", "goal"))
        held = xp.astype(self.held(now), now.tcp.dtype)
        columns = [
            block,
            _fourfold(self._of(now, "grasped", now.turn)),
            pad[:, :2],
            held[:, None],
            self._of(now, "grasped", now.velocity)[:, :3],
            block - now.tcp,
        ]
        for colour in COLOURS:
            name = f"{colour}_block"
            columns += [now.position[name], _fourfold(now.turn[name])]
        columns += [now.position[f"{colour}_pad"][:, :2] for colour in PAD_COLOURS]
        return xp.astype(xp.concat(columns, axis=1), xp.float32)

    def expert(self, now: Snapshot, target: Array, target_turn: Array) -> Array:
        """(n, 7) actions: take the named block from above, carry it over the named pad, put it down, let go."""
        xp = array_namespace(now.tcp)
        block, pad = (self._of(now, role, now.position) for role in ("grasped", "goal"))
        other = self._other(now, "grasped", now.position)
        held, wrong = self.held(now), self._between(now, other)
        aside = rotation.norm((block - pad)[:, :2])
        done = (aside < WELL_ON) & (block[:, 2] < LYING) & ~held
        # Nothing is moved sideways between the blocks: the lower the hand, the more it only rises.
        raised = xp.clip((now.tcp[:, 2] - 0.045) / 0.05, min=0.0, max=1.0)[:, None]

        # Approach: the nearer the hand is to standing square over the block, the lower it may go.
        yaw = rotation.wrap(rotation.yaw(self._of(now, "grasped", now.turn)), math.pi / 2)
        grasp_turn = rotation.about_z(yaw) @ down(now.tcp)
        off = rotation.norm((block - now.tcp)[:, :2])
        skew = rotation.norm(rotation.log(grasp_turn @ rotation.transpose(now.tcp_turn)))
        astray = xp.clip(off - 0.008, min=0.0) + 0.05 * xp.clip(skew - 0.1, min=0.0)
        height = xp.clip(block[:, 2], min=HALF)
        over = xp.clip(xp.where(off < 0.03, 1.0 + 0.0 * off, raised[:, 0]), min=0.1)[:, None]
        sideways = target[:, :2] + over * (block - target)[:, :2]
        raise_by = xp.clip(3.0 * astray, max=HOVER)
        reach = xp.concat([sideways, (height + raise_by)[:, None]], axis=1)
        close = (off < 0.012) & (skew < 0.15) & (now.tcp[:, 2] - height < 0.01)

        # Carry, and lower where it belongs; what is wrong is put down short of the pads.
        place = xp.stack([xp.clip(other[:, 0], max=ASIDE_X), other[:, 1]], axis=1)
        place = xp.where(held[:, None], pad[:, :2], place)
        holding = xp.where(held[:, None], block, other)
        far = rotation.norm(holding[:, :2] - place)
        level = HEIGHT - LOW / 2 + xp.clip(5.0 * (far - 0.02), min=0.0, max=TRANSPORT - HEIGHT)
        straight = xp.where((far < 0.03)[:, None], 1.0 + 0.0 * raised, raised)
        sideways = target[:, :2] + straight * (place + (now.tcp - holding)[:, :2] - target[:, :2])
        carry = xp.concat([sideways, level[:, None]], axis=1)
        release = (far < 0.03) & (holding[:, 2] < HEIGHT + LOW)

        taken = held | wrong
        leave = xp.concat([target[:, :2], 0.0 * off[:, None] + TRANSPORT + 0.02], axis=1)
        goal = xp.where(taken[:, None], carry, xp.where(done[:, None], leave, reach))
        turn = xp.where((taken | done)[:, None, None], target_turn, grasp_turn)
        opening = xp.astype(xp.where(taken, release, done | ~close), now.tcp.dtype)
        spin = rotation.log(turn @ rotation.transpose(target_turn))
        return xp.concat([goal - target, spin, opening[:, None]], axis=1)
