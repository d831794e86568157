"""Byte data: corpora, training and validation windows, and streams from the Hugging Face hub."""

from arbs_jax.data.corpus import Corpus, memory_corpus, open_corpus, split, unigram_entropy
from arbs_jax.data.hub import HubSource, HubWindows, hub_validation, hub_windows, is_hub_source
from arbs_jax.data.windows import BatchIterator, TrainWindows, ValidationBatch, train_windows, validation_windows

__all__ = [
    "BatchIterator",
    "Corpus",
    "HubSource",
    "HubWindows",
    "TrainWindows",
    "ValidationBatch",
    "hub_validation",
    "hub_windows",
    "is_hub_source",
    "memory_corpus",
    "open_corpus",
    "split",
    "train_windows",
    "unigram_entropy",
    "validation_windows",
]
