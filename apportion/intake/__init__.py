"""Readers: trained models and data come in here, exact or refused."""

from apportion.intake.images import ImageSet, read_images
from apportion.intake.preprocess import Preprocess
from apportion.intake.read import Source, read_model

__all__ = ["ImageSet", "Preprocess", "Source", "read_images", "read_model"]
