"""Deciding: how much compute an input needs, learned from tables of outcomes alone; no network is ever seen here."""

from apportion.control.bounds import Bounds, acceptable_chance, bounds
from apportion.control.cascade import Cascade, fit_cascade
from apportion.control.collapse import Watch, collapse, information
from apportion.control.controller import Controller, fit_controller
from apportion.control.entry import Entry, fit_entry
from apportion.control.guarantee import Certificate, certify
from apportion.control.ladder import candidates, choose_rungs, exits, offered
from apportion.control.operate import Decider, OperatingPoint, adaptive_gain, decide, frontier, operating_point

__all__ = [
    "Bounds",
    "Cascade",
    "Certificate",
    "Controller",
    "Decider",
    "Entry",
    "OperatingPoint",
    "Watch",
    "acceptable_chance",
    "adaptive_gain",
    "bounds",
    "candidates",
    "certify",
    "choose_rungs",
    "collapse",
    "decide",
    "exits",
    "fit_cascade",
    "fit_controller",
    "fit_entry",
    "frontier",
    "information",
    "offered",
    "operating_point",
]
