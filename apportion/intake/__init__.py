"""Readers: trained models and data come in here, exact or refused."""

from apportion.intake.audio import AudioSet, read_audio_set
from apportion.intake.hf_families import Pooling
from apportion.intake.images import ImageSet, read_images
from apportion.intake.inputs import opened
from apportion.intake.listen import Listen
from apportion.intake.parts import KINDS, Feed, Parts, Samples, matched, reader
from apportion.intake.preprocess import Preprocess
from apportion.intake.read import Source, read_model
from apportion.intake.rows import RowSet, Tabulate, read_rows
from apportion.intake.series import Align, SeriesSet, read_series
from apportion.intake.texts import TextSet, Tokenise, read_texts

__all__ = [
    "KINDS",
    "Align",
    "AudioSet",
    "Feed",
    "ImageSet",
    "Listen",
    "Parts",
    "Pooling",
    "Preprocess",
    "RowSet",
    "Samples",
    "SeriesSet",
    "Source",
    "Tabulate",
    "TextSet",
    "Tokenise",
    "matched",
    "opened",
    "read_audio_set",
    "read_images",
    "read_model",
    "read_rows",
    "read_series",
    "read_texts",
    "reader",
]
