"""A small stand-in for the Hugging Face Hub on the loopback address, for tests without a network.

It holds repositories of models and Spaces in memory and speaks as much HTTP as `huggingface_hub` needs to create one,
commit (weights by LFS, all else in the commit) and download:

    with LocalHub() as hub:
        subprocess.run([...], env=hub.environment(folder))  # the client reads HF_ENDPOINT when it is imported
        hub.commits("user/name")[-1].files["config.json"]
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "user", "hf_local"
LARGE_FILES = (".safetensors", ".bin", ".pt")  # stored by LFS
LAST_MODIFIED = "2025-01-01T00:00:00.000Z"

Answer = tuple[int, dict[str, str], bytes]


class HubError(Exception):
    """An answer that `huggingface_hub` turns into an exception; it reads the code to choose which one."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]  # all files of the repository at this commit


@dataclass
class Store:
    url: str = ""
    repos: dict[str, list[Commit]] = field(default_factory=dict)  # oldest commit first; there is only `main`
    large_files: dict[str, bytes] = field(default_factory=dict)  # by sha256
    lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, repo_id: str, revision: str = "main") -> Commit:
        if repo_id not in self.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        for commit in reversed(self.repos[repo_id]):
            if revision in ("main", commit.sha):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_commit(self, repo_id: str, title: str, files: dict[str, bytes]) -> Commit:
        history = self.repos.setdefault(repo_id, [])
        sha = hashlib.sha1(f"{repo_id} {len(history)} {title}".encode()).hexdigest()
        history.append(Commit(sha, title, files))
        return history[-1]

    # One method for each kind of request. It gets what the route's groups matched, and the body.

    def validate_yaml(self, body: bytes) -> Answer:
        card = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        errors = []
        try:
            yaml.safe_load(card[1] if card else "")
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        return answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self, body: bytes) -> Answer:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        result = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            return answer({"error": "You already created this model repo", **result}, 409)
        self.add_commit(repo_id, "initial commit", {".gitattributes": b""})
        return answer(result)

    def info(self, repo_id: str, revision: str, body: bytes) -> Answer:
        commit = self.find(repo_id, revision or "main")
        fields = {"id": repo_id, "modelId": repo_id, "author": USER, "sha": commit.sha, "private": False}
        fields |= {"gated": False, "downloads": 0, "likes": 0, "tags": [], "lastModified": LAST_MODIFIED}
        return answer({**fields, "siblings": [{"rfilename": name} for name in sorted(commit.files)]})

    def tree(self, repo_id: str, revision: str, folder: str, body: bytes) -> Answer:
        files = self.find(repo_id, revision).files
        prefix = f"{folder}/" if folder else ""
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": git_sha(data)}
            for name, data in sorted(files.items())
            if name.startswith(prefix)
        ]
        if not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return answer(entries)

    def preupload(self, repo_id: str, revision: str, body: bytes) -> Answer:
        self.find(repo_id, revision)
        modes = [
            {"path": path, "uploadMode": "lfs" if path.endswith(LARGE_FILES) else "regular", "shouldIgnore": False}
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        return answer({"files": modes})

    def large_file_batch(self, repo_id: str, body: bytes) -> Answer:
        self.find(repo_id)
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.large_files:
                link = {"href": f"{self.url}/large/{entry['oid']}"}
                entry["actions"] = {"upload": link, "verify": link}
        return answer({"transfer": "basic", "objects": objects})

    def put_large_file(self, oid: str, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "The content does not have that sha256")
        self.large_files[oid] = body
        return answer({})

    def verify_large_file(self, oid: str, body: bytes) -> Answer:
        if json.loads(body)["size"] != len(self.large_files[oid]):
            raise HubError(400, "The content does not have that size")
        return answer({})

    def commit(self, repo_id: str, revision: str, body: bytes) -> Answer:
        files, title = dict(self.find(repo_id, revision).files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                title = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
            else:
                raise HubError(400, f"Unknown operation {kind!r}")
        commit = self.add_commit(repo_id, title, files)
        return answer({"commitOid": commit.sha, "commitUrl": f"{self.url}/{repo_id}/commit/{commit.sha}"})

    def resolve(self, repo_id: str, revision: str, name: str, body: bytes) -> Answer:
        commit = self.find(repo_id, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if name not in commit.files:
            status, not_found, data = failure(HubError(404, "Entry not found", "EntryNotFound"))
            return status, headers | not_found, data
        data = commit.files[name]
        if not name.endswith(LARGE_FILES):
            return 200, headers | {"ETag": f'"{git_sha(data)}"'}, data
        # On the Hub the bytes are on another host. The client takes the headers from here and must not follow yet.
        sha = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
        return 302, headers | {"Location": f"{self.url.replace('127.0.0.1', 'localhost')}/large/{sha}"}, b""

    def get_large_file(self, oid: str, body: bytes) -> Answer:
        return 200, {"ETag": f'"{oid}"'}, self.large_files[oid]


REPO, REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = [
    ("POST", r"/api/validate-yaml", Store.validate_yaml),
    ("POST", r"/api/repos/create", Store.create),
    ("GET", rf"/api/(?:models|spaces)/{REPO}(?:/revision/{REVISION})?", Store.info),
    ("GET", rf"/api/(?:models|spaces)/{REPO}/tree/{REVISION}/?(.*)", Store.tree),
    ("POST", rf"/api/(?:models|spaces)/{REPO}/preupload/{REVISION}", Store.preupload),
    ("POST", rf"/api/(?:models|spaces)/{REPO}/commit/{REVISION}", Store.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Store.large_file_batch),
    ("PUT", r"/large/(\w+)", Store.put_large_file),
    ("POST", r"/large/(\w+)", Store.verify_large_file),
    ("GET", r"/large/(\w+)", Store.get_large_file),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(.+)", Store.resolve),
]
FOR_USERS = (Store.create, Store.preupload, Store.large_file_batch, Store.commit)


def answer(content: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def failure(error: HubError) -> Answer:
    status, headers, data = answer({"error": str(error)}, error.status)
    return status, headers | {"X-Error-Message": str(error), "X-Error-Code": error.code}, data


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ClassVar[Store]

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.store.lock:
            try:
                status, headers, data = self.route(body)
            except HubError as error:
                status, headers, data = failure(error)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815 (names that http.server looks for)

    def route(self, body: bytes) -> Answer:
        method, path = self.command.replace("HEAD", "GET"), unquote(urlsplit(self.path).path)
        for route_method, pattern, respond in ROUTES:
            if method == route_method and (match := re.fullmatch(pattern, path)):
                if respond in FOR_USERS and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise HubError(401, "Invalid username or password.")
                return respond(self.store, *match.groups(), body)
        raise HubError(404, f"The local Hub has no {method} {path}")

    def log_message(self, *args: Any) -> None:
        pass


class LocalHub:
    """The Hub in a thread of this process, from `with` to its end."""

    def __init__(self) -> None:
        self.store = Store()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"store": self.store}))
        self.store.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commits(self, repo_id: str) -> list[Commit]:
        return self.store.repos[repo_id]

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a client process: this Hub, a cache of its own, no other machine."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": self.store.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",  # uploads by Xet are not imitated
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
