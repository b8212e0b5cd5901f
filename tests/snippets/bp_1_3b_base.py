"""The calls of the BP-1.3B card: bos in the prompt's text, greedy with a repetition penalty, on a GPU."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(
    "cognica/Cognica-BP-v1.0-1.3B-base",
    trust_remote_code=True,
    torch_dtype=torch.bfloat16,
).eval().cuda()  # fmt: skip

tok = AutoTokenizer.from_pretrained(
    "cognica/Cognica-BP-v1.0-1.3B-base",
    trust_remote_code=True,
)

prompt = "<|bos|>The capital of France is"
ids = tok.encode(prompt, return_tensors="pt").cuda()

out = model.generate(ids, max_new_tokens=40, do_sample=False,
                     repetition_penalty=1.15, pad_token_id=tok.eos_token_id)  # fmt: skip
print(tok.decode(out[0]))
