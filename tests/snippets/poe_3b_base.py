"""The calls of the PoE-3B card: generation after a bos written by hand, then its seven helpers."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(
    "cognica/Cognica-PoE-v1.0-3B-base",
    trust_remote_code=True,
    dtype=torch.bfloat16,
).to(device).eval()  # fmt: skip
tokenizer = AutoTokenizer.from_pretrained(
    "cognica/Cognica-PoE-v1.0-3B-base",
    trust_remote_code=True,
)

prompt = "The capital of France is"
input_ids = [tokenizer.bos_token_id] + tokenizer.encode(prompt, add_special_tokens=False)
input_ids = torch.tensor([input_ids], device=device)
out = model.generate(
    input_ids=input_ids,
    max_new_tokens=32,
    do_sample=False,
)
print(tokenizer.decode(out[0].tolist()))
full = out

# 1. one stage's prediction
logits = model.forward_stage(input_ids, stage=3)

# 2. the product of the first stages
log_p = model.forward_aggregated(input_ids, max_stages=2)

# 3. a prefix
out = model.generate_prefix(input_ids, max_stages=1, max_new_tokens=64)
prefix = out

# 4. one stage
out = model.generate_stage(input_ids, stage=0, max_new_tokens=64)
single = out

# 5. adaptive depth
out, stages_used = model.generate_wand(
    input_ids, max_new_tokens=64, safety=1.0,
    return_stages_used=True,
)  # fmt: skip
wand = out

# 6. speculation
out, accept_rate = model.generate_speculative(
    input_ids, max_new_tokens=64,
    draft_stage=0, k_draft=4, return_acceptance=True,
)  # fmt: skip
speculative = out

# 7. composition
out = model.generate_parallel_composition(
    input_ids, stages=(2, 3), stage_weights=(1.0, 1.0), max_new_tokens=64,
)  # fmt: skip
composition = out
