"""The web server of the page: live figures, Prometheus, camera pictures and commands, on one port.

It reads the collector and keeps nothing; it may die and restart without harm.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import hmac
import json
import logging
import os
import re
import secrets
import signal
from pathlib import Path
from typing import Any

from aiohttp import web

from dashboard import prometheus
from dashboard.record import split_history
from dashboard.source import (
    FileSource,
    LiveSource,
    collector_address,
    find_run,
    open_source,
)
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.keys import Keys
from twinrl.core.sockets import Answer, Client

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
PORT = 8265
COOKIE = "twinrl"
MAX_HISTORY = 300_000  # points that a page gets at first
PERIOD_S = 0.5  # how often the collector is asked
TIMEOUT_S = 3.0
KEEPALIVE_S = 2.0  # ages on the page move on even when nothing new arrives
ROBOT_ACTIONS = ("hold", "release", "detach", "estop")
ACTIONS = ("pause", "resume", "checkpoint", *ROBOT_ACTIONS)
TOKEN_FILE, ADDRESS_FILE = "dashboard.token", "dashboard.json"
NAME = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Dashboard:
    """The server of one run's page. Without `query_address` it shows what a finished run left."""

    def __init__(
        self, run_dir: Path, query_address: str | None, gateway_address: str | None
    ) -> None:
        self.run_dir = Path(run_dir)
        self.token = make_token(self.run_dir)
        self.source = (
            LiveSource(self.run_dir, query_address, TIMEOUT_S)
            if query_address
            else FileSource(self.run_dir)
        )
        self.gateway = None
        if gateway_address:
            keys = Keys.load(self.run_dir / "keys" / "cluster.key")
            self.gateway = Client("the gateway", gateway_address, keys, TIMEOUT_S)
        self._listeners: set[asyncio.Queue[str]] = set()
        self._runner: web.AppRunner | None = None
        self._poller: asyncio.Task | None = None
        self._guarded = True
        self.url = ""

    async def start(self, host: str, port: int) -> None:
        """Listen; ConfigError when the port is taken."""
        self._guarded = host not in ("127.0.0.1", "localhost", "::1")
        app = web.Application(client_max_size=1 << 16, middlewares=[self._guard])
        app.on_response_prepare.append(_add_headers)
        app.router.add_get("/", self._page)
        app.router.add_get("/api/stream", self._stream)
        app.router.add_get("/api/snapshot", self._snapshot)
        app.router.add_get("/api/history", self._history)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/camera/{robot}/{camera}.jpg", self._camera)
        app.router.add_get("/api/robot/{robot}", self._robot)
        app.router.add_post("/api/command", self._command)
        app.router.add_get("/favicon.ico", _favicon)
        app.router.add_static("/page/", PAGE)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self.stop()
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(
                    f"the dashboard cannot listen on {host}:{port}: {error}"
                ) from None
            raise ConfigError(
                f"port {port} on {host} is taken, so the dashboard cannot use it; give another with "
                f"--port or dashboard.port= (0 picks a free one)"
            ) from None
        bound = self._runner.addresses[0][1]
        shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
        self.url = f"http://{shown}:{bound}/?token={self.token}"
        address = self.run_dir / ADDRESS_FILE
        _write_private(address, json.dumps({"url": self.url, "pid": os.getpid()}))
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Close every connection."""
        if self._poller:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller
        for queue in self._listeners:
            queue.put_nowait("")  # ends its stream
        if self._runner:
            await self._runner.cleanup()
        self.source.close()
        if self.gateway:
            self.gateway.close()

    async def _poll(self) -> None:
        """Ask the collector while somebody looks, and hand on what is new."""
        known, quiet = 0, 0.0
        while True:
            await asyncio.sleep(PERIOD_S)
            if not self._listeners:
                continue
            quiet += PERIOD_S
            try:
                snapshot = await self._ask(known)
            except TwinRLError as error:
                self._tell("away", {"text": str(error)})
                continue
            if snapshot["number"] < known:  # a restarted collector counts anew
                known = 0
                continue
            if snapshot["number"] != known or quiet >= KEEPALIVE_S:
                # A listener that came since has had a full snapshot; events carry their numbers.
                self._tell("update", snapshot)
                known, quiet = snapshot["number"], 0.0

    async def _ask(self, since: int = 0) -> dict[str, Any]:
        if isinstance(self.source, FileSource):
            return self.source.snapshot(since)
        return (await _call(self.source.client, "snapshot", {"since": since}))[0]

    def _tell(self, kind: str, data: dict[str, Any]) -> None:
        text = f"event: {kind}\ndata: {_json(data)}\n\n"
        for queue in self._listeners:
            # A browser that does not read (a sleeping laptop) misses updates; each one is complete.
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(text)

    def _may(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Beyond this machine reading needs the token too: the cameras look into somebody's room."""
        given = (request.query.get("token"), request.cookies.get(COOKIE), _bearer(request))
        if self._guarded and not any(self._may(each) for each in given if each):
            text = "open the address with the token that `twinrl launch` prints"
            return web.Response(text=text, status=403)
        return await handler(request)

    async def _page(self, request: web.Request) -> web.StreamResponse:
        response = web.FileResponse(PAGE / "index.html")
        if self._may(request.query.get("token", "")):
            # For reading only: a command needs the header, which other sites' pages cannot send.
            response.set_cookie(COOKIE, self.token, httponly=True, samesite="Strict")
        return response

    async def _snapshot(self, request: web.Request) -> web.Response:
        try:
            return web.json_response(await self._ask(), dumps=_json)
        except TwinRLError as error:
            return web.json_response({"error": str(error)}, status=503)

    async def _history(self, request: web.Request) -> web.Response:
        try:
            if isinstance(self.source, LiveSource):
                series = split_history(*await _call(self.source.client, "history", {}))
            else:
                series = self.source.history()
        except TwinRLError as error:
            return web.json_response({"error": str(error)}, status=503)
        step = -(-sum(map(len, series.values())) // MAX_HISTORY) or 1
        listed = [
            [*key, [[round(t, 1), float(f"{v:.6g}")] for t, v in points[::-step][::-1].tolist()]]
            for key, points in series.items()
        ]
        response = web.json_response({"series": listed}, dumps=_json)
        response.enable_compression()
        return response

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        queue: asyncio.Queue[str] = asyncio.Queue(maxsize=32)
        self._listeners.add(queue)
        try:
            try:
                first, kind = await self._ask(), "update"
            except TwinRLError as error:
                first, kind = {"text": str(error)}, "away"
            await response.write(f"retry: 1000\nevent: {kind}\ndata: {_json(first)}\n\n".encode())
            while text := await queue.get():
                await response.write(text.encode())
        except ConnectionResetError:
            pass  # the browser went away
        finally:
            self._listeners.discard(queue)
        return response

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            snapshot = await self._ask()
        except TwinRLError as error:
            return web.Response(text=str(error), status=503)
        body = prometheus.exposition(snapshot)
        return web.Response(body=body, headers={"Content-Type": prometheus.CONTENT_TYPE})

    async def _camera(self, request: web.Request) -> web.Response:
        robot, camera = request.match_info["robot"], request.match_info["camera"]
        if not NAME.match(robot) or not NAME.match(camera):
            return web.Response(text="no such camera", status=404)
        try:
            result, arrays = await self._call_gateway("camera", {"robot": robot, "camera": camera})
        except TwinRLError as error:
            return web.Response(text=str(error), status=503)
        if "jpeg" not in arrays:
            return web.Response(text=f"no picture from {robot}/{camera} yet", status=404)
        headers = {"Cache-Control": "no-store", "X-Picture-Time": str(result.get("time", ""))}
        return web.Response(
            body=arrays["jpeg"].tobytes(), content_type="image/jpeg", headers=headers
        )

    async def _robot(self, request: web.Request) -> web.Response:
        """What the gateway knows of one robot, newer than its figures, with the path that it plans."""
        robot = request.match_info["robot"]
        if not NAME.match(robot):
            return web.json_response({"error": "no such robot"}, status=404)
        try:
            result, _ = await self._call_gateway("robot", {"robot": robot})
        except TwinRLError as error:
            return web.json_response({"error": str(error)}, status=503)
        return web.json_response(
            result["robot"], dumps=_json, headers={"Cache-Control": "no-store"}
        )

    async def _command(self, request: web.Request) -> web.Response:
        if not self._may(_bearer(request)):
            text = "commands need the address with the token that `twinrl launch` prints"
            return web.json_response({"error": text}, status=403)
        try:
            command = await request.json()
            action, target = command["action"], command.get("target")
        except (ValueError, KeyError, TypeError, AttributeError):
            text = 'a command is {"action": ..., "target": robot name or absent}'
            return web.json_response({"error": text}, status=400)
        if action not in ACTIONS:
            text = f"unknown action {action!r}; known: {', '.join(ACTIONS)}"
            return web.json_response({"error": text}, status=400)
        if action in ROBOT_ACTIONS and not (isinstance(target, str) and NAME.match(target)):
            return web.json_response({"error": f"{action} needs a robot's name"}, status=400)
        try:
            result, _ = await self._call_gateway("command", {"action": action, "target": target})
        except TwinRLError as error:
            return web.json_response({"error": str(error)}, status=503)
        log.info("command from the page: %s %s", action, target or "")
        return web.json_response({"ok": True, **result}, dumps=_json)

    async def _call_gateway(self, method: str, args: dict[str, Any]) -> Answer:
        if self.gateway is None:
            raise TwinRLError("this dashboard was started without a gateway")
        return await _call(self.gateway, method, args)


async def _call(client: Client, method: str, args: dict[str, Any]) -> Answer:
    """`Client.call` without blocking the event loop."""
    future = client.submit(method, args)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), TIMEOUT_S)
    except TimeoutError:
        client.forget(future)
        raise TwinRLError(
            f"{client.name} at {client.address} has not answered within {TIMEOUT_S:g} s"
        ) from None


