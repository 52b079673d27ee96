# %% [markdown]
# # From a behaviour to a circuit
#
# Random words are said a second time, and the model goes on as it did the first time. Nothing but the prompt can tell
# it the next word. **Which parts of the model carry that word to the end, how sure is that, and is it so?**
#
# Every step below is an estimate with its experiment beside it. All of it runs on the small model that comes with the
# package, without a network.
#
# ## The behaviour, as pairs
#
# A pair is a clean prompt, a corrupted one of as many tokens, and the two words between which the model decides. Here
# the corrupted prompt has another word where the answer stood. Pairs of one length are taken, so that a position means
# the same in all of them: half of them to find the circuit, the other half to test it.

# %%
from pellucid.corpora import induction_pairs
from pellucid.demo import load_demo_bridge

bridge = load_demo_bridge()
drawn = induction_pairs(bridge.tokenizer, 60, seed=0, length=6)
eleven = [row for row, text in enumerate(drawn.clean) if bridge.to_tokens(text).shape[1] == 11]
pairs, others = drawn[eleven[:16]], drawn[eleven[16:32]]
for row in list(pairs.rows())[:2]:
    print(f"{row['clean']}  ->{row['answer']}\n{row['corrupted']}  ->{row['foil']}\n")

# %% [markdown]
# The metric is the logit of the answer less that of the foil, on every prompt:

# %%
import torch
import xarray

from pellucid.plots import bars

ids = torch.tensor([[bridge.to_single_token(word) for word in column] for column in (pairs.answer, pairs.foil)])
measured = {}
with torch.no_grad():
    for name, texts in (("clean", pairs.clean), ("corrupted", pairs.corrupted)):
        logits = bridge(list(texts))[:, -1]
        answer, foil = (logits.gather(1, column[:, None])[:, 0] for column in ids)
        measured[name] = xarray.DataArray((answer - foil).numpy(), dims="pair")
bars(measured, title="The model says what it read", unit="logit of the answer less the foil's")

# %% [markdown]
# ## Where is the word? An attribution
#
# To patch is to put the clean run's activation into the corrupted run; 0 is then the corrupted run's metric and 1 the
# clean one's. An attribution estimates that for all places at once, out of a backward pass.

# %%
from pellucid.attribution import attribution_patching
from pellucid.plots import heat_map

stream = attribution_patching(bridge, pairs, site="resid_pre", method="relp", check=8, progress=False)
print(stream.attrs["summary"])
places = {"pos": [str(place) for place in range(11)]}
heat_map(stream.effect, title="Where the word is", unit="estimated effect (0 corrupted, 1 clean)", labels=places)

# %% [markdown]
# The word stays where it was read until layer 1, and is at the last position from layer 2 on. Something in layer 1
# moves it. Which heads?
#
# ## Its experiment
#
# `check=8` really patches the eight heads of the largest estimates, and eight others at random. Beside each other:

# %%
heads = attribution_patching(bridge, pairs, site="z", method="relp", check=8, progress=False)
print(heads.attrs["summary"])
table = heads[["effect", "standard_error", "patched"]].to_dataframe().dropna().reset_index()
table = table.reindex(table.patched.abs().sort_values(ascending=False).index)[:8]
shown = {
    name: xarray.DataArray(table[name].values, {"head": [f"L{row.layer}H{row.head}" for row in table.itertuples()]})
    for name in ("effect", "patched")
}
error = 2 * table.standard_error.values
bars(
    {"estimated": shown["effect"], "patched": shown["patched"]},
    interval=(shown["effect"] - error, shown["effect"] + error),
    title="Heads: estimated, and really patched",
    unit="effect (0 corrupted, 1 clean)",
    subtitle="Lines: two standard errors on both sides, by drawing pairs anew.",
)

# %% [markdown]
# Five heads of layer 1, and L0H0, of which the estimate has too little: about half of its effect is missed.
#
# ## A circuit
#
# Heads are nodes; what one part reads of another is an edge. All of them are scored in a few passes, and the strongest
# are kept. A score is the estimated change of the metric when the edge is patched from the corrupted run. Drawn, a line is
# as wide as its score is large, and orange where it carries the answer.

# %%
from pellucid.circuits import edge_attribution
from pellucid.plots import circuit_diagram

whole = edge_attribution(bridge, pairs, method="eap-ig", progress=False)
circuit = whole.top(40)
print(circuit.top(8))
circuit_diagram(circuit.prune().dataset())

