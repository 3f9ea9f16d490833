"""Deciding: how much compute an input needs, learned from tables of outcomes alone; no network is ever seen here."""

from apportion.control.controller import Controller, fit_controller
from apportion.control.ladder import candidates, choose_rungs
from apportion.control.operate import OperatingPoint, adaptive_gain, collapse, decide, frontier, operating_point

__all__ = ["Controller", "OperatingPoint", "adaptive_gain", "candidates", "choose_rungs", "collapse", "decide", "fit_controller", "frontier", "operating_point"]
