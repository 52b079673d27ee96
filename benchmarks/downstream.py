"""Libraries of others on Pellucid's bridge or on its Hugging Face model, each in an environment of its own.

    pip install --no-deps --target env sae-lens "transformer-lens<4" ...
    PYTHONPATH=env python benchmarks/downstream.py saelens

One function a library, run on the embedded model; it prints what it did and raises where something differs. The figures are
in ``results/downstream_2core_cpu_202611.md``, the table for users in ``docs/from_transformer_lens.md``.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from pellucid.demo import load_demo_bridge

TEXT = "Everyone has the right to life, liberty and security of person."
OTHER = "No one shall be held in slavery or servitude."
LAYER = 2
HOST = f"blocks.{LAYER}.hook_resid_post"


def say(what: str, found: Any = "") -> None:
    """One line of the report."""
    print(f"  {what}{': ' if found != '' else ''}{found}", flush=True)


def saelens() -> None:
    """SAELens' own autoencoders attached by ``bridge.saes``; its store and its evaluation on the bridge."""
    from sae_lens import SAE, TrainingSAE  # noqa: F401
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
    from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

    bridge = load_demo_bridge()
    cfg = bridge.cfg
    plain = bridge(TEXT)

    def made(cls: Any, config: Any, hook: str, width: int, out: str | None = None, **more: Any) -> Any:
        torch.manual_seed(0)
        metadata = SAEMetadata(hook_name=hook, hook_name_out=out)
        return cls(config(d_in=width, d_sae=64, metadata=metadata, **more))

    saes = {
        "standard": made(StandardSAE, StandardSAEConfig, HOST, cfg.d_model),
        "standard, layer_norm": made(
            StandardSAE, StandardSAEConfig, HOST, cfg.d_model, normalize_activations="layer_norm"
        ),
        "topk": made(TopKSAE, TopKSAEConfig, HOST, cfg.d_model, k=8),
        "jumprelu": made(JumpReLUSAE, JumpReLUSAEConfig, HOST, cfg.d_model),
        "gated": made(GatedSAE, GatedSAEConfig, HOST, cfg.d_model),
        "standard on hook_z": made(
            StandardSAE,
            StandardSAEConfig,
            "blocks.1.attn.hook_z",
            cfg.n_heads * cfg.d_head,
            reshape_activations="hook_z",
        ),
    }
    for name, sae in saes.items():
        hook = sae.cfg.metadata.hook_name
        by_hand = bridge.run_with_hooks(TEXT, fwd_hooks=[(hook, lambda x, hook, sae=sae: sae(x).reshape(x.shape))])
        found, cache = bridge.run_with_cache_with_saes(TEXT, saes=[sae])
        acts = cache[f"{hook}.hook_sae_acts_post"]
        inside = sorted(key.rpartition(".")[2] for key in cache if "hook_sae" in key)
        with_error = bridge.run_with_saes(TEXT, saes=[sae], use_error_term=True)
        zeroed = bridge.run_with_hooks_with_saes(
            TEXT, saes=[sae], use_error_term=True, fwd_hooks=[(f"{hook}.hook_sae_acts_post", lambda x, hook: x * 0)]
        )
        assert torch.equal(found, by_hand), name
        assert torch.allclose(with_error, plain, atol=1e-4), name
        assert (zeroed - plain).abs().max() > 1e-3, name
        say(name, f"as by hand to the bit; acts {list(acts.shape)}; {', '.join(inside)}")
        say("  with the error term, logits differ by", f"{(with_error - plain).abs().max():.1e}")
    coder = made(Transcoder, TranscoderConfig, "blocks.1.ln2.hook_out", cfg.d_model, "blocks.1.hook_mlp_out",
        d_out=cfg.d_model, apply_b_dec_to_input=False)  # fmt: skip
    _, cache = bridge.run_with_cache_with_saes(TEXT, saes=[coder])
    assert torch.equal(cache["blocks.1.hook_mlp_out"], coder(cache["blocks.1.ln2.hook_out"]))
    say("transcoder", "writes what it gives for the norm's output, to the bit")
    assert torch.equal(bridge(TEXT), plain)
    say("afterwards", "the logits are those of before, to the bit")


