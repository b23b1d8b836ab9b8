"""Record the signatures of the arm libraries that the drivers call, for `tests/test_bridge_arms.py`.

    python scripts/arm_signatures.py tests/data/arm_signatures.json

Run it in an environment that holds franky-control, ur-rtde, xarm-python-sdk, opencv-python-headless and lerobot
(without its dependencies); none of them is needed for the tests. A library that is missing keeps what was recorded.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# What the drivers use, by distribution: a module and its names. Nothing else may be called.
USED = {
    "franky-control": {
        "franky": (
            *("Robot", "Robot.move", "Robot.stop", "Robot.join_motion", "Robot.poll_motion"),
            *("Robot.recover_from_errors", "Robot.set_collision_behavior", "Robot.set_load"),
            *("Robot.state", "Robot.is_in_control", "Robot.current_pose"),
            *("RobotState.O_T_EE", "RobotState.O_F_ext_hat_K", "RobotState.q"),
            *(
                "RobotState.robot_mode",
                "RobotState.current_errors",
                "RobotState.last_motion_errors",
            ),
            *("RobotMode.Other", "RobotMode.Idle", "RobotMode.Move", "RobotMode.Guiding"),
            *("RobotMode.Reflex", "RobotMode.UserStopped", "RobotMode.AutomaticErrorRecovery"),
            *("RobotPose.end_effector_pose", "Affine", "Affine.matrix", "CartesianReference"),
            *("CartesianImpedanceTrackingMotion", "CartesianImpedanceTrackingMotion.set_gains"),
            *("CartesianImpedanceTrackingMotion.set_reference", "CartesianImpedanceGains.diagonal"),
            *("PostureTask", "TorqueStopMotion", "JointMotion"),
            *("RealtimeConfig.Enforce", "RealtimeConfig.Ignore"),
            *("Errors.cartesian_reflex", "Errors.communication_constraints_violation"),
            *("Gripper", "Gripper.grasp_async", "Gripper.move_async", "Gripper.width"),
            *("Gripper.max_width", "BoolFuture.wait", "BoolFuture.get"),
            *("Exception", "CommandException", "ControlException", "NetworkException"),
            *("IncompatibleVersionException", "RealtimeException", "InvalidMotionTypeException"),
        )
    },
    "ur-rtde": {
        "rtde_control": tuple(
            f"RTDEControlInterface{name}"
            for name in (
                *("", ".servoL", ".servoStop", ".moveJ", ".stopJ", ".stopScript", ".disconnect"),
                *(".setPayload", ".isProgramRunning", ".reuploadScript"),
                *(".isConnected", ".reconnect"),
            )
        ),
        "rtde_receive": tuple(
            f"RTDEReceiveInterface{name}"
            for name in (
                *("", ".isConnected", ".getActualTCPPose", ".getActualTCPForce", ".getActualQ"),
                *(".getSafetyStatusBits", ".getRobotMode", ".reconnect", ".disconnect"),
            )
        ),
        "dashboard_client": tuple(
            f"DashboardClient{name}"
            for name in (
                *("", ".connect", ".closeSafetyPopup", ".unlockProtectiveStop", ".disconnect"),
            )
        ),
    },
    "xarm-python-sdk": {
        "xarm.wrapper": tuple(
            f"XArmAPI{name}"
            for name in (
                *("", ".connected", ".axis", ".error_code", ".state", ".ft_ext_force"),
                *(".connect", ".disconnect", ".motion_enable", ".set_mode", ".set_state"),
                *(".set_tcp_load", ".set_ft_sensor_enable", ".get_position_aa"),
                *(".get_servo_angle", ".set_servo_cartesian_aa", ".set_servo_angle"),
                *(".clean_error", ".clean_warn", ".set_gripper_mode", ".set_gripper_enable"),
                *(".set_gripper_speed", ".set_gripper_position", ".get_gripper_position"),
            )
        )
    },
    "opencv-python-headless": {
        "cv2": (
            *("VideoCapture", "VideoCapture.isOpened", "VideoCapture.set", "VideoCapture.grab"),
            *("VideoCapture.retrieve", "VideoCapture.release", "CAP_V4L2", "CAP_PROP_FRAME_WIDTH"),
            *("CAP_PROP_FRAME_HEIGHT", "CAP_PROP_FPS", "CAP_PROP_BUFFERSIZE"),
        )
    },
}
# LeRobot's are read from its source: importing it needs torch.
SOURCES = {
    "lerobot": {
        "lerobot/robots/robot.py": (
            *("Robot.connect", "Robot.disconnect", "Robot.is_connected", "Robot.is_calibrated"),
            *("Robot.get_observation", "Robot.send_action"),
            *("Robot.action_features", "Robot.observation_features"),
        ),
        "lerobot/robots/utils.py": ("make_robot_from_config",),
        "lerobot/teleoperators/teleoperator.py": (
            *("Teleoperator.connect", "Teleoperator.disconnect", "Teleoperator.is_connected"),
            *("Teleoperator.get_action", "Teleoperator.action_features"),
        ),
        "lerobot/teleoperators/utils.py": ("make_teleoperator_from_config",),
        "lerobot/teleoperators/gamepad/teleop_gamepad.py": ("GamepadTeleop.get_teleop_events",),
        "lerobot/cameras/camera.py": (
            *("Camera.connect", "Camera.disconnect", "Camera.is_connected", "Camera.async_read"),
        ),
        "lerobot/cameras/utils.py": ("make_cameras_from_configs",),
        "lerobot/utils/import_utils.py": ("register_third_party_plugins",),
        "lerobot/model/kinematics.py": (
            *("RobotKinematics.forward_kinematics", "RobotKinematics.inverse_kinematics"),
        ),
    }
}


def recorded(thing: Any) -> Any:
    """A list of signatures, each a list of [name, has a default]; "value" for what is no call."""
    if isinstance(thing, type):
        made = [s for s in recorded_call(thing.__init__) if s is not None]
        return made or [[]]
    return recorded_call(thing) if callable(thing) else "value"


def recorded_call(call: Any) -> list:
    """From Python's own signature, or from the lines that pybind11 writes into a docstring."""
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return [_written(line) for line in _signatures(call.__doc__ or "")]
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [
        [
            [kinds.get(p.kind, "") + p.name, p.default is not p.empty]
            for p in parameters
            if p.name != "self"
        ]
    ]


