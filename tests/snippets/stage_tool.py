"""The calls of the stage-tool card: a function described as indented JSON, greedy with a repetition penalty."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(
    "cognica/Cognica-PoE-v1.0-1.3B-stage-tool",
    trust_remote_code=True,
    torch_dtype=torch.float32,
).eval()
tok = AutoTokenizer.from_pretrained(
    "cognica/Cognica-PoE-v1.0-1.3B-stage-tool",
    trust_remote_code=True,
)

BOS, USR_S, USR_E, ASS_S = 32759, 32760, 32761, 32762

weather_fn = {
    "name": "get_weather",
    "description": "Get current weather by city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "City name"}},
        "required": ["city"],
    },
}
system = "You are a helpful assistant with access to the following functions. Use them if required -\n" + json.dumps(
    weather_fn, indent=4
)
content = f"{system}\n\nCan you tell me the current weather in Seoul?"
ids = [BOS, USR_S] + tok.encode(content) + [USR_E, ASS_S]

out = model.generate(
    torch.tensor([ids]),
    max_new_tokens=80,
    do_sample=False,
    repetition_penalty=1.15,
    pad_token_id=BOS,
)
print(tok.decode(out[0].tolist()[len(ids):]))  # fmt: skip