def saelens_store() -> None:
    """SAELens' activation store, its evaluation and its training runner on the bridge."""
    import datasets
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    bridge = load_demo_bridge()
    rows = datasets.Dataset.from_dict({"text": [f"{TEXT} {OTHER} {n} {TEXT}" for n in range(400)]})
    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=bridge.cfg.d_model, d_sae=64),
        model_name="demo", hook_name=HOST, dataset_path="none", streaming=False, context_size=16, prepend_bos=False,
        training_tokens=4096, train_batch_size_tokens=256, store_batch_size_prompts=8, n_batches_in_buffer=32,
        logger=LoggingConfig(log_to_wandb=False), device="cpu", n_checkpoints=0, save_final_checkpoint=False,
        output_path=None, checkpoint_path=None,
    )  # fmt: skip
    store = ActivationsStore.from_config(bridge, config, override_dataset=rows)
    batch = store.get_activations(store.get_batch_tokens())
    say("ActivationsStore", f"activations {list(batch.shape)}")
    runner = LanguageModelSAETrainingRunner(config, override_dataset=rows, override_model=bridge)
    sae = runner.run()
    say("LanguageModelSAETrainingRunner", f"{type(sae).__name__} of 4,096 tokens")
    evaluation = EvalConfig(
        batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2,
        compute_ce_loss=True, compute_kl=True,
    )  # fmt: skip
    metrics, _ = run_evals(sae, store, bridge, activation_scaler=ActivationScaler(), eval_config=evaluation)
    say(
        "run_evals", {key: round(value, 4) for part in metrics.values() for key, value in part.items() if "loss" in key}
    )
    plain, logits = bridge(TEXT), bridge.run_with_saes(TEXT, saes=[sae], use_error_term=True)
    say("the trained one with the error term, logits differ by", f"{(logits - plain).abs().max():.1e}")


def circuitsvis() -> None:
    """Pictures of patterns and of logits of a cache."""
    import circuitsvis as cv

    bridge = load_demo_bridge()
    logits, cache = bridge.run_with_cache(TEXT)
    tokens = bridge.to_str_tokens(TEXT)
    pattern = cv.attention.attention_patterns(tokens=tokens, attention=cache["pattern", 1][0])
    heads = cv.attention.attention_heads(tokens=tokens, attention=cache["pattern", 1][0])
    neurons = cv.activations.text_neuron_activations(tokens=tokens, activations=cache["post", 1][0][:, None, :8])
    probabilities = cv.logits.token_log_probs(bridge.to_tokens(TEXT)[0], logits[0].log_softmax(-1), bridge.to_string)
    say(
        "HTML of patterns, heads, neurons, log-probabilities",
        [len(str(x)) for x in (pattern, heads, neurons, probabilities)],
    )


def nnterp() -> None:
    """nnterp's standard names on the same model: layer outputs and logits to the bit."""
    from nnterp import StandardizedTransformer

    bridge = load_demo_bridge()
    model = StandardizedTransformer(bridge.hf_model, tokenizer=bridge.tokenizer, check_renaming=False)
    ids = bridge.to_tokens(TEXT)
    with model.trace(ids):
        layer = model.layers_output[LAYER].save()
        logits = model.logits.save()
    ours, cache = bridge.run_with_cache(ids)
    assert torch.equal(layer, cache[HOST])
    assert torch.equal(logits, ours)
    say("layers_output and logits", "the bridge's, to the bit")


def inseq() -> None:
    """inseq's attributions on the bridge's Hugging Face model."""
    import inseq as library

    bridge = load_demo_bridge()
    for method in ("integrated_gradients", "saliency", "attention"):
        model = library.load_model(bridge.hf_model, method, tokenizer=bridge.tokenizer)
        out = model.attribute(TEXT, TEXT + " Everyone has the right", show_progress=False)
        say(method, list(out.sequence_attributions[0].target_attributions.shape))


