"""The class of a reward model: a transformers sequence classifier with a linear head `score`.

Transformers has no such class for some architectures (Granite, Cohere, Apertus, ...). It is then built as
transformers builds its own, from `GenericForSequenceClassification` and the architecture's base class, under the name
that transformers would give it. Its folder holds the tensors of the transformer and `score.weight`, and opens in plain
transformers with the same two lines:

    class GraniteForSequenceClassification(GenericForSequenceClassification, GranitePreTrainedModel):
        pass
"""

import re

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from fastrlhf.errors import UserError


def language_model(config):
    """The Auto class that loads a language model with `config`: one for text, or for text and images."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM  # code of the model folder, or a class that it refuses


def sequence_classifier(config, path: str):
    """A class whose `from_pretrained` loads the model folder `path` as a sequence classifier.

    Raises:
        UserError: the architecture is no language model that transformers knows.
    """
    own_code = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if own_code or type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return AutoModelForSequenceClassification
    lm = language_model(config)._model_mapping.get(type(config), None)
    if lm is None:
        raise UserError(
            f"{path!r}: transformers has neither a sequence classifier nor a language model for "
            f"{config.model_type!r}, so no reward model can be built"
        )
    return _build(lm, config)


def _build(lm: type, config) -> type:
    with torch.device("meta"):
        model = lm(config)
    # The name of the transformer's attribute, as in the folder's tensors.
    prefix = next(n for n, child in model.named_children() if isinstance(child, PreTrainedModel))
    base = next(c for c in lm.__mro__[1:] if c.__name__.endswith("PreTrainedModel"))
    name = re.sub("(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", lm.__name__)
    members = {
        "__module__": lm.__module__,
        "base_model_prefix": prefix,
        "config_class": lm.config_class,  # the base class may name that of a model with images
    }
    return type(
        f"{name}ForSequenceClassification", (GenericForSequenceClassification, base), members
    )
