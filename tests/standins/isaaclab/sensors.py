# ruff: noqa: RUF012
"""Cameras and contact sensors."""

from isaaclab.settings import MISSING, Settings


class ContactSensorCfg(Settings):
    FIELDS = {"prim_path": MISSING, "update_period": 0.0}


class TiledCameraCfg(Settings):
    FIELDS = {
        "prim_path": MISSING,
        "offset": None,
        "spawn": MISSING,
        "width": MISSING,
        "height": MISSING,
        "data_types": ["rgb"],
        "update_period": 0.0,
    }

    class OffsetCfg(Settings):
        FIELDS = {"pos": (0.0,) * 3, "rot": (1.0, 0.0, 0.0, 0.0), "convention": "ros"}
