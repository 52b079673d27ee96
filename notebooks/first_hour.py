# %% [markdown]
# # Your first hour
#
# What does a language model do inside? Five questions, each answered in one call and each with a picture: which
# heads copy, what the model would say after each layer, which parts wrote a word, where the word is kept, and what
# happens if you push.
#
# Everything runs on a small multilingual BLOOM that comes with the package, without a network. For a model of your
# own, change the line that opens it: `TransformerBridge.boot_transformers("HuggingFaceTB/SmolLM2-135M")`.

# %%
import torch

from pellucid.demo import load_demo_bridge

bridge = load_demo_bridge()
torch.set_grad_enabled(False)
prompt = "Everyone has the right to religion and work. Everyone has the right to religion and"
logits, cache = bridge.run_with_cache(prompt)
print([bridge.to_single_str_token(int(token)) for token in logits[0, -1].topk(3).indices])
cache

# %% [markdown]
# It says *work* again: the sentence was begun a second time, and the model copies. `cache` holds every activation
# of the run, under TransformerLens' names.
#
# ## Which heads copy?
#
# Random tokens, twice: nothing but copying can help there. Beside each score stands what position alone would give.

# %%
from pellucid.analysis.heads import RandomRepeats, head_scores
from pellucid.plots import head_map

scores = head_scores(bridge, RandomRepeats(length=25, prompts=8, seed=0))
induction = scores["score"].sel(pattern="induction").mean("prompt")
best = induction.stack(place=("layer", "head")).idxmax().item()
print(
    f"L{best[0]}H{best[1]}: {float(induction.max()):.2f} of its attention goes to what followed the token's first copy"
)
head_map(scores)

# %% [markdown]
# ## What would it say after each layer?
#
# The logit lens reads the stream of an earlier layer with the model's own last norm and unembedding. At the last
# layer it is the model's output, to the bit.

# %%
from pellucid.analysis.lens import LogitLens
from pellucid.plots import lens_table

reading = LogitLens(bridge).read(prompt, tokens=[" work", " freedom"], positions=None)
for layer in reading.layer.values:
    cell = reading.sel(layer=layer).isel(pos=-1)
    print(layer, cell.top_token.values[0], f"rank of work: {int(cell['rank'].values[0])}")
lens_table(reading.isel(pos=slice(-6, None)))

# %% [markdown]
# ## Which parts wrote it?
#
# With the last norm's scale kept as it was, a logit is a sum: each part of the model has its share. `check=3` takes
# the three largest parts away in a run of the model and measures what is lost; the two agree to rounding.

# %%
from pellucid.analysis.attribution import logit_attribution
from pellucid.plots import heat_map

shares = logit_attribution(bridge, prompt, " work", " freedom", by="head", check=3)
for part, attributed, measured in zip(
    *(shares.attrs[key] for key in ("checked", "attributed", "measured")), strict=True
):
    print(f"{part}  attributed {attributed:+.3f}  measured {measured:+.3f}")
heat_map(shares, title="Which heads write ' work', not ' freedom'")

# %% [markdown]
# A share is what a part writes into the logit directly. What it does through later layers is not in it; for that,
# patch.
#
# ## Where is the word kept?
#
# Two prompts that differ in one word. The clean run's stream is put into the corrupted run, one layer and position
# at a time: 0 is the corrupted run, 1 the clean one.

# %%
from pellucid.experiments.activation_patching import activation_patching
from pellucid.sweep import LogitDifference

corrupted = prompt.replace("work", "freedom")
metric = LogitDifference(bridge.to_single_token(" work"), bridge.to_single_token(" freedom"))
patched = activation_patching(bridge, prompt, corrupted, metric, "resid_pre", progress=False)
kept_at = {layer: int(patched.sel(layer=layer).argmax("pos")) for layer in patched.layer.values}
print({int(layer): str(patched.token.values[place]) for layer, place in kept_at.items()})
heat_map(patched, title="Where the word is kept")

# %% [markdown]
# Up to layer 1 it is where it stands; in layer 1 it is copied to the last position. Which heads do that is the same
# call with `"z"`, and whether they are needed is `ablation`.
#
# ## What if we push?
#
# A direction out of texts: the mean of the stream over some French sentences less that over English ones. Added
# while the model writes, it changes the language; an edit that did nothing would be an error.

# %%
from pellucid.demo.texts import written_text
from pellucid.steering import Add, Edit, Steering, difference_of_means

texts = written_text()
french = difference_of_means(
    bridge, texts["fr"][:24], texts["en"][:24], "resid_post", layers=2, position="mean", name="French", progress=False
)
start = "Everyone has the right to"
plain = bridge.generate(start, max_new_tokens=12, do_sample=False, verbose=False)
with Steering(Edit(Add(french, 2.0))).on(bridge):
    steered = bridge.generate(start, max_new_tokens=12, do_sample=False, verbose=False)
print(plain)
print(steered)
assert plain != steered

# %% [markdown]
# ## Where to go on
#
# Every step has a page: `docs/howto/heads.md`, `lens.md`, `attribution.md`, `patch.md`, `steer.md`. The same on a
# real model: `first_hour_smollm2.ipynb`. And whatever you read here, `bridge.verify()` holds the bridge against
# Hugging Face on your own model:

# %%
report = bridge.verify(progress=False)
assert report.ok
report