def tuned_lens() -> None:
    """tuned-lens on the bridge's Hugging Face model: its logit lens is ours."""
    from tuned_lens.nn.lenses import LogitLens, TunedLens
    from tuned_lens.plotting import PredictionTrajectory

    bridge = load_demo_bridge()
    lens = LogitLens.from_model(bridge.hf_model)
    _, cache = bridge.run_with_cache(TEXT)
    theirs = lens(cache["resid_post", 1], 1)
    with torch.no_grad():
        ours = bridge.hf_model.lm_head(bridge.hf_model.transformer.ln_f(cache["resid_post", 1]))
    say("LogitLens, layer 1: differs from Hugging Face's norm and head by", f"{(theirs - ours).abs().max():.1e}")
    tuned = TunedLens.from_model(bridge.hf_model)
    ids = bridge.to_tokens(TEXT)[0].tolist()
    found = PredictionTrajectory.from_lens_and_model(tuned, bridge.hf_model, tokenizer=bridge.tokenizer, input_ids=ids)
    say("TunedLens.from_model, PredictionTrajectory", list(found.log_probs.shape))


def repeng() -> None:
    """A control vector of repeng's: blocks are wrapped, and the bridge sees them."""
    import numpy

    numpy.float_ = numpy.float64  # type: ignore[attr-defined]  # repeng 0.4.0 was written for NumPy 1

    from repeng import ControlModel, ControlVector, DatasetEntry

    bridge = load_demo_bridge()
    plain = bridge(TEXT)
    model = ControlModel(bridge.hf_model, [1, 2])
    entries = [DatasetEntry(positive=f"{TEXT} {n}", negative=f"{OTHER} {n}") for n in range(12)]
    vector = ControlVector.train(model, bridge.tokenizer, entries, method="pca_diff", batch_size=4)
    model.set_control(vector, 2.0)
    steered, cache = bridge.run_with_cache(TEXT)
    assert not torch.equal(steered, plain)
    assert torch.equal(steered, bridge.hf_model(bridge.to_tokens(TEXT)).logits)
    say("ControlVector.train, set_control", f"{len(cache)} entries in the cache, logits Hugging Face's to the bit")


def steering_vectors() -> None:
    """steering-vectors trains on the bridge's Hugging Face model, and the bridge sees what it applies."""
    from steering_vectors import train_steering_vector

    bridge = load_demo_bridge()
    plain = bridge(TEXT)
    vector = train_steering_vector(
        bridge.hf_model, bridge.tokenizer, [(TEXT, OTHER), (TEXT + " So", OTHER + " So")], layers=[1]
    )
    with vector.apply(bridge.hf_model):
        steered, cache = bridge.run_with_cache(TEXT)
    assert not torch.equal(steered, plain)
    say("train_steering_vector, apply", f"layer 1 of {len(cache)} entries; the bridge's logits follow")


def sae_dashboard() -> None:
    """A page of an autoencoder's features, made of the bridge and SAELens' autoencoder."""
    import tempfile

    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    bridge = load_demo_bridge()
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=bridge.cfg.d_model, d_sae=32, metadata=SAEMetadata(hook_name=HOST)))
    tokens = bridge.to_tokens([TEXT] * 8)
    data = SaeVisRunner(SaeVisConfig(hook_point=HOST, features=range(4), minibatch_size_tokens=4)).run(
        sae, bridge, tokens
    )
    page = Path(tempfile.mkdtemp()) / "page.html"
    save_feature_centric_vis(data, page)
    say("SaeVisRunner, save_feature_centric_vis", f"{page.stat().st_size:,} bytes of HTML")


LIBRARIES: dict[str, tuple[str, Callable[[], None]]] = {
    "saelens": ("sae-lens", saelens),
    "saelens_store": ("sae-lens", saelens_store),
    "circuitsvis": ("circuitsvis", circuitsvis),
    "nnterp": ("nnterp", nnterp),
    "inseq": ("inseq", inseq),
    "tuned_lens": ("tuned-lens", tuned_lens),
    "repeng": ("repeng", repeng),
    "sae_dashboard": ("sae-dashboard", sae_dashboard),
    "steering_vectors": ("steering-vectors", steering_vectors),
}


def main() -> None:
    """Run the libraries that are named."""
    for name in sys.argv[1:]:
        package, work = LIBRARIES[name]
        known = [package, "transformers", "torch", *(["transformer-lens"] if package == "sae-lens" else [])]
        print(name, *(f"{each} {importlib.metadata.version(each)}" for each in known), sep=", ", flush=True)
        work()


if __name__ == "__main__":
    main()
