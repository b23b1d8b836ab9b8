"""The launcher of the simulator's app."""

import isaaclab


class App:
    def close(self):
        isaaclab.LAUNCHED = False


class AppLauncher:
    def __init__(self, launcher_args=None, **kwargs):
        assert launcher_args is None and set(kwargs) <= {"headless", "enable_cameras", "device"}, (
            kwargs
        )
        assert isinstance(kwargs["headless"], bool) and kwargs["device"].startswith("cuda"), kwargs
        isaaclab.LAUNCHED, isaaclab.CAMERAS = True, kwargs["enable_cameras"]
        self.app = App()
