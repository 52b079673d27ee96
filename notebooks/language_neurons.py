# %% [markdown]
# # A language's neurons
#
# Some neurons of a multilingual model fire for one language, or few (LAPE, Tang et al. 2024, arXiv 2402.16438).
# Here they are found by counting, silenced, and what that does to each language is measured, beside random neurons.
#
# The model is the small BLOOM of the package, and the text what it wrote itself; for a model of your own give a
# `Corpus` of your own files.

# %%
from pellucid.analysis.language_neurons import lape
from pellucid.corpora import Corpus
from pellucid.demo import load_demo_bridge
from pellucid.demo.texts import held_out_halves, written_text
from pellucid.running_stats import CountPositive

bridge = load_demo_bridge()
corpus = Corpus.from_documents(written_text(), bridge.tokenizer, context=128)
hook = "blocks.*.mlp.hook_post"
counted = bridge.collect(corpus, {hook: [CountPositive()]}, batch_size=16, progress=False)
found = lape(counted.array(hook, "count_positive"), counted.tokens, top_rate=0.05)
found

# %% [markdown]
# ## Where are they?
#
# How many of each language's neurons lie in each layer, and how many two languages share.

# %%
from pellucid.plots.neurons import layers_picture, overlap_picture

layers_picture(found.by_layer())

# %%
overlap_picture(found.overlap())

# %% [markdown]
# ## Silence them
#
# `zero` sets a language's neurons to 0 in every run and generation of a block. A change that changed nothing would
# be an error.

# %%
from pellucid.analysis.neurons import zero

start = "人人有权"
plain = bridge.generate(start, max_new_tokens=12, do_sample=False, verbose=False)
with zero(found.neurons["zh"]).on(bridge):
    silenced = bridge.generate(start, max_new_tokens=12, do_sample=False, verbose=False)
print(plain)
print(silenced)

# %% [markdown]
# ## What is lost, and is it more than chance?
#
# The rise of the mean negative log-probability of a token, on text that neither the model was trained on nor the
# neurons were found on. Silencing as many random neurons does some harm as well, so that stands beside it.

# %%
from pellucid.analysis.perplexity import own_and_others, perplexity_change
from pellucid.plots.neurons import change_picture

unseen = {language: paragraphs[:10] for language, paragraphs in held_out_halves()[1].items()}
text = Corpus.from_documents(unseen, bridge.tokenizer, context=128)
change = perplexity_change(
    bridge, text, found.neurons, random_sets=found.random_sets(1, seed=0), batch_size=16, progress=False
)
result = own_and_others(change["change"])
control = own_and_others(change["random"])["own"].mean("set")
for language in result.silenced.values:
    own, others, chance = (float(each.sel(silenced=language)) for each in (result["own"], result["others"], control))
    print(f"{language}: its own language {own:+.2f} nats, the others {others:+.2f}; random neurons {chance:+.2f}")
assert bool((result["own"] > 5 * result["others"]).all())
change_picture(change)

# %% [markdown]
# The same in one command, with tables, pictures and counts that are kept: `pellucid neurons demo --out study`. The
# page is `docs/howto/language_neurons.md`.
