"""The plugin behind the tab: fixed routes, answered from event files below the log directory.

TensorBoard's data provider is not asked: it samples, it differs between the two backends, and it does not forget the
samples that a resumed run writes anew.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug.wrappers import Request, Response

from bnwatch import render
from bnwatch.views import ROUTES, MisuseError, RunViews, UnknownError, find_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Application = Callable[[dict[str, Any], Any], Iterable[bytes]]

_log = logging.getLogger("bnwatch")

_REMOTE = re.compile(r"[A-Za-z][\w+.-]*://")

_LONG = 20_000
"""Characters of a parameter that are looked at: a layer name may be long."""


class BNWatchPlugin(base_plugin.TBPlugin):
    """Serves the page and its data.

    Attributes:
        rest: after a look at the log directory none follows for so many times as long as it took, however many ask.
    """

    plugin_name = "bnwatch"
    rest = 10.0

    def __init__(self, context: base_plugin.TBContext) -> None:
        """Take the log directory from TensorBoard; nothing is read yet."""
        super().__init__(context)
        self._tops, self._refused = _log_directories(context)
        self._views = RunViews(*self._tops)
        self._looking = threading.Lock()
        self._next_look = 0.0
        self._active = False

    def read_ahead(self) -> None:
        """Begin to read while TensorBoard still starts, so that the first page need not wait for it."""
        threading.Thread(target=self._quietly_refresh, name="bnwatch", daemon=True).start()

    def is_active(self) -> bool:
        """Return whether a record is below the log directory."""
        if not self._active:
            try:
                self._active = any(True for _, top in self._tops for _ in find_records(top))
            except Exception:  # noqa: BLE001
                _log.exception("bnwatch: cannot look into the log directory")
        return self._active

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the name of the tab and where its page is."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="BN Watch")

    def get_plugin_apps(self) -> dict[str, Application]:
        """Return the routes; there are no others, and none is a pattern."""
        return {"/index.js": self._page, **{f"/{route}": self._route(route) for route in ROUTES}}

    def _page(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = Request(environ)
        try:
            page = (resources.files("bnwatch.dashboard") / "static" / "index.js").read_bytes()
        except OSError:
            response = _error(request, 404, "the page of the tab is not part of this installation of bnwatch")
        else:
            response = http_util.Respond(request, page, "text/javascript; charset=utf-8")
        return _run(response, environ, start)

    def _route(self, route: str) -> Application:
        def application(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            request = Request(environ)
            response: Response | _Unchanged
            try:
                response = self._answer(route, request)
            except UnknownError as error:
                response = _error(request, 404, str(error))
            except MisuseError as error:
                response = _error(request, 400, str(error))
            except Exception:  # noqa: BLE001
                _log.exception("bnwatch: no answer for %s", route)
                sentence = "bnwatch failed to answer; the log of TensorBoard says why"
                response = _error(request, 500, sentence)
            return _run(response, environ, start)

        return application

    def _answer(self, route: str, request: Request) -> Response | _Unchanged:
        if request.method not in {"GET", "HEAD"}:
            return _error(request, 405, "only GET is answered")
        parameters = {name: value[:_LONG] for name, value in request.args.items()}
        if self._refused and route != "rule":
            if route == "runs":
                return _json(request, {"schema": render.SCHEMA, "runs": [], "problems": [], "hint": self._refused})
            raise UnknownError(self._refused)
        self._refresh()
        state = repr((route, sorted(parameters.items()), self._views.version(parameters.get("run"))))
        tag = sha256(state.encode("utf-8", "backslashreplace")).hexdigest()[:20]
        if tag in request.if_none_match:
            return _Unchanged(tag)
        answer = self._views.answer(route, parameters)
        # a heatmap that is not complete is another one the next time
        final = route != "heatmap" or answer["complete"] == 1.0
        return _private(_json(request, answer), tag if final else None)

    def _quietly_refresh(self) -> None:
        try:
            self._refresh()
        except Exception:  # noqa: BLE001
            _log.exception("bnwatch: cannot read the log directory")

    def _refresh(self) -> None:
        """Look at the log directory, unless somebody just did."""
        with self._looking:
            start = time.monotonic()
            if start < self._next_look:
                return
            self._views.refresh()
            self._active = self._active or bool(self._views.names())
            now = time.monotonic()
            self._next_look = now + self.rest * (now - start)


def _log_directories(context: base_plugin.TBContext) -> tuple[list[tuple[str, Path]], str | None]:
    """Return the local log directories, each with the name that TensorBoard gives it, or why there is none."""
    flags = context.flags
    logdir = str(getattr(flags, "logdir", "") or context.logdir or "")
    spec = str(getattr(flags, "logdir_spec", "") or "")
    named = _parse_spec(spec) if spec else [("", logdir)] if logdir else []
    if not named:
        return [], "TensorBoard was started without a log directory: start it with --logdir DIR"
    remote = [path for _, path in named if _REMOTE.match(path)]
    if remote:
        return [], (
            f"BN Watch reads local log directories only, and {render.shorten(remote[0])} is none: copy the record (the "
            "files that end in .bnwatch) to this machine and start TensorBoard on the copy, or mount it"
        )
    # made absolute now, as TensorBoard does: what runs in the same process may change the working directory
    return [(name, Path(path).expanduser().absolute()) for name, path in named], None


def _parse_spec(spec: str) -> list[tuple[str, str]]:
    """Return the pairs of ``--logdir_spec``, ``name1:path1,path2``, as TensorBoard reads them: a name may be empty."""
    found = []
    for part in filter(None, spec.split(",")):
        # the colon of gs://bucket, of /a:b and of C:\\logs names nothing
        named = ":" in part and not _REMOTE.match(part) and part[0] != "/" and not os.path.splitdrive(part)[0]
        name, _, path = part.partition(":") if named else ("", "", part)
        found.append((name, path))
    return found


class _Unchanged:
    """The response to who has the answer already. Werkzeug's has no type of content, for which TensorBoard scolds."""

    def __init__(self, tag: str) -> None:
        self._tag = tag

    def __call__(self, _: dict[str, Any], start: Any) -> list[bytes]:
        headers = {"Content-Type": "application/json", "ETag": f'"{self._tag}"', "Cache-Control": "no-store"}
        start("304 NOT MODIFIED", list(headers.items()))
        return []


def _run(response: Response | _Unchanged, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
    body: Iterable[bytes] = response(environ, start)
    return body


def _json(request: Request, answer: dict[str, Any], status: int = 200) -> Response:
    response: Response = http_util.Respond(request, render.dumps(answer), "application/json", code=status)
    return response


def _error(request: Request, status: int, sentence: str) -> Response:
    return _private(_json(request, {"error": sentence}, status), None)


def _private(response: Response, tag: str | None) -> Response:
    """Return the response as a page that polls needs it: nothing is kept, and what is the same is not sent again."""
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    if tag is not None:
        response.set_etag(tag)
    return response
