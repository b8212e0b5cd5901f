"""The calls of the PoE-1.5B card: loading, then its six ways to decode."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

repo = "cognica/Cognica-PoE-v1.0-1.5B-base"
tok = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(
    repo,
    trust_remote_code=True,
    dtype=torch.bfloat16,
    device_map="auto",
)

ids = tok("대한민국의 수도는", return_tensors="pt").to(model.device)
out = model.generate(**ids, max_new_tokens=32, do_sample=True, temperature=0.8, top_p=0.95)
print(tok.decode(out[0], skip_special_tokens=True))
sampled = out

# full
ids = tok("The capital of France is", return_tensors="pt").to(model.device)
out = model.generate(**ids, max_new_tokens=32, do_sample=False)
full = out

# prefixes
out_s0 = model.generate_prefix(ids.input_ids, max_stages=1, max_new_tokens=32)
out_s0_s1 = model.generate_prefix(ids.input_ids, max_stages=2, max_new_tokens=32)
out_s0_s2 = model.generate_prefix(ids.input_ids, max_stages=3, max_new_tokens=32)
out_full = model.generate_prefix(ids.input_ids, max_stages=4, max_new_tokens=32)

# single stages
logits_s0 = model.forward_stage(ids.input_ids, stage=0)
logits_s3 = model.forward_stage(ids.input_ids, stage=3)
out = model.generate_stage(ids.input_ids, stage=0, max_new_tokens=32)
single = out

# adaptive depth
out, stages_used = model.generate_wand(
    ids.input_ids,
    max_new_tokens=32,
    safety=1.0,
    return_stages_used=True,
)
wand = out

# speculation
out, accept_rate = model.generate_speculative(
    ids.input_ids,
    draft_stage=0,
    k_draft=3,
    max_new_tokens=64,
    return_acceptance=True,
)
speculative = out

# composition
out_all = model.generate_parallel_composition(
    ids.input_ids,
    stages=[0, 1, 2, 3],
    max_new_tokens=32,
)
out_weighted = model.generate_parallel_composition(
    ids.input_ids,
    stages=[0, 2, 3],
    stage_weights=[0.5, 1.0, 1.0],
    max_new_tokens=32,
)
