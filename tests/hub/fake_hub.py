"""A Hugging Face hub in memory, behind an httpx2 mock transport: repositories, branches, commits and large files."""

import base64
import hashlib
import json
import re
from urllib.parse import unquote

import httpx2

LARGE = 2_000  # bytes; larger files are large-file-storage files here


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FakeHub:
    """`branches[name]` maps paths to bytes; `requests` lists method and path of all that was asked."""

    def __init__(self) -> None:
        self.exists = False
        self.branches: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, list[str]]] = []
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.uploads = 0
        self.fail_at_commit: int | None = None
        self.forbidden = False

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=httpx2.MockTransport(self.answer))

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = unquote(request.url.path)
        self.requests.append(f"{request.method} {path}")
        if self.forbidden:
            return httpx2.Response(404, json={"error": "no"}, headers={"X-Error-Code": "RepoNotFound"})
        routes = [
            ("POST", r"/api/repos/create", self.create),
            ("GET", r"/api/models/[^/]+/[^/]+/refs", self.refs),
            ("POST", r"/api/models/[^/]+/[^/]+/branch/(.+)", self.branch),
            ("GET", r"/api/models/[^/]+/[^/]+/tree/(.+)", self.tree),
            ("POST", r"/api/models/[^/]+/[^/]+/preupload/(.+)", self.preupload),
            ("POST", r"/api/models/[^/]+/[^/]+/commit/(.+)", self.commit),
            ("POST", r"/.+\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/storage/([0-9a-f]+)", self.store),
            ("POST", r"/api/validate-yaml", lambda r: httpx2.Response(200, json={"errors": [], "warnings": []})),
        ]
        for method, pattern, handler in routes:
            found = re.fullmatch(pattern, path)
            if found and request.method == method:
                return handler(request, *found.groups())
        raise AssertionError(f"unexpected request {request.method} {request.url}")

    def create(self, request):
        if self.exists:
            return httpx2.Response(409, json={"error": "exists", "url": "https://huggingface.co/owner/model"})
        self.exists = True
        self.branches["main"] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        return httpx2.Response(200, json={"url": "https://huggingface.co/owner/model"})

    def refs(self, request):
        names = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": "0" * 40} for n in self.branches]
        return httpx2.Response(200, json={"branches": names, "converts": [], "tags": []})

    def branch(self, request, name):
        self.branches[name] = dict(self.branches["main"])
        return httpx2.Response(201, json={})

    def tree(self, request, name):
        entries = []
        for path, data in self.branches[name].items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
            if len(data) > LARGE:
                entry["lfs"] = {"size": len(data), "oid": sha256(data), "pointerSize": 130}
            entries.append(entry)
        return httpx2.Response(200, json=entries)

    def preupload(self, request, name):
        files = json.loads(request.read())["files"]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["size"] > LARGE else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for f in files
        ]
        return httpx2.Response(200, json={"files": modes})

    def batch(self, request):
        objects = []
        for item in json.loads(request.read())["objects"]:
            upload = {"upload": {"href": f"https://storage.invalid/storage/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.large else {"actions": upload})})
        return httpx2.Response(200, json={"transfer": "basic", "objects": objects})

    def store(self, request, oid):
        data = request.read()
        assert sha256(data) == oid
        self.large[oid] = data
        self.uploads += 1
        return httpx2.Response(200)

    def commit(self, request, name):
        if self.fail_at_commit == len(self.commits):
            self.fail_at_commit = None
            return httpx2.Response(400, json={"error": "the disk of the hub is full"})
        files, changed = dict(self.branches[name]), []
        for line in request.read().decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            changed += [value["path"]] if "path" in value else []
        self.branches[name] = files
        self.commits.append((name, changed))
        oid = f"{len(self.commits):040x}"
        url = f"https://huggingface.co/owner/model/commit/{oid}"
        return httpx2.Response(200, json={"commitUrl": url, "commitOid": oid})
