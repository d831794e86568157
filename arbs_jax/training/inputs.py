"""The data of a run: training batches with an exact position, validation windows, and facts about the corpus."""

from dataclasses import dataclass
from typing import Any

from arbs_jax.config import RunConfig
from arbs_jax.data import (
    BatchIterator,
    Corpus,
    ValidationBatch,
    hub_validation,
    hub_windows,
    is_hub_source,
    open_corpus,
    split,
    train_windows,
    unigram_entropy,
    validation_windows,
)


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    config: RunConfig
    validation: Corpus
    """Bytes held out."""
    unigram_entropy: float
    """Nats per byte of a model that knows byte frequencies alone; of the whole corpus, or a stream's held-out part."""
    name: str
    """The corpus, for people."""
    size: int | None
    """Its bytes; None for a stream."""
    training: Corpus | None
    """Bytes to train on; None for a stream."""

    @classmethod
    def open(cls, config: RunConfig) -> "Inputs":
        """Opens the configured source and holds part of it out.

        Raises:
            DataError: missing, empty or too short.
        """
        source, window = config.data.source, config.train.context + 1
        if source is not None and is_hub_source(source):
            held = hub_validation(source, validation_bytes=config.data.validation_bytes)
            return cls(config, held, unigram_entropy(held), source, None, None)
        corpus = open_corpus(source)
        training, held = split(corpus, config.data.validation_fraction, minimum=window)
        return cls(config, held, unigram_entropy(corpus), corpus.name, len(corpus), training)

    def batches(self) -> BatchIterator:
        """Training batches from step 0, uint8 (accum, batch, context + 1)."""
        train = self.config.train
        shape = {"context": train.context, "batch": train.batch, "accum": train.accum, "seed": train.seed}
        if self.training is not None:
            return train_windows(self.training, prefetch=0, **shape)
        return hub_windows(str(self.config.data.source), validation_bytes=self.config.data.validation_bytes, **shape)

    def validation_batches(self) -> list[ValidationBatch]:
        """Fixed validation windows of one static shape."""
        log, train = self.config.log, self.config.train
        return validation_windows(
            self.validation,
            context=train.context,
            batch=self.config.validation_batch,
            max_windows=log.eval_windows,
        )

    def facts(self) -> dict[str, Any]:
        """What `config.json` says of the data."""
        fingerprint = (self.training or self.validation).fingerprint
        return {"corpus": self.name, "corpus_bytes": self.size, "fingerprint": fingerprint}
