"""A W&B server just large enough for tests: it keeps runs, resumes them, takes their history."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = {"id": "e", "name": "e"}


@dataclass
class ServedRun:
    """What the server holds of one run."""

    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)  # of the history, by number
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self.lines[number] for number in sorted(self.lines)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, ServedRun] = {}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            answer = {"data": _graphql(self.server, json.loads(body))}
        elif self.path.endswith("/file_stream"):
            _take(self.server.runs[self.path.split("/")[-2]], json.loads(body))
            answer = {"limits": {}}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def wandb_server() -> Iterator[tuple[str, dict[str, ServedRun]]]:
    """(address, runs by id)"""
    server = _Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.address, server.runs
    finally:
        server.shutdown()
        server.server_close()


def _graphql(server: _Server, request: dict[str, Any]) -> dict[str, Any]:
    query, given = request["query"], request.get("variables") or {}
    if "RunResumeStatus" in query:
        run = server.runs.get(given["name"])
        bucket = _bucket(given["name"], run) if run else None
        return {"model": {"id": "p", "name": "p", "entity": ENTITY, "bucket": bucket}}
    if "UpsertBucket" in query:
        inserted = given["name"] not in server.runs
        run = server.runs.setdefault(given["name"], ServedRun())
        config = json.loads(given.get("config") or "{}")
        run.config.update({key: entry["value"] for key, entry in config.items()})
        return {"upsertBucket": {"bucket": _bucket(given["name"], run), "inserted": inserted}}
    if "CreateRunFiles" in query:
        files = [{"name": name, "uploadUrl": f"{server.address}/file"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
    if "ServerFeatures" in query:
        return {"serverInfo": {"features": []}}
    return {}


def _bucket(name: str, run: ServedRun) -> dict[str, Any]:
    last = [json.dumps(row) for row in run.history[-1:]]
    return {
        "id": name,
        "name": name,
        "displayName": name,
        "project": {"id": "p", "name": "p", "entity": ENTITY},
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "summaryMetrics": "".join(last) or "{}",
        "historyLineCount": len(run.lines),
        "historyTail": json.dumps(last),
        "eventsLineCount": 0,
        "eventsTail": "[]",
        "logLineCount": 0,
        "tags": [],
        "wandbConfig": json.dumps({"t": 1}),
    }


def _take(run: ServedRun, request: dict[str, Any]) -> None:
    part = (request.get("files") or {}).get("wandb-history.jsonl")
    if part:
        for number, line in enumerate(part["content"], part["offset"]):
            run.lines[number] = json.loads(line)
    if request.get("complete"):
        run.exit_code = request["exitcode"]
