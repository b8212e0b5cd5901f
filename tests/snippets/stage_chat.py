"""The calls of the stage-chat card: a turn written with the ids of the special tokens."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = "cognica/Cognica-PoE-v1.0-1.3B-stage-chat"
tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(
    model_id,
    trust_remote_code=True,
    torch_dtype=torch.bfloat16,
    device_map="auto",
)
model.eval()

BOS, USR_S, USR_E, ASS_S = 32759, 32760, 32761, 32762
user_msg = "What is the boiling point of water in Fahrenheit?"
ids = [BOS, USR_S] + tokenizer.encode(user_msg) + [USR_E, ASS_S]
input_ids = torch.tensor([ids], device=model.device)
with torch.no_grad():
    out = model.generate(input_ids, max_new_tokens=80, do_sample=False)
print(tokenizer.decode(out[0, len(ids):]))  # fmt: skip