def _signatures(text: str) -> list[str]:
    found = re.findall(r"^(?:\d+\. )?\w+\((.*)\)(?: ->.*)?$", text, re.MULTILINE)
    return [line for line in found if not line.startswith("*args")]


def _written(inside: str) -> list:
    parts, depth, word = [], 0, ""
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(word)
            word = ""
        else:
            word += letter
    parts.append(word)
    found = []
    for part in map(str.strip, parts):
        name = re.match(r"\w+", part)
        if name and name[0] != "self":
            found.append([name[0], "=" in re.sub(r"\[.*?\]", "", part)])
    return found


def from_modules(modules: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """{module.name: signatures} of what can be imported."""
    found = {}
    for module, names in modules.items():
        library = importlib.import_module(module)
        for name in names:
            thing: Any = library
            for part in name.split("."):
                thing = (
                    inspect.getattr_static(thing, part) if part != name else getattr(library, part)
                )
                thing = getattr(thing, "__func__", thing)
            found[f"{module}.{name}"] = "value" if isinstance(thing, property) else recorded(thing)
    return found


def from_sources(distribution: str, files: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """{package.name: signatures} by reading."""
    found = {}
    for file, names in files.items():
        text = Path(metadata.distribution(distribution).locate_file(file)).read_text()
        for name in names:
            node: Any = ast.parse(text)
            for part in name.split("."):
                node = next(n for n in node.body if getattr(n, "name", None) == part)
            marks = [ast.unparse(d) for d in node.decorator_list]
            arguments = node.args.args
            first = len(arguments) - len(node.args.defaults)
            signature = [[a.arg, i >= first] for i, a in enumerate(arguments) if a.arg != "self"]
            found[f"{distribution}.{name}"] = "value" if "property" in marks else [signature]
    return found


def main() -> None:
    """Write the file."""
    path = Path(sys.argv[1])
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for read, table in ((None, USED), (from_sources, SOURCES)):
        for distribution, names in table.items():
            try:
                version = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                print(f"{distribution} is not installed: its record stays")
                continue
            found = read(distribution, names) if read else from_modules(names)
            record[distribution] = {"version": version, "signatures": found}
            print(f"{distribution} {version}: {len(found)} signatures")
    lines = []
    for distribution, entry in sorted(record.items()):
        rows = ",\n".join(
            f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(entry["signatures"].items())
        )
        lines.append(
            f'  "{distribution}": {{"version": "{entry["version"]}", "signatures": {{\n{rows}\n  }}}}'
        )
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
