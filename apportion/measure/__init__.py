"""Weighing: multiply-adds, milliseconds, bytes and quality, each with its conditions, and the page that shows them."""

from apportion.measure.outcomes import measure_outcomes

__all__ = ["measure_outcomes"]
