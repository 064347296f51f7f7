"""A Hub in memory, for tests: repositories, commits and downloads over HTTP, as far as huggingface_hub uses them."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What the server holds: files of each repository, and the requests it saw. `fail_commits` are refused with 500."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.writers = {"Bearer hf_writer"}
        self.fail_commits = 0
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Request-Id": "t", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        data, hub = self.body(), self.hub
        hub.requests.append(("POST", self.path))
        hub.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") not in hub.writers:
            return self.reply(403, {"error": "no write access"})
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            wanted = json.loads(data)
            repo = "/".join(filter(None, [wanted.get("organization"), wanted["name"]]))
            if repo in hub.repos:
                return self.reply(409, {"url": f"{hub.url}/{repo}"})
            hub.repos[repo], hub.private[repo] = {}, wanted.get("private", wanted.get("visibility") == "private")
            return self.reply(200, {"url": f"{hub.url}/{repo}"})
        found = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/", self.path)
        if found[2] == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": self.oid(found[1], f["path"]),
                }
                for f in json.loads(data)["files"]
            ]
            return self.reply(200, {"files": files})
        if hub.fail_commits:
            hub.fail_commits -= 1
            return self.reply(400, {"error": "commit refused"})
        for line in data.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                hub.repos[found[1]][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        self.reply(200, {"commitUrl": f"{hub.url}/{found[1]}/commit/{'a' * 40}", "commitOid": "a" * 40})

    def do_GET(self):
        self.hub.requests.append((self.command, self.path))
        resolved = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
        info = re.match(r"/api/models/([^/]+/[^/?]+)", self.path)
        if info and info[1] in self.hub.repos:
            files = [{"rfilename": name} for name in self.hub.repos[info[1]]]
            if "/tree/" in self.path:
                files = [
                    {"type": "file", "path": name, "size": len(data), "oid": self.oid(info[1], name)}
                    for name, data in self.hub.repos[info[1]].items()
                ]
                return self.reply(200, files)
            return self.reply(200, {"id": info[1], "sha": "a" * 40, "siblings": files, "private": False, "tags": []})
        data = self.hub.repos.get(resolved[1], {}).get(resolved[2]) if resolved else None
        if data is None:
            return self.reply(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
        self.reply(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit="a" * 40)

    do_HEAD = do_GET

    def oid(self, repo, path):
        data = self.hub.repos.get(repo, {}).get(path)
        return None if data is None else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve():
    """The Hub, listening on a free port of this machine until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
