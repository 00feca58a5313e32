"""Pictures of spikes and energy: `spikes_of` a sentence, a function for each picture, and `save`."""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        "Pictures need matplotlib, which is not installed. Install the extra: "
        "pip install -c constraints.txt '.[energy]'."
    ) from error

from .figures import accuracy_by_steps, energy_by_layer, firing_rates, raster, scores_by_steps, words
from .spikes import SentenceSpikes, StepAccuracy, accuracies_of, spikes_of
from .style import not_drawable, save

__all__ = [
    "SentenceSpikes",
    "StepAccuracy",
    "accuracies_of",
    "accuracy_by_steps",
    "energy_by_layer",
    "firing_rates",
    "not_drawable",
    "raster",
    "save",
    "scores_by_steps",
    "spikes_of",
    "words",
]
