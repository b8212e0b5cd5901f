"""Small models with tokenizers, as folders; and a Hugging Face hub in memory behind an httpx2 mock transport."""

import base64
import functools
import hashlib
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote

import httpx2
import pytest

os.environ["HF_HUB_DISABLE_XET"] = "1"

LARGE = 2_000  # bytes; larger files are large-file-storage files here
TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "poe_stage_layers": [2, 1, 2],
    "per_stage_head": True,
    "poe_mode": "flat",
}


@functools.cache
def make_tokenizer(vocabulary: int, add_bos_token: bool = False):
    """A byte-level tokenizer with `vocabulary` tokens: all bytes, pairs of letters, the nine special tokens."""
    import tiktoken

    from stagewise.modeling.byte_encoding import SPECIAL_TOKENS
    from stagewise.modeling.tokenization_poe import PoETokenizer

    ranks = {bytes([i]): i for i in range(256)}
    letters = b" etaoinshrdlucmfwygpbvkTCWIxjqzAS.,-:'0123456789\n"
    first = [bytes([a, b]) for a in letters for b in letters]
    pairs = first + [bytes([i // 256, i % 256]) for i in range(65536)]
    for pair in pairs:
        if len(ranks) == vocabulary - len(SPECIAL_TOKENS):
            break
        ranks.setdefault(pair, len(ranks))
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    pattern = r"\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
    encoding = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return PoETokenizer(encoding=encoding, add_bos_token=add_bos_token)


def randomise(model, seed: int = 0):
    """Give every tensor weights that matter to the predictions."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lm_head" in name:
                p.normal_(0.0, 0.5, generator=generator)
            elif "c_proj" in name:
                p.normal_(0.0, 0.3 / p.shape[1] ** 0.5, generator=generator)
        model.smear_lambda.fill_(0.3)
    return model.eval()


def write_checkpoint(folder: Path, seed: int = 0, **changes) -> Path:
    """A model folder as training writes it: weights, configuration, tokenizer."""
    from stagewise.modeling import PoEConfig, PoEForCausalLM

    config = PoEConfig(**{**TINY, **changes})
    randomise(PoEForCausalLM(config).init_weights(seed), seed).save_pretrained(folder)
    make_tokenizer(config.vocab_size, config.add_bos_token).save_pretrained(folder)
    return folder


def write_delta(folder: Path, parent: Path, seed: int = 5, layers: int = 2) -> Path:
    """A specialist of `layers` appended blocks on the model in `parent`, as a delta folder."""
    import torch
    from safetensors.torch import save_file

    from stagewise.modeling import PoEForCausalLM, load
    from stagewise.modeling.configuration_poe import PoEConfig

    base = load(parent)
    shape = {key: getattr(base.config, key) for key in TINY} | {"poe_stage_layers": base.config.poe_stage_layers}
    frozen = base.config.num_hidden_layers
    config = PoEConfig(**{**shape, "num_hidden_layers": frozen + layers, "new_layers": layers, "frozen_layers": frozen})
    tensors = randomise(PoEForCausalLM(config).init_weights(seed), seed).state_dict()
    own = re.compile(r"transformer\.h\.(\d+)\..*|lm_head_stage\.weight")
    delta = {n: t for n, t in tensors.items() if (m := own.fullmatch(n)) and (not m[1] or int(m[1]) >= frozen)}
    for name in ("resid_lambdas", "x0_lambdas"):
        delta[name] = torch.cat((getattr(base, name).detach(), tensors[name][frozen:]))
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in delta.items()}, folder / "delta.safetensors")
    facts = {
        "model_type": "cognica_poe",
        "stagewise_version": "1",
        "base_model_name_or_path": os.path.relpath(parent, folder),
        "num_hidden_layers": frozen + layers,
        "new_layers": layers,
        "frozen_layers": frozen,
        "dual_head": True,
        "vocab_size": config.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(facts))
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A small staged model as training leaves it."""
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "step-000100")


@pytest.fixture(scope="session")
def delta(checkpoint, tmp_path_factory) -> Path:
    """A specialist on `checkpoint`, as a delta folder."""
    return write_delta(tmp_path_factory.mktemp("hub") / "specialist", checkpoint)


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


@pytest.fixture
def hub(monkeypatch):
    """An empty hub that huggingface_hub talks to instead of the network."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fake = FakeHub()
    set_client_factory(fake.client)
    yield fake
    set_client_factory(default_client_factory)


@pytest.fixture
def api():
    """A client with a token, for the hub in memory."""
    from huggingface_hub import HfApi

    return HfApi(endpoint="https://huggingface.co", token="a-token")