# %% [markdown]
# ## Its error bar
#
# With other pairs, would it be the same circuit? Pairs are drawn anew a hundred times; no run of the model is needed.

# %%
stability = circuit.stability(resamples=100)
print(f"Jaccard of two resamples {stability.resamples.mean:.2f}, of the two halves {stability.halves.mean:.2f}")
strongest = circuit.dataset(stability).isel(edge=slice(15))
names = [f"{one} → {other}" for one, other in zip(strongest.sender.values, strongest.receiver.values, strict=True)]
score = xarray.DataArray(strongest.score.values, {"edge": names})
error = 2 * strongest.error.values
bars(
    score,
    interval=(score - error, score + error),
    title="The strongest edges",
    unit="change of the logit difference",
    subtitle="Lines: two standard errors on both sides.",
)

# %% [markdown]
# ## Is it so? The faithfulness curve
#
# The experiment: every edge outside the circuit really carries what its sender writes in the corrupted run. On pairs
# that the circuit was *not* found on. 1 is the whole model, 0 everything patched; random circuits stand beside.

# %%
from pellucid.circuits import faithfulness
from pellucid.plots import faithfulness_bars

curve = faithfulness(bridge, whole, others, sizes=[10, 20, 40, 80, 160, 400], randoms=2, progress=False)
kept = float(curve.faithfulness.sel(size=40))
print(f"40 of {len(whole):,} edges keep {kept:.0%} of the difference")
assert kept > 0.8 > 0.1 > float(curve.random_faithfulness.sel(size=40).max())
faithfulness_bars(curve)

# %% [markdown]
# ## What these pairs cannot show
#
# How does a head know *where to look*? Both prompts of a pair agree there, so nothing of it can differ. That is a
# question of other pairs: now the corrupted prompt has another word *before* the answer, so that the second time leads
# nowhere. There is no foil; the metric is the answer's log-probability.

# %%
from pellucid.corpora import PromptPairs


def with_another_word_before(row):
    words = row["clean"].split()
    words[4] = row["foil"].strip()
    return {"clean": row["clean"], "corrupted": " ".join(words), "answer": row["answer"]}


where = PromptPairs.from_rows(map(with_another_word_before, pairs.rows()), name="the word before")
looked = attribution_patching(bridge, where, site="z", method="relp", check=8, progress=False)
print(looked.attrs["summary"])

# %% [markdown]
# On the cells that were patched the estimate looks well, and yet the last number warns: patched together, the heads that
# it takes for unlikely do much. RelP takes attention patterns for constants, and here it is the pattern that changes.
# There are 32 heads, so patch all of them:

# %%
looked = attribution_patching(bridge, where, site="z", method="relp", check=16, progress=False)
assert int(looked.patched.notnull().sum()) == 32
print(looked.attrs["summary"].splitlines()[0])
print({f"L{layer}H{head}": round(value, 2) for (layer, head), value in looked.patched.to_series().nlargest(3).items()})

# %% [markdown]
# L0H0 alone brings half of it back, and the estimate had missed it: read `patched`, not `effect`. Edges into keys are
# attributed with the softmax's own gradient, and they are there:

# %%
keys = edge_attribution(bridge, where, method="eap-ig", progress=False)
print(keys.top(8))
print(f"shared by the two circuits of 40 edges: {circuit.jaccard(keys.top(40)):.2f} (Jaccard)")
faithfulness_bars(
    faithfulness(bridge, keys, where, sizes=[20, 40, 80, 160, 400], randoms=2, progress=False),
    title="Where to look: a larger circuit",
)

# %% [markdown]
# ## The answer
#
# - **What is said**: five heads of layer 1 read the word where it stands (through their values, straight from the
#   embedding and by L0H0) and write it at the end, where MLPs make it larger. 40 of 1,519 edges keep nine tenths of it, on
#   pairs they were not found on; as many at random keep nothing.
# - **Where to look**: layer 0 writes at each word what stood before, and the keys of the same five heads read that:
#   induction (Olsson et al. 2022). It takes more edges, about 160.
# - **How sure**: the edges have standard errors, the set of 40 a Jaccard of 0.87 between resamples; and where an
#   estimate missed a head, its own experiment gave the warning.
#
# Pages: `docs/howto/attribution_patching.md`, `docs/howto/circuits.md`.
