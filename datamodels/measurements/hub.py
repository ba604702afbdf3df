"""Models of the transformers library: texts through their tokenizer, images through their image processor."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from datamodels.errors import MeasurementError
from datamodels.measurements.backbones import Answer, Backbone, installed, pictures

_TEXT_FIELDS = ("input_ids", "attention_mask", "token_type_ids")


def load(name: str, kind: str, pooling: str, max_length: int, local_files_only: bool) -> Backbone:
    """The model of a name on the hub, or of a folder; with its head where the checkpoint has one for such data."""
    if kind not in ("text", "image"):
        raise MeasurementError(
            f"model {name!r}: a transformer takes texts or images, and the data set has neither; name a torch module, "
            f"torch:package.module.function"
        )
    with installed(name, "transformers"):
        import transformers as hub
    if not sys.stderr.isatty():
        hub.utils.logging.disable_progress_bar()
    given = {"local_files_only": local_files_only, "trust_remote_code": False}  # else a terminal would be asked
    try:
        config = hub.AutoConfig.from_pretrained(name, **given)
        head = "ForSequenceClassification" if kind == "text" else "ForImageClassification"
        has_head = any(str(kept).endswith(head) for kept in config.architectures or ())
        model = getattr(hub, f"AutoModel{head if has_head else ''}").from_pretrained(name, **given)
        if kind == "text":
            tokenizer = hub.AutoTokenizer.from_pretrained(name, **given)
            return Backbone(name, *_of_texts(name, model, tokenizer, pooling, max_length), _classes(config, has_head))
        processor = hub.AutoImageProcessor.from_pretrained(name, **given)
    except (OSError, ValueError, KeyError) as error:
        raise MeasurementError(
            f"model {name!r}: transformers cannot load it ({' '.join(str(error).split())[:300]}); expected a folder "
            f"that save_pretrained wrote (model and {'tokenizer' if kind == 'text' else 'image processor'}), or a "
            f"model of the hub: one that is not on this machine yet takes a network, and neither HF_HUB_OFFLINE nor "
            f"measure.local_files_only"
        ) from error
    return Backbone(name, *_of_images(model, processor, pooling), _classes(config, has_head))


def _classes(config: Any, has_head: bool) -> tuple[str, ...] | None:
    """What the head's outputs stand for, where somebody has said so."""
    names = [config.id2label[i] for i in sorted(config.id2label)] if has_head else []
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else tuple(names)


class Transformer(Answer):
    """A transformer, its last hidden states pooled."""

    def __init__(self, model: Any, pooling: str):
        super().__init__()
        self.model: Any = model
        self.first = pooling == "cls"

    def arguments(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def both(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        arguments, inner = self.arguments(batch), []
        hook = self.model.base_model.register_forward_hook(lambda module, given, out: inner.append(out))
        try:
            outer = self.model(**arguments, return_dict=True)
        finally:
            hook.remove()
        return self._pooled(inner[-1].last_hidden_state, arguments.get("attention_mask")), getattr(
            outer, "logits", None
        )

    def _pooled(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if states.ndim == 4:  # (n, d, h, w) of a convolutional model
            return states.mean((2, 3))
        if self.first:
            return states[:, 0]
        if mask is None:
            return states.mean(1)
        kept = mask.to(states.dtype)[..., None]
        return (states * kept).sum(1) / kept.sum(1).clamp(min=1)


class Texts(Transformer):
    """Takes tokens (n, fields, length), int64: `input_ids`, the mask, and token types where the model has them."""

    def __init__(self, model: Any, pooling: str, fields: tuple[str, ...]):
        super().__init__(model, pooling)
        self.fields = fields

    def arguments(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.fields, batch.unbind(1), strict=True))


def _of_texts(name: str, model: Any, tokenizer: Any, pooling: str, max_length: int) -> tuple[Answer, Any]:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise MeasurementError(f"model {name!r}: its tokenizer has no token to pad with; give it a pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    fields = tuple(field for field in _TEXT_FIELDS if field in tokenizer.model_input_names)
    limit = min(max_length, tokenizer.model_max_length, _positions(model))

    def prepare(texts: list[str]) -> torch.Tensor:
        if not all(isinstance(text, str) for text in texts):
            raise MeasurementError(f"model {name!r}: expected texts, got {type(texts[0]).__name__}")
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return torch.stack([tokens[field] for field in fields], 1)

    return Texts(model, "cls" if pooling == "cls" else "mean", fields), prepare


def _positions(model: Any) -> int:
    """How many tokens the model has position embeddings for; those of RoBERTa begin behind the padding's."""
    longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return longest - module.padding_idx - 1
    return longest


class Images(Transformer):
    """Takes pixels (n, 3, h, w) in [0, 1], as the image processor makes them up to its normalisation, done here."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, model: Any, pooling: str, mean: list[float], deviation: list[float]):
        super().__init__(model, pooling)
        for key, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(key, torch.tensor(values)[:, None, None], persistent=False)

    def arguments(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": (batch - self.mean) / self.deviation}


def _of_images(model: Any, processor: Any, pooling: str) -> tuple[Answer, Any]:
    normalises = getattr(processor, "do_normalize", False)
    mean, deviation = (processor.image_mean, processor.image_std) if normalises else ([0.0] * 3, [1.0] * 3)
    if pooling == "auto":
        pooling = "cls" if any(key.endswith("cls_token") for key, _ in model.named_parameters()) else "mean"

    def prepare(images: Any) -> torch.Tensor:
        done = processor(images=pictures(images), do_normalize=False, return_tensors="pt")["pixel_values"]
        return torch.as_tensor(np.asarray(done), dtype=torch.float32)

    return Images(model, pooling, list(mean), list(deviation)), prepare
