"""A fake wandb server on loopback that answers the client and records what it sends.

    python wandb_server.py FOLDER [PORT]

prints its port and serves until it is killed. FOLDER/state.json holds everything it received, and
is loaded at the next start, so a server can be killed and restarted. Files in FOLDER control it:

    stop        run ids, one per line, for which the dashboard's Stop button was pressed
    sweep.json  a list of parameters to give to an agent, one after the other; a preempted run is
                given out a second time

It shows what the client sends, but not what the real server accepts.
"""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock

PERSON = {"id": "user", "entity": "me", "username": "me", "email": "", "flags": "{}"}


class State:
    """Everything that was received, as one object that is saved to a file after each request."""

    def __init__(self, folder):
        self.folder, self.lock, self.port = folder, RLock(), 0
        self.kept = {"runs": {}, "sweep": None, "given": 0, "again": [], "views": {}}
        if (folder / "state.json").exists():
            self.kept = json.loads((folder / "state.json").read_text())

    def write(self):
        partial = self.folder / "state.partial"
        partial.write_text(json.dumps(self.kept))
        partial.replace(self.folder / "state.json")

    def run(self, name):
        blank = {"config": {}, "facts": {}, "summary": {}, "history": [], "files": [], "starts": 0}
        blank |= {"exitcode": None, "preempting": False}
        return self.kept["runs"].setdefault(name, blank)

    def stop_pressed(self, name):
        path = self.folder / "stop"
        return path.exists() and name in path.read_text().split()

    # ---- what GraphQL operations return, by their names ----

    def answer(self, operation, given):
        known = {
            "Viewer": lambda: {"viewer": PERSON | {"teams": {"edges": []}}},
            "GetDefaultEntity": lambda: {"viewer": PERSON},
            "ServerInfo": lambda: {
                "serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0.0"}},
            },
            "ServerFeaturesQuery": lambda: {"serverInfo": {"features": []}},
            "RunResumeStatus": lambda: self.resume_status(given),
            "UpsertBucket": lambda: self.upsert_run(given),
            "CreateRunFiles": lambda: self.upload_places(given),
            "ArtifactType": lambda: {"project": {"artifact": None}},
            "CreateArtifact": lambda: self.create_artifact(given["input"]),
            "UpsertSweep": lambda: self.upsert_sweep(given),
            "SweepWithRuns": lambda: {"project": {"sweep": self.sweep()}},
            "CreateAgent": lambda: {"createAgent": {"agent": {"id": "agent"}}},
            "UpsertView2": lambda: self.upsert_view(given),
            "View": lambda: self.view(given["viewName"]),
            "Heartbeat": lambda: self.heartbeat(json.loads(given["runState"])),
        }
        return known.get(operation, dict)()

    def project(self, given):
        return {
            "id": "project",
            "name": given.get("project") or "aaconv",
            "entity": {"id": "user", "name": "me"},
        }

    def resume_status(self, given):
        run = self.kept["runs"].get(given["name"])
        if run is None or not run["starts"]:
            return {"model": self.project(given) | {"bucket": None}}
        newest = [json.dumps(run["history"][-1])] if run["history"] else []
        bucket = {
            "id": given["name"],
            "name": given["name"],
            "displayName": None,
            "notes": None,
            "tags": [],
            "config": json.dumps(run["config"]),
            "wandbConfig": '{"t": 1}',
            "summaryMetrics": json.dumps(run["summary"]),
            "historyLineCount": len(run["history"]),
            "historyTail": json.dumps(newest),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
        }
        return {"model": self.project(given) | {"bucket": bucket}}

    def upsert_run(self, given):
        name = given.get("name") or given["id"]
        run = self.run(name)
        run["starts"] += 1
        run["config"] |= json.loads(given.get("config") or "{}")
        run["facts"] |= {k: v for k, v in given.items() if v is not None and k != "config"}
        bucket = {
            "id": name,
            "name": name,
            "displayName": given.get("displayName") or name,
            "description": None,
            "config": json.dumps(run["config"]),
            "sweepName": given.get("sweep"),
            "historyLineCount": len(run["history"]),
            "project": self.project(given),
        }
        return {"upsertBucket": {"inserted": run["starts"] == 1, "bucket": bucket}}

    def upload_places(self, given):
        run = given["run"]
        files = [
            {"name": name, "uploadUrl": f"http://127.0.0.1:{self.port}/store/{run}/{name}"}
            for name in given["files"]
        ]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def create_artifact(self, given):
        """Report the artifact as already committed, so that its files are not uploaded."""
        sequence = {"id": "sequence", "latestArtifact": None}
        artifact = {"id": given["digest"], "state": "COMMITTED", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def upsert_sweep(self, given):
        self.kept["sweep"] = given["config"]
        sweep = {"name": "sweep1", "project": self.project({"project": given.get("projectName")})}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def sweep(self):
        return {
            "id": "sweep1",
            "name": "sweep1",
            "method": "grid",
            "state": "RUNNING",
            "config": self.kept["sweep"],
            "runs": {"edges": []},
        }

    def upsert_view(self, given):
        number = given.get("id") or f"view{len(self.kept['views'])}"
        self.kept["views"][number] = given | {"id": number}
        view = {"id": number, "name": given["name"]}
        return {"upsertView": {"view": view, "inserted": "id" not in given}}

    def view(self, name):
        found = [{"node": view} for view in self.kept["views"].values() if view["name"] == name]
        return {"project": {"allViews": {"edges": found}}}

    def heartbeat(self, running):
        """Give out one run at a time; stop the runs whose Stop button was pressed."""
        commands = [{"type": "stop", "run_id": name} for name in running if self.stop_pressed(name)]
        parameters = json.loads((self.folder / "sweep.json").read_text())

        def give(kind, number):
            args = {key: {"value": value} for key, value in parameters[number].items()}
            command = {"type": kind, "run_id": f"run{number}", "program": "train.py"}
            commands.append(command | {"args": args})

        preempted = [
            name
            for name, run in self.kept["runs"].items()
            if run["preempting"] and run["exitcode"] and name not in self.kept["again"]
        ]
        if not running and preempted:
            self.kept["again"].append(preempted[0])
            give("resume", int(preempted[0].removeprefix("run")))
        elif not running and self.kept["given"] == len(parameters):
            commands.append({"type": "exit"})
        elif not running:
            give("run", self.kept["given"])
            self.kept["given"] += 1
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    # ---- what a run streams ----

    def stream(self, name, sent):
        run = self.run(name)
        for file, part in (sent.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                rows = map(json.loads, part["content"])
                # Lines that are sent again replace the earlier ones.
                run["history"][part["offset"] :] = rows
            elif file == "wandb-summary.json":
                run["summary"] = json.loads(part["content"][-1])
        run["preempting"] = run["preempting"] or bool(sent.get("preempting"))
        if sent.get("complete"):
            run["exitcode"] = sent.get("exitcode")
        return {"stopped": self.stop_pressed(name)}


def serve(folder, port=0):
    """Create the server on a loopback port; it is not serving yet."""
    state = State(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def body(self):
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            zipped = self.headers.get("Content-Encoding") == "gzip"
            return gzip.decompress(content) if zipped else content

        def reply(self, value):
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self):
            sent = json.loads(self.body() or b"{}")
            streams = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
            with state.lock:
                if self.path == "/graphql":
                    operation = re.search(r"\b(?:query|mutation)\s+(\w+)", sent["query"])[1]
                    value = {"data": state.answer(operation, sent.get("variables") or {})}
                else:
                    value = state.stream(streams[1], sent) if streams else {}
                state.write()
            self.reply(value)

        def do_PUT(self):
            content = self.body()
            _, _, run, name = self.path.split("/", 3)
            with state.lock:
                state.run(run)["files"].append([name, len(content)])
                state.write()
            self.reply({})

        def do_GET(self):
            self.reply({})

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # for example, a client was killed
            pass

    server = Server(("127.0.0.1", port), Handler)
    state.port = server.server_port
    return server


class ServerProcess:
    """The fake server in its own process, which can be killed and restarted."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, 0, None
        folder.mkdir()
        self.start()

    def start(self):
        command = [sys.executable, __file__, str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    @property
    def environment(self):
        own = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        return own | {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.port}",
            "WANDB_API_KEY": "0123456789" * 4,
            "OMP_NUM_THREADS": "1",
        }

    @property
    def runs(self):
        path = self.folder / "state.json"
        return json.loads(path.read_text())["runs"] if path.exists() else {}

    @property
    def views(self):
        return json.loads((self.folder / "state.json").read_text())["views"]

    @property
    def only(self):
        ((name, run),) = self.runs.items()
        return name, run


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for attempt in itertools.count():  # a killed server's port may stay taken for a moment
        try:
            server = serve(place, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
            break
        except OSError:
            if attempt == 50:
                raise
            os.sched_yield()
    print(server.server_port, flush=True)
    server.serve_forever(0.05)
