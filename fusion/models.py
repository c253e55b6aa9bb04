"""Makes the model and the loss that a job spec names."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusion.errors import UserError, one_line
from fusion.spec import JobSpec, LossFromEntrypoint, ModelFromEntrypoint, ModelFromTransformers
from fusion.user_code import load_entrypoint
from fusion.yaml_file import suggest


def build_model(spec: JobSpec, base: Path) -> nn.Module:
    """The user's model, in training mode. Torch is seeded with `train.seed` first, so the weights are reproducible.

    Raises `UserError` with the user's file and line.
    """
    torch.manual_seed(spec.train.seed)
    if isinstance(spec.model, ModelFromEntrypoint):
        entrypoint = load_entrypoint(spec.model.entrypoint, base, where="model.entrypoint")
        model = entrypoint(**spec.model.args)
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model.entrypoint {spec.model.entrypoint!r} returned a {type(model).__name__}; return a torch.nn.Module"
            )
    else:
        model = _from_transformers(spec.model)
    model.train()
    return model


def build_loss(spec: JobSpec, base: Path) -> str | Callable[..., Any]:
    """`cross_entropy`, `mse`, `model`, or the user's function. Raises `UserError`."""
    if isinstance(spec.loss, LossFromEntrypoint):
        return load_entrypoint(spec.loss.entrypoint, base, where="loss.entrypoint").function
    return spec.loss


def _from_transformers(spec: ModelFromTransformers) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"model.hf {spec.hf!r}: needs the `transformers` package; pip install 'fusion-train[hf]'"
        ) from None
    from transformers.models.auto import configuration_auto

    # Its remarks on defaults are of no use to who wrote a spec; what matters comes as an error.
    transformers.logging.set_verbosity_error()

    known = sorted(configuration_auto.CONFIG_MAPPING_NAMES)
    if spec.hf not in known:
        hint = suggest(spec.hf, known)
        hint = hint if "did you mean" in hint else "; give a model type, such as gpt2, llama or bert"
        raise UserError(f"model.hf: transformers has no model type {spec.hf!r}{hint}")
    settings = dict(spec.config)
    try:
        config = transformers.AutoConfig.for_model(spec.hf, **settings)
        # A cache of keys and values is of use in generation only; in training it would be one more output.
        if hasattr(config, "use_cache") and "use_cache" not in settings:
            config.use_cache = False
        # Without a name where a type has several classes of one kind, transformers would fail on None; so it takes the first.
        config.architectures = config.architectures or []
        model: nn.Module = _class_for(config, settings.get("architectures")).from_config(config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.hf {spec.hf!r} can't be made from this config: {one_line(error)}") from error
    _refuse_unknown_settings(spec, config, model)
    return model


def _refuse_unknown_settings(spec: ModelFromTransformers, config: Any, model: nn.Module) -> None:
    """A config keeps whatever it is given, so that a misspelt setting would train the default's model without a word.

    A setting is what a config has without being told, or what the type's code speaks of: some are renamed on the way in
    (`rope_theta`), others are read where they are needed and have no default.
    """
    try:
        usual = type(config)()
    except Exception:
        return  # one of the few types that make nothing of no settings
    strange = [key for key in spec.config if not hasattr(usual, key)]
    if not strange:
        return
    kinds = {*type(usual).__mro__, *type(model).__mro__}
    modules = {kind.__module__ for kind in kinds if kind.__module__.startswith("transformers.")}
    code = "\n".join(inspect.getsource(sys.modules[module]) for module in modules)
    for key in strange:
        if not re.search(rf"\b{re.escape(key)}\b", code):
            hint = suggest(key, sorted(usual.to_dict()))
            hint = hint if "did you mean" in hint else "; leave it out"
            raise UserError(f"model.config: {spec.hf} has no setting {key!r}{hint}")


def _class_for(config: Any, architectures: list[str] | None) -> Any:
    """The class with a head that the type was made for; `config.architectures` decides otherwise."""
    import transformers

    if architectures:
        named: Any = getattr(transformers, architectures[0], None)
        if named is None:
            raise UserError(f"model.config.architectures: transformers has no class {architectures[0]!r}")

        class _Named:
            from_config = staticmethod(named._from_config)

        return _Named
    for heads in (
        transformers.AutoModelForSeq2SeqLM,
        # Before the causal ones: a causal model of a type with an encoder is its decoder alone.
        transformers.AutoModelForSpeechSeq2Seq,
        None if getattr(config, "is_decoder", False) else transformers.AutoModelForMaskedLM,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForImageClassification,
        transformers.AutoModelForAudioClassification,
        transformers.AutoModelForVideoClassification,
        transformers.AutoModelForSemanticSegmentation,
    ):
        if heads is not None and type(config) in heads._model_mapping:
            return heads
    return transformers.AutoModel
