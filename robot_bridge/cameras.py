"""Cameras by kind, each filmed by a thread of its own."""

from __future__ import annotations

import abc
import importlib
import threading
import time
from typing import Any, Dict, NamedTuple, Tuple

import numpy as np

from robot_bridge.driver import Frame
from twinrl.core.errors import ConfigError, DeadlineError, TwinRLError

KINDS = {
    "v4l2": "robot_bridge.cameras:V4L2",
    "realsense": "robot_bridge.cameras:RealSense",
    "lerobot": "robot_bridge.drivers.lerobot:LeRobotCamera",
}
OPEN_S = 10.0  # until a camera must have sent its first frame
READ_S = 1.0  # a camera that sends nothing for so long has failed
AGAIN_S = 0.5  # after which one that has failed is opened again


class Mode(NamedTuple):
    """What a camera is asked for."""

    width: int = 640  # pixels
    height: int = 480
    hz: int = 30


class Camera(abc.ABC):
    """One device. `open`, `read` and `close` are called by one thread."""

    def __init__(self, address: str) -> None:
        self.address = address

    @abc.abstractmethod
    def open(self, mode: Mode) -> None:
        """Reach the device; TwinRLError says in words why that fails."""

    @abc.abstractmethod
    def read(self) -> Frame:
        """The next frame, RGB, of any size. TwinRLError where none comes within `READ_S`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the device, also after a failure; `open` may come again."""


class V4L2(Camera):
    """A camera of the Linux kernel, by OpenCV: address is a device file, or its number."""

    _capture: Any = None

    def open(self, mode: Mode) -> None:
        """ConfigError without OpenCV."""
        cv2 = self._cv2 = load("cv2", "opencv-python-headless", "camera kind v4l2")
        device = int(self.address) if self.address.isdigit() else self.address
        self._capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
        if not self._capture.isOpened():
            raise TwinRLError(f"{self.address} cannot be opened: is it plugged in, and not in use?")
        wanted = (
            (cv2.CAP_PROP_FRAME_WIDTH, mode.width),
            (cv2.CAP_PROP_FRAME_HEIGHT, mode.height),
            (cv2.CAP_PROP_FPS, mode.hz),
            # More than one buffered frame would only make the newest one older.
            (cv2.CAP_PROP_BUFFERSIZE, 1),
        )
        for setting, value in wanted:
            self._capture.set(setting, value)

    def read(self) -> Frame:
        """Its time is the end of the transfer: exposure was one to two frames before.

        OpenCV itself waits for up to 10 s; a guard knows long before that frames are late.
        """
        if not self._capture.grab():
            raise TwinRLError(f"{self.address} sends no frames any more: was it unplugged?")
        now = time.monotonic()
        there, image = self._capture.retrieve()
        if not there or image is None:
            raise TwinRLError(f"{self.address} sent a frame that cannot be decoded")
        return Frame(now, np.ascontiguousarray(image[..., ::-1]))  # OpenCV has blue first

    def close(self) -> None:
        """Release the device."""
        if self._capture is not None:
            self._capture.release()


class RealSense(Camera):
    """The colour camera of a RealSense, by its serial number."""

    _pipeline: Any = None

    def open(self, mode: Mode) -> None:
        """ConfigError without pyrealsense2."""
        rs = self._rs = load("pyrealsense2", "pyrealsense2", "camera kind realsense")
        self._pipeline, config = rs.pipeline(), rs.config()
        config.enable_device(self.address)
        config.enable_stream(rs.stream.color, mode.width, mode.height, rs.format.rgb8, mode.hz)
        try:
            self._pipeline.start(config)
        except RuntimeError as error:
            self._pipeline = None
            raise TwinRLError(f"RealSense {self.address}: {error}") from None

    def read(self) -> Frame:
        """Its time is that of the exposure where the device's clock is this PC's, else of its arrival."""
        try:
            color = self._pipeline.wait_for_frames(int(1000 * READ_S)).get_color_frame()
        except RuntimeError as error:
            raise TwinRLError(f"RealSense {self.address}: {error}") from None
        now, age = time.monotonic(), 0.0
        domain = self._rs.timestamp_domain
        if color.get_frame_timestamp_domain() in (domain.system_time, domain.global_time):
            age = time.time() - color.get_timestamp() / 1000.0
        # The library uses the buffer again.
        return Frame(now - min(max(age, 0.0), READ_S), np.array(color.get_data()))

    def close(self) -> None:
        """Stop the stream."""
        if self._pipeline is not None:
            self._pipeline.stop()


def load(module: str, package: str, what: str) -> Any:
    """A library that only this PC needs; ConfigError says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{what} needs {package} ({error}): pip install {package}") from None


def parse(text: str) -> Dict[str, Tuple[str, str]]:
    """{name: (kind, address)} of "side=v4l2:/dev/video0,wrist=realsense:SERIAL"."""
    found: Dict[str, Tuple[str, str]] = {}
    for part in filter(None, (part.strip() for part in str(text).split(","))):
        name, equals, device = part.partition("=")
        kind, colon, address = device.partition(":")
        if not (name and equals and colon and address):
            raise ConfigError(f"camera {part!r} is not of the form NAME=KIND:ADDRESS")
        if kind not in KINDS:
            raise ConfigError(f"camera {name!r}: kind {kind!r} is none of {', '.join(KINDS)}")
        found[name] = (kind, address)
    return found


def make_camera(kind: str, address: str) -> Camera:
    """A camera that is not opened yet."""
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)(address)


class Cameras:
    """Several cameras, each filmed by a thread; frames are squares of `size` pixels."""

    def __init__(self, cameras: Dict[str, Camera], size: int, mode: Mode) -> None:
        """All are opened at once. TwinRLError names the one that fails, or sends nothing for `OPEN_S`."""
        self._cameras, self._size, self._mode = cameras, size, mode
        self._closing = threading.Event()
        self._frames: Dict[str, Frame] = {}
        self._errors: Dict[str, Exception] = {}
        self._threads = [
            threading.Thread(target=self._film, args=item, name=f"camera-{item[0]}", daemon=True)
            for item in cameras.items()
        ]
        for thread in self._threads:
            thread.start()
        try:
            self.wait(time.monotonic() - 1.0, OPEN_S)
        except BaseException:
            self.close()
            raise

    @property
    def error(self) -> str:
        """Which camera has failed, and why; empty while all of them film."""
        return "; ".join(f"camera {n!r}: {error}" for n, error in dict(self._errors).items())

    def frames(self) -> Dict[str, Frame]:
        """The newest of each camera."""
        return dict(self._frames)

    def wait(self, since: float, seconds: float) -> None:
        """Until each camera has a frame that is newer than `since`, s of the monotonic clock."""
        deadline = time.monotonic() + seconds
        while True:
            if self._errors:
                wrong = [e for e in list(self._errors.values()) if isinstance(e, ConfigError)]
                raise (ConfigError if wrong else TwinRLError)(self.error)
            late = [
                n for n in self._cameras if n not in self._frames or self._frames[n].time <= since
            ]
            if not late:
                return
            if time.monotonic() > deadline:
                raise DeadlineError(f"camera {late[0]!r} has sent no frame for {seconds:g} s")
            time.sleep(0.005)

    def close(self) -> None:
        """End the threads; each lets go of its device."""
        self._closing.set()
        for thread in self._threads:
            thread.join(READ_S + 1.0)

    def _film(self, name: str, camera: Camera) -> None:
        """Again and again: somebody may plug it in again."""
        while not self._closing.is_set():
            try:
                camera.open(self._mode)
                while not self._closing.is_set():
                    frame = camera.read()
                    self._frames[name] = Frame(frame.time, square(frame.image, self._size))
                    self._errors.pop(name, None)
            except Exception as error:  # told by whoever looks next
                self._errors.setdefault(name, error)  # why it failed, not why it cannot be opened
            finally:
                camera.close()
            self._closing.wait(AGAIN_S)


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square of `image` (H, W, 3) uint8 as (size, size, 3), each pixel the mean of those it covers."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(image)
    edges = np.arange(size) * side // size
    if side < size:
        return np.ascontiguousarray(image[edges][:, edges])
    counts = np.diff(np.append(edges, side))
    rows = np.add.reduceat(image, edges, axis=0, dtype=np.uint32)
    sums = np.add.reduceat(rows, edges, axis=1)
    area = np.outer(counts, counts)[..., None]
    return ((sums + area // 2) // area).astype(np.uint8)
