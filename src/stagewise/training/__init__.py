"""Training: objectives over stages, MuonAdamW, the loop, checkpoints, several ranks.

- `objectives`, `head_loss`: what a stage is fitted to, forward and backward one stage at a time, logits by chunk.
- `optimizer`, `schedule`, `precision`: how weights move.
- `loop`, `run`, `checkpoint`, `metrics`, `progress`, `guard`: a run from recipe to model folder, resumed exactly.
- `distributed`, `stage_parallel`: the same on several processes. `cost`: what a run needs before it starts.
"""
