"""The CPU's ray tracer: a thread is a tile of pixels of one camera in one world.

A general tracer asks a tree for each ray what it may hit. Here a tile first leaves out every geom whose bounding sphere
its cone of rays misses, and then tests the few that are left, one geom for all rays at a time. What is drawn is what
mujoco-warp's tracer draws: diffuse light of directional lamps and the headlight, no shadows, two-sided surfaces.
"""

from __future__ import annotations

import mujoco
import warp as wp

wp.config.quiet = True
wp.config.log_level = getattr(wp, "LOG_ERROR", 40)
wp.set_module_options({"enable_backward": False, "fast_math": True})

TILE = 8  # pixels, a tile's width and height
_TILE = wp.constant(TILE)
_PIXELS = wp.constant(TILE * TILE)
_FAR = wp.constant(1.0e9)
_PLANE = wp.constant(int(mujoco.mjtGeom.mjGEOM_PLANE))
_SPHERE = wp.constant(int(mujoco.mjtGeom.mjGEOM_SPHERE))
_CAPSULE = wp.constant(int(mujoco.mjtGeom.mjGEOM_CAPSULE))
_CYLINDER = wp.constant(int(mujoco.mjtGeom.mjGEOM_CYLINDER))
_BOX = wp.constant(int(mujoco.mjtGeom.mjGEOM_BOX))
KINDS = (_PLANE, _SPHERE, _CAPSULE, _CYLINDER, _BOX)

Depths = wp.types.vector(length=TILE * TILE, dtype=wp.float32)
Owners = wp.types.vector(length=TILE * TILE, dtype=wp.int32)


@wp.func
def _plane(start: wp.vec3, way: wp.vec3, size: wp.vec3) -> float:
    """Distance along a ray in the geom's frame, beyond everything where it misses; the same below."""
    if way[2] > -1.0e-12:
        return _FAR
    distance = -start[2] / way[2]
    x, y = start[0] + distance * way[0], start[1] + distance * way[1]
    if distance < 0.0 or (size[0] > 0.0 and wp.abs(x) > size[0]):
        return _FAR
    if size[1] > 0.0 and wp.abs(y) > size[1]:
        return _FAR
    return distance


@wp.func
def _sphere(start: wp.vec3, way: wp.vec3, radius: float) -> float:
    b = wp.dot(way, start)
    root = b * b - wp.dot(start, start) + radius * radius
    if root < 0.0:
        return _FAR
    root = wp.sqrt(root)
    if -b - root >= 0.0:
        return -b - root
    if -b + root >= 0.0:
        return -b + root
    return _FAR


@wp.func
def _round_side(start: wp.vec3, way: wp.vec3, radius: float, half: float) -> float:
    """The side of a cylinder along z, without its ends."""
    a = way[0] * way[0] + way[1] * way[1]
    b = way[0] * start[0] + way[1] * start[1]
    c = start[0] * start[0] + start[1] * start[1] - radius * radius
    root = b * b - a * c
    if root < 0.0 or a < 1.0e-12:
        return _FAR
    root = wp.sqrt(root)
    distance = (-b - root) / a
    if distance < 0.0:
        distance = (-b + root) / a
    if distance < 0.0 or wp.abs(start[2] + distance * way[2]) > half:
        return _FAR
    return distance


@wp.func
def _capsule(start: wp.vec3, way: wp.vec3, radius: float, half: float) -> float:
    side = _round_side(start, way, radius, half)
    if side < _FAR and start[0] * start[0] + start[1] * start[1] > radius * radius:
        return side  # from outside its cylinder a ray meets the side before the ends
    top = _sphere(wp.vec3(start[0], start[1], start[2] - half), way, radius)
    if top < _FAR and start[2] + top * way[2] < half:
        top = _FAR
    bottom = _sphere(wp.vec3(start[0], start[1], start[2] + half), way, radius)
    if bottom < _FAR and start[2] + bottom * way[2] > -half:
        bottom = _FAR
    return wp.min(side, wp.min(top, bottom))


@wp.func
def _cylinder(start: wp.vec3, way: wp.vec3, radius: float, half: float) -> float:
    nearest = _round_side(start, way, radius, half)
    if wp.abs(way[2]) > 1.0e-12:
        for side in range(2):
            distance = (half * (2.0 * float(side) - 1.0) - start[2]) / way[2]
            x, y = start[0] + distance * way[0], start[1] + distance * way[1]
            if distance >= 0.0 and distance < nearest and x * x + y * y <= radius * radius:
                nearest = distance
    return nearest


@wp.func
def _box(start: wp.vec3, way: wp.vec3, size: wp.vec3) -> float:
    enter, leave = -_FAR, _FAR
    for i in range(3):
        if wp.abs(way[i]) > 1.0e-12:
            inverse = 1.0 / way[i]
            middle, reach = -start[i] * inverse, wp.abs(size[i] * inverse)
            enter, leave = wp.max(enter, middle - reach), wp.min(leave, middle + reach)
        elif wp.abs(start[i]) > size[i]:
            return _FAR
    if enter > leave or leave < 0.0:
        return _FAR
    if enter < 0.0:
        return leave
    return enter


