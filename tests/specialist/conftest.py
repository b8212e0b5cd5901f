"""A tiny staged base on disk, with a byte tokenizer, and conversations for it."""

from __future__ import annotations

import json

import pytest
import tiktoken
import torch

from stagewise.modeling import PoEConfig, PoEForCausalLM
from stagewise.modeling.byte_encoding import SPECIAL_TOKENS
from stagewise.modeling.tokenization_poe import PoETokenizer

VOCABULARY = 256 + len(SPECIAL_TOKENS)


@pytest.fixture(scope="session")
def tokenizer() -> PoETokenizer:
    """Bytes and the nine special tokens, nothing merged."""
    ranks = {bytes([i]): i for i in range(256)}
    special = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
    return PoETokenizer(encoding=encoding)


def random_model(seed: int = 0, **changes) -> PoEForCausalLM:
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "poe_stage_layers": [2, 2],
        "per_stage_head": True,
        "poe_mode": "flat",
        **changes,
    }
    model = PoEForCausalLM(PoEConfig(**settings)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lm_head" in name:
                p.normal_(0.0, 0.3, generator=generator)
            elif "c_proj" in name:
                p.normal_(0.0, 0.3 / p.shape[1] ** 0.5, generator=generator)
        model.smear_lambda.fill_(0.3)
    return model.eval()


BASES = {
    "staged": {},
    "shared": {"per_stage_head": False},
    "plain": {"per_stage_head": False, "poe_mode": "none", "poe_stage_layers": [4]},
}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, tokenizer):
    """Factory: base_folder(kind, seed=0) is a saved base: staged (own heads), shared, or plain (end to end)."""
    made = {}

    def make(kind: str = "staged", seed: int = 0):
        if (kind, seed) not in made:
            folder = tmp_path_factory.mktemp("bases") / f"{kind}-{seed}"
            random_model(seed, **BASES[kind]).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind, seed] = folder
        return made[kind, seed]

    return make


@pytest.fixture(scope="session")
def recipe_for(tmp_path_factory):
    """Factory: a tiny specialist recipe on `parent`; dotted overrides as in --set."""
    from stagewise.recipe import load_recipe

    folder = tmp_path_factory.mktemp("conversations")
    data = folder / "sums.jsonl"
    rows = [{"question": f"add {a} {b}", "answer": f"{a + b}."} for a in range(12) for b in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "sums.yaml"
    path.write_text(
        f"""
name: sums
model: {{hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2,
  vocab_size: {VOCABULARY}, max_position_embeddings: 256, poe_mode: flat, poe_stage_layers: [2, 2],
  per_stage_head: true}}
optimizer: {{matrix_lr: 0.02, weight_decay: 0.0, orthogonalise_dtype: float32}}
schedule: {{warmup_steps: 2, warmdown_ratio: 0.5, final_lr_frac: 0.0, momentum_peak: 0.95, momentum_end: 0.95}}
training: {{steps: 6, batch_tokens: 512, micro_batch: 4, sequence_length: 64, dtype: float32, eval_every: 3,
  checkpoint_every: 3, log_every: 1, keep_last: 5}}
specialist:
  parent: nowhere
  new_layers: 2
  held_out: 8
  init_lr_frac: 1.0
  head_lr: 0.01
  conversations: [{{name: sums, kind: jsonl, path: {data}}}]
"""
    )

    def make(parent, **overrides):
        plain = {key.replace("__", "."): value for key, value in overrides.items()}
        return load_recipe(path, {"specialist.parent": str(parent), **plain})

    return make
