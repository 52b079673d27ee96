"""Attribution: what patching each place of a model would do, for all places at once, with the experiment that checks it."""

from pellucid.attribution.attribution_patching import AttributionPatching, attribution_patching

__all__ = ["AttributionPatching", "attribution_patching"]