@wp.func
def _normal(kind: int, at: wp.vec3, size: wp.vec3) -> wp.vec3:
    """The outward normal at a point of a geom's surface, in the geom's frame."""
    if kind == _PLANE:
        return wp.vec3(0.0, 0.0, 1.0)
    if kind == _SPHERE:
        return wp.normalize(at)
    if kind == _CAPSULE:
        return wp.normalize(wp.vec3(at[0], at[1], at[2] - wp.clamp(at[2], -size[1], size[1])))
    if kind == _CYLINDER:
        # Whichever of end and side the point is nearer to.
        across = wp.sqrt(at[0] * at[0] + at[1] * at[1])
        if size[1] - wp.abs(at[2]) < size[0] - across:
            return wp.vec3(0.0, 0.0, wp.sign(at[2]))
        return wp.vec3(at[0] / across, at[1] / across, 0.0)
    x, y, z = wp.abs(at[0]) - size[0], wp.abs(at[1]) - size[1], wp.abs(at[2]) - size[2]
    if x >= y and x >= z:
        return wp.vec3(wp.sign(at[0]), 0.0, 0.0)
    if y >= z:
        return wp.vec3(0.0, wp.sign(at[1]), 0.0)
    return wp.vec3(0.0, 0.0, wp.sign(at[2]))


@wp.kernel
def trace(
    kinds: wp.array(dtype=wp.int32),
    sizes: wp.array(dtype=wp.vec3),
    bounds: wp.array(dtype=wp.float32),
    geom_at: wp.array2d(dtype=wp.vec3),
    geom_turn: wp.array2d(dtype=wp.mat33),
    colours: wp.array2d(dtype=wp.vec4),
    camera_at: wp.array2d(dtype=wp.vec3),
    camera_turn: wp.array2d(dtype=wp.mat33),
    lamp: wp.array2d(dtype=wp.vec3),
    lamp_way: wp.array2d(dtype=wp.vec3),
    ambient: wp.vec3,
    headlight: wp.vec3,
    camera: int,
    rays: wp.array(dtype=wp.vec3),
    tile_way: wp.array(dtype=wp.vec3),
    tile_cos: wp.array(dtype=wp.float32),
    size: int,
    first: int,
    image: wp.array4d(dtype=wp.uint8),
):
    world, tile = wp.tid()
    across = (size + _TILE - 1) // _TILE
    left, top = (tile % across) * _TILE, (tile // across) * _TILE
    wide, high = wp.min(_TILE, size - left), wp.min(_TILE, size - top)
    eye, look = camera_at[world, camera], camera_turn[world, camera]
    centre, cos = look @ tile_way[tile], tile_cos[tile]
    sin = wp.sqrt(wp.max(0.0, 1.0 - cos * cos))

    depths, owners = Depths(), Owners()
    for k in range(wp.static(TILE * TILE)):
        depths[k] = _FAR
        owners[k] = -1

    for g in range(kinds.shape[0]):
        if colours[world, g][3] == 0.0:
            continue
        kind = kinds[g]
        away = geom_at[world, g] - eye
        if kind != _PLANE:
            radius = bounds[g]
            rest = wp.dot(away, away) - radius * radius
            if rest > 0.0 and wp.dot(away, centre) < cos * wp.sqrt(rest) - sin * radius:
                continue
        turn = wp.transpose(geom_turn[world, g])
        start, into, extent = -(turn @ away), turn @ look, sizes[g]
        for y in range(high):
            for x in range(wide):
                k = y * _TILE + x
                way = into @ rays[(top + y) * size + left + x]
                distance = _FAR
                if kind == _PLANE:
                    distance = _plane(start, way, extent)
                elif kind == _CAPSULE:
                    distance = _capsule(start, way, extent[0], extent[1])
                elif kind == _BOX:
                    distance = _box(start, way, extent)
                elif kind == _SPHERE:
                    distance = _sphere(start, way, extent[0])
                else:
                    distance = _cylinder(start, way, extent[0], extent[1])
                # Of two surfaces in one place the later geom is seen.
                if distance < _FAR and distance <= depths[k] + 1.0e-6 * wp.max(1.0, depths[k]):
                    depths[k] = distance
                    owners[k] = g

    towards = wp.vec3(look[0, 2], look[1, 2], look[2, 2])  # back to the camera
    for y in range(high):
        for x in range(wide):
            k = y * _TILE + x
            g = owners[k]
            colour = wp.vec3(0.0, 0.0, 0.0)
            if g >= 0:
                way = look @ rays[(top + y) * size + left + x]
                turn = geom_turn[world, g]
                at = wp.transpose(turn) @ (eye + way * depths[k] - geom_at[world, g])
                normal = turn @ _normal(kinds[g], at, sizes[g])
                if wp.dot(normal, way) > 0.0:
                    normal = -normal
                light = ambient + headlight * wp.max(0.0, wp.dot(normal, towards))
                for n in range(lamp.shape[1]):
                    light += lamp[world, n] * wp.max(0.0, -wp.dot(normal, lamp_way[world, n]))
                paint = colours[world, g]
                colour = wp.cw_mul(wp.vec3(paint[0], paint[1], paint[2]), light)
            for c in range(3):
                level = 255.0 * wp.clamp(colour[c], 0.0, 1.0)
                image[first + world, top + y, left + x, c] = wp.uint8(int(level))
