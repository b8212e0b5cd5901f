"""Modelling files: flat, self-contained, copied next to every exported model.

Importing this package makes transformers' Auto classes know ours.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .cascade import load
from .configuration_poe import PoEConfig
from .modeling_poe import PoEForCausalLM
from .tokenization_poe import PoETokenizer, load_tokenizer

__all__ = ["PoEConfig", "PoEForCausalLM", "PoETokenizer", "load", "load_tokenizer"]

AutoConfig.register(PoEConfig.model_type, PoEConfig, exist_ok=True)
AutoModelForCausalLM.register(PoEConfig, PoEForCausalLM, exist_ok=True)
AutoTokenizer.register(PoEConfig, fast_tokenizer_class=PoETokenizer, exist_ok=True)