def make_token(run_dir: Path) -> str:
    """The run's token for commands; made once, readable by the owner only."""
    path = run_dir / "keys" / TOKEN_FILE
    if path.exists():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_urlsafe(18)
    _write_private(path, token)
    return token


def serve(
    run_dir: str | Path,
    host: str = "127.0.0.1",
    port: int = PORT,
    query_address: str | None = None,
    gateway_address: str | None = None,
) -> None:
    """Serve the page of `run_dir` in this process until SIGTERM or SIGINT."""
    asyncio.run(_serve(Path(run_dir), host, port, query_address, gateway_address))


def command(argv: list[str]) -> int:
    """The command `twinrl dashboard`."""
    parser = argparse.ArgumentParser(
        prog="twinrl dashboard",
        description="Show the page of a run: a live one, or what a finished one left.",
        epilog="examples:\n  twinrl dashboard\n  twinrl dashboard demo --port 8300",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", help="name or folder; the newest run by default")
    parser.add_argument("--runs", default="runs", help="folder of runs (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="interface (%(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="0 picks a free one (%(default)s)")
    arguments = parser.parse_args(argv)
    run_dir = find_run(arguments.run, arguments.runs)
    source = open_source(run_dir)
    source.close()
    query = collector_address(run_dir) if isinstance(source, LiveSource) else None
    gateway = _gateway_address(run_dir) if query else None
    asyncio.run(_serve(run_dir, arguments.host, arguments.port, query, gateway, announce=True))
    return 0


def _gateway_address(run_dir: Path) -> str | None:
    try:
        return json.loads((run_dir / "topology.json").read_text())["gateway_internal"]
    except (OSError, ValueError, KeyError):
        return None


async def _serve(
    run_dir: Path,
    host: str,
    port: int,
    query: str | None,
    gateway: str | None,
    announce: bool = False,
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    dashboard = Dashboard(run_dir, query, gateway)
    await dashboard.start(host, port)
    log.info("dashboard: %s", dashboard.url)
    if announce:
        print(f"run {run_dir.name}: {dashboard.url}\nCtrl-C ends the page, not the run", flush=True)
    await stop.wait()
    await dashboard.stop()


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _json(data: Any) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":"), default=str)


def _bearer(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


async def _favicon(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(PAGE / "icon.svg")


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
