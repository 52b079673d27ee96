"""Makes the embedded demo model: a small trained BLOOM, from public text, in minutes on one CPU core.

`corpus` gets the text, `tokenizer` learns the vocabulary, `documents` mixes training batches, `train` fits the
weights, `evaluate` measures what the shipped file shows, `card` writes it down. Start it with
`scripts/train_demo_model.py`.
"""
