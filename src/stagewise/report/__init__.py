"""Reports: one self-contained HTML page about a run or a model, and tables over many checkpoints of one run."""
