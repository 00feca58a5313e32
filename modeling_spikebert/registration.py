"""Makes transformers' Auto classes know SpikeBERT, without importing transformers before it is wanted."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Registers config and models, now or as soon as the Auto classes are imported."""
    sys.meta_path.insert(0, Watcher())
    for name, action in AFTER.items():
        if name in sys.modules:
            action()


def register_config() -> None:
    from transformers import AutoConfig

    from .configuration_spikebert import SpikeBertConfig

    AutoConfig.register(SpikeBertConfig.model_type, SpikeBertConfig)


def register_models() -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    from .configuration_spikebert import SpikeBertConfig
    from .modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel

    AutoModel.register(SpikeBertConfig, SpikeBertModel)
    AutoModelForSequenceClassification.register(SpikeBertConfig, SpikeBertForSequenceClassification)


def importing(name: str) -> Callable[[], Any]:
    return lambda: import_module(name, __package__)


# What to do once a module is imported. Our files need modules of transformers that import the Auto classes themselves
# (`modeling_layers`), and then are not whole yet: so each of our files is imported after those, and registered after
# itself, whichever was imported first.
AFTER: dict[str, Callable[[], Any]] = {
    "transformers.models.auto.configuration_auto": importing(".configuration_spikebert"),
    f"{__package__}.configuration_spikebert": register_config,
    "transformers.models.auto.modeling_auto": importing("transformers.modeling_layers"),
    "transformers.modeling_layers": importing(".modeling_spikebert"),
    f"{__package__}.modeling_spikebert": register_models,
}


class Watcher(MetaPathFinder):
    """Finds the modules of `AFTER` as the other finders do, and lets them load as ever, with the action behind it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in AFTER:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_act(module: ModuleType) -> None:
                load(module)
                AFTER[name]()

            spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec
