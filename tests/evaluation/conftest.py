"""A hand-made model of two stages whose predictions are bigram tables: every figure about it can be worked out on
paper. And a small real model as a folder with its tokenizer.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


class BigramStages:
    """K experts over V tokens: expert k predicts `tables[k][previous]` (logits), the final path `final[previous]`.

    The hidden state of width V + 1 carries the one-hot id and the number of stages run, so that a wrong stage order
    would show.
    """

    def __init__(self, tables: torch.Tensor, final: torch.Tensor, poe_mode: str = "flat") -> None:
        self.tables, self.final = tables, final  # (K, V, V), (V, V)
        stages, vocab = tables.shape[:2]
        self.config = SimpleNamespace(
            num_stages=stages,
            vocab_size=vocab,
            poe_mode=poe_mode,
            is_specialist=False,
            stage_ranges=[(k, k + 1) for k in range(stages)],
            max_position_embeddings=32,
        )
        self.default_path = "base"
        self.device, self.dtype, self.training = torch.device("cpu"), torch.float32, False

    def train(self, mode: bool = True) -> BigramStages:
        self.training = mode
        return self

    def eval(self) -> BigramStages:
        return self.train(False)

    def stage_inputs(self, ids: torch.Tensor, *, path: str = "base") -> SimpleNamespace:
        vocab = self.config.vocab_size
        one_hot = torch.nn.functional.one_hot(ids, vocab).to(self.tables.dtype)
        return SimpleNamespace(x0=torch.cat([one_hot, torch.zeros_like(one_hot[..., :1])], -1), ids=ids)

    def run_stage(self, k: int, hidden: torch.Tensor, inputs: SimpleNamespace, cache: object = None) -> SimpleNamespace:
        assert (hidden[..., -1] == k).all()
        hidden = hidden.clone()
        hidden[..., -1] += 1
        return SimpleNamespace(hidden=hidden, tap=hidden * 0 if k == 0 else None)

    def run_path(self, inputs: SimpleNamespace, stages: int | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
        hidden, tap, states = inputs.x0, None, []
        for k in range(self.config.num_stages)[:stages]:
            out = self.run_stage(k, hidden, inputs)
            hidden, tap = out.hidden, tap if out.tap is None else out.tap
            states.append(hidden)
        return states, tap

    def stage_logits(self, k: int, hidden: torch.Tensor) -> torch.Tensor:
        assert (hidden[..., -1] == k + 1).all()
        return hidden[..., :-1] @ self.tables[k]

    def final_logits(self, hidden: torch.Tensor, tap: torch.Tensor | None, head_mode: str = "dual") -> torch.Tensor:
        assert tap is not None and (tap == 0).all()
        return hidden[..., :-1] @ self.final

    def forward_aggregated(self, ids: torch.Tensor, max_stages: int | None = None) -> torch.Tensor:
        return self.tables[:max_stages].log_softmax(-1).mean(0)[ids].log_softmax(-1)


@pytest.fixture
def bigram_stages() -> type[BigramStages]:
    return BigramStages


@pytest.fixture
def two_stages() -> BigramStages:
    """Two experts, four tokens (0 is special): stage 0 gives the next token 1/2, stage 1 gives it 1/8, the final path
    1/4.
    """

    def table(p_next: float) -> torch.Tensor:
        rows = torch.full((4, 4), (1 - p_next) / 3)
        for token in range(4):
            rows[token, (token + 1) % 4] = p_next
        return rows.log()

    return BigramStages(torch.stack([table(1 / 2), table(1 / 8)]), table(1 / 4))


TEXT = (
    "The expert of a stage predicts the next token; every stage is an expert. Early exits answer what is easy.\n\n"
    "def pool(logits, weights):\n    return sum(w * x for w, x in zip(weights, logits))\n\n"
    "Stages 0, 12 and 345 agree on most tokens, and where they do not, the product decides: naïve, but it works.\n\n"
)


def write_model(folder, seed: int = 0, **changes):
    """A model folder with random weights that matter and a tokenizer of 320 tokens."""
    from stagewise.modeling import PoEConfig, PoEForCausalLM
    from stagewise.tokenizer import train_tokenizer

    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "poe_stage_layers": [1, 1, 1],
        "per_stage_head": True,
        "poe_mode": "flat",
        **changes,
    }
    model = PoEForCausalLM(PoEConfig(**settings)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lm_head" in name:
                p.normal_(0.0, 0.4, generator=generator)
            elif "c_proj" in name:
                p.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(folder)
    train_tokenizer([TEXT], 320).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def end_to_end_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("end-to-end"), seed=1, poe_mode="none", per_stage_head=False)


@pytest.fixture
def sample_text() -> str:
    return TEXT
