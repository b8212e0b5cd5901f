"""Modelling files: flat, self-contained, copied next to every exported model."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_poe import PoEConfig
from .modeling_poe import PoEForCausalLM

AutoConfig.register(PoEConfig.model_type, PoEConfig, exist_ok=True)
AutoModelForCausalLM.register(PoEConfig, PoEForCausalLM, exist_ok=True)
