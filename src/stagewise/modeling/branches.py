"""Specialists attached to a model in memory: one base, many branches, each chosen by name.

Design choices:
- A branch owns what its delta holds (blocks, heads, lambdas, overlay) and nothing of the base; attaching costs the
  delta's memory. It is no submodule of the model: saving, counting and training the model do not see it.
- A chain of specialists is attached as one branch, read through the same assembly as any load.
- The base in memory must be the branch's base: every tensor is compared, in the model's dtype, before anything changes.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from .cascade import Assembled, assemble, fit_tensors, resolve_folder
from .configuration_poe import PoEConfig
from .paths import Overlay, Path
from .trunk import Block

LAMBDAS = ("resid_lambdas", "x0_lambdas")
RESERVED = ("base", "specialist")
_OWN = re.compile(r"^(?:lm_head_stage\.|lm_head_ancestors\.|overlay\.)")


class Branch(nn.Module):
    """The tensors of one attached specialist (or chain of them)."""

    def __init__(self, config: PoEConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.base_layers, config.num_hidden_layers))
        self.heads = nn.ModuleList(
            nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False) for _ in config.specialist_layers
        )
        self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        if config.overlay_rows or config.overlay_lambdas:
            self.overlay = Overlay(config)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())


def attach(model, name: str, source, revision: str | None = None, **hub) -> Branch:
    """Attach the specialist in `source` (folder or repository) to `model` as the path `name`.

    Raises ValueError when the name is taken or the specialist was trained on another base, naming both.
    """
    if name in RESERVED or name in model.paths or not name.isidentifier():
        taken = ", ".join(model.paths)
        raise ValueError(f"{name!r} cannot name an attached specialist: use an identifier other than {taken}")
    folder = resolve_folder(source, revision, **hub)
    found = assemble(folder, **hub)
    if not found.config.is_specialist:
        raise ValueError(f"{source} is no specialist: load it as a model of its own")
    tensors = fit_tensors(found.tensors, found.config, source)
    require_same_base(model, found, tensors)
    branch = make_branch(found.config, tensors, model.dtype, model.device)
    branch.train(model.training)
    model.branches[name] = branch
    model.paths[name] = Path(name, found.config, branch, branch.blocks, branch.heads)
    return branch


def detach(model, name: str) -> None:
    """Remove the attached specialist `name`. Raises ValueError when there is none."""
    if name not in model.branches:
        raise ValueError(f"no attached specialist {name!r}; attached: {', '.join(model.branches) or 'none'}")
    del model.branches[name], model.paths[name]
    for key in [key for key in model.folded_heads if key[:2] == ("path", name)]:
        del model.folded_heads[key]


def make_branch(config: PoEConfig, tensors: dict[str, Tensor], dtype: torch.dtype, device) -> Branch:
    """A branch of the specialist's part of `tensors`, in `dtype` on `device`."""
    base, ancestors = config.base_layers, len(config.specialist_layers) - 1
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("transformer.h."):
            _, _, layer, rest = name.split(".", 3)
            if int(layer) >= base:
                own[f"blocks.{int(layer) - base}.{rest}"] = tensor
        elif name.startswith("lm_head_ancestors."):
            own[f"heads.{name.split('.')[1]}.weight"] = tensor
        elif name == "lm_head_stage.weight":
            own[f"heads.{ancestors}.weight"] = tensor
        elif name in LAMBDAS or name.startswith("overlay."):
            own[name] = tensor
    with torch.device("meta"):
        branch = Branch(config)
    moved = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in own.items()}
    branch.load_state_dict(moved, strict=True, assign=True)
    return branch


def require_same_base(model, found: Assembled, tensors: dict[str, Tensor]) -> None:
    """ValueError unless the root base of `found` is, tensor by tensor, the base that `model` holds in memory."""
    mine, theirs = model.config, found.config
    for field in ("hidden_size", "base_layers", "vocab_size", "num_key_value_heads", "intermediate_size"):
        if getattr(mine, field) != getattr(theirs, field):
            raise ValueError(
                f"the specialist {found.folder} grew on a base with {field}={getattr(theirs, field)}, the model "
                f"{mine._name_or_path} has {getattr(mine, field)}"
            )
    layers = mine.base_layers
    for name, tensor in model.state_dict().items():
        if _OWN.match(name):
            continue
        if name.startswith("transformer.h.") and int(name.split(".")[2]) >= layers:
            continue
        other = tensors.get(name)
        if other is not None and name in LAMBDAS:
            tensor, other = tensor[:layers], other[:layers]
        if other is None or not torch.equal(tensor, other.to(tensor.device, tensor.dtype)):
            raise ValueError(
                f"the specialist {found.folder} grew on another base than the model {mine._name_or_path}: "
                f"{name} differs"
            )
